"""The page, open: by `dsvl demo`, and as a Hugging Face Space.

For a Space, copy this file as it is to `app.py`. Its `README.md` says `sdk: gradio` and, as `sdk_version`, a version of
Gradio that the extra `page` admits; its `requirements.txt` names this package with that extra
(`dsvl[page] @ git+https://...`). In the Space's settings, set

    DSVL_MODEL       the checkpoint's name on the Hub (a secret HF_TOKEN opens private ones)
    DSVL_SYSTEM      a system message instead of the model's own, if wanted
"""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from dsvl.chat import DSVLChat
from dsvl.page.examples import Example, drawn_examples
from dsvl.page.gate import Gate
from dsvl.page.interface import STYLE, build_page
from dsvl.page.limits import Limits
from dsvl.page.visitors import Visitors
from dsvl.utils.model_loading import load_checkpoint

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@contextlib.contextmanager
def open_page(
    model: Any,
    processor: Any,
    name: str,
    limits: Limits | None = None,
    examples: Sequence[Example] | None = None,
    system: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    allowed_hosts: Sequence[str] = LOOPBACK,
    share: bool = False,
    **chat: Any,
) -> Iterator[tuple[str, Visitors]]:
    """Open a page; it is closed, and all that was uploaded is deleted, when the context ends.

    Args:
        model: a DSVL model in evaluation mode.
        processor: its processor.
        name: the page's title.
        limits: see `Limits`.
        examples: questions and their images; by default some that are drawn.
        system: the system message, instead of the model's own.
        host: the address to listen on.
        port: to listen on; None takes a free one.
        allowed_hosts: names under which it answers: a page elsewhere that gives its own name this machine's address would
            use another. ("*",) for any.
        share: ask Gradio for a public address.
        chat: what `DSVLChat` takes: generation options, `overflow` ("drop" by default), `context_length`.

    Returns:
        its address, and the conversations.

    Raises:
        OSError: if the port is taken, or the host is no address of this machine.
    """
    limits = limits or Limits()
    options = {"overflow": "drop"} | chat

    def new_chat() -> DSVLChat:
        conversation = DSVLChat(model, processor, **options)
        if system is not None:
            conversation.messages.append({"role": "system", "content": system})
        return conversation

    visitors = Visitors(new_chat, limits)
    with tempfile.TemporaryDirectory(prefix="dsvl-page-") as folder, _environment("GRADIO_TEMP_DIR", folder):
        files = []
        for number, (text, images) in enumerate(drawn_examples() if examples is None else examples):
            paths = [Path(folder, f"example {number + 1}.{place + 1}.png") for place in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                image.save(path)
            files.append((text, paths))
        page = build_page(visitors, name, files)
        hosts = ("*",) if share else tuple(allowed_hosts)
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(Gate, limits=limits, uploads=Path(folder)),
        ]
        try:
            # Whatever has a default in an environment variable of Gradio's is given here: no variable opens the page wider.
            _, local, public = page.launch(
                server_name=host,
                server_port=_port(host, port or 0),
                share=share,
                quiet=True,
                inbrowser=False,
                prevent_thread_lock=True,
                show_error=False,
                allowed_paths=[],
                blocked_paths=[],
                max_file_size=limits.image_bytes,
                max_threads=limits.waiting + 40,  # events at once: a question that waits is one; 40 is Gradio's default
                app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
                state_session_capacity=16 * limits.conversations,
                enable_monitoring=False,
                run_history=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                num_workers=0,  # they would take and serve files on ports of their own, past the gate
                footer_links=[],
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=STYLE,
            )
            yield public or local, visitors
        finally:
            visitors.close()
            page.close(verbose=False)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _port(host: str, port: int) -> int:
    """The port, if it can be listened on; a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: one that has just ended holds none
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"Port {port} of {host} cannot be listened on: {error}; choose another port or host.") from error
        return int(probe.getsockname()[1])


def main() -> None:
    """Open the page of a Space."""
    name = os.environ.get("DSVL_MODEL")
    if not name:
        raise SystemExit("DSVL_MODEL is not set; in the Space's settings, give it the checkpoint's name on the Hub.")
    model, processor = load_checkpoint(name)
    # A Space is reached through a proxy, which Gradio finds by itself, and which names the host.
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    system = os.environ.get("DSVL_SYSTEM")
    with open_page(model, processor, name, system=system, host=host, port=port, allowed_hosts=("*",)):
        threading.Event().wait()


if __name__ == "__main__":
    main()

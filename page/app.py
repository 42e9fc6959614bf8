"""Starts the web page, for `dsvl demo` and as a Hugging Face Space.

For a Space, copy this file unchanged to `app.py`. In the `README.md` of the Space, set `sdk: gradio`, and `sdk_version` to a
version of Gradio that the extra `page` allows. In its `requirements.txt`, name this package with that extra
(`dsvl[page] @ git+https://...`). In its settings, set

    DSVL_MODEL       the checkpoint's name on the Hub (for a private one, add the secret HF_TOKEN)
    DSVL_SYSTEM      the system message, if not the checkpoint's
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
from dsvl.page.examples import Example, default_examples
from dsvl.page.interface import STYLE, build_page
from dsvl.page.limits import PageLimits
from dsvl.page.request_filter import RequestFilter
from dsvl.page.sessions import ChatSessions
from dsvl.utils.hosts import LOOPBACK
from dsvl.utils.model_loading import load_checkpoint


@contextlib.contextmanager
def open_page(
    model: Any,
    processor: Any,
    name: str,
    limits: PageLimits | None = None,
    examples: Sequence[Example] | None = None,
    system: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = 7860,
    allowed_hosts: Sequence[str] = LOOPBACK,
    share: bool = False,
    **chat: Any,
) -> Iterator[tuple[str, ChatSessions]]:
    """Start the page. When the context ends, the page is closed and all uploaded files are deleted.

    Args:
        model: a DSVL model in evaluation mode.
        processor: its processor.
        name: the title of the page.
        limits (*optional*): see `PageLimits`.
        examples (*optional*): example questions with their images; defaults to questions about drawn shapes.
        system (*optional*): the system message; defaults to the checkpoint's.
        host (*optional*, defaults to "127.0.0.1"): the address to listen on.
        port (*optional*, defaults to 7860): the port to listen on; None takes a free one.
        allowed_hosts (*optional*, defaults to the loopback names): the accepted `Host` headers; ("*",) accepts any. This
            prevents DNS rebinding: another website cannot reach the page under its own name.
        share (*optional*, defaults to `False`): whether to request a public address from Gradio.
        chat: arguments of `DSVLChat`: generation options, `context_length`, and `overflow`, which defaults to "drop".

    Yields:
        The address of the page, and its `ChatSessions`.

    Raises:
        OSError: if the port is in use, or the host is not an address of this machine.
    """
    limits = limits or PageLimits()
    options = {"overflow": "drop"} | chat

    def new_chat() -> DSVLChat:
        conversation = DSVLChat(model, processor, **options)
        if system is not None:
            conversation.messages.append({"role": "system", "content": system})
        return conversation

    sessions = ChatSessions(new_chat, limits)
    with tempfile.TemporaryDirectory(prefix="dsvl-page-") as folder, _environment("GRADIO_TEMP_DIR", folder):
        files = []
        for number, (text, images) in enumerate(default_examples() if examples is None else examples):
            paths = [Path(folder, f"example {number + 1}.{index + 1}.png") for index in range(len(images))]
            for path, image in zip(paths, images, strict=True):
                image.save(path)
            files.append((text, paths))
        page = build_page(sessions, name, files)
        hosts = ("*",) if share else tuple(allowed_hosts)
        middleware = [
            Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False),
            Middleware(RequestFilter, limits=limits, uploads=Path(folder)),
        ]
        try:
            # All arguments with defaults from environment variables are passed, so that no variable opens the page.
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
                max_file_size=max(limits.image_bytes, limits.video_bytes),
                max_threads=limits.waiting + 40,  # concurrent events, waiting questions included; 40 is Gradio's default
                app_kwargs={"middleware": middleware, "docs_url": None, "redoc_url": None, "openapi_url": None},
                state_session_capacity=16 * limits.conversations,
                enable_monitoring=False,
                run_history=False,
                mcp_server=False,
                ssr_mode=False,
                pwa=False,
                num_workers=0,  # workers would accept and serve files on their own ports, without the request filter
                footer_links=[],
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=STYLE,
            )
            yield public or local, sessions
        finally:
            sessions.close()
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
    """Check that a port is available; returns it, or a free one for 0."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # as the server does, so that a port can be used again at once
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise OSError(f"Cannot listen on port {port} of {host}: {error}; choose another port or host.") from error
        return int(probe.getsockname()[1])


def main() -> None:
    """Run the page of a Space."""
    name = os.environ.get("DSVL_MODEL")
    if not name:
        raise SystemExit("DSVL_MODEL is not set; set it to the checkpoint's name on the Hub, in the settings of the Space.")
    model, processor = load_checkpoint(name)
    # A Space is behind a proxy, which Gradio detects, and which sets the Host header.
    host, port = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    system = os.environ.get("DSVL_SYSTEM")
    with open_page(model, processor, name, system=system, host=host, port=port, allowed_hosts=("*",)):
        threading.Event().wait()


if __name__ == "__main__":
    main()

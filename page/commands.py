"""The command `dsvl demo`."""

import argparse
import contextlib
import threading
from pathlib import Path

from ..image_library.flags import make_library
from ..utils.deprecation import RenamedFlag
from ..utils.hosts import LOOPBACK, is_loopback
from ..utils.local_paths import check_exists
from ..utils.model_arguments import add_conversation_arguments, generation_options


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl demo` to the parser of `dsvl`."""
    parser = commands.add_parser("demo", help="talk to a checkpoint on a page in the browser")
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint directory, or a name on the Hub")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default 7860)")
    parser.add_argument(
        "--share", action="store_true", help="request a public address from Gradio, served through its servers"
    )
    parser.add_argument("--name", help="title of the page (default: the last part of DIR)")
    parser.add_argument("--system", help="the system message (default: the checkpoint's)")
    parser.add_argument(
        "--examples", type=check_exists, metavar="FILE", help="conversations whose first questions are shown as examples"
    )
    parser.add_argument(
        "--max-images",
        type=int,
        default=8,
        help="images and videos per question; a conversation may have twice as many (default 8)",
    )
    parser.add_argument("--max-pictures", dest="max_images", type=int, action=RenamedFlag)
    parser.add_argument("--max-megapixels", type=float, default=25, help="size of an image (default 25)")
    parser.add_argument("--max-megabytes", type=float, default=16, help="size of an image file (default 16)")
    parser.add_argument("--max-video-frames", type=int, default=32, help="frames of a video (default 32)")
    parser.add_argument("--max-video-seconds", type=float, default=600, help="length of a video (default 600)")
    parser.add_argument("--max-video-megabytes", type=float, default=64, help="size of a video file (default 64)")
    parser.add_argument("--max-waiting", type=int, default=32, help="questions in the queue (default 32)")
    parser.add_argument("--max-caches", type=int, default=4, help="conversations whose KV cache is kept (default 4)")
    add_conversation_arguments(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    try:
        from .app import open_page
    except ImportError as error:
        raise ImportError(f"{error}; dsvl demo needs more packages: pip install 'dsvl[page]'") from error
    from transformers import set_seed
    from transformers.utils import logging

    from ..utils.model_loading import load_checkpoint
    from .examples import read_examples
    from .limits import PageLimits

    positive = ("max_images", "max_megapixels", "max_megabytes", "max_video_frames", "max_video_seconds")
    for name in (*positive, "max_video_megabytes", "max_waiting", "max_caches"):
        if getattr(arguments, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; pass more than 0")
    limits = PageLimits(
        images=arguments.max_images,
        conversation_images=2 * arguments.max_images,
        image_bytes=int(arguments.max_megabytes * 2**20),
        image_pixels=int(arguments.max_megapixels * 1e6),
        video_frames=arguments.max_video_frames,
        video_seconds=arguments.max_video_seconds,
        video_bytes=int(arguments.max_video_megabytes * 2**20),
        waiting=arguments.max_waiting,
        caches=arguments.max_caches,
    )
    examples = None if arguments.examples is None else read_examples(arguments.examples)
    logging.set_verbosity_error()
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    if arguments.compile_text_prefill:
        model.compile_text_prefill()
    model.image_library = make_library(arguments, model)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    local = is_loopback(arguments.host)
    page = open_page(
        model,
        processor,
        arguments.name or Path(arguments.model).resolve().name,
        limits,
        examples,
        arguments.system,
        host=arguments.host,
        port=arguments.port,
        allowed_hosts=LOOPBACK if local else ("*",),
        share=arguments.share,
        overflow=arguments.overflow,
        context_length=arguments.context_length,
        chat_template_kwargs=arguments.chat_template_kwargs,
        **generation_options(arguments),
    )
    with contextlib.suppress(KeyboardInterrupt), page as (address, _):
        print(f"dsvl demo: {address}; Ctrl-C ends it", flush=True)
        if arguments.share or not local:
            print("dsvl demo: anyone who can reach this address can use it; there is no password", flush=True)
        threading.Event().wait()

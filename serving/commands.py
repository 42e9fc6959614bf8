"""The command `dsvl serve`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..image_library.flags import add_library_arguments, make_library
from ..utils.deprecation import RenamedFlag
from ..utils.hosts import LOOPBACK, is_loopback
from ..utils.local_paths import check_exists
from ..utils.model_arguments import add_compile_argument, add_loading_arguments

if TYPE_CHECKING:
    from .requests import RequestLimits

# Flags without a default of their own, which is that of `RequestLimits`: vLLM has no counterpart, so that it has to be known
# whether they were given.
OPTIONAL_LIMITS = {
    "max_tiles": "tiles",
    "max_videos_per_request": "videos",
    "max_video_frames": "video_frames",
    "max_video_seconds": "video_seconds",
}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl serve` to the parser of `dsvl`."""
    parser = commands.add_parser("serve", help="serve a checkpoint with the OpenAI chat-completions API")
    parser.remainder = "engine_arguments"  # type: ignore[attr-defined]  # see CommandParser
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint directory, or a name on the Hub")
    parser.add_argument(
        "--engine",
        choices=("transformers", "vllm"),
        default="transformers",
        help="transformers: the built-in server, for one machine; vllm: vLLM's server with the same limits, to which "
        "everything after -- is passed, such as -- --tensor-parallel-size 2 (default transformers)",
    )
    parser.add_argument("--name", help="the model's name for clients (default: the last part of DIR)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--max-batch", type=int, default=16, help="requests per batch (default 16)")
    parser.add_argument(
        "--max-requests", type=int, default=128, help="concurrent requests, waiting ones included (default 128)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="maximum length of an answer (default 4096)")
    parser.add_argument("--max-images", type=int, default=8, help="images per request (default 8)")
    parser.add_argument("--max-tiles", type=int, help="tiles of all images of a request (default 128)")
    parser.add_argument("--max-pictures", dest="max_images", type=int, action=RenamedFlag)
    parser.add_argument("--max-megapixels", type=float, default=25, help="size of an image (default 25)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="size of a request (default 32)")
    parser.add_argument("--max-videos-per-request", type=int, help="videos of a request (default 1; 0 for none)")
    parser.add_argument("--max-video-frames", type=int, help="frames of all videos of a request together (default 64)")
    parser.add_argument("--max-video-seconds", type=float, help="length of a video (default 600)")
    parser.add_argument("--allow-urls", action="store_true", help="download images and videos from public http(s) URLs")
    library = add_library_arguments(parser, default="on")
    library.add_argument(
        "--preload",
        nargs="+",
        action="extend",
        metavar="IMAGES",
        help="image files and directories to compute before the start; with numbered images, each as the first image of a "
        "conversation",
    )
    add_compile_argument(add_loading_arguments(parser))
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    if arguments.engine == "transformers" and arguments.engine_arguments:
        raise ValueError(f"{' '.join(arguments.engine_arguments)} after -- is for vLLM's server; add --engine vllm")
    for name in ("max_batch", "max_requests", "max_new_tokens", "max_tiles", "max_video_frames"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; pass 1 or more")
    if arguments.engine == "vllm":
        _run_vllm(arguments)
    else:
        _run_transformers(arguments)


def _run_transformers(arguments: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ..image_library.preload import image_files, preload
        from ..utils.model_loading import load_checkpoint
        from .app import build_app
        from .connections import UVICORN
        from .images import FORMATS
    except ImportError as error:
        raise ImportError(f"{error}; dsvl serve needs more packages: pip install 'dsvl[serve]'") from error

    limits, local = _limits(arguments), is_loopback(arguments.host)
    files = image_files(arguments.preload or ())
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    if arguments.compile_text_prefill:
        model.compile_text_prefill()
    library = make_library(arguments, model)
    hosts = LOOPBACK if local else ("*",)
    app = build_app(model, processor, _name(arguments), limits, arguments.max_batch, hosts, library)
    if library is not None:
        print(f"dsvl serve: {library.describe()}; --image-cache off turns it off", flush=True)
        if files:
            source_of = app.state.chat.source_of
            kept, number = preload(library, model, processor, files, source_of, limits.image_pixels, FORMATS)
            print(f"dsvl serve: {kept:,} of {number:,} preloaded images are in main memory", flush=True)
    _announce(arguments, "Ctrl-C ends it")
    uvicorn.run(app, host=arguments.host, port=arguments.port, **UVICORN)
    if library is not None:
        counts = library.counts
        print(f"dsvl serve: of {counts.hits + counts.misses:,} images {counts.hits:,} were in the library", flush=True)


def _run_vllm(arguments: argparse.Namespace) -> None:
    """Replace this process by vLLM's server."""
    from .vllm_server.machine import find_machine

    machine = find_machine()  # before what needs packages that vLLM brings
    from ..configuration_dsvl import DSVLConfig
    from .vllm_server.command import check_flags, greedy_by_default, vllm_command

    check_flags(arguments, os.environ)
    config = DSVLConfig.from_pretrained(arguments.model)
    argv, environment = vllm_command(
        arguments,
        _name(arguments),
        _limits(arguments),
        config,
        greedy_by_default(arguments.model),
        machine,
        os.environ,
    )
    _announce(arguments, f"{machine.distribution} {machine.version} starts")
    os.execve(sys.executable, [sys.executable, *argv], environment)


def _limits(arguments: argparse.Namespace) -> "RequestLimits":
    from .requests import RequestLimits

    given = {field: getattr(arguments, name) for name, field in OPTIONAL_LIMITS.items()}
    return RequestLimits(
        requests=arguments.max_requests,
        body_bytes=int(arguments.max_megabytes * 2**20),
        images=arguments.max_images,
        image_pixels=int(arguments.max_megapixels * 1e6),
        new_tokens=arguments.max_new_tokens,
        allow_urls=arguments.allow_urls,
        **{field: value for field, value in given.items() if value is not None},
    )


def _name(arguments: argparse.Namespace) -> str:
    """The model's name for clients."""
    return arguments.name or Path(arguments.model).resolve().name


def _announce(arguments: argparse.Namespace, what: str) -> None:
    print(f"dsvl serve: {_name(arguments)} at http://{arguments.host}:{arguments.port}/v1; {what}", flush=True)
    if not is_loopback(arguments.host):
        print("dsvl serve: anyone who can reach this address can use it; there is no API key", flush=True)

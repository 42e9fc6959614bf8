"""The command `dsvl serve`."""

import argparse
from pathlib import Path

from ..image_library.flags import add_library_arguments, make_library
from ..utils.deprecation import RenamedFlag
from ..utils.hosts import LOOPBACK, is_loopback
from ..utils.local_paths import check_exists
from ..utils.model_arguments import add_loading_arguments


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl serve` to the parser of `dsvl`."""
    parser = commands.add_parser("serve", help="serve a checkpoint with the OpenAI chat-completions API")
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint directory, or a name on the Hub")
    parser.add_argument("--name", help="the model's name for clients (default: the last part of DIR)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000)")
    parser.add_argument("--max-batch", type=int, default=16, help="requests per batch (default 16)")
    parser.add_argument(
        "--max-requests", type=int, default=128, help="concurrent requests, waiting ones included (default 128)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="maximum length of an answer (default 4096)")
    parser.add_argument("--max-images", type=int, default=8, help="images per request (default 8)")
    parser.add_argument("--max-tiles", type=int, default=128, help="tiles of all images of a request (default 128)")
    parser.add_argument("--max-pictures", dest="max_images", type=int, action=RenamedFlag)
    parser.add_argument("--max-megapixels", type=float, default=25, help="size of an image (default 25)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="size of a request (default 32)")
    parser.add_argument("--max-videos-per-request", type=int, default=1, help="videos of a request (default 1; 0 for none)")
    parser.add_argument(
        "--max-video-frames", type=int, default=64, help="frames of all videos of a request together (default 64)"
    )
    parser.add_argument("--max-video-seconds", type=float, default=600, help="length of a video (default 600)")
    parser.add_argument("--allow-urls", action="store_true", help="download images and videos from public http(s) URLs")
    library = add_library_arguments(parser, default="on")
    library.add_argument(
        "--preload",
        nargs="+",
        action="extend",
        metavar="IMAGES",
        help="image files and directories to compute before the start",
    )
    add_loading_arguments(parser)
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ..image_library.preload import image_files, preload
        from ..utils.model_loading import load_checkpoint
        from .app import build_app
        from .connections import UVICORN
        from .images import FORMATS
        from .requests import RequestLimits
    except ImportError as error:
        raise ImportError(f"{error}; dsvl serve needs more packages: pip install 'dsvl[serve]'") from error

    for name in ("max_batch", "max_requests", "max_new_tokens", "max_tiles", "max_video_frames"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; pass 1 or more")
    limits = RequestLimits(
        requests=arguments.max_requests,
        body_bytes=int(arguments.max_megabytes * 2**20),
        images=arguments.max_images,
        tiles=arguments.max_tiles,
        image_pixels=int(arguments.max_megapixels * 1e6),
        videos=arguments.max_videos_per_request,
        video_frames=arguments.max_video_frames,
        video_seconds=arguments.max_video_seconds,
        new_tokens=arguments.max_new_tokens,
        allow_urls=arguments.allow_urls,
    )
    files = image_files(arguments.preload or ())
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    name = arguments.name or Path(arguments.model).resolve().name
    local = is_loopback(arguments.host)
    library = make_library(arguments, model)
    app = build_app(model, processor, name, limits, arguments.max_batch, LOOPBACK if local else ("*",), library)
    if library is not None:
        print(f"dsvl serve: {library.describe()}; --image-cache off turns it off", flush=True)
        if files:
            source_of = app.state.chat.source_of
            kept, number = preload(library, model, processor, files, source_of, limits.image_pixels, FORMATS)
            print(f"dsvl serve: {kept:,} of {number:,} preloaded images are in main memory", flush=True)
    print(f"dsvl serve: {name} at http://{arguments.host}:{arguments.port}/v1; Ctrl-C ends it", flush=True)
    if not local:
        print("dsvl serve: anyone who can reach this address can use it; there is no API key", flush=True)
    uvicorn.run(app, host=arguments.host, port=arguments.port, **UVICORN)
    if library is not None:
        counts = library.counts
        print(f"dsvl serve: of {counts.hits + counts.misses:,} images {counts.hits:,} were in the library", flush=True)

"""`dsvl serve`."""

import argparse
import ipaddress
from pathlib import Path

from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl serve` to the command's parser."""
    parser = commands.add_parser("serve", help="a checkpoint behind the OpenAI chat-completions protocol")
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint directory, or a name on the Hub")
    parser.add_argument("--name", help="what clients call the model (default: the last part of DIR)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="to listen on (default 8000)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, auto (several), ... (default: a GPU if there is one)")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the checkpoint's)")
    parser.add_argument("--quantization", choices=("4bit", "8bit"), help="of the decoder, by bitsandbytes")
    parser.add_argument("--attn-implementation", help="of the decoder: eager, sdpa or flex_attention")
    parser.add_argument("--max-batch", type=int, default=16, help="answers generated together (default 16)")
    parser.add_argument("--max-requests", type=int, default=128, help="held at once, more are refused (default 128)")
    parser.add_argument("--max-new-tokens", type=int, default=4096, help="of an answer, at most (default 4096)")
    parser.add_argument("--max-images", type=int, default=8, help="of a request (default 8)")
    parser.add_argument("--max-megapixels", type=float, default=25, help="of an image (default 25)")
    parser.add_argument("--max-megabytes", type=float, default=32, help="of a request (default 32)")
    parser.add_argument("--allow-urls", action="store_true", help="fetch images from public http(s) addresses")
    parser.set_defaults(run=_serve)


def _serve(arguments: argparse.Namespace) -> None:
    try:
        import uvicorn

        from ..utils.model_loading import load_checkpoint
        from .app import LOOPBACK, build_app
        from .connections import UVICORN
        from .requests import Limits
    except ImportError as error:
        raise ImportError(f"{error}; dsvl serve needs more packages: pip install 'dsvl[serve]'") from error

    for name in ("max_batch", "max_requests", "max_new_tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}; pass 1 or more")
    limits = Limits(
        requests=arguments.max_requests,
        body_bytes=int(arguments.max_megabytes * 2**20),
        images=arguments.max_images,
        image_pixels=int(arguments.max_megapixels * 1e6),
        new_tokens=arguments.max_new_tokens,
        allow_urls=arguments.allow_urls,
    )
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    name = arguments.name or Path(arguments.model).resolve().name
    hosts = LOOPBACK if _is_loopback(arguments.host) else ("*",)
    app = build_app(model, processor, name, limits, arguments.max_batch, hosts)
    print(f"dsvl serve: {name} at http://{arguments.host}:{arguments.port}/v1; Ctrl-C ends it", flush=True)
    if hosts == ("*",):
        print("dsvl serve: whoever reaches this address can use it; there is no key", flush=True)
    uvicorn.run(app, host=arguments.host, port=arguments.port, **UVICORN)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

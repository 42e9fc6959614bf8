"""The command `dsvl chat`."""

import argparse

from ..image_library.flags import make_library
from ..utils.local_paths import check_exists
from ..utils.model_arguments import add_conversation_arguments, generation_options


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl chat` to the parser of `dsvl`."""
    parser = commands.add_parser("chat", help="talk to a checkpoint in the terminal")
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint directory, or a name on the Hub")
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="images for the first question")
    parser.add_argument("--video", nargs="+", action="extend", default=[], help="videos for the first question")
    parser.add_argument(
        "--allow-urls", action="store_true", help="allow images and videos to be http(s) URLs, which are downloaded"
    )
    parser.add_argument("--system", help="the system message (default: the checkpoint's)")
    parser.add_argument("--load", type=check_exists, metavar="DIR", help="continue a saved conversation")
    parser.add_argument("--stats", action="store_true", help="print token counts and times after each answer")
    parser.add_argument("--no-history", action="store_true", help="do not write the input history to a file")

    loading = add_conversation_arguments(parser)
    loading.add_argument(
        "--cache-implementation",
        choices=("dynamic", "static"),
        help="kind of KV cache; with static, decoding is compiled on a GPU",
    )
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> None:
    from .terminal import Terminal, line_reader

    read = line_reader(history=not arguments.no_history)  # before the model is loaded: it may miss a package
    from transformers import set_seed
    from transformers.utils import logging

    from ..utils.model_loading import load_checkpoint
    from .conversation import DSVLChat

    logging.set_verbosity_error()  # hints about generation options would appear between the lines of the chat
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    if arguments.compile_text_prefill:
        model.compile_text_prefill()
    model.image_library = make_library(arguments, model)
    if arguments.seed is not None:
        set_seed(arguments.seed)
    chat = DSVLChat(
        model,
        processor,
        overflow=arguments.overflow,
        context_length=arguments.context_length,
        chat_template_kwargs=arguments.chat_template_kwargs,
        allow_urls=arguments.allow_urls,
        **generation_options(arguments),
    )
    terminal = Terminal(chat, read, stats=arguments.stats)
    if arguments.load is not None:
        terminal.load(arguments.load)
    if arguments.system is not None:
        terminal.set_system(arguments.system)
    terminal.add_images(arguments.image)
    terminal.add_videos(arguments.video)
    terminal.run()

"""`dsvl chat`."""

import argparse

from ..utils.local_paths import check_exists
from ..utils.quantization_choices import QUANTIZATIONS


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl chat` to the command's parser."""
    parser = commands.add_parser("chat", help="talk to a checkpoint in the terminal")
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint, or its name on the Hub")
    parser.add_argument("--image", nargs="+", action="extend", default=[], help="images for the first question")
    parser.add_argument("--allow-urls", action="store_true", help="images may be http(s) addresses, which are fetched")
    parser.add_argument("--system", help="the system message, instead of the model's own")
    parser.add_argument("--load", type=check_exists, metavar="DIR", help="go on with a conversation that was saved")
    parser.add_argument("--stats", action="store_true", help="say after each answer what it cost")
    parser.add_argument("--no-history", action="store_true", help="keep no file of what was typed")

    how = add_conversation_arguments(parser)
    how.add_argument("--cache-implementation", choices=("dynamic", "static"), help="static is compiled on a GPU")
    parser.set_defaults(run=_chat)


def add_conversation_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what `dsvl chat` and `dsvl demo` can be told of running and generating; returns the group about running."""
    how = add_loading_arguments(parser)
    how.add_argument("--context-length", type=int, help="in tokens (default: what the decoder's positions allow)")
    how.add_argument(
        "--overflow", choices=("drop", "error"), default="drop", help="a full context drops the oldest rounds (default)"
    )
    add_generation_arguments(parser, "the checkpoint's own settings", "512, if the checkpoint does not say")
    return how


def add_loading_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add what `loading.load` takes; returns the group."""
    how = parser.add_argument_group("how to run it")
    how.add_argument("--device", help="cuda, cuda:1, mps, cpu; auto: spread over all (default: a GPU, if there is one)")
    how.add_argument("--dtype", default="auto", help="float32, bfloat16, float16 (default: as saved)")
    how.add_argument(
        "--quantization", choices=QUANTIZATIONS, help="of the decoder's layers; needs bitsandbytes, int8 torchao"
    )
    how.add_argument("--attn-implementation", help="the decoder's: sdpa, eager, flex_attention")
    return how


def add_generation_arguments(parser: argparse.ArgumentParser, default: str, length: str) -> argparse._ArgumentGroup:
    """Add what `generation_options` reads; returns the group.

    Args:
        parser: the command's.
        default: what holds where nothing is given, in words.
        length: of an answer, likewise.
    """
    options = parser.add_argument_group(f"generation (default: {default})")
    options.add_argument("--max-new-tokens", type=int, help=f"of an answer (default {length})")
    options.add_argument("--temperature", type=float, help="sample at this temperature; 0 takes the likeliest token")
    options.add_argument("--top-p", type=float)
    options.add_argument("--top-k", type=int)
    options.add_argument("--repetition-penalty", type=float)
    options.add_argument("--seed", type=int, help="of sampling")
    return options


def generation_options(arguments: argparse.Namespace) -> dict[str, object]:
    """What `generate()` takes, of the arguments that were given."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "cache_implementation")
    given: dict[str, object] = {
        name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None
    }
    if given.get("temperature") == 0:
        del given["temperature"]
        given["do_sample"] = False
    elif {"temperature", "top_p", "top_k"} & set(given):
        given["do_sample"] = True
    return given


def _chat(arguments: argparse.Namespace) -> None:
    from .terminal import Terminal, line_reader

    read = line_reader(history=not arguments.no_history)  # first: what is not installed is told before a model is loaded
    from transformers import set_seed
    from transformers.utils import logging

    from ..utils.model_loading import load_checkpoint
    from .conversation import DSVLChat

    logging.set_verbosity_error()  # its advice on options would stand between the lines
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    if arguments.seed is not None:
        set_seed(arguments.seed)
    chat = DSVLChat(
        model,
        processor,
        overflow=arguments.overflow,
        context_length=arguments.context_length,
        allow_urls=arguments.allow_urls,
        **generation_options(arguments),
    )
    terminal = Terminal(chat, read, stats=arguments.stats)
    if arguments.load is not None:
        terminal.load(arguments.load)
    if arguments.system is not None:
        terminal.system(arguments.system)
    terminal.add_images(arguments.image)
    terminal.run()

"""Command-line arguments for loading a checkpoint and for generating, shared by several commands."""

import argparse
import json
from typing import Any

from ..image_library.flags import add_library_arguments
from .quantization_choices import QUANTIZATIONS


def add_loading_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the arguments of `load`; returns their group."""
    group = parser.add_argument_group("loading")
    group.add_argument(
        "--device", help="cuda, cuda:1, mps, cpu, or auto to spread the model over all devices (default: a GPU if available)"
    )
    group.add_argument("--dtype", default="auto", help="float32, bfloat16 or float16 (default: the checkpoint's)")
    group.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        help="quantize the decoder's layers: 4bit and 8bit need bitsandbytes, int8 and fp8 need torchao",
    )
    group.add_argument("--attn-implementation", help="attention of the decoder: sdpa, eager or flex_attention")
    return group


def add_compile_argument(group: argparse._ArgumentGroup) -> None:
    """Add the flag of commands that answer one question after another to their group of `add_loading_arguments`."""
    group.add_argument(
        "--compile-text-prefill",
        action="store_true",
        default=None,
        help="compile what runs before the first token of an answer, for GPUs; the first question waits for it, a minute "
        "with 7 billion parameters",
    )


def add_generation_arguments(parser: argparse.ArgumentParser, default: str, length: str) -> argparse._ArgumentGroup:
    """Add the arguments that `generation_options` reads; returns their group.

    Args:
        parser: the command's parser.
        default: what applies where an argument is not given, for the help.
        length: the default of `--max-new-tokens`, for the help.
    """
    group = parser.add_argument_group(f"generation (default: {default})")
    group.add_argument("--max-new-tokens", type=int, help=f"maximum length of an answer (default: {length})")
    group.add_argument("--temperature", type=float, help="sampling temperature; 0 decodes greedily")
    group.add_argument("--top-p", type=float, help="sample from the most likely tokens with this total probability")
    group.add_argument("--top-k", type=int, help="sample from this many most likely tokens")
    group.add_argument("--repetition-penalty", type=float, help="penalty for tokens that occur already; 1 is none")
    group.add_argument("--seed", type=int, help="random seed for sampling")
    return group


def add_conversation_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add the arguments of `dsvl chat` and `dsvl demo` for loading, context, generation and images; returns the loading
    group."""
    group = add_loading_arguments(parser)
    add_compile_argument(group)
    group.add_argument(
        "--context-length", type=int, help="length in tokens (default: the decoder's max_position_embeddings)"
    )
    group.add_argument(
        "--overflow",
        choices=("drop", "error"),
        default="drop",
        help="when the context is full: drop the oldest turns, or report an error (default: drop)",
    )
    group.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="variables of the chat template, such as '{\"enable_thinking\": false}'",
    )
    add_generation_arguments(parser, "the checkpoint's generation config", "the checkpoint's, else 512")
    add_library_arguments(parser, default="on")
    return group


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object, the value of a flag."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as '{{\"enable_thinking\": false}}'")
    return value


def generation_options(arguments: argparse.Namespace) -> dict[str, object]:
    """The keyword arguments of `generate()` for the given arguments; those that were not given are absent."""
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

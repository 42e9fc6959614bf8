"""`dsvl evaluate`."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.commands import MAX_BAD_SAMPLES_HELP
from ..image_library.flags import add_library_arguments, make_library
from ..utils.local_paths import check_exists, check_outputs
from ..utils.model_arguments import add_generation_arguments, add_loading_arguments, generation_options
from .compare_command import add_report_arguments, report_outputs, write_reports

if TYPE_CHECKING:
    from .answer_file import AnswerFile
    from .evaluator import Evaluator

MAX_NEW_TOKENS = 256  # DeepSpeed-VisualChat's; at most a quarter of the context

# Arguments that apply to --text alone, and to DATA alone.
TEXT_ONLY = ("language", "window", "stride")
ANSWERS_ONLY = (
    *("split", "csv", "html", "batch_size", "given_answers", "on_bad_sample", "max_bad_samples", "allow_urls"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed", "num_beams"),
    *("image_cache", "image_cache_dir", "image_cache_bits"),
)


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl evaluate` to the command's parser."""
    parser = commands.add_parser(
        "evaluate", help="generate and score a checkpoint's answers to a data set, or measure its text perplexity"
    )
    parser.add_argument("model", type=check_exists, metavar="DIR", help="a checkpoint, or its name on the Hub")
    parser.add_argument(
        "data",
        type=check_exists,
        nargs="?",
        metavar="DATA",
        help="conversations as for dsvl train, or an evaluation file of DeepSpeed-VisualChat",
    )
    parser.add_argument("--split", default="train", help="split of the data set, if it has several (default train)")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="JSON lines file for the answers; an existing one is resumed (default answers.jsonl). With --text, JSON file "
        "for the result (default text.json)",
    )
    add_report_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="questions in a batch (default 8)")
    parser.add_argument(
        "--given-answers", action="store_true", help="ask follow-ups after the data's answers instead of the model's own"
    )
    parser.add_argument(
        "--on-bad-sample",
        choices=("error", "skip"),
        default="error",
        help="for invalid conversations or images (default error)",
    )
    parser.add_argument("--max-bad-samples", type=float, default=0.05, help=MAX_BAD_SAMPLES_HELP)
    parser.add_argument("--allow-urls", action="store_true", help="allow images with http(s) URLs, which are fetched")
    text = parser.add_argument_group("perplexity of a text, instead of answers")
    text.add_argument(
        "--text",
        type=check_exists,
        metavar="FILE",
        help='plain text, or JSON lines (or a JSON array) of {"text": "..."}; added to the model card',
    )
    text.add_argument(
        "--language",
        type=check_exists,
        metavar="NAME",
        help="the original language model (directory or Hub name) to compare with; the result goes into DIR's model card",
    )
    text.add_argument("--window", type=int, metavar="N", help="tokens of a window (default 2048, or the context length)")
    text.add_argument(
        "--stride", type=int, metavar="N", help="tokens between the starts of two windows (default half a window)"
    )
    add_loading_arguments(parser)
    options = add_generation_arguments(
        parser, "greedy, whatever the checkpoint's own settings are", "256, or a quarter of the context"
    )
    options.add_argument("--num-beams", type=int, help="number of beams of beam search (default 1)")
    add_library_arguments(parser, default="off")
    parser.set_defaults(run=_evaluate, default_of=parser.get_default)


def _evaluate(arguments: argparse.Namespace) -> None:
    if (arguments.data is None) == (arguments.text is None):
        raise ValueError("Pass either DATA, for answers to its questions, or --text FILE, for the perplexity of a text.")
    without, flag = (TEXT_ONLY, "--text") if arguments.text is None else (ANSWERS_ONLY, "DATA")
    given = [name for name in without if getattr(arguments, name) != arguments.default_of(name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{flags} without {flag} has no effect; omit it.")
    if arguments.text is not None:
        from .text_command import evaluate_text

        evaluate_text(arguments)
        return
    arguments.out = arguments.out or "answers.jsonl"
    from .answer_file import AnswerFile, checkpoint_fingerprint, summary_path

    outputs = {"--out": arguments.out, "the summary of --out": summary_path(arguments.out)}
    check_outputs(outputs | report_outputs(arguments), [arguments.data, arguments.model])
    try:
        import rapidfuzz  # noqa: F401  (for the scores; checked before a model is loaded)
    except ImportError as error:
        raise ImportError(f"{error}; dsvl evaluate needs it for its scores: pip install 'dsvl[evaluate]'") from error
    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; pass 1 or more.")
    import torch

    from ..utils.model_loading import load_checkpoint
    from .evaluator import Evaluator
    from .questions import Questions

    questions = Questions(
        arguments.data, arguments.on_bad_sample, arguments.split, arguments.allow_urls, arguments.max_bad_samples
    )
    model, processor = load_checkpoint(
        arguments.model, arguments.device, arguments.dtype, arguments.quantization, arguments.attn_implementation
    )
    model.image_library = make_library(arguments, model)
    options = _options(arguments, model)
    header = {
        "model": arguments.model.rstrip("/") or arguments.model,
        "data": arguments.data,
        "options": options
        | {
            "given_answers": arguments.given_answers,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": arguments.quantization,
            "attn_implementation": model.config.text_config._attn_implementation,
        }
        | ({"image_cache_bits": 8} if arguments.image_cache_bits == 8 else {}),
        "fingerprint": {"model": checkpoint_fingerprint(arguments.model), "data": questions.fingerprint},
    }
    evaluator = Evaluator(
        model,
        processor,
        questions,
        batch_size=arguments.batch_size,
        given_answers=arguments.given_answers,
        allow_urls=arguments.allow_urls,
        **options,
    )
    file = AnswerFile(arguments.out, header)
    file.check_conversations({outline.id: len(outline.answered) for outline in questions.outlines})
    try:
        summary = evaluator.run(file)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"Interrupted. {arguments.out} holds {len(file.answers):,} answers; run the same command to resume."
        ) from None
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of memory ({error}); run the same command with a --batch-size below {arguments.batch_size} to resume from "
            f"{len(file.answers):,} answers."
        ) from error
    print("\n".join(_summary_lines(summary, file, evaluator)))
    if not file.answers:
        raise ValueError(f"no question of {arguments.data} could be asked.")
    name = Path(header["model"]).resolve().name
    runs = {name: list(file.answers.values())}
    write_reports(arguments, runs, title=f"{name}: answers to {Path(arguments.data).name}")


def _options(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The generation options, which the summary records."""
    from .generate_answers import GREEDY

    context = model.config.text_config.max_position_embeddings
    names = ("do_sample", "num_beams", "repetition_penalty")
    options: dict[str, Any] = {name: GREEDY[name] for name in names} | generation_options(arguments)
    options.setdefault("max_new_tokens", min(MAX_NEW_TOKENS, context // 4))
    if arguments.num_beams is not None:
        options["num_beams"] = arguments.num_beams
    if options["do_sample"]:
        options = {name: GREEDY[name] for name in ("temperature", "top_p", "top_k")} | options
        options["seed"] = arguments.seed or 0
    for name in ("max_new_tokens", "num_beams"):
        if options[name] < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {options[name]}; pass 1 or more.")
    if options["max_new_tokens"] >= context:
        raise ValueError(f"--max-new-tokens is {options['max_new_tokens']}, but the context length is {context}; pass less.")
    return options


def _summary_lines(summary: dict[str, Any], file: "AnswerFile", evaluator: "Evaluator") -> list[str]:
    counts = summary["counts"]
    lines = [
        f"{file.path}: {counts['answered']:,} of {counts['turns']:,} questions in {counts['conversations']:,} "
        "conversations are answered"
    ]
    conversations = counts["conversations"]
    samples = conversations + counts["samples_skipped"]
    reasons = {
        "samples_skipped": f"of {samples:,} samples skipped: not conversations",
        "conversations_skipped": f"of {conversations:,} conversations skipped for images that {file.summary} names",
        "turns_too_long": f"of {counts['turns']:,} questions skipped: they exceed the context length",
    }
    lines += [f"  {counts[name]:,} {reason}" for name, reason in reasons.items() if counts[name]]
    lines += [f"{metric:<14}{mean:.3f}  ({number:,} questions)" for metric, (mean, number) in file.scores().items()]
    if evaluator.tokens:
        speed = evaluator.tokens / evaluator.seconds
        lines.append(f"{evaluator.tokens:,} tokens in {evaluator.seconds:.1f} s: {speed:,.0f} tokens/s")
    return lines

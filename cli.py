"""The command `dsvl`."""

import argparse
import sys
from collections.abc import Sequence

from .chat import commands as chat
from .configuration_dsvl import FEATURE_SELECT_STRATEGIES, MULTIMODAL_ATTENTIONS, PROJECTOR_TYPES
from .data import commands as data
from .evaluation import commands as evaluation
from .evaluation import compare
from .migration import commands as migration
from .page import commands as page
from .publishing import commands as publishing
from .serving import commands as serving


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="dsvl", description="Compose, train and share vision-language models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_compose(commands)
    # Its flags are those of three dataclasses, and reading them takes transformers: only when they are asked for.
    commands.add_parser(
        "train", help="fine-tune a checkpoint; also python -m dsvl.training under a launcher", add_help=False
    )
    _add_merge(commands)
    if argv[:1] == ["plan"]:  # imports what a training does, which takes seconds
        from .training import plan

        plan.add_parser(commands)
    else:
        commands.add_parser("plan", help="the memory of training, per GPU, from the configuration alone", add_help=False)
    chat.add_parser(commands)
    data.add_parser(commands)
    compare.add_parser(commands)
    evaluation.add_parser(commands)
    migration.add_parser(commands)
    page.add_parser(commands)
    publishing.add_parser(commands)
    serving.add_parser(commands)
    if argv[:1] == ["train"]:
        arguments = argparse.Namespace(command="train", run=_train, argv=argv[1:])
    else:
        arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt as stop:  # a command that can say what is kept, and how to go on, does so
        print(f"dsvl {arguments.command}: {stop.args[0] if stop.args else 'Interrupted.'}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError) as error:  # what a user can mend; anything else is ours, and shows where it is
        print(f"dsvl {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _add_compose(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("compose", help="vision tower + language model -> one checkpoint directory")
    parser.add_argument("--vision", required=True, help="name or directory of a vision tower, or a model that has one")
    parser.add_argument("--language", required=True, help="name or directory of a causal language model")
    parser.add_argument("--out", required=True, help="new directory for the checkpoint")
    parser.add_argument("--projector-type", choices=PROJECTOR_TYPES, default="linear")
    parser.add_argument("--multimodal-attention", choices=MULTIMODAL_ATTENTIONS, default="mmca")
    parser.add_argument("--vision-feature-layer", type=int, default=-1, help="the tower's layer to project (default -1)")
    parser.add_argument(
        "--vision-feature-select-strategy",
        choices=FEATURE_SELECT_STRATEGIES,
        default="full",
        help="full keeps CLS and registers",
    )
    parser.add_argument("--number-after", action="store_true", help="repeat a picture's number behind it in prompts")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the language model's)")
    parser.add_argument("--max-shard-size", default="5GB")
    parser.set_defaults(run=_compose)


def _compose(arguments: argparse.Namespace) -> None:
    from .composition import compose, save_checkpoint
    from .composition.checkpoint import check_new

    check_new(arguments.out)
    model, processor = compose(
        arguments.vision,
        arguments.language,
        projector_type=arguments.projector_type,
        multimodal_attention=arguments.multimodal_attention,
        vision_feature_layer=arguments.vision_feature_layer,
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        number_after=arguments.number_after,
        dtype=arguments.dtype,
    )
    out = save_checkpoint(
        model,
        processor,
        arguments.out,
        base_models=[arguments.vision, arguments.language],
        untrained=True,
        max_shard_size=arguments.max_shard_size,
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out}: {size / 1e6:,.2f} million parameters, {model.config.image_seq_length} tokens a picture")


def _train(arguments: argparse.Namespace) -> None:
    from .training.run import main as train

    train(arguments.argv)


def _add_merge(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("merge", help="a checkpoint + trained adapters -> one checkpoint directory")
    parser.add_argument("--model", required=True, help="the checkpoint that was trained")
    parser.add_argument("--adapters", required=True, help="directory of its adapters")
    parser.add_argument("--out", required=True, help="new directory for the checkpoint")
    parser.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> None:
    from transformers import AutoProcessor

    from .composition import save_checkpoint
    from .composition.checkpoint import check_new
    from .training import merge_adapters

    check_new(arguments.out)
    model = merge_adapters(arguments.model, arguments.adapters)
    processor = AutoProcessor.from_pretrained(arguments.model)
    print(save_checkpoint(model, processor, arguments.out, base_models=[arguments.model]))


if __name__ == "__main__":
    sys.exit(main())

"""`dsvl migrate`: Qwen-VL's tower, and DeepSpeed-VisualChat's checkpoints."""

import argparse

from ..configuration_dsvl import PROJECTOR_TYPES
from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl migrate` to the command's parser."""
    parser = commands.add_parser("migrate", help="weights of DeepSpeed-VisualChat and of Qwen-VL -> checkpoints")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    one = actions.add_parser("qwen-tower", help="Qwen-VL's vision tower out of its checkpoint, for --vision")
    one.add_argument("--from", dest="source", required=True, help="directory of Qwen-VL or Qwen-VL-Chat, or a file of it")
    one.add_argument("--out", required=True, help="new directory for the tower")
    one.add_argument("--max-shard-size", default="5GB")
    one.set_defaults(run=_qwen_tower)

    one = actions.add_parser("checkpoint", help="what DeepSpeed-VisualChat's training wrote -> one checkpoint directory")
    one.add_argument("--checkpoint", required=True, help="the folder of an epoch, or its pytorch_model.bin")
    one.add_argument(
        "--vision", type=check_exists, required=True, help="its CLIP, or the tower that dsvl migrate qwen-tower wrote"
    )
    one.add_argument("--language", type=check_exists, required=True, help="name or directory of its language model")
    one.add_argument("--out", required=True, help="new directory for the checkpoint")
    one.add_argument(
        "--mmca",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="it was trained with --enable_mmca_attention, as its scripts do (default)",
    )
    one.add_argument(
        "--projector", choices=("baseline", *PROJECTOR_TYPES), help="its --vis_proj (default: as the file has it)"
    )
    one.add_argument("--keep-adapter", action="store_true", help="LoRA weights beside the model, for PEFT, not in it")
    one.add_argument(
        "--lora",
        choices=("auto", "fused", "unfused"),
        default="auto",
        help="whether LoRA weights were added to the model's already (default: told by the models it was trained from)",
    )
    one.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the file's)")
    one.add_argument("--max-shard-size", default="5GB")
    one.set_defaults(run=_checkpoint)


def _qwen_tower(arguments: argparse.Namespace) -> None:
    from .qwen_tower import migrate_qwen_tower

    config = migrate_qwen_tower(arguments.source, arguments.out, max_shard_size=arguments.max_shard_size)
    print(
        f"{arguments.out}: {config.num_hidden_layers} layers of width {config.hidden_size}, {config.num_queries} embeddings "
        f"of {config.output_dim} an image of {config.image_size} pixels"
    )


def _checkpoint(arguments: argparse.Namespace) -> None:
    from .checkpoint import migrate_checkpoint

    report = migrate_checkpoint(
        arguments.checkpoint,
        arguments.vision,
        arguments.language,
        arguments.out,
        mmca=arguments.mmca,
        projector=arguments.projector,
        keep_adapter=arguments.keep_adapter,
        lora=arguments.lora,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
    )
    print("\n".join(report.lines()))

"""`dsvl migrate`: Qwen-VL's tower, DeepSpeed-VisualChat's checkpoints, and the code of older DSVL checkpoints."""

import argparse
from pathlib import Path

from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl migrate` to the command's parser."""
    parser = commands.add_parser(
        "migrate", help="convert weights of DeepSpeed-VisualChat and Qwen-VL; update a checkpoint's code"
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    action = actions.add_parser("code", help="replace the code files of an older DSVL checkpoint")
    action.add_argument("source", metavar="DIR_OR_REPO", help="a checkpoint directory, or a repository on the Hub")
    action.add_argument("--create-pr", action="store_true", help="open a pull request on the Hub (for a repository)")
    action.set_defaults(run=_code)

    action = actions.add_parser("qwen-tower", help="extract Qwen-VL's vision tower, for dsvl compose --vision")
    action.add_argument(
        "--from", dest="source", required=True, help="directory of Qwen-VL or Qwen-VL-Chat, or one of its weight files"
    )
    action.add_argument("--out", required=True, help="new directory for the tower")
    action.add_argument("--max-shard-size", default="5GB", help="maximum size of a safetensors file (default 5GB)")
    action.set_defaults(run=_qwen_tower)

    action = actions.add_parser("checkpoint", help="convert a checkpoint that DeepSpeed-VisualChat's training wrote")
    action.add_argument("--checkpoint", required=True, help="directory of an epoch, or its pytorch_model.bin")
    action.add_argument(
        "--vision",
        type=check_exists,
        required=True,
        help="the CLIP model it was trained from, or the directory that dsvl migrate qwen-tower wrote",
    )
    action.add_argument(
        "--language", type=check_exists, required=True, help="name or directory of the language model it was trained from"
    )
    action.add_argument("--out", required=True, help="new directory for the checkpoint")
    action.add_argument(
        "--mmca",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="it was trained with --enable_mmca_attention, as the original's scripts do (default)",
    )
    action.add_argument(
        "--projector",
        choices=("baseline", "linear", "vit", "perceiver"),
        help="the original's --vis_proj; an error if the file has another (default: read from the file)",
    )
    action.add_argument(
        "--keep-adapter", action="store_true", help="save LoRA weights as a PEFT adapter instead of merging them"
    )
    action.add_argument(
        "--lora",
        choices=("auto", "fused", "unfused"),
        default="auto",
        help="whether the weights include the LoRA weights already (default: compare with --vision and --language)",
    )
    action.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the file's)")
    action.add_argument("--max-shard-size", default="5GB", help="maximum size of a safetensors file (default 5GB)")
    action.set_defaults(run=_checkpoint)


def _code(arguments: argparse.Namespace) -> None:
    from .checkpoint_code import migrate_code

    done = migrate_code(arguments.source, create_pr=arguments.create_pr)
    if done.difference is None:
        print(f"{done.source}: the code is up to date; nothing to do.")
        return
    is_proposal = not Path(done.source).expanduser().is_dir()
    print(f"{done.source}: {'proposed changes' if is_proposal else 'changed'}")
    print("\n".join([*(f"  written  {name}" for name in done.written), *(f"  removed  {name}" for name in done.removed)]))
    print(f"Logits of a prompt with an image: largest difference {done.difference:g} between old and new files.")
    if done.pull_request:
        print(f"Pull request: {done.pull_request}")
    elif is_proposal:
        print("Nothing was uploaded; pass --create-pr to open a pull request.")


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

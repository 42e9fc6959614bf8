"""`dsvl merge`: merges trained adapters into a checkpoint."""

import argparse

from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl merge` to the command's parser."""
    parser = commands.add_parser("merge", help="merge trained adapters into a checkpoint")
    parser.add_argument(
        "--model",
        type=check_exists,
        required=True,
        help="directory or Hub name of the checkpoint that the adapters were trained on",
    )
    parser.add_argument("--adapters", type=check_exists, required=True, help="directory of the adapters")
    parser.add_argument("--out", required=True, help="new directory for the checkpoint")
    parser.set_defaults(run=_merge)


def _merge(arguments: argparse.Namespace) -> None:
    from transformers import AutoProcessor

    from ..composition.checkpoint import save_checkpoint
    from ..configuration_dsvl import DSVLConfig
    from ..utils.atomic_files import check_new_directory
    from .adapters import merge_adapters

    check_new_directory(arguments.out)
    DSVLConfig.from_pretrained(arguments.model)  # raises ValueError for other models
    model = merge_adapters(arguments.model, arguments.adapters)
    processor = AutoProcessor.from_pretrained(arguments.model)
    print(save_checkpoint(model, processor, arguments.out, base_models=[arguments.model]))

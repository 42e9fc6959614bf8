"""`dsvl export`."""

import argparse

from ..utils.local_paths import check_exists


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl export` to the command's parser."""
    parser = commands.add_parser("export", help="export a checkpoint to a model of transformers' own")
    parser.add_argument("model", type=check_exists, help="directory or Hub name of a checkpoint with causal attention")
    parser.add_argument("--to", choices=("llava",), required=True, help="the model to export to")
    parser.add_argument("--out", required=True, help="new directory for the exported model")
    parser.add_argument("--max-shard-size", default="5GB", help="maximum size of a safetensors file (default 5GB)")
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> None:
    from .checkpoint import export_llava

    print(export_llava(arguments.model, arguments.out, max_shard_size=arguments.max_shard_size))

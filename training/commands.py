"""`dsvl train`."""

import logging
import os
import warnings
from pathlib import Path

from ..utils.console_log import log_to_console
from .arguments import parse
from .distributed import destroy_process_groups
from .ready_recipes import find_recipe, list_recipes
from .recipe import read_recipe
from .run import interruption_message, train
from .stages import StagedRun
from .watchdog import watching


def main(argv: list[str]) -> None:
    """Run `dsvl train`."""
    # DeepSpeed calls deprecated functions of torch several times per step; their warnings would flood the progress bar.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # Images are views of the projector's output; nothing writes to them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)
    log_to_console(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    if "--list-recipes" in argv:
        list_recipes()
        return
    argv = list(argv)
    # DeepSpeed's launcher prepends --local_rank=N.
    first = 1 if argv[:1] and argv[0].startswith("--local_rank") else 0
    recipe = None
    if argv[first : first + 1] and not argv[first].startswith("-"):
        path = find_recipe(argv[first])
        recipe = read_recipe(path, [*argv[:first], *argv[first + 1 :]])
        argv[first] = str(path)
    try:
        if recipe is not None:
            StagedRun(recipe).train()
            return
        model_arguments, data_arguments, arguments = parse(argv)
        log_to_console(logging.INFO if arguments.process_index == 0 else logging.ERROR)
        try:
            with watching(arguments.lost_process_timeout):
                train(model_arguments, data_arguments, arguments)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(interruption_message(Path(str(arguments.output_dir)))) from None
    finally:
        destroy_process_groups()

"""Runs a training, takes back its last checkpoint, and resumes it, in processes that are started once.

The files of the first run are kept in `OUTPUT-first`. The arguments are those of `dsvl train`.
"""

import logging
import shutil
import sys
from pathlib import Path

import torch.distributed as dist
from training_runs import take_back

from dsvl.training.arguments import parse
from dsvl.training.distributed import destroy_process_groups
from dsvl.training.run import train
from dsvl.utils.console_log import log_to_console

for attempt in ("first", "second"):
    model_arguments, data_arguments, arguments = parse(sys.argv[1:])
    log_to_console(logging.INFO if arguments.process_index == 0 else logging.ERROR)
    train(model_arguments, data_arguments, arguments)
    if attempt == "first" and arguments.process_index == 0:
        output = Path(str(arguments.output_dir))
        shutil.copytree(output, output.with_name(f"{output.name}-first"))
        take_back(output)
    dist.barrier()
destroy_process_groups()

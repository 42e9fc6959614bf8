"""Runs of `dsvl train`, one after the other, each in forked processes: torch and transformers are imported once.

    python forked_training.py RUNS.json

RUNS.json is a list of {"processes": N, "port": PORT, "flags": [...], "log": FILE, "deals_text": BOOL}, whether image
parallelism deals out the text.
"""

import json
import multiprocessing
import os
import sys

import torch

from dsvl.acceleration.parallel import split_batch
from dsvl.cli import main
from dsvl.training import commands  # noqa: F401  (imported before the processes are forked)


def work(rank: int, run: dict) -> None:
    """One process of a run."""
    if run["processes"] > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": run["processes"], "MASTER_PORT": run["port"]}
        os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    if rank == 0:
        with open(run["log"], "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 2)
    split_batch.deals_text = lambda *counts: run["deals_text"]
    sys.exit(main(["train", *run["flags"]]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    with open(sys.argv[1], encoding="utf-8") as file:
        runs = json.load(file)
    for run in runs:
        children = [context.Process(target=work, args=(rank, run)) for rank in range(run["processes"])]
        for child in children:
            child.start()
        for child in children:
            child.join()
        if any(child.exitcode for child in children):
            with open(run["log"], encoding="utf-8") as log:
                sys.exit(f"{run['flags']} ended with {[child.exitcode for child in children]}:\n{log.read()}")

"""One of several processes that are watched: python watched_process.py WHAT, under torchrun or with its variables.

WHAT is what the last process does: it is killed while the others wait for it, it ends with an error, or all end well.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from dsvl.training import watchdog
from dsvl.training.distributed import destroy_process_groups

watchdog.INTERVAL = 0.2
dist.init_process_group("gloo")
last = dist.get_rank() == dist.get_world_size() - 1
with watchdog.watching(float(sys.argv[2])):
    dist.barrier()
    if last and sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if last and sys.argv[1] == "stuck":
        os.kill(os.getpid(), signal.SIGSTOP)
    if last and sys.argv[1] == "error":
        raise ValueError("no such file")
    if last and sys.argv[1] == "late":
        time.sleep(2)  # the others wait in the collective operation, and are not lost
    dist.all_reduce(torch.ones(1))
print("done", flush=True)
destroy_process_groups()

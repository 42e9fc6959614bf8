"""One of two processes that find out whether they share a directory, and send files: python hosts_process.py DIRECTORY.

It prints what it has found, as JSON.
"""

import json
import sys

import torch.distributed as dist

from dsvl.training import hosts as sending
from dsvl.training.checkpoints import send_checkpoint
from dsvl.training.distributed import destroy_process_groups
from dsvl.training.hosts import Hosts

sending.CHUNK = 1 << 10
dist.init_process_group("gloo")
hosts = Hosts(sys.argv[1])
found = {"members": hosts.members, "leaders": hosts.leaders, "separate": hosts.separate, "leads": hosts.leads}
found["each"] = hosts.each(lambda: f"process {hosts.rank}")


def work():
    if hosts.rank == hosts.leaders[-1]:
        raise ValueError("no room")


try:
    hosts.each(work)
except ValueError as error:
    found["error"] = str(error)
models = hosts.at(hosts.directory / "model")
models.share(lambda: models.directory.glob("*"), overwrite=True)
send_checkpoint(hosts)
found["files"] = {
    path.relative_to(hosts.directory).as_posix(): path.read_text()[:12]
    for path in sorted(hosts.directory.rglob("*"))
    if path.is_file()
}
found["sizes"] = {name: (hosts.directory / name).stat().st_size for name in found["files"]}
print(json.dumps(found))
dist.barrier()
destroy_process_groups()

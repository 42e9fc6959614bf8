"""Two hosts on one machine: network namespaces with a cable between them; two loopback addresses where none can be made."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from training_runs import environment, free_port

TORCHRUN, DEEPSPEED = (str(Path(sys.executable).parent / name) for name in ("torchrun", "deepspeed"))


@dataclass
class Hosts:
    """Two hosts.

    Attributes:
        addresses: their addresses.
        entries: the command that runs another one on each host.
        devices: their network devices.
        namespaces: names of the namespaces; empty without.
    """

    addresses: tuple[str, str] = ("127.0.0.1", "127.0.0.2")
    entries: tuple[list[str], list[str]] = field(default_factory=lambda: ([], []))
    devices: tuple[str, str] = ("lo", "lo")
    namespaces: tuple[str, ...] = ()

    def name(self, host: int) -> str:
        """What a host calls itself."""
        return f"host-{host}" if self.namespaces else os.uname().nodename

    def start(self, host: int, folder: Path, *command: str | Path | int) -> "subprocess.Popen[str]":
        """Run a command on a host, in a folder that is its disk; its output goes to one pipe."""
        variables = environment() | {"GLOO_SOCKET_IFNAME": self.devices[host]}
        line = [*self.entries[host], *map(str, command)]
        folder.mkdir(exist_ok=True)
        pipe = subprocess.PIPE
        return subprocess.Popen(line, cwd=folder, env=variables, stdout=pipe, stderr=subprocess.STDOUT, text=True)

    def torchrun(
        self, folders: list[Path], flags: list, *more: str, ranks: tuple[int, int] = (0, 1)
    ) -> list["subprocess.Popen[str]"]:
        """Start a training of one process on each host.

        Args:
            folders: the current directory of each host.
            flags: flags of `dsvl train`.
            more: flags of torchrun.
            ranks: the node rank of each host.
        """
        port, first = free_port(), self.addresses[ranks.index(0)]
        base = [TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *more]
        if "--rdzv-backend" in more:
            base += ["--rdzv-endpoint", f"{first}:{port}", "--rdzv-id", "test"]
        else:
            base += ["--master-addr", first, "--master-port", str(port)]
        started = []
        for host in (0, 1):
            own = ["--node-rank", str(ranks[host])]
            if "--rdzv-backend" in more:  # in a namespace the name of the machine does not lead to the address
                own = ["--rdzv-conf", f"is_host={int(ranks[host] == 0)}"]
            own += ["--local-addr", self.addresses[host]]
            started.append(self.start(host, folders[host], *base, *own, "-m", "dsvl.training", *flags))
        return started


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Two hosts; the namespaces end with the context."""
    names = tuple(f"dsvl-{os.getpid()}-{host}" for host in (0, 1))
    devices = tuple(f"dv{os.getpid() % 100000}{host}" for host in "ab")
    made = []
    try:
        for name in names:
            subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
            made.append(name)
            subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, capture_output=True)
        cable = ["ip", "link", "add", devices[0], "netns", names[0], "type", "veth", "peer", "name", devices[1]]
        subprocess.run([*cable, "netns", names[1]], check=True, capture_output=True)
        for host, (name, device) in enumerate(zip(names, devices, strict=True)):
            address = f"10.77.0.{host + 1}/24"
            subprocess.run(["ip", "-n", name, "addr", "add", address, "dev", device], check=True, capture_output=True)
            subprocess.run(["ip", "-n", name, "link", "set", device, "up"], check=True, capture_output=True)
        named = [["unshare", "--uts", "sh", "-c", f'hostname host-{host}; exec "$@"', "sh"] for host in (0, 1)]
        entries = tuple(["ip", "netns", "exec", name, *more] for name, more in zip(names, named, strict=True))
        subprocess.run([*entries[0], "true"], check=True, capture_output=True)
        hosts = Hosts(("10.77.0.1", "10.77.0.2"), entries, devices, names)  # type: ignore[arg-type]
    except (OSError, subprocess.CalledProcessError):  # no permission, or no such program
        hosts = Hosts()
    try:
        yield hosts
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def wait(processes: list["subprocess.Popen[str]"], timeout: float = 300) -> list[tuple[int, str]]:
    """The exit status and output of each process; after the timeout they are killed."""
    ends, deadline = [], time.monotonic() + timeout
    for process in processes:
        try:
            out, _ = process.communicate(timeout=max(deadline - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            for one in processes:
                kill_tree(one.pid)
            out, _ = process.communicate()
            out += f"\nkilled after {timeout} seconds"
        ends.append((process.returncode, out))
    return ends


def workers(launcher: int) -> list[int]:
    """The processes that a launcher has started."""
    try:
        children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    except FileNotFoundError:
        return []
    return [int(child) for child in children]


def kill_tree(pid: int) -> None:
    """Kill a process and those that it has started."""
    for child in workers(pid):
        kill_tree(child)
    kill(pid)


def kill(pid: int) -> None:
    """kill -9, of a process that may have ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return

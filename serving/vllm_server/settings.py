"""What `dsvl serve` tells the processes of vLLM's server, through a variable of the environment."""

import json
import os
from dataclasses import asdict, dataclass

from ...utils.hosts import LOOPBACK
from ..requests import RequestLimits

VARIABLE = "DSVL_SERVE_SETTINGS"
CONNECTOR = "dsvl"  # the name under which vLLM finds the media connector of this package


@dataclass(frozen=True)
class ServerSettings:
    """Settings that vLLM has no arguments for.

    Args:
        limits: of requests.
        hosts: the accepted `Host` headers; ("*",) accepts any.
        takes_seeds: whether requests may have a `seed`.
    """

    limits: RequestLimits = RequestLimits()
    hosts: tuple[str, ...] = LOOPBACK
    takes_seeds: bool = True

    def to_json(self) -> str:
        """The value of the variable `VARIABLE`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_environment(cls) -> "ServerSettings":
        """The settings of this process; the defaults if the variable is not set."""
        if VARIABLE not in os.environ:
            return cls()
        values = json.loads(os.environ[VARIABLE])
        return cls(RequestLimits(**values["limits"]), tuple(values["hosts"]), values["takes_seeds"])

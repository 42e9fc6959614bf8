"""DeepSpeed configurations: those of the package by name, a user's own by path, and the ZeRO stage that they ask for."""

import json
from pathlib import Path
from typing import Any

ZERO = {"zero1": 1, "zero2": 2, "zero3": 3, "zero3-offload": 3}  # NAME.json in this directory -> its ZeRO stage


PREFETCHED_LAYERS = 2  # that ZeRO-3 gathers in advance, see zero3.py
MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters (deepspeed/runtime/zero/config.py)


def whole_size(parameter: Any) -> int:
    """The number of elements of a parameter, also where ZeRO-3 has partitioned it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def weights_at_once(tower: Any) -> int:
    """How many weights of a vision tower ZeRO-3 gathers at once: all of a frozen one, unless they are more than DeepSpeed
    gathers in advance; else 0, as they are gathered layer by layer."""
    parameters = list(tower.parameters())
    weights = sum(map(whole_size, parameters))
    return weights if weights <= MAX_LIVE_PARAMETERS and not any(one.requires_grad for one in parameters) else 0


def zero_configuration(name: str) -> Path:
    """The path of a DeepSpeed configuration.

    Args:
        name: a key of `ZERO`, or the path of a JSON file.

    Raises:
        ValueError: if it is neither.
    """
    path = Path(__file__).with_name(f"{name}.json") if name in ZERO else Path(name)
    if not path.is_file():
        raise ValueError(f"--deepspeed {name} is not a file; choose from {', '.join(ZERO)}, or pass the path of one.")
    return path


def zero_stage(deepspeed: dict[str, Any] | str | None) -> int | None:
    """The ZeRO stage of a `--deepspeed` argument; None without DeepSpeed.

    Raises:
        ValueError: if the argument is neither a file nor JSON.
    """
    if deepspeed is None:
        return None
    values: Any = deepspeed
    if isinstance(deepspeed, str):
        text = deepspeed if deepspeed.startswith("{") else zero_configuration(deepspeed).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"--deepspeed {deepspeed} is not JSON: {error}.") from error
    return int(values.get("zero_optimization", {}).get("stage", 0))

"""The linear layers that `--lora-targets` names: layer names such as `q_proj`, and paths such as `layers.0-15`."""

import itertools
import re
from collections.abc import Iterable, Sequence

_RANGE = re.compile(r"(\d+)-(\d+)")


def target_pattern(targets: Sequence[str], layers: Sequence[str], flag: str) -> str:
    """A regular expression for PEFT's `target_modules`.

    A target is a name, or several names joined by dots, that stand next to each other anywhere in the path of a layer. It
    selects every linear layer at or below this path: `q_proj`, `mlp`, `layers.0-15`, `layers.3.self_attn.q_proj`,
    `layers.0-15.*.q_proj`. `A-B` is every number from A to B; `*` is any text in one name.

    Args:
        targets: the targets; empty for all layers.
        layers: paths of all linear layers to choose from, at least one.
        flag: name of the flag, for messages.

    Returns:
        The expression, which matches whole paths of the selected layers and of no other layer in `layers`.

    Raises:
        ValueError: for an invalid target, or one that matches no layer; every number of a range must match.
    """
    names = "|".join(re.escape(name) for name in sorted({layer.rpartition(".")[2] for layer in layers}))
    selected = []
    for target in targets:
        parts = [_alternatives(part, target, flag) for part in target.split(".")]
        for path in itertools.product(*parts):
            if not any(re.search(_within(path), layer) for layer in layers):
                raise ValueError(f"{flag} {target}: no linear layer matches {'.'.join(path)}; {_known(path, layers)}.")
        selected.append(r"\.".join(_joined(map(_literal, part)) for part in parts))
    scope = rf"(?=(?:.*\.)?{_joined(selected)}(?:\.|$))" if selected else ""
    return rf"{scope}.*\.(?:{names})"


def _alternatives(part: str, target: str, flag: str) -> list[str]:
    """The names that a part of a target stands for."""
    numbers = _RANGE.fullmatch(part)
    if not part or (numbers and int(numbers[1]) > int(numbers[2])):
        wrong = f"the range {part} is empty" if part else "a name between dots is missing"
        raise ValueError(f"{flag} {target}: {wrong}; expected names joined by dots, such as q_proj or layers.0-15.")
    return [str(number) for number in range(int(numbers[1]), int(numbers[2]) + 1)] if numbers else [part]


def _literal(name: str) -> str:
    return re.escape(name).replace(r"\*", "[^.]*")


def _joined(alternatives: Iterable[str]) -> str:
    several = list(alternatives)
    return several[0] if len(several) == 1 else f"(?:{'|'.join(several)})"


def _within(path: Sequence[str]) -> str:
    """An expression that finds a path at the start, in the middle or at the end of another."""
    names = r"\.".join(map(_literal, path))
    return rf"(?:^|\.){names}(?:\.|$)" if path else ""


def _known(path: Sequence[str], layers: Sequence[str]) -> str:
    """What the first part of a path that matches nothing could be."""
    length = next(n for n in range(len(path) - 1, -1, -1) if any(re.search(_within(path[:n]), layer) for layer in layers))
    if length == 0:
        return f"choose from {', '.join(sorted({layer.rpartition('.')[2] for layer in layers}))}, or a path to layers"
    following = set()
    for layer in layers:
        for found in re.finditer(_within(path[:length]), layer):
            following.add(layer[found.end() :].partition(".")[0])
    return f"{'.'.join(path[:length])} is followed by {_listed(following - {''}) or 'nothing'}"


def _listed(names: set[str]) -> str:
    """Names as text; numbers that follow each other as ranges."""
    numbers = sorted(int(name) for name in names if name.isdecimal())
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return ", ".join([*ranges, *sorted(name for name in names if not name.isdecimal())])

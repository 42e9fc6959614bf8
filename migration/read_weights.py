"""Reading untrusted weight files: memory-mapped, and without running code from them."""

import json
import pickle
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# Exceptions that unpickling damaged data raises, beside UnpicklingError.
DAMAGED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    TypeError,
    ValueError,
    struct.error,
)
NAMES = ("model.safetensors", "pytorch_model.bin")


def weight_files(source: str | Path, wanted: str = "") -> list[Path]:
    """List the files with a checkpoint's weights.

    Args:
        source: a file (.bin, .pt or .safetensors), or a directory with such a file, or with shards and their index.
        wanted: only list shards with tensors whose names start with this prefix.

    Raises:
        FileNotFoundError: if there is no file, or a shard is missing.
        ValueError: for an invalid index.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    for name in NAMES:
        index = source / f"{name}.index.json"
        if index.is_file():
            files = sorted({source / file for key, file in _weight_map(index).items() if key.startswith(wanted)})
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which {index.name} names; copy them there.")
            return files
        if (source / name).is_file():
            return [source / name]
    epochs = sorted(path.parent.name for path in source.glob("*/pytorch_model.bin"))
    remedy = f"; pass one of its directories, {', '.join(epochs)}" if epochs else f"; expected {' or '.join(NAMES)}"
    raise FileNotFoundError(f"{source} holds no weights{remedy}.")


def _weight_map(index: Path) -> dict[str, str]:
    """Name of a tensor -> name of its file."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to files; copy it again.")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: naming the file, if it does not hold an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object; copy it again.")
    return value


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Iterate over names and tensors of files, memory-mapped one file at a time.

    Raises:
        ValueError: for a file that is damaged, holds other objects than tensors, or is a pickle that would run code.
    """
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - not a dict
                        yield name, opened.get_tensor(name)
            else:
                yield from read_pickle(file).items()
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is cut off or damaged ({error}); copy it again.") from error


def read_pickle(file: Path) -> dict[str, torch.Tensor]:
    """Load a state dict with torch.load, restricted to tensors.

    Raises:
        ValueError: for a file that is damaged, holds other objects than tensors, or would run code.
    """
    with file.open("rb") as opened:  # only the newer format, a zip archive, can be memory-mapped
        mapped = opened.read(2) == b"PK"
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except DAMAGED as error:
        raise ValueError(f"{file} is cut off or damaged ({type(error).__name__}: {error}); copy it again.") from error
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named is None:
            raise ValueError(f"{file} cannot be read: {error}") from error
        raise ValueError(
            f"{file} is a pickle that would run code ({named[1]}), which weights do not need; it was not loaded. Get the "
            "weights as safetensors, from a source that you trust."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}; expected a state dict from names to tensors.")
    if other := [n for n, tensor in loaded.items() if not (isinstance(n, str) and isinstance(tensor, torch.Tensor))]:
        raise ValueError(
            f"{file} holds {other[0]!r}, which is not a tensor; pass the state dict of a model (pytorch_model.bin)."
        )
    return loaded

"""Reading weights that others wrote: nothing in a file is run, and a file's tensors stay on the disk until they are used."""

import json
import pickle
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

# What unpickling bytes at random raises, beside its own errors.
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
    """The files that hold a checkpoint's weights.

    Args:
        source: a file (.bin, .pt or .safetensors), or a directory with one, or with shards and their index.
        wanted: of shards, only those with a name that starts so.

    Raises:
        FileNotFoundError: if there is none, or a shard is missing.
        ValueError: for an index that is none.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    for name in NAMES:
        index = source / f"{name}.index.json"
        if index.is_file():
            files = sorted({source / file for key, file in _places(index).items() if key.startswith(wanted)})
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which {index.name} names; copy them there.")
            return files
        if (source / name).is_file():
            return [source / name]
    epochs = sorted(path.parent.name for path in source.glob("*/pytorch_model.bin"))
    remedy = f"; pass one of its folders, {', '.join(epochs)}" if epochs else f"; expected {' or '.join(NAMES)}"
    raise FileNotFoundError(f"{source} holds no weights{remedy}.")


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no weight_map from names of tensors to files; copy it again.")
    return places


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ValueError: naming the file, if it does not.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}); copy it again.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object; copy it again.")
    return value


def read_tensors(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of files, one file after the other, by their names; mapped into memory, not read.

    Raises:
        ValueError: for a file that is cut off, holds anything but tensors, or is a pickle that would run code.
    """
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    for name in opened.keys():  # noqa: SIM118 - it is no dict
                        yield name, opened.get_tensor(name)
            else:
                yield from _read_pickle(file).items()
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is cut off or damaged ({error}); copy it again.") from error


def _read_pickle(file: Path) -> dict[str, torch.Tensor]:
    with file.open("rb") as opened:  # the older format of pickles, which cannot be mapped, is no zip archive
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
            f"{file} is a pickle that would run code ({named[1]}), of which a file of weights has no need; it was not "
            "loaded. Get the weights from someone you trust, as safetensors."
        ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"{file} holds a {type(loaded).__name__}; expected a state dict, from names to tensors.")
    if other := [n for n, tensor in loaded.items() if not (isinstance(n, str) and isinstance(tensor, torch.Tensor))]:
        raise ValueError(
            f"{file} holds {other[0]!r}, which is no tensor; pass the state dict of a model (pytorch_model.bin)."
        )
    return loaded

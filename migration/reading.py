"""Reading weights that others wrote: nothing in a file is run, and a file's tensors stay on the disk until they are used."""

import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

NAMES = ("model.safetensors", "pytorch_model.bin")


def weight_files(source: str | Path, wanted: str = "") -> list[Path]:
    """The files that hold a checkpoint's weights.

    Args:
        source: a file (.bin, .pt or .safetensors), or a directory with one, or with shards and their index.
        wanted: of shards, only those with a name that starts so.

    Raises:
        FileNotFoundError: if there is none, or a shard is missing.
    """
    source = Path(source)
    if source.is_file():
        return [source]
    for name in NAMES:
        index = source / f"{name}.index.json"
        if index.is_file():
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({source / file for key, file in places.items() if key.startswith(wanted)})
            if missing := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{source} lacks {', '.join(missing)}, which {index.name} names; copy them there.")
            return files
        if (source / name).is_file():
            return [source / name]
    epochs = sorted(path.parent.name for path in source.glob("*/pytorch_model.bin"))
    remedy = f"; pass one of its folders, {', '.join(epochs)}" if epochs else f"; expected {' or '.join(NAMES)}"
    raise FileNotFoundError(f"{source} holds no weights{remedy}.")


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
    if other := [name for name, tensor in loaded.items() if not isinstance(tensor, torch.Tensor)]:
        raise ValueError(
            f"{file} holds {other[0]!r}, which is no tensor; pass the state dict of a model (pytorch_model.bin)."
        )
    return loaded

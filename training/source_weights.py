"""The weights of a checkpoint as they are in its files, read when they are needed."""

import json
import math
import mmap
from pathlib import Path
from typing import Any

import torch

from ..migration.read_weights import weight_files
from ..utils.transformers_names import cached_file

# Of safetensors' dtypes, those of floating point weights.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class SourceWeights:
    """The floating point weights in the safetensors files of a checkpoint.

    The files are mapped into memory, and read page by page when a weight is used. They stay readable if they are deleted.

    Args:
        name: directory or Hub name of the checkpoint.

    Raises:
        ValueError: if the weights are not in safetensors files.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        directory = Path(name) if Path(name).is_dir() else Path(cached_file(name, "config.json")).parent
        self._files: list[mmap.mmap] = []
        self._places: dict[str, tuple[int, torch.dtype, list[int], int]] = {}
        for path in weight_files(directory):
            if path.suffix != ".safetensors":
                raise ValueError(
                    f"{name} has its weights in {path.name}, of which they cannot be read one by one; save the model as "
                    "safetensors (save_pretrained)."
                )
            self._map(path)

    def _map(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy-on-write, as torch has no read-only tensors.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        # An integer of eight bytes, so many bytes of JSON, and the tensors.
        first = 8 + int.from_bytes(mapped[:8], "little")
        for key, entry in json.loads(mapped[8:first]).items():
            if key != "__metadata__" and entry["dtype"] in DTYPES:
                place = first + entry["data_offsets"][0]
                self._places[key] = len(self._files), DTYPES[entry["dtype"]], entry["shape"], place
        self._files.append(mapped)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __deepcopy__(self, memo: dict[int, Any]) -> "SourceWeights":
        """Copies of a model read the same files."""
        return self

    def get(self, name: str) -> torch.Tensor:
        """A weight, in main memory and in the dtype of the file, with a storage of its own.

        Raises:
            ValueError: if the checkpoint has no such weight.
        """
        if name not in self._places:
            raise ValueError(
                f"{self.name} has no floating point weight {name}, so it cannot be copied from there; save the model with "
                "this release first (load it with AutoModelForImageTextToText, then dsvl.save_checkpoint)."
            )
        file, dtype, shape, place = self._places[name]
        weight = torch.frombuffer(self._files[file], dtype=dtype, count=math.prod(shape), offset=place)
        return weight.view(shape)

    def check(self, name: str, loaded: torch.Tensor) -> None:
        """Check that a loaded weight is the one in the files.

        Raises:
            ValueError: if not.
        """
        own = self.get(name)
        if own.shape != loaded.shape or not torch.equal(own.to(loaded.dtype), loaded.cpu()):
            raise ValueError(
                f"{name} was changed since it was loaded from {self.name}, so its original cannot be copied from there; "
                "pass the model as it was loaded, or no source."
            )

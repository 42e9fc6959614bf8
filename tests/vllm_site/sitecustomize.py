"""Lets PyPI's torchvision, whose compiled operators need CUDA's torch, be imported with the CPU's torch.

vLLM's LLaVA imports torchvision for its image transforms, which are Python. They work once the two operators are declared
that torchvision registers on import. Every process that vLLM starts imports this file, as its folder is on PYTHONPATH.
"""

import ctypes
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


class DeclareOperators:
    """Declares the operators before torchvision is imported, where it could not load them; finds no module itself."""

    libraries: list[Any] = []

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        spec = PathFinder.find_spec(name) if name == "torchvision" and not cls.libraries else None
        if spec is None or spec.origin is None:
            return
        import torch

        try:
            ctypes.CDLL(str(Path(spec.origin).with_name("_C.so")))
        except OSError:  # it names a library of CUDA's torch
            cls.libraries.append(torch.library.Library("torchvision", "DEF"))
            for operator in OPERATORS:
                cls.libraries[0].define(operator)


sys.meta_path.insert(0, DeclareOperators)  # type: ignore[arg-type]

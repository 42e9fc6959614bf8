"""The core's interface to the optional acceleration in the package `dsvl` (`dsvl.acceleration`).

The files that travel with a checkpoint are complete without it. Where the package is installed, they look for it at first
use and let it build attention masks, run the decode loop, compile decoder layers and reuse images. A checkpoint cannot be
changed once it is on the Hub, so both sides name the version of this interface; if they differ, the acceleration stays off.

Version 1. `dsvl.acceleration` provides:

    INTERFACE_VERSION       an integer, equal to the one below
    build_mask(...)         a mask for one layer type, or None to leave it to the core (see `masks_dsvl.AttentionMask`)
    sample(model, run, *args, **kwargs)
                            the loop of greedy search and sampling; `run` is the one of transformers
    decode_speculatively(model, run, *args, **kwargs)
                            the loop of speculative decoding, likewise; releases of the package before 0.3 do not have it
    generate(model, run, inputs, *args, **kwargs)
                            what happens before that loop; `run` is the `generate` of transformers. Releases of the package
                            before 0.3 do not have it
    CompiledDecoderLayers(decoder, options)
                            compiled decoder layers; `switch(training)` turns them on in training mode
    reduce_memory(model, **options)
                            training in less memory; releases of the package before 0.3 do not have it
    ImageReuse(model)       `encode`, `prefill`, `compile`: keys and values of images, computed once and used in any prompt
"""

import warnings
from importlib import import_module
from typing import Any

import torch

INTERFACE_VERSION = 1

_searched = False
_module: Any = None


def acceleration() -> Any | None:
    """The module `dsvl.acceleration`, or None if the package is not installed or has another version of the interface.

    The first call imports the package, so it is made when a model has been built. While a graph is compiled nothing is
    imported.
    """
    global _searched, _module
    if not _searched and not torch.compiler.is_compiling():
        _searched = True
        _module = _find()
    return _module


def require_acceleration(feature: str) -> Any:
    """As `acceleration`, for a feature that the core does not have.

    Raises:
        ImportError: if the package is not installed, or does not fit.
    """
    module = acceleration()
    if module is None:
        raise ImportError(
            f"{feature} is part of the package dsvl, which is not installed, cannot be imported, or has another version of "
            f"the acceleration interface than this checkpoint's code ({INTERFACE_VERSION}); install or update it: "
            "pip install -U dsvl, or from a clone: pip install -e ."
        )
    return module


def _find() -> Any | None:
    try:
        module = import_module("dsvl.acceleration")
    except ImportError as error:
        # This code is complete without the package, so a package that does not fit the environment must not keep it from
        # loading.
        if not isinstance(error, ModuleNotFoundError) or error.name not in ("dsvl", "dsvl.acceleration"):
            warnings.warn(
                f"The installed package dsvl cannot be imported ({error}): the model runs without acceleration. Update the "
                "package (pip install -U dsvl), or uninstall it.",
                stacklevel=3,
            )
        return None
    version = getattr(module, "INTERFACE_VERSION", None)
    if version != INTERFACE_VERSION:
        warnings.warn(
            f"The installed package dsvl has version {version} of the acceleration interface, this model's code version "
            f"{INTERFACE_VERSION}: the model runs without acceleration. Refresh the checkpoint's code "
            "(dsvl migrate code DIR_OR_REPO), or install the package version that wrote it.",
            stacklevel=3,
        )
        return None
    return module


__all__ = ["INTERFACE_VERSION", "acceleration", "require_acceleration"]

"""What DeepSpeed saves of a model beside the optimizer states, to go on from: what is trained.

Frozen weights are those of the model that the run started from, which its record identifies (fingerprint.py). A checkpoint
holds them once, in the consolidated weights.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def saving_what_is_trained(engine: Any) -> Iterator[None]:
    """Within this context, a `deepspeed.DeepSpeedEngine` saves no frozen weights."""
    whole_state = engine.module_state_dict

    def trained_state(*args: Any, **kwargs: Any) -> dict[str, Any]:
        trained = _trained(engine.module)
        return {name: tensor for name, tensor in whole_state(*args, **kwargs).items() if name in trained}

    engine.module_state_dict = trained_state  # weights in 8 bits are buffers, which DeepSpeed does not leave out
    engine.save_checkpoint = functools.partial(engine.save_checkpoint, exclude_frozen_parameters=True)
    try:
        yield
    finally:
        del engine.module_state_dict, engine.save_checkpoint


@contextlib.contextmanager
def loading_what_is_trained() -> Iterator[None]:
    """Within this context, engines load what was saved so, and keep the frozen weights that they have. Whole states of
    earlier releases are loaded whole."""
    from deepspeed import DeepSpeedEngine

    load = DeepSpeedEngine.load_module_state_dict

    def load_trained(engine: Any, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        trained = _trained(engine.module)
        frozen = {name: tensor for name, tensor in engine.module.state_dict().items() if name not in trained}
        load(engine, checkpoint | {"module": frozen | checkpoint["module"]}, *args, **kwargs)

    DeepSpeedEngine.load_module_state_dict = load_trained
    try:
        yield
    finally:
        DeepSpeedEngine.load_module_state_dict = load


def _trained(model: nn.Module) -> set[str]:
    """The names of trained parameters, of tied ones all."""
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


__all__ = ["loading_what_is_trained", "saving_what_is_trained"]

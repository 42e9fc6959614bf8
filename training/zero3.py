"""ZeRO-3: which weights are gathered together, and loading without partitions."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..transformers_dsvl import is_deepspeed_zero3_enabled
from ..utils.transformers_names import set_hf_deepspeed_config, unset_hf_deepspeed_config
from .fsdp import layer_classes


def gather_layer_by_layer(model: nn.Module) -> None:
    """Have ZeRO-3 gather the weights of a decoder or tower layer before the layer is entered, all at once.

    By itself it gathers linear layer by linear layer, for each of which the host runs hooks and waits for earlier gathers;
    and a layer that gathers within cannot be compiled.

    Args:
        model: the model, before `deepspeed.initialize`.
    """
    import deepspeed

    deepspeed.utils.set_z3_leaf_modules(model, layer_classes(model))
    # torch's attention, in the pooling head of SigLIP's towers, reads weights of its child. In a forward pass of its engine
    # DeepSpeed notices this by itself, but not in `generate`.
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            for parameter in module.out_proj.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)


@contextlib.contextmanager
def without_zero3() -> Iterator[None]:
    """Load weights unpartitioned while ZeRO-3 is enabled."""
    from ..utils.transformers_names import _hf_deepspeed_config_weak_ref as zero3_config

    kept = zero3_config() if is_deepspeed_zero3_enabled() else None
    if kept is not None:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if kept is not None:
            set_hf_deepspeed_config(kept)


__all__ = ["gather_layer_by_layer", "without_zero3"]

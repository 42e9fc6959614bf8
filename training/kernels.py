"""Liger's Triton kernels in the decoder of a DSVL model: the same values with less memory and fewer passes over it."""

from ..modeling_dsvl import DSVLForConditionalGeneration


def use_liger(model: DSVLForConditionalGeneration) -> DSVLForConditionalGeneration:
    """Let the decoder compute its norms, rotary positions and gated MLPs by Liger kernels.

    transformers' own switch, `apply_liger_kernel`, goes by the top model type, which Liger does not know; the decoder's it
    does. The loss stays this model's: it has logits of supervised tokens only, so there is nothing for Liger's fused
    loss to save. Call it before adapters are added. Liger replaces the rotary function in transformers' module of the
    decoder's type, so other models of that type in the process change with it.

    Args:
        model: on the device it will run on; its weights stay where they are.

    Returns:
        The model itself.

    Raises:
        ImportError: if liger-kernel is not installed.
        ValueError: if Liger has no kernels for this kind of decoder.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance
    except ImportError as error:
        raise ImportError(
            f"Liger kernels need the package liger-kernel, and Triton with a GPU that it supports ({error}); run "
            "`pip install liger-kernel`, or train without them."
        ) from error
    decoder = model.model.language_model
    if decoder.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise ValueError(
            f"Liger has no kernels for text_config.model_type={decoder.config.model_type!r}, only for "
            f"{', '.join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN))}; train without them."
        )
    _apply_liger_kernel_to_instance(model=decoder, cross_entropy=False, fused_linear_cross_entropy=False)
    return model

"""Liger's fused Triton kernels for the decoder of a DSVL model."""

from ..modeling_dsvl import DSVLForConditionalGeneration


def use_liger(model: DSVLForConditionalGeneration) -> DSVLForConditionalGeneration:
    """Use Liger kernels for norms, rotary embeddings and gated MLPs of the decoder, in place.

    transformers' `apply_liger_kernel` looks up the top-level model type, which Liger does not know; here the decoder's type
    is used. Liger's fused loss is not used, as the model computes logits of supervised tokens only. Call this function
    before adapters are added. Liger replaces the rotary function in transformers' module of the decoder, which affects all
    models of this type in the process.

    Args:
        model: the model, on its device.

    Returns:
        The same model.

    Raises:
        ImportError: if liger-kernel is not installed.
        ValueError: if Liger has no kernels for this type of decoder.
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

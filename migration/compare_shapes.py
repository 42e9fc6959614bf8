"""Comparing the shapes of a converted checkpoint with those of the model."""

from collections.abc import Callable, Mapping

import torch

from .state_dict_names import Translated


def compare_shapes(
    translated: Translated, expected: Mapping[str, torch.Size], source: str, size_source: Callable[[str], str]
) -> None:
    """Check that names and shapes of a converted checkpoint are those of the model.

    Args:
        translated: the checkpoint.
        expected: names and shapes of the model's weights.
        source: the checkpoint's name, for messages.
        size_source: a function from the name of a weight to the flags or the file that determine its shape.

    Raises:
        ValueError: naming the first tensor whose shape differs, or the missing and unexpected names.
    """
    for ours, tensor in translated.tensors.items():
        if ours in expected and tensor.shape != expected[ours]:
            raise ValueError(
                f"{source}: {translated.original_name(ours)} becomes {ours} of shape {tuple(tensor.shape)}, but by "
                f"{size_source(ours)} it should be {tuple(expected[ours])}; pass the model that it was trained from."
            )
    missing = sorted(set(expected) - set(translated.tensors) - set(translated.absent))
    spare = sorted(set(translated.tensors) - set(expected))
    if missing or spare:
        raise ValueError(
            f"{source} has other layers than {size_source((missing + spare)[0])}: it lacks "
            f"{', '.join(missing[:3]) or 'none'} ({len(missing)} in all) and has {', '.join(spare[:3]) or 'none'} "
            f"({len(spare)} in all) in addition; pass the model that it was trained from."
        )

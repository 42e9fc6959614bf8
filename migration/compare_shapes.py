"""Holding a translated checkpoint against the model that it should fill."""

from collections.abc import Callable, Mapping

import torch

from .state_dict_names import Translated


def compare_shapes(
    translated: Translated, expected: Mapping[str, torch.Size], source: str, says: Callable[[str], str]
) -> None:
    """Refuse a checkpoint of other sizes.

    Args:
        translated: the checkpoint.
        expected: our names and shapes of a model of the configurations that were given.
        source: the checkpoint's name.
        says: from one of our names to what said how large it is.

    Raises:
        ValueError: naming the first tensor whose shape differs, with both shapes, or how many layers there are.
    """
    for ours, tensor in translated.tensors.items():
        if ours in expected and tensor.shape != expected[ours]:
            raise ValueError(
                f"{source}: {translated.original_name(ours)} becomes {ours} of shape {tuple(tensor.shape)}, but by "
                f"{says(ours)} it should be {tuple(expected[ours])}; pass the model that it was trained from."
            )
    missing = sorted(set(expected) - set(translated.tensors) - set(translated.absent))
    spare = sorted(set(translated.tensors) - set(expected))
    if missing or spare:
        raise ValueError(
            f"{source} has other layers than {says((missing + spare)[0])}: it lacks {', '.join(missing[:3]) or 'none'} "
            f"({len(missing)} in all) and has {', '.join(spare[:3]) or 'none'} ({len(spare)} in all) too many; pass the "
            "model that it was trained from."
        )

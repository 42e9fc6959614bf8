"""What a run learns from and is evaluated on, as its arguments ask for."""

import logging
from pathlib import Path
from typing import Any

from ..data import load_conversations
from ..data.mixture import Part, load_mixture, open_parts, split
from ..data.packing import PackedConversations
from .arguments import DataArguments
from .collator import ConversationCollator

logger = logging.getLogger(__name__)


def open_data(arguments: DataArguments, seed: int) -> tuple[Any, Any]:
    """The conversations to train on and to evaluate on (None without), as map-style data sets."""
    train: Any
    if arguments.dataset_names:
        train = open_parts(
            _parts(arguments), arguments.on_bad_sample, seed, arguments.max_num_image_per_sample, arguments.data
        )
    elif arguments.data.endswith((".yaml", ".yml")):
        train = load_mixture(arguments.data, arguments.on_bad_sample)
    else:
        train = load_conversations(arguments.data, arguments.on_bad_sample)
    if arguments.eval_share is not None:
        return split(train, arguments.eval_share, seed)
    if arguments.eval_data is not None:
        return train, load_conversations(arguments.eval_data, arguments.on_bad_sample)
    return train, None


def _parts(arguments: DataArguments) -> list[Part]:
    names = arguments.dataset_names or []
    samples = arguments.dataset_samples or ["all"] * len(names)
    concatenate = arguments.dataset_concatenate_samples or [1] * len(names)
    return [
        Part(
            path=str(Path(arguments.data) / f"{name}.jsonl"),
            name=name,
            samples=None if number == "all" else int(number),
            concatenate=together,
        )
        for name, number, together in zip(names, samples, concatenate, strict=True)
    ]


def packed(data: Any, collator: ConversationCollator, arguments: DataArguments, seed: int) -> PackedConversations:
    """Pack the conversations of a data set, which are all measured for it."""
    if collator.max_length is None:
        raise ValueError("Packing needs the length of a pack; pass max_length.")
    packs = PackedConversations(
        data,
        collator.sample_length,
        collator.max_length,
        arguments.max_pictures_per_pack,
        seed=seed,
        skip=arguments.on_bad_sample == "skip",
    )
    logger.info("Packs: %d of %d conversations, filled to %.1f%%.", len(packs), len(data), 100 * packs.filled)
    return packs

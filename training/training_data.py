"""Opens the training and evaluation data of a run."""

import functools
import logging
from pathlib import Path
from typing import Any, TypeVar

from ..data import load_conversations
from ..data.mixture import Part, load_mixture, open_parts, split
from ..data.packing import PackedConversations, pack_stream
from ..data.streaming import Stream
from .arguments import DataArguments
from .collator import ConversationCollator

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_data(arguments: DataArguments, seed: int, rank: int = 0, processes: int = 1) -> tuple[Any, Any]:
    """Open the training and evaluation data.

    Args:
        arguments: data arguments of the run.
        seed: seed of mixtures, splits and streams.
        rank, processes: index of this process and number of processes, which share a stream, *optional*, default to 0 and 1.

    Returns:
        The training data, map-style or a stream; and the evaluation data, map-style or None.
    """
    train: Any
    options: dict[str, Any] = {"allow_urls": arguments.allow_urls, "max_bad_samples": arguments.max_bad_samples}
    if arguments.streaming:
        train = Stream(arguments.data, arguments.on_bad_sample, seed, rank=rank, processes=processes, **options)
    elif arguments.dataset_names:
        train = open_parts(
            _parts(arguments), arguments.on_bad_sample, seed, arguments.max_num_image_per_sample, arguments.data, **options
        )
    elif arguments.data.endswith((".yaml", ".yml")):
        train = load_mixture(arguments.data, arguments.on_bad_sample, **options)
    else:
        train = load_conversations(arguments.data, arguments.on_bad_sample, **options)
    if arguments.eval_share is not None:
        return split(train, arguments.eval_share, seed)
    if arguments.eval_data is not None:
        return train, load_conversations(arguments.eval_data, arguments.on_bad_sample, **options)
    return train, None


def _parts(arguments: DataArguments) -> list[Part]:
    names = arguments.dataset_names or []
    samples = _for_each(arguments.dataset_samples or ["all"], names)
    concatenate = _for_each(arguments.dataset_concatenate_samples or [1], names)
    return [
        Part(
            path=str(Path(arguments.data) / f"{name}.jsonl"),
            name=name,
            samples=None if number == "all" else int(number),
            concatenate=together,
        )
        for name, number, together in zip(names, samples, concatenate, strict=True)
    ]


def _for_each(values: list[T], names: list[str]) -> list[T]:
    """One value for each name; a single value is that of all."""
    return values * len(names) if len(values) == 1 else values


def pack_data(data: Any, collator: ConversationCollator, arguments: DataArguments, seed: int) -> Any:
    """Pack the conversations of a data set, after measuring all of them; or those of a stream while it is read.

    Args:
        data: map-style data set or stream of conversations.
        collator: collator of the training, which measures conversations.
        arguments: data arguments of the run.
        seed: seed of the packing.
    """
    if collator.max_length is None:
        raise ValueError("Packing needs the length of a pack; pass max_length to the collator.")
    if isinstance(data, Stream):
        data.arrange = functools.partial(
            pack_stream,
            size=collator.packed_size,
            max_tokens=collator.max_length,
            max_tiles=arguments.max_images_per_pack,
            bad=data.bad,
        )
        return data
    packs = PackedConversations(
        data,
        collator.packed_size,
        collator.max_length,
        arguments.max_images_per_pack,
        seed=seed,
        on_bad_sample=arguments.on_bad_sample,
        max_bad_samples=arguments.max_bad_samples,
    )
    logger.info("Packing: %d packs of %d conversations, filled to %.1f%%.", len(packs), len(data), 100 * packs.filled)
    return packs

"""Summarizes the training data of an epoch, and checks that it has tokens to train."""

import logging
from typing import Any

from ..data.packing import PackedConversations
from ..data.streaming import Stream
from .collator import ConversationCollator, SampleSize

logger = logging.getLogger(__name__)

MEASURED = 256  # maximum number of conversations that are measured before training


def describe_data(data: Any, collator: ConversationCollator) -> str:
    """The size of an epoch: "18 conversations, 35 turns, 20 images, 3,235 tokens, 96 trained"; with `image_layout="tiles"`
    "20 images of 60 tiles".

    Of larger data sets, `MEASURED` evenly spaced conversations are measured, and the line starts with "about". A warning is
    logged for data without images.

    Args:
        data: map-style or packed data set, or a stream, which is not measured.
        collator: collator of the training.

    Raises:
        ValueError: if no conversation has a token to train, after all of them were measured.
    """
    if isinstance(data, Stream):
        return "streamed"
    packs = data if isinstance(data, PackedConversations) else None
    conversations = data if packs is None else packs.data
    sizes, measured, failure = _measure(conversations, collator)
    if not any(size.trained for size in sizes):
        raise ValueError(_nothing_to_train(conversations, collator, failure))
    if not any(conversations.images(index) for index in range(len(conversations))):
        logger.warning("%s contains no image, so image understanding cannot be trained on it.", data.source)
    number = round(len(conversations) * len(sizes) / measured) if packs is None else sum(map(len, packs.packs))
    about = "" if measured == len(conversations) else "about "
    turns, images, tiles, tokens, trained = (
        round(sum(getattr(size, name) for size in sizes) * number / len(sizes))
        for name in ("turns", "images", "tiles", "tokens", "trained")
    )
    if packs is not None:
        tokens = packs.tokens  # packing measured every conversation
    of_tiles = f" of {tiles:,} tiles" if collator.processor.image_layout == "tiles" else ""
    line = f"{number:,} conversations, {turns:,} turns, {images:,} images{of_tiles}, {tokens:,} tokens, {trained:,} trained"
    return about + (line if packs is None else f"{line}, in {len(packs):,} packs")


def _measure(conversations: Any, collator: ConversationCollator) -> tuple[list[SampleSize], int, ValueError | None]:
    """Measure evenly spaced conversations; if none of them has a token to train, also others until one has.

    Returns:
        The sizes of valid conversations, the number of measured ones, and the first error.
    """
    failure: ValueError | None = None
    sizes: list[SampleSize] = []
    measured, step = 0, max(len(conversations) // MEASURED, 1)
    spaced = range(0, len(conversations), step)
    for index in (*spaced, *(index for index in range(len(conversations)) if index % step)):
        if measured >= len(spaced) and any(size.trained for size in sizes):
            break
        measured += 1
        try:
            sizes.append(collator.measure(conversations[index]))
        except ValueError as error:  # the collator reports or skips this sample
            failure = failure or error
    return sizes, measured, failure


def _nothing_to_train(conversations: Any, collator: ConversationCollator, failure: ValueError | None) -> str:
    begin = f"{conversations.source} has no token to train in {len(conversations):,} conversations"
    if failure is None:
        return (
            f"{begin}: the chat template marks no answers. Put {{% generation %}} and {{% endgeneration %}} around the "
            "assistant's answers in it."
        )
    if collator.max_length is None:
        return f"{begin}: all of them are skipped. First error: {failure}"
    shortest = min(collator.first_turn_length(conversations[index]) for index in range(len(conversations)))
    limit = collator.max_length
    return f"{begin}: the shortest first turn takes {shortest:,} tokens, more than --max-length {limit:,}; raise it."

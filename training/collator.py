"""Conversations to a batch that a DSVL model learns from."""

import itertools
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState, PartialState

from ..data import complete_messages
from ..data.conversations import NAMED, ON_BAD_SAMPLE, WORKERS, picture_source, pictures_of, worker_row
from ..processing_dsvl import decode_picture
from .features import FeatureCache

logger = logging.getLogger(__name__)

MULTIPLE = 8  # tokens: what matrix units like


@dataclass(frozen=True)
class SampleSize:
    """What a sample consists of: turns, images, tokens with those of the images, and the tokens that have a label."""

    turns: int
    images: int
    tokens: int
    trained: int


class ConversationCollator:
    """Renders conversations with the chat template; the assistant's tokens, the end of each answer included, are learnt.

    A conversation of more than `max_length` tokens loses whole rounds from its end, never a part of a picture.

    Args:
        processor: the model's `DSVLProcessor`.
        max_length: in tokens, image tokens included; None for no limit.
        on_bad_sample: what happens if the first round does not fit, or a picture cannot be decoded: "error", or "skip" to
            leave the conversation out of its batch. A batch that loses all of them has nothing to learn.
        features: of the pictures, by a frozen tower; they are then looked up instead of decoded.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        on_bad_sample: str = "error",
        features: FeatureCache | None = None,
    ) -> None:
        if on_bad_sample not in ON_BAD_SAMPLE:
            raise ValueError(f"on_bad_sample={on_bad_sample!r} is not known; choose from {ON_BAD_SAMPLE}.")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} leaves no token; pass at least 1, or None for no limit.")
        self.processor, self.max_length, self.on_bad_sample = processor, max_length, on_bad_sample
        self.features = features if features is not None and len(features) else None  # without pictures there is none
        # Shared with the data loader's workers, a row for each, as they count at the same time.
        self._counts = torch.zeros(WORKERS, 3, dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> torch.Tensor:
        """How many conversations were seen, left out, and shortened, by all workers: (3,), int64."""
        return self._counts.sum(0)

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            samples: `{"messages": ...}` with or without `"images"` (see dsvl.data), or lists of messages; or packs, lists of
                samples that share a row.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (-100 where nothing is learnt), int64 of (batch,
            tokens), tokens a multiple of 8; and `pixel_values` (pictures, 3, height, width) if there are pictures; or, with
            `features`, `image_features` (pictures, tower tokens, tower width), in every batch. For packs
            `position_ids`, which begin again with each conversation, instead of `attention_mask`: so a decoder of
            transformers tells packed conversations apart. Padding is a conversation of its own.

        Raises:
            ValueError: as asked for by `on_bad_sample`.
        """
        packed = _is_pack(samples[0])
        packs = samples if packed else [[sample] for sample in samples]
        rows = [conversations for one in packs if (conversations := self._usable(one))]
        if not rows:
            return self._nothing()
        batch = self.processor.apply_chat_template(
            [conversation for row in rows for conversation in row],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No padding for packs: they are put together from what is real.
            processor_kwargs={} if packed else {"padding": True, "pad_to_multiple_of": MULTIPLE},
        )
        if packed:
            self._join(batch, [len(row) for row in rows])
        images = {}
        if "pixel_values" in batch:  # a single copy, without torch's threads, which wait for a core in a busy loader
            images["pixel_values"] = torch.from_numpy(np.stack(batch.pop("pixel_values")))
        if self.features is not None:
            features = batch.pop("image_features", None)
            images["image_features"] = self.features.none() if features is None else torch.stack(features)
        # Through numpy: torch reads lists three times slower; and with return_tensors="pt" transformers makes the mask by
        # walking tensors element by element, slower still. The rows come first: accelerate and transformers take the length
        # of a batch's first tensor for the number of its samples.
        tensors = {key: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for key, rows in batch.items()}
        tensors["labels"] = tensors["input_ids"].masked_fill(tensors.pop("assistant_masks") == 0, -100)
        tensors |= images
        check_dispatch(len(tensors["input_ids"]), sum(map(len, images.values())))
        return tensors

    def _usable(self, samples: list[Any]) -> list[list[dict[str, Any]]]:
        """The samples as messages with decoded pictures; what cannot be used is told or counted."""
        counts = self._counts[worker_row()]
        conversations = []
        for sample in samples:
            counts[0] += 1
            try:
                messages = complete_messages(sample)
                kept = self.shorten(messages)
                conversations.append(self.decode(kept))
                counts[2] += len(kept) < len(messages)
            except ValueError as error:
                if self.on_bad_sample == "error":
                    raise ValueError(f"{error} Or leave such conversations out (--on-bad-sample skip).") from error
                counts[1] += 1
                if counts[1] <= NAMED:
                    logger.warning("Left out: %s", error)
        return conversations

    def _join(self, batch: Any, sizes: list[int]) -> None:
        """Make rows of so many conversations each, in place: lists of tokens one after the other, padded at the end."""
        del batch["attention_mask"]
        batch["position_ids"] = [list(range(len(ids))) for ids in batch["input_ids"]]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        ends = list(itertools.accumulate(sizes))
        for key in ("input_ids", "position_ids", "mm_token_type_ids", "assistant_masks"):
            own = zip(ends, sizes, strict=True)
            rows: list[list[int]] = [list(itertools.chain(*batch[key][end - size : end])) for end, size in own]
            longest = max(map(len, rows))
            longest += -longest % MULTIPLE
            for row in rows:
                missing = longest - len(row)
                row.extend(range(missing) if key == "position_ids" else [fill.get(key, 0)] * missing)
            batch[key] = rows

    def shorten(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages without the last rounds, as many as do not fit into `max_length`.

        Raises:
            ValueError: if not even the first round fits.
        """
        if self.max_length is None:
            return messages
        for end in reversed(_turn_ends(messages)):
            length = self.processor.count_tokens(messages[:end])
            if length <= self.max_length:
                return messages[:end]
        question = next(message["content"] for message in messages if message["role"] == "user")
        raise ValueError(
            f"The first round of a conversation takes {length} tokens, more than max_length={self.max_length} "
            f"({_text(question)!r}); raise max_length."
        )

    def measure(self, sample: Any) -> "SampleSize":
        """The size of a sample as it is trained, once it is shortened; no image is decoded.

        Raises:
            ValueError: as `shorten` does.
        """
        messages = self.shorten_sample(sample)
        # The answers' tokens do not depend on images, which stand between marks of their own.
        texts = [
            message
            if isinstance(message["content"], str)
            else message | {"content": [part for part in message["content"] if part["type"] == "text"]}
            for message in messages
        ]
        masks = self.processor.apply_chat_template(
            texts, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )["assistant_masks"]
        return SampleSize(
            turns=len(_turn_ends(messages)),
            images=len(pictures_of(messages)),
            tokens=self.processor.count_tokens(messages),
            trained=int(np.asarray(masks).sum()),
        )

    def shorten_sample(self, sample: Any) -> list[dict[str, Any]]:
        """The messages of a sample as they are trained; raises ValueError as `shorten` does."""
        return self.shorten(complete_messages(sample))

    def first_turn_length(self, sample: Any) -> int:
        """How many tokens a sample takes at least, if all turns but the first are dropped."""
        messages = complete_messages(sample)
        return int(self.processor.count_tokens(messages[: _turn_ends(messages)[0]]))

    def sample_length(self, sample: Any) -> int:
        """How many tokens a sample takes once it is shortened; raises ValueError as `shorten` does."""
        return self.processor.count_tokens(self.shorten_sample(sample))

    def decode(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with their pictures decoded, or their features, so that one that cannot be is told by itself.

        Raises:
            ValueError: naming that picture.
        """
        return [
            message
            if isinstance(message["content"], str)
            else message | {"content": [self._with_picture(part) for part in message["content"]]}
            for message in messages
        ]

    def _with_picture(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        source = picture_source(part)
        return {"type": "image", "image": decode_picture(source) if self.features is None else self.features.of(source)}

    def _nothing(self) -> dict[str, torch.Tensor]:
        """A batch of one token with nothing to learn, for a rank that others wait for."""
        tokenizer = self.processor.tokenizer
        ids = torch.full((1, MULTIPLE), tokenizer.pad_token_id)
        ids[0, -1] = tokenizer.eos_token_id
        mask = torch.zeros_like(ids)
        mask[0, -1] = 1
        tensors = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": torch.zeros_like(ids),
            "labels": torch.full_like(ids, -100),
        }
        if self.features is not None:
            tensors["image_features"] = self.features.none()
        return tensors


def _turn_ends(messages: list[dict[str, Any]]) -> list[int]:
    """How many messages there are up to the end of each turn; a turn ends with its last answer."""
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [end for end in ends if end == len(messages) or messages[end]["role"] == "user"]


def check_dispatch(rows: int, images: int) -> None:
    """Refuse a batch that accelerate is about to cut.

    For a streaming data set accelerate's dispatcher reads in one process for all of them and cuts every tensor of a batch to
    the number of its rows, the images too. `Trainer` uses it unless it is told not to.

    Args:
        rows, images: of the batch.

    Raises:
        ValueError: naming the setting that turns the dispatcher off.
    """
    state = GradientState()
    loader = state.active_dataloader
    if not isinstance(loader, DataLoaderDispatcher):
        return
    processes = PartialState().num_processes
    if images > rows or (processes > 1 and images != rows):
        raise ValueError(
            f"A batch of {rows} rows has {images} images, and accelerate's DataLoaderDispatcher, which reads a streaming "
            f"data set for {processes} {'process' if processes == 1 else 'processes'}, would cut them to the rows; pass "
            'accelerator_config={"dispatch_batches": False} to TrainingArguments, or use DSVLTrainer.'
        )


def _is_pack(sample: Any) -> bool:
    """Whether this is a list of samples, rather than a sample, which may be a list of messages."""
    return isinstance(sample, list) and not (isinstance(sample[0], dict) and "role" in sample[0])


def _text(content: Any) -> str:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return " ".join(texts)[:60]

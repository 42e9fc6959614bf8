"""Conversations to a batch that a DSVL model learns from."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState, PartialState

from ..data import check_conversation, complete_messages
from ..data.dataset_files import without_nones
from ..data.messages import Sample, image_source, images_of, is_trained, location_of
from ..data.record_formats import MESSAGES
from ..data.sample_errors import MAX_BAD_SAMPLES, WORKERS, BadSamples, Location, one_sample, worker_row
from ..image_reading_dsvl import fit_thin_image, read_image
from ..utils.image_loading import fetch_image_source
from ..utils.text import shortened
from .features import FeatureCache

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

    A conversation of more than `max_length` tokens loses whole rounds from its end, never a part of an image.

    Args:
        processor: the model's `DSVLProcessor`.
        max_length: in tokens, image tokens included; None for no limit.
        on_bad_sample: what happens if the first round does not fit, an image cannot be decoded, or anything else is wrong
            with a conversation: "error", or "skip" to leave it out of its batch. A batch that loses all of them has nothing
            to learn.
        features: of the images, by a frozen tower; they are then looked up instead of decoded.
        allow_urls: whether images are fetched from addresses (see `utils.url_fetching.fetch_url`), in every epoch again.
        max_bad_samples: the share that may be skipped, see `data.sample_errors.BadSamples`.
    """

    def __init__(
        self,
        processor: Any,
        max_length: int | None = None,
        on_bad_sample: str = "error",
        features: FeatureCache | None = None,
        allow_urls: bool = False,
        max_bad_samples: float = MAX_BAD_SAMPLES,
    ) -> None:
        self.bad = BadSamples(on_bad_sample, max_bad_samples, "The data")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} leaves no token; pass at least 1, or None for no limit.")
        self.processor, self.max_length, self.on_bad_sample = processor, max_length, on_bad_sample
        self.features = features if features is not None and len(features) else None  # without images there is none
        self.allow_urls = allow_urls
        # Shared with the data loader's workers, a row for each, as they count at the same time.
        self._shortened = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> torch.Tensor:
        """How many conversations were seen, left out, and shortened, by all workers: (3,), int64."""
        return torch.tensor([self.bad.seen, self.bad.count, int(self._shortened.sum())])

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            samples: `{"messages": ...}` with or without `"images"` (see dsvl.data), or lists of messages; or packs, lists of
                samples that share a row.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (-100 where nothing is learnt), int64 of (batch,
            tokens), tokens a multiple of 8; and `pixel_values` (images, 3, height, width) if there are images; or, with
            `features`, `image_features` (images, tower tokens, tower width), in every batch. For packs
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
        rows, batch = self._rendered(rows, padded=not packed)
        if not rows:
            return self._nothing()
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

    def _usable(self, samples: list[Any]) -> list["_Conversation"]:
        """The samples as messages with decoded images; what cannot be used is told or counted."""
        conversations = []
        for sample in samples:
            location = location_of(sample)
            with self.bad.sample(location):
                messages = _messages(sample)
                kept = self.shorten(messages)
                conversations.append(_Conversation(self.decode(kept), location))
                self._shortened[worker_row()] += len(kept) < len(messages)
        return conversations

    def _rendered(self, rows: list[list["_Conversation"]], padded: bool) -> tuple[list[list["_Conversation"]], Any]:
        """The rows, and the batch of their conversations.

        One that cannot be rendered spoils the batch; then each is rendered by itself, which finds it.
        """
        try:
            return rows, self._render([one for row in rows for one in row], padded)
        except Exception as error:
            kept = []
            for row in rows:
                usable = []
                for one in row:
                    with self.bad.again(one.location):
                        self._render([one], padded)
                        usable.append(one)
                if usable:
                    kept.append(usable)
            if sum(map(len, kept)) == sum(map(len, rows)):  # not a conversation's fault
                raise error
        return kept, self._render([one for row in kept for one in row], padded) if kept else None

    def _render(self, conversations: list["_Conversation"], padded: bool) -> Any:
        batch = self.processor.apply_chat_template(
            [one.messages for one in conversations],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No padding for packs: they are put together from what is real.
            processor_kwargs={"padding": True, "pad_to_multiple_of": MULTIPLE} if padded else {},
        )
        for row, one in enumerate(conversations):
            answers = [message for message in one.messages if message["role"] == "assistant"]
            if not all(map(is_trained, answers)):
                batch["assistant_masks"][row] = _unmask(batch["assistant_masks"][row], list(map(is_trained, answers)))
        return batch

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
        mask = list(np.asarray(masks).flatten())
        answers = [is_trained(message) for message in messages if message["role"] == "assistant"]
        if not all(answers):
            mask = _unmask(mask, answers)
        return SampleSize(
            turns=len(_turn_ends(messages)),
            images=len(images_of(messages)),
            tokens=self.processor.count_tokens(messages),
            trained=int(sum(mask)),
        )

    def shorten_sample(self, sample: Any) -> list[dict[str, Any]]:
        """The messages of a sample as they are trained; raises ValueError as `shorten` does."""
        return self.shorten(_messages(sample))

    def first_turn_length(self, sample: Any) -> int:
        """How many tokens a sample takes at least, if all turns but the first are dropped."""
        messages = _messages(sample)
        return int(self.processor.count_tokens(messages[: _turn_ends(messages)[0]]))

    def sample_length(self, sample: Any) -> int:
        """How many tokens a sample takes once it is shortened; raises `BadSample`, whatever is wrong with it."""
        with one_sample(location_of(sample)):
            return self.processor.count_tokens(self.shorten_sample(sample))

    def decode(self, messages: list[dict[str, Any]], pixels: bool = False) -> list[dict[str, Any]]:
        """The messages with their images decoded, or their features, so that one that cannot be is told by itself.

        Args:
            messages: complete ones.
            pixels: decode images whose features are known, too.

        Raises:
            ValueError: naming that image.
        """
        features = None if pixels else self.features
        return [
            message
            if isinstance(message["content"], str)
            else message | {"content": [self._with_image(part, features) for part in message["content"]]}
            for message in messages
        ]

    def _with_image(self, part: dict[str, Any], features: FeatureCache | None) -> dict[str, Any]:
        if part["type"] != "image":
            return part
        source = fetch_image_source(image_source(part), self.allow_urls)
        if features is not None:
            return {"type": "image", "image_features": features.of(source)}
        image = read_image(source, allow_urls=False)
        return {"type": "image", "image": fit_thin_image(image, self.processor.image_processor)}

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


@dataclass
class _Conversation:
    """Messages with decoded images, and where they are from."""

    messages: list[dict[str, Any]]
    location: Location


def _messages(sample: Any) -> list[dict[str, Any]]:
    """A sample's complete messages; one that no data set has checked is checked here."""
    if not isinstance(sample, Sample):
        sample = MESSAGES.sample(without_nones({"messages": sample} if isinstance(sample, list) else dict(sample)), None)
        check_conversation(sample, for_training=False)
    return complete_messages(sample)


def _unmask(mask: list[int], trained: list[bool]) -> list[int]:
    """The mask of the assistant's tokens without those of answers of weight 0.

    Raises:
        ValueError: if it does not tell the answers apart.
    """
    runs = [(value, len(list(run))) for value, run in itertools.groupby(mask)]
    if sum(value for value, _ in runs) != len(trained):
        raise ValueError("an answer has the weight 0, but the chat template does not mark each answer; remove it.")
    answers = iter(trained)
    return [token for value, length in runs for token in [value and int(next(answers))] * length]


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
    return shortened(" ".join(texts), 60)

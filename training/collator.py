"""Collates conversations to batches for training."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.state import GradientState, PartialState

from ..composition.chat_template import check_template_takes
from ..data import check_conversation, complete_messages
from ..data.dataset_files import without_nones
from ..data.messages import Sample, frame_keys, image_source, images_of, is_trained, location_of
from ..data.record_formats import MESSAGES
from ..data.sample_errors import MAX_BAD_SAMPLES, WORKERS, BadSamples, Location, one_sample, worker_row
from ..image_reading_dsvl import read_image
from ..utils.image_loading import fetch_image_source, image_source_size
from ..utils.text import shortened
from ..utils.video_loading import with_frames
from .feature_cache import FeatureCache

MULTIPLE = 8  # tokens; tensor cores need dimensions that are multiples of 8


@dataclass(frozen=True)
class SampleSize:
    """The size of a sample: turns, images, their tiles (inputs of the vision tower), tokens (image tokens included), and
    tokens that have a label."""

    turns: int
    images: int
    tiles: int
    tokens: int
    trained: int


class ConversationCollator:
    """Renders conversations with the chat template. The tokens of the answers have labels, the end of each included.

    Whole turns are dropped from the end of a conversation that is longer than `max_length` tokens; images are never cut.

    Args:
        processor: `DSVLProcessor` of the model.
        max_length: maximum tokens per conversation, image tokens included, *optional*, defaults to None: no limit.
        on_bad_sample: "error" or "skip", *optional*, defaults to "error": what to do if the first turn does not fit, an
            image cannot be decoded, or a conversation is invalid. A batch of which all samples are skipped has no labels.
        features: cache of image features of the frozen tower, *optional*, which replaces decoding of images.
        allow_urls: whether images and videos may be URLs, which are fetched in every epoch, *optional*, defaults to False.
        max_bad_samples: fraction of samples that may be skipped, *optional*; see `data.sample_errors.BadSamples`.

    Raises:
        ValueError: if `max_length` is less than 1.
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
            raise ValueError(f"max_length={max_length} leaves no tokens; pass at least 1, or None for no limit.")
        self.processor, self.max_length, self.on_bad_sample = processor, max_length, on_bad_sample
        self.features = features if features is not None and len(features) else None  # empty if the data have no images
        self.allow_urls = allow_urls
        # In shared memory with one entry per data loader worker, as workers count concurrently.
        self._shortened = torch.zeros(WORKERS, dtype=torch.int64).share_memory_()

    @property
    def counts(self) -> torch.Tensor:
        """Numbers of conversations that were seen, skipped and shortened, in all workers: (3,), int64."""
        return torch.tensor([self.bad.seen, self.bad.count, int(self._shortened.sum())])

    def __call__(self, samples: list[Any]) -> dict[str, torch.Tensor]:
        """Make a batch.

        Args:
            samples: `{"messages": ...}` with optional `"images"` (see `dsvl.data`), or lists of messages; or packs: lists of
                samples that share a row.

        Returns:
            `input_ids`, `attention_mask`, `mm_token_type_ids` and `labels` (-100 for no label): (batch, tokens), int64,
            where tokens is a multiple of 8. `pixel_values`: (tiles, 3, height, width), if there are images, with
            `num_tiles`: (images,) if the model's `image_layout` is "tiles"; of native images (images, patches, 3 *
            patch_size ** 2), with `pixel_attention_mask` and `spatial_shapes`. With `features`, `image_features`: (tiles,
            tower tokens, tower width) in every batch, with `num_tiles` or `spatial_shapes`. Packs have `document_ids`
            instead of `attention_mask`: a number for each conversation, and 0 for the padding.

        Raises:
            ValueError: for an invalid sample, unless `on_bad_sample` is "skip".
        """
        packed = _is_pack(samples[0])
        packs = samples if packed else [[sample] for sample in samples]
        rows = [conversations for one in packs if (conversations := self._usable(one))]
        if not rows:
            return self._empty_batch()
        rows, batch = self._rendered(rows, padded=not packed)
        if not rows:
            return self._empty_batch()
        if packed:
            self._join(batch, [len(row) for row in rows])
        images = {}
        if "pixel_values" in batch:  # one copy, without torch's threads, which compete for cores in a data loader
            images["pixel_values"] = torch.from_numpy(np.stack(batch.pop("pixel_values")))
        if "image_features" in batch:
            images["image_features"] = torch.stack(batch.pop("image_features"))
        for key in ("pixel_attention_mask", "spatial_shapes", "num_tiles"):
            if key in batch:
                images[key] = torch.from_numpy(np.asarray(batch.pop(key), dtype=np.int64))
        if self.features is not None and not images:
            images = self.features.empty()
        # With NumPy: torch converts lists three times slower, and return_tensors="pt" makes transformers build the mask
        # element by element. Tokens come first: accelerate and transformers read the batch size from the first tensor.
        tensors = {key: torch.from_numpy(np.asarray(rows, dtype=np.int64)) for key, rows in batch.items()}
        tensors["labels"] = tensors["input_ids"].masked_fill(tensors.pop("assistant_masks") == 0, -100)
        tensors |= images
        check_dispatch(len(tensors["input_ids"]), [len(tensor) for tensor in images.values()])
        return tensors

    def _usable(self, samples: list[Any]) -> list["_Conversation"]:
        """The valid samples as messages with decoded images; others are reported or counted."""
        conversations = []
        for sample in samples:
            location = location_of(sample)
            with self.bad.sample(location):
                messages = self.messages(sample)
                kept = self.shorten(messages)
                conversations.append(_Conversation(self.decode(kept), location))
                self._shortened[worker_row()] += len(kept) < len(messages)
        return conversations

    def _rendered(self, rows: list[list["_Conversation"]], padded: bool) -> tuple[list[list["_Conversation"]], Any]:
        """The rows and the batch of their conversations.

        If rendering the batch fails, conversations are rendered one by one to find the invalid one.
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
            if sum(map(len, kept)) == sum(map(len, rows)):  # no single conversation fails
                raise error
        return kept, self._render([one for row in kept for one in row], padded) if kept else None

    def _render(self, conversations: list["_Conversation"], padded: bool) -> Any:
        batch = self.processor.apply_chat_template(
            [one.messages for one in conversations],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            # No padding for packs: their rows are joined from the conversations' tokens.
            processor_kwargs={"padding": True, "pad_to_multiple_of": MULTIPLE} if padded else {},
        )
        for row, one in enumerate(conversations):
            answers = [message for message in one.messages if message["role"] == "assistant"]
            if not all(map(is_trained, answers)):
                batch["assistant_masks"][row] = _unmask(batch["assistant_masks"][row], list(map(is_trained, answers)))
        return batch

    def _join(self, batch: Any, sizes: list[int]) -> None:
        """Join conversations to rows, in place; rows are padded at the end.

        Args:
            batch: lists of tokens per conversation.
            sizes: number of conversations of each row.
        """
        del batch["attention_mask"]
        batch["document_ids"] = [[number] * len(ids) for number, ids in enumerate(batch["input_ids"], start=1)]
        fill = {"input_ids": self.processor.tokenizer.pad_token_id}
        ends = list(itertools.accumulate(sizes))
        for key in ("input_ids", "document_ids", "mm_token_type_ids", "assistant_masks"):
            own = zip(ends, sizes, strict=True)
            rows: list[list[int]] = [list(itertools.chain(*batch[key][end - size : end])) for end, size in own]
            longest = max(map(len, rows))
            longest += -longest % MULTIPLE
            for row in rows:
                row.extend([fill.get(key, 0)] * (longest - len(row)))
            batch[key] = rows

    def shorten(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages without the last turns that do not fit into `max_length`.

        Raises:
            ValueError: if the first turn does not fit.
        """
        if self.max_length is None:
            return messages
        sized = self._with_sizes(messages)
        for end in reversed(_turn_ends(messages)):
            length = self.processor.count_tokens(sized[:end])
            if length <= self.max_length:
                return messages[:end]
        question = next(message["content"] for message in messages if message["role"] == "user")
        raise ValueError(
            f"The first turn of a conversation takes {length} tokens, more than max_length={self.max_length} "
            f"({_text(question)!r}); raise max_length."
        )

    def measure(self, sample: Any) -> "SampleSize":
        """The size of a sample after shortening; no image is decoded.

        Raises:
            ValueError: see `shorten`.
        """
        messages = self.shorten_sample(sample)
        # The tokens of the answers do not depend on images.
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
        tokens, tiles = self._tokens_and_tiles(self._with_sizes(messages))
        return SampleSize(
            turns=len(_turn_ends(messages)),
            images=len(images_of(messages)),
            tiles=tiles,
            tokens=tokens,
            trained=int(sum(mask)),
        )

    def shorten_sample(self, sample: Any) -> list[dict[str, Any]]:
        """The messages of a sample after shortening; raises `ValueError`, see `shorten`."""
        return self.shorten(self.messages(sample))

    def first_turn_length(self, sample: Any) -> int:
        """The number of tokens of a sample's first turn."""
        messages = self.messages(sample)
        return int(self.processor.count_tokens(self._with_sizes(messages[: _turn_ends(messages)[0]])))

    def packed_size(self, sample: Any) -> tuple[int, int]:
        """The numbers of tokens and tiles of a sample after shortening; raises `BadSample` for any invalid sample."""
        with one_sample(location_of(sample)):
            return self._tokens_and_tiles(self._with_sizes(self.shorten_sample(sample)))

    def _with_sizes(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with the size of each image, if its tokens follow it. Headers of files are read, not pixels."""
        if not self.processor.follows_size:
            return messages
        return [
            message
            if isinstance(message["content"], str)
            else message | {"content": [self._with_size(part) for part in message["content"]]}
            for message in messages
        ]

    def _with_size(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "image" or part.get("time"):  # a frame is one tile
            return part
        return part | {"image_size": image_source_size(image_source(part), self.allow_urls)}

    def _tokens_and_tiles(self, sized: list[dict[str, Any]]) -> tuple[int, int]:
        """The numbers of tokens and tiles of messages from `_with_sizes`."""
        ids, images = self.processor.ids_of_tiles(sized)
        return len(ids) + sum(length - 1 for tiles in images for length in tiles), sum(map(len, images))

    def messages(self, sample: Any) -> list[dict[str, Any]]:
        """The complete messages of a sample, with the frames of videos as images that are not decoded yet.

        Samples that do not come from a data set are checked.

        Raises:
            ValueError: if the sample is invalid, a video cannot be read, or the chat template would drop something.
        """
        if not isinstance(sample, Sample):
            sample = {"messages": sample} if isinstance(sample, list) else dict(sample)
            sample = MESSAGES.sample(without_nones(sample), None)
            check_conversation(sample, for_training=False)
        messages = complete_messages(sample)
        check_template_takes(messages, self.processor.chat_template)
        return with_frames(messages, self.processor.video_sampling, self.allow_urls)

    def decode(self, messages: list[dict[str, Any]], pixels: bool = False) -> list[dict[str, Any]]:
        """The messages with decoded images or cached features.

        Args:
            messages: complete messages.
            pixels: decode images even if their features are cached, *optional*, defaults to False.

        Raises:
            ValueError: if an image cannot be decoded; the message names it.
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
        of_video = frame_keys(part)
        if features is not None:
            return {"type": "image"} | features.part(source) | of_video
        return {"type": "image", "image": read_image(source, allow_urls=False)} | of_video

    def _empty_batch(self) -> dict[str, torch.Tensor]:
        """A batch of one token without a label, so that this process takes part in collective operations."""
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
        return tensors if self.features is None else tensors | self.features.empty()


@dataclass
class _Conversation:
    """Messages with decoded images, and their location in the data."""

    messages: list[dict[str, Any]]
    location: Location


def _unmask(mask: list[int], trained: list[bool]) -> list[int]:
    """The mask of the assistant's tokens without answers of weight 0.

    Args:
        mask: (tokens,): 1 for tokens of answers.
        trained: whether each answer is trained.

    Raises:
        ValueError: if answers are not separated in the mask.
    """
    runs = [(value, len(list(run))) for value, run in itertools.groupby(mask)]
    if sum(value for value, _ in runs) != len(trained):
        raise ValueError(
            "an answer has weight 0, but the chat template does not mark every answer; remove the weight or the answer."
        )
    answers = iter(trained)
    return [token for value, length in runs for token in [value and int(next(answers))] * length]


def _turn_ends(messages: list[dict[str, Any]]) -> list[int]:
    """The number of messages up to the end of each turn; a turn ends with its last answer."""
    ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
    return [end for end in ends if end == len(messages) or messages[end]["role"] == "user"]


def check_dispatch(rows: int, images: list[int]) -> None:
    """Refuse a batch whose images accelerate would cut.

    accelerate's dispatcher reads a streaming data set in one process for all, and cuts every tensor of a batch to the number
    of rows, images too. `Trainer` uses it by default.

    Args:
        rows: number of rows of the batch.
        images: the first dimension of each tensor of images: the number of images, or of their tiles.

    Raises:
        ValueError: if images would be lost; the message names the setting that disables the dispatcher.
    """
    state = GradientState()
    loader = state.active_dataloader
    if not isinstance(loader, DataLoaderDispatcher):
        return
    processes = PartialState().num_processes
    if any(number > rows or (processes > 1 and number != rows) for number in images):
        raise ValueError(
            f"A batch of {rows} rows has {max(images)} images or tiles, and accelerate's DataLoaderDispatcher, which reads "
            f"a streaming data set for {processes} {'process' if processes == 1 else 'processes'}, would cut them to the "
            'rows; pass accelerator_config={"dispatch_batches": False} to TrainingArguments, or use DSVLTrainer.'
        )


def _is_pack(sample: Any) -> bool:
    """Whether this is a list of samples; a sample may be a list of messages."""
    return isinstance(sample, list) and not (isinstance(sample[0], dict) and "role" in sample[0])


def _text(content: Any) -> str:
    texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
    return shortened(" ".join(texts), 60)

"""`DSVLChat`: a conversation in which each round costs what is new."""

import base64
import logging
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..acceleration.image_cache import reuse_is_exact
from ..data.messages import SOURCES
from ..utils.image_loading import open_image
from .answering import Answer
from .detokenizer import pieces_of_text
from .memory import Memory, SeenImage, new_cache
from .prompts import prompt_ids
from .storing import load_messages, save_messages

logger = logging.getLogger(__name__)

OVERFLOWS = ("error", "drop")
MAX_NEW_TOKENS = 512  # of an answer, where neither the caller nor the checkpoint says it; at most a quarter of the context


@dataclass
class Round:
    """What an answer cost. Times are in seconds from the call.

    Attributes:
        prompt_tokens: of the whole conversation up to the answer.
        reused_tokens: those of them that were cached.
        encoded_images: images that went through the vision tower.
        dropped_rounds: oldest rounds that were dropped to make room.
        answer_ids: the tokens that were generated, the end of the answer included.
        first_token_seconds: until the first token was there.
        seconds: until the last was.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    encoded_images: int = 0
    dropped_rounds: int = 0
    answer_ids: list[int] = field(default_factory=list)
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Of the tokens after the first."""
        later = len(self.answer_ids) - 1
        return later / (self.seconds - self.first_token_seconds) if later > 0 else 0.0


class DSVLChat:
    """A conversation with a model. Each round computes its own tokens and images only; answers are those of the whole
    conversation run afresh (as exactly as the model's precision has it: what is computed in parts rounds differently).

    The cache of earlier rounds is held against the tokens and images of the conversation as it stands, and used as far as
    they agree: messages may be changed or deleted at will. Call `reset()` after changing the model. One answer at a time;
    for several visitors, several objects may share a model, but not run it at once.

    Args:
        model: a `DSVLForConditionalGeneration`, in evaluation mode.
        processor: its `DSVLProcessor`.
        overflow: what happens when conversation and answer (`max_new_tokens`) exceed `context_length`: "error", or "drop" to
            leave out the oldest rounds whole, which is logged.
        context_length: in tokens; by default what the decoder's positions allow. A static cache takes memory for all of it.
        allow_urls: whether images may be http(s) addresses (see `url_fetching.fetch_url`). Off, nothing is ever fetched.
        generation: what `generate()` takes, for all rounds: `max_new_tokens` (else the checkpoint's, or 512, or a
            quarter of the context if that is less), `do_sample`,
            `temperature`, ..., `cache_implementation="static"`.

    Attributes:
        messages: the conversation as the chat template takes it. May be edited between answers.
        last_round: what the last answer cost.

    Raises:
        ValueError: for an `overflow` that is not known.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        overflow: str = "error",
        context_length: int | None = None,
        allow_urls: bool = False,
        **generation: Any,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow={overflow!r} is not known; choose from {', '.join(map(repr, OVERFLOWS))}.")
        self.model, self.processor = model, processor
        self.overflow, self.allow_urls, self.generation = overflow, allow_urls, generation
        self.context_length = context_length or model.config.text_config.max_position_embeddings
        self.messages: list[dict[str, Any]] = []
        self.last_round = Round()
        self._memory: Memory | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dsvl-chat")
        self._answering = False
        self._told_of_window = False

    # -- a round -------------------------------------------------------------------------------------------------------

    def ask(self, text: str, images: Sequence[Any] | Any = (), **generation: Any) -> str:
        """The whole answer; see `stream`."""
        return "".join(self.stream(text, images, **generation))

    def stream(self, text: str, images: Sequence[Any] | Any = (), **generation: Any) -> Generator[str, None, None]:
        """Ask, and give the answer in pieces of text as it is generated.

        Question and answer become messages when the answer ends. Closing the iterator, or an interruption, stops the model:
        what was given until then is the answer, and if that is nothing, the question is taken back. An error leaves the
        conversation as it was.

        Args:
            text: the question.
            images: images that belong to it, which stand before it, as `read_image` takes them; addresses if `allow_urls`.
            generation: as for the constructor, for this round.

        Raises:
            ValueError: if an image cannot be had, or the context would overflow.
            RuntimeError: while another answer is being given.
        """
        if self._answering:
            raise RuntimeError("An answer is still being given; read it to its end, or close() its iterator.")
        self._answering = True
        try:
            yield from self._round(text, images, self.generation | generation)
        finally:
            self._answering = False

    def _round(self, text: str, images: Sequence[Any] | Any, options: dict[str, Any]) -> Iterator[str]:
        started = time.perf_counter()
        static = self._take_cache_choice(options)
        images = images if isinstance(images, (list, tuple)) else [images]
        parts = [{"type": "image", "image": self._own(image)} for image in images]
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        self._settle_images()
        messages, ids, dropped = self._fit([*self.messages, question], options["max_new_tokens"])
        all_images = _images(messages)
        memory = self._recall(ids, all_images, static)
        inputs = self._inputs(ids, all_images[len(memory.images) :], memory)
        cost = Round(len(ids), len(memory.ids), len(all_images) - len(memory.images), dropped)

        answer = Answer(self.model, self._worker, inputs | options | {"cache_implementation": None})
        said = ""
        finished = False
        try:
            for piece in pieces_of_text(self.processor.tokenizer, self._timed(answer, cost, started)):
                said += piece
                yield piece
            finished = True
        finally:
            self._remember(answer, memory, all_images)
            if said or finished:
                self.messages[:] = [*messages, {"role": "assistant", "content": said}]
            self.last_round = cost

    def _timed(self, tokens: Answer, cost: Round, started: float) -> Iterator[int]:
        for token in tokens:
            cost.answer_ids.append(token)
            cost.seconds = time.perf_counter() - started
            if len(cost.answer_ids) == 1:
                cost.first_token_seconds = cost.seconds
            yield token

    def _take_cache_choice(self, options: dict[str, Any]) -> bool:
        """Fill in the options' defaults; returns whether the cache is static."""
        ours = self.model.generation_config
        if (options.get("num_beams") or ours.num_beams or 1) > 1 or (options.get("num_return_sequences") or 1) > 1:
            raise ValueError("A conversation follows one answer: pass num_beams=1 and num_return_sequences=1.")
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = ours.max_new_tokens or min(MAX_NEW_TOKENS, self.context_length // 4)
        kind = options.pop("cache_implementation", None) or ours.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r} cannot go on from earlier rounds; choose 'dynamic' or 'static'."
            )
        return kind == "static"

    # -- images ------------------------------------------------------------------------------------------------------

    def _own(self, source: Any) -> Image.Image:
        """An image that is the conversation's own."""
        image = open_image(source, self.allow_urls).copy()
        image.readonly = 1  # who draws on it gives it new pixels (see `SeenImage`)
        return image

    def _settle_images(self) -> None:
        """Open what edited messages name by path, address or bytes, once."""
        for message in self.messages:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image" and not _is_settled(part.get("image")):
                    image = self._own(_source(part))
                    part.clear()
                    part.update(type="image", image=image)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _fit(self, messages: list[dict[str, Any]], max_new_tokens: int) -> tuple[list[dict[str, Any]], list[int], int]:
        """The messages that the context has room for, their tokens, and how many rounds were dropped."""
        dropped, ids = 0, prompt_ids(self.processor, messages)
        while len(ids) + max_new_tokens > self.context_length:
            rest = _without_oldest_round(messages)
            if self.overflow == "error" or rest is None:
                longer = ", delete messages, call reset(), or choose overflow='drop'" if rest is not None else ""
                raise ValueError(
                    f"The context holds {self.context_length} tokens, but {len(ids)} tokens of "
                    f"{'conversation' if rest is not None else 'the last question alone'} and {max_new_tokens} for the "
                    f"answer are needed; pass a smaller max_new_tokens or fewer images{longer}."
                )
            messages, dropped = rest, dropped + 1
            ids = prompt_ids(self.processor, messages)
        if dropped:
            logger.warning(
                "The context of %d tokens is full: the oldest %s dropped, and the rest is read again.",
                self.context_length,
                "round is" if dropped == 1 else f"{dropped} rounds are",
            )
        return messages, ids, dropped

    def _inputs(self, ids: list[int], new_images: list[Image.Image], memory: Memory) -> dict[str, Any]:
        device = self.model.device
        input_ids = torch.tensor([ids], device=device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
            "past_key_values": memory.cache,
            "use_cache": True,
        }
        if new_images:
            pixels = self.processor(images=new_images, return_tensors="pt")["pixel_values"]
            inputs["pixel_values"] = pixels.to(device)
        return inputs

    # -- memory --------------------------------------------------------------------------------------------------------

    def _recall(self, ids: list[int], images: list[Image.Image], static: bool) -> Memory:
        """The memory of what these tokens and images begin with. Until the round ends well, the conversation has none."""
        memory, self._memory = self._memory, None
        image, per_image = self.processor.image_token_id, self.processor.image_seq_length
        if memory is not None and memory.static == static and memory.length == self.context_length:
            exact = reuse_is_exact(self.model.config)
            common = memory.common_prefix(ids, images, image, per_image) if exact else 0
            if memory.crop(common, image, per_image):
                return memory
            if not self._told_of_window:
                self._told_of_window = True
                logger.warning(
                    "This decoder's cache has forgotten what left its window, so it cannot be taken back to where the "
                    "conversation was changed, or an answer reads other than it was said; such rounds are computed afresh."
                )
        return Memory(new_cache(self.model, static, self.context_length), static, self.context_length)

    def _remember(self, answer: Answer, memory: Memory, images: list[Image.Image]) -> None:
        """Take over what an answer left in the cache. If it failed, nothing is remembered."""
        ids = answer.stop()
        memory.ids = ids[: int(memory.cache.get_seq_length())]  # the last token was said, but not read
        memory.images += [SeenImage(image) for image in images[len(memory.images) :]]
        self._memory = memory

    def reset(self) -> None:
        """Begin anew: no messages, nothing remembered."""
        self.messages.clear()
        self._memory = None

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the conversation into a directory: `conversation.jsonl`, which is also a sample of training data, and its
        images as PNG files beside it.

        Raises:
            ValueError: if the directory holds anything else.
        """
        self._settle_images()
        save_messages(self.messages, Path(path))

    def load(self, path: str | Path) -> None:
        """Go on with a conversation that was saved. Nothing outside of the directory is opened.

        Raises:
            ValueError: if it holds no conversation.
        """
        self.messages[:] = load_messages(Path(path))


def _is_settled(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB" and bool(image.readonly)


def _source(part: dict[str, Any]) -> Any:
    """What a part of an edited message names its image by."""
    named = [key for key in SOURCES if part.get(key) is not None]
    if len(named) != 1:
        raise ValueError(
            f"An image part names its image by one of {', '.join(SOURCES)}; got {sorted(set(part) - {'type'})}."
        )
    source = part[named[0]]
    return base64.b64decode(source.rpartition(",")[2], validate=True) if named == ["base64"] else source


def _images(messages: list[dict[str, Any]]) -> list[Image.Image]:
    contents = [message["content"] for message in messages if isinstance(message["content"], list)]
    return [part["image"] for content in contents for part in content if part["type"] == "image"]


def _without_oldest_round(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages without the first question and its answer; None if only the last question is left."""
    begin = 1 if messages[0]["role"] == "system" else 0
    questions = [place for place in range(begin + 1, len(messages)) if messages[place]["role"] == "user"]
    return messages[:begin] + messages[questions[0] :] if questions else None

"""`DSVLChat`: multi-turn chat that reuses the KV cache of earlier turns."""

import base64
import logging
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..acceleration.reuse.image_cache import reuse_is_exact
from ..acceleration.reuse.text_prefill import can_extend
from ..composition.chat_template import check_template_variables
from ..data.messages import SOURCES, frame_keys
from ..generation_dsvl import IMAGE_INPUTS
from ..image_layouts_dsvl import FRAME
from ..utils.image_loading import open_image
from ..utils.video_loading import open_video, with_frames
from ..video_reading_dsvl import Video, is_video
from .detokenizer import stream_text
from .prompt_cache import CachedImage, PromptCache, new_cache
from .prompts import Prompt, count_positions, read_prompt
from .saved_conversation import load_messages, save_messages
from .streaming import TokenStream

logger = logging.getLogger(__name__)

OVERFLOWS = ("error", "drop")
MAX_NEW_TOKENS = 512  # default where neither the caller nor the checkpoint sets it; at most a quarter of the context


@dataclass
class TurnStats:
    """Counts and times of one turn. Times are in seconds since the call.

    Attributes:
        prompt_tokens: tokens of the conversation up to the answer.
        reused_tokens: prompt tokens that were in the KV cache.
        encoded_images: images that went through the vision tower. With `model.image_library`, others may be new, too.
        encoded_tiles: their tiles, each an input of the tower; as many as images unless `image_layout` is "tiles".
        dropped_turns: oldest turns that were dropped because the context was full.
        answer_ids: the generated tokens, the end-of-text token included.
        first_token_seconds: time to the first token.
        seconds: time to the last token.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    encoded_images: int = 0
    encoded_tiles: int = 0
    dropped_turns: int = 0
    answer_ids: list[int] = field(default_factory=list)
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed after the first token."""
        later = len(self.answer_ids) - 1
        return later / (self.seconds - self.first_token_seconds) if later > 0 else 0.0

    @property
    def dropped_rounds(self) -> int:
        """Deprecated: use `dropped_turns`."""
        warnings.warn("dropped_rounds is deprecated; use dropped_turns.", DeprecationWarning, stacklevel=2)
        return self.dropped_turns


class DSVLChat:
    """A conversation with a model. Each turn computes only its new tokens and images.

    The answers equal those of the whole conversation computed from scratch, up to the rounding errors of the model's dtype.
    Before each turn, the tokens and images in the KV cache are compared with `messages`, and the common prefix is reused.
    So `messages` may be edited between turns. Call `reset()` if the model itself has changed.

    Only one answer is generated at a time. Several `DSVLChat` objects may share a model, but must not run it concurrently.

    Args:
        model: a `DSVLForConditionalGeneration` in evaluation mode.
        processor: its `DSVLProcessor`.
        overflow (*optional*, defaults to `"error"`): what to do when the prompt and `max_new_tokens` exceed
            `context_length`: `"error"` raises, `"drop"` drops the oldest turns and logs a warning.
        context_length (*optional*, defaults to the decoder's `max_position_embeddings`): in tokens; where the tokens of an
            image share a position (`image_positions="image"`), in positions. A static cache allocates memory for as many
            tokens, so with it the length is in tokens always.
        allow_urls (*optional*, defaults to `False`): whether images may be http(s) URLs (see `fetch_url`).
        chat_template_kwargs (*optional*): variables of the chat template, such as `{"enable_thinking": False}`.
        generation: arguments of `generate()` for all turns, such as `max_new_tokens` (defaults to the checkpoint's setting,
            else the smaller of 512 and a quarter of the context), `do_sample`, `temperature`, or
            `cache_implementation="static"`.

    Attributes:
        messages: the conversation as the chat template takes it. May be edited between turns.
        last_turn: `TurnStats` of the last turn.
        prompt_cache: the `PromptCache` of the conversation; None before the first turn, and during a turn.

    Raises:
        ValueError: for an unknown `overflow`, or variables that the chat template does not have.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        overflow: str = "error",
        context_length: int | None = None,
        allow_urls: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
        **generation: Any,
    ) -> None:
        if overflow not in OVERFLOWS:
            raise ValueError(f"overflow={overflow!r} is not known; choose from {', '.join(map(repr, OVERFLOWS))}.")
        self.model, self.processor = model, processor
        self.overflow, self.allow_urls, self.generation = overflow, allow_urls, generation
        self.context_length = context_length or model.config.text_config.max_position_embeddings
        self.chat_template_kwargs = check_template_variables(processor.chat_template, chat_template_kwargs or {})
        self.messages: list[dict[str, Any]] = []
        self.last_turn = TurnStats()
        self.prompt_cache: PromptCache | None = None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="dsvl-chat")
        self._answering = False
        self._warned_of_window = False

    @property
    def last_round(self) -> TurnStats:
        """Deprecated: use `last_turn`."""
        warnings.warn("last_round is deprecated; use last_turn.", DeprecationWarning, stacklevel=2)
        return self.last_turn

    # -- a turn --------------------------------------------------------------------------------------------------------

    def ask(self, text: str, images: Sequence[Any] | Any = (), videos: Sequence[Any] | Any = (), **generation: Any) -> str:
        """Ask a question and return the whole answer. The arguments are those of `stream`."""
        return "".join(self.stream(text, images, videos, **generation))

    def stream(
        self, text: str, images: Sequence[Any] | Any = (), videos: Sequence[Any] | Any = (), **generation: Any
    ) -> Generator[str, None, None]:
        """Ask a question and yield the answer in pieces of text as it is generated.

        Question and answer are appended to `messages` when the answer ends. Closing the iterator, or an interruption, stops
        the model: the text yielded so far becomes the answer, and a question without any text is removed again. An error
        leaves the conversation unchanged.

        Args:
            text: the question.
            images (*optional*): one image or several, placed before the question; whatever `read_image` takes, and URLs if
                `allow_urls`.
            videos (*optional*): one video or several, placed behind the images; whatever `read_video` takes, or a `Video`.
                Their frames become part of `messages`, as images with a time.
            generation: arguments of `generate()` for this turn only.

        Raises:
            ValueError: if an image or a video cannot be opened, or the context would overflow.
            RuntimeError: if another answer has not ended yet.
        """
        if self._answering:
            raise RuntimeError("An answer is still being given; read it to its end, or close() its iterator.")
        self._answering = True
        try:
            yield from self._turn(text, images, videos, self.generation | generation)
        finally:
            self._answering = False

    def _turn(
        self, text: str, images: Sequence[Any] | Any, videos: Sequence[Any] | Any, options: dict[str, Any]
    ) -> Iterator[str]:
        started = time.perf_counter()
        static = self._complete_options(options)
        images = images if isinstance(images, (list, tuple)) else [images]
        parts = [{"type": "image", "image": self._private_copy(image)} for image in images]
        for video in videos if isinstance(videos, (list, tuple)) else [videos]:
            parts += self._frames(video)
        question = {"role": "user", "content": [*parts, {"type": "text", "text": text}] if parts else text}
        self._open_images()
        messages, prompt, dropped = self._fit_context([*self.messages, question], options["max_new_tokens"], static)
        all_images = _images(messages)
        cache = self._take_cache(prompt, all_images, static)
        if self._reads_again(cache, prompt, len(all_images)):
            cache = PromptCache(new_cache(self.model, static, self.context_length), static, self.context_length)
        held = len(cache.images)
        inputs = self._model_inputs(prompt.ids, all_images, held, cache)
        tiles = sum(map(len, prompt.tile_lengths[held:]))
        stats = TurnStats(len(prompt.ids), len(cache.ids), len(all_images) - held, tiles, dropped)

        tokens = TokenStream(self.model, self._worker, inputs | options | {"cache_implementation": None})
        answer = ""
        finished = False
        try:
            for piece in stream_text(self.processor.tokenizer, self._timed(tokens, stats, started)):
                answer += piece
                yield piece
            finished = True
        finally:
            self._keep_cache(tokens, cache, all_images)
            self._count_encoded(stats, prompt.tile_lengths[held:])
            if answer or finished:
                self.messages[:] = [*messages, {"role": "assistant", "content": answer}]
            self.last_turn = stats

    def _timed(self, tokens: TokenStream, stats: TurnStats, started: float) -> Iterator[int]:
        for token in tokens:
            stats.answer_ids.append(token)
            stats.seconds = time.perf_counter() - started
            if len(stats.answer_ids) == 1:
                stats.first_token_seconds = stats.seconds
            yield token

    def _complete_options(self, options: dict[str, Any]) -> bool:
        """Check the generation options and fill in defaults, in place; returns whether the cache is static."""
        defaults = self.model.generation_config
        if (options.get("num_beams") or defaults.num_beams or 1) > 1 or (options.get("num_return_sequences") or 1) > 1:
            raise ValueError("A conversation follows one answer: pass num_beams=1 and num_return_sequences=1.")
        if options.get("max_new_tokens") is None:
            options["max_new_tokens"] = defaults.max_new_tokens or min(MAX_NEW_TOKENS, self.context_length // 4)
        kind = options.pop("cache_implementation", None) or defaults.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(f"cache_implementation={kind!r} cannot be reused by later turns; choose 'dynamic' or 'static'.")
        return kind == "static"

    # -- images --------------------------------------------------------------------------------------------------------

    def _private_copy(self, source: Any) -> Image.Image:
        image = open_image(source, self.allow_urls).copy()
        image.readonly = 1  # drawing on it allocates new pixels (see `CachedImage`)
        return image

    def _frames(self, source: Any) -> list[dict[str, Any]]:
        """The frames of a video as parts of a message."""
        sampling = self.processor.video_sampling
        video = source if isinstance(source, Video) else open_video(source, sampling, self.allow_urls)
        return [part | {"image": self._private_copy(part["image"])} for part in video.parts()]

    def _open_images(self) -> None:
        """Open, once, the images and videos that edited messages name by path, URL or bytes."""
        sampling = self.processor.video_sampling
        for message in self.messages:
            if isinstance(message["content"], list) and any(map(is_video, message["content"])):
                message["content"] = with_frames([message], sampling, self.allow_urls)[0]["content"]
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part["type"] == "image" and not _is_private_copy(part.get("image")):
                    image = self._private_copy(_image_source(part))
                    of_video = frame_keys(part)
                    if of_video:
                        image.info[FRAME] = True
                    part.clear()
                    part.update(type="image", image=image, **of_video)

    # -- tokens --------------------------------------------------------------------------------------------------------

    def _fit_context(
        self, messages: list[dict[str, Any]], max_new_tokens: int, static: bool
    ) -> tuple[list[dict[str, Any]], Prompt, int]:
        """The messages that fit into the context, their prompt, and the number of dropped turns."""
        dropped, prompt = 0, read_prompt(self.processor, messages, **self.chat_template_kwargs)
        unit = "tokens" if static or self.model.config.image_positions == "token" else "positions"
        while (
            taken := len(prompt.ids) if unit == "tokens" else count_positions(self.model.config, prompt)
        ) + max_new_tokens > self.context_length:
            shorter = _without_oldest_turn(messages)
            if self.overflow == "error" or shorter is None:
                more = ", delete messages, call reset(), or choose overflow='drop'" if shorter is not None else ""
                raise ValueError(
                    f"The context holds {self.context_length} {unit}, but {taken} {unit} of "
                    f"{'conversation' if shorter is not None else 'the last question alone'} and {max_new_tokens} for the "
                    f"answer are needed; pass a smaller max_new_tokens or fewer images or frames{more}."
                )
            messages, dropped = shorter, dropped + 1
            prompt = read_prompt(self.processor, messages, **self.chat_template_kwargs)
        if dropped:
            logger.warning(
                "The context of %d %s is full: dropped the oldest %s; the remaining conversation is computed again.",
                self.context_length,
                unit,
                "turn" if dropped == 1 else f"{dropped} turns",
            )
        return messages, prompt, dropped

    def _model_inputs(self, ids: list[int], all_images: list[Image.Image], held: int, cache: PromptCache) -> dict[str, Any]:
        """The arguments of `generate`; the first `held` images are in the KV cache."""
        device = self.model.device
        input_ids = torch.tensor([ids], device=device)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "mm_token_type_ids": (input_ids == self.processor.image_token_id).long(),
            "past_key_values": cache.cache,
            "use_cache": True,
        }
        if new_images := all_images[held:]:
            images = self.processor(images=new_images, return_tensors="pt")
            if getattr(self.model.config, "numbered_images", 0):  # older code in a checkpoint has none
                inputs["image_numbers"] = torch.arange(held, len(all_images)) + 1
            inputs |= {name: images[name].to(device) for name in (*IMAGE_INPUTS, "num_tiles") if name in images}
        return inputs

    # -- KV cache ------------------------------------------------------------------------------------------------------

    def _take_cache(self, prompt: Prompt, images: list[Image.Image], static: bool) -> PromptCache:
        """The cache cropped to the prefix it shares with the prompt, or a new one.

        `self.prompt_cache` is None until the turn has succeeded, because an error leaves the cache in an unknown state.
        """
        cache, self.prompt_cache = self.prompt_cache, None
        if cache is not None and cache.static == static and cache.length == self.context_length:
            exact = reuse_is_exact(self.model.config)
            common = cache.common_prefix(prompt, images) if exact else 0
            if cache.crop(common, prompt):
                return cache
            if not self._warned_of_window:
                self._warned_of_window = True
                logger.warning(
                    "The cache of a decoder with a sliding window cannot be cropped, because it has dropped what left its "
                    "window. Where earlier messages have changed, or an answer is tokenized differently than it was "
                    "generated, the whole conversation is computed again."
                )
        return PromptCache(new_cache(self.model, static, self.context_length), static, self.context_length)

    def _reads_again(self, cache: PromptCache, prompt: Prompt, images: int) -> bool:
        """Whether to compute the text of the whole conversation again, over the images of the library: where it has images
        to add that cannot follow what the cache holds, and the library takes all of them."""
        library = getattr(self.model, "image_library", None)  # older code in a checkpoint has none
        return (
            library is not None
            and library.features_because is None
            and len(cache.ids) > 0
            and len(cache.images) < images
            and not can_extend(cache.cache)
            and library.takes(self.model, prompt.ids, prompt.tile_lengths)
        )

    def _count_encoded(self, stats: TurnStats, tile_lengths: list[list[int]]) -> None:
        """Correct the counts of a turn with new images by what the library had."""
        library = getattr(self.model, "image_library", None)
        if library is not None and tile_lengths:
            encoded = iter(library.last_encoded)
            images = [[next(encoded) for _ in tiles] for tiles in tile_lengths]
            stats.encoded_images, stats.encoded_tiles = sum(map(any, images)), sum(map(sum, images))

    def _keep_cache(self, tokens: TokenStream, cache: PromptCache, images: list[Image.Image]) -> None:
        """Record what the cache holds after an answer, and keep it for the next turn; raises what generation raised."""
        ids = tokens.stop()
        cache.ids = ids[: int(cache.cache.get_seq_length())]  # the last generated token was not run through the model
        cache.images += [CachedImage(image) for image in images[len(cache.images) :]]
        self.prompt_cache = cache

    def reset(self) -> None:
        """Start a new conversation: delete all messages and the KV cache."""
        self.messages.clear()
        self.prompt_cache = None

    # -- files ---------------------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the conversation into a directory: `conversation.jsonl`, which is also a training sample, and PNG files.

        Raises:
            ValueError: if the directory holds other files.
        """
        self._open_images()
        save_messages(self.messages, Path(path))

    def load(self, path: str | Path) -> None:
        """Continue a saved conversation. Nothing outside the directory is opened.

        Raises:
            ValueError: if the directory holds no conversation.
        """
        self.messages[:] = load_messages(Path(path))


def _is_private_copy(image: Any) -> bool:
    return isinstance(image, Image.Image) and image.mode == "RGB" and bool(image.readonly)


def _image_source(part: dict[str, Any]) -> Any:
    """The source that an image part of an edited message names."""
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


def _without_oldest_turn(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages without the first question and its answer; None if there is only one question."""
    begin = 1 if messages[0]["role"] == "system" else 0
    questions = [index for index in range(begin + 1, len(messages)) if messages[index]["role"] == "user"]
    return messages[:begin] + messages[questions[0] :] if questions else None

"""The inference engine of `dsvl serve`: one thread that generates answers in batches."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..chat.detokenizer import Detokenizer
from ..generation_dsvl import IMAGE_INPUTS, NoImageToken
from ..image_library import ImageLibrary, LibraryImage
from ..transformers_dsvl import CACHE
from ..utils.byte_sizes import available_memory
from ..utils.transformers_names import BaseGenerateManager, _StreamError
from .kept_rows import KeptRow, can_take, join_rows, take_rows
from .prompt_beginning import PromptBeginning
from .stop_strings import StopStrings

logger = logging.getLogger(__name__)
FAILURE = "The answer could not be generated."  # sent to clients; the log has the reason
MIN_TEMPERATURE = 1e-4  # lower ones would overflow the scores, and are greedy anyway
LIBRARY_IMAGES = "library_images"  # the model input that holds the `LibraryImage`s of a request
PREFILL_BYTES = 2**31  # of images of a library, copied to the device for one prefill
KEPT_SHARE = 8  # paused requests keep KV caches in an eighth of the available memory
TOKEN_INPUTS = ("input_ids", "attention_mask", "mm_token_type_ids")
# Tokens are sampled by `_PerRequestSampling`.
GREEDY: dict[str, Any] = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


@dataclass
class Sampling:
    """Sampling parameters of one request.

    Args:
        max_new_tokens: maximum length of the answer. The engine sets it to None when the answer ends earlier, from which the
            handler of transformers derives the finish reason ("stop" or "length").
        temperature: 0, like every value below `MIN_TEMPERATURE`, decodes greedily.
        top_p: sample from the most likely tokens with this total probability.
        top_k: sample from this many most likely tokens; 0 is unlimited.
        seed: seed of the request's random generator; None is random.
        stop: strings that end the answer and are not part of it.
    """

    max_new_tokens: int | None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Generation:
    """A request in progress. The handler of transformers reads `queue` and `total_tokens`, and calls `cancel`.

    Args:
        inputs: its model inputs, with a batch size of 1; images as pixels, or under `LIBRARY_IMAGES`.
        sampling: its sampling parameters.
        tokenizer: the tokenizer.

    Attributes:
        token_ids: the generated tokens.
        images: its images in a library.
        kept: its KV cache while it is paused, if there is room: of all its tokens but the last.
        alone: whether it is generated in a batch of its own, after its batch failed.
        queue: receives pieces of text; None, or a `_StreamError`, at the end.
    """

    def __init__(self, inputs: dict[str, Any], sampling: Sampling, tokenizer: Any) -> None:
        self.images: list[LibraryImage] = inputs.pop(LIBRARY_IMAGES, [])
        self.inputs = inputs
        self.kept: KeptRow | None = None
        self.sampling = sampling
        self.limit = sampling.max_new_tokens or 1
        self.token_ids: list[int] = []
        self.cancelled = False
        self.done = False
        self.alone = False
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._detokenizer = Detokenizer(tokenizer)
        self._stop_strings = StopStrings(sampling.stop)
        self._generator: torch.Generator | None = None
        self._state: torch.Tensor | None = None  # of the generator, before a token that is not accepted yet
        self._warpers = LogitsProcessorList()
        if sampling.temperature >= MIN_TEMPERATURE:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def total_tokens(self) -> int:
        """The number of generated tokens."""
        return len(self.token_ids)

    @property
    def tokens(self) -> int:
        """The number of tokens of the prompt and the answer so far."""
        return self.inputs["input_ids"].shape[1] + len(self.token_ids)

    def inputs_so_far(self) -> dict[str, torch.Tensor]:
        """The model inputs of the prompt and the tokens generated so far."""
        ids = torch.tensor([self.token_ids], dtype=torch.long)
        extra = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.zeros_like(ids)}
        return self.inputs | {name: torch.cat([self.inputs[name], new], dim=1) for name, new in extra.items()}

    def cancel(self) -> None:
        """End the answer before its next token, because the client is gone."""
        self.cancelled = True

    def sample(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """Sample the next token with this request's generator.

        Args:
            input_ids: (1, tokens) so far.
            scores: (1, vocabulary) logits.

        Returns:
            The token, a scalar tensor; None for greedy decoding.
        """
        if not self._warpers:
            return None
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        probabilities = self._warpers(input_ids, scores).float().softmax(-1)
        self._state = self._generator.get_state()
        return torch.multinomial(probabilities, 1, generator=self._generator)[0, 0]

    def undo_sample(self) -> None:
        """Restore the generator's state before a token that was sampled and not accepted, because the batch failed."""
        if self._generator is not None and self._state is not None:
            self._generator.set_state(self._state)
        self._state = None

    def accept(self, token_id: int, end_of_text: set[int]) -> None:
        """Append a token: send its text, and finish the answer if it ends here."""
        self._state = None
        if self.cancelled:
            self.finish()
            return
        self.token_ids.append(token_id)
        last = token_id in end_of_text or len(self.token_ids) >= self.limit
        piece = self._detokenizer.feed(token_id)
        ready, stopped = self._stop_strings.feed(piece + self._detokenizer.flush() if last else piece)
        if last and not stopped:
            ready += self._stop_strings.held
        if ready:
            self._send(ready)
        if stopped or token_id in end_of_text:
            self.sampling.max_new_tokens = None
        if stopped or last:
            self.finish()

    def finish(self, failure: str | None = None) -> None:
        """End the answer, with an error message if it failed. Further calls have no effect."""
        if not self.done:
            self.done = True
            self.inputs, self.images, self.kept = {}, [], None  # frees the memory of the images
            self._send(None if failure is None else _StreamError(failure))

    def _send(self, item: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the event loop is closed
            self.cancelled = True


class _PerRequestSampling(LogitsProcessor):
    """Samples each row with its request's parameters, and masks all other tokens for the greedy step that follows."""

    def __init__(self, batch: list[Generation]) -> None:
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.argmax(-1)
        for row, one in enumerate(self.batch):
            if not one.done:
                token = one.sample(input_ids[row : row + 1], scores[row : row + 1])
                if token is not None:
                    chosen[row] = token
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _PerRequestStopping(StoppingCriteria):
    """Passes tokens to their requests, and stops the rows that are done, or all rows when the batch pauses."""

    def __init__(self, batch: list[Generation], end_of_text: set[int], should_pause: Callable[[int], bool]) -> None:
        self.batch = batch
        self.end_of_text = end_of_text
        self.should_pause = should_pause
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for one, token_id in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not one.done:
                one.accept(token_id, self.end_of_text)
        self.steps += 1
        pause = self.should_pause(self.steps)
        return torch.tensor([one.done or pause for one in self.batch], device=input_ids.device)


class Engine(BaseGenerateManager):
    """Answers requests in batches, in order of arrival.

    A batch takes the waiting requests, up to `max_batch`; each row ends on its own. While other requests are waiting, a
    batch pauses after `max_steps` tokens, and its requests go to the end of the queue, so that short answers do not wait
    for long ones. Paused requests keep their KV caches, as far as `kept_bytes` allow; the others prefill their prompt and
    the answer so far again. If a batch fails, all KV caches are dropped, and its requests are continued one by one.

    Args:
        model: a DSVL model in evaluation mode.
        processor: its processor.
        max_batch (*optional*, defaults to 16): requests per batch.
        max_steps (*optional*, defaults to 64): tokens of a batch while others wait. More tokens need less work in total,
            fewer shorten the waiting time.
        library (*optional*): the library of the requests' images (`LIBRARY_IMAGES`).
        kept_bytes (*optional*): the memory for KV caches of paused requests; an eighth of what is available by default.

    Attributes:
        batches: the number of batches started.
        active: the requests that have not been released, by request id.
        waiting: the requests that wait for a batch, in order.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        max_batch: int = 16,
        max_steps: int = 64,
        library: ImageLibrary | None = None,
        kept_bytes: int | None = None,
    ) -> None:
        self.model, self.library = model, library
        self.kept_bytes = available_memory(model.device) // KEPT_SHARE if kept_bytes is None else kept_bytes
        self.tokenizer = processor.tokenizer
        self.max_batch = max_batch
        self.max_steps = max_steps
        self.batches = 0
        self.waiting: list[Generation] = []
        self.active: dict[str, Generation] = {}
        self._condition = threading.Condition()
        self._stopped = False
        ends = model.generation_config.eos_token_id
        self._end_of_text = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._beginning = PromptBeginning(model, processor)
        self._thread = threading.Thread(target=self._run, name="dsvl-serve-engine", daemon=True)
        self._thread.start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple["asyncio.Queue[Any]", Any]:
        """Queue a request (see `BaseGenerateManager`). `inputs` have a batch size of 1; `gen_config` is a `Sampling`."""
        one = Generation(dict(inputs), gen_config, self.tokenizer)
        with self._condition:
            if self._stopped:
                raise RuntimeError("The engine has stopped; start the server again.")
            self.active[request_id] = one
            self.waiting.append(one)
            self._condition.notify()
        return one.queue, one

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """Queue a request and wait for its whole answer (see `BaseGenerateManager`)."""
        length = inputs["input_ids"].shape[-1]
        queue, one = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            pieces.append(item)
        return "".join(pieces), length, one.token_ids

    def release(self, request_id: str) -> None:
        """Remove a request, and cancel it if it is not done."""
        with self._condition:
            one = self.active.pop(request_id, None)
            if one is not None:
                one.cancel()
                if one in self.waiting:  # others end with their batch
                    self.waiting.remove(one)
                    one.finish()

    @property
    def running(self) -> int:
        """The number of requests that are waiting or in a batch."""
        with self._condition:
            return sum(not one.done for one in self.active.values())

    def stop(self) -> None:
        """Cancel all requests and end the thread."""
        with self._condition:
            self._stopped = True
            for one in self.active.values():
                one.cancel()
            self._condition.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self.waiting or self._stopped)
                if self._stopped:
                    for one in self.waiting:
                        one.finish(FAILURE)
                    return
                batch = self._next()
            self._answer(batch)
            del batch  # frees its memory while the thread waits

    def _next(self) -> list[Generation]:
        """Take the next batch from the waiting requests."""
        first = self.waiting[0]
        batch = [first] if first.alone else [one for one in self.waiting if not one.alone][: self.max_batch]
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch

    def _answer(self, batch: list[Generation]) -> None:
        self.batches += 1
        failed = False
        try:
            self._generate(batch)
        except Exception:  # keep the server running; the clients get an error
            logger.exception("A batch of %d requests failed", len(batch))
            failed = True
        # Not in the handler above, where the traceback would keep the memory of the failed batch alive.
        if failed:
            for one in batch:
                one.undo_sample()
            if self.library is not None:
                self.library.tiers.free_device()
        with self._condition:
            for one in [*batch, *self.waiting] if failed else ():
                one.kept = None  # it may have been a lack of memory
            for one in batch:
                # Out of memory, or one request caused the failure: continue each of them alone.
                one.alone = one.alone or failed
                if one.cancelled or (failed and len(batch) == 1):
                    one.finish(None if one.cancelled else FAILURE)
                elif not one.done:
                    self.waiting.append(one)

    def _generate(self, batch: list[Generation]) -> None:
        resumed = [one for one in batch if one.kept is not None]
        groups = self._prefill_groups([one for one in batch if one.kept is None])
        if len(groups) == 1 and not resumed:
            self._run_batch(batch, *self._new_cache(batch))
        elif not self._keeps_rows:
            for group in groups:
                self._run_batch(group, None)
        else:
            for group in groups:
                self._prefill(group)
            rows = [one.kept for one in batch if one.kept is not None]
            for one in batch:
                one.kept = None
            self._run_batch(batch, join_rows(rows, self.model.config.text_config))

    def _prefill_groups(self, batch: list[Generation]) -> list[list[Generation]]:
        """The requests that one prefill can take: with images of the library in up to `PREFILL_BYTES`, or with pixels; all
        with the common beginning of prompts, or none."""
        pixels = [one for one in batch if "pixel_values" in one.inputs]
        others = [one for one in batch if "pixel_values" not in one.inputs]
        begin = [one for one in others if self._takes_beginning(one)]
        groups = [self._library_groups(part) for part in (begin, [one for one in others if one not in begin])]
        return [group for group in (*groups[0], *groups[1], pixels) if group]

    def _library_groups(self, batch: list[Generation]) -> list[list[Generation]]:
        """The requests without pixels that one prefill can take."""
        library = [one for one in batch if one.images]
        groups: list[list[Generation]] = [[]]
        size = 0
        for one in library:
            assert self.library is not None
            own = sum(sum(image.lengths) for image in one.images) * self.library.token_bytes(self.model)
            if groups[-1] and size + own > PREFILL_BYTES:
                groups, size = [*groups, []], 0
            groups[-1].append(one)
            size += own
        groups[-1] += [one for one in batch if not one.images]
        return groups

    @property
    def _keeps_rows(self) -> bool:
        """Whether KV caches are of a kind whose rows can be taken out, and not of another that the checkpoint asks for."""
        return self.model.generation_config.cache_implementation in (None, "dynamic")

    def _takes_beginning(self, one: Generation) -> bool:
        """Whether the prompt of a request goes on from the KV cache of the common beginning. Beside new images, that would
        save little."""
        return self._keeps_rows and "pixel_values" not in one.inputs and self._beginning.begins(one.inputs["input_ids"])

    def _new_cache(self, batch: list[Generation]) -> tuple[DynamicCache | None, int]:
        """A KV cache for requests, of the same beginning or of none, and how many tokens it holds; None for a cache that the
        checkpoint asks for."""
        if not self._keeps_rows:
            return None, 0
        if self._takes_beginning(batch[0]):
            return self._beginning.cache(len(batch)), len(self._beginning.ids)
        return DynamicCache(config=self.model.config.text_config), 0

    def _prefill(self, batch: list[Generation]) -> None:
        """Give requests their KV cache: of all tokens but the last, which the batch that they join computes."""
        cache, beginning = self._new_cache(batch)
        assert cache is not None
        inputs = self._inputs(batch, beginning)
        inputs |= {name: inputs[name][:, :-1] for name in TOKEN_INPUTS}
        self.model.generate(**inputs, **{CACHE: cache}, **GREEDY, max_new_tokens=1)
        rows = take_rows(cache, {row: one.tokens - 1 for row, one in enumerate(batch)}, beginning)
        for one, kept in zip(batch, rows, strict=True):
            one.kept = kept

    def _inputs(self, batch: list[Generation], beginning: int, with_images: bool = True) -> dict[str, Any]:
        """The model inputs of requests, on the device; padded after so many tokens."""
        rows = [one.inputs_so_far() for one in batch]
        if not with_images:
            rows = [{name: row[name] for name in TOKEN_INPUTS} for row in rows]
        inputs = collate(rows, self.tokenizer.pad_token_id, beginning)
        moved: dict[str, Any] = {name: tensor.to(self.model.device) for name, tensor in inputs.items()}
        images = [image for one in batch for image in one.images] if with_images else []
        if images:
            assert self.library is not None
            moved |= self.library.generation_inputs(self.model, images)
        return moved

    def _run_batch(self, batch: list[Generation], cache: DynamicCache | None, beginning: int = 0) -> None:
        """Generate until all answers end, or the batch pauses.

        Args:
            cache: of the first `beginning` tokens, or of all tokens of the batch but the last; None if there are no KV
                caches to keep.
            beginning: how many tokens stand before the padding.
        """
        held = 0 if cache is None else int(cache.get_seq_length())
        ends = _PerRequestStopping(batch, self._end_of_text, lambda steps: steps >= self.max_steps and bool(self.waiting))
        options: dict[str, Any] = {} if cache is None else {CACHE: cache, "cache_implementation": None}
        ids = self.model.generate(
            **self._inputs(batch, beginning, with_images=held == beginning),
            **options,
            **GREEDY,
            logits_processor=LogitsProcessorList(
                [NoImageToken(self.model.config.image_token_id), _PerRequestSampling(batch)]
            ),
            stopping_criteria=StoppingCriteriaList([ends]),
            max_new_tokens=max(one.limit - one.total_tokens for one in batch),
        )
        paused = {row: one for row, one in enumerate(batch) if not one.done and not one.cancelled}
        if paused and cache is not None and can_take(cache) and int(cache.get_seq_length()) == ids.shape[1] - 1:
            self._keep(cache, paused, beginning)

    def _keep(self, cache: DynamicCache, paused: dict[int, Generation], beginning: int) -> None:
        """Keep the KV caches of paused requests, as far as there is room."""
        with self._condition:
            kept = sum(one.kept.nbytes for one in self.waiting if one.kept is not None)
        token_bytes = sum(layer.keys[0, :, 0].nbytes + layer.values[0, :, 0].nbytes for layer in cache.layers)
        chosen: dict[int, int] = {}
        for row, one in paused.items():
            kept += one.tokens * token_bytes
            if kept > self.kept_bytes:
                break
            chosen[row] = one.tokens - 1
        for row, own in zip(chosen, take_rows(cache, chosen, beginning), strict=True):
            paused[row].kept = own


def collate(rows: list[dict[str, torch.Tensor]], pad_token_id: int, beginning: int = 0) -> dict[str, torch.Tensor]:
    """Join model inputs with a batch size of 1 into a batch, padded on the left, or after the first `beginning` tokens.

    Args:
        rows: `input_ids`, `attention_mask` and `mm_token_type_ids` of shape (1, tokens), int64, and, for rows with images,
            what the processor made of them: `pixel_values`, and `num_tiles`, `pixel_attention_mask` and `spatial_shapes`
            where it makes them.
        pad_token_id: the padding of `input_ids`.
    """
    longest = max(row["input_ids"].shape[1] for row in rows)
    padding = dict.fromkeys(TOKEN_INPUTS, 0) | {"input_ids": pad_token_id}
    joined = {
        name: torch.cat([_padded(row[name], longest, value, beginning) for row in rows]) for name, value in padding.items()
    }
    return joined | join_images(rows)


def _padded(tokens: torch.Tensor, length: int, value: int, beginning: int) -> torch.Tensor:
    """Tokens (1, tokens) of this length, with padding after the first `beginning`."""
    padding = tokens.new_full((1, length - tokens.shape[1]), value)
    return torch.cat([tokens[:, :beginning], padding, tokens[:, beginning:]], dim=1)


def join_images(images: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The model inputs of several images as one, empty if none has any; see `collate`."""
    names = [name for name in (*IMAGE_INPUTS, "num_tiles") if any(name in one for one in images)]
    return {name: torch.cat([one[name] for one in images if name in one]) for name in names}

"""Requests in, texts out: those that wait are answered together, in batches, on one thread."""

import asyncio
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ..chat.detokenizer import Detokenizer
from ..generation_dsvl import NoImageToken
from ..utils.transformers_names import BaseGenerateManager, _StreamError
from .stops import StopTexts

logger = logging.getLogger(__name__)
FAILURE = "The answer could not be generated."  # all that a client learns; the log has the rest
COLDEST = 1e-4  # a lower temperature would overflow scores, and leaves but the likeliest token


@dataclass
class Sampling:
    """How one request is answered.

    Args:
        max_new_tokens: at most so many; set to None by the engine for an answer that ended before, by itself (from this
            transformers' handler tells "stop" from "length").
        temperature: 0 is greedy, and so is one below `COLDEST`.
        top_p: share of the probability to sample from.
        top_k: sample from so many tokens; 0 is no limit.
        seed: of the answer's own generator; None draws one.
        stop: texts that end the answer, and are not part of it.
    """

    max_new_tokens: int | None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


class Generation:
    """One request on its way: what transformers' handler reads from (`queue`, `total_tokens`, `cancel`)."""

    def __init__(self, inputs: dict[str, Any], sampling: Sampling, tokenizer: Any) -> None:
        self.inputs = inputs
        self.sampling = sampling
        self.limit = sampling.max_new_tokens or 1
        self.token_ids: list[int] = []
        self.cancelled = False
        self.done = False
        self.alone = False  # after a batch that failed
        self.queue: asyncio.Queue[Any] = asyncio.Queue()  # pieces of text; None at the end, or a _StreamError
        self._loop = asyncio.get_running_loop()
        self._pieces = Detokenizer(tokenizer)
        self._stop = StopTexts(sampling.stop)
        self._generator: torch.Generator | None = None
        self._before: torch.Tensor | None = None  # the generator's state, before a token that was not taken yet
        self._warpers = LogitsProcessorList()
        if sampling.temperature >= COLDEST:
            self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_k > 0:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    @property
    def total_tokens(self) -> int:
        return len(self.token_ids)

    def inputs_so_far(self) -> dict[str, torch.Tensor]:
        """The model inputs of the prompt and the answer's tokens."""
        said = torch.tensor([self.token_ids], dtype=torch.long)
        kinds = {"input_ids": said, "attention_mask": torch.ones_like(said), "mm_token_type_ids": torch.zeros_like(said)}
        return self.inputs | {name: torch.cat([self.inputs[name], new], dim=1) for name, new in kinds.items()}

    def cancel(self) -> None:
        """Nobody waits for the answer any more: it ends before its next token."""
        self.cancelled = True

    def choose(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """The next token, from scores (1, vocabulary), by this request's own generator; None: the likeliest."""
        if not self._warpers:
            return None
        if self._generator is None:
            self._generator = torch.Generator(scores.device)
            if self.sampling.seed is None:
                self._generator.seed()
            else:
                self._generator.manual_seed(self.sampling.seed)
        probabilities = self._warpers(input_ids, scores).float().softmax(-1)
        self._before = self._generator.get_state()
        return torch.multinomial(probabilities, 1, generator=self._generator)[0, 0]

    def step_back(self) -> None:
        """Forget a token that was chosen and not taken: whatever failed between, the answer goes on as if it had not."""
        if self._generator is not None and self._before is not None:
            self._generator.set_state(self._before)
        self._before = None

    def take(self, token_id: int, end_of_text: set[int]) -> None:
        """The next token was chosen: pass its text on, and end where the answer ends."""
        self._before = None
        if self.cancelled:
            self.finish()
            return
        self.token_ids.append(token_id)
        last = token_id in end_of_text or len(self.token_ids) >= self.limit
        piece = self._pieces.feed(token_id)
        ready, stopped = self._stop.feed(piece + self._pieces.rest() if last else piece)
        if last and not stopped:
            ready += self._stop.held
        if ready:
            self._send(ready)
        if stopped or token_id in end_of_text:
            self.sampling.max_new_tokens = None
        if stopped or last:
            self.finish()

    def finish(self, failure: str | None = None) -> None:
        """No more will come; once."""
        if not self.done:
            self.done = True
            self.inputs = {}  # the images are the largest part of a request
            self._send(None if failure is None else _StreamError(failure))

    def _send(self, item: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(self.queue.put_nowait, item)
        except RuntimeError:  # the server is being closed, and nobody listens
            self.cancelled = True


class _EachItsOwn(LogitsProcessor):
    """Every row of a batch chooses its token by its own rules: all others are ruled out before a greedy step."""

    def __init__(self, batch: list[Generation]) -> None:
        self.batch = batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = scores.argmax(-1)
        for row, one in enumerate(self.batch):
            if not one.done:
                token = one.choose(input_ids[row : row + 1], scores[row : row + 1])
                if token is not None:
                    chosen[row] = token
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen[:, None], 0.0)


class _EndsAlone(StoppingCriteria):
    """Passes every row's token on, and tells which rows are done; all are, for now, when it is others' turn."""

    def __init__(self, batch: list[Generation], end_of_text: set[int], others_turn: Callable[[int], bool]) -> None:
        self.batch = batch
        self.end_of_text = end_of_text
        self.others_turn = others_turn
        self.steps = 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        for one, token_id in zip(self.batch, input_ids[:, -1].tolist(), strict=True):
            if not one.done:
                one.take(token_id, self.end_of_text)
        self.steps += 1
        pause = self.others_turn(self.steps)
        return torch.tensor([one.done or pause for one in self.batch], device=input_ids.device)


class Engine(BaseGenerateManager):
    """Answers requests in batches, in the order of their arrival.

    A batch takes all that wait when it starts, `max_batch` at most; a row leaves it when its answer ends. If others came
    meanwhile, the batch pauses after `turn` tokens, and its rows wait again, behind them: nobody waits for the end of
    another's long answer. A row that goes on runs through its prompt and what it has said so far again. The rows of a batch
    that fails go on one by one.

    Args:
        model: a DSVL model, in evaluation mode.
        processor: its processor.
        max_batch: rows of a batch.
        turn: tokens of a batch while others wait; more is less work in all, fewer a shorter wait.
    """

    def __init__(self, model: Any, processor: Any, max_batch: int = 16, turn: int = 64) -> None:
        self.model = model
        self.tokenizer = processor.tokenizer
        self.max_batch = max_batch
        self.turn = turn
        self.batches = 0  # so many were started
        self._waiting: list[Generation] = []
        self._known: dict[str, Generation] = {}
        self._changed = threading.Condition()
        self._stopped = False
        ends = model.generation_config.eos_token_id
        self._end_of_text = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._thread = threading.Thread(target=self._run, name="dsvl-serve-engine", daemon=True)
        self._thread.start()

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> tuple["asyncio.Queue[Any]", Any]:
        """Start an answer; see `BaseGenerateManager`. `inputs` are of one row, `gen_config` is a `Sampling`."""
        one = Generation(dict(inputs), gen_config, self.tokenizer)
        with self._changed:
            if self._stopped:
                raise RuntimeError("The engine has stopped; start the server again.")
            self._known[request_id] = one
            self._waiting.append(one)
            self._changed.notify()
        return one.queue, one

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str
    ) -> tuple[str, int, list[int]]:
        """The whole answer; see `BaseGenerateManager`."""
        length = inputs["input_ids"].shape[-1]
        queue, one = self.generate_streaming(model, processor, inputs, gen_config, request_id)
        pieces: list[str] = []
        while (item := await queue.get()) is not None:
            if isinstance(item, _StreamError):
                raise RuntimeError(item.msg)
            pieces.append(item)
        return "".join(pieces), length, one.token_ids

    def release(self, request_id: str) -> None:
        """The request is over, for whatever reason: what is left of its answer is not generated."""
        with self._changed:
            one = self._known.pop(request_id, None)
            if one is not None:
                one.cancel()
                self._waiting = [other for other in self._waiting if other is not one]

    @property
    def running(self) -> int:
        """Requests that wait for a batch or are in one."""
        with self._changed:
            return sum(not one.done for one in self._known.values())

    def stop(self) -> None:
        """End all answers, and the thread."""
        with self._changed:
            self._stopped = True
            for one in self._known.values():
                one.cancel()
            self._changed.notify()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    for one in self._waiting:
                        one.finish(FAILURE)
                    return
                batch = self._next()
            self._answer(batch)
            del batch  # or the last visitor's words would stay until the next one comes

    def _next(self) -> list[Generation]:
        """Take the next batch from those that wait."""
        first = self._waiting[0]
        batch = [first] if first.alone else [one for one in self._waiting if not one.alone][: self.max_batch]
        self._waiting = [one for one in self._waiting if one not in batch]
        return batch

    def _answer(self, batch: list[Generation]) -> None:
        self.batches += 1
        failed = False
        try:
            self._generate(batch)
        except Exception:  # whatever went wrong, the server goes on, and those who wait are told
            logger.exception("A batch of %d requests failed", len(batch))
            failed = True
        # Not in the handler above, where the error would keep the failed batch's memory.
        if failed:
            for one in batch:
                one.step_back()
        with self._changed:
            for one in batch:
                # Too large together, or one of them is at fault: each goes on alone, from where it is.
                one.alone = one.alone or failed
                if one.cancelled or (failed and len(batch) == 1):
                    one.finish(None if one.cancelled else FAILURE)
                elif not one.done:
                    self._waiting.append(one)

    def _generate(self, batch: list[Generation]) -> None:
        inputs = join([one.inputs_so_far() for one in batch], self.tokenizer.pad_token_id)
        ends = _EndsAlone(batch, self._end_of_text, lambda steps: steps >= self.turn and bool(self._waiting))
        self.model.generate(
            **{name: tensor.to(self.model.device) for name, tensor in inputs.items()},
            logits_processor=LogitsProcessorList([NoImageToken(self.model.config.image_token_id), _EachItsOwn(batch)]),
            stopping_criteria=StoppingCriteriaList([ends]),
            max_new_tokens=max(one.limit - one.total_tokens for one in batch),
            do_sample=False,  # each row has chosen already
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )


def join(rows: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Model inputs of one row each -> those of a batch, padded on the left.

    Args:
        rows: `input_ids`, `attention_mask`, `mm_token_type_ids` (1, tokens) int64, and `pixel_values` (images, 3, height,
            width) where there are images.
        pad_token_id: what stands before the shorter rows.
    """
    longest = max(row["input_ids"].shape[1] for row in rows)
    padding = {"input_ids": pad_token_id, "attention_mask": 0, "mm_token_type_ids": 0}
    joined = {
        name: torch.cat([torch.nn.functional.pad(row[name], (longest - row[name].shape[1], 0), value=value) for row in rows])
        for name, value in padding.items()
    }
    images = [row["pixel_values"] for row in rows if row.get("pixel_values") is not None]
    return joined | ({"pixel_values": torch.cat(images)} if images else {})

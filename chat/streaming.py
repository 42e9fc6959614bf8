"""`generate()` in a background thread, as an iterator of tokens that can be stopped."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..utils.transformers_names import BaseStreamer


class _QueueStreamer(BaseStreamer):
    """Puts each generated token into a queue, and None at the end."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._is_prompt:  # the first call of generate() passes the prompt
            self._is_prompt = False
            return
        for token in value.flatten().tolist():
            self.queue.put(token)

    def end(self) -> None:
        pass  # generate() does not call this when it raises, so TokenStream puts the final None


class _StopRequested(StoppingCriteria):
    may_be_late = True  # see acceleration/decoding/decoding_loop.py

    def __init__(self, requested: threading.Event) -> None:
        self.requested = requested

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.requested.is_set(), dtype=torch.bool, device=input_ids.device)


class TokenStream:
    """A running `generate()` call. Iterate over it to receive the tokens.

    Call `stop()` before you use the KV cache of the call again, also after the last token.

    Args:
        model: a `DSVLForConditionalGeneration`.
        worker: an executor with one thread. Use the same one for all answers of a conversation, because compiled graphs
            are kept per thread.
        inputs: the keyword arguments of `generate()`, with a batch size of 1.
    """

    def __init__(self, model: Any, worker: ThreadPoolExecutor, inputs: dict[str, Any]) -> None:
        self._streamer, self._stop_requested = _QueueStreamer(), threading.Event()
        criteria = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), _StopRequested(self._stop_requested)])
        inputs = inputs | {"streamer": self._streamer, "stopping_criteria": criteria}
        self._future = worker.submit(self._run, model, inputs)

    def _run(self, model: Any, inputs: dict[str, Any]) -> list[int]:
        device = inputs["input_ids"].device
        try:
            # The current CUDA device is set per thread, and Triton launches its kernels on the current device.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return model.generate(**inputs)[0].tolist()
        finally:
            self._streamer.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._streamer.queue.get()) is not None:
            yield token
        self._future.result()

    def stop(self) -> list[int]:
        """Stop generating after the current token, and wait for the end of the call.

        Returns:
            All token ids, those of the prompt included.

        Raises:
            Exception: whatever `generate()` raised.
        """
        self._stop_requested.set()
        return self._future.result()

"""One answer, token by token, that can be stopped between any two of them."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..utils.transformers_names import BaseStreamer


class _Tokens(BaseStreamer):
    """Hands over each generated token, and None after the last."""

    def __init__(self) -> None:
        self.queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt:  # generate() begins with it
            self._prompt = False
            return
        for token in value.flatten().tolist():
            self.queue.put(token)

    def end(self) -> None:
        pass  # the thread's last word comes also where generate() raises


class _Stop(StoppingCriteria):
    def __init__(self, asked: threading.Event) -> None:
        self.asked = asked

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.asked.is_set(), dtype=torch.bool, device=input_ids.device)


class Answer:
    """A running `generate()`. Iterate over it for the tokens; `stop()` it, or let it end, before its cache is used again.

    Args:
        model: a `DSVLForConditionalGeneration`.
        worker: of one thread, the same for all answers of a conversation: compiled graphs are kept for each thread.
        inputs: what `generate()` takes, for one conversation.
    """

    def __init__(self, model: Any, worker: ThreadPoolExecutor, inputs: dict[str, Any]) -> None:
        self._tokens, self._asked = _Tokens(), threading.Event()
        stop = StoppingCriteriaList([*(inputs.get("stopping_criteria") or []), _Stop(self._asked)])
        self._prompt_length = inputs["input_ids"].shape[1]
        self._future = worker.submit(self._run, model, inputs | {"streamer": self._tokens, "stopping_criteria": stop})

    def _run(self, model: Any, inputs: dict[str, Any]) -> list[int]:
        device = inputs["input_ids"].device
        try:
            # The current device is each thread's own, and kernels that are compiled go there.
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return model.generate(**inputs)[0].tolist()
        finally:
            self._tokens.queue.put(None)

    def __iter__(self) -> Iterator[int]:
        while (token := self._tokens.queue.get()) is not None:
            yield token
        self._future.result()

    def stop(self) -> list[int]:
        """End after the token that is being computed, if it has not ended; returns all ids, the prompt's included.

        Raises:
            what `generate()` raised.
        """
        self._asked.set()
        return self._future.result()

"""The rotated keys and values of a prompt's images in one layer, wherever and in however many bits they are kept."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..int8 import dequantize, quantize
from .key_rotation import Turn

# Bytes of dequantized keys, and of scores, that exist at a time.
BLOCK_BYTES = 2**29


class HostLayers:
    """Images that stay on the host: the tensors of a layer are copied to the device while the layer before it runs.

    Args:
        tensors: by name, (layers, ...), on the host.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.layers = len(tensors["keys"])
        self.fetched: tuple[int, torch.device, dict[str, torch.Tensor], Any] | None = None  # layer, device, copies, event

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"fetched": None}

    def layer(self, number: int, device: torch.device) -> dict[str, torch.Tensor]:
        """The tensors of a layer on a device; those of the next one begin to be copied."""
        if device.type != "cuda":
            return {name: tensor[number].to(device) for name, tensor in self.tensors.items()}
        if self.fetched is None or self.fetched[:2] != (number, device):
            self._fetch(number, device)
        assert self.fetched is not None
        _, _, copies, event = self.fetched
        torch.cuda.current_stream(device).wait_event(event)
        self._fetch((number + 1) % self.layers, device)
        return copies

    def _fetch(self, number: int, device: torch.device) -> None:
        # Allocated on the stream that computes, which frees them, too: so the copies wait for what it has yet to do.
        copies = {name: torch.empty_like(tensor[number], device=device) for name, tensor in self.tensors.items()}
        stream = _copying_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for name, copy in copies.items():
                copy.copy_(self.tensors[name][number], non_blocking=True)
        self.fetched = (number, device, copies, stream.record_event())


_STREAMS: dict[torch.device, Any] = {}


def _copying_stream(device: torch.device) -> Any:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]


@dataclass
class ImageStates:
    """The images of a layer for some prompts.

    Attributes:
        keys, values: (prompts, image slots, key-value heads, head_dim), in the model's dtype or int8. Keys are rotated.
        dtype: the model's.
        key_scales, value_scales: (prompts, image slots, key-value heads), of int8.
    """

    keys: torch.Tensor
    values: torch.Tensor
    dtype: torch.dtype
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    @classmethod
    def rotated(
        cls,
        keys: torch.Tensor,
        values: torch.Tensor,
        prompts: int,
        dtype: torch.dtype,
        turn: Turn | None,
        key_scales: torch.Tensor | None = None,
        value_scales: torch.Tensor | None = None,
        keep_bits: bool = True,
    ) -> "ImageStates":
        """From the keys and values (tokens, key-value heads, head_dim) of one layer, before rotation.

        Args:
            prompts: among which the tokens are divided evenly.
            dtype: the model's.
            turn: the rotation of the keys, if the layer rotates them.
            keep_bits: whether keys of 8 bits have 8 bits again after the rotation.
        """
        if turn is None:
            whole = {"keys": keys, "values": values, "key_scales": key_scales, "value_scales": value_scales}
            return cls(dtype=dtype, **_divided(whole, prompts))
        # Some tokens at a time: a rotation takes about four times their memory.
        made: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        for tokens in _slices(len(keys), keys[0].numel() * dtype.itemsize, BLOCK_BYTES):
            plain = dequantize(keys[tokens], None if key_scales is None else key_scales[tokens], dtype)
            turned = turn(plain, tokens)
            if key_scales is not None and keep_bits:
                numbers, scales = quantize(turned[None])  # one layer
                made.append((numbers[0], scales[0]))
            else:
                made.append((turned, None))
        turned_scales = [scales for _, scales in made if scales is not None]
        whole = {
            "keys": torch.cat([part for part, _ in made]),
            "values": values,
            "key_scales": torch.cat(turned_scales) if turned_scales else None,
            "value_scales": value_scales,
        }
        return cls(dtype=dtype, **_divided(whole, prompts))

    def to(self, device: torch.device) -> "ImageStates":
        return self._changed(lambda tensor: tensor.to(device))

    def select(self, prompts: torch.Tensor) -> "ImageStates":
        """These prompts, (any,), each with a copy of its images."""
        return self._changed(lambda tensor: tensor[prompts])

    def _changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "ImageStates":
        """The same change of all tensors."""
        key_scales, value_scales = (None if scales is None else change(scales) for scales in self._scales)
        return ImageStates(change(self.keys), change(self.values), self.dtype, key_scales, value_scales)

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values in the model's dtype, (prompts, image slots, key-value heads, head_dim)."""
        return dequantize(self.keys, self.key_scales, self.dtype), dequantize(self.values, self.value_scales, self.dtype)

    def attend(self, query: torch.Tensor, members: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The softmax over the images that queries see, block by block of keys.

        Args:
            query: (rows, key-value heads, query heads of each, queries, head_dim), scaled. There are as many consecutive
                rows for each prompt.
            members: (rows, queries, image slots), True where a query sees a key.
            softcap: of scores, if the decoder has it.

        Returns:
            The output, of the shape of `query`, 0 for a query that sees none; and the logarithm of the sum of exponentials,
            (rows, key-value heads, query heads of each, queries), -inf there.
        """
        rows, kv_heads, group, queries, head_dim = query.shape
        copies = rows // len(self.keys)
        outputs, sums = [], []
        for prompt, keys in enumerate(self.keys):
            its = slice(prompt * copies, (prompt + 1) * copies)
            # (key-value heads, rows x query heads x queries, head_dim)
            flat = query[its].transpose(0, 1).reshape(kv_heads, -1, head_dim)
            state = Softmax(flat)
            dequantized = 0 if self.key_scales is self.value_scales is None else 2 * head_dim * self.dtype.itemsize
            per_token = kv_heads * (dequantized + 4 * flat.shape[1])
            for tokens in _slices(len(keys), per_token, BLOCK_BYTES):
                scores = torch.matmul(flat, keys[tokens].to(self.dtype).permute(1, 2, 0))
                scales = [None if all_ is None else all_[prompt, tokens].T[:, None] for all_ in self._scales]
                scores = scores.to(state.dtype) if scales[0] is None else scores * scales[0]
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                scores = scores.view(kv_heads, copies, group, queries, -1)
                hidden = ~members[its, None, :, tokens]
                values = self.values[prompt, tokens].to(self.dtype).transpose(0, 1)
                state.add(scores.masked_fill(hidden, -torch.inf).flatten(1, 3), values, scales[1])
            output, lse = state.result()
            outputs.append(output.view(kv_heads, copies, group, queries, head_dim).transpose(0, 1))
            sums.append(lse.view(kv_heads, copies, group, queries).transpose(0, 1))
        return torch.cat(outputs), torch.cat(sums)

    @property
    def _scales(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return self.key_scales, self.value_scales


def _divided(tensors: dict[str, torch.Tensor | None], prompts: int) -> dict[str, Any]:
    """(tokens, ...) as (prompts, tokens of each, ...)."""
    return {name: None if one is None else one.unflatten(0, (prompts, -1)) for name, one in tensors.items()}


class Softmax:
    """A softmax over blocks of keys (FlashAttention's): the row maximum `m`, the sum `l`, and the output before division.

    Args:
        like: a tensor (heads, rows, head_dim) of the dtype and on the device of queries.
    """

    def __init__(self, like: torch.Tensor) -> None:
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self.m = like.new_full(like.shape[:-1], -torch.inf, dtype=self.dtype)
        self.l = torch.zeros_like(self.m)
        self.output = torch.zeros_like(like, dtype=self.dtype)

    def add(self, scores: torch.Tensor, values: torch.Tensor, scales: torch.Tensor | None = None) -> None:
        """A block of keys.

        Args:
            scores: (heads, rows, keys), -inf where hidden.
            values: (heads, keys, head_dim).
            scales: (heads, 1, keys), of values.
        """
        m = torch.maximum(self.m, scores.amax(-1))
        finite = m.masked_fill(m == -torch.inf, 0)
        weights, before = (scores - finite[..., None]).exp_(), (self.m - finite).exp_()
        self.m, self.l = m, self.l * before + weights.sum(-1)
        weights = weights if scales is None else weights * scales
        self.output = self.output * before[..., None] + torch.matmul(weights.to(values.dtype), values)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output (heads, rows, head_dim), 0 where no key is seen, and the logarithm of the sum (heads, rows)."""
        return self.output / self.l.masked_fill(self.l == 0, 1)[..., None], self.m + self.l.log()


def _slices(tokens: int, bytes_per_token: int, limit: int) -> Iterator[slice]:
    """Slices of tokens of at most so many bytes."""
    size = max(limit // max(bytes_per_token, 1), 1)
    return (slice(start, min(start + size, tokens)) for start in range(0, tokens, size))


__all__ = ["HostLayers", "ImageStates", "Softmax"]

"""The activations of a training step, counted on the meta device: the model runs, and nothing is computed or allocated."""

import copy
import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..transformers_dsvl import ALL_ATTENTION_FUNCTIONS, no_init_weights
from .adapters import lora_config
from .parts import PARTS

ALLOCATION = 512  # bytes: the CUDA caching allocator rounds every request up to a multiple (c10 kMinBlockSize)

_ATTENTION = "dsvl_memory_plan"


# ----------------------------------------------------------------------------------------------------------------------
# Counting


class Ledger(TorchDispatchMode):
    """Counts the bytes of every storage that an operation makes, until nothing refers to it any more.

    Args:
        known: tensors that are there already and are not counted: weights, inputs.

    Attributes:
        live: bytes that are alive.
        peak: the most that `live` has been.
        gradients: bytes of `live` that `is_gradient` or `hold` named.
        gradients_at_peak: `gradients` when `peak` was reached.
    """

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        # Storages are known by address; the tensors of `known` are kept, so that no other storage gets theirs.
        self._known = list(known)
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def is_gradient(self, gradient: torch.Tensor) -> None:
        """Count this tensor, from now on, among the gradients as well."""
        self.gradients += self._sizes[gradient.untyped_storage()._cdata]

    def hold(self, size: int) -> None:
        """Count so many bytes of gradients that no tensor here stands for."""
        self.gradients += size
        self._add(size)

    def _add(self, size: int) -> None:
        self.live += size
        if self.live > self.peak:
            self.peak, self.gradients_at_peak = self.live, self.gradients

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._sizes:
            return
        size = -(-storage.nbytes() // ALLOCATION) * ALLOCATION
        self._sizes[address] = size
        self._add(size)
        weakref.finalize(storage, self._release, address).atexit = False

    def _release(self, address: int) -> None:
        self.live -= self._sizes.pop(address)


# ----------------------------------------------------------------------------------------------------------------------
# Attention. On the meta device sdpa is the kernel that holds queries x keys matrices; a GPU has better ones. MMCA through
# library kernels was measured within 2 % of causal attention's memory (README), so the plan traces "causal".


class FlashMemory(torch.autograd.Function):
    """What a flash kernel allocates, with the results left empty (FlashAttention-2, arXiv 2307.08691: output and float32
    logsumexp are kept beside the inputs; backward has a float32 accumulator for the queries' gradient, and where heads
    share keys, gradients of keys and values for every head)."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """(batch, heads, tokens, head_dim), key and value with as many heads or fewer: (batch, heads, tokens, head_dim)."""
        batch, heads, tokens, _ = query.shape
        # The kernels write token by token, so that the transposition after them is free.
        output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
        logsumexp = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        query, key, value, _, _ = ctx.saved_tensors
        scratch = [torch.empty_like(query, dtype=torch.float32)]
        if key.shape[1] != query.shape[1]:
            shape = (key.shape[0], query.shape[1], *key.shape[2:])
            scratch += [key.new_empty(shape), value.new_empty(*shape[:-1], value.shape[-1])]
        gradients = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        del scratch
        return gradients


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return FlashMemory.apply(query, key, value).transpose(1, 2), None


class _FlashSdpa(TorchFunctionMode):
    """Attention that does not go through transformers' AttentionInterface: the perceiver's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return FlashMemory.apply(*args[:3])
        return func(*args, **(kwargs or {}))


@contextmanager
def _planning_attention() -> Iterator[None]:
    """Let the name `_ATTENTION` be known to transformers. It has no mask function, so no mask is built under it."""
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]


# ----------------------------------------------------------------------------------------------------------------------
# Tracing


@dataclass(frozen=True)
class Trace:
    """The peak of forward and backward above weights and inputs, in bytes, and how much of it are parameters' gradients."""

    peak: int
    gradients: int


class StepTracer:
    """A model that exists by its shapes alone, and the memory of its training steps.

    Every layer is traced: that takes a second or two for the largest models, and leaves nothing to extrapolate.

    Args:
        config: the model's; it is copied.
        train: what learns in full, by the names of `PARTS`.
        lora_rank: rank of adapters on the decoder's linear layers; 0 for none. With adapters, the parts that learn beside
            them are PEFT's `modules_to_save`, which keep the frozen original as well.
        activation_checkpointing: recompute every layer in backward.
        dtype: of weights and activations (no autocast).

    Raises:
        ValueError: if a tied head should learn without the embeddings, or LoRA is asked for without PEFT.
    """

    def __init__(
        self,
        config: DSVLConfig,
        train: Sequence[str],
        lora_rank: int = 0,
        activation_checkpointing: bool = False,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        config = copy.deepcopy(config)
        config.multimodal_attention = "causal"
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = _ATTENTION
        with _planning_attention(), torch.device("meta"), no_init_weights():
            model = DSVLForConditionalGeneration(config).to(dtype).train()
        model.tie_weights()  # which belongs to the initialization that was left out
        model.set_trainable(**{argument: part in train for part, argument in PARTS.items()})
        if lora_rank:
            _add_adapters(model, lora_rank, train)
        if activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        self.model, self.dtype = model, dtype

    def trace(
        self, micro_batch: int, sequence_length: int, images: int, supervised: int, taken_into: int | None = None
    ) -> Trace:
        """Run forward and backward.

        Args:
            micro_batch: samples.
            sequence_length: tokens of a sample, its images' included.
            images: of a sample.
            supervised: tokens with a label, in the whole micro-batch; logits are computed for these alone.
            taken_into: bytes of the buffer into which somebody takes each gradient as soon as it is complete, there from
                the first one on: 0 if it is added to what was there before. Default: gradients stay as backward made them.
        """
        model, config = self.model, self.model.config
        with torch.device(model.device):
            input_ids = torch.zeros(micro_batch, sequence_length, dtype=torch.long)
            placeholders = torch.zeros(micro_batch, sequence_length, 1, dtype=torch.bool)
            rows = torch.zeros(supervised, dtype=torch.long)  # of the supervised tokens, and their labels
            size = config.image_size
            pixel_values = torch.zeros(micro_batch * images, 3, size, size, dtype=self.dtype)
        inputs = [input_ids, placeholders, rows, pixel_values]
        ledger = Ledger([*model.parameters(), *model.buffers(), *inputs])

        def completed(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if taken_into is None:
                ledger.is_gradient(parameter.grad)
            else:
                ledger.hold(taken_into - ledger.gradients)
                parameter.grad = None

        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        hooks = [parameter.register_post_accumulate_grad_hook(completed) for parameter in learning]
        try:
            with _planning_attention(), ledger, _FlashSdpa():
                self._forward(input_ids, placeholders, rows, pixel_values).backward()
        finally:
            for hook in hooks:
                hook.remove()
            model.zero_grad(set_to_none=True)
        return Trace(ledger.peak, ledger.gradients_at_peak)

    def _forward(
        self, input_ids: torch.Tensor, placeholders: torch.Tensor, rows: torch.Tensor, pixel_values: torch.Tensor
    ) -> torch.Tensor:
        """`DSVLForConditionalGeneration.forward` without what asks tensors for their values, which meta tensors lack."""
        model = self.model
        embeddings = model.get_input_embeddings()(input_ids)
        if len(pixel_values):
            features = torch.cat(list(model.get_image_features(pixel_values).pooler_output))
            embeddings = embeddings.masked_scatter(placeholders, features)
            del features
        hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        del embeddings
        return model._loss(model._logits(hidden.flatten(0, 1)[rows]), rows, num_items_in_batch=len(rows))


def _add_adapters(model: DSVLForConditionalGeneration, rank: int, train: Sequence[str]) -> None:
    """LoRA on the decoder's linear layers; `train` learns in full beside it."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_rank={rank} needs PEFT to be traced; pip install 'dsvl[train]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT has to say is for the run itself
        # PEFT would keep adapters of half-precision models in float32; DeepSpeed's bf16 casts them to the model's dtype.
        get_peft_model(model, lora_config(model, rank, train=train), autocast_adapter_dtype=False)  # in place

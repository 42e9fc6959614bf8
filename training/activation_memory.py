"""The memory of a training step's activations, counted by running the model on the meta device."""

import copy
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ..acceleration.decoder_layers import compile_8_bit_tower
from ..acceleration.memory.activation_offloading import offload_activations
from ..acceleration.memory.tiled_mlp import tile_mlp
from ..acceleration.operators import operator_namespace
from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..transformers_dsvl import ALL_ATTENTION_FUNCTIONS, no_init_weights
from .adapters import lora_config
from .frozen_precision import freeze_in_8_bits
from .trainable_parts import PARTS

ALLOCATION = 512  # bytes; the CUDA caching allocator rounds requests up to a multiple of it (c10 kMinBlockSize)

PARTITIONED = "aot_eager_decomp_partition"  # divides as Inductor does, and runs operation by operation, on any device

_ATTENTION = "dsvl_memory_plan"


# ----------------------------------------------------------------------------------------------------------------------
# Counting


class AllocationCounter(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, until they are freed.

    Args:
        known: existing tensors that are not counted, such as weights and inputs.

    Attributes:
        live: bytes that are allocated.
        peak: the maximum of `live`.
        gradients: bytes of `live` that were registered by `is_gradient` or `hold`.
        gradients_at_peak: `gradients` when `peak` was reached.
    """

    def __init__(self, known: Sequence[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.gradients = self.gradients_at_peak = 0
        # Storages are identified by address; references to `known` keep these addresses from being reused.
        self._known = list(known)
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Else the compiler would leave alone what runs in this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf.untyped_storage())
        return result

    def is_gradient(self, gradient: torch.Tensor) -> None:
        """Count this tensor among the gradients from now on."""
        self.gradients += self._sizes[gradient.untyped_storage()._cdata]

    def hold(self, size: int) -> None:
        """Count `size` bytes of gradients that are not in a traced tensor."""
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
# Attention. On the meta device sdpa runs the math kernel, which allocates (queries, keys) matrices; a GPU uses flash
# kernels. The memory of MMCA was measured within 2% of causal attention's, so "causal" is traced.


_NAMESPACE = operator_namespace(__name__)


@torch.library.custom_op(f"{_NAMESPACE}::flash_memory", mutates_args=())
def flash_memory(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Allocates what a flash attention kernel allocates, without computing anything: the output and the logsumexp.

    FlashAttention-2 (arXiv:2307.08691) saves the inputs, the output and the float32 logsumexp. Its backward allocates a
    float32 accumulator for the gradient of the queries and, for grouped-query attention, gradients of keys and values for
    every query head. An operator, as a compiler would compute other functions again in backward.

    Args:
        query, key, value: (batch, heads, tokens, head_dim); key and value may have fewer heads.
    """
    return _flash_outputs(query, key, value)


@torch.library.custom_op(f"{_NAMESPACE}::flash_memory_backward", mutates_args=())
def flash_memory_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    logsumexp: torch.Tensor,
) -> list[torch.Tensor]:
    """The gradients of queries, keys and values, and what is allocated beside them."""
    return _flash_gradients(gradient, query, key, value, output, logsumexp)


@flash_memory.register_fake
def _flash_outputs(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, tokens, _ = query.shape
    # The kernels' output has the layout (batch, tokens, heads, head_dim), so that transposing it needs no copy.
    output = query.new_empty(batch, tokens, heads, value.shape[-1]).transpose(1, 2)
    return output, query.new_empty(batch, heads, tokens, dtype=torch.float32)


@flash_memory_backward.register_fake
def _flash_gradients(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *others: torch.Tensor
) -> list[torch.Tensor]:
    scratch = [torch.empty_like(query, dtype=torch.float32)]
    if key.shape[1] != query.shape[1]:
        shape = (key.shape[0], query.shape[1], *key.shape[2:])
        scratch += [key.new_empty(shape), value.new_empty(*shape[:-1], value.shape[-1])]
    return [torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), *scratch]


def _save_for_flash(ctx: Any, inputs: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _flash_backward(ctx: Any, gradient: torch.Tensor, of_logsumexp: Any) -> tuple[torch.Tensor, ...]:
    return tuple(flash_memory_backward(gradient, *ctx.saved_tensors)[:3])


flash_memory.register_autograd(_flash_backward, setup_context=_save_for_flash)


def _attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    return flash_memory(query, key, value)[0].transpose(1, 2), None


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return flash_memory(query, key, value)[0]


@contextmanager
def planning_attention() -> Iterator[None]:
    """Register `_ATTENTION` with transformers. It has no mask function, so that no masks are built for it.

    `scaled_dot_product_attention` is replaced as well, which the perceiver projector calls directly. By an attribute: a
    `TorchFunctionMode` would be compiled into the layers, where torch 2.13 cannot follow `Tensor.unflatten` in it.
    """
    sdpa = nn.functional.scaled_dot_product_attention
    ALL_ATTENTION_FUNCTIONS[_ATTENTION] = _attention
    nn.functional.scaled_dot_product_attention = _sdpa  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = sdpa
        del ALL_ATTENTION_FUNCTIONS[_ATTENTION]


# ----------------------------------------------------------------------------------------------------------------------
# Tracing


@dataclass(frozen=True)
class ActivationMemory:
    """The peak memory of forward and backward, in bytes.

    Attributes:
        peak: bytes on top of weights and inputs.
        gradients: bytes of `peak` that are gradients of parameters.
        host: bytes of activations in main memory.
    """

    peak: int
    gradients: int
    host: int = 0


class StepTracer:
    """Measures the memory of training steps of a model on the meta device.

    Every layer is traced, which takes a second or two for the largest models; nothing is extrapolated.

    Args:
        config: configuration of the model; it is copied.
        train: parts that are trained in full, keys of `PARTS`.
        lora_rank: rank of adapters on the decoder's linear layers, *optional*, defaults to 0: no adapters. With adapters,
            the parts in `train` are PEFT's `modules_to_save`, which also keep a frozen copy of the original weights.
        activation_checkpointing: recompute every layer in backward, *optional*, defaults to False.
        dtype: dtype of weights and activations, without autocast, *optional*, defaults to bfloat16.
        lora: further arguments of `lora_config`, *optional*.
        mlp_tile, offload: arguments of `reduce_memory`, *optional*.
        frozen_precision, frozen_keep: arguments of `freeze_in_8_bits`, *optional*, defaults to no 8-bit weight. Products are
            traced as they run on FP8 tensor cores.
        compile_decoder_layers: trace the decoder's layers as torch.compile divides them into forward and backward,
            *optional*, defaults to False. What a layer keeps is what a compiled one keeps; what exists while it runs is not
            fused, and more than in a compiled one.

    Raises:
        ValueError: if a tied head is to be trained without the embeddings, or PEFT is needed and not installed.
    """

    def __init__(
        self,
        config: DSVLConfig,
        train: Sequence[str],
        lora_rank: int = 0,
        activation_checkpointing: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        lora: Mapping[str, Any] | None = None,
        mlp_tile: int | None = None,
        offload: bool = False,
        frozen_precision: str | None = None,
        frozen_keep: Sequence[str] | None = None,
        compile_decoder_layers: bool = False,
    ) -> None:
        config = copy.deepcopy(config)
        config.multimodal_attention = "causal"
        for part in (config, config.text_config, config.vision_config):
            part._attn_implementation = _ATTENTION
        with planning_attention(), torch.device("meta"), no_init_weights():
            model = DSVLForConditionalGeneration(config).to(dtype).train()
        model.tie_weights()  # skipped together with the initialization
        model.set_trainable(**{argument: part in train for part, argument in PARTS.items()})
        if lora_rank:
            _add_adapters(model, lora_rank, train, lora or {})
        if frozen_precision is not None:
            freeze_in_8_bits(model, frozen_precision, frozen_keep, in_fp8=True)
        if activation_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        decoder = model.model.language_model
        if mlp_tile is not None:
            tile_mlp(decoder, mlp_tile)
        self.offloading = offload_activations(decoder, ["meta"]) if offload else None
        if compile_decoder_layers:
            model.compile_decoder_layers(backend=PARTITIONED, fullgraph=True)
            if frozen_precision is not None:
                compile_8_bit_tower(model)
        self.model, self.dtype, self.is_compiled = model, dtype, compile_decoder_layers

    def trace(
        self,
        micro_batch: int,
        sequence_length: int,
        tiles: int,
        supervised: int,
        gradient_buffer: int | None = None,
        gradient_element: int | None = None,
    ) -> ActivationMemory:
        """Run forward and backward.

        Args:
            micro_batch: number of samples.
            sequence_length: tokens per sample, image tokens included.
            tiles: images per sample, or tiles of images: inputs of the tower.
            supervised: tokens with a label in the micro-batch; logits are computed for these only.
            gradient_buffer: bytes of a buffer that is allocated when the first gradient is complete, and that gradients are
                moved to; 0 if it exists before. *Optional*, defaults to None: gradients stay where backward allocated them.
            gradient_element: bytes per element of gradients that stay, *optional*, defaults to that of the weights.
        """
        model, config = self.model, self.model.config
        with torch.device(model.device):
            input_ids = torch.zeros(micro_batch, sequence_length, dtype=torch.long)
            placeholders = torch.zeros(micro_batch, sequence_length, 1, dtype=torch.bool)
            rows = torch.zeros(supervised, dtype=torch.long)
            images = largest_images(config, micro_batch * tiles, self.dtype)
        inputs = [input_ids, placeholders, rows, *images.values()]
        counter = AllocationCounter([*model.parameters(), *model.buffers(), *inputs])

        def completed(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None
            if gradient_buffer is None:
                counter.is_gradient(parameter.grad)
                if gradient_element is not None:
                    counter.hold((gradient_element - parameter.grad.element_size()) * parameter.grad.numel())
            else:
                counter.hold(gradient_buffer - counter.gradients)
                parameter.grad = None

        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        limits: Any = nullcontext()
        if self.is_compiled:  # every model and shape is, however many there are
            limits = torch._dynamo.config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20)
        hooks = []
        try:
            with planning_attention(), limits:
                if self.is_compiled:  # what the compiler itself allocates does not count
                    self.forward(input_ids, placeholders, rows, images).backward()
                    model.zero_grad(set_to_none=True)
                if self.offloading is not None:
                    self.offloading.memory.blocks = 0
                hooks = [parameter.register_post_accumulate_grad_hook(completed) for parameter in trainable]
                with counter:
                    self.forward(input_ids, placeholders, rows, images).backward()
        finally:
            for hook in hooks:
                hook.remove()
            model.zero_grad(set_to_none=True)
        host = 0 if self.offloading is None else self.offloading.nbytes
        return ActivationMemory(counter.peak, counter.gradients_at_peak, host)

    def forward(
        self, input_ids: torch.Tensor, placeholders: torch.Tensor, rows: torch.Tensor, images: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss as in `DSVLForConditionalGeneration.forward`, without the checks that read values of tensors.

        Args:
            input_ids: (batch, tokens), int64.
            placeholders: (batch, tokens, 1), bool: where image features are inserted.
            rows: (supervised,), int64: indices of supervised tokens in the flattened batch.
            images: arguments of `get_image_features`.
        """
        model = self.model
        embeddings = model.get_input_embeddings()(input_ids)
        if len(images["pixel_values"]):
            features = torch.cat(list(model.get_image_features(**images).pooler_output))
            embeddings = embeddings.masked_scatter(placeholders, features)
            del features
        hidden = model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        del embeddings
        return model._loss(model._logits(hidden.flatten(0, 1)[rows]), rows, num_items_in_batch=len(rows))


def largest_images(config: DSVLConfig, number: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs of a tower for images, or tiles of images, of the most tokens; of zeros, on the default device.

    Args:
        config: configuration of the model.
        number: number of images or tiles.
        dtype: dtype of the pixels.
    """
    if config.image_layout != "native":
        side: Any = config.image_size
        return {"pixel_values": torch.zeros(number, 3, side, side, dtype=dtype)}
    vision, patches = config.vision_config, config.num_patches
    # One row of tokens has the most of them; the shapes are read, so they are real on any device.
    shape = torch.tensor([[config.downsample, patches // config.downsample]], device="cpu")
    return {
        "pixel_values": torch.zeros(number, patches, vision.num_channels * vision.patch_size**2, dtype=dtype),
        "pixel_attention_mask": torch.ones(number, patches, dtype=torch.int32),
        "spatial_shapes": shape.expand(number, 2),
    }


def _add_adapters(model: DSVLForConditionalGeneration, rank: int, train: Sequence[str], lora: Mapping[str, Any]) -> None:
    """Add LoRA adapters; the parts in `train` are trained in full."""
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ValueError(f"lora_rank={rank} needs PEFT to be traced; pip install 'dsvl[train]'.") from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warnings concern the training itself
        # PEFT keeps adapters of half-precision models in float32 by default; DeepSpeed casts them to the model's dtype.
        get_peft_model(model, lora_config(model, rank, train=train, **lora), autocast_adapter_dtype=False)  # in place

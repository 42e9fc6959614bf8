"""`dsvl plan`: traced memory against real steps, ZeRO arithmetic against values by hand, and the command."""

import json
import math
import re
import weakref
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import yaml
from conftest import FAMILIES, tiny_vision_config
from training_runs import make_checkpoint
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config, Siglip2VisionConfig, SiglipVisionConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dsvl
from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLQwenVisionConfig
from dsvl.acceleration.parallel.split_batch import LONG_TEXT
from dsvl.cli import main
from dsvl.configuration_dsvl import PROJECTOR_TYPES
from dsvl.training.activation_memory import (
    ALLOCATION,
    PARTITIONED,
    ActivationMemory,
    AllocationCounter,
    StepTracer,
    largest_images,
    planning_attention,
)
from dsvl.training.memory_plan import MemoryPlan, Planner, largest_micro_batch, plan, usable
from dsvl.training.model_states import GIB, ModelSizes, PhaseMemory, arriving_gradients, fsdp_states, model_states
from dsvl.training.plan import size, table
from dsvl.training.ready_recipes import ready_recipes
from dsvl.training.recipe import compose_arguments
from dsvl.training.recipe_plan import composed_config, plan_stages
from dsvl.training.trainable_parts import PARTS

DEFAULT = ("projector", "embeddings")


def small_config(layers=2, projector_type="linear", image_layout="crop", max_tiles=12, **text):
    """Large enough that the allocator's rounding is negligible, small enough for a real step on a CPU."""
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    values = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2)
    text_config = LlamaConfig(**(values | dict(num_hidden_layers=layers) | text))
    options = dict(projector_type=projector_type, image_layout=image_layout, max_tiles=max_tiles)
    return DSVLConfig(vision, text_config, multimodal_attention="causal", image_token_id=511, **options)


def native_config(projector_type, downsample):
    """As `small_config`, with a tower of SigLIP 2."""
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    return DSVLConfig(
        Siglip2VisionConfig(**sizes, patch_size=4, num_patches=16),
        small_config().text_config,
        projector_type=projector_type,
        downsample=downsample,
        image_layout="native",
        max_image_tokens=20,
        num_queries=16,
        multimodal_attention="causal",
        image_token_id=511,
    )


def llama_7b():
    """CLIP ViT-L/14 and LLaMA-7B, as benchmarks/training_step.py makes them."""
    return DSVLConfig(None, LlamaConfig(vocab_size=32064))


def headline():
    """70 and 2 billion parameters: DeepSpeed-VisualChat's largest model."""
    vision = CLIPVisionConfig(
        hidden_size=1664, intermediate_size=8192, num_hidden_layers=48, num_attention_heads=16, image_size=448, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    return DSVLConfig(vision, text)


# -- counting ----------------------------------------------------------------------------------------------------------


def test_a_storage_counts_once_while_anything_refers_to_it():
    weight = torch.zeros(256)  # 1 KiB
    with AllocationCounter([weight]) as counter:
        doubled = weight * 2
        view, _ = doubled[:3], weight[3:]
        assert counter.live == 1024
        del doubled
        assert counter.live == 1024
        more = torch.zeros(1)
        assert counter.live == 1024 + ALLOCATION
        del view
        assert (counter.live, counter.peak) == (ALLOCATION, 1024 + ALLOCATION)
        del more
    assert counter.live == 0


class Kept:
    """The bytes that graphs keep for backward, without weights and inputs."""

    def __init__(self, known):
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known:
            self.sizes[storage._cdata] = (-(-storage.nbytes() // ALLOCATION) * ALLOCATION, weakref.ref(storage))
        return tensor

    def total(self):
        return sum(size for size, storage in self.sizes.values() if storage() is not None)


def real_saved_bytes(config, train, tokens, labelled):
    """Bytes that autograd saves in the forward of a real model, without weights and inputs."""
    torch.manual_seed(0)
    model = DSVLForConditionalGeneration(config).train().set_trainable(**{PARTS[part]: part in train for part in PARTS})
    input_ids = torch.randint(0, 500, (2, tokens))
    input_ids[:, : config.image_seq_length] = config.image_token_id
    labels = torch.full_like(input_ids, -100)
    labels[:, -labelled:] = input_ids[:, -labelled:]
    pixel_values = torch.randn(2, 3, 28, 28)
    kept = Kept([*model.parameters(), *model.buffers(), input_ids, labels, pixel_values])
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        loss = model(input_ids=input_ids, pixel_values=pixel_values, labels=labels, use_cache=False).loss
    assert loss.requires_grad
    return kept.total()


def on_cpu(model):
    """A model of the meta device on a CPU, of zeros."""
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    return model


@pytest.mark.parametrize("train", [DEFAULT, ("projector", "embeddings", "language"), ("vision",)])
def test_the_traced_forward_keeps_what_autograd_saves_in_a_real_one(train):
    config, tokens, labelled = small_config(), 256, 64
    tracer = StepTracer(config, train, dtype=torch.float32)
    with torch.device("meta"):
        inputs = (
            torch.zeros(2, tokens, dtype=torch.long),
            torch.zeros(2, tokens, 1, dtype=torch.bool),
            torch.zeros(2 * labelled, dtype=torch.long),
            images := {"pixel_values": torch.zeros(2, 3, 28, 28)},
        )
    known = [*tracer.model.parameters(), *tracer.model.buffers(), *inputs[:3], *images.values()]
    with planning_attention(), AllocationCounter(known) as counter:
        loss = tracer.forward(*inputs)
    assert loss.requires_grad
    assert counter.live == pytest.approx(real_saved_bytes(config, train, tokens, labelled), rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("lora_rank", [0, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_traced_with_what_the_compiler_keeps(checkpointing, lora_rank):
    """On a CPU, by Inductor itself."""
    config, kept = small_config(layers=3), []
    for backend in ("inductor", PARTITIONED):
        torch._dynamo.reset()
        tracer = StepTracer(config, DEFAULT, lora_rank, checkpointing, torch.float32)
        model = on_cpu(tracer.model)
        model.compile_decoder_layers(backend=backend, fullgraph=True)
        inputs = torch.zeros(2, 256, dtype=torch.long), torch.zeros(2, 256, 1, dtype=torch.bool), torch.zeros(9).long()
        images = {"pixel_values": torch.zeros(2, 3, 28, 28)}
        counter = Kept([*model.parameters(), *model.buffers(), *inputs, *images.values()])
        with planning_attention(), torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
            loss = tracer.forward(*inputs, images)
        assert loss.requires_grad
        kept.append(counter.total())
    assert kept[1] == pytest.approx(kept[0], rel=0.02)
    if not checkpointing:
        written = StepTracer(config, DEFAULT, lora_rank, dtype=torch.float32)
        compiled = StepTracer(config, DEFAULT, lora_rank, dtype=torch.float32, compile_decoder_layers=True)
        step = dict(micro_batch=2, sequence_length=256, tiles=2, supervised=9)
        assert compiled.trace(**step).peak < 0.9 * written.trace(**step).peak


# What torch allocated at most, in GiB: of one H100, one H200, and of each of two (benchmarks/results).
@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ({}, [37.3]),
        ({"deepspeed": "zero2"}, [38.3, 37.5]),
        ({"deepspeed": "zero2", "world_size": 2}, [36.7]),
        ({"deepspeed": "zero3", "world_size": 2}, [32.5]),
        ({"fsdp": True, "world_size": 2}, [30.5]),
    ],
)
def test_compiled_layers_of_7b_need_what_was_measured_on_gpus(options, measured):
    step = dict(micro_batch=2, sequence_length=4096, images=8, dtype="bfloat16", compile_decoder_layers=True)
    planned = plan(llama_7b(), **step, **options).total / GIB
    assert all(planned == pytest.approx(one, rel=0.1) for one in measured), planned


@pytest.mark.parametrize("options", [{"mlp_tile": 64}, {"frozen_precision": "fp8", "frozen_keep": ["none"]}, {"fsdp": True}])
def test_compiled_layers_are_planned_with_other_savings(options):
    """For several micro-batches, each of which is compiled for its shape."""
    planner = Planner(small_config(), sequence_length=256, compile_decoder_layers=True, **options)
    totals = [planner.plan(micro_batch).total for micro_batch in range(1, 13)]
    steps = [later - earlier for earlier, later in pairwise(totals)]
    assert max(steps) == pytest.approx(min(steps), rel=0.05)


@pytest.mark.parametrize("tower", [CLIPVisionConfig, SiglipVisionConfig, DSVLQwenVisionConfig])
def test_a_compiled_tower_in_8_bits_is_planned(tower):
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, image_size=28, patch_size=7)
    qwen = dict(num_positions=16, output_dim=128, num_queries=16) if tower is DSVLQwenVisionConfig else {}
    config = DSVLConfig(tower(num_hidden_layers=8, **sizes, **qwen), small_config().text_config, image_token_id=511)
    step = dict(sequence_length=64, dtype="bfloat16", compile_decoder_layers=True)
    whole, rounded = plan(config, **step), plan(config, frozen_precision="fp8", frozen_keep=["none"], **step)
    saved = 8 * (4 * 64 * 64 + 2 * 64 * 128) + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 128 * 256)  # a byte of each weight
    assert whole.total - rounded.total == pytest.approx(saved, rel=0.1)


def assert_real_as_traced(tracer):
    """A step on a CPU has the peak that the meta device says."""
    step = dict(micro_batch=2, sequence_length=128, tiles=2, supervised=40)
    meta = tracer.trace(**step)
    on_cpu(tracer.model)
    real = tracer.trace(**step)
    assert real.peak == pytest.approx(meta.peak, rel=0.02)
    assert real.gradients == meta.gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
def test_a_real_step_on_a_cpu_peaks_where_the_meta_device_says(projector_type, checkpointing):
    config = small_config(projector_type=projector_type)
    assert_real_as_traced(StepTracer(config, DEFAULT, activation_checkpointing=checkpointing, dtype=torch.float32))


@pytest.mark.parametrize(("projector_type", "downsample"), [("linear", 1), ("mlp", 2), ("perceiver", 1)])
def test_a_real_step_with_native_images_peaks_where_the_meta_device_says(projector_type, downsample):
    config = native_config(projector_type, downsample)
    assert_real_as_traced(StepTracer(config, (*DEFAULT, "vision"), dtype=torch.float32))


@pytest.mark.parametrize(("projector_type", "downsample"), [("linear", 1), ("mlp", 3), ("perceiver", 1)])
def test_the_largest_native_image_has_the_most_tokens(projector_type, downsample):
    torch.manual_seed(0)
    config = native_config(projector_type, downsample)
    model = DSVLForConditionalGeneration(config)
    inputs = largest_images(config, 2, torch.float32)
    assert inputs["pixel_values"].shape[1] == config.num_patches == int(inputs["spatial_shapes"][0].prod())
    assert [len(one) for one in model.get_image_features(**inputs).pooler_output] == [config.image_seq_length] * 2


def test_tiles_are_planned_as_so_many_images():
    tiled, plain = small_config(image_layout="tiles", max_tiles=5), small_config()
    options = dict(sequence_length=512, train=(*DEFAULT, "vision"))
    assert plan(tiled, images=2, tiles=3, **options) == plan(plain, images=6, **options)
    assert plan(tiled, images=2, **options) == plan(plain, images=12, **options)  # the whole image, and 5 parts
    for config, tiles, message in ((tiled, 7, "'tiles' it has 1 to 6"), (plain, 2, "'crop' it has 1 to 1")):
        with pytest.raises(ValueError, match=message):
            plan(config, images=1, tiles=tiles, **options)
    with pytest.raises(ValueError, match=r"2 images of 6 tiles take 204 tokens \(17 each\).* 205, or fewer images or"):
        plan(tiled, images=2, sequence_length=204)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_decoder_can_be_planned(family):
    config = DSVLConfig(tiny_vision_config(), FAMILIES[family](), image_token_id=90)
    made = plan(config, sequence_length=24, images=2, train=("projector", "embeddings", "language"))
    assert made.forward_backward.activations > 0


def test_activations_grow_evenly_with_depth_and_micro_batch():
    def peak(layers, micro_batch):
        tracer = StepTracer(small_config(layers), DEFAULT)
        return tracer.trace(micro_batch, 256, 1, 20 * micro_batch).peak

    assert peak(12, 2) == peak(4, 2) + 4 * (peak(6, 2) - peak(4, 2))
    assert peak(4, 12) == pytest.approx(peak(4, 4) + 4 * (peak(4, 6) - peak(4, 4)), rel=1e-3)


def test_tracing_has_no_side_effects():
    config = small_config()
    before, attentions = config.to_dict(), dict(ALL_ATTENTION_FUNCTIONS)
    tracer = StepTracer(config, DEFAULT)
    first, second = (tracer.trace(1, 64, 1, 8) for _ in range(2))
    assert first == second
    assert config.to_dict() == before and config.text_config._attn_implementation != "dsvl_memory_plan"
    assert dict(ALL_ATTENTION_FUNCTIONS) == attentions
    assert all(parameter.grad is None for parameter in tracer.model.parameters())
    assert torch.get_default_dtype() == torch.float32


# -- measured on a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpointing", "measured"), [(False, 33.0), (True, 3.6)])
def test_a_7b_step_needs_what_was_measured_on_a_gpu(checkpointing, measured):
    """README, "In a whole training step": an H200, bf16, DSVL "causal", GiB above the weights."""
    made = plan(
        llama_7b(), micro_batch=2, sequence_length=4096, images=8, activation_checkpointing=checkpointing
    ).forward_backward
    assert (made.gradients + made.activations) / GIB == pytest.approx(measured, rel=0.02)


def test_70b_and_2b_are_planned_without_a_weight():
    planner = Planner(headline(), world_size=8, deepspeed="zero3", activation_checkpointing=True)
    made = planner.plan(1)
    assert all(parameter.is_meta for parameter in planner.tracer.model.parameters())
    assert made.parameters == pytest.approx(70.8e9, rel=0.01)
    assert made.forward_backward.weights == pytest.approx(2 * made.parameters / 8, rel=0.01)
    assert 16 * GIB < made.total < usable(80 * GIB)
    assert plan(headline(), deepspeed="zero2", world_size=8, activation_checkpointing=True).total > 130 * GIB


# -- trained parts -----------------------------------------------------------------------------------------------------

STEP = dict(sequence_length=128, images=1)


def test_frozen_parts_cost_no_gradients_and_no_optimizer_states():
    made = plan(small_config(), train=("projector",), dtype="bfloat16", **STEP)
    projector = 64 * 128 + 3 * 128
    assert made.trained == projector
    assert made.optimizer_step.gradients == 2 * projector
    assert made.optimizer_step.optimizer == 2 * 2 * projector  # AdamW's two states in bfloat16
    assert made.optimizer_step.weights == 2 * made.parameters


def test_a_frozen_tower_keeps_no_graph():
    without, with_tower = (plan(small_config(), train=train, **STEP) for train in (["projector"], ["projector", "vision"]))
    assert with_tower.trained > without.trained
    assert with_tower.forward_backward.activations > without.forward_backward.activations


def test_adapters_are_trained_beside_the_parts_that_peft_copies():
    rank, hidden, layers = 4, 128, 2
    made, plain = (plan(small_config(), lora_rank=lora_rank, **STEP) for lora_rank in (rank, 0))
    # q and o are hidden x hidden, k and v have half the heads, the MLP is twice as wide: (in + out) x rank each.
    widths = 2 * (hidden + hidden) + 2 * (hidden + hidden // 2) + 3 * (hidden + 2 * hidden)
    adapters = layers * rank * widths
    assert made.trained == plain.trained + adapters
    assert made.parameters == plain.parameters + adapters + plain.trained


def test_tied_weights_count_once():
    tied, untied = (plan(small_config(tie_word_embeddings=tie), **STEP) for tie in (True, False))
    assert untied.parameters - tied.parameters == 512 * 128


def test_image_parallelism_plans_the_process_with_most_images():
    """Five images of two processes: three of them, and all of the text."""
    per_image = small_config().image_seq_length
    options = dict(sequence_length=5 * per_image + 40, images=5, activation_checkpointing=True)
    split = Planner(small_config(), world_size=2, image_parallel=2, **options)
    alone = Planner(small_config(), world_size=2, **options | {"sequence_length": 3 * per_image + 40, "images": 3})
    whole = Planner(small_config(), world_size=2, **options)
    assert split.text_tokens == whole.text_tokens == alone.text_tokens
    assert split.plan(1) == alone.plan(1)
    assert split.plan(1).total < whole.plan(1).total

    long = dict(options, sequence_length=5 * per_image + LONG_TEXT)  # the text is shared too
    shared, every = (Planner(small_config(), world_size=2, image_parallel=n, **long).plan(1) for n in (2, 1))
    half = dict(options, sequence_length=3 * per_image + LONG_TEXT // 2, images=3)
    alone = Planner(small_config(), world_size=2, **half).plan(1).forward_backward
    assert shared.forward_backward.activations == alone.activations
    exchanged = shared.forward_backward.buffers - alone.buffers
    assert 0 < exchanged < every.forward_backward.activations
    assert shared.total < every.total
    for wrong, message in ((3, "image_parallel=3 does not divide world_size=2"), (0, "image_parallel=0 is too small")):
        with pytest.raises(ValueError, match=message):
            Planner(small_config(), world_size=2, image_parallel=wrong, **options)


def test_activation_checkpointing_holds_less():
    plain, recomputed = (plan(small_config(8), activation_checkpointing=on, **STEP).forward_backward for on in (False, True))
    assert recomputed.activations < plain.activations / 2
    assert recomputed.weights == plain.weights


def test_accumulated_gradients_outlive_a_forward():
    parts = ("projector", "embeddings", "language")
    one, several = (plan(small_config(), train=parts, gradient_accumulation=on, **STEP) for on in (False, True))
    assert several.forward_backward.gradients == 2 * several.trained
    assert several.total >= one.total


def test_more_supervised_tokens_need_more_logits():
    few, many = (plan(small_config(vocab_size=8192), supervised_share=share, **STEP).total for share in (0.1, 0.9))
    assert many > few


# -- DeepSpeed's arithmetic, by hand -----------------------------------------------------------------------------------

# 1,000 frozen and 240 trained elements in bfloat16; 4 GPUs, so partitions of 60. "auto" buckets hold 10 * 10 elements.
SIZES = ModelSizes(parameters=(1000, 40, 150, 50), trained=(40, 150, 50), largest_module=1000, hidden=10, element=2)
TRACE = ActivationMemory(peak=5000, gradients=0)


def test_without_deepspeed_each_gpu_holds_everything():
    forward, step, cpu = model_states(SIZES, ActivationMemory(peak=5000, gradients=100))
    assert forward == PhaseMemory(weights=2480, gradients=100, optimizer=960, activations=4900, buffers=0)
    assert step == PhaseMemory(weights=2480, gradients=480, optimizer=960, activations=0, buffers=0)
    assert cpu == 0


def test_data_parallelism_copies_gradients_into_buckets():
    forward, step, _ = model_states(SIZES, TRACE, world_size=4)
    assert forward.buffers == step.buffers == 480


def test_zero_2_partitions_gradients_and_optimizer_states():
    forward, step, cpu = model_states(SIZES, ActivationMemory(peak=5400, gradients=400), "zero2", world_size=4)
    # The 150 cross the cuts at 60, 120 and 180: the first GPU holds both them and the 40 whole, the third and the last less.
    held = arriving_gradients(SIZES, "zero2", 4, accumulation=False)
    assert held == 2 * (150 + 50)
    assert forward == PhaseMemory(weights=2480, gradients=held, optimizer=12 * 60, activations=5000, buffers=3 * 2 * 100)
    # The partition flattened and in float32, or one gradient in float64: 6 x 60 or 8 x 60.
    assert step == PhaseMemory(weights=2480, gradients=held, optimizer=720, activations=0, buffers=600 + 480)
    assert cpu == 0


def test_zero_1_keeps_the_large_gradients_of_others_too():
    # Of 40, 150, 120 and 30 the first of two GPUs owns 40 and 130 of the 150; the 120 are larger than a bucket and stay.
    sizes = ModelSizes(parameters=(40, 150, 120, 30), trained=(40, 150, 120, 30), largest_module=150, hidden=10, element=2)
    assert arriving_gradients(sizes, "zero2", 2, accumulation=False) == 2 * max(40 + 150, 150 + 120 + 30)
    assert arriving_gradients(sizes, "zero1", 2, accumulation=False) == 2 * (150 + 120 + 40)
    assert model_states(sizes, TRACE, "zero1", 2)[1].gradients == 2 * 300  # released before the step


@pytest.mark.parametrize(
    ("zero", "there", "arriving"), [(None, 480, 0), ("zero1", 480, 400), ("zero2", 400, 400), ("zero3", 2 * 61, 0)]
)
def test_accumulation_keeps_the_gradients_of_earlier_micro_batches(zero, there, arriving):
    forward, _, _ = model_states(SIZES, TRACE, zero, world_size=4, accumulation=True)
    assert forward.gradients == there
    assert arriving_gradients(SIZES, zero, 4, accumulation=True) == arriving


def test_zero_3_partitions_the_weights_too():
    forward, step, cpu = model_states(SIZES, TRACE, "zero3", world_size=4)
    assert forward.weights == 2 * (250 + 10 + 38 + 13)
    assert forward.gradients == 2 * (10 + 38 + 13)
    assert forward.optimizer == 12 * (10 + 38 + 13)
    assert forward.buffers == 2 * (1000 + 240) + 3 * 2 * 100  # so small a model is gathered whole
    assert step.buffers == 600 + (2 + 4) * 61
    assert cpu == 0


def test_zero_3_gathers_a_layer_and_copies_it_out_of_one_tensor():
    def buffers(**sizes):
        large = replace(SIZES, parameters=(10**9, 10**9), **sizes)
        return model_states(large, TRACE, "zero3", world_size=4)[0].buffers

    # Two layers more are prefetched, and copied out too.
    assert buffers(largest_layer=10**8) - buffers(largest_layer=0) == 2 * (2 * 10**8 - SIZES.largest_module + 4 * 10**8)
    assert buffers(largest_layer=10**8, largest_module=3 * 10**8) - buffers(largest_module=3 * 10**8) == 2 * 4 * 10**8
    # Near 10^9 live parameters, of which half may be kept for later, nothing is.
    assert buffers(largest_layer=5 * 10**8) - buffers(largest_layer=0) == 2 * (2 * 5 * 10**8 - SIZES.largest_module)


def test_zero_3_gathers_a_tower_at_once_before_the_decoder():
    sizes = replace(SIZES, parameters=(10**9, 10**9), largest_layer=10**8)
    alone = model_states(sizes, TRACE, "zero3", world_size=4)[0]
    small, large = (
        model_states(replace(sizes, tower_at_once=numel), TRACE, "zero3", world_size=4)[0] for numel in (10**8, 5 * 10**8)
    )
    assert small == alone  # before the decoder's layers keep anything
    assert large == replace(alone, activations=0, buffers=2 * (2 * 5 * 10**8 + 2 * 2 * 10**8) + 600)


def test_offloading_moves_everything_but_the_work_to_main_memory():
    forward, _, cpu = model_states(SIZES, TRACE, "zero3-offload", world_size=4)
    assert (forward.weights, forward.gradients, forward.optimizer) == (0, 0, 0)
    assert cpu == 2 * (250 + 61) + 2 * 61 + (12 + 4) * 61


def test_fsdp_shards_everything_in_float32_where_it_is_trained():
    # Layers of 400 elements; 300 outside of layers and embeddings.
    sizes = replace(SIZES, largest_layer=400, layers=(600, 800), unlayered=300)
    forward, step = fsdp_states(sizes, TRACE, world_size=4)
    assert forward.weights == step.weights == 2 * 250 + 4 * (10 + 38 + 13)
    assert forward.gradients == step.gradients == 4 * 61
    assert forward.optimizer == step.optimizer == 8 * 61
    # Of frozen weights in 8 bits a share, and those outside of layers gathered too.
    in_8_bits = replace(sizes, in_8_bits=1001, layers=(900, 500, 500, 700), unlayered_in_8_bits=70)
    assert fsdp_states(in_8_bits, TRACE, world_size=4)[0].weights == forward.weights + 251
    assert fsdp_states(in_8_bits, TRACE, world_size=4)[0].buffers == 2 * 300 + 70 + (900 + 500 + 900) + 4 * 240
    # A layer, the next twice, and what stays gathered, in 16 bits; whole gradients of at most what is trained, in float32.
    assert forward.buffers == 2 * 300 + (600 + 800 + 800) + 4 * 240
    alone = replace(sizes, layers=(800,)), replace(sizes, layers=())
    assert [fsdp_states(one, TRACE, world_size=4)[0].buffers for one in alone] == [600 + 3 * 800 + 4 * 240, 600 + 4 * 240]
    assert (step.buffers, forward.activations, step.activations) == (0, 5000, 0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_under_fsdp_needs_less_than_under_data_parallelism(checkpointing):
    options = dict(world_size=4, activation_checkpointing=checkpointing, train=[*DEFAULT, "language"], **STEP)
    deep = small_config(layers=12)
    whole = plan(deep, mixed_precision=True, dtype="bfloat16", **options)
    sharded = plan(deep, fsdp=True, dtype="bfloat16", **options)
    assert sharded.total < 0.6 * whole.total
    assert plan(deep, fsdp=True, dtype="bfloat16", gradient_accumulation=True, **options) == sharded


def test_more_gpus_never_need_more_each():
    totals = [
        plan(small_config(), train=("projector", "embeddings", "language"), world_size=n, deepspeed="zero3", **STEP).total
        for n in (1, 2, 8)
    ]
    assert totals == sorted(totals, reverse=True)


# -- the largest micro-batch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_largest_micro_batch_fits_and_the_next_does_not(checkpointing):
    planner = Planner(small_config(4), activation_checkpointing=checkpointing, **STEP)
    gpu = 2.5 * GIB
    largest = planner.largest_micro_batch(gpu)
    assert largest > 1
    assert planner.plan(largest).total <= usable(gpu) < planner.plan(largest + 1).total


def test_where_one_sample_does_not_fit_the_largest_micro_batch_is_zero():
    assert largest_micro_batch(small_config(), 2 * GIB, **STEP) == 0


# -- errors and the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(world_size=0), r"world_size=0 is too small; pass 1 or more"),
        (dict(micro_batch=0), r"micro_batch=0 is too small; pass 1 or more"),
        (dict(images=-1), r"images=-1 is too small; pass 0 or more"),
        (dict(lora_rank=-4), r"lora_rank=-4 is too small; pass 0 or more"),
        (dict(deepspeed="zero4"), r"deepspeed='zero4' is unknown; choose from zero1, zero2, zero3, zero3-offload"),
        (dict(train=["eyes"]), r"train='eyes' is unknown; choose from projector, embeddings, vision, language, head"),
        (dict(train=[]), r"trains nothing; name parts .*, or pass a lora_rank"),
        (dict(train=["language"], lora_rank=4), r"lora_rank=4 freezes .* train contains 'language'; pass one of them"),
        (dict(sequence_length=34, images=2), r"sequence_length=34 is too short: 2 images take 34 .* at least 35"),
        (dict(supervised_share=0), r"supervised_share=0 is out of range; pass a number above 0 and at most 1"),
        (dict(deepspeed="zero2", fsdp=True), "deepspeed='zero2' with fsdp=True: both shard the model; pass one of them"),
        (dict(dtype="int8"), r"dtype='int8' is unknown; choose from bfloat16, float16, float32"),
    ],
)
def test_an_error_says_what_was_wrong_and_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        plan(small_config(), **options)


def test_a_tied_head_is_not_trained_alone():
    with pytest.raises(ValueError, match="tied to its embeddings.*pass embeddings=True"):
        plan(small_config(tie_word_embeddings=True), train=["head"])


@pytest.fixture
def checkpoint(tmp_path):
    """A directory with a configuration and nothing else."""
    small_config().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".py"] == ["config.json"]
    return str(tmp_path)


MIXED = {"mixed_precision": True}  # as the command plans


def test_the_command_prints_a_table_and_the_largest_micro_batch(checkpoint, capsys):
    assert main(["plan", "--model", checkpoint, "--sequence-length", "64", "--gpu-memory", "2.2"]) == 0
    out = capsys.readouterr().out
    rows = {line[:20].strip(): line[20:].replace(",", "").split() for line in out.splitlines()}
    assert rows["MiB"] == ["forward", "+", "backward", "optimizer", "step"]
    parts = ("weights", "gradients", "optimizer states", "activations", "buffers")
    for column in (0, 1):
        total = sum(float(rows[part][column]) for part in parts)
        assert float(rows["total per GPU"][column]) == pytest.approx(total, abs=0.03)
    assert 1 < float(rows["total per GPU"][0]) < 1024  # a small model's numbers can be read
    assert "million parameters, " in out.splitlines()[0]
    *_, verdict, last = out.splitlines()
    assert verdict.startswith("a micro-batch of 1 fits a GPU of 2.2 GiB, of which 92.16 MiB are usable")
    assert last.startswith("largest micro-batch for a GPU of 2.2 GiB: ")
    assert int(last.rpartition(" ")[2]) == largest_micro_batch(small_config(), 2.2 * GIB, **MIXED, sequence_length=64)


def test_the_former_flag_of_images_is_read_with_a_warning(checkpoint, capsys, caplog):
    tables = []
    for flag in ("--images", "--pictures"):
        assert main(["plan", "--model", checkpoint, "--sequence-length", "64", flag, "2"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert "--pictures is deprecated and will be removed in dsvl 0.3; use --images." in caplog.text


def test_the_command_says_what_to_do_where_nothing_fits(checkpoint, capsys):
    arguments = ["plan", "--model", checkpoint, "--gpu-memory", "1", "--deepspeed", "zero3-offload", "--world-size", "2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "main memory, for each GPU: " in out and "for each GPU: 0.00" not in out
    assert "a micro-batch of 1 does not fit a GPU of 1 GiB, of which 0.00 MiB are usable" in out
    assert out.splitlines()[-1] == "not even a micro-batch of 1 fits a GPU of 1 GiB; try GPUs with more memory."
    arguments[arguments.index("1")] = "2.2"
    assert main([*arguments, "--sequence-length", "1000000"]) == 0
    said = "fits a GPU of 2.2 GiB; try --activation-checkpointing or a shorter --sequence-length."
    assert capsys.readouterr().out.splitlines()[-1].endswith(said)


@pytest.mark.parametrize("memory", ["nan", "inf", "0", "-5"])
def test_the_memory_of_a_gpu_is_a_positive_number(checkpoint, capsys, memory):
    assert main(["plan", "--model", checkpoint, f"--gpu-memory={memory}"]) == 1
    assert f"--gpu-memory {memory}: pass a positive number of GiB" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-parallel", "2", "--compile-decoder-layers"], "--image-parallel 2 with --compile-decoder-layers"),
        (["--image-parallel", "2", "--fsdp"], "--image-parallel 2 with --fsdp"),
        (["--fsdp", "--dtype", "float16"], "--fsdp with --fp16"),
        (["--fsdp", "--deepspeed", "zero2"], "--fsdp with --deepspeed"),
        (["--deepspeed", "zero3", "--frozen-precision", "int8"], "choose --fsdp, or --deepspeed zero2"),
        (["--frozen-precision-keep", "layers.0"], "--frozen-precision-keep without --frozen-precision"),
        (["--tiled-mlp", "0"], "--tiled-mlp 0: pass a positive number"),
        (["--lora-rank", "4", "--train", "language"], "or pass --no-lora-language"),
    ],
)
def test_the_command_refuses_what_training_refuses(checkpoint, capsys, flags, message):
    assert main(["plan", "--model", checkpoint, "--world-size", "2", *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_micro_batch_that_was_asked_for_may_not_fit(checkpoint, capsys):
    largest = largest_micro_batch(small_config(), 2.2 * GIB, **MIXED, sequence_length=64)
    for micro_batch, verdict in ((largest, "fits"), (largest + 1, "does not fit")):
        arguments = ["plan", "--model", checkpoint, "--sequence-length", "64", "--gpu-memory", "2.2"]
        assert main([*arguments, "--micro-batch", str(micro_batch)]) == 0
        assert f"a micro-batch of {micro_batch} {verdict} a GPU of 2.2 GiB" in capsys.readouterr().out


def test_large_models_are_in_gib():
    memory = PhaseMemory(3 * GIB, GIB, GIB, GIB, 0)
    lines = table(MemoryPlan(7 * 10**9, 10**8, memory, memory, cpu=2 * GIB)).splitlines()
    assert lines[0] == "7.00 billion parameters, 100.00 million of them trained"
    assert lines[1].startswith("GiB ") and lines[-2].split()[-2:] == ["6.00", "6.00"]
    assert lines[-1] == "main memory, for each GPU: 2.00 GiB"


def test_the_command_refuses_what_is_no_dsvl(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert main(["plan", "--model", str(tmp_path)]) == 1
    assert "is of type 'llama', not a DSVL checkpoint" in capsys.readouterr().err
    assert main(["plan", "--model", str(tmp_path / "nothing")]) == 1
    assert "nothing does not exist" in capsys.readouterr().err


def test_the_plan_rounds_like_the_allocator():
    with AllocationCounter() as counter:
        kept = torch.empty(129, dtype=torch.float32, device="meta")
    assert counter.peak == math.ceil(129 * 4 / ALLOCATION) * ALLOCATION and kept.is_meta


# -- recipes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [False, True])
@pytest.mark.parametrize("world_size", [1, 2])
def test_trainable_weights_are_float32_in_mixed_precision(world_size, accumulation):
    """Weights and both moments take 2 bytes more, DDP's buckets too, and autocast keeps a copy in 16 bits. Gradients take 2
    bytes more where there are any."""
    options = dict(sequence_length=64, dtype="bfloat16", world_size=world_size, gradient_accumulation=accumulation)
    plain, mixed = (plan(small_config(), mixed_precision=mixed, **options) for mixed in (False, True))
    more = 3 * 2 + 2 + 2 * (world_size > 1)
    for before, after in ((plain.forward_backward, mixed.forward_backward), (plain.optimizer_step, mixed.optimizer_step)):
        assert after.total - before.total == more * plain.trained + before.gradients
    assert (plain.forward_backward.gradients > 0) == accumulation
    zero = [plan(small_config(), deepspeed="zero2", mixed_precision=mixed, **options) for mixed in (False, True)]
    assert zero[0] == zero[1]  # DeepSpeed keeps its own copies


RECIPE = """
bf16: true
stages:
  - {name: align, train: [projector], per_device_train_batch_size: 4, max_length: 64}
  - name: full
    train: [projector, language]
    deepspeed: zero2
    gradient_accumulation_steps: 2
    activation_checkpointing: true
"""


@pytest.fixture
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_every_stage_of_a_recipe_is_planned(checkpoint, recipe, capsys):
    flags = ["--model", checkpoint, "--gpu-memory", "2.2", "--world-size", "2", "--sequence-length", "128"]
    assert main(["plan", recipe, *flags]) == 0
    out = capsys.readouterr().out
    planners = [
        Planner(
            small_config(), world_size=2, train=["projector"], sequence_length=64, dtype="bfloat16", mixed_precision=True
        ),
        Planner(
            small_config(),
            world_size=2,
            train=["projector", "language"],
            sequence_length=128,
            deepspeed="zero2",
            activation_checkpointing=True,
            gradient_accumulation=True,
            dtype="bfloat16",
        ),
    ]
    heads, *rows = [re.split(r"  +", line) for line in out.splitlines()[-3:]]
    assert heads == ["stage", "micro-batch", "per GPU", "fits", "largest micro-batch"]
    for row, name, micro_batch, planner in zip(rows, ("align", "full"), (4, 8), planners, strict=True):
        largest = planner.largest_micro_batch(2.2 * GIB)
        assert row == [name, str(micro_batch), size(planner.plan(micro_batch).total), "yes", str(largest)]
        assert largest > micro_batch and planner.plan(largest + 1).total > usable(2.2 * GIB)
    assert "stage align: 64 tokens and 1 images a sample" in out and "stage full: 128 tokens" in out


def test_the_remedies_of_a_stage_are_its_values(checkpoint, recipe, capsys):
    flags = ["--model", checkpoint, "--gpu-memory", "2.2", "--stage", "align.max_length=1000000"]
    assert main(["plan", recipe, *flags]) == 0
    out = capsys.readouterr().out
    assert "try --stage align.activation_checkpointing=true" in out and "--stage align.deepspeed=zero3 on more GPUs" in out
    assert "or a smaller max_length (--stage align.max_length=N)" in out
    flags += ["--stage", "align.activation_checkpointing=true", "--stage", "align.deepspeed=zero3"]
    assert main(["plan", recipe, *flags]) == 0


def test_one_value_of_a_stage_can_be_planned_differently(checkpoint, recipe, capsys):
    for value, fits in (("4", "yes"), ("4000", "no")):
        stage = ["--stage", f"align.per_device_train_batch_size={value}"]
        assert main(["plan", recipe, "--model", checkpoint, "--gpu-memory", "2.2", *stage]) == 0
        row = re.split(r"  +", capsys.readouterr().out.splitlines()[-2])
        assert row[1] == value and row[3] == fits


def test_a_recipe_that_composes_is_planned_from_the_configurations(tmp_path, recipe, capsys):
    folder = tmp_path / "parts"
    model = dsvl.DSVLConfig.from_pretrained(make_checkpoint(folder))
    for name in ("tower", "llama"):
        (folder / name / "model.safetensors").unlink()
    composed = composed_config(compose_arguments({"vision": folder / "tower", "language": folder / "llama"}, "out"))
    assert composed.image_seq_length == model.image_seq_length
    assert composed.text_config.vocab_size == model.text_config.vocab_size
    text = RECIPE + f"compose: {{vision: {folder / 'tower'}, language: {folder / 'llama'}}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert main(["plan", str(tmp_path / "recipe.yaml"), "--gpu-memory", "3"]) == 0
    assert "largest micro-batch" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ["--lora-rank", "4"],
            "--lora-rank with a recipe, which sets it for each stage; change the recipe, or pass --stage.",
        ),
        (["--dtype", "float16"], "--dtype with a recipe, which sets it for each stage;"),
        (["--fsdp"], "--fsdp with a recipe, which sets it for each stage;"),
        (["--stage", "align.max_length=4", "--images", "1"], "stage 'align': sequence_length=4 is too short: 1 images take"),
        (["--stage", "alin.max_length=4"], "no stage has the name alin; the stages are align, full; did you mean align?"),
    ],
)
def test_what_a_recipe_sets_is_not_a_flag_of_the_plan(checkpoint, recipe, capsys, flags, message):
    assert main(["plan", recipe, "--model", checkpoint, *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_plan_needs_a_model(recipe, capsys):
    assert main(["plan"]) == 1 and "No model; pass --model DIR, or a recipe." in capsys.readouterr().err
    assert main(["plan", recipe]) == 1
    assert "has neither `model` nor `compose`; pass --model DIR." in capsys.readouterr().err
    assert main(["plan", "--stage", "a.b=c"]) == 1 and "--stage a.b=c without a recipe" in capsys.readouterr().err


def real_config(name):
    """The configurations of the models that the package's recipes name, or of their size."""
    towers = {
        "openai/clip-vit-large-patch14": dict(image_size=224),
        "openai/clip-vit-large-patch14-336": dict(image_size=336),
    }
    clip = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
    sizes = {
        "Qwen/Qwen2.5-7B-Instruct": Qwen2Config(
            vocab_size=152064,
            hidden_size=3584,
            intermediate_size=18944,
            num_hidden_layers=28,
            num_attention_heads=28,
            num_key_value_heads=4,
        ),
        "lmsys/vicuna-7b-v1.5": LlamaConfig(vocab_size=32064),
        "meta-llama/Llama-2-7b-hf": LlamaConfig(vocab_size=32064),
    }
    if name["vision"] in towers:
        vision = CLIPVisionConfig(**clip, **towers[name["vision"]])
    else:
        assert name["vision"] == "google/siglip-so400m-patch14-384"
        heads = dict(num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14)
        vision = SiglipVisionConfig(hidden_size=1152, intermediate_size=4304, **heads)
    return DSVLConfig(vision, sizes[name["language"]], image_token_id=32000, num_prefix_tokens=int(name["vision"] in towers))


@pytest.mark.slow
@pytest.mark.parametrize("name", ready_recipes())
def test_every_ready_recipe_fits_into_the_gpus_that_it_names(name, tmp_path):
    content = yaml.safe_load(ready_recipes()[name].read_text())
    real_config(content["compose"]).save_pretrained(tmp_path)
    gpus, memory = (1, 24) if name == "lora-24gb" else (8, 80)
    images = 2 if name == "visualchat" else 1
    for stage in plan_stages(name, ["--model", str(tmp_path)], world_size=gpus, images=images):
        assert stage.micro_batch <= stage.planner.largest_micro_batch(memory * GIB), stage.name


def eight_layers():
    """LLaMA-7B's, with a small tower."""
    return DSVLConfig(tiny_vision_config(), LlamaConfig(vocab_size=32064, num_hidden_layers=8))


def test_tiles_and_offloading_save_what_they_hold():
    """The MLP's intermediate states of all but a tile; the inputs of all layers but the two that are being copied."""
    config, sizes = eight_layers(), {"sequence_length": 20_000, "images": 64, "activation_checkpointing": True}
    plain, tiled, offloaded = (
        plan(config, dtype="bfloat16", **sizes, **options)
        for options in ({}, {"mlp_tile": 2048}, {"mlp_tile": 2048, "offload_activations": True})
    )
    hidden, mlp = (2 * 20_000 * width for width in (config.text_config.hidden_size, config.text_config.intermediate_size))
    assert plain.forward_backward.activations - tiled.forward_backward.activations > 2 * mlp
    saved = tiled.forward_backward.activations - offloaded.forward_backward.activations
    assert 4 * hidden < saved < 8 * hidden  # two are in flight, one is fetched in advance
    assert 8 * hidden <= offloaded.cpu < 12 * hidden and tiled.cpu == 0


def test_the_flags_that_make_a_sample_fit_are_named(tmp_path, capsys):
    config = eight_layers()
    config.save_pretrained(tmp_path)
    arguments = ["plan", "--model", str(tmp_path), "--sequence-length", "60000", "--images", "200", "--gpu-memory", "18"]
    assert main([*arguments, "--dtype", "bfloat16"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "try --activation-checkpointing --tiled-mlp 8192 --offload-activations (then it fits, with " in last
    flags = ["--activation-checkpointing", "--tiled-mlp", "8192", "--offload-activations"]
    assert main([*arguments, "--dtype", "bfloat16", *flags]) == 0
    out = capsys.readouterr().out
    assert "a micro-batch of 1 fits a GPU of 18 GiB" in out and "main memory, for each GPU: " in out
    with pytest.raises(ValueError, match="offload_activations=True without activation_checkpointing"):
        plan(config, offload_activations=True)

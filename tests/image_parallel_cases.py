"""Losses and gradients of image-parallel models over gloo processes, beside those of one; see test_image_parallel.py.

    python image_parallel_cases.py OUTPUT PROCESSES PORT CASE...

The processes are forked, so that torch is imported once. The first writes the largest differences of every case to the file
OUTPUT, as JSON.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from conftest import IMAGE_ID, PAD_ID, batch, random_images, rows, tiny_model
from layout_models import SIZES, layout_parts, noise
from plain_kernels import use_plain_kernels
from torch import distributed, nn

from dsvl.acceleration.attention import kernels
from dsvl.acceleration.parallel import split_batch
from dsvl.acceleration.parallel.image_parallelism import image_parallel
from dsvl.positions_dsvl import token_positions
from dsvl.training.distributed import destroy_process_groups
from dsvl.training.frozen_precision import freeze_in_8_bits

Inputs = dict[str, Any]
DEALT = ", text dealt out"  # after the name of a case
CASES: dict[str, Callable[[], tuple[Any, Inputs]]] = {}


def case(make: Callable[[], tuple[Any, Inputs]]) -> Callable[[], tuple[Any, Inputs]]:
    """Register a case: a function that makes a model and the batch of all processes."""
    CASES[make.__name__] = make
    return make


def trained(model: Any) -> Any:
    """A model in training mode, of which everything is trained."""
    model.set_trainable(vision_tower=True, language_model=True, lm_head=True)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):  # transformers' norms compute in float32
            module.forward = MethodType(float64_norm, module)
    model.loss_function = float64_loss
    return model.train()


def float64_norm(norm: Any, states: torch.Tensor) -> torch.Tensor:
    epsilon = getattr(norm, "variance_epsilon", None) or norm.eps
    factor = 1 + norm.weight if "Gemma" in type(norm).__name__ else norm.weight
    return states * (states.square().mean(-1, keepdim=True) + epsilon).rsqrt() * factor


def float64_loss(logits: torch.Tensor, shift_labels: torch.Tensor, num_items_in_batch: Any, **_: Any) -> torch.Tensor:
    """As transformers' loss, which computes in float32."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), shift_labels.flatten(), reduction="sum") / num_items_in_batch


def labelled(inputs: Inputs) -> Inputs:
    """With labels for all text that does not follow an image."""
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == IMAGE_ID, -100)
    if (mask := inputs.get("attention_mask")) is not None:
        labels = labels.masked_fill(mask == 0, -100)
    labels[:, 1:] = labels[:, 1:].masked_fill(ids[:, :-1] == IMAGE_ID, -100)
    return inputs | {"labels": labels}


def packed(*packs: tuple[str, ...]) -> Inputs:
    """Rows of several documents each, padded at the end by a document of its own."""
    made = [(rows(*layouts), layouts) for layouts in packs]
    lengths = [sum(map(len, documents)) for documents, _ in made]
    ids = torch.full((len(made), max(lengths) + 1), PAD_ID)
    document_ids = torch.zeros_like(ids)
    for row, (documents, _) in enumerate(made):
        start = 0
        for number, document in enumerate(documents, start=1):
            ids[row, start : start + len(document)] = torch.tensor(document)
            document_ids[row, start : start + len(document)] = number
            start += len(document)
    images = sum(layout.count("I") for _, layouts in made for layout in layouts)
    return labelled({"input_ids": ids, "document_ids": document_ids, "pixel_values": random_images(images)})


UNEVEN = ("ttIttIItt", "ttttttItttt", "tttt")


@case
def uneven_rows() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama")), labelled(batch(*UNEVEN))


@case
def padded_on_the_right() -> tuple[Any, Inputs]:
    return trained(tiny_model("qwen3")), labelled(batch("ttItt", "IIIItttItt", side="right"))


@case
def one_image_for_all() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama")), labelled(batch("ttItt"))


@case
def text_alone() -> tuple[Any, Inputs]:
    inputs = labelled(batch("tttttt", "ttt"))
    del inputs["pixel_values"]
    return trained(tiny_model("llama")), inputs


@case
def rows_of_few_texts() -> tuple[Any, Inputs]:
    """Fewer than processes, and one without text."""
    return trained(tiny_model("llama")), labelled(batch("tItt", "II", "ttttt"))


@case
def packed_rows() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama")), packed(("ttItt", "IItItt", "ttt"), ("tttt", "IttIt"))


@case
def numbered_images() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama", numbered_images=2)), labelled(batch("ttIttIIItt", "ttItttt", "tttt"))


@case
def numbered_images_of_packed_rows() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama", numbered_images=4)), packed(("ttItt", "IItItt", "ttt"), ("tttt", "IttIt"))


@case
def packed_rows_in_windows() -> tuple[Any, Inputs]:
    return trained(tiny_model("mistral")), packed(("ttItttt", "IItItttttt"), ("tttt", "IttItttttttttIttt"))


@case
def documents_by_positions() -> tuple[Any, Inputs]:
    inputs = packed(("ttItt", "IItItt"), ("tttt", "IttIt"))
    inputs["position_ids"] = token_positions(inputs.pop("document_ids"))
    return trained(tiny_model("llama")), inputs


@case
def windows() -> tuple[Any, Inputs]:
    return trained(tiny_model("mistral")), labelled(batch("ttIttttIIttttttttt", "tIttt"))


@case
def two_layer_types_and_capped_scores() -> tuple[Any, Inputs]:
    return trained(tiny_model("gemma2", backend="flex_attention")), labelled(batch(*UNEVEN))


@case
def shared_positions() -> tuple[Any, Inputs]:
    return trained(tiny_model("gemma3_text", image_positions="image")), labelled(batch(*UNEVEN))


@case
def shared_positions_of_packed_rows() -> tuple[Any, Inputs]:
    model = trained(tiny_model("llama", image_positions="image"))
    return model, packed(("ttItt", "IItItt", "ttt"), ("tttt", "IttIt"))


@case
def checkpointed() -> tuple[Any, Inputs]:
    model = trained(tiny_model("llama"))
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model, labelled(batch(*UNEVEN))


@case
def checkpointed_with_reentrance() -> tuple[Any, Inputs]:
    model = trained(tiny_model("llama"))
    model.activation_checkpointing_enable({"use_reentrant": True})
    return model, labelled(batch(*UNEVEN))


@case
def reduced_memory() -> tuple[Any, Inputs]:
    model = trained(tiny_model("llama"))
    model.reduce_memory(mlp_tile=4, skip_image_queries=True)
    model.activation_checkpointing_enable({"use_reentrant": False})
    return model, labelled(batch(*UNEVEN))


@case
def adapters() -> tuple[Any, Inputs]:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = trained(tiny_model("llama"))
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "fc1"], modules_to_save=["multi_modal_projector"])
    model = get_peft_model(model, config).to(torch.float64)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model.train(), labelled(batch(*UNEVEN))


def with_8_bit_weights(precision: str) -> tuple[Any, Inputs]:
    """Adapters on linear layers in 8 bits."""
    model, inputs = adapters()
    freeze_in_8_bits(model, precision, ["none"])
    return model, inputs


@case
def frozen_in_int8() -> tuple[Any, Inputs]:
    return with_8_bit_weights("int8")


@case
def frozen_in_fp8() -> tuple[Any, Inputs]:
    """For numbers of processes that are powers of two, by which gradients are scaled: others change what is rounded."""
    return with_8_bit_weights("fp8")


@case
def cached_features() -> tuple[Any, Inputs]:
    model = tiny_model("llama")
    inputs = labelled(batch(*UNEVEN))
    with torch.no_grad():
        features = model.get_image_features(inputs.pop("pixel_values")).last_hidden_state
    model = trained(model)
    model.model.vision_tower.requires_grad_(False)
    return model, inputs | {"image_features": features}


def of_layout(layout: str, *counts: int) -> tuple[Any, Inputs]:
    """Conversations with so many images of different sizes."""
    model, processor = layout_parts(layout)
    images = iter([noise(size, seed) for seed, size in enumerate(SIZES)])
    conversations = [
        [
            *({"type": "image", "image": next(images)} for _ in range(count)),
            {"type": "text", "text": "one, two"[: 3 + count]},
        ]
        for count in counts
    ]
    inputs = processor.apply_chat_template(
        [
            [
                {"role": "user", "content": [*content, {"type": "text", "text": "red?"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "two blue"}]},
            ]
            for content in conversations
        ],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    labels = inputs["input_ids"].clone()
    labels[:, :-6] = -100
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    return trained(model), dict(inputs) | {"labels": labels}


@case
def images_of_tiles() -> tuple[Any, Inputs]:
    return of_layout("tiles", 4, 1, 0)


@case
def native_images() -> tuple[Any, Inputs]:
    model, inputs = of_layout("native, downsample", 4, 1, 0)
    model.model.vision_tower.embeddings.position_embedding.requires_grad_(False)  # the tower resizes it in float32
    return model, inputs


@case
def text_alone_of_numbered_tiles() -> tuple[Any, Inputs]:
    return of_layout("tiles", 0, 0)


@case
def text_alone_beside_a_native_tower() -> tuple[Any, Inputs]:
    return of_layout("native, downsample", 0, 0)


@case
def the_sum_of_many_batches() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama")), labelled(batch(*UNEVEN)) | {"num_items_in_batch": torch.tensor(57)}


@case
def fused_kernels() -> tuple[Any, Inputs]:
    return trained(tiny_model("llama")), labelled(batch(*UNEVEN))


@case
def fused_kernels_in_windows() -> tuple[Any, Inputs]:
    return trained(tiny_model("gemma2", backend="flex_attention")), labelled(batch("ttIttttIIttttttttt", "tIttt"))


@case
def fused_kernels_packed() -> tuple[Any, Inputs]:
    return trained(tiny_model("mistral")), packed(("ttItttt", "IItItttttt"), ("tttt", "IttItttttttttIttt"))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    made = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    return {name: torch.zeros(()) if gradient is None else gradient for name, gradient in made.items()}


# -- generation --------------------------------------------------------------------------------------------------------

Answers = Callable[[Any, Inputs], torch.Tensor]
GENERATIONS: dict[str, tuple[Callable[[], Any], Inputs, Answers]] = {}


def greedy(model: Any, inputs: Inputs, **options: Any) -> torch.Tensor:
    return model.generate(**inputs, max_new_tokens=6, do_sample=False, **options)


def sampled(model: Any, inputs: Inputs) -> torch.Tensor:
    """With the random numbers of the first process, which alone is seeded as the single process is."""
    torch.manual_seed(distributed.get_rank() if "generate" in model.__dict__ else 0)
    return model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=0.7, top_p=0.9)


def from_cache(model: Any, inputs: Inputs, change: Callable[[Any], Any] = lambda cache: cache) -> torch.Tensor:
    """Two prompts over images that are encoded once, the second of some of them."""
    inputs = dict(inputs)
    cache = change(model.encode_images(inputs.pop("pixel_values"), chunk_size=2))
    answers = greedy(model, inputs, image_cache=cache)
    chosen = batch("tItIt")
    del chosen["pixel_values"]
    return torch.cat([answers.flatten(), greedy(model, chosen, image_cache=cache[[2, 0]]).flatten()])


def numbered_from_cache(model: Any, inputs: Inputs) -> torch.Tensor:
    """As `from_cache`, over images that hold numbers."""
    inputs = dict(inputs)
    cache = model.encode_images(inputs.pop("pixel_values"), chunk_size=2, image_numbers=[1, 2, 3, 1, 1])
    return greedy(model, inputs, image_cache=cache[[3, 1, 2, 0, 4]])


UNEVEN_PROMPTS = batch("ttIttIItt", "ttttttItttt", "tttIt")
GENERATIONS |= {
    "greedy": (lambda: tiny_model("llama"), UNEVEN_PROMPTS, greedy),
    "one image": (lambda: tiny_model("llama"), batch("tttIt"), greedy),
    "text alone": (lambda: tiny_model("llama"), batch("ttttt"), greedy),
    "windows of answers": (lambda: tiny_model("mistral"), UNEVEN_PROMPTS, greedy),
    "shared positions": (lambda: tiny_model("gemma3_text", image_positions="image"), UNEVEN_PROMPTS, greedy),
    "beams": (lambda: tiny_model("llama"), UNEVEN_PROMPTS, lambda *args: greedy(*args, num_beams=3)),
    "sampling": (lambda: tiny_model("llama"), UNEVEN_PROMPTS, sampled),
    "numbered": (lambda: tiny_model("llama", numbered_images=4), UNEVEN_PROMPTS, greedy),
    "numbered otherwise": (
        lambda: tiny_model("llama", numbered_images=4),
        UNEVEN_PROMPTS,
        lambda *args: greedy(*args, image_numbers=torch.tensor([3, 1, 3, 2, 4])),
    ),
    "numbered, encoded once": (lambda: tiny_model("llama", numbered_images=4), UNEVEN_PROMPTS, numbered_from_cache),
    "encoded once": (lambda: tiny_model("llama"), UNEVEN_PROMPTS, from_cache),
    "on the host": (
        lambda: tiny_model("llama"),
        UNEVEN_PROMPTS,
        lambda *args: from_cache(*args, change=lambda cache: cache.offload()),
    ),
}


def has_same_answers(name: str) -> bool:
    """Whether all processes give the answers of one."""
    make, inputs, answer = GENERATIONS[name]
    model = make()
    inputs = {key: value for key, value in inputs.items() if value is not None}
    expected = answer(model, inputs)
    with image_parallel(model):
        got = answer(model, inputs)
    same = torch.tensor(int(got.equal(expected) and "generate" not in model.__dict__))
    distributed.all_reduce(same, distributed.ReduceOp.MIN)
    return bool(same)


class Patches:
    """`monkeypatch` of `use_plain_kernels`; `undo` restores what it replaced."""

    def __init__(self) -> None:
        self.before: list[tuple[Any, str, Any]] = []

    def setattr(self, owner: Any, name: str, value: Any) -> None:
        self.before.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def undo(self) -> None:
        for owner, name, value in reversed(self.before):
            setattr(owner, name, value)


def differences(name: str, deals_text: bool) -> dict[str, float]:
    """The largest differences of a case between this process alone and all processes, of which each runs the whole text, or
    which share it."""
    model, inputs = CASES[name]()
    split_batch.deals_text = lambda *counts: deals_text  # whatever its length
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    backend = base.model.language_model.config._attn_implementation
    if backend == "flex_attention":  # has no backward pass on a CPU, except for the one of image parallelism
        base.set_attn_implementation({"text_config": "eager"})
    alone = model(**inputs).loss
    alone.backward()
    expected = gradients(model)
    patches = Patches()
    if backend == "flex_attention":
        base.set_attn_implementation({"text_config": backend})
    launched: list[int] = []
    if name.startswith("fused"):
        use_plain_kernels(patches)
        backward = kernels.launch_backward
        patches.setattr(kernels, "launch_backward", lambda *args: launched.append(1) or backward(*args))
    with image_parallel(model):
        loss = model(**inputs).loss
    loss.backward()
    worst, trained_parameters = 0.0, 0
    for key, gradient in gradients(model).items():
        mean = gradient.expand_as(expected[key]).clone()
        distributed.all_reduce(mean)
        worst = max(worst, (mean / distributed.get_world_size() - expected[key]).abs().max().item())
        trained_parameters += int(expected[key].abs().max() > 0)
    base.eval()
    asked = {key: value for key, value in inputs.items() if key not in ("labels", "num_items_in_batch")}
    with torch.no_grad():
        with image_parallel(base):
            split = base(**asked, return_dict=False)[0]
        if backend == "flex_attention":
            base.set_attn_implementation({"text_config": "eager"})
        whole = base(**asked).logits
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))[..., None]
    patches.undo()
    return {
        "loss": (loss - alone).abs().item(),
        "gradients": worst,
        "logits": ((whole - split) * real).abs().max().item(),
        "parameters": trained_parameters,
        "launched": len(launched),
        "is_restored": float("forward" not in base.__dict__),
    }


def work(rank: int, processes: int, port: int, output: str, names: list[str]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    found: dict[str, Any] = {}
    for name in names:
        case, is_dealt = name.removesuffix(DEALT), name.endswith(DEALT)
        found[name] = differences(case, is_dealt) if case in CASES else has_same_answers(name)
    if rank == 0:
        with open(output, "w", encoding="utf-8") as file:
            json.dump(found, file)
    distributed.barrier()
    destroy_process_groups()


if __name__ == "__main__":
    torch.set_num_threads(1)
    path, count, its_port, *chosen = sys.argv[1:]
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=work, args=(rank, int(count), int(its_port), path, chosen)) for rank in range(int(count))
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    sys.exit(max(abs(child.exitcode or 0) for child in children))

"""TRL's trainers on a DSVL model: prompts with 0 to 3 images, with LoRA and without, and what becomes of the result."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_environment import plain_packages, run_plainly
from training_runs import WORDS, make_checkpoint, make_conversations, make_layout_checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

from dsvl.cli import main
from dsvl.data import trl_dataset
from dsvl.training import ConversationCollator, lora_config

trl = pytest.importorskip("trl")
from trl.experimental.orpo import ORPOConfig, ORPOTrainer  # noqa: E402
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling  # noqa: E402

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "preference-tuning.md"
KINDS = {"SFT": "messages", "DPO": "preference", "KTO": "unpaired", "GRPO": "prompt", "RLOO": "prompt", "ORPO": "preference"}
# What TRL does without an argument is part of the promise: gradient checkpointing is on.
OPTIONS: dict[str, dict[str, Any]] = {
    "SFT": {"assistant_only_loss": True, "max_length": None},
    "DPO": {"max_length": None},
    "KTO": {"max_length": None},
    "GRPO": {"num_generations": 4, "max_completion_length": 4},
    "RLOO": {"num_generations": 4, "max_completion_length": 4},
    "ORPO": {"max_length": 512},
}
IMAGES = [0, 1, 2, 3, 0, 3, 2, 1]  # of the prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, and files of every kind whose prompts have 0 to 3 images."""
    folder = tmp_path_factory.mktemp("trl")
    make_checkpoint(folder)
    make_checkpoint(folder, "decided", initializer_range=0.3)  # its answers depend on the images, far from uniformly
    make_conversations(folder, "many-turns.jsonl")
    rows: dict[str, list[dict[str, Any]]] = {
        kind: [] for kind in ("messages", "preference", "unpaired", "text", "text-preference")
    }
    for index, images in enumerate(IMAGES):
        content = []
        for number in range(images):
            path = f"images/of_{index}_{number}.png"
            pixels = np.random.default_rng(10 * index + number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / path)
            content.append({"type": "image", "path": path})
        question = " ".join(WORDS[index : index + 3]) + "?"
        prompt = [{"role": "user", "content": [*content, {"type": "text", "text": question}] if content else question}]
        good, bad = ([{"role": "assistant", "content": WORDS[-1 - index - more]}] for more in (0, 1))
        rows["messages"].append({"messages": prompt + good})
        rows["preference"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        rows["unpaired"].append({"prompt": prompt, "completion": good if index % 2 else bad, "label": bool(index % 2)})
        text = [{"role": "user", "content": question}]
        rows["text"].append({"messages": text + good})
        rows["text-preference"].append({"prompt": text, "chosen": good, "rejected": bad})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def load(folder, checkpoint="model"):
    return AutoModelForImageTextToText.from_pretrained(folder / checkpoint, dtype=torch.float32)


def varied_reward(completions, **columns):
    """A reward that differs between the answers to a prompt."""
    return [sum(map(ord, completion[0]["content"])) % 7 / 7 for completion in completions]


def make_trainer(name, folder, *, checkpoint="model", data=None, lora=False, processor=None, **options):
    """A trainer of TRL over the whole model, or over adapters on the decoder and the projector."""
    trainer, config = (
        (ORPOTrainer, ORPOConfig) if name == "ORPO" else (getattr(trl, f"{name}Trainer"), getattr(trl, f"{name}Config"))
    )
    model = load(folder, checkpoint)
    every = {"projector": True, "embeddings": True, "vision_tower": True, "language_model": True, "lm_head": True}
    model.set_trainable(**every)
    if data is None:
        files = {"prompt": "messages.jsonl"}
        data = trl_dataset(folder / files.get(KINDS[name], f"{KINDS[name]}.jsonl"), KINDS[name])
    fixed = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "max_steps": 3}
    sizes = {"per_device_train_batch_size": 16 if name in ("GRPO", "RLOO") else 4, "learning_rate": 1e-3}
    arguments = config(str(folder / "run"), **(fixed | sizes | OPTIONS[name] | options))
    return trainer(
        model,
        **({"reward_funcs": varied_reward} if name in ("GRPO", "RLOO") else {}),
        args=arguments,
        train_dataset=data,
        processing_class=processor or AutoProcessor.from_pretrained(folder / "model"),
        peft_config=lora_config(model, 4, train=("projector",)) if lora else None,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_prompts_with_0_to_3_images_train(folder, name, lora):
    trainer = make_trainer(name, folder, lora=lora)
    model = trainer.model
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    trainable = {key for key, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    assert changed == trainable and len(losses(trainer)) == 3 and np.isfinite(losses(trainer)).all()
    assert any("vision_tower" in key for key in changed) != lora
    assert any("lora_A" in key for key in changed) == lora
    assert all("lora" in key or "modules_to_save" in key for key in changed) or not lora


@pytest.mark.parametrize(
    "name", ["SFT", pytest.param("DPO", marks=pytest.mark.slow), pytest.param("KTO", marks=pytest.mark.slow)]
)
def test_gradient_checkpointing_computes_the_same(folder, name):
    first, other = (make_trainer(name, folder, gradient_checkpointing=on, max_steps=2) for on in (True, False))
    first.train(), other.train()
    assert losses(first) == pytest.approx(losses(other), abs=1e-5)


def test_images_stay_with_their_answers_in_small_batches(folder):
    """One answer per forward pass, some without images: the model and its copy as reference agree on each, unless the
    model sees other images."""

    def divergence(other_images):
        sizes = {"per_device_train_batch_size": 1, "steps_per_generation": 16, "gradient_accumulation_steps": 16}
        options = {"beta": 0.1, "learning_rate": 0.0, "num_generations": 2, "max_steps": 1}
        trainer = make_trainer("GRPO", folder, checkpoint="decided", **sizes, **options)
        compute, images = trainer._get_per_token_logps_and_entropies, set()

        def observed(*args, pixel_values=None, **kwargs):
            if pixel_values is not None and torch.is_grad_enabled():
                images.add(len(pixel_values))
                pixel_values = -pixel_values if other_images else pixel_values
            return compute(*args, pixel_values=pixel_values, **kwargs)

        trainer._get_per_token_logps_and_entropies = observed
        trainer.train()
        assert images == {0, 1, 2, 3}
        return next(entry["kl"] for entry in trainer.state.log_history if "kl" in entry)

    assert abs(divergence(other_images=False)) < 1e-6
    assert abs(divergence(other_images=True)) > 1e-3


def test_orpo_trains_on_texts_and_refuses_images(folder):
    """TRL's ORPOTrainer passes no images to the model."""
    tokenizer = AutoProcessor.from_pretrained(folder / "model").tokenizer
    data = trl_dataset(folder / "text-preference.jsonl", "preference").remove_columns("images")
    trainer = make_trainer("ORPO", folder, data=data, processor=tokenizer)
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.lm_head.weight)
    with pytest.raises(ValueError, match="image tokens, .* in all, but there are 0 image embeddings"):
        make_trainer("ORPO", folder, processor=tokenizer).train()


def test_dpo_with_the_loss_of_the_chosen_answers(folder):
    trainer = make_trainer("DPO", folder, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    trainer.train()
    assert losses(trainer)[0] > 0.69 + 0.2


@pytest.mark.parametrize("file", ["messages.jsonl", "many-turns.jsonl"])
def test_trls_collator_has_the_same_labels_as_ours(folder, file):
    data = trl_dataset(folder / file)
    processor = AutoProcessor.from_pretrained(folder / "model")
    ours = ConversationCollator(processor)
    theirs = DataCollatorForVisionLanguageModeling(processor, assistant_only_loss=True)
    for start in range(0, len(data), 4):
        samples = [data[index] for index in range(start, min(start + 4, len(data)))]
        one, other = ours(samples), theirs([dict(sample) for sample in samples])
        assert one.keys() == dict(other).keys()
        assert torch.equal(one["pixel_values"], other["pixel_values"])
        for key in ("input_ids", "labels", "mm_token_type_ids"):
            for row in range(len(samples)):  # padded on the left, and on the right
                kept, their_kept = one["attention_mask"][row] == 1, other["attention_mask"][row] == 1
                assert torch.equal(one[key][row][kept], other[key][row][their_kept])


def test_sft_with_our_collator_drops_whole_turns(folder):
    processor = AutoProcessor.from_pretrained(folder / "model")
    data = trl_dataset(folder / "many-turns.jsonl")
    longest = max(processor.count_tokens(row["messages"]) for row in data)
    collator = ConversationCollator(processor, max_length=longest - 1)
    trainer = make_trainer("SFT", folder, data=data, per_device_train_batch_size=len(data), max_steps=1)
    trainer.data_collator = collator
    trainer.train()
    seen, skipped, shortened = collator.counts.tolist()
    assert (seen, skipped) == (len(data), 0) and shortened >= 1


def test_texts_train_without_padding(folder):
    data = trl_dataset(folder / "text.jsonl").remove_columns("images")
    free, padded = (make_trainer("SFT", folder, data=data, padding_free=on) for on in (True, False))
    free.train(), padded.train()
    assert losses(free) == pytest.approx(losses(padded), abs=1e-5)


# -- images of several tiles, and native ones ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts(folder):
    return {layout: AutoProcessor.from_pretrained(make_layout_checkpoint(folder, layout)) for layout in ("tiles", "native")}


@pytest.mark.parametrize("layout", ["tiles", "native"])
def test_sft_sees_the_images_that_our_collator_makes(folder, layouts, layout):
    """The loss of the first step, over all samples, is the loss of the batch of `dsvl train`."""
    data = trl_dataset(folder / "messages.jsonl")
    options = {"per_device_train_batch_size": len(data), "max_steps": 1, "processor": layouts[layout]}
    trainer = make_trainer("SFT", folder, checkpoint=layout, data=data, **options)
    with torch.no_grad():
        batch = ConversationCollator(layouts[layout])(list(data))
        expected = load(folder, layout)(**batch).loss.item()
    trainer.train()
    assert losses(trainer) == pytest.approx([expected], abs=1e-4)


@pytest.mark.parametrize("layout", ["tiles", "native"])
@pytest.mark.parametrize("name", ["DPO", pytest.param("KTO", marks=pytest.mark.slow)])
def test_preferences_keep_all_tiles_of_an_image(folder, layouts, name, layout):
    """The model and its copy as reference agree before the first step: both see the same images."""
    trainer = make_trainer(name, folder, checkpoint=layout, processor=layouts[layout], max_steps=1)
    seen = []
    forward = trainer.model.forward
    trainer.model.forward = lambda **inputs: seen.append(inputs) or forward(**inputs)
    trainer.train()
    assert losses(trainer) == pytest.approx([np.log(2) if name == "DPO" else 0.5], abs=1e-4)
    counts = [sum(inputs["num_tiles"].tolist()) for inputs in seen if "num_tiles" in inputs]
    assert (max(counts) > max(map(len, (inputs["num_tiles"] for inputs in seen)))) if layout == "tiles" else not counts
    assert all("spatial_shapes" in inputs for inputs in seen if layout == "native" and "pixel_values" in inputs)


@pytest.mark.parametrize("layout", ["tiles", "native"])
@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trainers_that_split_images_refuse_several_tiles(folder, layouts, name, layout):
    message = {"tiles": "unexpected keyword argument 'crop_to_patches'", "native": "argument 'return_row_col_info'"}[layout]
    with pytest.raises(TypeError, match=message):
        make_trainer(name, folder, checkpoint=layout, processor=layouts[layout]).train()
    assert quoted(message.split("'")[1])


def quoted(message):
    """Whether the guide quotes a message, in code and therefore without its backticks."""
    return message.replace("`", "") in GUIDE.read_text(encoding="utf-8").replace("`", "")


# What TRL refuses, and a part of its message, which the guide quotes.
REFUSED = {
    "packing": ("SFT", {"packing": True, "max_length": 64}, "Packing is not supported for vision datasets"),
    "padding-free": ("SFT", {"padding_free": True}, "Padding-free training is yet not supported for vision datasets"),
    "keep_end": (
        "SFT",
        {"max_length": 64, "truncation_mode": "keep_end"},
        "truncation_mode='keep_end' is not supported for vision datasets",
    ),
    "keep_end of DPO": (
        "DPO",
        {"max_length": 64, "truncation_mode": "keep_end"},
        "truncation_mode='keep_end' is not supported for vision-language models",
    ),
    "reference": (
        "DPO",
        {"precompute_ref_log_probs": True},
        "`precompute_ref_log_probs=True` is not supported for vision datasets",
    ),
    "multiple": (
        "DPO",
        {"pad_to_multiple_of": 8},
        "Padding to a multiple of a value is not yet implemented for vision-language",
    ),
    "vllm": ("GRPO", {"use_vllm": True}, "vLLM is not available and `use_vllm` is set to True"),
    "continuous batching": (
        "GRPO",
        {"use_transformers_continuous_batching": True},
        "`use_transformers_continuous_batching` does not support multimodal models",
    ),
    "cut images": ("SFT", {"max_length": 16}, "which cuts an image; raise max_length, drop whole turns"),
    "cut images of DPO": ("DPO", {"max_length": 16}, "and do not truncate image tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(folder, case):
    name, options, message = REFUSED[case]
    with pytest.raises((ValueError, NotImplementedError, ImportError)) as caught:
        make_trainer(name, folder, **options).train()
    assert message in str(caught.value)
    assert quoted(message)


def test_an_adapter_on_the_head_is_refused(folder):
    peft = pytest.importorskip("peft")
    arguments = trl.SFTConfig(str(folder / "run"), use_cpu=True, bf16=False)
    message = "Applying a PEFT adapter to `lm_head` is not supported"
    with pytest.raises(ValueError, match=message):
        trl.SFTTrainer(
            load(folder),
            args=arguments,
            train_dataset=trl_dataset(folder / "messages.jsonl"),
            processing_class=AutoProcessor.from_pretrained(folder / "model"),
            peft_config=peft.LoraConfig(target_modules=["lm_head"]),
        )
    assert quoted(message)


@pytest.mark.parametrize("name", ["DPO", pytest.param("GRPO", marks=pytest.mark.slow)])
def test_adapters_are_merged_and_chat(folder, tmp_path, monkeypatch, capsys, name):
    trainer = make_trainer(name, folder, lora=True, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapters"))
    command = ["merge", "--model", folder / "model", "--adapters", tmp_path / "adapters", "--out", tmp_path / "merged"]
    assert main(list(map(str, command))) == 0
    rows = [trl_dataset(folder / "messages.jsonl")[index] for index in range(4)]
    batch = ConversationCollator(AutoProcessor.from_pretrained(tmp_path / "merged"))(rows)
    with torch.no_grad():
        trained, merged, base = (
            model.eval()(**{key: value for key, value in batch.items() if key != "labels"}).logits
            for model in (trainer.model, AutoModelForImageTextToText.from_pretrained(tmp_path / "merged"), load(folder))
        )
    assert torch.allclose(trained, merged, atol=1e-4) and not torch.allclose(base, merged, atol=1e-2)
    monkeypatch.setattr("sys.stdin", io.StringIO("What is this?\n/quit\n"))
    assert main(["chat", str(tmp_path / "merged"), "--max-new-tokens", "3"]) == 0


ALONE = """
import importlib.util, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
assert importlib.util.find_spec("dsvl") is None and importlib.util.find_spec("trl") is None
model, info = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.new("RGB", (30, 40))}, {"type": "text", "text": "What?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}], tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
)
print(model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist())
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFT", "DPO", "GRPO"])
def test_the_saved_model_runs_without_dsvl(folder, tmp_path, name):
    trainer = make_trainer(name, folder)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "alone.py").write_text(ALONE)
    packages = plain_packages(tmp_path / "packages", "torch", "transformers", "pillow")
    (tmp_path / "home").mkdir()
    done = run_plainly(tmp_path / "alone.py", tmp_path / "saved", packages=[packages], home=tmp_path / "home")
    assert done.returncode == 0, done.stdout + done.stderr
    processor = AutoProcessor.from_pretrained(tmp_path / "saved")
    content = [{"type": "image", "image": Image.new("RGB", (30, 40))}, {"type": "text", "text": "What?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        add_generation_prompt=True,
        return_tensors="pt",
    )
    ids = trainer.model.eval().generate(**inputs, max_new_tokens=4, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == ids[0, inputs["input_ids"].shape[1] :].tolist()

"""The README's Python runs as it stands, with tiny models in the place of the real ones."""

import re
from pathlib import Path

import torch
from conftest import save_tiny_llama, tiny_tower_config
from transformers import CLIPVisionModel

import dsvl
from dsvl.cli import main

README = (Path(dsvl.__file__).parent / "README.md").read_text()


def test_every_example_runs_in_order(tmp_path, monkeypatch, photographs):
    load, compose, fine_tune, talk, reuse = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    command, train, plan = (
        re.search(rf"^dsvl ({name} .*)$", README, re.MULTILINE)[1] for name in ("compose", "train", "plan")
    )
    (conversation,) = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    for name in ("openai/clip-vit-large-patch14", "meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-0.6B"):
        assert name in command + compose
    CLIPVisionModel(tiny_tower_config()).save_pretrained("openai/clip-vit-large-patch14")
    for name in ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-0.6B"):
        save_tiny_llama(name)
    for name, image in zip(("one.jpg", "two.jpg"), photographs, strict=False):
        image.save(name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")

    assert main(command.split()) == 0
    names: dict[str, object] = {}
    exec(load, names)
    exec(talk, names)
    assert len(names["chat"].messages) == 4  # type: ignore[attr-defined]
    first = names["answer"]
    exec(reuse, names)
    assert names["answer"].equal(first) and len(names["images"]) == 2  # type: ignore[attr-defined, arg-type]
    Path("my-model").rename("composed by command")
    for block in (compose, fine_tune):
        exec(block, {})
    Path("conversations.jsonl").write_text(conversation)
    assert main(train.split()) == 0
    assert main(plan.split()) == 0
    untrained = dsvl.DSVLForConditionalGeneration.from_pretrained("my-model").model.multi_modal_projector
    for name in ("my-tuned-model", "my-trained-model"):
        trained = dsvl.DSVLForConditionalGeneration.from_pretrained(name).model.multi_modal_projector
        assert not trained.linear.weight.equal(untrained.linear.weight)

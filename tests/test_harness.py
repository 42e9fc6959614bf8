"""lm-evaluation-harness runs a checkpoint with its own model class, and gets the answers of `generate()`."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_tiny_llama, tiny_tower_config
from PIL import Image
from transformers import CLIPVisionModel

import dsvl

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'lm_eval[hf]'")
TASK = Path(dsvl.__file__).parent / "examples" / "lm_eval_task"


def test_the_harness_gets_the_models_own_answers(
    tmp_path: Path, photographs: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    CLIPVisionModel(tiny_tower_config()).save_pretrained(tmp_path / "tower")
    save_tiny_llama(tmp_path / "llama", initializer_range=0.3)  # so that answers differ
    model, processor = dsvl.compose(tmp_path / "tower", tmp_path / "llama", number_after=True)
    dsvl.save_checkpoint(model, processor, tmp_path / "model")
    conversations = []
    for number, count in enumerate([1, 0, 2, 1, 0]):  # images
        parts: list[dict[str, Any]] = [{"type": "text", "text": f"Question {number}?"}]
        for position in range(count):
            photographs[number + position].convert("RGB").save(tmp_path / f"{number}{position}.png")
            parts.insert(position, {"type": "image", "path": f"{number}{position}.png"})
        conversations.append([{"role": "user", "content": parts}, {"role": "assistant", "content": "An answer."}])
    lines = [json.dumps({"messages": messages}) for messages in conversations]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))

    flags = {
        "model": "hf-multimodal",
        "model_args": "pretrained=model,trust_remote_code=True,dtype=auto",
        "tasks": "conversations",
        "include_path": str(TASK),
        "metadata": '{"data": "data.jsonl"}',
        "batch_size": "2",
        "device": "cpu",
        "output_path": "out",
    }
    command = [sys.executable, "-m", "lm_eval", *(text for name, value in flags.items() for text in (f"--{name}", value))]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [*command, "--apply_chat_template", "--log_samples"],
        cwd=tmp_path,
        env=offline,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (logged,) = (tmp_path / "out").glob("**/samples_conversations_*.jsonl")
    answers = {entry["doc_id"]: entry["resps"][0][0] for entry in map(json.loads, logged.read_text().splitlines())}

    monkeypatch.chdir(tmp_path)
    for number, messages in enumerate(conversations):
        inputs = processor.apply_chat_template(
            messages[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = model.eval().generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert answers[number] == processor.decode(ids, skip_special_tokens=True)
    assert len(set(answers.values())) == len(conversations)

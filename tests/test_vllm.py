"""An exported model answers under vLLM as it does here."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_models import SIZE, compose_for_export, save_and_export
from llava_answer import answers, conversations, model_inputs

TESTS = Path(__file__).parent
# The Python of an environment with vLLM, which `make test-vllm` makes and names.
PYTHON = os.environ.get("DSVL_VLLM")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="DSVL_VLLM names no Python with vLLM; run make test-vllm")

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("clip", "llama", {}),
    "qwen2": ("clip", "qwen2", {"number_after": True}),
    "qwen3": ("clip", "qwen3", {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}),
    "mistral": ("siglip", "mistral", {"vision_feature_layer": 3}),
    "gemma2": ("siglip", "gemma2", {}),
    "phi3": ("siglip", "phi3", {}),
}


def answers_of_vllm(directory: Path) -> dict[str, Any]:
    """What `vllm_answer.py` prints in vLLM's environment."""
    command = [str(PYTHON), str(TESTS / "vllm_answer.py"), str(directory), str(SIZE)]
    environment = os.environ | {"PYTHONPATH": str(TESTS / "vllm_site"), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-5000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_generate(name, tmp_path):
    """By the chat protocol, so that vLLM renders the exported template and processes the images."""
    tower, decoder, options = MODELS[name]
    model, processor = compose_for_export(tower, decoder, **options)
    there = answers_of_vllm(save_and_export(tmp_path, model, processor))
    ours = answers(model, processor, SIZE)
    assert there["alone"] == ours["alone"]
    inputs = [model_inputs(processor, [one]) for one in conversations(SIZE)]
    assert there["prompt_ids"] == [one["input_ids"][0].tolist() for one in inputs]
    with torch.no_grad():
        first = [model(**one, logits_to_keep=1).logits[0, -1].log_softmax(-1).max().item() for one in inputs]
    assert there["first"] == pytest.approx(first, abs=1e-4)

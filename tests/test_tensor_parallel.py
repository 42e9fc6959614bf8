"""Inference with a decoder whose heads and MLPs are split over two processes (`tp_plan="auto"`)."""

import json
import subprocess
from pathlib import Path

from training_runs import command, environment, make_checkpoint


def test_two_processes_that_split_the_decoder_answer_as_one(tmp_path):
    """With every kind of KV cache, with images in an image KV cache, in 8 bits, with beams, and from an image library."""
    make_checkpoint(tmp_path)
    script = str(Path(__file__).with_name("tensor_parallel_answers.py"))
    start = command(str(tmp_path), processes=2, module=script)
    done = subprocess.run(start, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["own share of a weight"] == found["own share of the image cache"] == 0.5
        assert found["logits"] < 1.5e-5
        assert found["same"] == dict.fromkeys(found["same"], True) and len(found["same"]) == 6
        assert found["library"]["hits"] == found["library"]["misses"] == 4
        assert found["fingerprints"] == 3  # the image KV cache of a process is of no use to another

"""A checkpoint opens in plain transformers of the oldest version that the package admits as it does in this one."""

import json
import os
import re
from pathlib import Path

import plain_answer
import pytest
import torch
from plain_environment import plain_packages, run_plainly
from training_runs import make_checkpoint

import dsvl

OLDEST = os.environ.get("DSVL_OLDEST")  # an environment that holds the oldest transformers; `make test` makes and names it
ROOT = Path(dsvl.__file__).parent


@pytest.mark.skipif(OLDEST is None, reason="DSVL_OLDEST names no environment with the oldest transformers; run make test")
def test_the_oldest_transformers_answers_as_the_newest(tmp_path):
    checkpoint = make_checkpoint(tmp_path)
    (site_packages,) = Path(str(OLDEST)).glob("lib/python*/site-packages")
    lent = plain_packages(tmp_path / "lent", "torch", "pillow")
    done = run_plainly(ROOT / "tests" / "plain_answer.py", checkpoint, packages=[site_packages, lent], home=tmp_path)
    assert done.returncode == 0, done.stderr
    oldest, newest = json.loads(done.stdout), plain_answer.answer(str(checkpoint))
    admitted = re.search(r'"transformers>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert admitted is not None and oldest["transformers"] == admitted[1] != newest["transformers"]
    assert oldest["importable"] == []
    for name in ("input_ids", "types", "answer"):
        assert oldest[name] == newest[name], name
    torch.testing.assert_close(torch.tensor(oldest["logits"]), torch.tensor(newest["logits"]), atol=1e-5, rtol=1e-5)

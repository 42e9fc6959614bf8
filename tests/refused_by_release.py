"""Ask for what an old transformers cannot do right; prints the errors as JSON.

python refused_by_release.py CHECKPOINT
"""

import json
from typing import Any

import torch
from conftest import batch, tiny_model

from dsvl.training.trainer import DSVLTrainer


def error_of(call: Any) -> str:
    try:
        call()
    except (ImportError, ValueError) as error:
        return str(error)
    return ""


if __name__ == "__main__":
    inputs = batch("ttItt", dtype=torch.float32)
    gemma, llama = (tiny_model(family, dtype=torch.float32, backend="sdpa") for family in ("gemma2", "llama"))
    print(
        json.dumps(
            {
                "softcapping": error_of(lambda: gemma(**inputs)),
                "softcapping of texts": error_of(lambda: gemma(**batch("tttt", dtype=torch.float32))),
                "softcapping, causal": error_of(lambda: tiny_model("gemma2", "causal", "sdpa", torch.float32)(**inputs)),
                "training": error_of(lambda: DSVLTrainer(model=llama)),
                "chunks": error_of(lambda: llama.generate(**inputs, prefill_chunk_size=4, max_new_tokens=2)),
            }
        )
    )

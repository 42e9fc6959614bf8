"""Serve an exported model by vLLM on a CPU and answer; prints JSON.

python vllm_answer.py DIR IMAGE_SIZE
"""

import base64
import io
import json
import os
import sys
from typing import Any

# Two cores, one process, nothing from the network.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}

from llava_answer import NEW_TOKENS, conversations  # noqa: E402
from PIL import Image  # noqa: E402
from vllm import LLM, SamplingParams, __version__  # noqa: E402


def as_request(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation as a client of the chat completions API sends it."""

    def url(image: Image.Image) -> str:
        held = io.BytesIO()
        image.save(held, "PNG")
        return "data:image/png;base64," + base64.b64encode(held.getvalue()).decode()

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_url", "image_url": {"url": url(one["image"])}} if one["type"] == "image" else one

    return [message | {"content": [part(one) for one in message["content"]]} for message in messages]


if __name__ == "__main__":
    engine = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=512, max_num_seqs=4)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=1)
    outputs = engine.chat([as_request(one) for one in conversations(int(sys.argv[2]))], greedy, use_tqdm=False)
    found = {
        "vllm": __version__,
        "prompt_ids": [list(one.prompt_token_ids or []) for one in outputs],
        "alone": [list(one.outputs[0].token_ids) for one in outputs],
        "first": [max(value.logprob for value in one.outputs[0].logprobs[0].values()) for one in outputs],  # type: ignore[index,union-attr]
    }
    print(json.dumps(found))

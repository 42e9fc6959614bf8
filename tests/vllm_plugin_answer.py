"""Serve a checkpoint by vLLM with DSVL's plugin on a CPU, in vLLM's environment; prints JSON.

python vllm_plugin_answer.py JOB.json

A job: `checkpoint`; `engine`, arguments of `LLM`; `requests`, message lists as clients send them; `new_tokens`; and `steps`,
names of methods of `Steps`. Without `steps` the engine is expected to refuse, and `error` is its message. Or `jobs`, several
of these.
"""

import base64
import gc
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

# Two cores, nothing from the network; one process unless a job says otherwise.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from PIL import Image  # noqa: E402
from vllm import LLM, SamplingParams, __version__  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402
from vllm.exceptions import VLLMValidationError  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402

DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 512,
    "max_num_seqs": 8,
    "block_size": 32,
    "limit_mm_per_prompt": {"image": 8},
}


def images_of(messages: list[dict[str, Any]]) -> list[Image.Image]:
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    return [Image.open(io.BytesIO(base64.b64decode(url.split(",", 1)[1]))) for url in urls]


def rows(outputs: list[Any]) -> list[dict[str, Any]]:
    """Token ids of prompts and answers, log probabilities of the answers' tokens, tokens that a cache had."""
    return [
        {
            "prompt_ids": list(one.prompt_token_ids or []),
            "ids": list(one.outputs[0].token_ids),
            "logprobs": [
                values[chosen].logprob
                for values, chosen in zip(one.outputs[0].logprobs or [], one.outputs[0].token_ids, strict=True)
            ],
            "cached": one.num_cached_tokens,
            "reason": one.outputs[0].finish_reason,
        }
        for one in outputs
    ]


class Steps:
    def __init__(self, engine: LLM, job: dict[str, Any]) -> None:
        self.engine, self.job = engine, job
        self.greedy = SamplingParams(temperature=0, max_tokens=job["new_tokens"], logprobs=1, ignore_eos=True)

    def chat(self) -> Any:
        """All requests at once, by the chat protocol with data URLs."""
        return rows(self.engine.chat(self.job["requests"], self.greedy, use_tqdm=False))

    def again(self) -> Any:
        """Again, so that the prefix cache has them."""
        return self.chat()

    def texts(self) -> Any:
        """As rendered texts, with images."""
        return self._generate([{"prompt": text} for text in self.job["texts"]])

    def short_ids(self) -> Any:
        """As token ids with one image token for each image."""
        return self._generate([{"prompt_token_ids": ids} for ids in self.job["short_ids"]])

    def full_ids(self) -> Any:
        """As token ids with all image tokens."""
        return self._generate([{"prompt_token_ids": ids} for ids in self.job["full_ids"]])

    def _generate(self, prompts: list[dict[str, Any]]) -> Any:
        return rows(self._outputs(prompts, self.greedy))

    def _outputs(self, prompts: list[dict[str, Any]], parameters: SamplingParams) -> list[Any]:
        for prompt, messages in zip(prompts, self.job["requests"], strict=True):
            if images := images_of(messages):
                prompt["multi_modal_data"] = {"image": images}
        return self.engine.generate(prompts, parameters, use_tqdm=False)

    def scores(self) -> Any:
        """The log probabilities of given answers, whatever this engine would answer."""
        prompts = [
            {"prompt_token_ids": prompt + answer}
            for prompt, answer in zip(self.job["full_ids"], self.job["answers"], strict=True)
        ]
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        found = []
        for one, answer in zip(self._outputs(prompts, asked), self.job["answers"], strict=True):
            steps = one.prompt_logprobs[-len(answer) :]
            found.append([step[token].logprob for step, token in zip(steps, answer, strict=True)])
        return found

    def preemptions(self) -> Any:
        """How often a request lost its KV cache so far."""
        return sum(one.value for one in self.engine.get_metrics() if one.name == "vllm:num_preemptions")

    def refusals(self) -> Any:
        """What requests are refused with."""
        found = {}
        for name, prompt in self.job["refused"].items():
            prompt = dict(prompt)
            if "images" in prompt:
                prompt["multi_modal_data"] = {"image": [Image.new("RGB", (30, 40))] * prompt.pop("images")}
            try:
                if "messages" in prompt:
                    self.engine.chat([prompt["messages"]], self.greedy, use_tqdm=False)
                else:
                    self.engine.generate([prompt], self.greedy, use_tqdm=False)
                found[name] = None
            except (ValueError, VLLMValidationError) as error:
                found[name] = str(error)
        return found

    def sampled(self) -> Any:
        """Tokens of many answers, by a client that asks for the image token."""
        bias = {self.job["image_token_id"]: 100.0}
        # Without a seed: vLLM 0.32 for CPUs fails when it prefills a request with one in chunks.
        many = SamplingParams(temperature=2, n=16, max_tokens=16, ignore_eos=True, logit_bias=bias)
        outputs = self.engine.chat(self.job["requests"][:2], many, use_tqdm=False)
        return sorted({token for one in outputs for answer in one.outputs for token in answer.token_ids})

    def adapter(self) -> Any:
        """With a LoRA adapter."""
        adapter = LoRARequest("adapter", 1, self.job["adapter"])
        return rows(self.engine.chat(self.job["requests"], self.greedy, use_tqdm=False, lora_request=adapter))


def run(job: dict[str, Any]) -> dict[str, Any]:
    options = DEFAULTS | job.get("engine", {})
    if job["steps"]:
        steps = Steps(LLM(job["checkpoint"], **options), job)
        return {name: getattr(steps, name)() for name in job["steps"]}
    try:
        LLM(job["checkpoint"], **options)
    except (ValueError, RuntimeError) as error:
        return {"error": str(error)}
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
    return {"error": None}


def main(job: dict[str, Any]) -> dict[str, Any]:
    found = {"jobs": [run(one) for one in job["jobs"]]} if "jobs" in job else run(job)
    return found | {"vllm": __version__}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))

"""Speculative decoding of a trained model: tokens for each step of the model, and speed, by prompt lookup and by a draft
model, on the demo's held-out conversations; and how much prompt lookup would accept in long texts.

    python -m dsvl.demo --output demo_output
    python benchmarks/speculative_decoding.py demo_output/checkpoint [--draft DIR] [--lookup 3 5 10]
                                              [--caches dynamic static] [--texts FILE ...] [--conversations 40] [--out FILE]

Answers: the last question of each conversation, behind the earlier questions and their right answers. They are compared with
greedy search, and must be the same tokens. Texts (no model): the second half of each file is what a model that writes this
text would answer, and the first half is the conversation before; tokens are those of a vocabulary that is trained on all of
them (`--vocabulary`).
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measure import describe_device, device_type, write
from tokenizers import ByteLevelBPETokenizer
from transformers import CompileConfig, StaticCache

from dsvl.acceleration.decoding.decode_steps import DecodeSteps
from dsvl.acceleration.decoding.speculative_decoding import PromptLookup
from dsvl.acceleration.decoding.static_steps import StaticSteps
from dsvl.demo.scoring import held_out_conversations, turn_prompts
from dsvl.transformers_dsvl import CACHE
from dsvl.utils.model_loading import load_checkpoint


@contextmanager
def counted_steps(model: Any) -> Iterator[list[int]]:
    """The number of tokens of each step of a model after its prefill."""
    made: list[int] = []
    originals = {kind: kind.__call__ for kind in (DecodeSteps, StaticSteps)}

    def watched(kind: Any) -> Any:
        def step(self: Any, tokens: torch.Tensor) -> torch.Tensor:
            if self._model is model:
                made.append(tokens.shape[1])
            return originals[kind](self, tokens)

        return step

    for kind in originals:
        kind.__call__ = watched(kind)
    yield made
    for kind, step in originals.items():
        kind.__call__ = step


def answer_all(model: Any, prompts: list[Any], static: bool, most: int, **drafts: Any) -> tuple[list[list[int]], float]:
    """The answers, and the seconds of generating them."""
    answers, started = [], time.perf_counter()
    for inputs in prompts:
        options: dict[str, Any] = {}
        if static:  # of one capacity, so that the step is compiled once
            options = {CACHE: StaticCache(config=model.config.text_config, max_cache_len=512)}
            options["compile_config"] = CompileConfig(mode="default") if model.device.type == "cpu" else None
            if options["compile_config"] is not None:
                options["compile_config"]._compile_all_devices = True
        ids = model.generate(**inputs, max_new_tokens=most, do_sample=False, **options, **drafts)
        answers.append(ids[0, inputs["input_ids"].shape[1] :].tolist())
    return answers, time.perf_counter() - started


def measure_answers(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    model, processor = load_checkpoint(options.model, device_type(), "float32")
    conversations = held_out_conversations(0, options.conversations)
    prompts = []
    for conversation in conversations:
        messages, _ = turn_prompts(conversation, conversation["drawn"])[-1]
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
        )
        prompts.append(inputs.to(model.device))
    ways: dict[str, dict[str, Any]] = {"greedy": {}}
    ways |= {f"lookup {longest}": {"prompt_lookup_num_tokens": longest} for longest in options.lookup}
    if options.draft:
        ways["draft model"] = {"assistant_model": load_checkpoint(options.draft, device_type(), "float32")[0]}
        ways["draft model"]["assistant_model"].generation_config.num_assistant_tokens = options.draft_tokens
    results: dict[str, dict[str, float]] = {}
    for kind in options.caches:
        expected: list[list[int]] = []
        for name, drafts in ways.items():
            answer_all(model, prompts[:3], kind == "static", options.new_tokens, **drafts)  # compiles
            with counted_steps(model) as steps:
                answers, seconds = answer_all(model, prompts, kind == "static", options.new_tokens, **drafts)
            expected = expected or answers
            tokens = sum(map(len, answers)) - len(answers)  # the first comes from the prefill
            drafted = sum(steps) - len(steps)
            row = {
                "tokens_per_step": tokens / len(steps),
                "accepted": (tokens - len(steps)) / drafted if drafted else 0.0,
                "seconds": seconds,
                "same_tokens": answers == expected,
            }
            results[f"{kind}, {name}"] = row
            print(
                f"{kind}, {name:14}{row['tokens_per_step']:6.2f} tokens per step, {row['accepted']:7.1%} of drafted tokens "
                f"accepted, {seconds:6.2f} s, {'the same tokens' if row['same_tokens'] else 'OTHER TOKENS'}",
                flush=True,
            )
    return results


def measure_texts(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Prompt lookup on texts, in place of a model that writes them."""
    texts = [Path(name).read_text(encoding="utf-8") for name in options.texts]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=options.vocabulary, show_progress=False)
    results: dict[str, dict[str, float]] = {}
    for longest in options.lookup:
        steps = tokens = drafted = 0
        for text in texts:
            ids = tokenizer.encode(text).ids
            lookup, end = PromptLookup(longest, 2, never=-1), len(ids) // 2
            while end < len(ids):
                draft = lookup.propose(ids[:end], longest)
                right = 0
                while right < len(draft) and end + right < len(ids) and ids[end + right] == draft[right]:
                    right += 1
                steps, tokens, drafted, end = steps + 1, tokens + right + 1, drafted + len(draft), end + right + 1
        results[f"texts, lookup {longest}"] = row = {
            "tokens_per_step": tokens / steps,
            "accepted": (tokens - steps) / max(drafted, 1),
        }
        print(f"texts, lookup {longest}: {row['tokens_per_step']:.2f} tokens per step, {row['accepted']:.1%} accepted")
    return results


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the checkpoint of the demo")
    parser.add_argument("--draft", help="a small model that was trained on the same data")
    parser.add_argument("--draft-tokens", type=int, default=5, help="tokens of its longest draft")
    parser.add_argument("--lookup", type=int, nargs="+", default=[3, 5, 10], help="tokens of the longest draft")
    parser.add_argument("--caches", choices=("dynamic", "static"), nargs="+", default=["dynamic", "static"])
    parser.add_argument("--texts", nargs="+", default=[], help="text files")
    parser.add_argument("--vocabulary", type=int, default=4000)
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    print(f"{options.model} on {describe_device()}")
    results = measure_answers(options)
    if options.texts:
        results |= measure_texts(options)
    write(options.out, options, results)


if __name__ == "__main__":
    main()

"""What the precision of a decoder's weights costs a trained model: exact answers, and perplexity of the right answers, on
the demo's held-out conversations.

    python -m dsvl.demo --output demo_output
    python benchmarks/weight_precision.py demo_output/checkpoint [--precisions float32 bfloat16 8bit int8 fp8 4bit]
                                          [--conversations 300] [--out FILE]

The first precision is the reference: the table also has the share of answers that equal its answers, right or not.
"""

import argparse
import math

import torch
from measure import describe_device, device_type, write

from dsvl.demo.scoring import generate_answers, held_out_conversations, turn_prompts
from dsvl.utils.model_loading import DTYPES, load_checkpoint
from dsvl.utils.quantization_choices import QUANTIZATIONS


@torch.inference_mode()
def perplexity(model, processor, conversations: list[dict], batch_size: int = 50) -> float:
    """Of the assistant's tokens, with the right answers of earlier turns before them."""
    total, count = 0.0, 0
    for start in range(0, len(conversations), batch_size):
        part = conversations[start : start + batch_size]
        messages = [[*turn_prompts(one, one["drawn"])[-1][0], one["messages"][-1]] for one in part]
        batch = processor.apply_chat_template(
            messages,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"padding": True},
        ).to(model.device)
        is_answer = torch.as_tensor(batch.pop("assistant_masks")).bool()
        labels = torch.where(is_answer.to(model.device), batch["input_ids"], -100)
        tokens = int((labels[:, 1:] != -100).sum())
        total, count = total + float(model(**batch, labels=labels).loss) * tokens, count + tokens
    return math.exp(total / count)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the checkpoint of the demo")
    precisions = [*DTYPES[1:], *QUANTIZATIONS]
    parser.add_argument("--precisions", choices=precisions, nargs="+", default=["float32", "bfloat16", "int8", "fp8"])
    parser.add_argument("--conversations", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    print(f"{options.model} on {describe_device()}")
    conversations = held_out_conversations(options.seed, options.conversations)
    pairs = [pair for one in conversations for pair in turn_prompts(one, one["drawn"])]
    pairs.sort(key=lambda pair: len(pair[0]))  # batches of similar length
    results: dict[str, dict[str, float]] = {}
    reference: list[str] = []
    for precision in options.precisions:
        dtype, quantization = (precision, None) if precision in DTYPES else ("auto", precision)
        model, processor = load_checkpoint(options.model, device_type(), dtype, quantization)
        answers = generate_answers(model, processor, [prompt for prompt, _ in pairs])
        reference = reference or answers
        right = sum(answer == question.answer for answer, (_, question) in zip(answers, pairs, strict=True))
        same = sum(answer == other for answer, other in zip(answers, reference, strict=True))
        row = {
            "answers": len(answers),
            "exact": right / len(answers),
            "as_reference": same / len(answers),
            "perplexity": perplexity(model, processor, conversations),
        }
        results[precision] = row
        print(
            f"{precision:10}{row['exact']:8.2%} exact of {len(answers)}, {row['as_reference']:8.2%} as in "
            f"{options.precisions[0]}, perplexity {row['perplexity']:.4f}",
            flush=True,
        )
    write(options.out, options, results)


if __name__ == "__main__":
    main()

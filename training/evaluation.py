"""The exact-match metric on held-out conversations, distributed over processes."""

from typing import Any

import torch
import torch.distributed as dist

from ..data.messages import is_trained, location_of
from ..data.sample_errors import BadSample, one_sample
from ..evaluation import metrics
from ..evaluation.generate_answers import generate_answers
from .collator import ConversationCollator


def exact_match(
    model: Any, collator: ConversationCollator, conversations: Any, batch_size: int = 8, max_new_tokens: int = 64
) -> float:
    """The fraction of greedily generated answers that equal the reference, except for surrounding white space.

    The prompt of a turn contains the reference answers of earlier turns. Questions are distributed over the processes, which
    call `generate` equally often, as ZeRO-3 requires. Images are decoded batch by batch.

    Args:
        model: a `DSVLForConditionalGeneration`, or PEFT's wrapper around it.
        collator: collator of the training, which has the processor and decides which turns and samples are skipped.
        conversations: samples of `dsvl.data`.
        batch_size: questions per batch and process, *optional*, defaults to 8.
        max_new_tokens: maximum tokens of an answer, *optional*, defaults to 64.

    Returns:
        A number between 0 and 1.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    questions = [
        (index, answer) for index in range(len(conversations)) for answer in answer_indices(collator, conversations[index])
    ]
    counts = torch.zeros(2, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(questions), batch_size * world):
            mine = questions[start + rank * batch_size : start + (rank + 1) * batch_size]
            asked = mine or questions[:1]  # a process without questions takes part in generate()
            messages = [collator.messages(conversations[index])[: answer + 1] for index, answer in asked]
            prompts = [collator.decode(conversation[:-1], pixels=True) for conversation in messages]
            answers = generate_answers(model, collator.processor, prompts, max_new_tokens)
            references = [_text(conversation[-1]["content"]) for conversation in messages]
            matches = int(
                sum(
                    metrics.exact_match(answer.text, [reference])
                    for answer, reference in zip(answers, references, strict=True)
                )
            )
            counts += torch.tensor([matches, len(asked)]) * bool(mine)
    finally:
        model.train(training)
    if world > 1:
        device = next(model.parameters()).device
        total = counts.to(device)
        dist.all_reduce(total)
        counts = total.cpu()
    return (counts[0] / counts[1].clamp(min=1)).item()


def answer_indices(collator: ConversationCollator, sample: Any) -> list[int]:
    """The message indices of a conversation's trained answers; empty if the collator skips the conversation."""
    try:
        with one_sample(location_of(sample)):
            messages = collator.shorten_sample(sample)
            if collator.on_bad_sample == "skip":  # now, as all processes must ask equally many questions
                collator.decode(messages)
    except BadSample:
        if collator.on_bad_sample == "error":
            raise
        return []
    return [index for index, message in enumerate(messages) if is_trained(message)]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

"""Exact answers to the questions of held-out conversations, shared among the processes."""

from typing import Any

import torch
import torch.distributed as dist

from ..data import complete_messages
from ..data.messages import is_trained, location_of
from ..data.sample_errors import BadSample, one_sample
from ..evaluation import metrics
from ..evaluation.generate_answers import generate_answers
from .collator import ConversationCollator


def exact_match(
    model: Any, collator: ConversationCollator, conversations: Any, batch_size: int = 8, max_new_tokens: int = 64
) -> float:
    """The share of answers that a model gives to the letter (but for white space around it), generated greedily.

    Each round is asked with the true answers of the earlier ones. Every process asks its share of the questions, and all
    call `generate` as often as each other, as ZeRO-3 needs; images are decoded for one batch at a time.

    Args:
        model: a `DSVLForConditionalGeneration`, or PEFT's wrapper around it.
        collator: the one that made the training's batches: it has the processor, and says which rounds are too long and
            whether a conversation whose first round is too long may be left out.
        conversations: samples of dsvl.data.
        batch_size: questions at a time, in each process.
        max_new_tokens: of an answer.

    Returns:
        Between 0 and 1.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    places = [(index, end) for index in range(len(conversations)) for end in _answers(collator, conversations[index])]
    counts = torch.zeros(2, dtype=torch.int64)
    training = model.training
    model.eval()
    try:
        for start in range(0, len(places), batch_size * world):
            mine = places[start + rank * batch_size : start + (rank + 1) * batch_size]
            asked = mine or places[:1]  # a process without a question of its own goes along with the others
            messages = [complete_messages(conversations[index])[: end + 1] for index, end in asked]
            prompts = [collator.decode(conversation[:-1], pixels=True) for conversation in messages]
            answers = generate_answers(model, collator.processor, prompts, max_new_tokens)
            truths = [_text(conversation[-1]["content"]) for conversation in messages]
            right = int(sum(metrics.exact_match(answer.text, [t]) for answer, t in zip(answers, truths, strict=True)))
            counts += torch.tensor([right, len(asked)]) * bool(mine)
    finally:
        model.train(training)
    if world > 1:
        device = next(model.parameters()).device
        total = counts.to(device)
        dist.all_reduce(total)
        counts = total.cpu()
    return (counts[0] / counts[1].clamp(min=1)).item()


def _answers(collator: ConversationCollator, sample: Any) -> list[int]:
    """The places of a conversation's answers; none if it is left out of training's batches as well."""
    try:
        with one_sample(location_of(sample)):
            messages = collator.shorten(complete_messages(sample))
            if collator.on_bad_sample == "skip":  # later would be too late: all processes ask equally often
                collator.decode(messages)
    except BadSample:
        if collator.on_bad_sample == "error":
            raise
        return []
    return [place for place, message in enumerate(messages) if is_trained(message)]


def _text(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)

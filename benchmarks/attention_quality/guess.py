"""How often a guess is right that knows everything that the images of an item show, and nothing of which image shows it."""

from collections import Counter
from collections.abc import Sequence
from functools import cache

from attention_quality.plan import item_sets
from attention_quality.scenes import Question, Scene, Thing, held_out_conversation
from attention_quality.sizes import SIZES_OF_EXPERIMENT


@cache
def guesses(size_name: str) -> dict[str, float]:
    """The mean probability that the guess is right, over the held-out items of a size, by the keys of `item_sets`.

    Args:
        size_name: of `SIZES_OF_EXPERIMENT`.
    """
    size, found = SIZES_OF_EXPERIMENT[size_name], {}
    for key, task, images, count in item_sets(size, size.items, size.distractor_items):
        items = [held_out_conversation(size.world, task, images, index) for index in range(count)]
        found[key] = sum(chance(item.questions[0], item.scenes) for item in items) / count
    return found


def chance(question: Question, scenes: Sequence[Scene]) -> float:
    """The probability that the guess answers one question: any answer that is right for some images, each as likely as it is
    often."""
    if question.kind == "which":
        return 1 / len(scenes)
    if question.kind == "print":
        return Counter(tuple(scene.printed) for scene in scenes)[question.answer[1:]] / len(scenes)
    answers = _attributes(question, scenes) if question.kind == "attribute" else _two_hops(question, scenes)
    return answers[question.answer[1]] / answers.total()


def _attributes(question: Question, scenes: Sequence[Scene]) -> Counter[str]:
    """what WANTED is the VALUE [one] in IMAGE ?"""
    wanted, value = question.words[1], question.words[4]
    return Counter(getattr(thing, wanted) for scene in scenes for thing in scene.things if value in _values(thing))


def _two_hops(question: Question, scenes: Sequence[Scene]) -> Counter[str]:
    """in IMAGE , what WANTED is the OVER that is VALUE in IMAGE ?"""
    wanted, over, value = question.words[4], question.words[7], question.words[10]
    return Counter(
        getattr(other, wanted)
        for first in scenes
        for second in scenes
        if first is not second
        for thing in first.things
        for other in second.things
        if getattr(thing, wanted) == value != getattr(other, wanted) and getattr(thing, over) == getattr(other, over)
    )


def _values(thing: Thing) -> tuple[str, str]:
    """What a question names a thing by."""
    return thing.colour, thing.shape

"""Joining the answers of several runs on conversation and turn, and comparing their scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer_records import AnswerRecord

Runs = Mapping[str, Sequence[AnswerRecord]]


@dataclass(frozen=True)
class ComparedTurn:
    """A turn with the answer of each run.

    Attributes:
        asked: a record of the turn, for its question, images and references.
        answers: run -> its record; None if it did not answer the turn.
    """

    asked: AnswerRecord
    answers: dict[str, AnswerRecord | None]

    @property
    def missing(self) -> bool:
        """Whether a run did not answer the turn."""
        return None in self.answers.values()

    @property
    def differs(self) -> bool:
        """Whether the runs' answers differ; a missing answer differs from any other."""
        return len({None if record is None else record.answer.strip() for record in self.answers.values()}) > 1

    @property
    def imperfect(self) -> bool:
        """Whether a run has a score below 1."""
        return any(score < 1 for record in self.answers.values() if record for score in record.scores.values())


@dataclass(frozen=True)
class Summary:
    """Counts and mean scores of a run.

    Attributes:
        answered: number of answered turns.
        missing: number of turns that only other runs answered.
        means: metric -> (mean, number of turns), over the turns that have a score.
    """

    answered: int
    missing: int
    means: dict[str, tuple[float, int]]


def join(runs: Runs) -> dict[str, list[ComparedTurn]]:
    """Join runs on conversation and turn.

    Args:
        runs: label -> records.

    Returns:
        Conversation id -> turns in order. Conversations are in order of their first occurrence.

    Raises:
        ValueError: for a run without answers, for two answers to a turn in a run, and if a turn differs between runs in its
            question, number of images or references.
    """
    found: dict[tuple[str, int], dict[str, AnswerRecord]] = {}
    for label, records in runs.items():
        if not records:
            raise ValueError(f"{label} has no answers; pass an answer file that is not empty.")
        for record in records:
            answers = found.setdefault((record.id, record.turn), {})
            location = f"conversation {record.id!r}, turn {record.turn}"
            if label in answers:
                raise ValueError(f"{label} answers {location} twice; conversations need unique ids.")
            for other, before in answers.items():
                _check_same(before, record, f"{other} and {label} were not asked the same question in {location}")
            answers[label] = record
    conversations: dict[str, list[ComparedTurn]] = {}
    for (name, _), answers in found.items():
        asked = next((record for record in answers.values() if record.references), next(iter(answers.values())))
        conversations.setdefault(name, []).append(ComparedTurn(asked, {label: answers.get(label) for label in runs}))
    for turns in conversations.values():
        turns.sort(key=lambda one: one.asked.turn)
    return conversations


def summarize(conversations: Mapping[str, Sequence[ComparedTurn]], common: bool = False) -> dict[str, Summary]:
    """Counts and mean scores of each run; with `common`, only over the turns that all runs answered."""
    turns = [one for several in conversations.values() for one in several if not (common and one.missing)]
    summaries = {}
    for label in turns[0].answers if turns else ():
        records = [record for one in turns if (record := one.answers[label]) is not None]
        scores: dict[str, list[float]] = {}
        for record in records:
            for metric, score in record.scores.items():
                scores.setdefault(metric, []).append(score)
        means = {metric: (sum(values) / len(values), len(values)) for metric, values in scores.items()}
        summaries[label] = Summary(len(records), len(turns) - len(records), means)
    return summaries


@dataclass(frozen=True)
class WinLossTie:
    """Comparison of two runs over the turns in which both have a score.

    Attributes:
        wins: number of turns in which the first run has the higher score.
        losses: number of turns in which it has the lower score.
        ties: number of turns with equal scores.
    """

    wins: int
    losses: int
    ties: int


def win_loss_tie(conversations: Mapping[str, Sequence[ComparedTurn]]) -> dict[str, dict[str, WinLossTie]]:
    """Compare the first run with each other run: label of the other -> metric -> wins, losses and ties."""
    turns = [one.answers for several in conversations.values() for one in several]
    first, *others = turns[0] if turns else [""]
    found: dict[str, dict[str, WinLossTie]] = {}
    for other in others:
        apart: dict[str, list[float]] = {}
        for answers in turns:
            ours, theirs = answers[first], answers[other]
            if ours is not None and theirs is not None:
                for metric in ours.scores.keys() & theirs.scores.keys():
                    apart.setdefault(metric, []).append(ours.scores[metric] - theirs.scores[metric])
        found[other] = {
            metric: WinLossTie(sum(d > 0 for d in apart[metric]), sum(d < 0 for d in apart[metric]), apart[metric].count(0))
            for metric in metrics_of(conversations)
            if metric in apart
        }
    return found


def score(value: float) -> str:
    """Format a score with three decimals; 0 and 1 without decimals."""
    return f"{value:.0f}" if value in (0, 1) else f"{value:.3f}"


def metrics_of(conversations: Mapping[str, Sequence[ComparedTurn]]) -> list[str]:
    """The metrics that occur, in order of first occurrence."""
    names: dict[str, Any] = {}
    for turns in conversations.values():
        for one in turns:
            for record in one.answers.values():
                names.update(record.scores if record else {})
    return list(names)


def _check_same(one: AnswerRecord, other: AnswerRecord, message: str) -> None:
    pairs = {
        "question": (one.question, other.question),
        "number of images": (len(one.images), len(other.images)),
        "references": (sorted(one.references), sorted(other.references)),
    }
    for what, (left, right) in pairs.items():
        if left != right and not (what == "references" and (not left or not right)):  # a run may have no references
            raise ValueError(f"{message}: {what} {left!r} and {right!r}; compare answers to the same data.")

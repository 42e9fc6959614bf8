"""The answers of several runs, joined on conversation and round, and their mean scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .answer_records import Record

Runs = Mapping[str, Sequence[Record]]


@dataclass(frozen=True)
class Round:
    """A question and what each run answered.

    Attributes:
        asked: a record of the round, for its question, images and references.
        answers: run -> its record; None where it has none.
    """

    asked: Record
    answers: dict[str, Record | None]

    @property
    def missing(self) -> bool:
        """Whether a run has no answer."""
        return None in self.answers.values()

    @property
    def differs(self) -> bool:
        """Whether the runs' answers are not all the same text; one that is missing is another."""
        return len({None if record is None else record.answer.strip() for record in self.answers.values()}) > 1

    @property
    def imperfect(self) -> bool:
        """Whether a run has a score below 1 here."""
        return any(score < 1 for record in self.answers.values() if record for score in record.scores.values())


@dataclass(frozen=True)
class Summary:
    """What a run comes to.

    Attributes:
        answered: rounds.
        missing: rounds that another run answered and this one did not.
        means: metric -> (mean, over how many rounds), for the rounds that have a score.
    """

    answered: int
    missing: int
    means: dict[str, tuple[float, int]]


def join(runs: Runs) -> dict[str, list[Round]]:
    """All rounds of all runs: conversation -> its rounds in order. Conversations come in the order in which they are met.

    Args:
        runs: label -> records.

    Raises:
        ValueError: for a run without answers, for two answers to one round in a run, and for runs that were asked different
            things under the same name.
    """
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for label, records in runs.items():
        if not records:
            raise ValueError(f"{label} has no answers; pass the file of an evaluation that has begun.")
        for record in records:
            answers = found.setdefault((record.id, record.round), {})
            place = f"conversation {record.id!r}, round {record.round}"
            if label in answers:
                raise ValueError(f"{label} answers {place}, twice; conversations need names of their own.")
            for other, before in answers.items():
                _check_same(before, record, f"{other} and {label} were not asked the same in {place}")
            answers[label] = record
    conversations: dict[str, list[Round]] = {}
    for (name, _), answers in found.items():
        asked = next((record for record in answers.values() if record.references), next(iter(answers.values())))
        conversations.setdefault(name, []).append(Round(asked, {label: answers.get(label) for label in runs}))
    for rounds in conversations.values():
        rounds.sort(key=lambda one: one.asked.round)
    return conversations


def summarize(conversations: Mapping[str, Sequence[Round]], common: bool = False) -> dict[str, Summary]:
    """Counts and mean scores of each run; with `common`, over the rounds alone that all runs answered."""
    rounds = [one for several in conversations.values() for one in several if not (common and one.missing)]
    summaries = {}
    for label in rounds[0].answers if rounds else ():
        records = [record for one in rounds if (record := one.answers[label]) is not None]
        scores: dict[str, list[float]] = {}
        for record in records:
            for metric, score in record.scores.items():
                scores.setdefault(metric, []).append(score)
        means = {metric: (sum(values) / len(values), len(values)) for metric, values in scores.items()}
        summaries[label] = Summary(len(records), len(rounds) - len(records), means)
    return summaries


@dataclass(frozen=True)
class Duel:
    """How a run's scores stand against another's, over the rounds in which both have one.

    Attributes:
        wins: rounds in which its score is the higher one.
        losses: those in which it is the lower one.
        ties: those in which they are equal.
    """

    wins: int
    losses: int
    ties: int


def duels(conversations: Mapping[str, Sequence[Round]]) -> dict[str, dict[str, Duel]]:
    """The first run against each other one: its label -> metric -> wins, losses and ties."""
    rounds = [one.answers for several in conversations.values() for one in several]
    first, *others = rounds[0] if rounds else [""]
    found: dict[str, dict[str, Duel]] = {}
    for other in others:
        apart: dict[str, list[float]] = {}
        for answers in rounds:
            ours, theirs = answers[first], answers[other]
            if ours is not None and theirs is not None:
                for metric in ours.scores.keys() & theirs.scores.keys():
                    apart.setdefault(metric, []).append(ours.scores[metric] - theirs.scores[metric])
        found[other] = {
            metric: Duel(sum(d > 0 for d in apart[metric]), sum(d < 0 for d in apart[metric]), apart[metric].count(0))
            for metric in metrics_of(conversations)
            if metric in apart
        }
    return found


def score(value: float) -> str:
    """A score as it is shown: three digits behind the point, none for 0 and 1."""
    return f"{value:.0f}" if value in (0, 1) else f"{value:.3f}"


def metrics_of(conversations: Mapping[str, Sequence[Round]]) -> list[str]:
    """The metrics that occur, in the order in which they are met."""
    names: dict[str, Any] = {}
    for rounds in conversations.values():
        for one in rounds:
            for record in one.answers.values():
                names.update(record.scores if record else {})
    return list(names)


def _check_same(one: Record, other: Record, message: str) -> None:
    pairs = {
        "question": (one.question, other.question),
        "number of images": (len(one.images), len(other.images)),
        "references": (sorted(one.references), sorted(other.references)),
    }
    for what, (left, right) in pairs.items():
        if left != right and not (what == "references" and (not left or not right)):  # one run may have had none
            raise ValueError(f"{message}: {what} {left!r} and {right!r}; compare answers to the same data.")

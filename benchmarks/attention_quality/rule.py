"""The rule that decides, fixed before the first full run; README.md states it in words.

MMCA pays in data if, in the primary comparison, its mean over the tasks is at least `GAIN` above causal with a paired
95 % interval over seeds and items above 0, and two-hop loses at most `TWO_HOP_LOSS`. It pays in compute if at equal device
time it is at least causal.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from attention_quality.arms import NUMBERED
from attention_quality.plan import CONVERSATIONS, PRIMARY_SEEDS, TASKS, Record, Run, equal_time, mean_accuracy

GAIN = 0.02
TWO_HOP_LOSS = 0.03
TIE = 0.01  # between forms in which an image knows its number
SEEDS = len(PRIMARY_SEEDS)  # paired seeds at least
RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """A paired difference of accuracies, with its bootstrap interval over seeds and items.

    Attributes:
        mean, low, high: of the mean over `TASKS`.
        tasks: task -> (mean, low, high).
        seeds: that both have.
    """

    mean: float
    low: float
    high: float
    tasks: dict[str, tuple[float, float, float]]
    seeds: tuple[int, ...]


def by_seed(records: Iterable[Record], arm: str, mode: str, conversations: int, share: float = 1.0) -> dict[int, Record]:
    """Reported runs of an arm by seed."""
    found = {}
    for record in records:
        run = Run(**record["run"])
        if (run.arm, run.mode, run.conversations, run.share) == (arm, mode, conversations, share) and run.is_reported:
            found[run.seed] = record
    return found


def paired_seeds(one: dict[int, Record], other: dict[int, Record]) -> tuple[list[int], list[int]]:
    """The seeds that both have from the same parts, and those that both have from different parts, which are no pairs."""
    both = sorted(one.keys() & other.keys())
    same = [seed for seed in both if one[seed]["parts"] == other[seed]["parts"]]
    return same, [seed for seed in both if seed not in same]


def difference(one: dict[int, Record], other: dict[int, Record]) -> Difference | None:
    """`one` less `other`, paired by seeds and items; None without a common seed.

    In each resample, seeds are drawn with replacement for all tasks together, and items for each task.
    """
    seeds, _ = paired_seeds(one, other)
    if not seeds:
        return None
    generator = np.random.Generator(np.random.PCG64(0))
    weights = generator.multinomial(len(seeds), [1 / len(seeds)] * len(seeds), RESAMPLES) / len(seeds)
    means: dict[str, float] = {}
    resampled: dict[str, np.ndarray] = {}
    for key in one[seeds[0]]["items"]:
        gaps = np.stack([_bits(one[seed]["items"][key]) - _bits(other[seed]["items"][key]) for seed in seeds])
        items = gaps.shape[1]
        drawn = generator.integers(items, size=(RESAMPLES, items))
        means[key], resampled[key] = float(gaps.mean()), np.take_along_axis(weights @ gaps, drawn, 1).mean(1)
    of_task = {
        task: [key for key in means if key == task or (task == "distractors" and key.startswith("distractors_"))]
        for task in TASKS
    }
    task_means = {task: float(np.mean([means[key] for key in keys])) for task, keys in of_task.items()}
    task_draws = {task: np.mean([resampled[key] for key in keys], axis=0) for task, keys in of_task.items()}
    low, high = _interval(np.mean(list(task_draws.values()), axis=0))
    return Difference(
        mean=float(np.mean(list(task_means.values()))),
        low=low,
        high=high,
        tasks={task: (task_means[task], *_interval(task_draws[task])) for task in TASKS},
        seeds=tuple(seeds),
    )


def _bits(items: str) -> np.ndarray:
    return np.array([bit == "1" for bit in items], float)


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Verdict:
    """What the rule says.

    Attributes:
        pays: None if results are missing.
        reasons: sentences.
        difference: that it was decided by, if there is one.
    """

    pays: bool | None
    reasons: tuple[str, ...]
    difference: Difference | None


def points(value: float) -> str:
    """A difference of accuracies in points."""
    return f"{100 * value:+.1f}"


def told(difference: Difference) -> str:
    return (
        f"{points(difference.mean)} points ({LEVEL:.0%} interval {points(difference.low)} to {points(difference.high)}, "
        f"{len(difference.seeds)} paired seeds)"
    )


def data_verdict(
    records: Sequence[Record], arm: str = "mmca", conversations: int = CONVERSATIONS, base: str = "causal"
) -> Verdict:
    """Whether an arm pays in data. The rule is about `"mmca"`; the report also says what it says of others.

    Args:
        records: of all runs.
        arm: that is compared.
        conversations: of the primary comparison.
        base: the arm with which it is compared.
    """
    gap = difference(by_seed(records, arm, "frozen", conversations), by_seed(records, base, "frozen", conversations))
    if gap is None or len(gap.seeds) < SEEDS:
        found = 0 if gap is None else len(gap.seeds)
        return Verdict(None, (f"{found} of {SEEDS} paired seeds of {arm} and {base} are there.",), gap)
    two_hop, reasons = gap.tasks["two_hop"][0], []
    if gap.mean < GAIN:
        reasons.append(f"The mean over the tasks is not {100 * GAIN:g} points above {base}.")
    if gap.low <= 0:
        reasons.append("The interval is not above 0.")
    if two_hop < -TWO_HOP_LOSS:
        reasons.append(f"Two-hop loses {-100 * two_hop:.1f} points, more than {100 * TWO_HOP_LOSS:g}.")
    return Verdict(not reasons, (f"{arm} less {base}: {told(gap)}; two-hop {points(two_hop)}.", *reasons), gap)


def best_numbered(records: Sequence[Record], conversations: int = CONVERSATIONS) -> str | None:
    """Of the forms in which an image knows its number, the first that is at most `TIE` below the best, by the mean over the
    tasks; None until all of them have enough seeds, those of a seed with the same parts."""
    runs = {arm: by_seed(records, arm, "frozen", conversations) for arm in NUMBERED}
    if any(len(paired_seeds(found, runs[NUMBERED[0]])[0]) < SEEDS for found in runs.values()):
        return None
    means = {arm: float(np.mean([mean_accuracy(one["items"]) for one in found.values()])) for arm, found in runs.items()}
    return next(arm for arm in NUMBERED if means[arm] >= max(means.values()) - TIE)


def loses(verdict: Verdict) -> bool | None:
    """Whether an arm loses overall or on two-hop, so that another form is wanted: the whole interval is below 0, or two-hop
    loses more than the rule allows."""
    if verdict.pays is None or verdict.difference is None:
        return None
    return verdict.difference.high < 0 or verdict.difference.tasks["two_hop"][0] < -TWO_HOP_LOSS


def compute_verdict(
    records: Sequence[Record], step_times: dict[str, float] | None, conversations: int = CONVERSATIONS
) -> Verdict:
    """Whether MMCA pays in compute: the slower of the two has fewer steps, so that both take the same device time.

    Args:
        records: of all runs.
        step_times: arm -> milliseconds of a step, measured alone.
        conversations: of the primary comparison.
    """
    if step_times is None:
        return Verdict(None, ("The steps were not timed yet.",), None)
    slow, share = equal_time(step_times)
    shares = {"mmca": 1.0, "causal": 1.0} | {slow: share}
    found = {arm: by_seed(records, arm, "frozen", conversations, shares[arm]) for arm in shares}
    gap = difference(found["mmca"], found["causal"])
    if gap is None or len(gap.seeds) < SEEDS:
        there = 0 if gap is None else len(gap.seeds)
        return Verdict(
            None, (f"{there} of {SEEDS} paired seeds at equal device time ({slow} has {share:.0%}) are there.",), gap
        )
    reasons = [f"mmca less causal at equal device time ({slow} has {share:.0%} of the steps): {told(gap)}."]
    return Verdict(gap.mean >= 0, tuple(reasons), gap)

"""Which runs there are, and with which learning rate. Fixed before the first full run; README.md says why."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attention_quality.arms import ARMS, NUMBERED, PACKAGE, PRIMARY
from attention_quality.scenes import IMAGE_KINDS
from attention_quality.sizes import Size

MODES = ("frozen", "lora", "full")
CONVERSATIONS = 16384  # of the primary comparison
PRIMARY_SEEDS = (0, 1, 2, 3, 4, 5)
EXPLORATORY_SEEDS = (0, 1)
RATE_SEED = 1000  # learning rates are chosen on it; it is not reported
LEARNING_RATES = {
    "frozen": (1e-3, 2e-3, 4e-3, 8e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "full": (1e-4, 3e-4, 1e-3),
}
OTHERS = tuple(arm for arm in ARMS if arm not in (*PRIMARY, *NUMBERED, PACKAGE))
TRAINED = (*PRIMARY, "mmca_title")  # compared where the decoder is trained too

# The tasks, which count equally; "distractors" is the mean over its numbers of images.
TASKS = ("attribute", "which", "two_hop", "print", "distractors")
ALONE = "alone"  # an attribute of the only image: reported beside the tasks, as it takes no choice between images

Record = dict[str, Any]

# What a run's result depends on.
SOURCES = ("arms.py", "language.py", "parts.py", "plan.py", "runs.py", "scenes.py", "sizes.py", "tower.py")


@dataclass(frozen=True)
class Run:
    """One training and its measurement.

    Attributes:
        arm: of `ARMS`.
        mode: "frozen" trains projector and embeddings, "lora" also adapters of the decoder, "full" all but the tower.
        conversations: of the training data.
        seed: of the projector, the adapters, the data and its order.
        learning_rate: the highest.
        share: of the steps that so many conversations take; the schedule of the learning rate ends with them.
    """

    arm: str
    mode: str
    conversations: int
    seed: int
    learning_rate: float
    share: float = 1.0

    @property
    def name(self) -> str:
        name = f"{self.mode}-{self.conversations}-{self.arm}-seed{self.seed}-rate{self.learning_rate:g}"
        return name if self.share == 1 else f"{name}-share{self.share:g}"

    @property
    def is_reported(self) -> bool:
        return self.seed != RATE_SEED


@dataclass(frozen=True)
class Stage:
    """Runs that belong together: every arm with every number of conversations and seed.

    Attributes:
        arms, mode, conversations, seeds: of the runs.
        about: what they are for.
        equal_time: the slower of causal and mmca alone, with as many steps as take the other's device time.
    """

    arms: tuple[str, ...]
    mode: str
    conversations: tuple[int, ...]
    seeds: tuple[int, ...]
    about: str
    equal_time: bool = False

    @property
    def chooses_rates(self) -> bool:
        return self.seeds == (RATE_SEED,)


STAGES = {
    "rates": Stage(PRIMARY, "frozen", (CONVERSATIONS,), (RATE_SEED,), "learning rates of the primary comparison"),
    "primary": Stage(PRIMARY, "frozen", (CONVERSATIONS,), PRIMARY_SEEDS, "the primary comparison"),
    "compute": Stage(
        ("causal", "mmca"), "frozen", (CONVERSATIONS,), PRIMARY_SEEDS, "the primary comparison at equal device time", True
    ),
    "rates-number": Stage(NUMBERED, "frozen", (CONVERSATIONS,), (RATE_SEED,), "learning rates of forms with numbers"),
    "number": Stage(NUMBERED, "frozen", (CONVERSATIONS,), PRIMARY_SEEDS, "forms with numbers"),
    "package": Stage((PACKAGE,), "frozen", (CONVERSATIONS,), PRIMARY_SEEDS, "exploratory: the package's numbered images"),
    "data": Stage(PRIMARY, "frozen", (1024, 4096), EXPLORATORY_SEEDS, "exploratory: less data"),
    "arms": Stage(OTHERS, "frozen", (CONVERSATIONS,), EXPLORATORY_SEEDS, "exploratory: the other arms"),
    "data-64k": Stage(PRIMARY, "frozen", (65536,), EXPLORATORY_SEEDS, "exploratory: more data"),
    "rates-lora": Stage(TRAINED, "lora", (CONVERSATIONS,), (RATE_SEED,), "learning rates with LoRA"),
    "lora": Stage(TRAINED, "lora", (CONVERSATIONS,), EXPLORATORY_SEEDS, "exploratory: LoRA"),
    "rates-full": Stage(TRAINED, "full", (CONVERSATIONS,), (RATE_SEED,), "learning rates of full training"),
    "full": Stage(TRAINED, "full", (CONVERSATIONS,), EXPLORATORY_SEEDS, "exploratory: full training"),
}


def equal_time(step_times: dict[str, float]) -> tuple[str, float]:
    """Which of causal and mmca takes more device time for a step, and the share of its steps that takes as much as all steps
    of the other.

    Args:
        step_times: arm -> milliseconds of a step, measured alone.
    """
    fast, slow = sorted(("causal", "mmca"), key=lambda arm: step_times[arm])
    return slow, round(step_times[fast] / step_times[slow], 3)


def runs_of(stage: Stage, rates: dict[tuple[str, str], float], step_times: dict[str, float] | None = None) -> list[Run]:
    """The runs of a stage. Those of a seed follow each other, so that they are made with the same parts.

    Args:
        stage: of `STAGES`.
        rates: (mode, arm) -> the learning rate that was chosen; not needed by a stage that chooses them.
        step_times: arm -> milliseconds of a step; needed at equal time alone.

    Raises:
        ValueError: if a learning rate was not chosen yet, or a step was not timed.
    """
    arms, share = stage.arms, 1.0
    if stage.equal_time:
        if step_times is None:
            raise ValueError("Steps were not timed yet, so equal device times are unknown; run `step-times` first.")
        slow, share = equal_time(step_times)
        arms = (slow,)
    runs = []
    for conversations in stage.conversations:
        for seed in stage.seeds:
            for arm in arms:
                if stage.chooses_rates:
                    choices: Iterable[float] = LEARNING_RATES[stage.mode]
                elif (stage.mode, tried := ARMS[arm].varies or arm) in rates:
                    choices = [rates[stage.mode, tried]]
                else:
                    raise ValueError(
                        f"No learning rate of {tried!r} ({stage.mode}) was chosen: some of its runs on seed {RATE_SEED} are "
                        "missing; run its stage of rates first."
                    )
                runs += [Run(arm, stage.mode, conversations, seed, rate, share) for rate in choices]
    return runs


def mean_of_items(bits: str) -> float:
    """The fraction of "1"."""
    return bits.count("1") / len(bits)


def item_sets(size: Size, count: int, count_distractors: int) -> list[tuple[str, str, int, int]]:
    """The held-out items of each task: the key of their results, the task, the images of an item, and how many items."""
    sets = [(task, task, size.asked_images, count) for task in IMAGE_KINDS]
    distractors = [(f"{TASKS[-1]}_{images}", TASKS[-1], images, count_distractors) for images in size.distractors]
    return [*sets, (ALONE, ALONE, 1, count), *distractors]


def by_task(values: dict[str, float]) -> dict[str, float]:
    """The value of each task, from those of `item_sets`: the last is the mean over its numbers of images."""
    distractors = [value for key, value in values.items() if key.startswith(f"{TASKS[-1]}_")]
    return {task: values[task] for task in TASKS[:-1]} | {TASKS[-1]: sum(distractors) / len(distractors)}


def accuracies(items: dict[str, str]) -> dict[str, float]:
    """Accuracy of each task, from the items of a run: key -> "1" or "0" for each item."""
    return by_task({key: mean_of_items(bits) for key, bits in items.items()})


def mean_accuracy(items: dict[str, str]) -> float:
    """The mean over `TASKS`."""
    return sum(accuracies(items).values()) / len(TASKS)


def chosen_rates(records: Iterable[Record], conversations: int = CONVERSATIONS) -> dict[tuple[str, str], float]:
    """(mode, arm) -> the learning rate with the highest mean accuracy on `RATE_SEED`; the smaller of equal ones. Only where
    all rates were tried.

    Args:
        records: of any runs.
        conversations: of the runs that choose.
    """
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for record in records:
        run = Run(**record["run"])
        if not run.is_reported and run.conversations == conversations:
            scores.setdefault((run.mode, run.arm), {})[run.learning_rate] = mean_accuracy(record["items"])
    return {
        (mode, arm): max(sorted(by_rate), key=lambda rate: by_rate[rate])
        for (mode, arm), by_rate in scores.items()
        if set(by_rate) >= set(LEARNING_RATES[mode])
    }


def path_of(run: Run, folder: Path) -> Path:
    return folder / "runs" / f"{run.name}.json"


def read_records(folder: Path) -> list[Record]:
    """All runs of a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]


def read_step_times(folder: Path) -> dict[str, float] | None:
    """arm -> milliseconds of a step, as `step-times` wrote them; None if it did not."""
    path = folder / "step_times.json"
    if not path.exists():
        return None
    return {arm: figures["ms"] for arm, figures in json.loads(path.read_text())["results"]["arms"].items()}


@cache
def code_hash() -> str:
    """Of the files that a run's result depends on."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES)).hexdigest()[:16]


def as_json(run: Run) -> Record:
    return asdict(run)

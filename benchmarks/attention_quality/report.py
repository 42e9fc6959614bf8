"""The report: a table of every arm with intervals, learning curves, and what the rule says."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib import pyplot
from matplotlib.figure import Figure
from plots import finish, save, style_of, ticks_at
from trained_tasks import markdown

from attention_quality.arms import ARMS
from attention_quality.guess import guesses
from attention_quality.plan import (
    ALONE,
    CONVERSATIONS,
    MODES,
    RATE_SEED,
    STAGES,
    TASKS,
    Record,
    Run,
    accuracies,
    by_task,
    chosen_rates,
    equal_time,
    mean_accuracy,
    mean_of_items,
    read_records,
    read_step_times,
    runs_of,
)
from attention_quality.rule import (
    Verdict,
    best_numbered,
    by_seed,
    compute_verdict,
    data_verdict,
    difference,
    loses,
    paired_seeds,
    points,
)
from attention_quality.versions import comparable

# Causal and mmca as in the other plots.
STYLES = dict(zip(ARMS, map(style_of, (0, 2, 1, *range(3, len(ARMS)))), strict=True))
GUESS = "guess: all images read, none told apart"  # guess.py
LOOK = {"svg.hashsalt": "dsvl", "figure.constrained_layout.use": True, "figure.facecolor": "white", "font.size": 9}


def check_alike(records: Sequence[Record]) -> None:
    """Refuse to compare runs and step times of different data or code.

    Raises:
        ValueError: if there are some.
    """
    for key in ("generator", "code", "size"):
        found = sorted({(record | comparable(record))[key] for record in records})
        if len(found) > 1:
            raise ValueError(
                f"The results have {len(found)} values of {key!r} ({', '.join(found)}); a report compares one, so move "
                "the others to another folder."
            )


def groups_of(records: Sequence[Record]) -> list[tuple[str, int]]:
    """(mode, conversations) of the reported runs at full steps, the primary comparison first."""
    runs = [Run(**record["run"]) for record in records]
    found = {(run.mode, run.conversations) for run in runs if run.is_reported and run.share == 1}
    return sorted(found, key=lambda group: (group != ("frozen", CONVERSATIONS), MODES.index(group[0]), group[1]))


def table(records: Sequence[Record], mode: str, conversations: int, step_times: dict[str, float] | None = None) -> str:
    """Every arm of a mode and a number of conversations, in Markdown: accuracies are means over seeds, the difference is
    that of the mean over the tasks, with its interval."""
    base = by_seed(records, "causal", mode, conversations)
    rows: list[list[object]] = []
    for arm in ARMS:
        found = by_seed(records, arm, mode, conversations)
        if not found:
            continue
        of_tasks = [accuracies(record["items"]) for record in found.values()]
        gap = None if arm == "causal" else difference(found, base)
        rates = sorted({record["run"]["learning_rate"] for record in found.values()})
        rows.append(
            [
                arm,
                len(found),
                ", ".join(f"{rate:g}" for rate in rates),
                *(mean(values[task] for values in of_tasks) for task in TASKS),
                mean(mean_accuracy(record["items"]) for record in found.values()),
                mean(mean_of_items(record["items"][ALONE]) for record in found.values()),
                "-" if gap is None else f"{points(gap.mean)} ({points(gap.low)} to {points(gap.high)})",
                f"{mean(record['perplexity'] for record in found.values()):.3f}",
                step_text(arm, step_times if mode == "frozen" else None),  # which were measured in this mode
            ]
        )
    guess = guesses(records[0]["size"])
    of_guess = by_task(guess)
    rows.append([GUESS, "-", "-", *of_guess.values(), mean(of_guess.values()), guess[ALONE], "-", "-", "-"])
    head = ["arm", "seeds", "learning rate", *(task.replace("_", "-") for task in TASKS), "mean", "one image"]
    return markdown([*head, "points less causal (95 %)", "perplexity of text", "ms per step"], rows)


def step_text(arm: str, step_times: dict[str, float] | None) -> str:
    """Milliseconds of a step; those of dense masks are marked, as they do not compare with kernels."""
    if step_times is None or arm not in step_times:
        return "-"
    return f"{step_times[arm]:.1f}" + ("" if ARMS[arm].core else " (dense masks)")


def distractor_table(records: Sequence[Record], conversations: int = CONVERSATIONS) -> str:
    """Accuracy about one of so many images, of each arm."""
    rows: list[list[object]] = []
    keys: list[str] = []
    for arm in ARMS:
        found = by_seed(records, arm, "frozen", conversations)
        if found:
            items = [record["items"] for record in found.values()]
            keys = [key for key in items[0] if key.startswith("distractors_")]
            rows.append([arm, *(mean(mean_of_items(one[key]) for one in items) for key in keys)])
    guess = guesses(records[0]["size"])
    rows.append([GUESS, *(guess[key] for key in keys)])
    return markdown(["arm", *(f"1 of {key.removeprefix('distractors_')}" for key in keys)], rows)


def gaps_in(records: Sequence[Record], folder: Path, step_times: dict[str, float] | None) -> list[str]:
    """What is missing, failed, or not paired, and what else a reader has to know, as sentences."""
    lines, rates = [], chosen_rates(records)
    there = {Run(**record["run"]).name for record in records}
    for name, stage in STAGES.items():
        try:
            runs = runs_of(stage, rates, step_times)
        except ValueError as error:
            lines.append(f"Stage `{name}`, {stage.about}: not begun. {error}")
            continue
        missing = [run.name for run in runs if run.name not in there]
        if missing:
            lines.append(f"Stage `{name}`, {stage.about}: {len(missing)} of {len(runs)} runs are missing.")
    for path in sorted((folder / "runs").glob("*.failed")):
        lines.append(f"Run `{path.stem}` failed: {path.read_text().strip()}")
    for mode, conversations in groups_of(records):
        for arm in ARMS:
            pair = (by_seed(records, one, mode, conversations) for one in (arm, "causal"))
            _, unpaired = paired_seeds(*pair)
            if unpaired:
                lines.append(
                    f"{arm} and causal ({mode}, {conversations}): seeds {', '.join(map(str, unpaired))} were made with "
                    "different parts and are no pairs; delete these runs and make both again on one machine."
                )
    for (mode, arm), rate in rates.items():
        tried = sorted(
            record["run"]["learning_rate"]
            for record in records
            if record["run"]["seed"] == RATE_SEED and (record["run"]["mode"], record["run"]["arm"]) == (mode, arm)
        )
        if rate in (tried[0], tried[-1]):
            lines.append(f"The best learning rate of {arm} ({mode}), {rate:g}, is at the end of those that were tried.")
    return lines


def verdict_lines(name: str, verdict: Verdict) -> list[str]:
    said = {None: "not decided", True: "yes", False: "no"}[verdict.pays]
    return [f"**{name}: {said}.** {' '.join(verdict.reasons)}"]


def verdicts(
    records: Sequence[Record], step_times: dict[str, float] | None, conversations: int = CONVERSATIONS
) -> list[str]:
    """What the rule says, as sentences."""
    of_mmca = data_verdict(records, "mmca", conversations)
    lines = verdict_lines("MMCA pays in data", of_mmca)
    lines += verdict_lines("MMCA pays in compute", compute_verdict(records, step_times, conversations))
    lost = {None: "not decided", True: "yes", False: "no"}[loses(of_mmca)]
    lines.append(f"**MMCA loses overall or on two-hop: {lost}.**")
    gap = of_mmca.difference
    if of_mmca.pays is False and gap is not None and gap.low <= 0 <= gap.high and not loses(of_mmca):
        lines.append("The two do not differ beyond noise: speed and exact reuse cost no quality here.")
    lines += verdict_lines("By the same rule, the alpha merge pays in data", data_verdict(records, "alpha", conversations))
    best = best_numbered(records, conversations)
    if best is not None:
        lines.append(f"**The best form in which an image knows its number: {best}.**")
        lines += verdict_lines(f"{best} pays in data", data_verdict(records, best, conversations))
        lines += verdict_lines(f"{best} becomes the default", data_verdict(records, best, conversations, base="mmca"))
    return lines


def draw_curves(records: Sequence[Record]) -> Figure:
    """Mean accuracy over steps: a panel for each mode and number of conversations, a band over the seeds."""
    groups = groups_of(records)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    figure, grid = pyplot.subplots(lines, columns, figsize=(max(6.5, 1.2 + 3.0 * columns), 1.4 + 2.6 * lines), squeeze=False)
    for axes, (mode, conversations) in zip(grid.flat, groups, strict=False):
        for arm, style in STYLES.items():
            curves = [
                {point["step"]: mean_accuracy(point["items"]) for point in record["curve"]}
                for record in by_seed(records, arm, mode, conversations).values()
            ]
            if not curves:
                continue
            steps = list(curves[0])
            values = [[100 * curve[step] for curve in curves] for step in steps]
            axes.plot(steps, list(map(mean, values)), label=arm, markersize=4, **style)
            low, high = (list(map(end, values)) for end in (min, max))
            axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
        axes.set_title(f"{mode}, {conversations:,} conversations")
        axes.set_xlabel("steps")
        axes.set_ylim(0, 100)
    for axes in list(grid.flat)[len(groups) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("mean accuracy, %")
    finish(figure, "Learning curves; bands: minimum and maximum of the seeds")
    return figure


def draw_data(records: Sequence[Record]) -> Figure:
    """Mean accuracy over the number of conversations, with the projector and the embeddings trained."""
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    sizes = sorted(conversations for mode, conversations in groups_of(records) if mode == "frozen")
    for arm, style in STYLES.items():
        found = {size: by_seed(records, arm, "frozen", size) for size in sizes}
        values = {size: [100 * mean_accuracy(one["items"]) for one in runs.values()] for size, runs in found.items() if runs}
        if not values:
            continue
        axes.plot(list(values), [mean(one) for one in values.values()], label=arm, **style)
        low, high = ([end(one) for one in values.values()] for end in (min, max))
        axes.fill_between(list(values), low, high, color=style["color"], alpha=0.15, linewidth=0)
    ticks_at(axes, [float(size) for size in sizes])
    axes.set_ylim(0, 100)
    axes.set_xlabel("conversations")
    axes.set_ylabel("mean accuracy, %")
    finish(figure, "Accuracy over training data, language model frozen")
    return figure


def write_report(folder: Path, out: Path) -> str:
    """Write `report.md`, `curves.svg` and, with several numbers of conversations, `data.svg`; returns the text.

    Args:
        folder: of the results.
        out: the output directory.

    Raises:
        ValueError: if there is no reported run, or if runs do not compare.
    """
    records, step_times = read_records(folder), read_step_times(folder)
    check_alike(records)
    if records and step_times is not None:
        timed = json.loads((folder / "step_times.json").read_text())["results"]
        check_alike([*records, timed | {"size": records[0]["size"]}])
    groups = groups_of(records)
    if not groups:
        raise ValueError(f"{folder} holds no reported run; runs on seed {RATE_SEED} only choose learning rates.")
    lines = ["# Attention and quality: results", "", *(f"- {line}" for line in verdicts(records, step_times)), ""]
    for mode, conversations in groups:
        kind = "primary comparison" if (mode, conversations) == ("frozen", CONVERSATIONS) else "exploratory"
        lines += [
            f"## {mode}, {conversations:,} conversations ({kind})",
            "",
            table(records, mode, conversations, step_times),
            "",
        ]
        if mode == "frozen":
            lines += [distractor_table(records, conversations), ""]
    if step_times is not None:
        slow, share = equal_time(step_times)
        lines += [f"Equal device time: {slow} gets {share:.0%} of its steps.", ""]
    lines += ["## Gaps", "", *(f"- {line}" for line in gaps_in(records, folder, step_times)), ""]
    parts = sorted({record["parts"] for record in records})
    first = records[0]

    def every(key: str) -> str:
        return " and ".join(sorted({record[key] for record in records}))

    lines += [
        f"Data generator {first['generator']}, code {every('code')}, size {first['size']}, parts {', '.join(parts)}; "
        f"{every('device')}, torch {every('torch')}, transformers {every('transformers')}; {len(records)} runs.",
        "",
    ]
    text = "\n".join(lines)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.md").write_text(text)
    drawn: dict[str, Any] = {"curves.svg": draw_curves}
    if len({conversations for mode, conversations in groups if mode == "frozen"}) > 1:
        drawn["data.svg"] = draw_data
    with pyplot.rc_context(LOOK):
        for name, draw in drawn.items():
            save(draw(records), first, out / name)
    return text

"""Plots the losses and evaluation metrics of a run from its `trainer_state.json`."""

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

PLOT = "training.svg"  # in the output directory; shown on the model card
TIMES = ("_runtime", "_per_second", "_preparation_time")
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # the palette of Okabe and Ito


def plot_training(state: Path, plot: Path) -> bool:
    """Plot the losses over the steps, and below them each evaluation metric.

    Args:
        state: path of a `trainer_state.json`.
        plot: path of the SVG file to write. The output is deterministic.

    Returns:
        Whether the plot was written: it needs matplotlib (a warning is logged without it) and two values of a curve.
    """
    history = json.loads(state.read_text(encoding="utf-8"))["log_history"]
    panels = curves(history)
    if not any(len(values) > 1 for lines in panels.values() for values in lines.values()):
        return False
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("The training is not plotted, as matplotlib is not installed; pip install 'dsvl[train]'.")
        return False
    with rc_context({"svg.hashsalt": "dsvl", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7, 2.2 + 1.8 * (len(panels) - 1)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for colour, (name, values) in zip(COLOURS, lines.items(), strict=False):
                steps, heights = zip(*values, strict=True)
                ax.plot(steps, heights, color=colour, label=name, marker="." if len(values) < 40 else None)
            ax.set_ylabel(title)
            ax.grid(alpha=0.3)
            if len(lines) > 1:
                ax.legend(frameon=False)
        axes[-1].set_xlabel("step")
        figure.savefig(plot, format="svg", metadata={"Date": None})
    return True


def curves(history: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """The panels of the plot, top to bottom: title -> label -> (step, value). The first has the losses."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}}
    for entry in history:
        for name, value in entry.items():
            if name in ("loss", "eval_loss"):
                line = panels["loss"].setdefault("training" if name == "loss" else "evaluation", [])
            elif name.startswith("eval_") and not name.endswith(TIMES) and isinstance(value, (int, float)):
                title = name.removeprefix("eval_").replace("_", " ")
                line = panels.setdefault(title, {}).setdefault(title, [])
            else:
                continue
            if not line or line[-1][0] != entry["step"]:  # without the final evaluation of the best checkpoint
                line.append((entry["step"], value))
    return panels

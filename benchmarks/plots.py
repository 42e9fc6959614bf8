"""Plots of benchmark results as SVG.

    python benchmarks/plots.py FOLDER [--out FOLDER]

FOLDER holds the JSON files with the names in `PLOTS`; missing files are reported. matplotlib comes with the extra `bench`.
Colours are the colour-blind safe ones of Okabe and Ito, and each line has a marker of its own. Bands and error bars show the
minimum and maximum of the rounds.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot, ticker  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

# Colour and marker by prefix of a row's name; the first match counts.
STYLES = {
    "causal": ("#444444", "o"),
    "Llava": ("#444444", "o"),
    "llava": ("#444444", "o"),
    "run again": ("#444444", "o"),
    "DSVL causal": ("#56B4E9", "v"),
    "DSVL mmca, encoded": ("#009E73", "P"),
    "DSVL mmca, flex": ("#E69F00", "D"),
    "mmca flex": ("#E69F00", "D"),
    "mmca fused": ("#009E73", "P"),
    "mmca": ("#0072B2", "s"),
    "DSVL": ("#0072B2", "s"),
    "dsvl": ("#0072B2", "s"),
    "incremental": ("#0072B2", "s"),
    "released": ("#D55E00", "^"),
}
PALETTE = (
    ("#444444", "o"),
    ("#E69F00", "D"),
    ("#0072B2", "s"),
    ("#009E73", "P"),
    ("#CC79A7", "X"),
    ("#D55E00", "^"),
    ("#56B4E9", "v"),
    ("#F0E442", "<"),
    ("#882255", ">"),
)
LIGHT = ("#56B4E9", "#E69F00")  # colours that need black labels

AXES = {"length": "tokens", "images": "images", "batch": "batch size"}


def style(name: str) -> dict[str, Any]:
    """Colour and marker of a row."""
    name = name.rsplit("/", 1)[-1]  # the model in names of fine_tuning.py's rows
    colour, marker = next((drawn for begin, drawn in STYLES.items() if name.startswith(begin)), PALETTE[4])
    return {"color": colour, "marker": marker}


def style_of(index: int) -> dict[str, Any]:
    """Colour, marker and line of a row by its number; rows beyond the palette are dashed."""
    colour, marker = PALETTE[index % len(PALETTE)]
    return {"color": colour, "marker": marker, "linestyle": "-" if index < len(PALETTE) else "--"}


def line(axes: Axes, name: str, points: dict[float, dict[str, float]], key: str = "ms", **drawn: Any) -> None:
    """Draw a row's figures over the varied value, without skipped ones."""
    measured = {x: figures for x, figures in points.items() if key in figures}
    if not measured:
        return
    drawn = drawn or style(name)
    axes.plot(list(measured), [figures[key] for figures in measured.values()], label=name, markersize=5, **drawn)
    low, high = ([figures[f"{key}_{end}"] for figures in measured.values()] for end in ("low", "high"))
    axes.fill_between(list(measured), low, high, color=drawn["color"], alpha=0.15, linewidth=0)


def transposed(tables: dict[Any, dict[str, Any]]) -> dict[str, dict[float, Any]]:
    """Convert {value: {row: figures}} to {row: {value: figures}}."""
    rows = dict.fromkeys(name for table in tables.values() for name in table)
    return {name: {float(x): table[name] for x, table in tables.items() if name in table} for name in rows}


def ticks_at(axes: Axes, values: list[float]) -> None:
    """Make the horizontal axis logarithmic (base 2, symlog with 0), with a tick for each value."""
    least = min((value for value in values if value > 0), default=1)
    if 0 in values:
        axes.set_xscale("symlog", base=2, linthresh=least)
    else:
        axes.set_xscale("log", base=2)
    names = [f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}" for value in values]
    axes.set_xticks(values, names)
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def logarithmic(axes: Axes) -> None:
    """Make the vertical axis logarithmic, with plain numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


# ----------------------------------------------------------------------------------------------------------------------
# One figure for each file


def draw_attention(record: dict[str, Any]) -> Figure:
    """Time of a layer over the fraction of image tokens; a column for each shape, a row for each direction."""
    shapes: dict[str, dict[int, dict[str, Any]]] = {}
    for title, tables in record["results"].items():
        shape, images = title.split(", ")
        shapes.setdefault(shape, {})[int(images.split()[0])] = tables
    directions = ("forward", "forward + backward")
    figure, grid = pyplot.subplots(
        len(directions), len(shapes), figsize=(1.2 + 3.0 * len(shapes), 5.6), squeeze=False, sharex=True
    )
    per_image = record["options"]["per_image"]
    for column, (shape, by_images) in enumerate(shapes.items()):
        tokens = int(shape.split("x")[1])
        for axes, direction in zip(grid[:, column], directions, strict=True):
            tables = {100 * count * per_image / tokens: tables[direction] for count, tables in by_images.items()}
            for name, points in transposed(tables).items():
                line(axes, name, points)
            logarithmic(axes)
            axes.set_title(f"{shape.replace('x', ' x ')} tokens, {direction}")
        grid[-1, column].set_xlabel("image tokens, % of all tokens")
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    options = record["options"]
    finish(figure, f"One attention layer, {options['heads']} heads of {options['head_dim']}, {options['dtype']}")
    return figure


def draw_growth(record: dict[str, Any]) -> Figure:
    """Time over length, images and batch size; a row for each direction of attention, and one for the prefill."""
    sweeps = {sweep: tables for sweep, tables in record["results"].items() if tables}
    rows = list(dict.fromkeys(what for tables in sweeps.values() for what in tables))
    options = record["options"]
    figure, grid = pyplot.subplots(
        len(rows), len(sweeps), figsize=(1.2 + 3.0 * len(sweeps), 1.2 + 2.7 * len(rows)), squeeze=False
    )
    for column, (sweep, tables) in enumerate(sweeps.items()):
        fixed = {
            "length": f"{options['share']:.0%} image tokens",
            "images": f"in {options['text']:,} tokens of text",
            "batch": f"of {options['tokens']:,} tokens each",
        }[sweep]
        for axes, what in zip(grid[:, column], rows, strict=True):
            for name, points in transposed(tables[what]).items():
                line(axes, name, points)
            ticks_at(axes, [float(value) for value in tables[what]])
            logarithmic(axes)
            axes.set_xlabel(f"{AXES[sweep]}, {fixed}")
            axes.set_title(what)
    for axes in grid[:, 0]:
        axes.set_ylabel("ms")
    layer = f"{options['heads']} heads of {options['head_dim']}, images of {options['per_image']} tokens"
    finish(figure, f"Scaling of one attention layer ({layer})" + (", and of the prefill" if "prefill" in rows else ""))
    return figure


def bars(axes: Axes, rows: dict[str, dict[str, Any]], key: str, label: str) -> None:
    """Draw a horizontal bar for each row, from the top."""
    measured = {name: figures for name, figures in rows.items() if figures.get(key) is not None}
    positions = range(len(measured))
    lengths = [figures[key] for figures in measured.values()]
    colours = [style(name)["color"] for name in measured]
    ends = [
        [abs(figures.get(f"{key}_{end}", figures[key]) - figures[key]) for figures in measured.values()]
        for end in ("low", "high")
    ]
    axes.barh(positions, lengths, xerr=ends, color=colours, ecolor="#999999", height=0.7)
    for position, length, colour in zip(positions, lengths, colours, strict=True):
        text = f"{length:,.0f}" if length >= 100 else f"{length:.3g}"
        ink = "black" if colour in LIGHT else "white"
        axes.annotate(text, (0, position), xytext=(5, 0), textcoords="offset points", va="center", color=ink)
    axes.set_yticks(positions, list(measured))
    axes.invert_yaxis()
    axes.set_xlabel(label)


def draw_steps(rows: dict[str, dict[str, Any]], title: str) -> Figure:
    """Time of training steps, and peak memory if it was measured."""
    has_memory = any(figures.get("peak_gib") is not None for figures in rows.values())
    height = 1.6 + 0.3 * len(rows)
    figure, grid = pyplot.subplots(1, 1 + has_memory, figsize=(6.5 + 3.0 * has_memory, height), squeeze=False, sharey=True)
    bars(grid[0, 0], rows, "ms", "ms per step")
    if has_memory:
        bars(grid[0, 1], rows, "peak_gib", "peak GiB")
    finish(figure, title, legend=False)
    return figure


def draw_training_step(record: dict[str, Any]) -> Figure:
    rows = {
        # Total memory with one model's weights, if it is known.
        name + (", checkpointing" if "checkpointing" in setup else ""): figures | {"peak_gib": figures.get("total_gib")}
        for setup, table in record["results"].items()
        for name, figures in table.items()
        if setup != "frozen" or "8" in name  # its other rows are those of "plain"
    }
    options = record["options"]
    return draw_steps(
        rows,
        f"Forward and backward, {options['size']} models, {options['batch']} x {options['tokens']:,} tokens, "
        f"{options['images']} images per sample",
    )


def draw_fine_tuning(record: dict[str, Any]) -> Figure:
    shape = record["shape"]
    title = f"Whole training steps, {shape['batch']} x {shape['tokens']:,} tokens, {shape['images']} images per sample"
    return draw_steps({name: row for name, row in record["results"].items() if "ms" in row}, title)


def draw_chat(record: dict[str, Any]) -> Figure:
    """Time to first token in each turn."""
    figure, axes = pyplot.subplots(figsize=(6.5, 3.6))
    turns = list(record["results"].values())
    for name in ("run again", "incremental"):
        line(axes, name, {number: table[name] for number, table in enumerate(turns, start=1)})
    titles = [
        title.removeprefix("round ").removeprefix("turn ").replace(", with an image", "").replace(", ", ",\n")
        for title in record["results"]
    ]
    axes.set_xticks(range(1, len(turns) + 1), titles)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("turn of a conversation with an image in each")
    axes.set_ylabel("ms to the first token")
    finish(figure, f"Time to first token, {record['options']['size']} model, {turns[-1]['tokens']:,} tokens at the end")
    return figure


def draw_decoding(record: dict[str, Any]) -> Figure:
    """Tokens per second over the batch size."""
    ways: dict[str, dict[float, Any]] = {}
    for title, figures in record["results"].items():
        way, _, batch = title.rpartition(" batch ")
        ways.setdefault(way.rstrip(","), {})[float(batch)] = figures
    figure, axes = pyplot.subplots(figsize=(6.5, 4.2))
    for index, (way, points) in enumerate(ways.items()):
        line(axes, way, points, "tokens_per_s", **style_of(index))
    ticks_at(axes, sorted({batch for points in ways.values() for batch in points}))
    logarithmic(axes)
    axes.set_xlabel(AXES["batch"])
    axes.set_ylabel("tokens/s")
    finish(figure, "Decoding")
    return figure


# Results file -> function that draws it, and script that writes it. The plot has the name of the file.
PLOTS: dict[str, tuple[Callable[[dict[str, Any]], Figure], str]] = {
    "attention.json": (draw_attention, "attention.py"),
    "growth.json": (draw_growth, "growth.py"),
    "training_step.json": (draw_training_step, "training_step.py"),
    "fine_tuning.json": (draw_fine_tuning, "fine_tuning.py"),
    "chat.json": (draw_chat, "chat.py"),
    "decoding.json": (draw_decoding, "decoding.py"),
}


def finish(figure: Figure, title: str, legend: bool = True) -> None:
    """Add title, grid, and one legend for all panels."""
    figure.suptitle(title, fontsize=10)
    for axes in figure.axes:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if legend:
        found: dict[str, Any] = {}
        for axes in figure.axes:
            handles, labels = axes.get_legend_handles_labels()
            found |= dict(zip(labels, handles, strict=True))
        columns = max(int(figure.get_figwidth() / 2.2), 1)
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=columns, frameon=False)


def save(figure: Figure, record: dict[str, Any], path: Path) -> None:
    versions = [f"{name} {record[name]}" for name in ("torch", "transformers") if name in record]
    figure.suptitle("\n".join([figure.get_suptitle(), ", ".join([record["device"], *versions])]), fontsize=10)
    figure.savefig(path, format="svg", metadata={"Date": None})
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with the JSON files")
    parser.add_argument("--out", type=Path, help="folder for the plots (default: FOLDER)")
    options = parser.parse_args(argv)
    out = options.out or options.folder
    # A fixed salt makes the SVG files reproducible.
    look = {
        "svg.hashsalt": "dsvl",
        "figure.constrained_layout.use": True,
        "figure.facecolor": "white",
        "font.size": 9,
        "axes.titlesize": 9,
    }
    drawn = 0
    with pyplot.rc_context(look):
        for name, (draw, script) in PLOTS.items():
            source, plot = options.folder / name, out / name.replace(".json", ".svg")
            if not source.exists():
                print(f"{source} is missing, so {plot.name} is not drawn: python benchmarks/{script} --out {source}")
                continue
            record = json.loads(source.read_text())
            out.mkdir(parents=True, exist_ok=True)
            save(draw(record), record, plot)
            print(plot)
            drawn += 1
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())

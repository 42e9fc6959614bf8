"""Timing that compares alternatives in one process, in turns, on a CPU or an NVIDIA GPU, and how the figures are kept."""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from flops import peak_tflops

# One alternative's figures, or {"left_out": reason}; and those of all, in the order in which they ran.
Figures = dict[str, Any]
Table = dict[str, Figures]

LEAST_ROUNDS = 3  # that an alternative takes part in, however long they take


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The GPU; or the processor, as far as it tells its name, and on how many threads torch runs."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    names = [line for line in known.read_text().splitlines() if line.startswith("model name")] if known.exists() else []
    return names[0].partition(":")[2].strip() if names else "CPU"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until the device is done and the host has what it returns."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return 1000 * (time.perf_counter() - started)


def device_ms(run: Callable[[], object]) -> float:
    """Milliseconds on the GPU between what was asked of it before and after; on a CPU, the host's."""
    if not torch.cuda.is_available():
        return host_ms(run)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def in_turns(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warm_up: int = 5,
    clock: Callable[[Callable[[], object]], float] = device_ms,
    budget: float = float("inf"),
) -> Table:
    """Run each alternative once a round, so that a change of the machine's speed meets them all.

    Args:
        alternatives: name -> what to run. Speeds are relative to the first, the base.
        rounds: how many timed rounds.
        warm_up: rounds before, for compilation and clocks.
        clock: what times a run, in milliseconds.
        budget: seconds for each alternative, its first run apart. One that has spent them takes part in no further round
            than `LEAST_ROUNDS`; the base takes part in all.

    Returns:
        What `compared` says of the times, and on a GPU the peak memory above what was allocated before (`peak_gib`).
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    spent = dict.fromkeys(alternatives, 0.0)
    peaks: dict[str, float] = {}
    base = next(iter(alternatives))
    for step in range(warm_up + rounds):
        due = step == 0 or warm_up <= step < warm_up + LEAST_ROUNDS
        running = {name for name in alternatives if due or spent[name] < budget}
        if not running:
            continue
        for name, run in alternatives.items():
            if name not in running and name != base:
                continue
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            took = clock(run)
            if step > 0:  # the first run may compile
                spent[name] += took / 1000
            if step >= warm_up:
                times[name].append(took)
                if torch.cuda.is_available():
                    peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    table = compared(times)
    for name, peak in peaks.items():
        table[name]["peak_gib"] = peak
    return table


def compared(times: Mapping[str, Sequence[float]]) -> Table:
    """What the milliseconds of alternatives that took turns say.

    Args:
        times: name -> one time a round, from the first round on. The first, the base, took part in all.

    Returns:
        For each name: median, lowest and highest time (`ms`, `ms_low`, `ms_high`); the same of how many times as fast as the
        base it was in each round (`speed`, `speed_low`, `speed_high`); and how many `rounds` there were.
    """
    reference = times[next(iter(times))]
    table: Table = {}
    for name, values in times.items():
        ratios = [one / other for one, other in zip(reference, values, strict=False)]
        table[name] = {
            "ms": statistics.median(values),
            "ms_low": min(values),
            "ms_high": max(values),
            "speed": statistics.median(ratios),
            "speed_low": min(ratios),
            "speed_high": max(ratios),
            "rounds": len(values),
        }
    return table


def peak_gib(run: Callable[[], object]) -> float:
    """The memory that a run on a GPU takes at most, above what is allocated. It runs twice: the first may compile."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def large_product_tflops(size: int = 16384) -> float:
    """What a GPU reaches in a large bf16 product, when it has been at it for a while."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [device_ms(lambda: a @ b) for _ in range(60)]
    return 2 * size**3 / statistics.median(times[20:]) / 1e9


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph: what the device does, without the host that asks for it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def utilise(table: Table, flops: Mapping[str, float], peak: float | None = None) -> None:
    """Add to a table what its alternatives' operations come to: `tflop_per_s`, and `utilisation` of the device's peak.

    Args:
        table: of `in_turns`.
        flops: of one run of each alternative.
        peak: the device's TFLOP/s; by default what flops.py knows of it, and no utilisation is given if that is nothing.
    """
    peak = peak_tflops(device_name()) if peak is None else peak
    for name, figures in table.items():
        if "ms" in figures and name in flops:
            figures["tflop_per_s"] = flops[name] / figures["ms"] / 1e9
            if peak is not None:
                figures["utilisation"] = figures["tflop_per_s"] / peak


# Title, key, width and format of the columns that not every table has.
_COLUMNS = (
    ("peak GiB", "peak_gib", 10, ".2f"),
    ("in all", "total_gib", 9, ".2f"),
    ("tokens/s", "tokens_per_s", 10, ".0f"),
    ("TFLOP/s", "tflop_per_s", 9, ".3g"),
    ("of peak", "utilisation", 9, ".1%"),
)


def report(title: str, table: Table) -> None:
    """Print a table: times in milliseconds, how many times as fast as the base, and what else was measured."""
    columns = [column for column in _COLUMNS if any(column[1] in figures for figures in table.values())]
    heads = "".join(f"{head:>{width}}" for head, _, width, _ in columns)
    print(f"\n{title}\n{'':38}{'ms':>10}{'low':>10}{'high':>10}   {'speed (low to high)':22}{heads}")
    for name, figures in table.items():
        if "left_out" in figures:
            print(f"{name:38}  left out: {figures['left_out']}")
            continue
        speed = f"{figures['speed']:.2f} ({figures['speed_low']:.2f} to {figures['speed_high']:.2f})"
        cells = "".join(
            f"{figures[key]:{width}{form}}" if key in figures else f"{'-':>{width}}" for _, key, width, form in columns
        )
        print(f"{name:38}{figures['ms']:10.3f}{figures['ms_low']:10.3f}{figures['ms_high']:10.3f}   {speed:22}{cells}")


def describe_device() -> str:
    return f"{device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"


def write(path: str | None, options: argparse.Namespace, results: object) -> None:
    """Write everything that was measured as JSON, with the device and the options it was measured with."""
    if path is None:
        return
    record = {
        "device": device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "results": results,
    }
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(record, indent=1) + "\n")

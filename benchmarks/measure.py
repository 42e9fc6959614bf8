"""Timing that compares alternatives in one process, in turns."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch


def in_turns(
    alternatives: dict[str, Callable[[], object]], rounds: int = 20, warm_up: int = 5
) -> dict[str, dict[str, float]]:
    """Run each alternative once a round, so that a change of the machine's speed meets them all.

    Args:
        alternatives: name -> what to run, on the current CUDA device.
        rounds: how many timed rounds.
        warm_up: rounds before, for compilation and clocks.

    Returns:
        For each name: median, lowest and highest time (`ms`, `ms_low`, `ms_high`) and peak memory above what was allocated
        before (`peak_gib`).
    """
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    peaks: dict[str, float] = {}
    for step in range(warm_up + rounds):
        for name, run in alternatives.items():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if step >= warm_up:
                times[name].append(start.elapsed_time(end))
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / 2**30
    return {
        name: {
            "ms": statistics.median(values),
            "ms_low": min(values),
            "ms_high": max(values),
            "peak_gib": peaks[name],
        }
        for name, values in times.items()
    }


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


def report(title: str, results: dict[str, dict[str, float]], base: str) -> None:
    """Print a table with each alternative's speed relative to `base`."""
    print(f"\n{title}\n{'':34}{'ms':>10}{'low':>9}{'high':>9}{'speed':>8}{'peak GiB':>10}")
    for name, r in results.items():
        speed = results[base]["ms"] / r["ms"]
        print(f"{name:34}{r['ms']:10.3f}{r['ms_low']:9.3f}{r['ms_high']:9.3f}{speed:8.2f}{r['peak_gib']:10.2f}")


def write(path: str | None, results: object) -> None:
    """Write everything that was measured as JSON, with the device it was measured on."""
    if path is not None:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}
        Path(path).write_text(json.dumps(record, indent=1))

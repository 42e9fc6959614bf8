"""Interleaved timing of alternatives in one process, on a CPU or an NVIDIA GPU, and writing the results."""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from flops import peak_tflops

# The figures of an alternative, or {"skipped": reason}; and those of all alternatives in order.
Figures = dict[str, Any]
Table = dict[str, Figures]

LEAST_ROUNDS = 3  # minimum number of timed rounds of an alternative, whatever its budget


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    """The name of the GPU, or of the processor with torch's number of threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'s' * (threads > 1)}"


def _processor() -> str:
    known = Path("/proc/cpuinfo")
    names = [line for line in known.read_text().splitlines() if line.startswith("model name")] if known.exists() else []
    return names[0].partition(":")[2].strip() if names else "CPU"


def memory_of_processes(process: int, kinds: Sequence[str]) -> int:
    """Bytes of main memory of a process and all that it started; what they share counts once.

    Args:
        process: its number.
        kinds: fields of /proc/PID/smaps_rollup, such as "Pss" for all pages, or "Pss_Anon" for those of no file.
    """
    total, fields = 0, tuple(f"{kind}:" for kind in kinds)
    for one in (parent := psutil.Process(process), *parent.children(recursive=True)):
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):  # it ended
            lines = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith(fields))
    return total


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_ms(run: Callable[[], object]) -> float:
    """Milliseconds until the device is done and the result is on the host."""
    synchronize()
    started = time.perf_counter()
    run()
    synchronize()
    return 1000 * (time.perf_counter() - started)


def device_ms(run: Callable[[], object]) -> float:
    """Milliseconds between two CUDA events around the run; on a CPU, `host_ms`."""
    if not torch.cuda.is_available():
        return host_ms(run)
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def time_interleaved(
    alternatives: Mapping[str, Callable[[], object]],
    rounds: int = 20,
    warm_up: int = 5,
    clock: Callable[[Callable[[], object]], float] = device_ms,
    budget: float = float("inf"),
) -> Table:
    """Time alternatives interleaved: each round runs all of them once, so that drift of the machine's speed affects all.

    Args:
        alternatives: name -> function to time. Speeds are relative to the first, the base.
        rounds: number of timed rounds.
        warm_up: number of untimed rounds before, for compilation and clocks.
        clock: returns the milliseconds of a run.
        budget: seconds for each alternative, without its first run. An alternative that has spent them runs in
            `LEAST_ROUNDS` rounds only; the base runs in all rounds.

    Returns:
        The result of `compared`, and on a GPU the peak memory above what was allocated before (`peak_gib`).
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
    """Statistics of interleaved times.

    Args:
        times: name -> milliseconds of each round. The first name is the base, which ran in all rounds.

    Returns:
        For each name: median, minimum and maximum of the times (`ms`, `ms_low`, `ms_high`) and of the speed relative to the
        base in the same round (`speed`, `speed_low`, `speed_high`), and the number of `rounds`.
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
    """Peak GPU memory of a run above what is allocated before. It runs twice, as the first run may compile."""
    return peak_gib_and_ms(run)[0]


def peak_gib_and_ms(run: Callable[[], object]) -> tuple[float, float]:
    """As `peak_gib`, with the milliseconds of the second run."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    took = device_ms(run)
    return (torch.cuda.max_memory_allocated() - before) / 2**30, took


def large_product_tflops(size: int = 16384) -> float:
    """TFLOP/s of a large bf16 matrix product on a GPU, after a warm-up."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = [device_ms(lambda: a @ b) for _ in range(60)]
    return 2 * size**3 / statistics.median(times[20:]) / 1e9


def graphed(run: Callable[[], object]) -> Callable[[], object]:
    """The same work as a CUDA graph, so that launches by the host do not count."""
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
    """Add `tflop_per_s`, and `utilisation` of the device's peak, to a table.

    Args:
        table: of `time_interleaved`.
        flops: operations of one run of each alternative.
        peak: TFLOP/s of the device; *optional*, defaults to the value in flops.py. Without it there is no utilisation.
    """
    peak = peak_tflops(device_name()) if peak is None else peak
    for name, figures in table.items():
        if "ms" in figures and name in flops:
            figures["tflop_per_s"] = flops[name] / figures["ms"] / 1e9
            if peak is not None:
                figures["utilisation"] = figures["tflop_per_s"] / peak


# Title, key, width and format of optional columns.
_COLUMNS = (
    ("peak GiB", "peak_gib", 10, ".2f"),
    ("total GiB", "total_gib", 9, ".2f"),
    ("tokens/s", "tokens_per_s", 10, ".0f"),
    ("TFLOP/s", "tflop_per_s", 9, ".3g"),
    ("of peak", "utilisation", 9, ".1%"),
)


def report(title: str, table: Table) -> None:
    """Print a table: times in milliseconds, speed relative to the base, and optional columns."""
    columns = [column for column in _COLUMNS if any(column[1] in figures for figures in table.values())]
    heads = "".join(f"{head:>{width}}" for head, _, width, _ in columns)
    print(f"\n{title}\n{'':38}{'ms':>10}{'low':>10}{'high':>10}   {'speed (low to high)':22}{heads}")
    for name, figures in table.items():
        if "skipped" in figures:
            print(f"{name:38}  skipped: {figures['skipped']}")
            continue
        speed = f"{figures['speed']:.2f} ({figures['speed_low']:.2f} to {figures['speed_high']:.2f})"
        cells = "".join(
            f"{figures[key]:{width}{form}}" if key in figures else f"{'-':>{width}}" for _, key, width, form in columns
        )
        print(f"{name:38}{figures['ms']:10.3f}{figures['ms_low']:10.3f}{figures['ms_high']:10.3f}   {speed:22}{cells}")


def describe_device() -> str:
    return f"{device_name()}, torch {torch.__version__}, transformers {transformers.__version__}"


def write(path: str | None, options: argparse.Namespace, results: object) -> None:
    """Write the results as JSON, with device, versions and options."""
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

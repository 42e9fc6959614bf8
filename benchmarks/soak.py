"""Minutes of clients that come, ask, and partly vanish: errors of those who stay, and the memory of the server over time.

    python benchmarks/soak.py --engine transformers [--minutes 10] [--out soak.json] --arguments --image-cache 256MiB
    python benchmarks/soak.py --engine vllm --vllm-python .venv-vllm/bin/python --arguments --mm-processor-cache-gb 0.1

The sizes of caches are small here, so that they are full before memory counts. (vLLM touches the memory of its KV cache
block by block, and keeps up to 4 GiB of processed images; the built-in server keeps up to 8 GiB of images.)

Each client asks again and again, without an image, with one or several, repeated or new. Every third time it disconnects
without a word, at once or in the middle of the answer. Answers to the repeated questions are compared with those that were
given before the load. The exit status is 1 if a request of a client that stayed failed, or if something was not released.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from measure import describe_device, write
from servers import ENGINES, TITLES, Server, ask, draw_url, make_request, new_client, save_models, served

REPEATED = 16  # questions that are asked again and again
POOL = 12  # images of theirs
SECONDS_PER_SAMPLE = 5.0
WARM_UP = 0.5  # of the time, in which caches fill, before memory counts


@dataclass
class Tally:
    """What happened so far."""

    answered: int = 0
    compared: int = 0
    different: int = 0
    vanished: int = 0
    errors: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)  # seconds, MiB
    first_s: list[float] = field(default_factory=list)


def repeated_requests(most_tokens: int) -> list[dict[str, Any]]:
    """Questions without an image, with one, two and three."""
    random = np.random.default_rng(0)
    images = [[draw_url(int(seed)) for seed in random.integers(0, POOL, index % 4)] for index in range(REPEATED)]
    return [make_request(index, urls, most_tokens) for index, urls in enumerate(images)]


async def run_client(
    number: int, server: Server, repeated: list[tuple[dict[str, Any], str]], tally: Tally, end: float, most_tokens: int
) -> None:
    """Ask until the end."""
    random = np.random.default_rng(1000 + number)
    async with new_client(1) as client:
        while time.monotonic() < end:
            expected = None
            if random.random() < 0.6:
                request, expected = repeated[int(random.integers(len(repeated)))]
            else:
                seed = int(random.integers(1_000_000, 2**31))
                urls = [draw_url(seed + image) for image in range(int(random.integers(0, 4)))]
                request = make_request(seed, urls, most_tokens)
            if random.random() < 1 / 3:
                await ask(client, server, request, leave_after=int(random.integers(0, 4)))
                tally.vanished += 1
                continue
            answer = await ask(client, server, request)
            tally.answered += 1
            if answer.error:
                tally.errors.append(answer.error)
                continue
            tally.first_s.append(answer.first)
            if expected is not None:
                tally.compared += 1
                tally.different += answer.text != expected


async def watch(server: Server, tally: Tally, started: float, end: float) -> None:
    """Sample memory, and how long the server takes to say that it is well."""
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        while time.monotonic() < end:
            asked = time.monotonic()
            response = await client.get(f"{server.url}/health")
            if response.status_code != 200:
                tally.errors.append(f"health: status {response.status_code}")
            tally.health_s.append(time.monotonic() - asked)
            memory = await asyncio.to_thread(server.memory_mib)
            tally.memory_mib.append((time.monotonic() - started, memory))
            await asyncio.sleep(SECONDS_PER_SAMPLE)


async def soak(server: Server, seconds: float, clients: int, most_tokens: int) -> dict[str, Any]:
    """Load a server, and wait until it has released everything.

    Returns:
        The figures of the run.
    """
    tally = Tally()
    requests = repeated_requests(most_tokens)
    async with new_client(1) as client:
        alone = [await ask(client, server, request) for request in requests]
    if failed := [one.error for one in alone if one.error]:
        raise RuntimeError(f"a request failed before the load: {failed[0]}")
    repeated = [(request, one.text) for request, one in zip(requests, alone, strict=True)]
    started = time.monotonic()
    end = started + seconds
    asking = (run_client(number, server, repeated, tally, end, most_tokens) for number in range(clients))
    await asyncio.gather(*asking, watch(server, tally, started, end))
    released_after = await asyncio.to_thread(_wait_until_released, server)
    return {
        "answers": tally.answered,
        "vanished": tally.vanished,
        "errors": len(tally.errors),
        "first_errors": tally.errors[:5],
        "compared": tally.compared,
        "different": tally.different,
        "first_token_ms": 1000 * statistics.median(tally.first_s),
        "health_ms_high": 1000 * max(tally.health_s),
        "released_after_s": released_after,
        **memory_figures(tally.memory_mib, seconds),
        "memory": [[round(second), round(mib)] for second, mib in tally.memory_mib],
    }


def memory_figures(samples: list[tuple[float, float]], seconds: float) -> dict[str, float]:
    """Medians of the first and the last third of the samples after the warm-up, and the slope of a line through them.

    Args:
        samples: (second, MiB).
        seconds: length of the run.
    """
    counted = [one for one in samples if one[0] >= WARM_UP * seconds] or samples[-1:]
    part = max(1, len(counted) // 3)
    slope = float(np.polyfit(*zip(*counted, strict=True), 1)[0]) if len(counted) > 2 else 0.0
    return {
        "memory_mib_early": statistics.median(mib for _, mib in counted[:part]),
        "memory_mib_late": statistics.median(mib for _, mib in counted[-part:]),
        "memory_mib_per_minute": 60 * slope,
    }


def _wait_until_released(server: Server, seconds: float = 60) -> float | None:
    """Seconds until the server works on nothing any more; None if it does not stop."""
    started = time.monotonic()
    while server.held() > 0:
        if time.monotonic() > started + seconds:
            return None
        time.sleep(0.2)
    return time.monotonic() - started


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", choices=ENGINES, required=True)
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM and this package")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--arguments", nargs=argparse.REMAINDER, default=[], help="of the server; the last flag")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    print(f"{TITLES[options.engine]} on {describe_device()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        with served(options.engine, Path(folder), options.vllm_python, options.arguments) as server:
            found = asyncio.run(soak(server, 60 * options.minutes, options.clients, options.tokens))
    for name, value in found.items():
        if name != "memory":
            print(f"{name:24}{value:.1f}" if isinstance(value, float) else f"{name:24}{value}", flush=True)
    write(options.out, options, {TITLES[options.engine]: found})
    return int(found["errors"] > 0 or found["released_after_s"] is None)


if __name__ == "__main__":
    sys.exit(main())

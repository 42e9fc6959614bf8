"""Requests per second and times to the first token of servers: `dsvl serve`, `dsvl serve --engine vllm`, and transformers'
LLaVA of the same shape on the same vLLM. The servers run side by side and are asked in turns, each the same questions.
Weights and images are random.

    python benchmarks/serving.py --vllm-python .venv-vllm/bin/python [--clients 1 16 64] [--out serving.json]

In the part "new images" each request has one to three images that no server has seen; in "repeated images" they are of a
pool of eight, which all have seen.
"""

import argparse
import asyncio
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from measure import describe_device, write
from servers import ENGINES, TITLES, Answer, Server, ask_all, draw_url, make_request, save_models, served

KINDS = ("new images", "repeated images")
POOL = 8
REQUESTS_PER_CLIENT = {1: 6, 16: 3, 64: 1}


def make_requests(kind: str, number: int, most_tokens: int, seed: int) -> list[dict[str, Any]]:
    """Questions about one to three images."""
    random = np.random.default_rng(seed)
    requests = []
    for index in range(number):
        if kind == KINDS[0]:
            images = [10_000 * seed + 3 * index + image for image in range(1 + index % 3)]
        else:
            images = list(random.integers(0, POOL, 1 + index % 3))
        requests.append(make_request(1000 * seed + index, [draw_url(int(image)) for image in images], most_tokens))
    return requests


def figures_of(answers: list[Answer], seconds: float) -> dict[str, float]:
    """The figures of one round.

    Raises:
        RuntimeError: if a request failed.
    """
    if failed := [one.error for one in answers if one.error]:
        raise RuntimeError(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    firsts, lasts = [one.first for one in answers], [one.last for one in answers]
    return {
        "requests_per_s": len(answers) / seconds,
        "tokens_per_s": sum(one.tokens for one in answers) / seconds,
        "first_token_ms": 1000 * statistics.median(firsts),
        "first_token_p95_ms": 1000 * float(np.quantile(firsts, 0.95)),
        "last_token_p95_ms": 1000 * float(np.quantile(lasts, 0.95)),
    }


def compare(servers: list[Server], kind: str, clients: int, rounds: int, most_tokens: int, seed: int) -> dict[str, Any]:
    """The medians of all rounds of each server, and its requests per second relative to the first's in the same round."""
    found: dict[str, list[dict[str, float]]] = {server.engine: [] for server in servers}
    same: dict[str, list[bool]] = {server.engine: [] for server in servers}
    for turn in range(rounds):
        requests = make_requests(kind, clients * REQUESTS_PER_CLIENT.get(clients, 2), most_tokens, seed + turn)
        texts: dict[str, list[str]] = {}
        for server in servers[turn % len(servers) :] + servers[: turn % len(servers)]:
            answers, seconds = asyncio.run(ask_all(server, requests, clients))
            found[server.engine].append(figures_of(answers, seconds))
            texts[server.engine] = [one.text for one in answers]
        for engine in texts:
            same[engine] += [one == other for one, other in zip(texts[engine], texts[servers[0].engine], strict=True)]
    table = {}
    for engine, turns in found.items():
        ratios = [
            one["requests_per_s"] / other["requests_per_s"]
            for one, other in zip(turns, found[servers[0].engine], strict=True)
        ]
        table[TITLES[engine]] = {
            **{name: statistics.median(one[name] for one in turns) for name in turns[0]},
            "speed": statistics.median(ratios),
            "speed_low": min(ratios),
            "speed_high": max(ratios),
            "rounds": rounds,
        }
        if engine != "llava":  # whose attention is another
            table[TITLES[engine]]["same_answers"] = sum(same[engine]) / len(same[engine])
    return table


def report(title: str, table: dict[str, dict[str, float]]) -> None:
    """Print a table."""
    heads = ("requests/s", "tokens/s", "first ms", "first p95", "last p95", "same")
    print(f"\n{title}\n{'':26}{''.join(f'{head:>12}' for head in heads)}   speed (low to high)")
    for name, one in table.items():
        keys = ("requests_per_s", "tokens_per_s", "first_token_ms", "first_token_p95_ms", "last_token_p95_ms")
        cells = f"{one[keys[0]]:12.2f}" + "".join(f"{one[key]:12.0f}" for key in keys[1:])
        cells += f"{one['same_answers']:12.0%}" if "same_answers" in one else f"{'-':>12}"
        print(f"{name:26}{cells}   {one['speed']:.2f} ({one['speed_low']:.2f} to {one['speed_high']:.2f})", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python", help="Python of an environment with vLLM and this package (default: no vLLM)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64], help="concurrent clients")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=32, help="most tokens of an answer")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    engines = [one for one in options.engines if one == "transformers" or options.vllm_python]
    print(f"{', '.join(TITLES[one] for one in engines)} on {describe_device()}", flush=True)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ExitStack() as running:
        save_models(Path(folder))
        with ThreadPoolExecutor() as pool:  # vLLM takes minutes to start

            def start(engine: str) -> Server:
                return running.enter_context(served(engine, Path(folder), options.vllm_python, []))

            servers = list(pool.map(start, engines))
        for server in servers:
            asyncio.run(ask_all(server, make_requests(KINDS[1], 24, options.tokens, 0), 4))  # what happens once, the pool
        for kind in options.kinds:
            for clients in options.clients:
                seed = 1 + 100 * (len(results) + 1)
                title = f"{kind}, {clients} client{'s' * (clients > 1)}"
                results[title] = compare(servers, kind, clients, options.rounds, options.tokens, seed)
                report(title, results[title])
                write(options.out, options, results)


if __name__ == "__main__":
    main()

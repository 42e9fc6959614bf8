"""What an image library gains: answers per second of `dsvl serve` about repeated images, with and without it; and the time
to the first token over images of a large library. Weights and images are random.

    python benchmarks/image_library.py [--size demo|small] [--images 8] [--answer-tokens 8] [--clients 32] [--out file.json]
    python benchmarks/image_library.py --first-token [--size 7b] [--library 400] [--bits 8] [--key-value-heads 8]

The server's clients are a process of their own. Rounds with and without the library alternate, and answers are compared.
Beside seconds there is the processor time of the server, which other processes of the machine change less.
"""

import argparse
import dataclasses
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import compared, describe_device, device_type, host_ms, report, synchronize, write
from models import SMALL, Shape

from chat import DEMO, build_parts
from dsvl.image_library import ImageLibrary

SHAPES = {"demo": DEMO, "small": SMALL, "7b": Shape()}


def serve(
    model: Any, processor: Any, library: ImageLibrary | None, options: argparse.Namespace
) -> tuple[float, float, list[str]]:
    """The seconds until clients have `options.requests` answers, the processor time of the server from its start to the last
    answer, and the answers."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from model_server import NAME, served

    used = time.process_time()
    with served(model, processor, library=library) as server:
        task = {"port": server.port, "model": NAME, "clients": options.clients, "requests": options.requests}
        task |= {"images": options.images, "answer_tokens": options.answer_tokens}
        command = [sys.executable, str(Path(__file__).with_name("image_library_clients.py"))]
        said = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=True).stdout
        used = time.process_time() - used
    result = json.loads(said)
    return result["seconds"], used, result["answers"]


def compare_servers(options: argparse.Namespace) -> dict[str, Any]:
    """Rounds of a server without and with a library, which starts empty in each."""
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model, processor = build_parts(SHAPES[options.size], "sdpa", device, dtype)
    model.generation_config.eos_token_id = None
    times: dict[str, list[float]] = {"no library": [], "image library": []}
    processor_times: dict[str, list[float]] = {name: [] for name in times}
    answers: dict[str, list[str]] = {}
    for number in range(options.repeats + 1):
        for name in times:
            library = ImageLibrary(model, 2**30) if name == "image library" else None
            seconds, used, answers[name] = serve(model, processor, library, options)
            if number:  # the first round is a warm-up
                times[name].append(1000 * seconds)
                processor_times[name].append(1000 * used / options.requests)
    table = compared(times)
    for name, figures in table.items():
        figures["answers_per_s"] = 1000 * options.requests / figures["ms"]
        figures["processor_ms_per_answer"] = statistics.median(processor_times[name])
        print(
            f"{name:20}{figures['answers_per_s']:10.1f} answers/s   {figures['speed']:.2f} times   "
            f"{figures['processor_ms_per_answer']:.1f} ms of processor time each"
        )
    one, other = answers.values()
    equal = sum(a == b for a, b in zip(one, other, strict=True))
    print(f"{equal} of {len(one)} answers are equal")
    return table | {"equal_answers": equal, "answers": len(one)}


def fill(library: ImageLibrary, model: Any, number: int, images: torch.Tensor) -> list[Any]:
    """Let a library hold so many images: what it keeps of one, under other keys."""
    made = library.image({"pixel_values": images}, [model.config.image_seq_length], 1)
    library.generation_inputs(model, [made])
    tensors, kind = made.leases[0].tensors, library.tiers.memory.names()[0].split("-")[0]
    found = []
    for index in range(number):
        key = f"{index:064x}"
        if not library.tiers.store(f"{kind}-{key}", {name: one.clone() for name, one in tensors.items()}):
            raise ValueError(
                f"{index} images fill the library of {library.tiers.memory.limit:,} bytes; pass a smaller --library."
            )
        found.append(dataclasses.replace(made, keys=[key], leases=[library.tiers.memory.lease(f"{kind}-{key}")]))
    return found


def first_token(options: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds to the first token over images that are in main memory, and those of their transfer alone."""
    device = device_type()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    shape = dataclasses.replace(SHAPES[options.size], key_value_heads=options.key_value_heads)
    model, processor = build_parts(shape, "sdpa", device, dtype)
    model.model.config.text_config.max_position_embeddings = 32768
    if options.compile:
        model.compile_text_prefill()
    size = shape.per_image * ImageLibrary(model, 2**20, quantize=options.bits == 8).token_bytes(model)
    # A tenth more, as pinned memory is divided into slabs.
    memory = int(1.1 * (options.library + 2) * size) + 2**21
    library = ImageLibrary(model, memory, device_bytes=options.images * size, quantize=options.bits == 8)
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size)
    kept = fill(library, model, options.library, pixels)
    ids = [1, *([processor.image_token_id] * shape.per_image + [5, 6, 7]) * options.images, *range(10, 10 + options.text)]
    inputs = {"input_ids": torch.tensor([ids], device=model.device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    generator = random.Random(0)

    def answer(chosen: list[Any]) -> None:
        made = library.generation_inputs(model, chosen)
        int(model.generate(**inputs, **made, max_new_tokens=1, do_sample=False)[0, -1])

    def transfer(chosen: list[Any]) -> None:
        for image in chosen:
            for tensor in image.leases[0].tensors.values():
                tensor.to(model.device, copy=True)
        synchronize()

    times: dict[str, list[float]] = {"from main memory": [], "on the device": [], "transfer alone": []}
    for number in range(options.repeats + 3):
        chosen = generator.sample(kept, options.images)
        for name, run in zip(times, (answer, answer, transfer), strict=True):  # the second finds them on a GPU
            took = host_ms(lambda run=run, chosen=chosen: run(chosen))
            if number >= 3:
                times[name].append(took)
    table = compared(times)
    report(f"{options.images} images of {options.library} in {options.bits} bits, {size / 2**20:.1f} MiB each", table)
    beyond = table["from main memory"]["ms"] - table["transfer alone"]["ms"]
    print(f"first token: {beyond:.1f} ms, plus the transfer")
    return table | {"mib_per_image": size / 2**20, "ms_without_transfer": beyond}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SHAPES, default="demo")
    parser.add_argument("--images", type=int, default=8, help="in a prompt")
    parser.add_argument("--answer-tokens", type=int, default=8)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256, help="in a round")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--first-token", action="store_true", help="time to the first token, without a server")
    parser.add_argument("--library", type=int, default=400, help="images in the library")
    parser.add_argument("--bits", type=int, choices=(8, 16), default=16)
    parser.add_argument("--key-value-heads", type=int)
    parser.add_argument("--text", type=int, default=40, help="tokens of text after the images")
    parser.add_argument("--compile", action="store_true", help="compile the prefill of text")
    parser.add_argument("--out", help="JSON file for the results")
    options = parser.parse_args(argv)
    print(f"{options.size} on {describe_device()}, {time.strftime('%Y-%m-%d')}")
    write(options.out, options, first_token(options) if options.first_token else compare_servers(options))


if __name__ == "__main__":
    main()

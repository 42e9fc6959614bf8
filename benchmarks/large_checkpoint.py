"""A checkpoint that is too large for one GPU, from disk through `dsvl train --deepspeed zero3` and back.

    python benchmarks/large_checkpoint.py make /data/large --shape 30b     # a checkpoint of random weights, and data
    python benchmarks/large_checkpoint.py start /data/large --processes 2  # train, killed after the first checkpoint
    python benchmarks/large_checkpoint.py end /data/large --processes 2 --delete-source    # resume, and train to the end
    python benchmarks/large_checkpoint.py check /data/large                # which weights differ from those of the source

Each command adds its figures to /data/large/large_checkpoint.json:

    load_seconds             from disk into the partitions of all processes, by the log of `dsvl train`
    host_gib_until_loaded    main memory of all processes together until the model is loaded, files that are mapped included;
                             what several processes map counts once (proportional set size). The aim is 1.1 times `weights`
    gpu_gib                  used memory of the fullest GPU by its driver until the last step: with the reserve of the
                             allocator, and CUDA's own
    allocated_gib            of a whole run, by torch's allocator in the first process; planned_gib is by `dsvl plan`
    step_seconds             of steps without a checkpoint between them
    optimizer_states_gib     of DeepSpeed's states in a checkpoint, of what is trained alone
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from measure import device_name, memory_of_processes
from models import Shape
from PIL import Image
from safetensors import safe_open
from scaling import SHAPES, configuration
from transformers import AutoModel, CLIPImageProcessor, LlamaForCausalLM

import dsvl
from dsvl.demo.tiny_models import train_tokenizer
from dsvl.training.memory_plan import plan
from dsvl.transformers_dsvl import no_init_weights

MODEL, DATA, OUTPUT = "model", "data/conversations.jsonl", "output"  # in the folder
DIGESTS, FIGURES = "digests.json", "large_checkpoint.json"
SAVED_AT, STEPS = 3, 6
SAMPLES = 16
WORDS = "a red ball lies beside the green box and the blue cup"


# ----------------------------------------------------------------------------------------------------------------------
# The checkpoint and its data


def make(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write a checkpoint of random weights as `dsvl compose` does, a digest of each weight, and conversations."""
    shape = SHAPES[options.shape]
    if options.layers is not None:
        shape = replace(shape, layers=options.layers)
    parts = configuration(options.shape, shape)
    torch.set_default_dtype(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    with no_init_weights():
        tower, language = AutoModel.from_config(parts.vision_config), LlamaForCausalLM(parts.text_config)
    torch.set_default_dtype(torch.float32)
    for part in (tower, language):
        fill(part)
    side = parts.image_size
    model, processor = dsvl.compose(
        tower,
        language,
        tokenizer=train_tokenizer([WORDS]),
        image_processor=CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        image_layout="crop",
    )
    began = time.perf_counter()
    dsvl.save_checkpoint(model, processor, folder / MODEL)
    seconds = time.perf_counter() - began
    (folder / DIGESTS).write_text(json.dumps(dict(digests(folder / MODEL))))
    write_conversations(folder, shape, side, shape.tokens - shape.images * model.config.image_seq_length)
    return {
        "batch": shape.batch,
        "tokens": shape.tokens,
        "images": shape.images,
        "weights": sum(parameter.nbytes for parameter in model.parameters()),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "write_seconds": seconds,
    }


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Give a module random weights, drawn on the GPU if there is one; norms scale by one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(float(name.endswith("weight")))
        else:
            parameter.copy_(torch.empty(parameter.shape, dtype=parameter.dtype, device=device).normal_(0, 0.02))


def write_conversations(folder: Path, shape: Shape, side: int, words: int) -> None:
    """Samples of one turn about several images, with so many words that they about fill the length."""
    rng, lines, directory = np.random.default_rng(0), list[str](), (folder / DATA).parent
    directory.mkdir()
    question, answer = words // 2, words // 2 - 40  # the chat format takes some tokens
    for sample in range(SAMPLES):
        names = [f"{sample}_{image}.png" for image in range(shape.images)]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(directory / name)
        said = [" ".join(rng.choice(WORDS.split(), max(1, count))) for count in (question, answer)]
        content = [*({"type": "image", "image": name} for name in names), {"type": "text", "text": said[0]}]
        messages = [{"role": "user", "content": content}]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": said[1]}]})
        lines.append(json.dumps({"messages": messages}))
    (folder / DATA).write_text("\n".join(lines) + "\n")


def digests(directory: Path) -> Iterator[tuple[str, str]]:
    """The name of each weight in a checkpoint, and a digest of its bytes."""

    def of_file(path: Path) -> list[tuple[str, str]]:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            tensors = (file.get_tensor(name).contiguous().view(torch.uint8).numpy() for name in names)
            return [(name, hashlib.blake2b(array.data).hexdigest()) for name, array in zip(names, tensors, strict=True)]

    with ThreadPoolExecutor() as pool:
        for found in pool.map(of_file, sorted(directory.glob("*.safetensors"))):
            yield from found


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Watch:
    """The largest memory of a training while it runs, in GiB.

    Attributes:
        host: main memory of all its processes together; what several of them map counts once.
        gpu: used memory of the fullest GPU; None without GPUs.
    """

    def __init__(self, process: int) -> None:
        self.process, self.host = process, 0.0
        self.gpu = 0.0 if torch.cuda.is_available() else None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.2):
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended
                self.host = max(self.host, memory_of_processes(self.process, ["Pss"]) / 2**30)
            if self.gpu is not None:
                self.gpu = max(self.gpu, used_gib())


def used_gib() -> float:
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return max(map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())) / 1024


def train(folder: Path, options: argparse.Namespace, kill_at: str | None, delete_source: bool) -> dict[str, Any]:
    """Run `dsvl train`, whose log is printed.

    Args:
        folder: with what `make` wrote.
        options: of the command line.
        kill_at: beginning of the line of the log at which the training is killed.
        delete_source: whether the weights that it starts from are deleted as soon as they are loaded.

    Raises:
        RuntimeError: if the training fails.
    """
    made = json.loads((folder / FIGURES).read_text())["make"]
    flags = ["--model", folder / MODEL, "--data", folder / DATA, "--output", folder / OUTPUT, "--deepspeed", "zero3"]
    flags += ["--per-device-train-batch-size", made["batch"], "--max-steps", STEPS, "--save-steps", SAVED_AT]
    flags += ["--save-total-limit", 1, "--logging-steps", 1, "--activation-checkpointing", "true", "--disable-tqdm", "true"]
    environment = dict(os.environ)
    if torch.cuda.is_available():
        flags += ["--bf16", "--compile-decoder-layers"]
    else:
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    process = subprocess.Popen(
        [*command, "-m", "dsvl.training", *map(str, flags)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    result, lines, killed, steps = dict[str, Any](), list[str](), False, list[float]()
    began = time.monotonic()
    with Watch(process.pid) as watch:
        for line in process.stdout:
            lines.append(line)
            print(line, end="", flush=True)
            if found := re.search(r"Model: loaded in (\d+):(\d+):(\d+)", line):
                hours, minutes, seconds = map(int, found.groups())
                result["load_seconds"] = 60 * (60 * hours + minutes) + seconds
                result["host_gib_until_loaded"] = watch.host
                if delete_source:
                    for file in (folder / MODEL).glob("*.safetensors"):
                        file.unlink()
            if line.startswith("step ") and "loss" in line:
                steps.append(time.monotonic())
                result["gpu_gib"] = watch.gpu
            if found := re.search(r"([\d.]+) GiB allocated at most", line):
                result["allocated_gib"] = float(found[1])
            if kill_at is not None and line.startswith(kill_at):
                killed = True
                torchrun = psutil.Process(process.pid)
                for member in (torchrun, *torchrun.children(recursive=True)):
                    with contextlib.suppress(psutil.NoSuchProcess):  # it ended
                        member.kill()
    if (process.wait() == 0) == (kill_at is not None) or killed != (kill_at is not None):
        raise RuntimeError(f"The training ended with status {process.returncode}:\n{''.join(lines[-40:])}")
    on_gpu = torch.cuda.is_available()
    planned = plan(
        dsvl.DSVLConfig.from_pretrained(folder / MODEL),
        micro_batch=made["batch"],
        world_size=options.processes,
        deepspeed="zero3",
        sequence_length=made["tokens"],
        images=made["images"],
        activation_checkpointing=True,
        compile_decoder_layers=on_gpu,
        dtype="bfloat16" if on_gpu else "float32",
        mixed_precision=on_gpu,
    )
    return result | {
        "planned_gib": planned.total / 2**30,
        "host_gib": watch.host,
        "seconds": time.monotonic() - began,
        # Of those without a checkpoint between them.
        "step_seconds": [later - earlier for earlier, later in itertools.pairwise(steps[:SAVED_AT])],
        "resumed": any("Resuming from" in line for line in lines),
        "device": device_name(),
    }


def start(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train until a step after the first checkpoint."""
    result = train(folder, options, kill_at=f"step {SAVED_AT + 1}/", delete_source=False)
    checkpoint = folder / OUTPUT / f"checkpoint-{SAVED_AT}"
    sizes = {path: path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()}
    states = sum(size for path, size in sizes.items() if path.parent != checkpoint)
    return result | {"checkpoint_gib": sum(sizes.values()) / 2**30, "optimizer_states_gib": states / 2**30}


def end(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Resume, and train to the end."""
    return train(folder, options, kill_at=None, delete_source=options.delete_source)


def check(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Compare the weights that were saved with those that the training began with."""
    before, after = json.loads((folder / DIGESTS).read_text()), dict(digests(folder / OUTPUT))
    changed = sorted(name for name in before if after.get(name) != before[name])
    return {"same_names": before.keys() == after.keys(), "weights": len(before), "changed": changed}


COMMANDS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "make": make,
    "start": start,
    "end": end,
    "check": check,
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "folder", type=Path, help="with room for two copies of the weights; one more without --delete-source"
    )
    parser.add_argument("--shape", choices=SHAPES, default="30b" if torch.cuda.is_available() else "tiny")
    parser.add_argument("--layers", type=int, help="layers of the decoder; fewer for a smaller disk")
    parser.add_argument("--processes", type=int, default=2, help="one for each GPU")
    parser.add_argument("--delete-source", action="store_true", help="delete the weights of the source once they are loaded")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    figures = options.folder / FIGURES
    found = json.loads(figures.read_text()) if figures.exists() else {}
    found[options.command] = COMMANDS[options.command](options.folder, options)
    figures.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found[options.command], indent=1))


if __name__ == "__main__":
    main()

"""A tiny checkpoint, conversations, and `dsvl train` in processes of its own."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import number_images, save_tiny_llama, tiny_tower_config
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessor, CLIPVisionModel, Siglip2VisionConfig, Siglip2VisionModel

import dsvl

WORDS = ["red", "green", "blue", "circle", "square", "one", "two", "three", "cup", "dog", "cat"]
STEPS = ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--learning-rate", "1e-2"]
BATCH = "--per-device-train-batch-size"
# One process takes the batches of both. With this layout the second process has only texts in every other step.
LAYOUT = "ppttpppp" * 3
IN_ORDER = ["--train-sampling-strategy", "sequential"]


def make_checkpoint(folder: Path, name: str = "model", numbered_images: int = 0, **llama: Any) -> Path:
    """Compose a tiny random model with the reference's tokenizer; an image of 28 pixels has 5 tokens."""
    torch.manual_seed(0)
    CLIPVisionModel(tiny_tower_config()).save_pretrained(folder / "tower")
    side = {"height": 28, "width": 28}
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side).save_pretrained(folder / "tower")
    save_tiny_llama(folder / "llama", **llama)
    model, processor = dsvl.compose(folder / "tower", folder / "llama", numbered_images=numbered_images)
    size = model.config.text_config.initializer_range  # that of other embeddings
    return dsvl.save_checkpoint(number_images(model, size), processor, folder / name)


# Arguments of `compose`.
LAYOUTS: dict[str, dict[str, Any]] = {
    "pad": {"image_layout": "pad"},
    "tiles": {"image_layout": "tiles", "max_tiles": 4},
    "native": {"max_image_tokens": 6, "projector_type": "mlp", "downsample": 2},
}


def make_layout_checkpoint(folder: Path, layout: str, **options: Any) -> Path:
    """As `make_checkpoint`, of another image layout; "native" has SigLIP 2's tower, of patches of 4 pixels."""
    if not (folder / "model").exists():
        make_checkpoint(folder)
    tower = folder / "tower"
    if layout == "native":
        tower = folder / "siglip2"
        sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        torch.manual_seed(0)
        Siglip2VisionModel(Siglip2VisionConfig(**sizes, patch_size=4, num_patches=16)).save_pretrained(tower)
    torch.manual_seed(0)
    model, processor = dsvl.compose(tower, folder / "llama", **LAYOUTS[layout], **options)
    return dsvl.save_checkpoint(model, processor, folder / layout)


def make_conversations(folder: Path, name: str = "data.jsonl", layout: str = "ppt" * 6) -> Path:
    """Conversations of one to three turns: with images (p), or texts only (t)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lines = []
    for index, kind in enumerate(layout):
        messages: list[dict[str, Any]] = []
        for number in range(rng.randint(1, 3)):
            content: list[dict[str, str]] = []
            if kind == "p" and number < 2:
                path = f"images/{index}_{number}.png"
                pixels = np.random.default_rng(10 * index + number).integers(0, 255, (30, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / path)
                content.append({"type": "image", "path": path})
            content.append({"type": "text", "text": " ".join(rng.choices(WORDS, k=rng.randint(2, 6))) + "?"})
            messages.append({"role": "user", "content": content})
            messages.append({"role": "assistant", "content": " ".join(rng.choices(WORDS, k=2))})
        lines.append(json.dumps({"messages": messages}))
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_training(folder: Path, layout: str = LAYOUT) -> Path:
    """A checkpoint with numbered images, training data and held-out data, in a folder; see `make_conversations`."""
    make_checkpoint(folder, numbered_images=4)
    make_conversations(folder, layout=layout)
    make_conversations(folder, "held_out.jsonl", layout="ptppt")
    return folder


def command(
    *flags: str,
    processes: int = 1,
    launcher: str = "torchrun",
    module: str = "-m dsvl.training",
    always_launched: bool = False,
) -> list[str]:
    """The command line that starts a training; a single process needs no launcher."""
    bin_folder = Path(sys.executable).parent
    script = module.split()
    if launcher == "deepspeed":
        module_flag = ["--module", script[1]] if script[0] == "-m" else script
        return [
            str(bin_folder / "deepspeed"),
            "--num_gpus",
            str(processes),
            f"--master_port={free_port()}",
            *module_flag,
            *flags,
        ]
    if launcher == "accelerate":
        start = ["launch", "--cpu", "--num_processes", str(processes), "--num_machines", "1", "--mixed_precision", "no"]
        start += ["--dynamo_backend", "no", f"--main_process_port={free_port()}"]
        return [str(bin_folder / "accelerate"), *start, *script, *flags]
    if processes == 1 and not always_launched:
        return [sys.executable, *script, *flags]
    return [str(bin_folder / "torchrun"), f"--nproc-per-node={processes}", f"--master-port={free_port()}", *script, *flags]


def environment() -> dict[str, str]:
    # One thread per process: two processes share two cores, and sums have the same order.
    kept = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    return kept | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}


def run(*flags: str | Path, check: bool = True, **start: Any) -> "subprocess.CompletedProcess[str]":
    """Train in separate processes; a failure shows their output."""
    done = subprocess.run(command(*map(str, flags), **start), env=environment(), capture_output=True, text=True, timeout=400)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def runs_once(folder: Path, start: Callable[..., Any]) -> Callable[..., Path]:
    """A function that trains with flags and returns the output directory; the same flags are run once.

    Args:
        folder: where the output directories are made.
        start: trains; called with the output directory and the flags.
    """
    made: dict[tuple[Any, ...], Path] = {}

    def get(*flags: str | Path) -> Path:
        if flags not in made:
            output = folder / f"alone{len(made)}"
            start(output, *flags)
            made[flags] = output
        return made[flags]

    return get


def take_back(output: Path, checkpoint: str = "checkpoint-4") -> None:
    """Restore a finished run to the state before it wrote this checkpoint."""
    shutil.rmtree(output / checkpoint)
    (output / "config.json").unlink()


def losses(output: Path) -> list[float]:
    """The logged losses of a finished run, one per step."""
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights of the same names."""
    assert one.keys() == other.keys()
    return max((one[key] - other[key]).abs().max().item() for key in one)


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]

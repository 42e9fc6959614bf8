"""Run the snippets of README.md and docs/ as a reader would, with tiny models under the names of the real ones.

A fenced block is run unless an HTML comment in front of it says `<!-- not run: REASON -->`. A block with a `:caption:` is a
file of that name, and a block of JSON is `conversations.jsonl`.
"""

import io
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from conftest import save_tiny_llama
from hub_server import TOKEN, Hub
from raw_data import write_coco, write_llava
from reference_data import ReferenceCase, parts_of
from safetensors.torch import load_file, save_file
from training_runs import environment, make_conversations

import dsvl
from dsvl.cli import COMMANDS, main

ROOT = Path(dsvl.__file__).parent
PAGES = [
    "README.md",
    *(
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / "docs").rglob("*.md"))
        if not {"generated", "_build"} & set(path.parts)
    ),
]
_FENCE = re.compile(
    r"^(?:<!-- (?P<note>[^\n]*) -->\n)?(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)$",
    re.MULTILINE | re.DOTALL,
)
OTHERS = ("lm_eval", "lmms-eval")  # programs of other projects, which are not installed here
LAUNCHERS = ("torchrun", "deepspeed")
SERVERS = ("demo", "serve")


@dataclass(frozen=True)
class Snippet:
    """A fenced block of a page: its language, its text, the name of the file it shows, and why it is not run."""

    language: str
    text: str
    file: str = ""
    not_run: str = ""

    @property
    def commands(self) -> list[list[str]]:
        """The commands of a block of shell, as words, without variables in front of them."""
        lines = [line for line in self.text.splitlines() if self.language == "bash" and line]
        split = [shlex.split(line) for line in lines]
        return [words[next(i for i, word in enumerate(words) if not re.match(r"[A-Z_]+=", word)) :] for words in split]


def snippets(page: str) -> list[Snippet]:
    """The fenced blocks of a page.

    Args:
        page: its path in the repository.
    """
    found = []
    for match in _FENCE.finditer((ROOT / page).read_text(encoding="utf-8")):
        info, body = match["info"].strip(), match["body"]
        caption = ""
        if directive := re.fullmatch(r"\{code-block\} (\w+)", info):
            info = directive[1]
            if option := re.match(r":caption: (.*)\n\n?", body):
                caption, body = option[1], body[option.end() :]
        note = match["note"] or ""
        found.append(Snippet(info, body, caption or ("conversations.jsonl" if info == "json" else ""), note))
    return found


def flags_of(words: list[str]) -> set[str]:
    """The flags of a command, without those that it passes on."""
    own = words[: words.index("--")] if "--" in words else words
    return {word.partition("=")[0] for word in own if re.match(r"--[a-z]", word)}


class Reader:
    """Runs snippets in a folder that holds what a reader would have.

    Args:
        folder: the working directory of the process, too.
        photographs: images for `one.jpg` and `two.jpg`.
        servers: run commands that start a server or another process, which take seconds.
    """

    def __init__(self, folder: Path, photographs: list[Any], servers: bool) -> None:
        self.folder, self.servers = folder, servers
        self.names: dict[str, Any] = {}
        torch.manual_seed(0)
        vision, language = parts_of("B_baseline_mmca_on")
        shutil.copytree(vision, folder / "openai/clip-vit-large-patch14")
        shutil.copytree(language, folder / "meta-llama/Llama-2-7b-hf")
        weights = folder / "meta-llama/Llama-2-7b-hf/model.safetensors"
        save_file({name: tensor[:400] for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
        save_tiny_llama(folder / "Qwen/Qwen3-0.6B")
        parts_of("E_qwen_mmca_on")
        shutil.copytree(parts_of("E_qwen_mmca_on")[0].with_name("vision-source"), folder / "Qwen-VL-Chat")
        (folder / "output/epoch-5").mkdir(parents=True)
        torch.save(ReferenceCase("B_baseline_mmca_on").weights, folder / "output/epoch-5/pytorch_model.bin")
        for name, image in zip(("one.jpg", "two.jpg"), photographs, strict=False):
            image.save(folder / name)
        # As it is by default with the chat template that the real one has.
        parts = folder / "openai/clip-vit-large-patch14", folder / "Qwen/Qwen3-0.6B"
        model, processor = dsvl.compose(*parts, numbered_images=1024)
        for name in ("my-model", "my-tuned-model", "my-old-model"):
            dsvl.save_checkpoint(model, processor, folder / name)
        make_conversations(folder)
        shutil.move(folder / "data.jsonl", folder / "conversations.jsonl")
        shutil.copy(folder / "conversations.jsonl", folder / "held-out.jsonl")
        shutil.copy(ROOT / "README.md", folder / "held-out.txt")
        write_coco(folder / "raw", photographs)
        write_llava(folder / "raw")
        (folder / "conversations").mkdir()
        for name in ("llava", "coco_caption"):
            shutil.copy(folder / "conversations.jsonl", folder / "conversations" / f"{name}.jsonl")
        (folder / "conversations/images").symlink_to(folder / "images")

    def run(self, snippet: Snippet) -> None:
        """Run a snippet, or write it if it is a file."""
        if snippet.not_run:
            return
        if snippet.file:
            (self.folder / snippet.file).write_text(snippet.text, encoding="utf-8")
        elif snippet.language == "python":
            exec(snippet.text, self.names)
        for words in snippet.commands:
            self.command(words)

    def command(self, words: list[str]) -> None:
        """Run a command line; those that install, build or need other programs are only checked."""
        program = words[0]
        if program == "dsvl":
            self._dsvl(words[1:])
        elif program in LAUNCHERS:
            if self.servers:
                self._launch(words)
        else:
            check_command(words)

    def _dsvl(self, words: list[str]) -> None:
        if words[0] in SERVERS:
            if self.servers:
                self._serve(words)
        elif words[0] == "push":
            if self.servers:
                self._push(words)
        elif words[0] == "chat":
            sys.stdin = io.StringIO("What is this?\n/quit\n")
            assert main(words) == 0
        else:
            if words[0] in ("compose", "export", "merge", "migrate", "train"):
                self._remove_output(words)
            words = ["10" if word == "20000" else word for word in words]  # conversations that a data set must have
            assert main(words) == 0, words

    def _remove_output(self, words: list[str]) -> None:
        """A page may write a directory that an earlier page, or this class, has written."""
        for flag in ("--out", "--output"):
            if flag in words:
                shutil.rmtree(self.folder / words[words.index(flag) + 1], ignore_errors=True)

    def _launch(self, words: list[str]) -> None:
        self._remove_output(words)
        words = [re.sub(r"^8$", "2", word) for word in words]
        started = [str(Path(sys.executable).parent / words[0])]
        started += [f"{'--master-port' if words[0] == 'torchrun' else '--master_port'}={free_port()}", *words[1:]]
        done = subprocess.run(started, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr

    def _serve(self, words: list[str]) -> None:
        port = free_port()
        command = [sys.executable, "-m", "dsvl.cli", *words, "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            end = time.monotonic() + 120
            address = f"http://127.0.0.1:{port}/" + ("v1/models" if words[0] == "serve" else "")
            while not answers_at(address):
                assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
                time.sleep(0.5)
        finally:
            process.kill()
            process.communicate()

    def _push(self, words: list[str]) -> None:
        with Hub() as hub:
            variables = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
            command = [sys.executable, "-m", "dsvl.cli", *words]
            done = subprocess.run(command, env=environment() | variables, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stdout + done.stderr


def check_command(words: list[str]) -> None:
    """Check a command without running it: extras, targets and scripts must exist."""
    program = words[0]
    if program == "pip":
        known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for word in words:
            if match := re.fullmatch(r"(?:\.|dsvl)\[(.*)\]", word):
                assert set(match[1].split(",")) - {"EXTRA"} <= set(known), words
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    elif program == "python":
        assert (ROOT / words[1]).is_file(), words
    elif program in LAUNCHERS:
        scripts = [word for word in words if word.startswith("benchmarks/")]
        assert all((ROOT / script).is_file() for script in scripts), words
        # The last is a file that the page shows.
        assert "dsvl.training" in words or scripts or words[-1].endswith(".py"), words
    elif program == "dsvl":
        assert words[1] in COMMANDS or words[1] == "COMMAND", words
    else:
        assert program in OTHERS, words


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def answers_at(address: str) -> bool:
    try:
        return httpx.get(address, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False

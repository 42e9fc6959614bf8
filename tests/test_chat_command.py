"""`dsvl chat`: questions and commands in a terminal."""

import json
import os
import pty
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from training_runs import make_checkpoint

from dsvl.chat import DSVLChat
from dsvl.chat.terminal import Terminal, dropped_files, line_reader, printable
from dsvl.cli import main
from dsvl.image_library import ImageLibrary
from dsvl.utils.model_loading import load_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("chat"), max_position_embeddings=8192)
    settings = made / "generation_config.json"
    without_end = json.loads(settings.read_text()) | {"suppress_tokens": [2]}  # the end-of-text token
    settings.write_text(json.dumps(without_end))
    return made


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("one.png", "two three.png", "it's.jpg"):
        Image.new("RGB", (30, 40), "red").save(tmp_path / name)
    return tmp_path


@pytest.fixture
def talk(checkpoint, capsys):
    """Types lines; returns standard output, standard error and the chat."""
    model, processor = load_checkpoint(str(checkpoint), device="cpu")
    capsys.readouterr()

    def run(*lines: str, **options: object) -> tuple[str, str, DSVLChat]:
        typed = iter(lines)

        def read() -> str:
            for line in typed:
                if line == "^C":
                    raise KeyboardInterrupt
                return line
            raise EOFError

        chat = DSVLChat(model, processor, max_new_tokens=5, do_sample=False)
        Terminal(chat, read, **options).run()
        out, err = capsys.readouterr()
        return out, err, chat

    return run


def test_dropped_files_are_separated_from_text(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    one, two, three = (str(folder / name) for name in ("one.png", "two three.png", "it's.jpg"))
    for line, text, paths in [
        (f"{one} What is it?", "What is it?", [one]),
        (f"'{two}' ", "", [two]),
        (f'Compare "{two}" and {one} please', "Compare and please", [two, one]),
        (two.replace(" ", "\\ ") + " What's this?", "What's this?", [two]),
        (three.replace("'", "\\'"), "", [three]),
        ("file://" + two.replace(" ", "%20"), "", [two]),
        ("~/one.png what?", "what?", [one]),
        ("What's in one.png, and  in /nowhere/else.png?", "What's in one.png, and  in /nowhere/else.png?", []),
        ("a/b or 'c/d'", "a/b or 'c/d'", []),
    ]:
        assert dropped_files(line) == (text, paths)


def test_questions_images_and_commands(talk, folder):
    saved = folder / "a conversation"
    out, err, chat = talk(
        "/system Be short.",
        f"/image {folder / 'one.png'} '{folder / 'two three.png'}'",
        "What are these?",
        f"{folder / 'one.png'}",
        "And this?",
        "So?",
        f"/save '{saved}'",
        "/clear",
        "Hello?",
        f"/load '{saved}'",
        "/help",
        "/quit",
        "never read",
        stats=True,
    )
    assert not err
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system"] + ["user", "assistant"] * 3
    assert [len(message["content"]) for message in chat.messages[1:4:2]] == [3, 2]
    assert chat.messages[5]["content"] == "So?"
    for said in (
        "(2 images added",
        "(1 image added",
        "2 images encoded",
        "0 images encoded",
        "loaded 3 turns from",
        "/image PATH",
    ):
        assert said in out
    assert chat.messages[2]["content"].splitlines()[0] in out


def test_mistakes_are_reported_and_change_nothing(talk, folder):
    (folder / "bad.png").write_text("no image")
    out, err, chat = talk(
        "/imagine this",
        "/image missing.png",
        f"/image {folder / 'one.png'} {folder / 'bad.png'}",
        "/image http://127.0.0.1/a.png",
        "/image 'unfinished",
        "/load",
        f"/load {folder}",
        f"/save {folder}",
        "^C",
        "Still there?",
    )
    for said in (
        "/imagine is not a command",
        "missing.png does not exist",
        "cannot be read; pass one of PNG",
        "fetching is not allowed",
    ):
        assert said in err
    for said in (
        "has an unbalanced quotation mark",
        "/load takes one directory",
        "holds no conversation.jsonl",
        "is not part of a saved",
    ):
        assert said in err
    assert [message["content"] for message in chat.messages][:1] == ["Still there?"]
    assert "added" not in out


def test_running_out_of_memory_ends_the_question_and_not_the_program(talk, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Linear, "forward", full)
        out, err, chat = talk("What?", "And now?")
    assert err.count("CUDA out of memory.") == 2 and not chat.messages


@pytest.mark.parametrize("word", ["exit", "quit", " Quit ", "EXIT"])
def test_words_that_quit(talk, word):
    out, err, chat = talk("one", word, "two")
    assert [message["content"] for message in chat.messages[::2]] == ["one"] and not err


def test_clear_is_a_command_only_alone_on_a_line(talk):
    out, err, chat = talk("one", "clear", "clear the table", "how do I quit?")
    assert [message["content"] for message in chat.messages[::2]] == ["clear the table", "how do I quit?"] and not err


def test_a_path_with_spaces_is_shown_as_it_must_be_quoted(talk, folder):
    path = folder / "two three.png"
    lines = [f"/image {path}", f"{path} What is it?", f"/image '{path}", f"/save {folder}/a b", f"/image '{path}'"]
    out, err, chat = talk(*lines)
    assert err.splitlines() == [
        f"{path} is a path with spaces; quote it: /image '{path}'",
        f"{path} is a path with spaces; quote it: '{path}'",
        f"'{path} has an unbalanced quotation mark; quote the whole: {shlex.quote(chr(39) + str(path))}",
        f"/save takes one directory; quote it if it has spaces: /save '{folder}/a b'",
    ]
    assert not chat.messages and "(1 image added" in out


def test_control_characters_are_removed():
    assert printable("\x1b]0;owned\x07a\tb\nc\x9b31m\rä五\x7f") == "]0;owneda\tb\nc31mä五"


def test_lines_can_be_edited_and_are_kept_in_a_history(monkeypatch, tmp_path):
    prompt_toolkit = pytest.importorskip("prompt_toolkit")
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    assert prompt_toolkit
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        read = line_reader()
        keys.send_text("helo\x1b[Dl\n")  # moves left and inserts the missing letter
        assert read() == "hello"
        keys.send_text("one\x1b\rtwo\n")  # Esc Enter
        assert read() == "one\ntwo"
        keys.send_text("\x03")
        with pytest.raises(KeyboardInterrupt):
            read()
        keys.send_text("\x04")
        with pytest.raises(EOFError):
            read()
        again = line_reader()  # another session
        keys.send_text("\x1b[A\x1b[A\n")
        assert again() in ("hello", "one\ntwo")
    file = tmp_path / "dsvl" / "chat_history"
    assert file.stat().st_mode & 0o077 == 0


def test_without_prompt_toolkit_its_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    assert main(["chat", "nowhere"]) == 1
    assert "dsvl[chat]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [(["--dtype", "float64"], None), (["--dtype", "bfloat16", "--attn-implementation", "eager"], torch.bfloat16)],
)
def test_flags_reach_the_model(checkpoint, folder, monkeypatch, capsys, flags, dtype):
    seen = {}

    def run(self):
        seen["chat"], seen["images"] = self.chat, self.pending_images

    monkeypatch.setattr(Terminal, "run", run)
    image = str(folder / "one.png")
    flags = [*flags, "--device", "cpu", "--image", image, image, "--temperature", "0.5", "--system", "Hm."]
    code = main(["chat", str(checkpoint), *flags, "--max-new-tokens", "7", "--cache-implementation", "static"])
    if dtype is None:
        assert code == 1 and "dtype='float64' is not known" in capsys.readouterr().err
        return
    chat = seen["chat"]
    assert code == 0 and chat.model.dtype == dtype and not chat.model.training and len(seen["images"]) == 2
    assert chat.model.config.text_config._attn_implementation == "eager"
    assert chat.messages == [{"role": "system", "content": "Hm."}]
    expected = {"max_new_tokens": 7, "temperature": 0.5, "do_sample": True, "cache_implementation": "static"}
    assert chat.generation == expected


@pytest.mark.parametrize(
    ("kind", "package", "made_of"),
    [
        ("4bit", "bitsandbytes", "Params4bit"),
        ("8bit", "bitsandbytes", "Int8Params"),
        ("int8", "torchao", "Int8Tensor"),
        ("fp8", "torchao", "Float8Tensor"),
    ],
)
def test_a_quantized_decoder_answers(tmp_path, kind, package, made_of):
    pytest.importorskip(package, reason=f"{package} is not installed: pip install {package}")
    checkpoint = make_checkpoint(tmp_path, intermediate_size=128)  # whole blocks of 64
    model, processor = load_checkpoint(str(checkpoint), device="cpu", quantization=kind)
    weights = [module.weight for module in model.model.language_model.layers.modules() if isinstance(module, nn.Linear)]
    assert {type(weight).__name__ for weight in weights} == {made_of}
    others = [model.model.vision_tower, model.model.multi_modal_projector, model.lm_head]
    assert {type(parameter).__name__ for part in others for parameter in part.parameters()} == {"Parameter"}
    answers = []
    for library in (None, ImageLibrary(model, 2**24)):
        model.image_library = library
        chat = DSVLChat(model, processor, max_new_tokens=3, min_new_tokens=3)
        chat.ask("What?", Image.new("RGB", (30, 30)))
        answers.append(chat.last_turn.answer_ids)
    assert len(answers[0]) == 3 and answers[0] == answers[1]


SHOWN = "\x1b[?25h"  # shows the cursor, after the prompt has been drawn
ENTERED = "\x1b[?2004l"  # ends bracketed pastes, after a line has been entered
CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]?")


class Screen:
    """A program in a pseudo-terminal."""

    def __init__(self, *command: str, **environment: str) -> None:
        self.master, slave = pty.openpty()
        env = os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", "OMP_NUM_THREADS": "1"} | environment
        self.process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True)
        os.close(slave)
        self.text = ""

    def wait_for(self, what: str, seconds: float = 120) -> None:
        """Read until a text appears, and discard everything up to it."""
        self._read_until(lambda: what in self.text, what, seconds)
        self.text = self.text.partition(what)[2]

    def wait_for_answer(self, seconds: float = 120) -> None:
        """Read until a word appears that belongs to no control sequence."""
        self._read_until(lambda: re.search(r"\w", CONTROL.sub("", self.text)), "an answer", seconds)

    def _read_until(self, found: Callable[[], Any], what: str, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not found():
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{what!r} did not appear: {self.text!r}"
            self.text += os.read(self.master, 4096).decode(errors="replace")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_ctrl_c_stops_an_answer_and_not_the_program(checkpoint, folder, tmp_path):
    pytest.importorskip("prompt_toolkit")
    # Ctrl-C reaches the program only through its controlling terminal
    start = (
        "import fcntl, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
        "from dsvl.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--max-new-tokens", "3000", "--device", "cpu", "--stats", "--temperature", "1", "--seed", "0"]
    screen = Screen(sys.executable, "-c", start, "chat", str(checkpoint), *flags, XDG_STATE_HOME=str(tmp_path))
    try:
        screen.wait_for("Ctrl-D leaves.")
        screen.wait_for(SHOWN)
        screen.type(f"'{folder / 'two three.png'}' What is it?\r")
        screen.wait_for("(1 image added to the next question)")
        screen.wait_for_answer()
        screen.type("\x03")
        screen.wait_for("(stopped)")
        screen.wait_for("tokens/s)")
        screen.wait_for(SHOWN)
        screen.type("And now?\r")
        screen.wait_for(ENTERED)
        screen.wait_for_answer()
        screen.type("\x03")
        screen.wait_for("(stopped)")
        screen.wait_for(" 0 images encoded")
        screen.wait_for(SHOWN)
        screen.type("/quit\r")
        assert screen.process.wait(20) == 0
    finally:
        screen.process.kill()
        os.close(screen.master)

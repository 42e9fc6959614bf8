"""A conversation in a terminal: lines in, streamed answers out."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch

from ..utils.image_loading import IMAGE_SUFFIXES, open_image
from .conversation import DSVLChat

PROMPT = "> "
WORDS = {"exit": "/quit", "quit": "/quit", "clear": "/clear"}  # alone on a line, as people type them

# A file that was dropped on a terminal: a whole path, quoted or with its spaces escaped, or a file:// address.
_DROPPED = re.compile(
    r"""(?<!\S)(?: '(?P<single>(?:file://|~?/)[^']+)' | "(?P<double>(?:file://|~?/)[^"]+)" """
    r"""| (?P<bare>(?:file://|~?/)(?:\\.|[^\s\\'"])+) )(?!\S)""",
    re.VERBOSE,
)


def dropped_images(line: str) -> tuple[str, list[str]]:
    """A line without the images that were dropped into it, and their paths. Only what is a file counts."""
    paths: list[str] = []

    def take(match: re.Match[str]) -> str:
        path = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        whole = Path(path).expanduser()
        if whole.suffix.lower() not in IMAGE_SUFFIXES or not whole.is_file():
            return match[0]
        paths.append(str(whole))
        return ""

    text = _DROPPED.sub(take, line)
    return (re.sub(r" {2,}", " ", text) if paths else line).strip(), paths


def _path_with_spaces(line: str) -> str | None:
    """A file's path with spaces that a line begins with, unquoted, and that ends as an image's does."""
    ends = [match.end() for match in re.finditer("|".join(re.escape(suffix) for suffix in IMAGE_SUFFIXES), line, re.I)]
    paths = (line[:end] for end in ends)
    return next((path for path in paths if " " in path and Path(path).expanduser().is_file()), None)


def _split(rest: str) -> list[str]:
    """Words as a shell has them.

    Raises:
        ValueError: for a quotation mark without its partner.
    """
    try:
        return shlex.split(rest)
    except ValueError:
        raise ValueError(f"{rest} has a quotation mark without its partner; quote the whole: {shlex.quote(rest)}") from None


def printable(text: str) -> str:
    """Text without what would command the terminal: no control character but the end of a line and the tabulator."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or ord(c) >= 0xA0))


def line_reader(history: bool = True) -> Callable[[], str]:
    """What reads one line, with editing and a history by prompt_toolkit; plainly, where lines come from no terminal.

    It raises EOFError at the end, and KeyboardInterrupt for Ctrl-C.

    Raises:
        ImportError: if prompt_toolkit is needed and not installed.
    """
    if not sys.stdin.isatty():
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError as error:
        raise ImportError("a terminal's lines are edited by prompt_toolkit: pip install 'dsvl[chat]'.") from error

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def _(event: Any) -> None:
        event.current_buffer.insert_text("\n")

    kept = FileHistory(str(_history_file())) if history else InMemoryHistory()
    session: Any = PromptSession(PROMPT, history=kept, key_bindings=keys)
    return session.prompt


def _history_file() -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "dsvl"
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = state / "chat_history"
    file.touch(mode=0o600)
    return file


class Terminal:
    """Reads lines until there are no more, and prints what comes of them.

    Args:
        chat: the conversation.
        read: gives one line (see `line_reader`).
        stats: whether to say after each answer what it cost.
    """

    def __init__(self, chat: DSVLChat, read: Callable[[], str], stats: bool = False) -> None:
        self.chat, self.read, self.stats = chat, read, stats
        self.waiting: list[Any] = []  # images for the next question
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/image": (self._image, "PATH...", "add images to the next question; dropping files into a line does as well"),
            "/clear": (self._clear, "", "begin anew; the system message stays; clear as well"),
            "/system": (self.system, "TEXT", "set the system message; without TEXT, the model's own"),
            "/save": (self._save, "DIR", "write the conversation and its images into a directory"),
            "/load": (self.load, "DIR", "go on with a saved one"),
            "/help": (self._help, "", "this list"),
            "/quit": (self._quit, "", "leave, as Ctrl-D does; quit and exit as well"),
        }

    def run(self) -> None:
        """Talk until the end."""
        print("Ask; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                self.handle(self.read())
            except KeyboardInterrupt:
                print()
            except EOFError:
                return
            except (ValueError, OSError, torch.OutOfMemoryError) as error:  # the conversation is as it was
                print(printable(str(error)), file=sys.stderr)

    def handle(self, line: str) -> None:
        """Do what a line says: a command, or a question.

        Raises:
            EOFError: to leave.
            ValueError, OSError: what the person should read.
        """
        name, _, rest = line.strip().partition(" ")
        if line.strip().lower() in WORDS:
            name, rest = WORDS[line.strip().lower()], ""
        if name in self.commands:
            self.commands[name][0](rest.strip())
            return
        text, paths = dropped_images(line)
        if name.startswith("/") and not paths:
            if spaced := _path_with_spaces(line.strip()):
                raise ValueError(f"{spaced} is a path with spaces; quote it: {shlex.quote(spaced)}")
            raise ValueError(f"{name} is no command; /help lists them.")
        self.add_images(paths)
        if text:
            self._ask(text)

    def add_images(self, sources: Iterable[str]) -> None:
        """Let images wait for the next question; all of them, or none."""
        opened = [open_image(source, self.chat.allow_urls) for source in sources]
        self.waiting += opened
        if opened:
            one = len(self.waiting) == 1
            print(f"({len(self.waiting)} {'image waits' if one else 'images wait'} for the question)")

    def _ask(self, text: str) -> None:
        try:
            with closing(self.chat.stream(text, self.waiting)) as pieces:
                for piece in pieces:
                    print(printable(piece), end="", flush=True)
                    self.waiting = []  # they are part of the conversation now
                self.waiting = []
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        if self.stats:
            cost = self.chat.last_round
            print(
                f"({cost.prompt_tokens} tokens, {cost.reused_tokens} of them reused; {cost.encoded_images} images "
                f"encoded; first token after {cost.first_token_seconds:.2f} s, then {cost.tokens_per_second:.1f} tokens/s)"
            )

    # -- commands ------------------------------------------------------------------------------------------------------

    def _image(self, rest: str) -> None:
        if not rest:
            raise ValueError("/image takes the paths of images; quote those with spaces.")
        if " " in rest and Path(rest).expanduser().is_file():
            raise ValueError(f"{rest} is a path with spaces; quote it: /image {shlex.quote(rest)}")
        self.add_images(unquote(path.removeprefix("file://")) if "file://" in path else path for path in _split(rest))

    def _clear(self, rest: str) -> None:
        system = self.chat.messages[:1] if self._has_system() else []
        self.chat.reset()
        self.chat.messages += system
        self.waiting = []

    def _has_system(self) -> bool:
        return bool(self.chat.messages) and self.chat.messages[0]["role"] == "system"

    def system(self, text: str) -> None:
        """Set the system message of the conversation; none leaves the model's own."""
        if self._has_system():
            del self.chat.messages[0]
        if text:
            self.chat.messages.insert(0, {"role": "system", "content": text})

    def _save(self, rest: str) -> None:
        self.chat.save(self._directory(rest, "/save"))
        print(f"(saved in {rest})")

    def load(self, rest: str) -> None:
        """Go on with a saved conversation."""
        self.chat.load(self._directory(rest, "/load"))
        rounds = sum(message["role"] == "user" for message in self.chat.messages)
        print(f"({rounds} {'round' if rounds == 1 else 'rounds'} of {rest})")

    def _directory(self, rest: str, command: str) -> Path:
        words = _split(rest)
        if len(words) != 1:
            raise ValueError(f"{command} takes one directory; quote it if it has spaces: {command} {shlex.quote(rest)}")
        return Path(words[0]).expanduser()

    def _help(self, rest: str) -> None:
        for name, (_, arguments, about) in self.commands.items():
            print(f"  {name + ' ' + arguments:16} {about}")
        print("  Esc Enter begins a new line within a question.")

    def _quit(self, rest: str) -> None:
        raise EOFError

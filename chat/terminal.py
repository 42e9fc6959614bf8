"""The terminal interface of `dsvl chat`: reads lines, prints streamed answers."""

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
from ..utils.video_loading import VIDEO_SUFFIXES, open_video
from ..video_reading_dsvl import Video
from .conversation import DSVLChat

PROMPT = "> "
SUFFIXES = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
ALIASES = {"exit": "/quit", "quit": "/quit", "clear": "/clear"}  # commands without a slash, alone on a line

# What terminals insert when a file is dropped on them: an absolute path, quoted or with escaped spaces, or a file:// URL.
_DROPPED = re.compile(
    r"""(?<!\S)(?: '(?P<single>(?:file://|~?/)[^']+)' | "(?P<double>(?:file://|~?/)[^"]+)" """
    r"""| (?P<bare>(?:file://|~?/)(?:\\.|[^\s\\'"])+) )(?!\S)""",
    re.VERBOSE,
)


def dropped_files(line: str) -> tuple[str, list[str]]:
    """Find the paths of existing image and video files that were dropped into a line.

    Returns:
        The line without those paths, and the paths.
    """
    paths: list[str] = []

    def take(match: re.Match[str]) -> str:
        path = match["single"] or match["double"] or re.sub(r"\\(.)", r"\1", match["bare"])
        if path.startswith("file://"):
            path = unquote(path.removeprefix("file://").removeprefix("localhost"))
        whole = Path(path).expanduser()
        if whole.suffix.lower() not in SUFFIXES or not whole.is_file():
            return match[0]
        paths.append(str(whole))
        return ""

    text = _DROPPED.sub(take, line)
    return (re.sub(r" {2,}", " ", text) if paths else line).strip(), paths


def _path_with_spaces(line: str) -> str | None:
    """The unquoted path of an image or video file, with spaces, at the beginning of a line; None if there is none."""
    ends = [match.end() for match in re.finditer("|".join(re.escape(suffix) for suffix in SUFFIXES), line, re.I)]
    paths = (line[:end] for end in ends)
    return next((path for path in paths if " " in path and Path(path).expanduser().is_file()), None)


def _split(rest: str) -> list[str]:
    """Split arguments as a shell does.

    Raises:
        ValueError: for an unbalanced quotation mark.
    """
    try:
        return shlex.split(rest)
    except ValueError:
        raise ValueError(f"{rest} has an unbalanced quotation mark; quote the whole: {shlex.quote(rest)}") from None


def _paths(rest: str, kind: str) -> list[str]:
    """The paths behind `/image` or `/video`."""
    if not rest:
        raise ValueError(f"/{kind} takes the paths of {kind}s; quote those with spaces.")
    if " " in rest and Path(rest).expanduser().is_file():
        raise ValueError(f"{rest} is a path with spaces; quote it: /{kind} {shlex.quote(rest)}")
    return [unquote(path.removeprefix("file://")) if "file://" in path else path for path in _split(rest)]


def printable(text: str) -> str:
    """Remove control characters except newline and tab, so that text cannot send commands to the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or ord(c) >= 0xA0))


def line_reader(history: bool = True) -> Callable[[], str]:
    """A function that reads one line: with editing and history (prompt_toolkit) in a terminal, else `input`.

    The function raises EOFError at the end of the input, and KeyboardInterrupt for Ctrl-C.

    Args:
        history: whether the input history is kept in a file.

    Raises:
        ImportError: if standard input is a terminal and prompt_toolkit is not installed.
    """
    if not sys.stdin.isatty():
        return input
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory, InMemoryHistory
        from prompt_toolkit.key_binding import KeyBindings
    except ImportError as error:
        raise ImportError("dsvl chat needs prompt_toolkit in a terminal: pip install 'dsvl[chat]'.") from error

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
    """A chat session in the terminal.

    Args:
        chat: the conversation.
        read: returns the next line (see `line_reader`).
        stats (*optional*, defaults to `False`): whether to print token counts and times after each answer.
    """

    def __init__(self, chat: DSVLChat, read: Callable[[], str], stats: bool = False) -> None:
        self.chat, self.read, self.stats = chat, read, stats
        self.pending_images: list[Any] = []  # for the next question
        self.pending_videos: list[Video] = []
        self.commands: dict[str, tuple[Callable[[str], None], str, str]] = {
            "/image": (self._image, "PATH...", "add images to the next question; you can also drop files into a line"),
            "/video": (self._video, "PATH...", "add videos to the next question"),
            "/clear": (self._clear, "", "start a new conversation with the same system message; also: clear"),
            "/system": (self.set_system, "TEXT", "set the system message; without TEXT, use the checkpoint's"),
            "/save": (self._save, "DIR", "save the conversation and its images into a directory"),
            "/load": (self.load, "DIR", "continue a saved conversation"),
            "/help": (self._help, "", "list the commands"),
            "/quit": (self._quit, "", "leave, like Ctrl-D; also: quit, exit"),
        }

    def run(self) -> None:
        """Read and handle lines until the end of the input."""
        print("Ask a question; /help lists commands, Ctrl-C stops an answer, Ctrl-D leaves.")
        while True:
            try:
                self.handle(self.read())
            except KeyboardInterrupt:
                print()
            except EOFError:
                return
            except (ValueError, OSError, torch.OutOfMemoryError) as error:  # the conversation is unchanged
                print(printable(str(error)), file=sys.stderr)

    def handle(self, line: str) -> None:
        """Run a command, or ask a question.

        Raises:
            EOFError: for `/quit`.
            ValueError, OSError: with a message for the user.
        """
        name, _, rest = line.strip().partition(" ")
        if line.strip().lower() in ALIASES:
            name, rest = ALIASES[line.strip().lower()], ""
        if name in self.commands:
            self.commands[name][0](rest.strip())
            return
        text, paths = dropped_files(line)
        if name.startswith("/") and not paths:
            if spaced := _path_with_spaces(line.strip()):
                raise ValueError(f"{spaced} is a path with spaces; quote it: {shlex.quote(spaced)}")
            raise ValueError(f"{name} is not a command; /help lists them.")
        videos = [path for path in paths if path.lower().endswith(VIDEO_SUFFIXES)]
        self.add_videos(videos)
        self.add_images(path for path in paths if path not in videos)
        if text:
            self._ask(text)

    def add_images(self, sources: Iterable[str]) -> None:
        """Open images for the next question. If one cannot be opened, none is added."""
        opened = [open_image(source, self.chat.allow_urls) for source in sources]
        self.pending_images += opened
        if opened:
            count = len(self.pending_images)
            print(f"({count} {'image' if count == 1 else 'images'} added to the next question{self._cost(opened)})")

    def _cost(self, images: list[Any]) -> str:
        """What new images take, in words; nothing if every image takes the same."""
        processor = self.chat.processor
        if not processor.follows_size:
            return ""
        lengths = [length for image in images for length in processor.tile_lengths(image.height, image.width)]
        if processor.image_layout != "tiles":
            return f": {sum(lengths)} tokens"
        return f": {len(lengths)} {'tile' if len(lengths) == 1 else 'tiles'} of {lengths[0]} tokens"

    def add_videos(self, sources: Iterable[str]) -> None:
        """Read videos for the next question. If one cannot be read, none is added."""
        opened = [open_video(one, self.chat.processor.video_sampling, self.chat.allow_urls) for one in sources]
        added = "; ".join(f"{len(one.frames)} frames of {one.duration:.1f} s" for one in opened)
        self.pending_videos += opened
        if opened:
            count = len(self.pending_videos)
            print(f"({count} {'video' if count == 1 else 'videos'} added to the next question; {added})")

    def _ask(self, text: str) -> None:
        try:
            with closing(self.chat.stream(text, self.pending_images, self.pending_videos)) as pieces:
                for piece in pieces:
                    print(printable(piece), end="", flush=True)
                    self.pending_images, self.pending_videos = [], []  # they belong to the conversation now
                self.pending_images, self.pending_videos = [], []
        except KeyboardInterrupt:
            print(" (stopped)", end="")
        print()
        if self.stats:
            stats = self.chat.last_turn
            tiles = f"of {stats.encoded_tiles} tiles " if self.chat.processor.image_layout == "tiles" else ""
            print(
                f"({stats.prompt_tokens} tokens, {stats.reused_tokens} of them reused; {stats.encoded_images} images "
                f"{tiles}encoded; first token after {stats.first_token_seconds:.2f} s, "
                f"then {stats.tokens_per_second:.1f} tokens/s)"
            )

    # -- commands ------------------------------------------------------------------------------------------------------

    def _image(self, rest: str) -> None:
        self.add_images(_paths(rest, "image"))

    def _video(self, rest: str) -> None:
        self.add_videos(_paths(rest, "video"))

    def _clear(self, rest: str) -> None:
        system = self.chat.messages[:1] if self._has_system() else []
        self.chat.reset()
        self.chat.messages += system
        self.pending_images, self.pending_videos = [], []

    def _has_system(self) -> bool:
        return bool(self.chat.messages) and self.chat.messages[0]["role"] == "system"

    def set_system(self, text: str) -> None:
        """Set the system message. An empty text restores the checkpoint's."""
        if self._has_system():
            del self.chat.messages[0]
        if text:
            self.chat.messages.insert(0, {"role": "system", "content": text})

    def _save(self, rest: str) -> None:
        self.chat.save(self._directory(rest, "/save"))
        print(f"(saved to {rest})")

    def load(self, rest: str) -> None:
        """Continue a saved conversation."""
        self.chat.load(self._directory(rest, "/load"))
        turns = sum(message["role"] == "user" for message in self.chat.messages)
        print(f"(loaded {turns} {'turn' if turns == 1 else 'turns'} from {rest})")

    def _directory(self, rest: str, command: str) -> Path:
        words = _split(rest)
        if len(words) != 1:
            raise ValueError(f"{command} takes one directory; quote it if it has spaces: {command} {shlex.quote(rest)}")
        return Path(words[0]).expanduser()

    def _help(self, rest: str) -> None:
        for name, (_, arguments, about) in self.commands.items():
            print(f"  {name + ' ' + arguments:16} {about}")
        print("  Esc Enter starts a new line within a question.")

    def _quit(self, rest: str) -> None:
        raise EOFError

"""The conversations of all visitors of the page, which share one model."""

import html
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..chat import DSVLChat
from ..video_reading_dsvl import Video
from .limits import PageLimits, Refusal
from .uploads import is_video_file, open_upload

logger = logging.getLogger(__name__)


@dataclass
class PageQuestion:
    """A question with its images and videos.

    Attributes:
        text: the question.
        files: the paths of the uploaded images and videos.
    """

    text: str
    files: list[str]

    def as_message(self) -> dict[str, Any]:
        """As a message of the page's `Chatbot`."""
        return {"role": "user", "content": [*({"path": file} for file in self.files), escape(self.text)]}

    def as_box_value(self) -> dict[str, Any]:
        """As a value of the page's `MultimodalTextbox`."""
        return {"text": self.text, "files": list(self.files)}


@dataclass
class PendingTurn:
    """A question that is waiting in the queue or being answered.

    Attributes:
        question: the question.
        answer: the answer so far.
        started: whether it has left the queue.
        stop: set this to end it.
        done: resolves to whether the turn is kept. A turn that was stopped before the first text is not. Cancelled if the
            turn was removed from the queue; raises `Refusal` if no answer was possible.
        dropped_turns: oldest turns that were dropped because the model's context was full.
        cleared: whether the visitor cleared the conversation.
    """

    question: PageQuestion
    answer: str = ""
    started: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    done: "Future[bool]" = field(init=False)
    dropped_turns: int = 0
    cleared: bool = False


@dataclass
class PageConversation:
    """The conversation of one session.

    Attributes:
        chat: the conversation as the model sees it.
        turns: the questions and answers shown on the page; the model may have dropped the oldest ones.
        pending: the turn that is waiting or being answered, if any.
        cached: whether `chat` holds a KV cache and decoded images.
        left: whether the visitor has closed the page.
        used: when it was last used, in seconds of `time.monotonic`.
    """

    chat: DSVLChat
    turns: list[tuple[PageQuestion, str]] = field(default_factory=list)
    pending: PendingTurn | None = None
    cached: bool = False
    left: bool = False
    used: float = field(default_factory=time.monotonic)

    @property
    def in_use(self) -> bool:
        """Whether the model's thread is working on it."""
        return self.pending is not None and self.pending.started

    def image_parts(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The image parts of the chat's messages, with their files. (The chat may have dropped the oldest turns.)"""
        asked = [message["content"] for message in self.chat.messages if message["role"] == "user"]
        for content, (question, _) in zip(reversed(asked), reversed(self.turns), strict=False):
            parts = [part for part in content if part["type"] == "image"] if isinstance(content, list) else []
            files = iter(sorted(question.files, key=is_video_file))  # the chat places videos behind images
            file = ""
            for part in parts:
                file = file if part.get("frame", 1) > 1 else next(files)
                yield part, file

    @property
    def pixel_bytes(self) -> int:
        """The memory of its decoded images, in bytes."""
        images = [part["image"] for part, _ in self.image_parts() if "image" in part]
        return sum(3 * image.width * image.height for image in images)

    def as_messages(self) -> list[dict[str, Any]]:
        """As messages of the page's `Chatbot`."""
        messages = []
        for question, answer in self.turns:
            messages += [question.as_message(), {"role": "assistant", "content": escape(answer)}]
        if self.pending is not None:
            messages.append(self.pending.question.as_message())
            if self.pending.answer:
                messages.append({"role": "assistant", "content": escape(self.pending.answer)})
        return messages


def escape(text: str) -> str:
    """Escape text for the page's `Chatbot`.

    It renders HTML and removes only scripts, so an unescaped `<img>` tag would make the browser fetch a foreign URL.
    """
    return html.escape(text, quote=False)


class ChatSessions:
    """Keeps a conversation for each session, within the limits, and generates one answer at a time.

    Args:
        new_chat: creates an empty `DSVLChat`. All of them share one model.
        limits: the limits of the page.

    Attributes:
        conversations: the conversations by session id, the most recently used last.
    """

    def __init__(self, new_chat: Callable[[], DSVLChat], limits: PageLimits) -> None:
        self.new_chat, self.limits = new_chat, limits
        self.conversations: OrderedDict[str, PageConversation] = OrderedDict()
        self._lock = threading.RLock()  # protects all conversations; not held while the model runs
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="dsvl-page-model")

    def get(self, session: str) -> PageConversation:
        """The conversation of a session; a new one if there is none."""
        with self._lock:
            conversation = self.conversations.get(session)
            if conversation is None:
                conversation = self.conversations[session] = PageConversation(self.new_chat())
            conversation.used = time.monotonic()
            self.conversations.move_to_end(session)
            self._enforce_limits()
            return conversation

    def displayed(self, session: str) -> tuple[list[dict[str, Any]], bool]:
        """The messages for the page's `Chatbot`, and whether a turn is pending."""
        with self._lock:
            conversation = self.get(session)
            return conversation.as_messages(), conversation.pending is not None

    def ask(self, session: str, question: PageQuestion, notify: Callable[[], None] = lambda: None) -> PendingTurn:
        """Queue a question.

        Args:
            session: the session id.
            question: the question.
            notify (*optional*): called in the model's thread whenever the answer has grown.

        Raises:
            Refusal: if another turn is pending, the conversation would have too many images, or the queue is full.
        """
        with self._lock:
            conversation = self._idle(session)
            images = len(question.files) + sum(len(asked.files) for asked, _ in conversation.turns)
            if images > self.limits.conversation_images:
                raise Refusal(
                    f"A conversation may have {self.limits.conversation_images} images; with this question it would have "
                    f"{images}. Clear the conversation to start a new one."
                )
            self._check_queue()
            return self._start(conversation, question, notify)

    def ask_again(self, session: str, notify: Callable[[], None] = lambda: None) -> PendingTurn:
        """Queue the last question again and delete its answer. The arguments are those of `ask`.

        Raises:
            Refusal: as `ask`, and if there is no question.
        """
        with self._lock:
            conversation = self._idle(session)
            self._check_queue()
            return self._start(conversation, self._pop_turn(conversation), notify)

    def undo(self, session: str) -> PageQuestion:
        """Delete the last turn; returns its question.

        Raises:
            Refusal: if there is none, or another turn is pending.
        """
        with self._lock:
            return self._pop_turn(self._idle(session))

    def stop(self, session: str, turn: PendingTurn | None = None) -> None:
        """Stop the pending turn: remove it from the queue, or end its answer after the current token.

        Args:
            session: the session id.
            turn (*optional*): stop only this turn.
        """
        with self._lock:
            conversation = self.conversations.get(session)
            if conversation is not None and (turn is None or turn is conversation.pending):
                self._stop_pending(conversation)

    def clear(self, session: str) -> None:
        """Delete the conversation of a session, and stop its pending turn."""
        with self._lock:
            conversation = self.conversations.pop(session, None)
            if conversation is not None:
                if conversation.pending is not None:
                    conversation.pending.cleared = True
                self._stop_pending(conversation)

    def leave(self, session: str) -> None:
        """Stop the pending turn of a visitor who has left, and free the KV cache. The text is kept until it is idle."""
        with self._lock:
            conversation = self.conversations.get(session)
            if conversation is not None:
                conversation.left = True
                self._stop_pending(conversation)
                self._free_caches([conversation])

    def close(self) -> None:
        """Stop all pending turns."""
        with self._lock:
            for conversation in self.conversations.values():
                self._stop_pending(conversation)
        self._model_thread.shutdown(cancel_futures=True)

    # -- called with the lock held -------------------------------------------------------------------------------------

    def _idle(self, session: str) -> PageConversation:
        conversation = self.get(session)
        if conversation.pending is not None:
            raise Refusal("An answer is still being generated; wait for its end, or stop it.")
        return conversation

    def _check_queue(self) -> None:
        waiting = sum(one.pending is not None for one in self.conversations.values()) - 1  # one is being answered
        if waiting >= self.limits.waiting:
            raise Refusal(f"{waiting} questions are waiting for an answer already; ask again later.")

    @staticmethod
    def _pop_turn(conversation: PageConversation) -> PageQuestion:
        if not conversation.turns:
            raise Refusal("There is no previous question.")
        question, _ = conversation.turns.pop()
        del conversation.chat.messages[-2:]
        return question

    def _start(self, conversation: PageConversation, question: PageQuestion, notify: Callable[[], None]) -> PendingTurn:
        turn = conversation.pending = PendingTurn(question)
        conversation.left = False
        turn.done = self._model_thread.submit(self._answer, conversation, turn, notify)
        for asked in (question, *(asked for asked, _ in conversation.turns)):
            for file in asked.files:
                with suppress(OSError):
                    os.utime(file)  # Gradio deletes uploaded files by age; these are still displayed
        return turn

    @staticmethod
    def _stop_pending(conversation: PageConversation) -> None:
        if conversation.pending is not None:
            conversation.pending.stop.set()
            if conversation.pending.done.cancel():
                conversation.pending = None

    def _enforce_limits(self) -> None:
        now = time.monotonic()
        for session, conversation in list(self.conversations.items())[:-1]:
            too_many = len(self.conversations) > self.limits.conversations
            if (too_many or now - conversation.used > self.limits.idle_seconds) and conversation.pending is None:
                del self.conversations[session]
        self._free_caches(list(self.conversations.values())[: -self.limits.caches])

    def _free_caches(self, conversations: list[PageConversation]) -> None:
        """Free KV caches and decoded images. The next question of a conversation computes them again, from the files."""
        for conversation in conversations:
            if conversation.cached and not conversation.in_use:
                fresh = self.new_chat()
                fresh.messages = conversation.chat.messages
                conversation.chat, conversation.cached = fresh, False
                for part, file in conversation.image_parts():
                    part.pop("image", None)
                    part["path"] = file

    def _limit_memory(self) -> None:
        """Free the least recently used conversations until the decoded images of all are within the limit."""
        sizes = {session: conversation.pixel_bytes for session, conversation in self.conversations.items()}
        total = sum(sizes.values())
        for session, size in sizes.items():
            if total > self.limits.memory_bytes and not self.conversations[session].in_use:
                self._free_caches([self.conversations[session]])
                total -= size

    # -- in the model's thread -----------------------------------------------------------------------------------------

    def _answer(self, conversation: PageConversation, turn: PendingTurn, notify: Callable[[], None]) -> bool:
        kept = False
        with self._lock:
            turn.started = conversation.cached = True
        try:
            self._generate(conversation, turn, notify)
            kept = bool(turn.answer) or not turn.stop.is_set()
        except Refusal:  # an uploaded file is gone
            raise
        except torch.OutOfMemoryError:
            logger.exception("An answer failed.")
            with self._lock:
                self._free_caches([*self.conversations.values()])
            raise Refusal("The server is out of memory; ask again, or clear the conversation.") from None
        except ValueError:
            logger.exception("An answer failed.")
            raise Refusal(
                f"This could not be answered. The model's context is {conversation.chat.context_length} tokens: if the "
                "question is long or has many images or a video, shorten it."
            ) from None
        except Exception:
            logger.exception("An answer failed.")
            raise Refusal("The answer failed; the server's log has the reason.") from None
        finally:
            with self._lock:
                if kept:
                    conversation.turns.append((turn.question, turn.answer))
                conversation.pending, conversation.cached = None, True
                if conversation.left:
                    self._free_caches([conversation])
        return kept

    def _generate(self, conversation: PageConversation, turn: PendingTurn, notify: Callable[[], None]) -> None:
        if turn.stop.is_set():
            return
        chat = conversation.chat
        sampling = chat.processor.video_sampling
        reopened: dict[str, Any] = {}
        for part, file in conversation.image_parts():
            if "image" not in part:
                if file not in reopened:
                    reopened = {file: open_upload(file, self.limits, sampling)}
                del part["path"]
                one = reopened[file]
                part["image"] = one.frames[part["frame"] - 1] if isinstance(one, Video) else one
        opened = [open_upload(file, self.limits, sampling) for file in turn.question.files]
        videos = [one for one in opened if isinstance(one, Video)]
        images = [one for one in opened if not isinstance(one, Video)]
        with self._lock:
            self._limit_memory()
        with closing(chat.stream(turn.question.text, images, videos)) as pieces:
            del opened, images, videos  # the chat makes its own copies
            for piece in pieces:
                turn.answer += piece
                notify()
                if turn.stop.is_set():
                    break
        turn.dropped_turns = chat.last_turn.dropped_turns

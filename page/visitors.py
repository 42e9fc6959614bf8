"""The conversations of a page's visitors, over one model."""

import html
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from ..chat import DSVLChat
from .limits import Limits, Refusal

logger = logging.getLogger(__name__)


@dataclass
class Question:
    """What was asked.

    Attributes:
        text: the question.
        files: the uploaded files of its pictures, which the page shows.
        images: the pictures.
    """

    text: str
    files: list[str]
    images: list[Image.Image]

    def shown(self) -> dict[str, Any]:
        """As the page's `Chatbot` takes it."""
        return {"role": "user", "content": [*({"path": file} for file in self.files), as_text(self.text)]}

    def typed(self) -> dict[str, Any]:
        """As the page's `MultimodalTextbox` takes it."""
        return {"text": self.text, "files": list(self.files)}


@dataclass
class Conversation:
    """One visitor's conversation.

    Attributes:
        chat: the model's side of it.
        rounds: questions and answers as they are shown, which may be more than the model still reads.
        waiting: a question that waits for its turn.
        returned: a question that got no answer, and may be asked again.
        cached: whether the model's cache of it is kept.
        answering: held while the model runs for it.
        stop: set to end the answer.
        used: when it was last, in seconds of `time.monotonic`.
    """

    chat: DSVLChat
    rounds: list[tuple[Question, str]] = field(default_factory=list)
    waiting: Question | None = None
    returned: Question | None = None
    cached: bool = False
    answering: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)
    used: float = field(default_factory=time.monotonic)

    @property
    def busy(self) -> bool:
        return self.waiting is not None or self.answering.locked()

    def shown(self) -> list[dict[str, Any]]:
        """As the page's `Chatbot` takes it."""
        messages = []
        for question, answer in self.rounds:
            messages += [question.shown(), {"role": "assistant", "content": as_text(answer)}]
        return messages if self.waiting is None else [*messages, self.waiting.shown()]


def as_text(words: str) -> str:
    """Words so that the page's `Chatbot` shows them as they are.

    It takes what it gets for HTML, cleaned of scripts alone: what names a picture would have the browser fetch it.
    """
    return html.escape(words, quote=False)


class Visitors:
    """Keeps a conversation for every visitor, as many as the limits allow; one answer is generated at a time.

    Args:
        new_chat: makes an empty `DSVLChat`; all share a model.
        limits: see `Limits`.
    """

    def __init__(self, new_chat: Callable[[], DSVLChat], limits: Limits) -> None:
        self.new_chat, self.limits = new_chat, limits
        self._kept: OrderedDict[str, Conversation] = OrderedDict()  # the most recently used last
        self._mutex = threading.Lock()
        self._model = ThreadPoolExecutor(1, thread_name_prefix="dsvl-page-model")

    def of(self, session: str) -> Conversation:
        """A visitor's conversation, a new one if there is none."""
        with self._mutex:
            conversation = self._kept.setdefault(session, Conversation(self.new_chat()))
            conversation.used = time.monotonic()
            self._kept.move_to_end(session)
            self._forget()
            return conversation

    def leave(self, session: str) -> None:
        """The visitor is gone: nothing is computed for it any more. What was said stays until it is idle for too long."""
        with self._mutex:
            conversation = self._kept.get(session)
            if conversation is not None:
                conversation.waiting = None
                conversation.stop.set()
        if conversation is not None:
            with conversation.answering:
                self._free_cache(conversation)

    def close(self) -> None:
        """End all answers."""
        with self._mutex:
            for conversation in self._kept.values():
                conversation.stop.set()
        self._model.shutdown(cancel_futures=True)

    def clear(self, session: str) -> None:
        """Forget a conversation. An answer that is being given to it ends."""
        with self._mutex:
            conversation = self._kept.pop(session, None)
            if conversation is not None:
                conversation.waiting = None
                conversation.stop.set()

    def ask(self, session: str, question: Question) -> Conversation:
        """Let a question wait for its turn.

        Raises:
            Refusal: while another is waiting or answered, or for too many pictures.
        """
        conversation = self.of(session)
        with self._mutex:
            if conversation.busy:
                raise Refusal("An answer is still being given; wait for its end, or stop it.")
            pictures = len(question.images) + sum(len(asked.images) for asked, _ in conversation.rounds)
            if pictures > self.limits.conversation_pictures:
                raise Refusal(
                    f"A conversation takes {self.limits.conversation_pictures} pictures here, and this would be "
                    f"{pictures}; clear it to begin a new one."
                )
            conversation.stop.clear()
            conversation.waiting, conversation.returned = question, None
        return conversation

    def take_back(self, session: str, last_round: bool = True) -> Question | None:
        """Take back the question that waits for its turn or got no answer, or else the last round; returns the question.

        Args:
            session: the visitor's.
            last_round: whether a question that was answered is taken back as well.

        Raises:
            Refusal: while it is being answered.
        """
        conversation = self.of(session)
        with self._mutex:
            question, conversation.waiting = conversation.waiting or conversation.returned, None
            conversation.returned = None
            if question is not None or not last_round or not conversation.rounds:
                return question
            if conversation.answering.locked():
                raise Refusal("An answer is still being given; wait for its end, or stop it.")
            question, _ = conversation.rounds.pop()
            del conversation.chat.messages[-2:]
            return question

    def stop(self, session: str, seconds: float = 30.0) -> Conversation:
        """End the answer that is being given; returns when it has ended, which takes as long as one token."""
        conversation = self.of(session)
        conversation.stop.set()
        if conversation.answering.acquire(timeout=seconds):
            conversation.answering.release()
        return conversation

    def answer(self, conversation: Conversation, tell: Callable[[], None]) -> "Future[None]":
        """Answer the question that waits, after those that were before it, to its end or until `conversation.stop` is set.

        Args:
            conversation: its `rounds` grow with the answer. A question that gets no word is taken back (`returned`).
            tell: called, in the model's thread, whenever there is more to show.

        Returns:
            done when the answer is. It raises `Refusal` if there could be none.
        """
        return self._model.submit(self._answer, conversation, tell)

    def _answer(self, conversation: Conversation, tell: Callable[[], None]) -> None:
        with conversation.answering:
            with self._mutex:
                if conversation.waiting is None or conversation.stop.is_set():
                    return
                question, conversation.waiting = conversation.waiting, None
                conversation.rounds.append((question, ""))
                conversation.cached = True
            answered = False
            try:
                self._generate(conversation, question, tell)
                answered = bool(conversation.rounds[-1][1]) or not conversation.stop.is_set()
            except torch.OutOfMemoryError:
                logger.exception("An answer failed.")
                self._free_other_caches()
                raise Refusal("The machine's memory is full; ask again, or clear the conversation.") from None
            except ValueError:
                logger.exception("An answer failed.")
                raise Refusal(
                    f"This could not be answered. The model reads {conversation.chat.context_length} tokens at once: if the "
                    "question is long or has many pictures, shorten it."
                ) from None
            except Exception:
                logger.exception("An answer failed.")
                raise Refusal("The answer failed, for a reason that is in the server's log.") from None
            finally:
                if not answered:
                    conversation.returned, _ = conversation.rounds.pop()

    @staticmethod
    def _generate(conversation: Conversation, question: Question, tell: Callable[[], None]) -> None:
        said = ""
        with closing(conversation.chat.stream(question.text, question.images)) as pieces:
            tell()
            for piece in pieces:
                said += piece
                conversation.rounds[-1] = (question, said)
                tell()
                if conversation.stop.is_set():
                    return

    def _forget(self) -> None:
        """Hold the limits."""
        now = time.monotonic()
        for session, conversation in list(self._kept.items())[:-1]:
            too_many = len(self._kept) > self.limits.conversations
            if (too_many or now - conversation.used > self.limits.idle_seconds) and not conversation.busy:
                del self._kept[session]
        for conversation in list(self._kept.values())[: -self.limits.caches]:
            if not conversation.answering.locked():
                self._free_cache(conversation)

    def _free_other_caches(self) -> None:
        with self._mutex:
            for conversation in self._kept.values():
                if not conversation.answering.locked():
                    self._free_cache(conversation)

    def _free_cache(self, conversation: Conversation) -> None:
        """Keep what was said alone; the next question has it read again."""
        if conversation.cached:
            fresh = self.new_chat()
            fresh.messages = conversation.chat.messages
            conversation.chat, conversation.cached = fresh, False

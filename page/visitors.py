"""The conversations of a page's visitors, over one model."""

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
from .limits import Limits, Refusal
from .uploads import open_upload

logger = logging.getLogger(__name__)


@dataclass
class Question:
    """What was asked.

    Attributes:
        text: the question.
        files: the uploaded files of its images, which the page shows and the model reads.
    """

    text: str
    files: list[str]

    def shown(self) -> dict[str, Any]:
        """As the page's `Chatbot` takes it."""
        return {"role": "user", "content": [*({"path": file} for file in self.files), as_text(self.text)]}

    def typed(self) -> dict[str, Any]:
        """As the page's `MultimodalTextbox` takes it."""
        return {"text": self.text, "files": list(self.files)}


@dataclass
class Turn:
    """A question that waits for its turn or is being answered.

    Attributes:
        question: the question.
        said: what of the answer there is.
        begun: whether its turn has come.
        stop: set to end it.
        done: when it is, whether there is an answer: a question that got no word is not kept. It is cancelled if its turn
            never came, and raises `Refusal` if there could be no answer.
        dropped_rounds: that the model had to leave out of what it read.
        cleared: the conversation is forgotten.
    """

    question: Question
    said: str = ""
    begun: bool = False
    stop: threading.Event = field(default_factory=threading.Event)
    done: "Future[bool]" = field(init=False)
    dropped_rounds: int = 0
    cleared: bool = False


@dataclass
class Conversation:
    """One visitor's conversation.

    Attributes:
        chat: the model's side of it.
        rounds: questions and answers as they are shown, which may be more than the model still reads.
        turn: what is to be answered after them.
        cached: whether the model's cache is kept.
        gone: the visitor has left the page.
        used: when it was last, in seconds of `time.monotonic`.
    """

    chat: DSVLChat
    rounds: list[tuple[Question, str]] = field(default_factory=list)
    turn: Turn | None = None
    cached: bool = False
    gone: bool = False
    used: float = field(default_factory=time.monotonic)

    @property
    def is_being_answered(self) -> bool:
        """Whether the model's thread works on it."""
        return self.turn is not None and self.turn.begun

    def image_parts(self) -> Iterator[tuple[dict[str, Any], str]]:
        """The parts of the chat's messages that are images, and their files. (The oldest rounds may have been dropped.)"""
        asked = [message["content"] for message in self.chat.messages if message["role"] == "user"]
        for content, (question, _) in zip(reversed(asked), reversed(self.rounds), strict=False):
            parts = [part for part in content if part["type"] == "image"] if isinstance(content, list) else []
            yield from zip(parts, question.files, strict=True)

    @property
    def pixel_bytes(self) -> int:
        """The memory of its images."""
        images = [part["image"] for part, _ in self.image_parts() if "image" in part]
        return sum(3 * image.width * image.height for image in images)

    def shown(self) -> list[dict[str, Any]]:
        """As the page's `Chatbot` takes it."""
        messages = []
        for question, answer in self.rounds:
            messages += [question.shown(), {"role": "assistant", "content": as_text(answer)}]
        if self.turn is not None:
            messages.append(self.turn.question.shown())
            if self.turn.said:
                messages.append({"role": "assistant", "content": as_text(self.turn.said)})
        return messages


def as_text(words: str) -> str:
    """Words so that the page's `Chatbot` shows them as they are.

    It takes what it gets for HTML, cleaned of scripts alone: what names an image would have the browser fetch it.
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
        self._mutex = threading.RLock()  # of all that is said about conversations; the model runs without it
        self._model = ThreadPoolExecutor(1, thread_name_prefix="dsvl-page-model")

    def of(self, session: str) -> Conversation:
        """A visitor's conversation, a new one if there is none."""
        with self._mutex:
            conversation = self._kept.get(session)
            if conversation is None:
                conversation = self._kept[session] = Conversation(self.new_chat())
            conversation.used = time.monotonic()
            self._kept.move_to_end(session)
            self._forget()
            return conversation

    def shown(self, session: str) -> tuple[list[dict[str, Any]], bool]:
        """A visitor's conversation as the page's `Chatbot` takes it, and whether an answer is still to come."""
        with self._mutex:
            conversation = self.of(session)
            return conversation.shown(), conversation.turn is not None

    def ask(self, session: str, question: Question, tell: Callable[[], None] = lambda: None) -> Turn:
        """Have a question answered when its turn comes, to the end or until it is stopped.

        Args:
            session: the visitor's.
            question: what is asked.
            tell: called, in the model's thread, whenever there is more to show.

        Raises:
            Refusal: while another is being answered, for too many images, or if too many questions are waiting.
        """
        with self._mutex:
            conversation = self._free(session)
            images = len(question.files) + sum(len(asked.files) for asked, _ in conversation.rounds)
            if images > self.limits.conversation_images:
                raise Refusal(
                    f"A conversation takes {self.limits.conversation_images} images here, and this would be "
                    f"{images}; clear it to begin a new one."
                )
            self._check_queue()
            return self._begin(conversation, question, tell)

    def ask_again(self, session: str, tell: Callable[[], None] = lambda: None) -> Turn:
        """Have the last question answered anew; see `ask`. Its answer is forgotten.

        Raises:
            Refusal: also if there is none.
        """
        with self._mutex:
            conversation = self._free(session)
            self._check_queue()
            return self._begin(conversation, self._pop(conversation), tell)

    def take_back(self, session: str) -> Question:
        """Forget the last round; returns its question.

        Raises:
            Refusal: if there is none, or while another is being answered.
        """
        with self._mutex:
            return self._pop(self._free(session))

    def stop(self, session: str, turn: Turn | None = None) -> None:
        """End the answer that is being given, after the token that is being computed, or the wait for it.

        Args:
            session: the visitor's.
            turn: end no other.
        """
        with self._mutex:
            conversation = self._kept.get(session)
            if conversation is not None and (turn is None or turn is conversation.turn):
                self._end(conversation)

    def clear(self, session: str) -> None:
        """Forget a conversation. An answer that is being given to it ends."""
        with self._mutex:
            conversation = self._kept.pop(session, None)
            if conversation is not None:
                if conversation.turn is not None:
                    conversation.turn.cleared = True
                self._end(conversation)

    def leave(self, session: str) -> None:
        """The visitor is gone: nothing is computed for it any more. What was said stays until it is idle for too long."""
        with self._mutex:
            conversation = self._kept.get(session)
            if conversation is not None:
                conversation.gone = True
                self._end(conversation)
                self._free_caches([conversation])

    def close(self) -> None:
        """End all answers."""
        with self._mutex:
            for conversation in self._kept.values():
                self._end(conversation)
        self._model.shutdown(cancel_futures=True)

    # -- with the mutex held -------------------------------------------------------------------------------------------

    def _free(self, session: str) -> Conversation:
        conversation = self.of(session)
        if conversation.turn is not None:
            raise Refusal("An answer is still being given; wait for its end, or stop it.")
        return conversation

    def _check_queue(self) -> None:
        waiting = sum(conversation.turn is not None for conversation in self._kept.values()) - 1  # one is being answered
        if waiting >= self.limits.waiting:
            raise Refusal(f"{waiting} questions are waiting for an answer already; ask again later.")

    @staticmethod
    def _pop(conversation: Conversation) -> Question:
        if not conversation.rounds:
            raise Refusal("There is no question before this.")
        question, _ = conversation.rounds.pop()
        del conversation.chat.messages[-2:]
        return question

    def _begin(self, conversation: Conversation, question: Question, tell: Callable[[], None]) -> Turn:
        turn = conversation.turn = Turn(question)
        conversation.gone = False
        turn.done = self._model.submit(self._answer, conversation, turn, tell)
        for asked in (question, *(asked for asked, _ in conversation.rounds)):
            for file in asked.files:
                with suppress(OSError):
                    os.utime(file)  # uploaded files are deleted by their age, and these are on the page
        return turn

    @staticmethod
    def _end(conversation: Conversation) -> None:
        if conversation.turn is not None:
            conversation.turn.stop.set()
            if conversation.turn.done.cancel():
                conversation.turn = None

    def _forget(self) -> None:
        """Hold the limits."""
        now = time.monotonic()
        for session, conversation in list(self._kept.items())[:-1]:
            too_many = len(self._kept) > self.limits.conversations
            if (too_many or now - conversation.used > self.limits.idle_seconds) and conversation.turn is None:
                del self._kept[session]
        self._free_caches(list(self._kept.values())[: -self.limits.caches])

    def _free_caches(self, conversations: list[Conversation]) -> None:
        """Keep what was said, and the files of its images, alone; the next question has it read again."""
        for conversation in conversations:
            if conversation.cached and not conversation.is_being_answered:
                fresh = self.new_chat()
                fresh.messages = conversation.chat.messages
                conversation.chat, conversation.cached = fresh, False
                for part, file in conversation.image_parts():
                    part.clear()
                    part.update(type="image", path=file)

    def _hold_memory(self) -> None:
        """Free the least recently used conversations until the pixels of all are within the limit."""
        sizes = {session: conversation.pixel_bytes for session, conversation in self._kept.items()}
        total = sum(sizes.values())
        for session, size in sizes.items():
            if total > self.limits.memory_bytes and not self._kept[session].is_being_answered:
                self._free_caches([self._kept[session]])
                total -= size

    # -- in the model's thread -----------------------------------------------------------------------------------------

    def _answer(self, conversation: Conversation, turn: Turn, tell: Callable[[], None]) -> bool:
        answered = False
        with self._mutex:
            turn.begun = conversation.cached = True
        try:
            self._generate(conversation, turn, tell)
            answered = bool(turn.said) or not turn.stop.is_set()
        except Refusal:  # a file that is not there any more
            raise
        except torch.OutOfMemoryError:
            logger.exception("An answer failed.")
            with self._mutex:
                self._free_caches([*self._kept.values()])
            raise Refusal("The machine's memory is full; ask again, or clear the conversation.") from None
        except ValueError:
            logger.exception("An answer failed.")
            raise Refusal(
                f"This could not be answered. The model reads {conversation.chat.context_length} tokens at once: if the "
                "question is long or has many images, shorten it."
            ) from None
        except Exception:
            logger.exception("An answer failed.")
            raise Refusal("The answer failed, for a reason that is in the server's log.") from None
        finally:
            with self._mutex:
                if answered:
                    conversation.rounds.append((turn.question, turn.said))
                conversation.turn, conversation.cached = None, True
                if conversation.gone:
                    self._free_caches([conversation])
        return answered

    def _generate(self, conversation: Conversation, turn: Turn, tell: Callable[[], None]) -> None:
        if turn.stop.is_set():
            return
        chat = conversation.chat
        for part, file in conversation.image_parts():
            if "image" not in part:
                image = open_upload(file, self.limits)
                part.clear()
                part.update(type="image", image=image)
        images = [open_upload(file, self.limits) for file in turn.question.files]
        with self._mutex:
            self._hold_memory()
        with closing(chat.stream(turn.question.text, images)) as pieces:
            del images  # the conversation has its own
            for piece in pieces:
                turn.said += piece
                tell()
                if turn.stop.is_set():
                    break
        turn.dropped_rounds = chat.last_round.dropped_rounds

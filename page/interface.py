"""The Gradio interface: the conversation, and a box for the next question and its images."""

import asyncio
import html
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..utils.image_loading import IMAGE_SUFFIXES
from ..utils.video_loading import VIDEO_SUFFIXES
from .limits import Refusal
from .sessions import ChatSessions, PageQuestion, PendingTurn
from .uploads import open_upload

SECONDS_BETWEEN_UPDATES = 0.05
STYLE = """
footer, .dsvl-conversation [aria-label="Share"] {display: none !important}
.dsvl-conversation .icon-button-wrapper:not(:has(button:not([aria-label="Share"]))) {display: none}
.dsvl-about p {opacity: .7; font-size: .9em; margin: 0}
.dsvl-conversation .user.message {display: flex; flex-wrap: wrap}
.dsvl-conversation .user.message > .message {flex: 1 1 100%}
.dsvl-conversation .user.message > .message.component {flex: 0 1 auto; width: auto; padding: 4px}
.dsvl-conversation .message img {max-height: 180px; width: auto}
@media (max-width: 640px) {.dsvl-conversation {height: max(240px, calc(100dvh - 320px)) !important}}
"""


def build_page(sessions: ChatSessions, name: str, examples: Sequence[tuple[str, Sequence[Path]]] = ()) -> gr.Blocks:
    """Build the page, without starting it.

    Conversations are kept on the server. The browser sends only the next question, or a command such as retry or undo, so
    requests stay small, and a visitor cannot alter a conversation otherwise.

    Args:
        sessions: the conversations.
        name: the name of the model, which is the title of the page.
        examples (*optional*): questions, each with its image files, that can be asked with a click.
    """
    handlers = _Handlers(sessions, [PageQuestion(text, [str(file) for file in files]) for text, files in examples])
    limits = sessions.limits
    with gr.Blocks(
        title=name,
        fill_height=True,
        analytics_enabled=False,
        delete_cache=(min(600, int(limits.idle_seconds)), int(limits.idle_seconds)),
    ) as page:
        gr.Markdown(f"## {html.escape(name)}")
        gr.Markdown(
            f"Ask about up to {limits.images} images at once, each up to {limits.image_bytes / 2**20:.3g} MB and "
            f"{limits.image_pixels / 1e6:g} megapixels. They are numbered through the conversation: image 1, image 2, ... "
            "The model's answers may be wrong.",
            elem_classes="dsvl-about",
        )
        conversation = gr.Chatbot(
            scale=1,
            height="max(320px, calc(100dvh - 260px))",  # keeps the box visible, also with images in it
            elem_classes="dsvl-conversation",
            show_label=False,
            label="Conversation",
            buttons=[],
            allow_file_downloads=False,
            feedback_options=None,
            render_markdown=False,
            latex_delimiters=[],
            examples=[{"text": text, "files": [str(file) for file in files]} for text, files in examples] or None,
            placeholder="Add images and videos with the paper clip, or drop or paste them, and ask about them.",
        )
        conversation.keep_in_cache.update(
            str(file) for _, files in examples for file in files
        )  # exempt from deletion by age
        box = gr.MultimodalTextbox(
            show_label=False,
            label="Question",
            placeholder="Ask a question",
            file_types=[*IMAGE_SUFFIXES, *VIDEO_SUFFIXES],
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=limits.characters,
            autofocus=True,
            stop_btn=False,
        )
        both = [conversation, box]
        # All events go through Gradio's queue, which also transports messages to visitors. `ChatSessions` queues questions
        # and enforces the limit: if Gradio's own queue could fill up, answers could not be stopped any more.
        shared: dict[str, Any] = {"outputs": both, "show_progress": "hidden", "api_visibility": "private"}
        shared |= {"concurrency_limit": None}
        box.submit(handlers.ask, box, **shared)
        conversation.example_select(handlers.ask_example, None, **shared)
        conversation.retry(handlers.ask_again, None, **shared)
        conversation.undo(handlers.undo, None, **shared)
        conversation.clear(handlers.clear, None, **shared)
        box.stop(handlers.stop, None, **shared | {"outputs": None})
        page.unload(handlers.leave)
    page.queue(max_size=4 * limits.waiting, api_open=False)
    return page


class _Handlers:
    """The event handlers. Each returns updates of the `Chatbot` and of the box.

    A refusal is shown as a warning and leaves the page unchanged; a `gr.Error` would cover the components.
    """

    def __init__(self, sessions: ChatSessions, examples: list[PageQuestion]) -> None:
        self.sessions, self.examples = sessions, examples
        self.opening = asyncio.Semaphore(2)  # limits the memory for decoding images

    async def ask(self, typed: dict[str, Any] | None, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Ask the question in the box. If it is refused, it stays there."""
        typed = typed or {}
        async for update in self._ask(_session(request), typed.get("text") or "", typed.get("files") or []):
            yield update

    async def ask_example(self, chosen: gr.SelectData, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Ask an example. Only its index is taken from the request."""
        if type(chosen.index) is not int or not 0 <= chosen.index < len(self.examples):
            raise gr.Error("There is no such example.", print_exception=False)
        example = self.examples[chosen.index]
        async for update in self._ask(_session(request), example.text, example.files):
            yield update

    async def ask_again(self, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Generate a new answer to the last question."""
        session = _session(request)
        async for update in self._answer(session, lambda notify: self.sessions.ask_again(session, notify)):
            yield update

    def undo(self, request: gr.Request) -> tuple[Any, Any]:
        """Remove the last turn, and put its question into the box."""
        session = _session(request)
        try:
            question = self.sessions.undo(session)
        except Refusal as refusal:
            return _refused(refusal)
        return self.sessions.displayed(session)[0], _free_box(question)

    def clear(self, request: gr.Request) -> tuple[Any, Any]:
        """Delete the conversation."""
        self.sessions.clear(_session(request))
        return [], _free_box()

    def stop(self, request: gr.Request) -> None:
        """Stop the answer, and keep the text so far."""
        self.sessions.stop(_session(request))

    def leave(self, request: gr.Request) -> None:
        """Handle that the visitor closed the page."""
        self.sessions.leave(_session(request))

    async def _ask(self, session: str, text: str, files: Sequence[str]) -> AsyncIterator[tuple[Any, Any]]:
        try:
            async with self.opening:
                question = await asyncio.to_thread(self._question, text.strip(), files)
        except Refusal as refusal:
            yield _refused(refusal)
            return
        async for update in self._answer(session, lambda notify: self.sessions.ask(session, question, notify)):
            yield update

    async def _answer(
        self, session: str, begin: Callable[[Callable[[], None]], PendingTurn]
    ) -> AsyncIterator[tuple[Any, Any]]:
        """Stream an answer. Every update shows the current conversation, which may have been cleared meanwhile."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def notify() -> None:
            loop.call_soon_threadsafe(changed.set)

        try:
            turn = begin(notify)
        except Refusal as refusal:
            yield _refused(refusal)
            return
        done, answered = asyncio.wrap_future(turn.done), False
        done.add_done_callback(lambda _: changed.set())
        try:
            yield self.sessions.displayed(session)[0], _busy_box()
            while not done.done():
                await changed.wait()
                changed.clear()
                if not done.done():
                    yield self.sessions.displayed(session)[0], gr.skip()
                    await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
            answered = not done.cancelled() and done.result()
        except Refusal as refusal:
            gr.Warning(str(refusal))
        finally:
            if not done.done():  # the visitor has left
                self.sessions.stop(session, turn)
        if turn.dropped_turns:
            gr.Info(f"The context is full: the model does not see the oldest questions ({turn.dropped_turns}) any more.")
        shown, busy = self.sessions.displayed(session)
        yield shown, gr.skip() if busy else _free_box(None if answered or turn.cleared else turn.question)

    def _question(self, text: str, files: Sequence[str]) -> PageQuestion:
        limits = self.sessions.limits
        if not text:
            raise Refusal("Write a question." if not files else "Write a question about the images.")
        if len(text) > limits.characters:
            raise Refusal(f"A question may have {limits.characters:,} characters; this one has {len(text):,}.")
        if len(files) > limits.images:
            raise Refusal(f"A question may have {limits.images} images; this one has {len(files)}.")
        sampling = self.sessions.new_chat().processor.video_sampling
        for file in files:  # reports bad files at once; the pixels are not kept while the question waits
            open_upload(file, limits, sampling)
        return PageQuestion(text, [*files])


def _session(request: gr.Request) -> str:
    if not request.session_hash:
        raise gr.Error("This request has no session; open the page in a browser.", print_exception=False)
    return str(request.session_hash)


def _refused(refusal: Refusal) -> tuple[Any, Any]:
    gr.Warning(str(refusal))
    return gr.skip(), gr.skip()


def _busy_box() -> Any:
    return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)


def _free_box(question: PageQuestion | None = None) -> Any:
    if question is None:  # keep what has been typed
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    return gr.MultimodalTextbox(value=question.as_box_value(), submit_btn=True, stop_btn=False)

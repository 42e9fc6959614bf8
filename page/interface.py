"""What a visitor sees: a conversation, and a box for the next question and its images."""

import asyncio
import html
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..utils.image_loading import IMAGE_SUFFIXES
from .limits import Refusal
from .uploads import open_upload
from .visitors import Question, Turn, Visitors

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


def build_page(visitors: Visitors, name: str, examples: Sequence[tuple[str, Sequence[Path]]] = ()) -> gr.Blocks:
    """The page, not yet open.

    Nothing of a conversation comes back from the browser: it sends the next question, or that the last one shall be asked
    again or taken back. So nobody can put words into a conversation that is not theirs, and requests stay small.

    Args:
        visitors: the conversations.
        name: of the model, the page's title.
        examples: questions, each with the files of its images, to be asked with a click.
    """
    handlers = _Handlers(visitors, [Question(text, [str(file) for file in files]) for text, files in examples])
    limits = visitors.limits
    with gr.Blocks(
        title=name,
        fill_height=True,
        analytics_enabled=False,
        delete_cache=(min(600, int(limits.idle_seconds)), int(limits.idle_seconds)),
    ) as page:
        gr.Markdown(f"## {html.escape(name)}")
        gr.Markdown(
            f"Ask about up to {limits.images} images at once, each up to {limits.image_bytes / 2**20:.3g} MB and "
            f"{limits.image_pixels / 1e6:g} megapixels. Through the conversation they are image 1, image 2, ... "
            "A model's answers may be wrong.",
            elem_classes="dsvl-about",
        )
        conversation = gr.Chatbot(
            scale=1,
            height="max(320px, calc(100dvh - 260px))",  # the box stays in sight, with images in it too
            elem_classes="dsvl-conversation",
            show_label=False,
            label="Conversation",
            buttons=[],
            allow_file_downloads=False,
            feedback_options=None,
            render_markdown=False,
            latex_delimiters=[],
            examples=[{"text": text, "files": [str(file) for file in files]} for text, files in examples] or None,
            placeholder="Add images with the clip, by dropping or by pasting them, and ask about them.",
        )
        conversation.keep_in_cache.update(str(file) for _, files in examples for file in files)  # not deleted by age
        box = gr.MultimodalTextbox(
            show_label=False,
            label="Question",
            placeholder="Ask a question",
            file_types=[*IMAGE_SUFFIXES],
            file_count="multiple",
            sources=["upload"],
            max_plain_text_length=limits.characters,
            autofocus=True,
            stop_btn=False,
        )
        both = [conversation, box]
        # All go through the queue, which also carries what visitors are told. It is `Visitors` that lets questions wait, and
        # refuses more than the limits: where Gradio's own queue is full, no answer could be stopped either.
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
    """What happens on the page's events. Each returns the conversation as it is shown, and the box.

    What is refused is told beside the page, which stays as it is; an error would cover it.
    """

    def __init__(self, visitors: Visitors, examples: list[Question]) -> None:
        self.visitors, self.examples = visitors, examples
        self.opening = asyncio.Semaphore(2)  # decoding images takes memory

    async def ask(self, typed: dict[str, Any] | None, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Take the question on, and answer it; or tell why not, and it stays in the box."""
        typed = typed or {}
        async for update in self._ask(_session(request), typed.get("text") or "", typed.get("files") or []):
            yield update

    async def ask_example(self, chosen: gr.SelectData, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Ask an example; only its number is taken from the request."""
        if type(chosen.index) is not int or not 0 <= chosen.index < len(self.examples):
            raise gr.Error("There is no such example.", print_exception=False)
        example = self.examples[chosen.index]
        async for update in self._ask(_session(request), example.text, example.files):
            yield update

    async def ask_again(self, request: gr.Request) -> AsyncIterator[tuple[Any, Any]]:
        """Ask the last question again."""
        session = _session(request)
        async for update in self._answer(session, lambda tell: self.visitors.ask_again(session, tell)):
            yield update

    def undo(self, request: gr.Request) -> tuple[Any, Any]:
        """Take the last question back into the box."""
        session = _session(request)
        try:
            question = self.visitors.take_back(session)
        except Refusal as refusal:
            return _refused(refusal)
        return self.visitors.shown(session)[0], _free_box(question)

    def clear(self, request: gr.Request) -> tuple[Any, Any]:
        """Forget everything."""
        self.visitors.clear(_session(request))
        return [], _free_box()

    def stop(self, request: gr.Request) -> None:
        """End the answer; what was said stays."""
        self.visitors.stop(_session(request))

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.visitors.leave(_session(request))

    async def _ask(self, session: str, text: str, files: Sequence[str]) -> AsyncIterator[tuple[Any, Any]]:
        try:
            async with self.opening:
                question = await asyncio.to_thread(self._question, text.strip(), files)
        except Refusal as refusal:
            yield _refused(refusal)
            return
        async for update in self._answer(session, lambda tell: self.visitors.ask(session, question, tell)):
            yield update

    async def _answer(self, session: str, begin: Callable[[Callable[[], None]], Turn]) -> AsyncIterator[tuple[Any, Any]]:
        """Answer, word by word. What is shown is always the conversation as it is: it may be cleared meanwhile."""
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            loop.call_soon_threadsafe(news.set)

        try:
            turn = begin(tell)
        except Refusal as refusal:
            yield _refused(refusal)
            return
        done, answered = asyncio.wrap_future(turn.done), False
        done.add_done_callback(lambda _: news.set())
        try:
            yield self.visitors.shown(session)[0], _waiting_box()
            while not done.done():
                await news.wait()
                news.clear()
                if not done.done():
                    yield self.visitors.shown(session)[0], gr.skip()
                    await asyncio.sleep(SECONDS_BETWEEN_UPDATES)
            answered = not done.cancelled() and done.result()
        except Refusal as refusal:
            gr.Warning(str(refusal))
        finally:
            if not done.done():  # nobody is there to read on
                self.visitors.stop(session, turn)
        if turn.dropped_rounds:
            left_out = f"the oldest questions ({turn.dropped_rounds}) are left out now"
            gr.Info(f"The model's context is full; of what it read, {left_out}.")
        shown, busy = self.visitors.shown(session)
        yield shown, gr.skip() if busy else _free_box(None if answered or turn.cleared else turn.question)

    def _question(self, text: str, files: Sequence[str]) -> Question:
        limits = self.visitors.limits
        if not text:
            raise Refusal("Write a question." if not files else "Write a question about the images.")
        if len(text) > limits.characters:
            raise Refusal(f"A question has {limits.characters:,} characters at most here, and this has {len(text):,}.")
        if len(files) > limits.images:
            raise Refusal(f"A question takes {limits.images} images here, and this has {len(files)}.")
        for file in files:  # what cannot be opened is told at once; pixels are kept of nobody who waits
            open_upload(file, limits)
        return Question(text, [*files])


def _session(request: gr.Request) -> str:
    if not request.session_hash:
        raise gr.Error("Open the page in a browser.", print_exception=False)
    return str(request.session_hash)


def _refused(refusal: Refusal) -> tuple[Any, Any]:
    gr.Warning(str(refusal))
    return gr.skip(), gr.skip()


def _waiting_box() -> Any:
    return gr.MultimodalTextbox(value=None, submit_btn=False, stop_btn=True)


def _free_box(question: Question | None = None) -> Any:
    if question is None:  # whatever is typed stays
        return gr.MultimodalTextbox(submit_btn=True, stop_btn=False)
    return gr.MultimodalTextbox(value=question.typed(), submit_btn=True, stop_btn=False)

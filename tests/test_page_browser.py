"""`dsvl demo` in a headless browser."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytest.importorskip("gradio", reason="gradio is not installed: pip install 'dsvl[page]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

from model_server import make_served_checkpoint  # noqa: E402
from page_server import LIMITS, eventually, image_files, load_parts, opened  # noqa: E402

from dsvl.chat import DSVLChat  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_parts(make_served_checkpoint(tmp_path_factory.mktemp("page")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


# The browser notes every length of the last answer that it shows, however busy this process is.
WATCH_LENGTHS = """() => {
    window.lengths = new Set();
    const note = () => {
        const answers = document.querySelectorAll("[data-testid=bot]");
        if (answers.length) window.lengths.add(answers[answers.length - 1].innerText.length);
    };
    new MutationObserver(note).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""


class Person:
    """A visitor of the page."""

    def __init__(self, browser: Any, address: str) -> None:
        self.page = browser.new_context(viewport={"width": 1100, "height": 800}).new_page()
        self.page.set_default_timeout(20_000)
        self.fetched: list[str] = []
        self.page.on("request", lambda request: self.fetched.append(request.url))
        self.page.goto(address)
        self.box = self.page.locator("textarea")
        self.box.wait_for()
        self.answers = self.page.locator("[data-testid=bot]")
        self.said = self.page.locator("[data-testid=user] .message-content")
        self.toast = self.page.locator("[data-testid=toast-body]")

    def add(self, *files: str) -> None:
        self.page.set_input_files("input[type=file]", list(files))
        self.page.wait_for_function(f"document.querySelectorAll('.thumbnails img').length == {len(files)}")

    def ask(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def press(self, name: str) -> None:
        self.page.get_by_label(name, exact=True).last.click()

    def wait_for_answer(self, answers: int = 1) -> None:
        """Wait until the given number of answers is shown and the last one is complete."""
        eventually(lambda: self.answers.count() == answers)
        self.page.get_by_label("Submit", exact=True).wait_for()
        self.page.get_by_label("Retry", exact=True).wait_for()

    def is_waiting(self) -> bool:
        return bool(self.page.get_by_label("Stop", exact=True).is_visible())

    def last_answer(self) -> str:
        return str(self.answers.last.inner_text()).strip()


def test_a_conversation_about_two_images(parts: tuple[Any, Any], browser: Any, tmp_path: Path) -> None:
    """Two images, a question about the second, an answer that grows, a follow-up, retry, undo, clear."""
    files = image_files(tmp_path, 2)
    alone = DSVLChat(*parts, max_new_tokens=200)
    expected = [alone.ask("What is image <2>?", files), alone.ask("And the first?")]
    with opened(parts, max_new_tokens=200) as (address, sessions):
        person = Person(browser, address)
        person.add(*files)
        person.page.evaluate(WATCH_LENGTHS)
        person.ask("What is image <2>?")
        person.wait_for_answer()
        assert person.page.evaluate("window.lengths.size") > 3, "the answer did not come in pieces"
        assert person.last_answer().split() == expected[0].split()
        assert person.said.all_inner_texts() == ["What is image <2>?"]
        assert person.page.locator("[data-testid=user] img").count() == 2
        assert person.box.is_visible() and person.box.bounding_box()["y"] < 800

        (conversation,) = sessions.conversations.values()
        first = conversation.chat.last_turn
        person.ask("And the first?")
        person.wait_for_answer(2)
        assert person.last_answer().split() == expected[1].split()
        assert first.encoded_images == 2 and conversation.chat.last_turn.encoded_images == 0
        assert conversation.chat.last_turn.reused_tokens >= first.prompt_tokens

        person.press("Retry")
        eventually(person.is_waiting)
        person.wait_for_answer(2)
        assert person.last_answer().split() == expected[1].split()
        assert len(conversation.turns) == 2

        person.press("Undo")
        eventually(lambda: person.answers.count() == 1)
        eventually(lambda: person.box.input_value() == "And the first?")  # the browser shows one after the other
        person.press("Undo")
        eventually(lambda: person.answers.count() == 0)
        eventually(lambda: person.page.locator(".thumbnails img").count() == 2)
        person.box.press("Enter")
        person.wait_for_answer()
        assert person.last_answer().split() == expected[0].split()
        person.press("Clear")
        eventually(lambda: person.answers.count() == 0)
        eventually(lambda: not sessions.conversations)
        assert all(url.startswith((address, "data:", "blob:")) for url in person.fetched)


@pytest.mark.slow
def test_stop_keeps_the_text_so_far(parts: tuple[Any, Any], browser: Any) -> None:
    with opened(parts, max_new_tokens=1500) as (address, sessions):
        person = Person(browser, address)
        person.ask("What?")
        eventually(lambda: person.answers.count() > 0 and len(person.last_answer()) > 20)
        person.press("Stop")
        person.wait_for_answer()
        (conversation,) = sessions.conversations.values()
        said = conversation.turns[0][1]
        assert conversation.pending is None and person.last_answer().split() == said.split()
        assert conversation.chat.messages[-1]["content"] == said and len(said) < 3000
        person.ask("And now?")
        eventually(lambda: person.answers.count() == 2)
        person.press("Stop")
        person.wait_for_answer(2)


@pytest.mark.slow
def test_a_cleared_conversation_does_not_reappear(parts: tuple[Any, Any], browser: Any) -> None:
    with opened(parts, max_new_tokens=1500) as (address, sessions):
        person = Person(browser, address)
        person.ask("What?")
        eventually(lambda: person.answers.count() > 0 and len(person.last_answer()) > 20)
        person.press("Clear")
        eventually(lambda: person.answers.count() == 0)
        person.page.wait_for_timeout(1000)
        assert person.answers.count() == 0 and not person.is_waiting()
        person.ask("And now?")
        eventually(lambda: person.answers.count() == 1)
        person.press("Stop")
        person.wait_for_answer()
        assert person.said.all_inner_texts() == ["And now?"]


@pytest.mark.slow
def test_a_waiting_question_can_be_stopped(parts: tuple[Any, Any], browser: Any) -> None:
    with opened(parts, max_new_tokens=1900) as (address, sessions):
        first, second = Person(browser, address), Person(browser, address)
        first.ask("Long?")
        eventually(lambda: first.answers.count() > 0)
        second.ask("Short?")
        eventually(second.is_waiting)
        second.press("Stop")
        second.page.get_by_label("Submit", exact=True).wait_for()
        assert second.box.input_value() == "Short?" and second.said.count() == 0
        assert first.is_waiting()
        first.press("Stop")


def test_two_visitors_do_not_see_each_others_conversations(parts: tuple[Any, Any], browser: Any) -> None:
    questions = ["Mine alone?", "Yours alone?"]
    with opened(parts, max_new_tokens=100) as (address, sessions):
        people = [Person(browser, address) for _ in questions]
        for person, question in zip(people, questions, strict=True):
            person.ask(question)
        for person, question in zip(people, questions, strict=True):
            person.wait_for_answer()
            assert person.said.all_inner_texts() == [question]
            assert person.last_answer().split() == DSVLChat(*parts, max_new_tokens=100).ask(question).split()
        for person in people:
            person.page.context.close()
        eventually(lambda: not any(conversation.cached for conversation in sessions.conversations.values()))


@pytest.mark.slow
def test_an_example_is_asked_with_a_click(parts: tuple[Any, Any], browser: Any) -> None:
    with opened(parts) as (address, _):
        person = Person(browser, address)
        person.page.get_by_text("What colour is image 2?").click()
        person.wait_for_answer()
        assert person.said.all_inner_texts() == ["What colour is image 2?"]
        assert person.page.locator("[data-testid=user] img").count() == 2


@pytest.mark.slow
def test_an_image_that_is_too_large_is_refused(parts: tuple[Any, Any], browser: Any, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.png"
    Image.new("1", (20_000, 20_000)).save(bomb)
    assert bomb.stat().st_size < LIMITS.image_bytes
    with opened(parts) as (address, sessions):
        person = Person(browser, address)
        person.ask("Who?")
        person.wait_for_answer()
        person.add(str(bomb))
        person.ask("What is this?")
        person.toast.wait_for()
        assert "bomb.png is refused" in person.toast.inner_text()
        assert str(tmp_path.anchor) + "tmp" not in person.toast.inner_text()
        assert person.box.input_value() == "What is this?"  # it can be asked without the image
        person.page.wait_for_timeout(500)
        assert person.said.all_inner_texts() == ["Who?"] and person.page.locator(".thumbnails img").count() == 1
        (conversation,) = sessions.conversations.values()
        assert len(conversation.turns) == 1

"""Samples as the model will see them: for a terminal, or as a page with their images."""

import html
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..image_reading_dsvl import read_image
from ..processing_dsvl import CHAT_TEMPLATE
from ..utils.transformers_names import render_jinja_template
from .bad_samples import BadSamples
from .conversations import Conversations, load_conversations
from .images import fetched, thumbnail
from .messages import complete_messages, images_of, is_trained, location_of

WIDTH = 320  # pixels of an image on the page
PAGE = """<!doctype html>
<meta charset="utf-8">
<title>{title}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c; }}
 section {{ border-top: 1px solid #ccc; padding: 1rem 0; }}
 figure {{ display: inline-block; margin: 0 1rem 1rem 0; }}
 figcaption, p.legend {{ color: #666; font-size: 13px; }}
 pre {{ white-space: pre-wrap; overflow-wrap: anywhere; background: #f6f6f6; padding: 1rem; }}
 mark {{ background: #c9ecc9; }}
</style>
<h1>{title}</h1>
<p class="legend">{total:,} conversations. <mark>Marked</mark>: what is learnt.</p>
{sections}
"""


@dataclass
class Shown:
    """A sample, rendered.

    Attributes:
        text: the prompt, a placeholder for each image.
        learnt: (from, to) of each stretch of it that is supervised.
        images: decoded, in reading order.
        tokens: how many the model reads, if its processor is known.
    """

    text: str
    learnt: list[tuple[int, int]]
    images: list[Any]
    tokens: int | None

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text in order, each stretch with whether it is learnt."""
        end = 0
        for start, stop in self.learnt:
            yield self.text[end:start], False
            yield self.text[start:stop], True
            end = stop
        yield self.text[end:], False


def render(sample: dict[str, Any], processor: Any = None, allow_urls: bool = False) -> Shown:
    """Render a sample with the processor's chat template; without one, with the default template and LLaMA's tokens."""
    messages = complete_messages(sample)
    template, tokens = CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>", "number_after": False}
    if processor is not None:
        tokenizer = processor.tokenizer
        template = processor.chat_template
        tokens = {"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token or ""}
        tokens["number_after"] = processor.number_after
    (text,), (learnt,) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **tokens
    )
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(learnt) == len(answers):
        learnt = [stretch for stretch, answer in zip(learnt, answers, strict=True) if is_trained(answer)]
    elif not all(map(is_trained, answers)):
        raise ValueError("an answer has the weight 0, but the chat template does not mark each answer; remove it.")
    images = [read_image(fetched(source, allow_urls), allow_urls=False) for source in images_of(messages)]
    return Shown(text, learnt, images, None if processor is None else processor.count_tokens(messages))


def samples(
    source: str,
    number: int,
    processor: Any = None,
    on_bad_sample: str = "skip",
    allow_urls: bool = False,
) -> tuple[Conversations, list[Shown]]:
    """A data set, and the first of its samples that can be rendered.

    Args:
        source: whatever `load_conversations` opens.
        number: how many.
        processor: whose template and tokens are used.
        on_bad_sample: "error", or "skip" to name broken samples and show the others, however few they are.
        allow_urls: whether images are fetched from addresses.
    """
    data = load_conversations(source, on_bad_sample, allow_urls=allow_urls, max_bad_samples=1)
    bad = BadSamples(on_bad_sample, max_bad_samples=1, source=data.source)
    shown: list[Shown] = []
    for index in range(len(data)):
        if len(shown) >= number:
            break
        sample = data[index]
        with bad.sample(location_of(sample)):
            shown.append(render(sample, processor, allow_urls))
    return data, shown


def show(source: str, number: int = 3, processor: Any = None, color: bool = False, **options: Any) -> Iterator[str]:
    """The first samples as texts for a terminal; what is learnt stands between « and », or is green.

    Args:
        options: as of `samples`.
    """
    data, found = samples(source, number, processor, **options)
    before, behind = ("\033[32m", "\033[0m") if color else ("«", "»")
    if not data.form.plain:
        yield f"{source}: recognised as {data.form.about}.\n"
    for place, shown in enumerate(found, start=1):
        text = "".join(f"{before}{piece}{behind}" if learnt else piece for piece, learnt in shown.pieces())
        yield f"-- {place} of {len(data):,}: {_about(shown)}\n{text}\n"


def show_page(source: str, path: str | Path, number: int = 3, processor: Any = None, **options: Any) -> None:
    """Write the first samples as one HTML file that holds their images; options as of `samples`."""
    data, found = samples(source, number, processor, **options)
    sections = []
    for place, shown in enumerate(found, start=1):
        figures = "".join(
            f'<figure><img alt="" src="{thumbnail(image, WIDTH)}"><figcaption>Image {index}: '
            f"{image.width} x {image.height}</figcaption></figure>"
            for index, image in enumerate(shown.images, start=1)
        )
        text = "".join(f"<mark>{html.escape(p)}</mark>" if learnt else html.escape(p) for p, learnt in shown.pieces())
        sections.append(f"<section><h2>{place}</h2><p>{_about(shown)}</p>{figures}<pre>{text}</pre></section>")
    page = PAGE.format(title=html.escape(Path(source).name), total=len(data), sections="\n".join(sections))
    Path(path).write_text(page, encoding="utf-8")


def _about(shown: Shown) -> str:
    sizes = ", ".join(f"{image.width} x {image.height}" for image in shown.images)
    about = f"{len(shown.images)} images ({sizes})" if shown.images else "no image"
    return about if shown.tokens is None else f"{about}, {shown.tokens:,} tokens"

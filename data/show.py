"""`dsvl data show`: samples as the model sees them, as text for a terminal or as an HTML page with images."""

import html
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..composition.chat_template import check_template_takes
from ..image_reading_dsvl import read_image
from ..processing_dsvl import CHAT_TEMPLATE, MARK
from ..utils.image_loading import fetch_image_source, thumbnail_data_url
from ..utils.transformers_names import render_jinja_template
from ..utils.video_loading import with_frames
from .conversations import Conversations, load_conversations
from .messages import complete_messages, images_of, is_trained, location_of
from .sample_errors import BadSamples

WIDTH = 320  # pixels of an image on the page
GAP = 4  # pixels between the tiles of an image
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
<p class="legend">{total:,} conversations. <mark>Marked</mark>: trained on.</p>
{sections}
"""


@dataclass
class Seen:
    """What the vision tower gets of an image: its pixel values, without their normalization.

    Attributes:
        tiles (`list[PIL.Image.Image]`): Its inputs. Of several, the first is the whole image, and the others are the
            parts of a grid, row by row.
        columns (`int`): The columns of the grid.
        tokens (`int`): The number of image tokens.
    """

    tiles: list[Any]
    columns: int
    tokens: int

    @property
    def width(self) -> int:
        """Pixels on the page."""
        return WIDTH if len(self.tiles) == 1 else WIDTH * min(1 + self.columns, 3)

    @property
    def about(self) -> str:
        """The size of the first tile, the grid and the tokens, as text."""
        parts = len(self.tiles) - 1
        grid = f" and {parts // self.columns} x {self.columns} tiles of it" if parts else ""
        return f"{self.tiles[0].width} x {self.tiles[0].height}{grid}, {self.tokens:,} tokens"


@dataclass
class Shown:
    """A sample, rendered.

    Attributes:
        text (`str`): The rendered conversation, with a placeholder for each image.
        trained (`list[tuple[int, int]]`): The (start, end) of each span of the text that is trained on, in characters.
        images (`list[PIL.Image.Image]`): The decoded images and frames of videos, in reading order.
        names (`list[str]`): Their names, such as "Image 1" and "Video 1 at 0.5 s".
        seen (`list[Seen]`): For each image, what the vision tower gets of it; empty without a processor.
        tokens (`int`, *optional*): The number of tokens that the model reads, with a processor.
    """

    text: str
    trained: list[tuple[int, int]]
    images: list[Any]
    names: list[str]
    seen: list[Seen]
    tokens: int | None

    def pieces(self) -> Iterator[tuple[str, bool]]:
        """The text in spans: (text, whether it is trained on)."""
        end = 0
        for start, stop in self.trained:
            yield self.text[end:start].replace(MARK, ""), False
            yield self.text[start:stop].replace(MARK, ""), True
            end = stop
        yield self.text[end:].replace(MARK, ""), False


def render(sample: dict[str, Any], processor: Any = None, allow_urls: bool = False) -> Shown:
    """Render a sample with the processor's chat template. Without a processor, use the default template and LLaMA's tokens.

    Args:
        sample (`dict`): A checked sample.
        processor (`DSVLProcessor`, *optional*): The processor of a checkpoint.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether images are fetched from http(s) URLs.

    Raises:
        ValueError: If an image cannot be read, or the template does not mark answers that have weights.
    """
    sampling = None if processor is None else processor.video_sampling
    messages = with_frames(complete_messages(sample), sampling, allow_urls)
    check_template_takes(messages, CHAT_TEMPLATE if processor is None else processor.chat_template)
    template, variables = CHAT_TEMPLATE, {"bos_token": "<s>", "eos_token": "</s>"}
    if processor is not None:
        template, variables = processor.chat_template, dict(processor.tokenizer.special_tokens_map)
        if processor.number_after is not None:
            variables["number_after"] = processor.number_after
    (text,), (trained,) = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **variables
    )
    answers = [message for message in messages if message["role"] == "assistant"]
    if len(trained) == len(answers):
        trained = [span for span, answer in zip(trained, answers, strict=True) if is_trained(answer)]
    elif not all(map(is_trained, answers)):
        raise ValueError("an answer has the weight 0, but the chat template does not mark each answer; remove it.")
    images = [read_image(fetch_image_source(source, allow_urls), allow_urls=False) for source in images_of(messages)]
    if processor is None:
        return Shown(text, trained, images, _names(messages), [], None)
    seen = [seen_image(image, processor) for image in images]
    return Shown(text, trained, images, _names(messages), seen, processor.count_tokens(messages))


def _names(messages: list[dict[str, Any]]) -> list[str]:
    parts = [part for message in messages if not isinstance(message["content"], str) for part in message["content"]]
    images = videos = 0
    names = []
    for part in (part for part in parts if part["type"] == "image"):
        time = part.get("time")
        images, videos = images + (not time), videos + (bool(time) and part["frame"] == 1)
        names.append(f"Video {videos} at {time}" if time else f"Image {images}")
    return names


def seen_image(image: Any, processor: Any) -> Seen:
    """What the vision tower gets of an image.

    Args:
        image (`PIL.Image.Image`): An image.
        processor (`DSVLProcessor`): The processor of a checkpoint.
    """
    inputs = processor(images=[image], text=processor.image_token, return_tensors="np")
    pixels, columns = inputs["pixel_values"], 1
    if "spatial_shapes" in inputs:
        pixels = _from_patches(pixels[0], *inputs["spatial_shapes"][0].tolist())[None]
    elif len(pixels) > 1:
        _, columns = processor.layout.grid(image.height, image.width)
    settings = processor.image_processor
    if settings.do_normalize:
        mean, std = (np.reshape(values, (-1, 1, 1)) for values in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    levels = np.clip(np.round(pixels * 255 if settings.do_rescale else pixels), 0, 255).astype(np.uint8)
    tiles = [Image.fromarray(tile.transpose(1, 2, 0)) for tile in levels]
    return Seen(tiles, columns, int(inputs["mm_token_type_ids"].sum()))


def _from_patches(patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The pixels (3, height, width) of a native image from its patches (patches, patch_size ** 2 * 3)."""
    side = math.isqrt(patches.shape[1] // 3)
    grid = patches[: rows * columns].reshape(rows, columns, side, side, 3)
    return grid.transpose(4, 0, 2, 1, 3).reshape(3, rows * side, columns * side)


def samples(
    source: str,
    number: int,
    processor: Any = None,
    on_bad_sample: str = "skip",
    allow_urls: bool = False,
) -> tuple[Conversations, list[Shown]]:
    """Open a data set, and render its first samples.

    Args:
        source (`str`): A data set, as for `load_conversations`.
        number (`int`): The number of samples to render.
        processor (`DSVLProcessor`, *optional*): See `render`.
        on_bad_sample (`str`, *optional*, defaults to `"skip"`): "error" raises for the first bad sample; "skip" logs and
            skips bad samples, without a limit.
        allow_urls (`bool`, *optional*, defaults to `False`): Whether images are fetched from http(s) URLs.

    Returns:
        `tuple[Conversations, list[Shown]]`: The data set and the rendered samples.
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
    """Render the first samples as text for a terminal. Spans that are trained on are green, or between « and ».

    Args:
        source, number, processor: See `samples`.
        color (`bool`, *optional*, defaults to `False`): Whether the terminal supports color.
        options: The other arguments of `samples`.

    Yields:
        `str`: A line about the format of the data set, if it is not the native one, and a text for each sample.
    """
    data, found = samples(source, number, processor, **options)
    before, after = ("\033[32m", "\033[0m") if color else ("«", "»")
    if not data.format.is_native:
        yield f"{source}: detected {data.format.about}.\n"
    for position, shown in enumerate(found, start=1):
        text = "".join(f"{before}{piece}{after}" if trained else piece for piece, trained in shown.pieces())
        yield f"-- {position} of {len(data):,}: {_about(shown)}\n{text}\n"


def show_page(source: str, path: str | Path, number: int = 3, processor: Any = None, **options: Any) -> None:
    """Write the first samples to an HTML file that embeds their images; for the arguments see `samples`."""
    data, found = samples(source, number, processor, **options)
    sections = []
    for position, shown in enumerate(found, start=1):
        figures = ""
        for index, (image, name) in enumerate(zip(shown.images, shown.names, strict=True)):
            figures += _figure(image, f"{name}: {image.width} x {image.height}")
            if shown.seen:
                seen = shown.seen[index]
                figures += _figure(_in_grid(seen), f"{name} as the model sees it: {seen.about}", seen.width)
        text = "".join(f"<mark>{html.escape(p)}</mark>" if trained else html.escape(p) for p, trained in shown.pieces())
        sections.append(f"<section><h2>{position}</h2><p>{_about(shown)}</p>{figures}<pre>{text}</pre></section>")
    page = PAGE.format(title=html.escape(Path(source).name), total=len(data), sections="\n".join(sections))
    Path(path).write_text(page, encoding="utf-8")


def _in_grid(seen: Seen) -> Image.Image:
    """The tiles of an image side by side: the whole image, and beside it the parts of its grid, with gaps."""
    whole, *parts = seen.tiles
    if not parts:
        return whole
    step, rows = whole.width + GAP, len(parts) // seen.columns
    page = Image.new("RGB", (step * (1 + seen.columns) + GAP, step * rows - GAP), "white")
    page.paste(whole, (0, 0))
    for index, part in enumerate(parts):
        page.paste(part, (step * (1 + index % seen.columns) + GAP, step * (index // seen.columns)))
    return page


def _figure(image: Any, caption: str, width: int = WIDTH) -> str:
    return f'<figure><img alt="" src="{thumbnail_data_url(image, width)}"><figcaption>{caption}</figcaption></figure>'


def _about(shown: Shown) -> str:
    named = zip(shown.images, shown.names, strict=True)
    sizes = ", ".join(f"{image.width} x {image.height}" for image, name in named if name.startswith("Image"))
    if frames := sum(name.startswith("Video") for name in shown.names):
        sizes += ("; " if sizes else "") + f"{frames} frames of videos"
    views = [seen.about for seen in shown.seen]
    if views:
        sizes += f"; the model sees {views[0]} of each" if len(set(views)) == 1 else f"; the model sees {'; '.join(views)}"
    about = f"{len(shown.images)} images ({sizes})" if shown.images else "no image"
    return about if shown.tokens is None else f"{about}, {shown.tokens:,} tokens"

"""From messages to the token ids of a prompt."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt, and where its images are.

    Attributes:
        ids: the token ids, image tokens expanded.
        images: for each image, the range of its tokens, from the first of its first tile to the last of its last one; the
            texts between its tiles are inside.
        tile_lengths: for each image, the number of image tokens of each of its tiles.
    """

    ids: list[int]
    images: list[range]
    tile_lengths: list[list[int]]


def read_prompt(processor: Any, messages: list[dict[str, Any]], **variables: Any) -> Prompt:
    """The prompt of a conversation, with a generation prompt. Images are not decoded.

    Args:
        processor: a `DSVLProcessor`.
        messages: the conversation as the chat template takes it. Of image parts the `type` is read; where the number of
            tokens follows the size of images (`processor.follows_size`), their `image_size` (height, width), or their file.
        variables: of the chat template, such as `enable_thinking=False`.
    """
    image_token = processor.image_token_id
    short, tile_lengths = processor.ids_of_tiles(messages, add_generation_prompt=True, **variables)
    lengths = iter([length for image in tile_lengths for length in image])
    copies = [next(lengths) if token == image_token else 1 for token in short]
    ends = list(accumulate(copies))
    tiles = iter([index for index, token in enumerate(short) if token == image_token])
    images = []
    for image in tile_lengths:
        own = [next(tiles) for _ in image]
        images.append(range(ends[own[0]] - copies[own[0]], ends[own[-1]]))
    ids = [token for token, count in zip(short, copies, strict=True) for _ in range(count)]
    return Prompt(ids, images, tile_lengths)


def count_positions(config: Any, prompt: Prompt) -> int:
    """How many positions a prompt takes: one for each token, or one for each tile and each token of text.

    Args:
        config: a `DSVLConfig`.
    """
    if config.image_positions == "token":
        return len(prompt.ids)
    return len(prompt.ids) - sum(length - 1 for tiles in prompt.tile_lengths for length in tiles)

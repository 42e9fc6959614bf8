"""How vLLM turns the images of a prompt into model inputs: by `DSVLProcessor`, so that they are those of `generate()`.

A prompt may name an image in three ways, which are told apart by the number of its image tokens:

* by one for each tile, the tiles' texts between them: what rendering.py makes of prompts that are texts;
* by one for each image, as a client that tokenizes a prompt itself may send it;
* by all of them, as `DSVLProcessor` returns `input_ids`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdateDetails,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from ...image_reading_dsvl import read_image
from ...processing_dsvl import IMAGE_TOKEN, DSVLProcessor


@dataclass(frozen=True)
class ImageTokens:
    """The tokens of an image in a prompt.

    Attributes:
        named: with one image token for each tile, up to the last one.
        full: as `named`, with all image tokens.
        after: of the text behind the last tile, tokenized by itself.
    """

    named: list[int]
    full: list[int]
    after: list[int]


def image_tokens(processor: DSVLProcessor, height: int, width: int) -> ImageTokens:
    """The tokens of an image of a size, in pixels."""
    lengths = processor.tile_lengths(height, width)
    named, after = [processor.image_token_id], []
    if processor.layout is not None:
        text = processor.layout.text(IMAGE_TOKEN, *processor.layout.grid(height, width))
        end = text.rindex(IMAGE_TOKEN) + len(IMAGE_TOKEN)
        ids = processor.tokenizer([text[:end], text[end:]], add_special_tokens=False)["input_ids"]
        named, after = ids
    tiles = iter(lengths)
    full = [[one] * (next(tiles) if one == processor.image_token_id else 1) for one in named]
    return ImageTokens(named, sum(full, []), after)


def largest_image(processor: DSVLProcessor) -> tuple[int, int]:
    """(height, width) of an image that takes as many tokens as any, in pixels."""
    layout = processor.layout
    if layout is None:
        return (processor.tile_size or 1,) * 2
    if layout.name == "pad":
        return layout.side, layout.side
    most = layout.max_tiles if layout.name == "tiles" else layout.max_tokens
    rows = next(rows for rows in range(math.isqrt(most), 0, -1) if most % rows == 0)
    return rows * layout.side, most // rows * layout.side


class DSVLDataParser(MultiModalDataParser):
    """Images as `read_image` reads them."""

    def _parse_image_data(self, data: Any) -> ImageProcessorItems | None:
        if data is None:
            return None
        if self.is_embeddings(data):
            raise VLLMValidationError("Embeddings of images are not taken by a DSVL checkpoint under vLLM; pass the images.")
        several = isinstance(data, (list, tuple)) or getattr(data, "ndim", 0) == 4
        return ImageProcessorItems([_read(one) for one in (data if several else [data])])


def _read(item: Any) -> Any:
    if item is None:  # which vLLM remembers by its UUID
        return None
    if not isinstance(item, MediaWithBytes):
        return read_image(item)
    if item.io_config is None:  # an upright RGB image
        return item
    return MediaWithBytes(read_image(item.original_bytes), item.original_bytes, item.io_config)


class DSVLProcessingInfo(BaseProcessingInfo):
    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_data_parser(self) -> MultiModalDataParser:
        return DSVLDataParser()

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        processor = self.get_hf_processor()
        return {"image": len(image_tokens(processor, *largest_image(processor)).full)}


class DSVLDummyInputs(BaseDummyInputsBuilder[DSVLProcessingInfo]):
    """The largest images, by which vLLM measures memory."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]) -> dict[str, Any]:
        height, width = largest_image(self.info.get_hf_processor())
        return {
            "image": self._get_dummy_images(
                width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
            )
        }


class DSVLMultiModalProcessor(BaseMultiModalProcessor[DSVLProcessingInfo]):
    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        if inputs.hf_processor_mm_kwargs:
            raise VLLMValidationError(
                f"mm_processor_kwargs={dict(inputs.hf_processor_mm_kwargs)} cannot be chosen in a request, as the number of "
                "image tokens follows from how an image is processed; omit it."
            )
        return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, MultiModalFieldConfig]:
        fields = {name: MultiModalFieldConfig.batched("image") for name in ("pixel_attention_mask", "spatial_shapes")}
        if "num_tiles" not in hf_inputs:
            return fields | {"pixel_values": MultiModalFieldConfig.batched("image")}
        return {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.as_tensor(hf_inputs["num_tiles"])),
            "num_tiles": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[PromptReplacement]:
        processor, images = self.info.get_hf_processor(), mm_items.get("image", ())
        sizes = [images.get_image_size(index) for index in range(len(images))]
        tokens = [image_tokens(processor, size.height, size.width) for size in sizes]
        # What follows the last tile is in the prompt already, or `_apply_prompt_updates` adds it.
        return [
            PromptReplacement(
                modality="image",
                target=lambda index: tokens[index].named + tokens[index].after,
                replacement=lambda index: PromptUpdateDetails.select_token_id(tokens[index].full, processor.image_token_id),
            )
        ]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Any
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        """Expand the images of a prompt, in order. (vLLM's own search would decode a prompt in which it does not find an
        image and tokenize it again, by which text becomes special tokens.)

        Raises:
            VLLMValidationError: if images and image tokens do not go together.
        """
        image = self.info.get_hf_processor().image_token_id
        updates = [options[0] for options in mm_prompt_updates.get("image", [])]
        full = [update.content.full for update in updates]
        # The texts behind the last tiles hold no image token.
        ends = [len(update.target) - update.target[::-1].index(image) for update in updates]
        named = [update.target[:end] for update, end in zip(updates, ends, strict=True)]
        after = [update.target[end:] for update, end in zip(updates, ends, strict=True)]
        found = token_ids.count(image)
        added: list[list[int]]
        if found == sum(one.count(image) for one in named):
            wanted, added = named, [[]] * len(updates)
        elif found == len(updates):
            wanted, added = [[image]] * len(updates), after
        elif found == sum(one.count(image) for one in full):
            wanted, added = full, [[]] * len(updates)
        else:
            raise VLLMValidationError(
                f"The prompt names {found} images ({IMAGE_TOKEN}), but {len(updates)} were given; name each image once, in "
                "reading order. (Chat messages name them by their parts, with --chat-template-content-format auto.)"
            )
        expanded: list[int] = []
        placeholders, position = [], 0
        for index, update in enumerate(updates):
            start = token_ids.index(image, position)
            if token_ids[start : start + len(wanted[index])] != wanted[index]:
                raise VLLMValidationError(
                    f"The tokens of image {index + 1} in the prompt are not those of an image of its size; name it by one "
                    f"{IMAGE_TOKEN}, and pass images in reading order."
                )
            expanded += token_ids[position:start]
            is_embed = torch.tensor(full[index]) == image
            placeholders.append(
                PlaceholderFeaturesInfo(update.modality, update.item_idx, len(expanded), full[index], is_embed)
            )
            expanded += full[index] + added[index]
            position = start + len(wanted[index])
        return expanded + token_ids[position:], {"image": placeholders} if placeholders else {}


__all__ = [
    "DSVLDummyInputs",
    "DSVLMultiModalProcessor",
    "DSVLProcessingInfo",
    "ImageTokens",
    "image_tokens",
    "largest_image",
]

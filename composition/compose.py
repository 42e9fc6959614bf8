"""Composing a vision tower, a language model and a tokenizer into a DSVL model and its processor."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..attention_dsvl import route_attention
from ..configuration_dsvl import NATIVE_TOWERS, DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import IMAGE_TOKEN, DSVLProcessor
from .chat_template import VISUALCHAT, choose_chat_template, end_of_turn_ids, prepare_chat_template
from .towers import (
    check_native_processor,
    count_prefix_tokens,
    load_image_processor,
    load_tower,
    processed_size,
)

NUMBERED_IMAGES = 1024
VOCABULARY_MULTIPLE = 64  # the embedding table is padded to a multiple of this, for tensor cores


def compose(
    vision: str | Path | PreTrainedModel,
    language: str | Path | PreTrainedModel,
    *,
    projector_type: str = "linear",
    multimodal_attention: str = "mmca",
    image_positions: str | None = None,
    numbered_images: int | None = None,
    vision_feature_layer: int | Sequence[int] = -1,
    vision_feature_select_strategy: str = "full",
    image_layout: str | None = None,
    max_tiles: int = 12,
    max_image_tokens: int = 256,
    downsample: int = 1,
    num_queries: int = 256,
    tokenizer: Any = None,
    image_processor: Any = None,
    chat_template: str | Path | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    number_after: bool | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[DSVLForConditionalGeneration, DSVLProcessor]:
    """Compose a vision tower and a language model into a DSVL model with a newly initialized projector.

    The tokenizer is extended by `<image>` (and a padding token if it has none). The embeddings are resized to a multiple
    of 64; new rows are the mean of the old ones. The head stays tied or untied as in the language model. Loaded models
    become part of the new model without a copy.

    Args:
        vision: name or directory of a vision tower, or of a model that has one, or a loaded model: CLIP, SigLIP, SigLIP 2,
            DINOv2, DINOv3, Qwen-VL's (by `dsvl migrate qwen-tower`), or another that returns a sequence of features.
        language: name or directory of a causal language model, or a loaded one.
        projector_type, multimodal_attention, vision_feature_layer, vision_feature_select_strategy: see `DSVLConfig`.
        image_layout, image_positions, numbered_images: see `DSVLConfig`; their defaults are those of `image_defaults`.
        max_tiles, max_image_tokens, downsample, num_queries: see `DSVLConfig`.
        tokenizer: *optional*, the language model's tokenizer; defaults to that of `language`.
        image_processor: *optional*, determines the image size; defaults to that of `vision`, or CLIP's with the tower's
            `image_size` if it has none.
        chat_template: `"language"` (the language model's own), `"visualchat"` (DeepSpeed-VisualChat's), or the path of a
            Jinja file; defaults to `"language"` if the tokenizer has a template, else `"visualchat"`. See
            `prepare_chat_template` for what is added to it.
        chat_template_kwargs: *optional*, defaults of the template's variables, such as `{"enable_thinking": False}`.
        number_after: whether an image's number is repeated behind it in prompts; defaults to whether image tokens cannot
            see the number before them (`multimodal_attention` is not `"causal"`), and to False for `"visualchat"`, whose
            prompts stay those of DeepSpeed-VisualChat.
        dtype: of the whole model; "auto" is the language model's own.

    Returns:
        The model, in evaluation mode and with all parameters trainable (see `set_trainable`), and its processor.

    Raises:
        ValueError: if the parts are not compatible, or the chat template cannot be used.
    """
    tokenizer = tokenizer or _tokenizer(language)
    template_name, template = choose_chat_template(chat_template, tokenizer)
    if number_after is None:
        number_after = template_name != VISUALCHAT and multimodal_attention != "causal"
    variables = {"number_after": number_after} | (chat_template_kwargs or {})
    template = prepare_chat_template(template, tokenizer, variables, template_name)
    tower = load_tower(vision)
    image_processor = image_processor or load_image_processor(vision)
    is_native = tower.config.model_type in NATIVE_TOWERS
    image_size, num_prefix_tokens = None, 0
    if not is_native:
        image_size = processed_size(image_processor)
        num_prefix_tokens = count_prefix_tokens(tower, image_size)
    layout, positions, numbered = image_defaults(tower.config, template_name, multimodal_attention)
    image_layout, image_positions = image_layout or layout, image_positions or positions
    numbered_images = numbered if numbered_images is None else numbered_images
    decoder = _causal_lm(language, dtype)
    dtype = decoder.dtype

    _resize_embeddings(decoder, len(tokenizer), new_ids=_new_ids(tokenizer, decoder))
    for part in (tower.config, decoder.config):
        if Path(part.name_or_path).exists():  # a local path, which must not be in a checkpoint
            part.name_or_path = ""
    text_config = decoder.config
    text_config.pad_token_id = tokenizer.pad_token_id
    text_config.bos_token_id, text_config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    config = DSVLConfig(
        vision_config=tower.config,
        text_config=text_config,
        projector_type=projector_type,
        multimodal_attention=multimodal_attention,
        image_positions=image_positions,
        numbered_images=numbered_images,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=vision_feature_layer,
        vision_feature_select_strategy=vision_feature_select_strategy,
        image_size=image_size,
        num_prefix_tokens=num_prefix_tokens,
        image_layout=image_layout,
        max_tiles=max_tiles,
        max_image_tokens=max_image_tokens,
        downsample=downsample,
        num_queries=num_queries,
        dtype=dtype,
    )
    if is_native:
        check_native_processor(image_processor, tower.config.patch_size)
        image_processor.max_num_patches = config.num_patches
    with torch.device("meta"):  # the parts are loaded already; only the projector is initialized
        model = DSVLForConditionalGeneration(config)
    model.model.vision_tower = tower.to(dtype)
    model.model.language_model = decoder.base_model
    model.lm_head = decoder.get_output_embeddings()
    if multimodal_attention != "causal":
        route_attention(model.model.language_model, config)
    projector = model.model.multi_modal_projector.to_empty(device=decoder.device)
    for module in projector.modules():
        model.model._init_weights(module)
    if numbered_images:
        _embed_numbers(projector.get_parameter("image_numbers.embeddings"), tokenizer, decoder.get_input_embeddings())
    projector.to(dtype)
    model.tie_weights()

    model.generation_config = decoder.generation_config
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.generation_config.eos_token_id = _ends_of_generation(template, template_name, tokenizer, decoder.generation_config)
    # Rows beyond the vocabulary are padding.
    padding_rows = list(range(len(tokenizer), text_config.vocab_size))
    model.generation_config.suppress_tokens = padding_rows or None

    # Batched generation needs left padding. The attribute alone is not saved if the tokenizer was created without it.
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"
    tokenizer.chat_template = template  # so that it renders as the processor does
    processor = DSVLProcessor(image_processor, tokenizer, chat_template=template, **config.processor_arguments)
    return model.eval(), processor


def image_defaults(tower: PreTrainedConfig, template_name: str, multimodal_attention: str) -> tuple[str, str, int]:
    """The image layout, the image positions and the number of numbered images of newly composed models.

    Under `"mmca"`, where an image token costs the decoder its linear layers alone: `"tiles"`, with which a model read small
    print that it could not read with `"crop"` and `"pad"`, and `"image"`, with which it found one image among 512 more
    surely than with `"token"` (docs/benchmarks.md); and 1,024 numbered images, with which a frozen language model tells
    images apart, as it does not without (docs/concepts/which-attention.md). With other attention, and with the chat template
    `"visualchat"`, whose prompts are DeepSpeed-VisualChat's: `"crop"`, `"token"` and none. Towers that take images of any
    size: `"native"`.

    Args:
        tower: configuration of the vision tower.
        template_name: of the chat template, see `choose_chat_template`.
        multimodal_attention: see `DSVLConfig`.
    """
    many = multimodal_attention == "mmca" and template_name != VISUALCHAT
    layout = "native" if tower.model_type in NATIVE_TOWERS else "tiles" if many else "crop"
    return layout, "image" if many else "token", NUMBERED_IMAGES if many else 0


@torch.no_grad()
def _embed_numbers(embeddings: torch.Tensor, tokenizer: Any, table: nn.Module) -> None:
    """Make the embeddings of numbers, (numbers, hidden), of a language model's own: means over the tokens of a number, in
    which an earlier digit counts half as much as the next, so that 12 is not 21.

    Numbers are tokenized behind the word that stands before them in prompts. Where that gives all the same tokens, they are
    left as they are.
    """
    ids = tokenizer([f"Image {number}" for number in range(1, len(embeddings) + 1)], add_special_tokens=False)["input_ids"]
    shared = len(os.path.commonprefix(ids))
    for row, own in zip(embeddings, (one[shared:] for one in ids), strict=True):
        if own:
            weights = 0.5 ** torch.arange(len(own) - 1, -1, -1, dtype=torch.float32)
            tokens = table(torch.tensor(own, device=next(table.parameters()).device)).float().to(row.device)
            row.copy_((weights / weights.sum()).to(row.device) @ tokens)


def _causal_lm(language: str | Path | PreTrainedModel, dtype: torch.dtype | str) -> PreTrainedModel:
    if isinstance(language, PreTrainedModel):
        decoder = language if dtype == "auto" else language.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    else:
        decoder = AutoModelForCausalLM.from_pretrained(language, dtype=dtype)
    head = decoder.get_output_embeddings()
    if not isinstance(head, nn.Linear) or decoder.base_model is decoder:
        raise ValueError(
            f"language is a {type(decoder).__name__} without a language modelling head; pass a causal language model "
            "(AutoModelForCausalLM)."
        )
    if head.bias is not None:
        raise ValueError(
            f"The head of {type(decoder).__name__} has a bias, which DSVL does not support; choose another language model."
        )
    return decoder


def _tokenizer(language: str | Path | PreTrainedModel) -> Any:
    source = language.name_or_path if isinstance(language, PreTrainedModel) else language
    if not source:
        raise ValueError("language is a model that was not loaded from a name or directory; pass tokenizer=.")
    return AutoTokenizer.from_pretrained(source)


def _ends_of_generation(template: str, name: str, tokenizer: Any, generation_config: GenerationConfig) -> int | list[int]:
    """The ids that end an answer: the template's, the tokenizer's and, in its own format, the language model's."""
    ids = {tokenizer.eos_token_id, *end_of_turn_ids(template, tokenizer)} - {None}
    if name != VISUALCHAT:
        own = generation_config.eos_token_id
        ids |= set(own if isinstance(own, list) else [] if own is None else [own])
    return min(ids) if len(ids) == 1 else sorted(ids)


def _new_ids(tokenizer: Any, decoder: PreTrainedModel) -> list[int]:
    """Ids of tokens without trained embeddings: `<image>`, and ids beyond the embedding table."""
    rows = decoder.get_input_embeddings().weight.shape[0]
    known = decoder.config.vocab_size if decoder.config.vocab_size < rows else rows
    new = {tokenizer.convert_tokens_to_ids(IMAGE_TOKEN), *range(known, len(tokenizer))}
    return sorted(new)


@torch.no_grad()
def _resize_embeddings(decoder: PreTrainedModel, vocabulary: int, new_ids: list[int]) -> None:
    """Resize input and output embeddings to the vocabulary; new rows are the mean of the old ones."""
    old = decoder.get_input_embeddings().weight.shape[0]
    size = max(old, vocabulary)
    size += -size % VOCABULARY_MULTIPLE
    if size != old:
        decoder.resize_token_embeddings(size, mean_resizing=False)
    tables = {id(m.weight): m.weight for m in (decoder.get_input_embeddings(), decoder.get_output_embeddings())}
    rows = sorted({*new_ids, *range(min(old, size), size)})
    for table in tables.values():
        table[rows] = table[:old].float().mean(0).to(table.dtype)

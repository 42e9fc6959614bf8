"""A DSVL model and its processor as transformers' `LlavaForConditionalGeneration` and `LlavaProcessor`."""

import copy
from typing import Any

import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..processing_dsvl import DSVLProcessor
from ..utils.transformers_names import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from .limits import CANNOT, check_exportable

# Towers whose published weights have a prefix that transformers' classes have lost.
PREFIXED_TOWERS = ("clip_vision_model", "siglip_vision_model")
PREFIXED = "model.vision_tower.vision_model."


def to_llava(
    model: DSVLForConditionalGeneration, processor: DSVLProcessor
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Convert a model and its processor to LLaVA's classes, which compute the same.

    The tower, the decoder, the head and the projector's layers become part of the LLaVA model without a copy, so both models
    are in evaluation mode afterwards. Prompts and image features of both are compared on a test image.

    Args:
        model: a model with `multimodal_attention="causal"` and `projector_type="mlp"`.
        processor: its processor.

    Returns:
        The model, in evaluation mode, with its generation config, and the processor with its chat template.

    Raises:
        ValueError: for a model that LLaVA cannot express, with every reason; quantized weights; adapters that are not
            merged; a processor whose prompts LLaVA's does not repeat.
    """
    check_exportable(model.config)
    if getattr(model, "peft_config", None):
        raise ValueError(f"{CANNOT} It has adapters that are not merged; merge them first, with dsvl merge.")
    llava_processor = _processor(processor, model.config)
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(llava_config(model.config))
    llava.model.vision_tower = model.model.vision_tower
    llava.model.language_model = model.model.language_model
    llava.lm_head = model.lm_head
    for name in ("linear_1", "linear_2"):
        setattr(llava.model.multi_modal_projector, name, getattr(model.model.multi_modal_projector, name))
    generation = copy.deepcopy(model.generation_config)
    # DSVL never generates the image token; LLaVA has to be told.
    generation.suppress_tokens = sorted({*(generation.suppress_tokens or []), model.config.image_token_id})
    llava.generation_config = generation
    llava.eval()
    _compare(model, processor, llava, llava_processor)
    return llava, llava_processor


def llava_config(config: DSVLConfig) -> LlavaConfig:
    """The configuration of the LLaVA model that computes the same as a model of this configuration."""
    vision, text = copy.deepcopy(config.vision_config), copy.deepcopy(config.text_config)
    # Inference engines look the decoder's class up by this name.
    if decoder := MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type):
        text.architectures = [decoder]
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=config.image_token_id,
        image_seq_length=config.image_seq_length,
        projector_hidden_act="gelu",
        multimodal_projector_bias=True,
        vision_feature_layer=config.vision_feature_layer,
        vision_feature_select_strategy=_strategy(config),
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        architectures=[LlavaForConditionalGeneration.__name__],
    )


def published_names(llava: LlavaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """A model's weights by the names of published LLaVA checkpoints, which inference engines expect.

    transformers renames all but the tower's, whose prefix it adds to weights that it has loaded with it alone.
    """
    prefix = "model.vision_tower."
    state = llava.state_dict()
    if llava.config.vision_config.model_type not in PREFIXED_TOWERS or any(n.startswith(PREFIXED) for n in state):
        return state
    return {name.replace(prefix, PREFIXED, 1) if name.startswith(prefix) else name: one for name, one in state.items()}


def _strategy(config: DSVLConfig) -> str:
    """LLaVA's "default" drops the first token, also of a tower that has none before its patches."""
    return config.vision_feature_select_strategy if config.num_prefix_tokens else "full"


def _processor(processor: DSVLProcessor, config: DSVLConfig) -> LlavaProcessor:
    template = processor.chat_template
    if processor.number_after is not None:
        template = _with_number_after(template, processor.number_after)
    tokenizer, image_processor = copy.deepcopy(processor.tokenizer), copy.deepcopy(processor.image_processor)
    tokenizer.init_kwargs.pop("auto_map", None)  # which names the classes of the checkpoint
    vars(image_processor).pop("auto_map", None)
    rendered = processor.apply_chat_template(_question(), add_generation_prompt=True)
    adds_bos = tokenizer.bos_token and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    if adds_bos and not rendered.startswith(tokenizer.bos_token):
        tokenizer.add_bos_token = False  # LlavaProcessor would put one in front of rendered conversations
    return LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=_strategy(config),
        num_additional_image_tokens=config.num_prefix_tokens,
        chat_template=template,
    )


def _with_number_after(template: Any, value: bool) -> Any:
    """A chat template, or several by name, in which `number_after` has the value that `DSVLProcessor` passes."""
    if isinstance(template, dict):
        return {name: _with_number_after(one, value) for name, one in template.items()}
    setting = f"{{%- set number_after = {str(value).lower()} -%}}\n"
    return setting + template if "number_after" in template else template


def _question() -> list[dict[str, Any]]:
    """A conversation about a test image."""
    image = Image.radial_gradient("L").resize((80, 60)).convert("RGB")
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}]


@torch.no_grad()
def _compare(
    model: DSVLForConditionalGeneration,
    processor: DSVLProcessor,
    llava: LlavaForConditionalGeneration,
    llava_processor: LlavaProcessor,
) -> None:
    """Compare prompt, pixels and image features of both models on a test image.

    Raises:
        ValueError: if they differ.
    """
    ours, theirs = (
        one.apply_chat_template(
            _question(),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for one in (processor, llava_processor)
    )
    for name in ("input_ids", "pixel_values"):
        if not torch.equal(ours[name], theirs[name]):
            raise ValueError(
                f"LlavaProcessor makes other {name} than {type(processor).__name__} of a test image; check that "
                "processor_config.json, tokenizer and chat template are those that the checkpoint was composed with."
            )
    pixels = ours["pixel_values"].to(model.device)
    models: tuple[Any, Any] = (model, llava)
    features = [torch.stack(list(one.get_image_features(pixels).pooler_output)) for one in models]
    if not torch.equal(*features):
        raise ValueError(
            f"The features that LLaVA computes with this {model.config.vision_config.model_type!r} tower differ from this "
            "model's by up to "
            f"{(features[0] - features[1]).abs().max().item():.2g}; compose with CLIP or SigLIP, or serve this model with "
            "dsvl serve."
        )

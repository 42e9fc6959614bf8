"""Configuration of DSVL: a vision tower, a projector and a causal language model, joined by multi-modal attention."""

from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

PROJECTOR_TYPES = ("linear", "vit", "perceiver")
MULTIMODAL_ATTENTIONS = ("mmca", "mmca_reference", "causal")
FEATURE_SELECT_STRATEGIES = ("full", "default")

# The perceiver's queries form a 16 x 16 grid, whatever the tower's own grid is (DeepSpeed-VisualChat, as Qwen-VL).
PERCEIVER_GRID_SIZE = 16
PERCEIVER_HEAD_DIM = 128

# Vision towers that can be composed, and how many tokens (CLS) each puts before its grid of patches.
VISION_TOWER_PREFIX_TOKENS = {"clip_vision_model": 1}

# Decoder layers whose visibility transformers can describe by a mask function; others (recurrent, chunked) have no
# place for a modality.
ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention")

# A checkpoint names every class, whichever of them was saved: AutoModel* must all lead to the model with its head.
AUTO_MAP = {
    "AutoConfig": "configuration_dsvl.DSVLConfig",
    "AutoModel": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoProcessor": "processing_dsvl.DSVLProcessor",
}


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def _sub_config(field: str, value: Any, default: PreTrainedConfig) -> PreTrainedConfig:
    if value is None:
        return default
    if isinstance(value, dict):
        if "model_type" not in value:
            raise ValueError(
                f"{field} is a dict without 'model_type', so its class cannot be told; add it, for example "
                f"'model_type': {default.model_type!r}."
            )
        # AutoConfig.for_model knows only transformers' own model types: code named by a file is never run from here.
        return AutoConfig.for_model(**value)
    return value


class DSVLConfig(PreTrainedConfig):
    """Configuration of a DSVL model.

    Args:
        vision_config: the vision tower's configuration, or its dict with `model_type`. Defaults to CLIP ViT-L/14.
        text_config: the language model's configuration, or its dict. Any decoder that routes attention through
            transformers' `AttentionInterface`. Defaults to LLaMA-7B with 64 more rows of vocabulary.
        projector_type: `"linear"`, `"vit"` or `"perceiver"`.
        multimodal_attention: `"mmca"` (the paper's), `"mmca_reference"` (bug-compatible with the released code) or
            `"causal"` (ordinary attention).
        image_token_id: the id of `<image>`, of which every picture takes `image_seq_length` copies.
        vision_feature_layer: which of the tower's hidden states is projected; -1 is its last one, before any
            post layer-norm.
        vision_feature_select_strategy: `"full"` keeps the tower's CLS token, `"default"` drops it. The perceiver reads
            the grid of patches alone and drops a CLS token itself, as the original does.

    Raises:
        ValueError: for a value that is not known, or values that do not go together.
    """

    model_type = "dsvl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        projector_type: str = "linear",
        multimodal_attention: str = "mmca",
        image_token_id: int = 32000,
        vision_feature_layer: int = -1,
        vision_feature_select_strategy: str = "full",
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config("vision_config", vision_config, _clip_vit_l_14())
        self.text_config = _sub_config("text_config", text_config, LlamaConfig(vocab_size=32064))
        self.projector_type = projector_type
        self.multimodal_attention = multimodal_attention
        self.image_token_id = image_token_id
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self._check()
        kwargs["auto_map"] = dict(AUTO_MAP)  # a saved copy carries its own code, wherever it was loaded from
        # The head is tied exactly when the language model's own is; transformers asks the top level.
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """How many tokens the vision tower puts before its grid of patches."""
        return VISION_TOWER_PREFIX_TOKENS[self.vision_config.model_type]

    @property
    def image_seq_length(self) -> int:
        """How many embeddings one picture becomes in the decoder."""
        if self.projector_type == "perceiver":
            return PERCEIVER_GRID_SIZE**2
        patches = (self.vision_config.image_size // self.vision_config.patch_size) ** 2
        return patches + (self.num_prefix_tokens if self.vision_feature_select_strategy == "full" else 0)

    def _check(self) -> None:
        _one_of("projector_type", self.projector_type, PROJECTOR_TYPES)
        _one_of("multimodal_attention", self.multimodal_attention, MULTIMODAL_ATTENTIONS)
        _one_of("vision_feature_select_strategy", self.vision_feature_select_strategy, FEATURE_SELECT_STRATEGIES)
        self._check_vision()
        self._check_text()
        width = self.text_config.hidden_size
        if self.projector_type == "perceiver" and width % 4:
            raise ValueError(
                f"projector_type='perceiver' gives each axis sine and cosine positions, so text_config.hidden_size must "
                f"be a multiple of 4, but it is {width}; choose projector_type='linear' or another language model."
            )

    def _check_vision(self) -> None:
        vision = self.vision_config
        if vision.model_type not in VISION_TOWER_PREFIX_TOKENS:
            remedy = (
                "pass its vision_config instead"
                if hasattr(vision, "vision_config")
                else f"use a tower of type {', '.join(map(repr, VISION_TOWER_PREFIX_TOKENS))}"
            )
            raise ValueError(f"vision_config.model_type={vision.model_type!r} is not a vision tower; {remedy}.")
        if vision.image_size < vision.patch_size:
            raise ValueError(
                f"vision_config.image_size={vision.image_size} is smaller than patch_size={vision.patch_size}, so a "
                "picture has no patch; raise image_size."
            )
        layers = vision.num_hidden_layers
        if not isinstance(self.vision_feature_layer, int) or not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer!r} does not exist: the tower has {layers} layers, so "
                f"choose an integer from {-layers - 1} to {layers}."
            )

    def _check_text(self) -> None:
        text = self.text_config
        if getattr(text, "is_encoder_decoder", False) or text.get_text_config() is not text:
            raise ValueError(
                f"text_config.model_type={text.model_type!r} is not a plain causal decoder; pass a decoder-only language "
                "model (of a multi-modal model, its text_config)."
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} lies outside text_config.vocab_size={text.vocab_size}; extend the "
                "vocabulary (dsvl.compose does) or name a token that exists."
            )
        if self.multimodal_attention == "mmca_reference" and getattr(text, "sliding_window", None) is not None:
            raise ValueError(
                f"multimodal_attention='mmca_reference' compares with the released code, whose decoder has no window, but "
                f"text_config.sliding_window is {text.sliding_window}; choose 'mmca', or set sliding_window=None."
            )
        unknown = sorted(set(getattr(text, "layer_types", None) or ()) - set(ATTENTION_LAYER_TYPES))
        if unknown and self.multimodal_attention != "causal":
            raise ValueError(
                f"multimodal_attention={self.multimodal_attention!r} cannot be carried by text_config.model_type="
                f"{text.model_type!r}: its layers of type {', '.join(unknown)} have no masked attention; choose another "
                "decoder, or multimodal_attention='causal'."
            )


def _clip_vit_l_14() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )


__all__ = ["DSVLConfig"]

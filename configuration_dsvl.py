"""Configuration of DSVL: a vision tower, a projector and a causal language model, joined by multi-modal attention."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

PROJECTOR_TYPES = ("linear", "mlp", "vit", "perceiver")
MULTIMODAL_ATTENTIONS = ("mmca", "mmca_reference", "causal")
FEATURE_SELECT_STRATEGIES = ("full", "default")

# The perceiver's queries form a 16 x 16 grid, for any grid of the tower (DeepSpeed-VisualChat, as Qwen-VL).
PERCEIVER_GRID_SIZE = 16

# The number of tokens (CLS) that a vision tower puts before its grid of patches, without registers. Other types need
# `num_prefix_tokens`.
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1}
# Towers whose number of patches depends on the image (NaFlex).
NAFLEX_TOWERS = ("siglip2_vision_model",)

# Decoder layers whose visibility transformers describes by a mask function. Others (recurrent, chunked) cannot separate
# modalities.
ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention")

# A checkpoint names every class, whichever was saved: all AutoModel* lead to the model with its head.
AUTO_MAP = {
    "AutoConfig": "configuration_dsvl.DSVLConfig",
    "AutoModel": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_dsvl.DSVLForConditionalGeneration",
    "AutoProcessor": "processing_dsvl.DSVLProcessor",
}
QWEN_VISION_AUTO_MAP = {
    "AutoConfig": "configuration_dsvl.DSVLQwenVisionConfig",
    "AutoModel": "vision_dsvl.DSVLQwenVisionModel",
}


def _one_of(field: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{field}={value!r} is not known; choose one of {', '.join(map(repr, choices))}.")


def _whole(field: str, value: Any, least: int) -> None:
    """Refuse values that are not an integer of at least `least`: fractions, NaN, booleans, texts."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{field}={value!r} is not valid; pass a whole number of at least {least}.")


class _InheritedConstructor:
    """A subclass without an `__init__` keeps its parent's. (transformers generates one, which checks nothing.)"""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        inherits = "__init__" not in cls.__dict__
        super().__init_subclass__(**kwargs)
        if inherits and "__init__" in cls.__dict__:
            del cls.__init__


class DSVLQwenVisionConfig(_InheritedConstructor, PreTrainedConfig):
    """Configuration of Qwen-VL's vision tower; the defaults are its own.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: of the ViT.
        image_size, patch_size: in pixels; images are squares. Other sizes work, with interpolated positions.
        num_positions: rows of the learned position table, a square number.
        output_dim: width of the resampler, and of what the tower gives.
        num_queries: how many embeddings an image becomes, a square number.
        layer_norm_eps: of all its layer norms.
        initializer_range: of fresh weights.

    Raises:
        ValueError: for numbers that do not go together.
    """

    model_type = "dsvl_qwen_vision"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1664,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 48,
        num_attention_heads: int = 16,
        image_size: int = 448,
        patch_size: int = 14,
        num_positions: int = 256,
        output_dim: int = 4096,
        num_queries: int = 256,
        layer_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_positions = num_positions
        self.output_dim = output_dim
        self.num_queries = num_queries
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        for field, value in list(vars(self).items()):
            if field not in ("layer_norm_eps", "initializer_range"):
                _whole(field, value, least=1)
            elif isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{field}={value!r} is not valid; pass a positive number.")
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_attention_heads}.")
        for field in ("num_positions", "num_queries"):
            value = getattr(self, field)
            if round(value**0.5) ** 2 != value:
                raise ValueError(f"{field}={value} is not a square number, so it makes no square grid.")
        if output_dim % 4:
            raise ValueError(f"output_dim={output_dim} is not a multiple of 4, as sine and cosine of two axes need.")
        kwargs["auto_map"] = dict(QWEN_VISION_AUTO_MAP)
        super().__init__(**kwargs)


def _sub_config(field: str, value: Any, default: PreTrainedConfig) -> PreTrainedConfig:
    if value is None:
        return default
    if isinstance(value, dict):
        if "model_type" not in value:
            raise ValueError(
                f"{field} is a dict without 'model_type', so its class is unknown; add it, for example "
                f"'model_type': {default.model_type!r}."
            )
        if value["model_type"] == DSVLQwenVisionConfig.model_type:
            return DSVLQwenVisionConfig(**value)
        # AutoConfig.for_model knows only transformers' own model types: code named by a file is never run from here.
        return AutoConfig.for_model(**value)
    return value


class DSVLConfig(_InheritedConstructor, PreTrainedConfig):
    """Configuration of a DSVL model.

    Args:
        vision_config: the vision tower's configuration, or its dict with `model_type`: CLIP, SigLIP, DINOv2, DINOv3,
            `DSVLQwenVisionConfig`, or any that `AutoModel` knows and that gives a sequence of features for a square
            image. Defaults to CLIP ViT-L/14.
        text_config: the language model's configuration, or its dict. Any decoder that routes attention through
            transformers' `AttentionInterface`. Defaults to LLaMA-7B with 64 more rows of vocabulary.
        projector_type: `"linear"`, `"mlp"` (LLaVA-1.5's), `"vit"` or `"perceiver"`.
        multimodal_attention: `"mmca"` (the paper's), `"mmca_reference"` (bug-compatible with the released code) or
            `"causal"` (ordinary attention).
        image_token_id: the id of `<image>`, of which every image takes `image_seq_length` copies.
        vision_feature_layer: which of the tower's hidden states is projected; -1 is what it gives at its end: with
            its last norm, except CLIP, which norms its pooled output alone. A list joins the features of several layers
            along their width, in its order, as LLaVA does.
        vision_feature_select_strategy: `"full"` keeps the tower's CLS token and registers, `"default"` drops them. The
            perceiver reads the grid of patches alone and drops them itself, as the original does.
        image_size: side of the square images, in pixels, as the image processor makes them. Defaults to
            `vision_config.image_size`; another size needs a tower that interpolates its positions by itself.
        num_prefix_tokens: how many tokens (CLS, registers) the tower puts before its grid of patches. Known for the
            towers named above; for others `dsvl.compose` counts them.
        reversed_images: whether a sample's images are placed in reverse order, the first image last, as in models that
            DeepSpeed-VisualChat's code trained. Images are passed in reading order nevertheless.

    Raises:
        ValueError: for a value that is not known, or values that do not go together.
    """

    model_type = "dsvl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # What an evaluation does not gather: caches, and what only a batch with images has. Old and new names of transformers'.
    attribute_map = {"reversed_pictures": "reversed_images"}  # its name until 0.2
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states", "image_outputs"]

    def __init__(
        self,
        vision_config: PreTrainedConfig | dict | None = None,
        text_config: PreTrainedConfig | dict | None = None,
        projector_type: str = "linear",
        multimodal_attention: str = "mmca",
        image_token_id: int = 32000,
        vision_feature_layer: int | Sequence[int] = -1,
        vision_feature_select_strategy: str = "full",
        image_size: int | None = None,
        num_prefix_tokens: int | None = None,
        reversed_images: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vision_config = _sub_config("vision_config", vision_config, _clip_vit_l_14())
        self.text_config = _sub_config("text_config", text_config, LlamaConfig(vocab_size=32064))
        self.projector_type = projector_type
        self.multimodal_attention = multimodal_attention
        self.image_token_id = image_token_id
        if isinstance(vision_feature_layer, (list, tuple)):
            vision_feature_layer = list(vision_feature_layer)
        self.vision_feature_layer = vision_feature_layer
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.reversed_images = reversed_images
        self._check_tower_fields()
        self.image_size = self.vision_config.image_size if image_size is None else image_size
        self.num_prefix_tokens = _prefix_tokens(self.vision_config) if num_prefix_tokens is None else num_prefix_tokens
        _whole("image_size", self.image_size, least=1)
        _whole("num_prefix_tokens", self.num_prefix_tokens, least=0)
        _whole("image_token_id", self.image_token_id, least=0)
        if not isinstance(self.reversed_images, bool):
            raise ValueError(f"reversed_images={self.reversed_images!r} is not valid; pass True or False.")
        self._check()
        kwargs["auto_map"] = dict(AUTO_MAP)  # a saved copy carries its own code, wherever it was loaded from
        # The head is tied exactly when the language model's own is; transformers asks the top level.
        kwargs["tie_word_embeddings"] = bool(getattr(self.text_config, "tie_word_embeddings", False))
        super().__init__(**kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The values of a checkpoint's configuration; see `PreTrainedConfig.get_config_dict`.

        Raises:
            ValueError: for another model's. Its values would be dropped, and a model of random weights built.
        """
        values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if values.get("model_type") != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is of type {values.get('model_type')!r}, not a DSVL checkpoint; compose "
                "one of a vision tower and a language model (dsvl compose), or pass its directory."
            )
        return values, kwargs

    @property
    def vision_feature_size(self) -> int:
        """The width of what the tower gives to the projector: that of all its feature layers together."""
        vision = self.vision_config
        if vision.model_type == DSVLQwenVisionConfig.model_type:
            return vision.output_dim
        return vision.hidden_size * len(self.vision_feature_layers)

    @property
    def vision_feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list, whose layers' features are joined along their width."""
        layers: Any = self.vision_feature_layer
        return layers if isinstance(layers, list) else [layers]

    @property
    def num_patches(self) -> int:
        """Features of an image without prefix tokens: the number of patches, or of the resampler's queries."""
        vision = self.vision_config
        if vision.model_type == DSVLQwenVisionConfig.model_type:
            return vision.num_queries
        return (self.image_size // vision.patch_size) ** 2

    @property
    def image_seq_length(self) -> int:
        """How many embeddings one image becomes in the decoder."""
        if self.projector_type == "perceiver":
            return PERCEIVER_GRID_SIZE**2
        return self.num_patches + (self.num_prefix_tokens if self.vision_feature_select_strategy == "full" else 0)

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

    def _check_tower_fields(self) -> None:
        """Whether this is a vision tower's configuration at all."""
        vision = self.vision_config
        if vision.model_type in NAFLEX_TOWERS:
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} takes images of any shape (NaFlex), which become "
                "differently many features; that is not supported. Use a SigLIP 2 of fixed resolution, whose type is "
                "'siglip_vision_model'."
            )
        if hasattr(vision, "vision_config"):
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} is not a vision tower; pass its vision_config."
            )
        numbers = ("image_size", "patch_size", "hidden_size", "num_hidden_layers")
        if wrong := [
            name for name in numbers if not isinstance(getattr(vision, name, None), int) or getattr(vision, name) < 1
        ]:
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} is not a vision tower that can be used: "
                f"{', '.join(f'{name}={getattr(vision, name, None)!r}' for name in wrong)}; expected whole numbers. Use one "
                "that makes a square image a sequence of features, such as CLIP, SigLIP, DINOv2 or DINOv3."
            )

    def _check_vision(self) -> None:
        vision = self.vision_config
        if self.image_size < vision.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is smaller than vision_config.patch_size={vision.patch_size}, so a "
                "image has no patch; raise image_size."
            )
        layers = vision.num_hidden_layers
        chosen = self.vision_feature_layers
        exist = all(isinstance(n, int) and not isinstance(n, bool) and -layers - 1 <= n <= layers for n in chosen)
        if not exist or not chosen:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer!r} does not exist: the tower has {layers} layers, so "
                f"choose an integer from {-layers - 1} to {layers}, or a list of them."
            )
        # The last layer has two entries: with the tower's last norm (-1), and without (its index).
        if len({n if n == -1 else n % (layers + 1) for n in chosen}) < len(chosen):
            raise ValueError(
                f"vision_feature_layer={chosen} names a layer twice, whose features would be projected twice; name each "
                "layer once."
            )
        if len(chosen) > 1 and self.projector_type == "vit":
            raise ValueError(
                f"projector_type='vit' is a layer of the tower's own width, but vision_feature_layer={chosen} joins "
                f"{len(chosen)} layers; choose projector_type='mlp', 'linear' or 'perceiver', or one layer."
            )
        if vision.model_type == DSVLQwenVisionConfig.model_type:
            if chosen != [-1]:
                raise ValueError(
                    f"vision_feature_layer={self.vision_feature_layer} with Qwen-VL's tower: its features are those of its "
                    "resampler, which reads the last layer; leave it at -1."
                )
            if self.projector_type != "linear":
                raise ValueError(
                    f"projector_type={self.projector_type!r} with Qwen-VL's tower, which has a resampler at its end; choose "
                    "projector_type='linear'."
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


def _prefix_tokens(vision: PreTrainedConfig) -> int:
    if vision.model_type == DSVLQwenVisionConfig.model_type:
        return 0
    if vision.model_type not in CLASS_TOKENS:
        raise ValueError(
            f"How many tokens vision_config.model_type={vision.model_type!r} puts before its grid of patches is not known; "
            "pass num_prefix_tokens (dsvl.compose counts them)."
        )
    return CLASS_TOKENS[vision.model_type] + getattr(vision, "num_register_tokens", 0)


def _clip_vit_l_14() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14
    )


__all__ = ["DSVLConfig", "DSVLQwenVisionConfig"]

"""Configuration of DSVL: a vision tower, a projector and a causal language model, joined by multi-modal attention."""

import math
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, PreTrainedConfig

PROJECTOR_TYPES = ("linear", "mlp", "vit", "perceiver")
MULTIMODAL_ATTENTIONS = ("mmca", "mmca_reference", "causal")
IMAGE_POSITIONS = ("token", "image")
FEATURE_SELECT_STRATEGIES = ("full", "default")
IMAGE_LAYOUTS = ("crop", "pad", "tiles", "native")

# The number of tokens (CLS) that a vision tower puts before its grid of patches, without registers. Other types need
# `num_prefix_tokens`.
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
}
# Towers that take images of any size, whose number of patches follows the image (NaFlex).
NATIVE_TOWERS = ("siglip2_vision_model",)

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
        vision_config: the vision tower's configuration, or its dict with `model_type`: CLIP, SigLIP, SigLIP 2, DINOv2,
            DINOv3, `DSVLQwenVisionConfig`, or any that `AutoModel` knows and that gives a sequence of features for a
            square image. Defaults to CLIP ViT-L/14.
        text_config: the language model's configuration, or its dict. Any decoder that routes attention through
            transformers' `AttentionInterface`. Defaults to LLaMA-7B with 64 more rows of vocabulary.
        projector_type: `"linear"`, `"mlp"` (LLaVA-1.5's), `"vit"` or `"perceiver"`.
        multimodal_attention: `"mmca"` (the paper's), `"mmca_reference"` (bug-compatible with the released code) or
            `"causal"` (ordinary attention).
        image_token_id: the id of `<image>`, of which every tile of an image takes `image_seq_length` copies.
        vision_feature_layer: which of the tower's hidden states is projected; -1 is what it gives at its end: with
            its last norm, except CLIP, which norms its pooled output alone. A list joins the features of several layers
            along their width, in its order, as LLaVA does.
        vision_feature_select_strategy: `"full"` keeps the tower's CLS token and registers, `"default"` drops them. The
            perceiver reads the grid of patches alone and drops them itself, as the original does.
        image_size: side of the tower's square inputs, in pixels, as the image processor makes them. Defaults to
            `vision_config.image_size`; another size needs a tower that interpolates its positions by itself. None with
            `image_layout="native"`.
        num_prefix_tokens: how many tokens (CLS, registers) the tower puts before its grid of patches. Known for the
            towers named above; for others `dsvl.compose` counts them.
        image_layout: how an image becomes inputs of the tower, its tiles: `"crop"` (one, as the tower's image processor
            makes it: CLIP's cuts the borders off), `"pad"` (one, the whole image on a square of the mean colour),
            `"tiles"` (the whole image, and the parts of a grid that keeps more of its pixels) or `"native"` (one of the
            image's own shape, for towers that take any: SigLIP 2 NaFlex).
        max_tiles: parts of the grid, at most, with `image_layout="tiles"`.
        max_image_tokens: tokens of an image, at most, with `image_layout="native"`.
        downsample: side of the squares of features that become one token, with `projector_type="mlp"`: 2 leaves a quarter
            of the tokens. Tokens before the grid (CLS, registers) are dropped then.
        num_queries: tokens of a tile with `projector_type="perceiver"`, a square number.
        reversed_images: whether a sample's images are placed in reverse order, the first image last, as in models that
            DeepSpeed-VisualChat's code trained. Images are passed in reading order nevertheless.
        image_positions: `"token"` gives every token a rotary position of its own; under `"image"` all tokens of an image
            share one (each tile, where an image is several), and the next token has the next one, so that 500 images take
            500 positions. Which token sees which does not depend on it.
        numbered_images: under `multimodal_attention="mmca"`, where an image's tokens do not see the text that numbers it,
            how many images of a conversation know their number: the embeddings of their tokens are added to a trained
            linear map of an embedding of the number (`DSVLImageNumbers`). Later images know none. 0 is MMCA as it was
            published.

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
        image_layout: str = "crop",
        max_tiles: int = 12,
        max_image_tokens: int = 256,
        downsample: int = 1,
        num_queries: int = 256,
        reversed_images: bool = False,
        image_positions: str = "token",
        numbered_images: int = 0,
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
        self.image_layout = image_layout
        self.max_tiles = max_tiles
        self.max_image_tokens = max_image_tokens
        self.downsample = downsample
        self.num_queries = num_queries
        self.reversed_images = reversed_images
        self.image_positions = image_positions
        self.numbered_images = numbered_images
        self._check_tower_fields()
        self.image_size = getattr(self.vision_config, "image_size", None) if image_size is None else image_size
        self.num_prefix_tokens = _prefix_tokens(self.vision_config) if num_prefix_tokens is None else num_prefix_tokens
        if self.vision_config.model_type not in NATIVE_TOWERS:
            _whole("image_size", self.image_size, least=1)
        for field in ("max_tiles", "max_image_tokens", "downsample", "num_queries"):
            _whole(field, getattr(self, field), least=1)
        _whole("num_prefix_tokens", self.num_prefix_tokens, least=0)
        _whole("image_token_id", self.image_token_id, least=0)
        _whole("numbered_images", self.numbered_images, least=0)
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
        """Features of a tile without prefix tokens: the number of patches (of a native image, at most), or of the
        resampler's queries."""
        vision = self.vision_config
        if vision.model_type == DSVLQwenVisionConfig.model_type:
            return vision.num_queries
        if self.image_layout == "native":
            return self.max_image_tokens * (1 if self.projector_type == "perceiver" else self.downsample**2)
        return (self.image_size // vision.patch_size) ** 2

    @property
    def image_seq_length(self) -> int:
        """How many embeddings one tile becomes in the decoder; with `image_layout="native"`, an image at most."""
        if self.projector_type == "perceiver":
            return self.num_queries
        if self.image_layout == "native":
            return self.max_image_tokens
        if self.downsample > 1:
            return math.ceil(math.isqrt(self.num_patches) / self.downsample) ** 2
        return self.num_patches + (self.num_prefix_tokens if self.vision_feature_select_strategy == "full" else 0)

    def tile_lengths(self, tiles: int, spatial_shapes: Any = None) -> list[int]:
        """How many embeddings each of so many tiles becomes in the decoder.

        Args:
            tiles: their number.
            spatial_shapes: of native images, (images, 2), rows and columns of patches.
        """
        if spatial_shapes is None or self.projector_type == "perceiver":
            return [self.image_seq_length] * tiles
        side = self.downsample
        return [math.ceil(rows / side) * math.ceil(columns / side) for rows, columns in spatial_shapes.tolist()]

    @property
    def processor_arguments(self) -> dict[str, Any]:
        """The arguments of `DSVLProcessor` that belong to this model."""
        is_native = self.image_layout == "native"
        return {
            "image_seq_length": self.image_seq_length,
            "image_layout": self.image_layout,
            "tile_size": self.vision_config.patch_size * self.downsample if is_native else self.image_size,
            "max_tiles": self.max_tiles,
            "max_image_tokens": self.max_image_tokens,
            "fixed_length": not is_native or self.projector_type == "perceiver",
        }

    def _check(self) -> None:
        _one_of("projector_type", self.projector_type, PROJECTOR_TYPES)
        _one_of("multimodal_attention", self.multimodal_attention, MULTIMODAL_ATTENTIONS)
        _one_of("vision_feature_select_strategy", self.vision_feature_select_strategy, FEATURE_SELECT_STRATEGIES)
        self._check_image_positions()
        if self.numbered_images and (self.multimodal_attention != "mmca" or self.reversed_images):
            given = f"multimodal_attention={self.multimodal_attention!r}, reversed_images={self.reversed_images}"
            raise ValueError(
                f"numbered_images={self.numbered_images} with {given}: numbers are for images in reading order under "
                "'mmca', whose tokens see no text; leave it at 0."
            )
        self._check_vision()
        self._check_image_layout()
        self._check_text()
        width = self.text_config.hidden_size
        if self.projector_type == "perceiver" and width % 4:
            raise ValueError(
                f"projector_type='perceiver' gives each axis sine and cosine positions, so text_config.hidden_size must "
                f"be a multiple of 4, but it is {width}; choose projector_type='linear' or another language model."
            )

    def _check_image_positions(self) -> None:
        _one_of("image_positions", self.image_positions, IMAGE_POSITIONS)
        reference = self.multimodal_attention == "mmca_reference"
        if self.image_positions == "image" and (reference or self.reversed_images):
            field = "multimodal_attention='mmca_reference'" if reference else "reversed_images=True"
            raise ValueError(
                f"image_positions='image' with {field}, which computes what DeepSpeed-VisualChat's code computed; choose "
                "image_positions='token'."
            )

    def _check_tower_fields(self) -> None:
        """Whether this is a vision tower's configuration at all."""
        vision = self.vision_config
        if hasattr(vision, "vision_config"):
            raise ValueError(
                f"vision_config.model_type={vision.model_type!r} is not a vision tower; pass its vision_config."
            )
        numbers = ["image_size"] if vision.model_type not in NATIVE_TOWERS else []
        numbers += ["patch_size", "hidden_size", "num_hidden_layers"]
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
        if self.image_size is not None and self.image_size < vision.patch_size:
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

    def _check_image_layout(self) -> None:
        _one_of("image_layout", self.image_layout, IMAGE_LAYOUTS)
        vision = self.vision_config
        if (vision.model_type in NATIVE_TOWERS) != (self.image_layout == "native"):
            raise ValueError(
                f"image_layout={self.image_layout!r} does not go with vision_config.model_type={vision.model_type!r}: "
                f"'native' is for towers that take images of any size ({', '.join(NATIVE_TOWERS)}), and the only one that "
                "these take."
            )
        if self.image_layout == "native" and self.projector_type == "vit":
            raise ValueError(
                "projector_type='vit' does not know the shapes of native images; choose 'mlp', 'linear' or 'perceiver'."
            )
        if self.image_layout != "crop" and self.reversed_images:
            raise ValueError(
                f"reversed_images=True is for models of DeepSpeed-VisualChat, whose image_layout is 'crop', not "
                f"{self.image_layout!r}."
            )
        if self.downsample > 1 and self.projector_type != "mlp":
            raise ValueError(
                f"downsample={self.downsample} is of projector_type='mlp', not {self.projector_type!r}; choose 'mlp', or "
                "downsample=1."
            )
        if math.isqrt(self.num_queries) ** 2 != self.num_queries:
            raise ValueError(f"num_queries={self.num_queries} is not a square number, so it makes no square grid.")

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

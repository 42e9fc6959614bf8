"""What LLaVA can express of a DSVL model."""

import inspect

from ..configuration_dsvl import DSVLConfig, DSVLQwenVisionConfig

# The fields of a configuration that an export carries over, or refuses by name.
FIELDS = {
    "vision_config",
    "text_config",
    "projector_type",
    "multimodal_attention",
    "image_token_id",
    "vision_feature_layer",
    "vision_feature_select_strategy",
    "image_size",
    "num_prefix_tokens",
    "image_layout",
    "max_tiles",  # of the layout "tiles" alone, which is refused
    "max_image_tokens",  # of "native"
    "downsample",
    "num_queries",  # of the perceiver, which is refused
    "reversed_images",
    "image_positions",
    "numbered_images",  # under "mmca" alone, which is refused
}


# What some decoders' own heads do to their logits -> the value with which they do nothing: Granite, Cohere, Gemma.
LOGITS = {"logits_scaling": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
CANNOT = "The model cannot be exported to LLaVA."


def check_exportable(config: DSVLConfig) -> None:
    """Check that LLaVA can compute what a model of this configuration computes.

    Raises:
        ValueError: if it cannot, with every reason and its alternative.
    """
    if reasons := _obstacles(config):
        raise ValueError(f"{CANNOT} {reasons[0]}" if len(reasons) == 1 else "\n".join([CANNOT, *reasons]))


def _obstacles(config: DSVLConfig) -> list[str]:
    found = []
    attention, projector = config.multimodal_attention, config.projector_type
    strategy, prefix = config.vision_feature_select_strategy, config.num_prefix_tokens
    tower, layers = config.vision_config.model_type, config.vision_feature_layers
    if attention != "causal":
        found.append(
            f"multimodal_attention={attention!r}: LLaVA's decoder attends causally to text and images alike, so these "
            "weights would compute something else; compose and train with --multimodal-attention causal, or serve this "
            "model with dsvl serve."
        )
    if tower == DSVLQwenVisionConfig.model_type:
        found.append("vision_config is Qwen-VL's tower, which transformers does not have; compose with CLIP or SigLIP.")
    if projector != "mlp":
        found.append(
            f"projector_type={projector!r}: LLaVA's projector is two linear layers with GELU; compose with --projector-type "
            "mlp and train it."
        )
    if strategy == "default" and prefix > 1:
        found.append(
            f"vision_feature_select_strategy='default' drops the {prefix} tokens before the patches of this {tower!r} "
            "tower, but LLaVA drops one; compose with --vision-feature-select-strategy full, which keeps them."
        )
    if -1 in layers and tower != "clip_vision_model":
        found.append(
            f"vision_feature_layer={config.vision_feature_layer}: -1 of this {tower!r} tower is after its last norm, which "
            f"LLaVA leaves out; compose with --vision-feature-layer -2, as LLaVA-1.5, or "
            f"{config.vision_config.num_hidden_layers}, the last layer before the norm."
        )
    if config.image_layout != "crop":
        found.append(
            f"image_layout={config.image_layout!r}: LLaVA takes an image as its tower's image processor makes it; compose "
            "and train with --image-layout crop, or serve this model with dsvl serve."
        )
    if config.downsample != 1:
        found.append(
            f"downsample={config.downsample}: LLaVA's projector makes a token of each feature; compose with --downsample 1 "
            "and train it, or serve this model with dsvl serve."
        )
    if config.reversed_images:
        found.append(
            "reversed_images=True: LLaVA places images in reading order; train a model without it, or serve this model with "
            "dsvl serve."
        )
    if config.image_positions != "token":
        found.append(
            f"image_positions={config.image_positions!r}: LLaVA gives every token a position of its own; compose and train "
            "with --image-positions token, or serve this model with dsvl serve."
        )
    found += [
        f"text_config.{field}={getattr(config.text_config, field)}: LLaVA's head leaves out what this {field} does to the "
        "logits; choose a language model without it, or serve this model with dsvl serve."
        for field, neutral in LOGITS.items()
        if getattr(config.text_config, field, None) not in (None, neutral)
    ]
    if getattr(config, "quantization_config", None) is not None:
        found.append("Its weights are quantized; export the checkpoint that they were quantized from.")
    defaults = inspect.signature(type(config).__init__).parameters
    return found + [
        f"{field}={getattr(config, field, None)!r}: the export does not know this setting; serve this model with dsvl serve."
        for field in unknown_fields(type(config))
        if getattr(config, field, None) != defaults[field].default
    ]


def unknown_fields(config_class: type[DSVLConfig]) -> list[str]:
    """The fields of a configuration class that an export neither carries over nor refuses by name."""
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return [p.name for p in parameters if p.name not in FIELDS | {"self"} and p.kind is not p.VAR_KEYWORD]

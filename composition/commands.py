"""`dsvl compose`."""

import argparse

from ..configuration_dsvl import (
    FEATURE_SELECT_STRATEGIES,
    IMAGE_LAYOUTS,
    IMAGE_POSITIONS,
    MULTIMODAL_ATTENTIONS,
    PROJECTOR_TYPES,
)
from ..utils.local_paths import check_exists
from ..utils.model_arguments import json_object


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl compose` to the command's parser."""
    parser = commands.add_parser("compose", help="compose a vision tower and a language model into a checkpoint")
    parser.add_argument(
        "--vision", type=check_exists, required=True, help="name or directory of a vision tower, or a model that has one"
    )
    parser.add_argument("--language", type=check_exists, required=True, help="name or directory of a causal language model")
    parser.add_argument("--out", required=True, help="new directory for the checkpoint")
    parser.add_argument(
        "--projector-type", choices=PROJECTOR_TYPES, default="linear", help="type of the projector (default linear)"
    )
    parser.add_argument(
        "--multimodal-attention",
        choices=MULTIMODAL_ATTENTIONS,
        default="mmca",
        help="attention between text and images (default mmca)",
    )
    parser.add_argument(
        "--image-positions",
        choices=IMAGE_POSITIONS,
        help="rotary positions: one for each image token, or one for all tokens of an image, so that hundreds of images fit "
        "(default: image under mmca, unless the template is visualchat; else token)",
    )
    parser.add_argument(
        "--numbered-images",
        type=int,
        metavar="N",
        help="under mmca, how many images of a conversation know their number, so that questions can name them; 0 is the "
        "published form (default: 1024, unless the template is visualchat)",
    )
    parser.add_argument(
        "--vision-feature-layer",
        type=int,
        nargs="+",
        default=[-1],
        metavar="N",
        help="layer of the tower whose features are projected, or several, which are joined (default -1)",
    )
    parser.add_argument(
        "--vision-feature-select-strategy",
        choices=FEATURE_SELECT_STRATEGIES,
        default="full",
        help="full keeps CLS and register tokens, default drops them (default full)",
    )
    parser.add_argument(
        "--image-layout",
        choices=IMAGE_LAYOUTS,
        help="crop as the tower's image processor does, pad to a square, tiles for small print, native for towers that take "
        "any size (default: tiles under mmca, unless the template is visualchat; native with a SigLIP 2 NaFlex tower; else "
        "crop)",
    )
    parser.add_argument("--max-tiles", type=int, default=12, metavar="N", help="parts of an image, with tiles (default 12)")
    parser.add_argument("--max-image-tokens", type=int, default=256, metavar="N", help="with native (default 256)")
    parser.add_argument(
        "--downsample",
        type=int,
        default=1,
        metavar="N",
        help="with the projector mlp, N x N features become one token (default 1)",
    )
    parser.add_argument(
        "--num-queries",
        type=int,
        default=256,
        metavar="N",
        help="tokens of an image or tile with the projector perceiver (default 256)",
    )
    parser.add_argument(
        "--chat-template",
        metavar="language|visualchat|FILE",
        help="the language model's own chat template, DeepSpeed-VisualChat's, or a Jinja file (default: language if the "
        "language model has one, else visualchat)",
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        metavar="JSON",
        help="defaults of the template's variables, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--number-after",
        action=argparse.BooleanOptionalAction,
        help="in prompts, repeat the number of an image after it (default: unless attention is causal or the template "
        "visualchat)",
    )
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ... (default: the language model's)")
    parser.add_argument("--max-shard-size", default="5GB", help="maximum size of a safetensors file (default 5GB)")
    parser.set_defaults(run=_compose)


def _compose(arguments: argparse.Namespace) -> None:
    from ..hub_card.card import image_tokens
    from ..utils.atomic_files import check_new_directory
    from .chat_template import CHOICES, chat_template_name
    from .checkpoint import save_checkpoint
    from .compose import compose

    check_new_directory(arguments.out)
    layers = arguments.vision_feature_layer
    model, processor = compose(
        arguments.vision,
        arguments.language,
        projector_type=arguments.projector_type,
        multimodal_attention=arguments.multimodal_attention,
        image_positions=arguments.image_positions,
        numbered_images=arguments.numbered_images,
        vision_feature_layer=layers[0] if len(layers) == 1 else layers,
        vision_feature_select_strategy=arguments.vision_feature_select_strategy,
        image_layout=arguments.image_layout,
        max_tiles=arguments.max_tiles,
        max_image_tokens=arguments.max_image_tokens,
        downsample=arguments.downsample,
        num_queries=arguments.num_queries,
        chat_template=arguments.chat_template,
        chat_template_kwargs=arguments.chat_template_kwargs,
        number_after=arguments.number_after,
        dtype=arguments.dtype,
    )
    out = save_checkpoint(
        model,
        processor,
        arguments.out,
        base_models=[arguments.vision, arguments.language],
        untrained=True,
        max_shard_size=arguments.max_shard_size,
    )
    size = sum(parameter.numel() for parameter in model.parameters())
    name = chat_template_name(processor.chat_template)
    print(f"{out}: {size / 1e6:,.2f} million parameters, {image_tokens(model.config)}")
    print(f"Chat template: {CHOICES.get(name, name)}")

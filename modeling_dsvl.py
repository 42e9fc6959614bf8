"""The DSVL model: a vision tower, a projector and a causal language model that attends by MMCA."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, CompileConfig, PreTrainedModel

from .acceleration_dsvl import acceleration, require_acceleration
from .attention_dsvl import route_attention
from .cache_dsvl import cached_types, known_positions, remember_types, whole_positions
from .configuration_dsvl import DSVLConfig
from .generation_dsvl import DSVLGenerationMixin
from .inputs_dsvl import (
    PEFT_HINT,
    AsyncHostCopy,
    by_tile,
    check_document_ids,
    check_image_counts,
    check_image_numbers,
    check_labels,
    check_num_tiles,
    check_position_order,
    check_sequence,
    check_takes_positions,
    check_tiles_are_told,
    check_token_types,
    check_type_values,
    gather_unique_rows,
    reversed_image_order,
)
from .masks_dsvl import build_masks, decoder_masks, masks_from_codes, sequence_may_hold_images
from .positions_dsvl import documents_of_positions, image_positions, tile_numbers, token_positions
from .projectors_dsvl import DSVLImageNumbers, DSVLResampler, NumberedImages, make_projector
from .transformers_dsvl import (
    CACHE,
    SDPA_SOFTCAPS,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    EitherCacheName,
    can_return_tuple,
    gathers_weights,
    keywords_of,
    takes_cache,
)
from .vision_dsvl import blank_image, make_vision_tower, run_tower, unused_tower_parameters

# Elements of the logits that the loss computes at once: 128 MiB in float32.
LOGITS_AT_ONCE = 2**25

# ----------------------------------------------------------------------------------------------------------------------
# Outputs


class _ImageOutputs(EitherCacheName):
    """What both outputs do with `image_outputs`."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """Deprecated: the projected images of `image_outputs`, (images, image_seq_length, hidden)."""
        warnings.warn(
            "image_hidden_states is deprecated; use image_outputs.pooler_output, a list with one tensor for each image.",
            FutureWarning,
            stacklevel=2,
        )
        if self.image_outputs is None or not self.image_outputs.pooler_output:
            return None
        images = list(self.image_outputs.pooler_output)
        return torch.stack(images) if len({len(image) for image in images}) == 1 else torch.cat(images)

    def to_tuple(self) -> tuple[Any, ...]:
        """All that is not None; `image_outputs` as a tuple of its own."""
        parts = super().to_tuple()  # type: ignore[misc]
        return tuple(part.to_tuple() if isinstance(part, BaseModelOutputWithPooling) else part for part in parts)


@dataclass
class DSVLModelOutputWithPast(_ImageOutputs, BaseModelOutputWithPast):
    """Output of `DSVLModel`.

    Attributes:
        last_hidden_state: (batch, tokens, hidden).
        cache: the KV cache, if one was used; `past_key_values` is its name before transformers 5.24. Both names work.
        hidden_states: on request, (layers + 1) tensors of (batch, tokens, hidden).
        attentions: on request ("eager"), a (batch, heads, queries, keys) tensor for each layer; under MMCA the sum of both
            branches, so the row of a text query that sees text and images sums to 2.
        image_outputs: the output of `get_image_features` for the images of this call, or what was passed instead.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class DSVLCausalLMOutputWithPast(_ImageOutputs, CausalLMOutputWithPast):
    """Output of `DSVLForConditionalGeneration`: as `DSVLModelOutputWithPast`, with `loss` (a scalar) and `logits` (batch,
    tokens, vocabulary), which is None where `skip_logits` applied."""

    image_outputs: BaseModelOutputWithPooling | None = None


# ----------------------------------------------------------------------------------------------------------------------
# Models


class DSVLPreTrainedModel(PreTrainedModel):
    config: DSVLConfig
    config_class = DSVLConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flex_attn = True
    # A flash kernel takes no mask that could separate the modalities.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (DSVLResampler, DSVLImageNumbers)):
            module.init_weights()

    def _default_compile_config(self) -> CompileConfig:
        """How `generate` compiles a step by default. On a GPU the compiler writes and tunes products of a single row, which
        then read the weights faster than the library's."""
        if self.device.type != "cuda":
            return super()._default_compile_config()
        return CompileConfig(mode=None, options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish; the arguments are those of `PushToHubMixin.push_to_hub`.

        If the package dsvl is installed, the code and the model card are published too.
        """
        try:
            push_part = import_module("dsvl.publishing.push").push_part
        except ModuleNotFoundError:
            return super().push_to_hub(repo_id, **kwargs)
        return push_part(self, repo_id, **kwargs)


class DSVLModel(DSVLPreTrainedModel):
    """Vision tower, projector and language model without its head.

    `language_model` is an unmodified decoder of transformers; only the configuration that its attention modules read is
    replaced by a view that leads them to the MMCA functions (see attention_dsvl.py).
    """

    _compiled_layers: Any = None
    _image_reuse: Any = None
    takes_masks_of_caches = True  # so the package knows that `build_masks` asks a cache for its mask

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = make_vision_tower(config.vision_config)
        self.multi_modal_projector = make_projector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._known_keywords = keywords_of(self.language_model) | {"return_dict"}
        if config.multimodal_attention != "causal":
            route_attention(self.language_model, config)
        if config.image_positions == "image":
            check_takes_positions(self.language_model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "DSVLModel":
        """As for any module; but a tower without trainable parameters stays in evaluation mode, as some towers are random in
        training mode (DINOv3 augments its positions, others drop layers)."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        if self._compiled_layers is not None:
            self._compiled_layers.switch(mode)
        if self._image_reuse is not None:
            self._image_reuse.forget_fingerprint()  # training engines change weights without a trace
        acceleration()  # before anything is compiled
        return self

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        step_codes: torch.Tensor | dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> DSVLModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: (batch, tokens); every tile of an image has `image_seq_length` copies of `image_token_id`.
            pixel_values: (tiles of the whole batch, 3, height, width), in reading order; with `image_layout="native"`
                (images, patches, 3 * patch_size ** 2).
            attention_mask: (batch, tokens, cached ones included), 0 where padded. Four-dimensional masks are passed on to
                the decoder if the sequence has no image.
            position_ids: (batch or 1, tokens). By default they count tokens, or as `image_positions` of the configuration
                says; they go on from a cache.
            cache: a KV cache; `past_key_values` is the same argument.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`. Images that come with them replace embeddings
                that equal the image token's, or those that `mm_token_type_ids` marks.
            mm_token_type_ids: (batch, tokens), 1 for image tokens and 0 for all others; of the new tokens or of the whole
                sequence. Derived from `input_ids` by default; required with `inputs_embeds` that contain their images
                already, unless `multimodal_attention` is "causal".
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`, in the order of the image
                tokens. Those with `image_numbers` keep theirs.
            image_features: `get_image_features(...).last_hidden_state`, computed earlier by a frozen tower, (tiles, tower
                tokens, tower width), instead of `pixel_values`. Processes that train together all pass it, one without
                images an empty one.
            pixel_attention_mask, spatial_shapes: of native images, see `get_image_features`; the latter also with
                `image_features`.
            num_tiles: (images,), how many of the tiles each image has. It is compared with the number of tiles. With
                `image_layout="tiles"` and `numbered_images` it is needed, as images are counted by it.
            image_numbers: (images,), the number of each image in its conversation, from 1, for models with
                `numbered_images`. They are counted by default, in each row or packed document; behind images in a cache,
                where an image can have any number of tokens (`image_layout` "tiles" and "native"), they are needed.
            document_ids: (batch, tokens), of rows in which documents are packed: one integer for the tokens of a document,
                which differs from its neighbours'. Documents do not see each other, and positions start anew in each.
                Without them, attention mask and cache, under `image_positions="token"`, a document begins wherever
                `position_ids` do not grow by one, as in transformers.
            step_codes: of a decode step with a static cache, see `masks_dsvl.step_codes`.
            kwargs: the decoder's (`use_cache`, `output_hidden_states`, `output_attentions`, ...).

        Raises:
            TypeError: for an unknown keyword.
            ValueError: if images and image tokens do not match, inputs contradict each other, or the modality of a token is
                unknown.
        """
        self._check_keywords(kwargs, has_documents=position_ids is not None or document_ids is not None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if sum(given is not None for given in (pixel_values, mm_encoder_outputs, image_features)) > 1:
            raise ValueError("Pass one of pixel_values, mm_encoder_outputs and image_features: they are the same images.")

        # Embed
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        check_sequence(inputs_embeds, attention_mask, cache)
        types = check_token_types(mm_token_type_ids, inputs_embeds, cache)
        has_cache = cache is not None or bool(kwargs.get("use_cache"))
        document_ids = check_document_ids(document_ids, inputs_embeds, attention_mask, has_cache)
        documents = document_ids if document_ids is not None else self._documents_told(position_ids, attention_mask, cache)
        if documents is not None:  # in a cache that the decoder makes, each would see the others
            kwargs.setdefault("use_cache", False)

        # Encode and project
        images = (mm_encoder_outputs or {}).get("image")
        given = image_features if pixel_values is None else pixel_values
        has_given = given is not None and len(given) > 0
        is_image = self.image_tokens(input_ids, inputs_embeds, types, has_images=images is not None or has_given)
        if given is not None and has_given:
            if self.config.reversed_images and is_image is not None:
                given = self.reverse_images(given, is_image, documents, cache)
            if pixel_values is None:
                images = self.project_features(given, spatial_shapes)
            else:
                images = self.encode(given, pixel_attention_mask, spatial_shapes)

        # Scatter
        embedded = None
        lengths = [len(image) for image in images.pooler_output] if images is not None and images.pooler_output else []
        check_values = self._check_values(input_ids, is_image, types, lengths, num_tiles, whole_images=given is not None)
        if images is not None and lengths:
            wants_numbers = self.config.numbered_images > 0 or image_numbers is not None  # which other models refuse
            if wants_numbers and is_image is not None and not isinstance(images, NumberedImages):
                if image_numbers is None:
                    numbers = self.tile_numbers(is_image, lengths, num_tiles, documents, types, cache)
                else:
                    numbers = by_tile(image_numbers, num_tiles, self.config.numbered_images)
                images = self.number_images(images, numbers)
            embedded = torch.cat(list(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        if is_image is not None and embedded is not None:
            inputs_embeds = _scatter(inputs_embeds, is_image, embedded)
        if images is None and self._others_may_have_images(cache):
            blank = self.encode_blank_image(image_features)
            inputs_embeds = inputs_embeds + blank.to(inputs_embeds.device, inputs_embeds.dtype)

        # Place
        new_tokens, shares_positions = inputs_embeds.shape[1], self.config.image_positions == "image"
        attention = self.config.multimodal_attention
        is_ready = isinstance(attention_mask, dict) or getattr(attention_mask, "ndim", 2) == 4 or step_codes is not None
        padding = attention_mask if isinstance(attention_mask, torch.Tensor) and not is_ready else None
        token_types = may_hold_images = check_positions = None
        makes_positions = shares_positions and position_ids is None
        # Under "causal" only positions need the modality, or a cache, from which they go on.
        keeps_types = shares_positions and not is_ready and self._knows_types(is_image, types, cache)
        if (attention != "causal" and not is_ready) or makes_positions or keeps_types:
            token_types = self._whole_token_types(new_tokens, is_image, types, cache)
        if position_ids is not None:
            if shares_positions and document_ids is None and attention_mask is None and cache is None:
                check_positions = self._check_position_order(position_ids)
        elif shares_positions and token_types is not None:
            made = self.make_position_ids(token_types, new_tokens, images, padding, document_ids, cache)
            position_ids = made.to(inputs_embeds.device)
        elif document_ids is not None:
            position_ids = token_positions(document_ids)

        # Attend
        if attention != "causal" and step_codes is not None:
            attention_mask = step_codes
            kwargs["multimodal_masks"] = masks_from_codes(step_codes, attention, inputs_embeds.dtype)
        elif attention != "causal" and is_ready:
            self._check_ready_mask(attention_mask, is_image if types is None else types)
        elif token_types is not None:
            image_queries = _known_image_queries(input_ids, embedded)
            may_hold_images = self._may_hold_images(token_types, cache, image_queries)
            if attention == "mmca_reference" or (attention == "mmca" and may_hold_images):
                attention_mask, kwargs["multimodal_masks"] = build_masks(
                    self.language_model.config,
                    attention,
                    token_types.to(inputs_embeds.device),
                    inputs_embeds,
                    attention_mask,
                    cache,
                    documents,
                    image_queries,
                    training=self.training,
                    compiled=self.compiles_layers,
                )
        if attention_mask is None and cache is None and (shares_positions or document_ids is not None):
            attention_mask = decoder_masks(self.language_model.config, inputs_embeds, document_ids)

        # Decode
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **(kwargs | {"return_dict": True}),
        )
        for check in (check_values, check_positions):
            if check is not None:
                check()
        made_cache = getattr(outputs, CACHE)  # perhaps by the decoder
        if made_cache is not None and token_types is not None and not torch.compiler.is_compiling():
            positions = whole_positions(position_ids, token_types, padding, cache) if shares_positions else None
            remember_types(made_cache, token_types, may_hold_images, positions)
        return DSVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _check_keywords(self, kwargs: dict[str, Any], has_documents: bool) -> None:
        """Refuse keyword arguments of `forward` that neither the decoder nor transformers knows."""
        for name in kwargs:
            if name not in self._known_keywords:
                raise TypeError(
                    f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}: neither this model, nor "
                    f"its decoder {type(self.language_model).__name__}, nor transformers' common arguments know it; check "
                    "its spelling, or omit it."
                )
        if kwargs.get("cu_seq_lens_q") is not None and not has_documents:
            raise ValueError(
                "cu_seq_lens_q without position_ids: packed documents are recognized by document_ids, or by positions that "
                "restart; pass document_ids."
            )
        if kwargs.get("is_causal") is False and self.config.multimodal_attention != "causal":
            raise ValueError(
                f"is_causal=False does not go with multimodal_attention={self.config.multimodal_attention!r}, which is "
                "causal; omit it."
            )
        text_config = self.language_model.config
        softcaps = getattr(text_config, "attn_logit_softcapping", None) is not None
        if softcaps and not SDPA_SOFTCAPS and text_config._attn_implementation == "sdpa":
            raise ValueError(
                "attn_implementation='sdpa' ignores attn_logit_softcapping in transformers below 5.21; pass "
                "attn_implementation='eager' or 'flex_attention', or install transformers 5.21 or newer."
            )

    # -- images --------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode and project images. A tower without trainable parameters runs without a graph.

        Args:
            pixel_values: (tiles, 3, height, width), any float dtype; with `image_layout="native"`
                (images, patches, 3 * patch_size ** 2).
            pixel_attention_mask: of native images, (images, patches), 0 where padded; by default from `spatial_shapes`.
            spatial_shapes: of native images, (images, 2), rows and columns of patches.
            num_tiles: (images,), how many of the tiles each image has; needed beside `image_numbers` alone.
            image_numbers: (images,), the numbers that their embeddings shall hold, of models with `numbered_images`. By
                default they hold none, and `forward` adds those that it counts.
            kwargs: `output_hidden_states` and `output_attentions`, for the tower's; `return_dict`.

        Returns:
            `pooler_output`: a list with one (tokens, decoder width) tensor for each tile, ready to be passed back as
            `mm_encoder_outputs={"image": ...}`; `last_hidden_state`: the tower's features before projection; on request the
            tower's `hidden_states` and `attentions`. With `return_dict=False` a tuple of these.

        Raises:
            TypeError: for another keyword.
            ValueError: for inputs of another image layout.
        """
        images = self.encode(pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        if image_numbers is None:
            return images
        return self.number_images(images, by_tile(image_numbers, num_tiles, self.config.numbered_images))

    def encode(
        self,
        pixel_values: torch.Tensor,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """As `get_image_features` without numbers, for any `config.return_dict`."""
        tower = run_tower(self.vision_tower, self.config, pixel_values, pixel_attention_mask, spatial_shapes, **kwargs)
        tower.pooler_output = self.project_features(tower.last_hidden_state, spatial_shapes).pooler_output
        return tower

    def project_features(
        self, image_features: torch.Tensor, spatial_shapes: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """The second half of `get_image_features`, from the tower's features (tiles, tower tokens, tower width)."""
        grids = None if spatial_shapes is None else [tuple(shape) for shape in spatial_shapes.tolist()]
        projected = list(self.multi_modal_projector(image_features, grids))
        if grids is not None:  # without the padding to the longest
            lengths = self.config.tile_lengths(len(projected), spatial_shapes)
            projected = [tokens[:length] for tokens, length in zip(projected, lengths, strict=True)]
        return BaseModelOutputWithPooling(last_hidden_state=image_features, pooler_output=projected)

    def number_images(self, images: BaseModelOutputWithPooling, numbers: torch.Tensor) -> NumberedImages:
        """Images whose embeddings hold their numbers as well, of a model with `numbered_images`.

        Args:
            images: of `encode` or `project_features`, without numbers.
            numbers: of each tile's image, (tiles,), from 1; 0 for none.

        Raises:
            ValueError: if these are not as many, or the model numbers no images.
        """
        parts = list(images.pooler_output)
        whole = torch.cat(parts)
        is_native = self.config.image_layout == "native"  # else all tiles are alike, and chunks of them may come as one
        tokens = self.config.image_seq_length
        lengths = list(map(len, parts)) if is_native else [tokens] * (len(whole) // tokens)
        check_image_numbers(len(numbers), len(lengths), self.config.numbered_images)
        add: Any = self.multi_modal_projector.image_numbers
        added = add(numbers.to(whole.device)).to(whole)
        if is_native:
            added = added[torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(whole.device)]
        else:
            added = added.repeat_interleave(tokens, dim=0)
        numbered = list((whole + added).split(list(map(len, parts))))
        given = {name: getattr(images, name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return NumberedImages(pooler_output=numbered, **given)

    def tile_numbers(
        self,
        is_image: torch.Tensor,
        lengths: list[int],
        num_tiles: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        types: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The number of each tile's image in its row, or packed document: (tiles,), from 1.

        Args:
            is_image: (batch, new tokens), True for image tokens.
            lengths: how many tokens each tile of the new tokens has; several tiles may come as one.
            num_tiles: (images,), how many of the tiles each image has.
            document_ids: (batch or 1, new tokens), of packed rows.
            types: `mm_token_type_ids` of the whole sequence; by default the cache knows those of its tokens.
            cache: the KV cache before the new tokens.

        Raises:
            ValueError: if images cannot be counted.
        """
        past, layout = int(cache.get_seq_length()) if cache is not None else 0, self.config.image_layout
        check_tiles_are_told(layout, num_tiles)
        varies, is_native = layout in ("tiles", "native"), layout == "native"
        if past > 0:
            whole = self._whole_token_types(is_image.shape[1], is_image, types, cache) == 1
            if varies and bool(whole[:, :past].any()):
                raise ValueError(
                    "numbered_images: how many images the cache holds is not known; pass image_numbers, or the whole "
                    "conversation with all its images."
                )
            is_image, past = (is_image, 0) if varies else (whole, past)
        tokens = self.config.image_seq_length
        tiles = len(lengths) if is_native else sum(lengths) // tokens
        return tile_numbers(is_image, tiles, tokens, lengths if is_native else None, num_tiles, document_ids, past)

    def unused_tower_parameters(self) -> list[str]:
        """Names of the tower's parameters that do not influence its features."""
        return unused_tower_parameters(self.vision_tower, self.config)

    def encode_blank_image(self, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Zero, computed by tower and projector: what a process without images does while others encode theirs.

        Args:
            image_features: an empty tensor of them, if those of the others were computed earlier: then by the projector
                alone.
        """
        tower = self.vision_tower
        inputs = {name: value.to(tower.device) for name, value in blank_image(self.config).items()}
        if image_features is None:
            inputs["pixel_values"] = inputs["pixel_values"].to(tower.dtype)
            images = self.encode(**inputs)
        else:
            features = image_features.new_zeros(1, *image_features.shape[1:])
            images = self.project_features(features, inputs.get("spatial_shapes"))
        if self.multi_modal_projector.image_numbers is not None:
            images = self.number_images(images, torch.zeros(1, dtype=torch.long, device=images.pooler_output[0].device))
        return images.pooler_output[0].sum() * 0

    def _others_may_have_images(self, cache: Cache | None) -> bool:
        """Whether a text-only batch must run the tower and the projector as well.

        In training, other processes may have images where this one has none, and wait for its gradients of the projector;
        under ZeRO-3 and FSDP they wait for it at every layer of tower and projector, in evaluation too. In a single process,
        a text-only batch then has gradients of zero rather than none.
        """
        parts = (self.multi_modal_projector, self.vision_tower)
        waited_for = (
            self.training and torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.parameters())
        ) or gathers_weights(self)
        # A decode step has no images. The length of a static cache is a tensor, on which a compiled step may not branch, so
        # it is read last.
        return waited_for and (cache is None or cache.get_seq_length() == 0)

    def reverse_images(
        self,
        images: torch.Tensor,
        image_tokens: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Images in reading order, reordered as `reversed_images` places them: reversed in each sample or packed document.

        Args:
            images: those of the whole batch, (images, ...): their pixels or their features.
            image_tokens: (batch, new tokens), True for image tokens.
            document_ids: (batch or 1, new tokens), of packed rows.
            cache: the KV cache before the new tokens.

        Raises:
            ValueError: if the cache holds images already: they are where the new images belong.
        """
        cached = int(cache.get_seq_length()) if cache is not None else 0
        known = cached_types(cache)
        if cached > 0 and (known is None or bool((known[:, :cached] == 1).any())):
            raise ValueError(
                "config.reversed_images puts the last image first, but the cache may hold images already; pass the whole "
                "conversation without a cache."
            )
        order = reversed_image_order(image_tokens, len(images), self.config.image_seq_length, document_ids)
        return images[order.to(images.device)]

    def image_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        types: torch.Tensor | None,
        has_images: bool,
    ) -> torch.Tensor | None:
        """Which of the new tokens are image tokens, (batch, tokens); None if that is unknown."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if types is not None:
            return types[:, -inputs_embeds.shape[1] :] == 1
        if not has_images:
            return None
        image_token = torch.full((1,), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds)).all(-1)

    def _check_values(
        self,
        input_ids: torch.Tensor | None,
        is_image: torch.Tensor | None,
        types: torch.Tensor | None,
        lengths: list[int],
        num_tiles: torch.Tensor | None,
        whole_images: bool,
    ) -> Callable[[], None] | None:
        """Compare images, image tokens and types by their values.

        Args:
            is_image: (batch, new tokens), True for image tokens.
            types: the caller's `mm_token_type_ids`, of the new tokens or of all.
            lengths: the number of embeddings of each tile.
            num_tiles: the caller's.

        Returns:
            None if the values were on the host and are checked; on an accelerator, the check to run after the decoder's
            kernels are queued.
        """
        if is_image is None or (input_ids is None and not lengths):
            return None  # the embeddings contain their images already
        tokens, is_reference = is_image.shape[1], self.config.multimodal_attention == "mmca_reference"
        # A decode step has nothing to check that is worth waiting for a device.
        worth_it = lengths or tokens > 1 or (types is not None and not is_image.is_cuda)
        # Under "mmca_reference" the image token can be generated, as in the released code, and is text then.
        if torch.compiler.is_compiling() or not worth_it or (is_reference and tokens == 1):
            return None
        figures = [is_image.sum(-1)]
        if types is not None and input_ids is not None and not is_reference:
            new = types[:, -tokens:].to(is_image.device)
            figures += [new.sum(-1), ((new == 1) != is_image).sum(-1), types.amin(-1), types.amax(-1)]
        copy = AsyncHostCopy(torch.stack([figure.to(is_image.device) for figure in figures]))
        tiles = None if num_tiles is None or not whole_images else AsyncHostCopy(num_tiles.sum())

        def check() -> None:
            image_counts, *of_types = copy.tolist()
            if of_types:
                check_type_values(self.config.image_token_id, image_counts, *of_types)
            if tiles is not None:
                check_num_tiles(tiles.tolist(), len(lengths))
            check_image_counts(image_counts, self.config.image_seq_length, lengths, whole_images)

        if copy.is_complete or sum(lengths) > is_image.numel():
            check()
            return None
        return check

    # -- positions -----------------------------------------------------------------------------------------------------

    def make_position_ids(
        self,
        token_types: torch.Tensor,
        new_tokens: int,
        images: BaseModelOutputWithPooling | None = None,
        attention_mask: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """The positions of new tokens under `image_positions="image"`: (batch, new tokens).

        Args:
            token_types: of the whole sequence, (batch, tokens), 1 = image.
            new_tokens: how many of these are not in the cache.
            images: the output of `get_image_features` for the images of the new tokens, if there are any.
            attention_mask: (batch, tokens), 0 where padded.
            document_ids: (batch, tokens), of packed rows.
            cache: the KV cache before the new tokens.

        Raises:
            ValueError: if the cache does not know where its tokens are.
        """
        past = token_types.shape[1] - new_tokens
        cached = known_positions(cache, len(token_types), past)
        if cached is None:
            raise ValueError(
                f"The cache holds {past} tokens of unknown positions, from which image_positions='image' cannot go on; pass "
                f"position_ids, or fill the cache by this model. {PEFT_HINT}"
            )
        lengths = None
        # In other layouts all are alike, and chunks of them may come as one.
        if images is not None and images.pooler_output and self.config.image_layout == "native":
            lengths = [len(image) for image in images.pooler_output]
        tokens_per_image = self.config.image_seq_length
        return image_positions(token_types, tokens_per_image, lengths, attention_mask, document_ids, cached)

    def _documents_told(
        self, position_ids: torch.Tensor | None, attention_mask: Any, cache: Cache | None
    ) -> torch.Tensor | None:
        """The packed documents that positions tell, as in transformers: without mask and cache, where they count tokens."""
        if position_ids is None or attention_mask is not None or cache is not None:
            return None
        return documents_of_positions(position_ids) if self.config.image_positions == "token" else None

    def _check_position_order(self, position_ids: torch.Tensor) -> Callable[[], None] | None:
        """As `_check_values`, for positions that go backwards."""
        if torch.compiler.is_compiling():
            return None
        copy = AsyncHostCopy((position_ids.diff(dim=-1) < 0).sum(-1))
        if not copy.is_complete:
            return lambda: check_position_order(copy.tolist())
        check_position_order(copy.tolist())
        return None

    # -- modality ------------------------------------------------------------------------------------------------------

    def _whole_token_types(
        self, new_tokens: int, is_image: torch.Tensor | None, types: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """The modality of the whole sequence, cached tokens included: (batch, tokens), 1 = image.

        A cache remembers the modality of its tokens, so a loop that feeds new tokens alone need not pass it.

        Args:
            is_image: (batch, new tokens), which of them are image tokens; None if that is unknown.
            types: the caller's `mm_token_type_ids`, of the new tokens or of all.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0
        if types is None:
            if is_image is None:
                raise ValueError(
                    "inputs_embeds do not tell text from images; pass mm_token_type_ids (batch, tokens), 1 for image tokens "
                    "and 0 for text."
                )
            types = is_image.long()
        elif is_image is not None and new_tokens == 1 and self.config.multimodal_attention != "mmca_reference":
            # The ids decide, as nothing compares the two in a decode step. (A generated image token is text in the
            # reference.)
            types = torch.cat([types[:, :-1], is_image.to(types)], dim=1)
        known = None if past == 0 or torch.compiler.is_compiling() else cached_types(cache)
        is_known = known is not None and known.shape[0] == types.shape[0] and known.shape[1] >= past
        if past == 0 or (types.shape[1] != new_tokens and not is_known):
            return types
        if known is None or not is_known:
            raise ValueError(
                f"The cache holds {past} tokens of unknown modality; pass mm_token_type_ids of the whole sequence, "
                f"({types.shape[0]}, {past + new_tokens}), or fill the cache by this model. {PEFT_HINT}"
            )
        # The cache's tokens were computed with the modality that it remembers.
        return torch.cat([known[:, :past].to(types.device), types[:, types.shape[1] - new_tokens :]], dim=1)

    def _knows_types(self, is_image: torch.Tensor | None, types: torch.Tensor | None, cache: Cache | None) -> bool:
        """Whether the modality of the whole sequence is known, where only the cache needs it."""
        if torch.compiler.is_compiling() or (is_image is None and types is None):
            return False
        return cache is None or cached_types(cache) is not None or int(cache.get_seq_length()) == 0

    def _may_hold_images(self, token_types: torch.Tensor, cache: Cache | None, image_queries: int | None) -> bool:
        """Whether any token of the sequence may be an image token. Without images attention is the decoder's own.

        The graph of compiled layers is one for MMCA, and takes text-only batches as well.
        """
        if self.compiles_layers:
            return True
        return sequence_may_hold_images(token_types, cache, None if image_queries is None else image_queries > 0)

    def _check_ready_mask(self, attention_mask: Any, types: torch.Tensor | None) -> None:
        """Refuse a four-dimensional mask for a sequence with images."""
        if torch.compiler.is_compiling() or types is None or not bool((types == 1).any()):
            return
        masks = attention_mask.values() if isinstance(attention_mask, dict) else [attention_mask]
        raise ValueError(
            f"A four-dimensional attention_mask of {[getattr(m, 'dtype', type(m)) for m in masks]} does not tell text from "
            f"images, as multimodal_attention={self.config.multimodal_attention!r} must; pass the two-dimensional mask and "
            "mm_token_type_ids."
        )

    # -- acceleration --------------------------------------------------------------------------------------------------

    @property
    def compiles_layers(self) -> bool:
        """Whether the decoder's layers run compiled in the current mode."""
        return self._compiled_layers is not None and self.training

    def compile_decoder_layers(self, **options: Any) -> None:
        """Compile the decoder's layers for training; see `dsvl.acceleration.CompiledDecoderLayers`.

        Args:
            options: of `torch.compile`.

        Raises:
            ImportError: without the package dsvl.
            ValueError: if the decoder does not keep its layers in a list `layers`.
        """
        module = require_acceleration("compile_decoder_layers")
        self._compiled_layers = module.CompiledDecoderLayers(self.language_model, options)
        self._compiled_layers.switch(self.training)

    def reduce_memory(self, **options: Any) -> None:
        """Train with many images in less memory: tiled MLPs, activations in the host's memory, no queries of image tokens.

        Args:
            options: `mlp_tile`, `offload` and `skip_image_queries` of `dsvl.acceleration.reduce_memory`.

        Raises:
            ImportError: without the package dsvl, or with a release that lacks it.
            ValueError: if the decoder or its attention do not allow it.
        """
        module = require_acceleration("reduce_memory")
        if not hasattr(module, "reduce_memory"):
            raise ImportError("The installed package dsvl is too old for reduce_memory; update it: pip install -U dsvl")
        module.reduce_memory(self, **options)

    @property
    def image_reuse(self) -> Any:
        """This model's `dsvl.acceleration.ImageReuse`."""
        if self._image_reuse is None:
            made = require_acceleration("The reuse of images (encode_images, image_cache)").ImageReuse
            if self.config.numbered_images and not getattr(made, "takes_numbers", False):
                raise ImportError(
                    "The installed package dsvl is too old for numbered_images; update it: pip install -U dsvl"
                )
            self._image_reuse = made(self)
        return self._image_reuse

    def encode_images(self, pixel_values: torch.Tensor, chunk_size: int = 16, **options: Any) -> Any:
        """Run tower, projector and decoder over images alone, for `generate(..., image_cache=...)`.

        Args:
            pixel_values: (tiles, 3, height, width), any float dtype; of native images
                (images, patches, 3 * patch_size ** 2).
            chunk_size: tiles in one forward call.
            options: `pixel_attention_mask` and `spatial_shapes` of native images, see `get_image_features`; and `num_tiles`
                (images,), how many tiles each image has, 1 by default: the cache is indexed by images. `image_numbers`
                (images,), of models with `numbered_images`: 1, 2, ... by default. `quantize=True` and
                `offload=True` give what `quantize()` and `offload()` of the cache give, without the whole cache on the
                device before.

        Returns:
            An `ImageKVCache`.

        Raises:
            ImportError: without the package dsvl.
            ValueError: without an image, for tiles that do not add up, or if this model's images cannot be reused exactly.
        """
        return self.image_reuse.encode(pixel_values, chunk_size, **options)

    def compile_text_prefill(self, **options: Any) -> None:
        """Compile the prefill of prompts over encoded images; see `dsvl.acceleration.ImageReuse.compile`."""
        self.image_reuse.compile(**options)


def _scatter(inputs_embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Replace the embeddings of image tokens (batch, tokens) by features (image tokens, hidden), in reading order."""
    tokens = inputs_embeds.shape[1]
    # By indices, as many as there are features: the backward of a boolean mask would wait for the device.
    index = (~is_image.flatten()).to(inputs_embeds.device, torch.uint8).argsort(stable=True)[: len(features)]
    # Not a view of something flat, as compiled layers would distinguish it from the input of other layers.
    return inputs_embeds.index_put((index // tokens, index % tokens), features)


def _known_image_queries(input_ids: torch.Tensor | None, features: torch.Tensor | None) -> int | None:
    """How many of the new tokens are image tokens. The features match `input_ids`; with embeddings it is unknown."""
    if input_ids is None:
        return None
    return 0 if features is None else len(features)


def scale_logits(logits: torch.Tensor, text_config: Any) -> torch.Tensor:
    """What the causal model of a decoder with this configuration does to the output of its head, (..., vocabulary)."""
    if getattr(text_config, "logits_scaling", None) is not None:  # Granite
        logits = logits / text_config.logits_scaling
    if getattr(text_config, "logit_scale", None) is not None:  # Cohere
        logits = logits * text_config.logit_scale
    if getattr(text_config, "final_logit_softcapping", None) is not None:  # Gemma 2
        logits = torch.tanh(logits / text_config.final_logit_softcapping) * text_config.final_logit_softcapping
    return logits


class DSVLForConditionalGeneration(DSVLPreTrainedModel, DSVLGenerationMixin):
    """A DSVL model with its language modelling head: training, generation, sharing.

    `model` is the `DSVLModel`, `lm_head` the head, tied to the embeddings exactly if the language model ties its own.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.model = DSVLModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        table = self.get_input_embeddings().weight  # which decoders call by different names
        name = next(name for name, parameter in self.model.named_parameters() if parameter is table)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}"}
        self.model_tags = ["dsvl", "multi-image"]  # on the cards that transformers' and TRL's trainers write
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load a checkpoint; see `PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: if the checkpoint lacks weights, which would be random: it is damaged, or of a `DSVLModel` alone.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if "lm_head.weight" in info["missing_keys"] and not model.config.tie_word_embeddings:
            raise ValueError(
                f"{name!r} holds no lm_head.weight: it is the body of a model (saved from DSVLModel). Load it by "
                "DSVLModel.from_pretrained, or save the whole DSVLForConditionalGeneration."
            )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"{name!r} lacks {len(missing)} weights, such as {missing[0]}; they would be random. Copy or download the "
                "checkpoint again."
            )
        # Under ZeRO-3 transformers keeps the key renamings of every sub-model, unused ones too, and reverts them when it
        # saves: the saved keys would not be this model's.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        return (model, info) if output_loading_info else model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling | tuple:
        """Encode and project images; see `DSVLModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def encode_images(self, pixel_values: torch.Tensor, chunk_size: int = 16, **options: Any) -> Any:
        """Run images through the whole model, once; see `DSVLModel.encode_images`."""
        return self.model.encode_images(pixel_values, chunk_size, **options)

    def encode_pictures(self, pixel_values: torch.Tensor, chunk_size: int = 16) -> Any:
        """Deprecated name of `encode_images`."""
        warnings.warn("encode_pictures is deprecated; use encode_images.", DeprecationWarning, stacklevel=2)
        return self.encode_images(pixel_values, chunk_size)

    def compile_text_prefill(self, **options: Any) -> None:
        """Compile the prefill of prompts over encoded images; see `dsvl.acceleration.ImageReuse.compile`."""
        self.model.compile_text_prefill(**options)

    def compile_decoder_layers(self, **options: Any) -> None:
        """Compile the decoder's layers for training; see `DSVLModel.compile_decoder_layers`."""
        self.model.compile_decoder_layers(**options)

    def reduce_memory(self, **options: Any) -> None:
        """Train with many images in less memory; see `DSVLModel.reduce_memory`."""
        self.model.reduce_memory(**options)

    @takes_cache
    def prefill(
        self, input_ids: torch.Tensor, image_cache: Any, cache: Cache | None = None, **kwargs: Any
    ) -> DSVLCausalLMOutputWithPast:
        """Run prompts over encoded images; see `dsvl.acceleration.ImageReuse.prefill` for the arguments.

        Returns:
            `logits` of every row's last token, (batch, 1, vocabulary), and `cache`, as after a call of the whole prompt with
            `pixel_values` and the same `position_ids` (by default those of `generate`).

        Raises:
            ImportError: without the package dsvl.
        """
        if self.config.image_positions == "image" and kwargs.get("position_ids") is None:
            types, mask = (input_ids == self.config.image_token_id).long(), kwargs.get("attention_mask")
            copies = kwargs.get("copies", 1)  # consecutive rows of the same images, which the cache holds once
            mask = None if mask is None else mask[::copies]
            images, types = image_cache.tile_ranges(), types[::copies]
            past = int(cache.get_seq_length()) if cache is not None else 0
            positions = self.model.make_position_ids(types, types.shape[1] - past, images, mask, cache=cache)
            kwargs["position_ids"] = positions.repeat_interleave(copies, dim=0)
        hidden, cache = self.model.image_reuse.prefill(input_ids, image_cache, cache, **kwargs)
        with torch.no_grad():
            return DSVLCausalLMOutputWithPast(logits=self._logits(hidden), **{CACHE: cache})

    def set_trainable(
        self,
        projector: bool = True,
        embeddings: bool = True,
        vision_tower: bool = False,
        language_model: bool = False,
        lm_head: bool = False,
    ) -> "DSVLForConditionalGeneration":
        """Choose the trained parts, and freeze the rest. The default is DeepSpeed-VisualChat's: projector and embeddings.

        Args:
            projector: the projector, and with `numbered_images` what adds the numbers (`DSVLImageNumbers`).
            embeddings: the decoder's token embeddings (and a head that is tied to them).
            vision_tower: the vision tower, except parameters that do not influence its features. A frozen tower runs
                without a graph.
            language_model: the decoder's layers and norms, without its embeddings.
            lm_head: the head.

        Returns:
            The model itself.

        Raises:
            ValueError: if a tied head is to be trained without the embeddings.
        """
        table, head = self.get_input_embeddings().weight, self.lm_head.weight
        if head is table and lm_head and not embeddings:
            raise ValueError(
                "lm_head=True with embeddings=False: this model's head is tied to its embeddings and is the same tensor; "
                "pass embeddings=True."
            )
        self.model.language_model.requires_grad_(language_model)
        self.lm_head.requires_grad_(lm_head)
        table.requires_grad_(embeddings)  # last: a tied head is this tensor
        self.model.vision_tower.requires_grad_(vision_tower)
        if vision_tower:
            for name in self.model.unused_tower_parameters():  # DDP would wait for their gradients
                self.model.vision_tower.get_parameter(name).requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(projector)
        return self.train(self.training)  # which puts a frozen tower into evaluation mode

    @can_return_tuple
    @takes_cache
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_features: torch.Tensor | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        num_tiles: torch.Tensor | None = None,
        image_numbers: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> DSVLCausalLMOutputWithPast:
        """Run the model; inputs as in `DSVLModel.forward`, and:

        Args:
            labels: (batch, tokens), the ids to predict, -100 where not supervised. The loss is the mean over supervised
                tokens, or their sum divided by `num_items_in_batch` if that is passed, so that it does not depend on how a
                batch is split. Without supervised tokens it is 0, with a graph.
            logits_to_keep: compute logits of the last `logits_to_keep` tokens only (0: all), or of these indices.
            skip_logits: with labels, compute logits of supervised tokens only, and return none. Defaults to True in
                training mode, except in a compiled graph, whose shapes cannot depend on the labels.
            kwargs: also `shift_labels`, (batch, tokens), instead of `labels`: the next token of each, as context
                parallelism passes them; and `num_items_in_batch`.

        Raises:
            TypeError, ValueError: as `DSVLModel.forward`, and for labels of another shape than the inputs'.
        """
        # Not named parameters: the Trainer takes a parameter whose name contains "label" for a column of the data set.
        num_items_in_batch, shift_labels = kwargs.pop("num_items_in_batch", None), kwargs.pop("shift_labels", None)
        if skip_logits is None:
            skip_logits = self.training and not torch.compiler.is_compiling()
        targets = supervised = None
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        if inputs is not None and shift_labels is not None:
            check_labels("shift_labels", shift_labels, inputs)
            targets = shift_labels
        elif inputs is not None and labels is not None:
            check_labels("labels", labels, inputs)
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        if targets is not None and skip_logits:
            supervised = AsyncHostCopy((targets != -100).sum())
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            mm_token_type_ids=mm_token_type_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            image_features=image_features,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            num_tiles=num_tiles,
            image_numbers=image_numbers,
            document_ids=document_ids,
            **(kwargs | {"return_dict": True}),
        )
        hidden = outputs.last_hidden_state
        loss = logits = None
        if targets is not None:
            targets = targets.to(hidden.device)
        if targets is not None and supervised is not None:
            loss = self._supervised_loss(hidden, targets, supervised, num_items_in_batch)
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            logits = self._logits(hidden[:, logits_to_keep if isinstance(logits_to_keep, torch.Tensor) else kept])
            if targets is not None:
                loss = self._loss(logits, targets, num_items_in_batch)
        return DSVLCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def _supervised_loss(
        self,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        supervised: AsyncHostCopy,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The loss without the logits of a whole batch: only logits of supervised tokens, in parts, which are computed again
        in the backward pass.

        Args:
            hidden: (batch, tokens, hidden).
            targets: (batch, tokens), -100 where not supervised.
            supervised: the number of supervised tokens.
            num_items_in_batch: as in `_loss`.
        """
        rows = supervised.tolist()
        if num_items_in_batch is None:
            num_items_in_batch = rows
        first = (targets.flatten() == -100).to(torch.uint8).argsort(stable=True)[: max(rows, 1)]
        hidden, targets = gather_unique_rows(hidden.flatten(0, 1), first), targets.flatten()[first]

        def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self._loss(self._logits(hidden), targets, num_items_in_batch)

        at_once = max(LOGITS_AT_ONCE // self.config.text_config.vocab_size, 1)
        # Where all processes gather the head for each part, all need the same number of parts.
        if rows <= at_once or gathers_weights(self.lm_head):
            return part(hidden, targets)
        pairs = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        if not torch.is_grad_enabled():
            return torch.stack([part(*pair) for pair in pairs]).sum()
        return torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in pairs]).sum()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head, and what the causal model of the composed decoder does to its logits."""
        return scale_logits(self.lm_head(hidden), self.config.text_config)

    def _loss(
        self, logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross-entropy of logits (..., vocabulary) and targets (...), -100 where not supervised."""
        targets = targets.to(logits.device)
        if num_items_in_batch is None:
            num_items_in_batch = (targets != -100).sum()
        if isinstance(num_items_in_batch, torch.Tensor):
            num_items_in_batch = num_items_in_batch.clamp(min=1)
        else:
            num_items_in_batch = max(num_items_in_batch, 1)
        return self.loss_function(
            logits=logits,
            labels=None,
            shift_labels=targets.contiguous(),
            vocab_size=self.config.text_config.vocab_size,
            num_items_in_batch=num_items_in_batch,
        )


__all__ = ["DSVLForConditionalGeneration", "DSVLModel", "DSVLPreTrainedModel"]

"""The DSVL model: image features are projected and scattered into a causal language model that attends by MMCA."""

import warnings
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, Cache, CompileConfig, PreTrainedModel

from .attention_dsvl import route_attention, take_rows
from .cache_dsvl import cached_types, remember_types
from .compilation_dsvl import DSVLCompilationMixin
from .configuration_dsvl import DSVLConfig
from .generation_dsvl import DSVLGenerationMixin
from .image_cache_dsvl import ImageKVCache
from .images_dsvl import HostCopy, make_vision_tower
from .inputs_dsvl import PEFT_HINT, check_labels, check_sequence, check_token_types
from .masks_dsvl import StepMask, by_layer_type, coded_masks, few_queries, key_codes, multimodal_mask, sees_images
from .projectors_dsvl import PROJECTORS
from .resampler_dsvl import DSVLResampler
from .text_prefill_dsvl import DSVLTextPrefillMixin
from .transformers_dsvl import (
    CACHE,
    SDPA_SOFTCAPS,
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
    EitherCacheName,
    can_return_tuple,
    is_deepspeed_zero3_enabled,
    keywords_of,
    takes_cache,
)
from .visibility_dsvl import visibilities

# Logits of a loss that exist at once: 128 MiB in float32.
_LOGITS_AT_ONCE = 2**25

# ----------------------------------------------------------------------------------------------------------------------
# Outputs


class _ImageOutputs(EitherCacheName):
    """What both outputs do with `image_outputs`."""

    image_outputs: BaseModelOutputWithPooling | None

    @property
    def image_hidden_states(self) -> torch.Tensor | None:
        """Deprecated: the projected images, (images, image_seq_length, hidden); those of `image_outputs`."""
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
        cache: the KV cache, if one was used; `past_key_values` is its name before transformers 5.24, and works in all.
        hidden_states: on request, (layers + 1) tensors of (batch, tokens, hidden).
        attentions: on request (eager), a (batch, heads, queries, keys) tensor per layer; under MMCA the sum of both
            branches, so that a text query's row sums to 2 where it sees text and images.
        image_outputs: what `get_image_features` gave for the images of this call, or what was passed in its place.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class DSVLCausalLMOutputWithPast(_ImageOutputs, CausalLMOutputWithPast):
    """Output of `DSVLForConditionalGeneration`: as `DSVLModelOutputWithPast`, with `loss` (a scalar) and `logits`
    (batch, tokens, vocabulary), which is None where `skip_logits` applied."""

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
    # A flash kernel takes no mask that could tell the modalities apart.
    _supports_flash_attn = False
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, DSVLResampler):
            module.init_weights()

    def _default_compile_config(self) -> CompileConfig:
        """How a step is compiled unless `generate` is told: on a GPU, with products of a single row written by the compiler
        and tuned, which read weights faster than the library's do."""
        if self.device.type != "cuda":
            return super()._default_compile_config()
        return CompileConfig(mode=None, options={"triton.cudagraphs": True, "coordinate_descent_tuning": True})

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """Publish; the arguments are those of `PushToHubMixin.push_to_hub`.

        Where the package dsvl is installed, all of its code and its model card goes along.
        """
        try:
            push_part = import_module("dsvl.publishing.push").push_part
        except ModuleNotFoundError:
            return super().push_to_hub(repo_id, **kwargs)
        return push_part(self, repo_id, **kwargs)


class DSVLModel(DSVLPreTrainedModel, DSVLTextPrefillMixin, DSVLCompilationMixin):
    """Vision tower, projector and language model without its head.

    `language_model` is an unmodified decoder of transformers; only the configuration that its attention modules read is
    replaced by a view that leads them to the MMCA functions (see attention_dsvl.py).
    """

    def __init__(self, config: DSVLConfig) -> None:
        super().__init__(config)
        self.vision_tower = make_vision_tower(config.vision_config)
        self.multi_modal_projector = PROJECTORS[config.projector_type](config)
        self.language_model = AutoModel.from_config(config.text_config)
        self._known_keywords = keywords_of(self.language_model) | {"return_dict"}
        if config.multimodal_attention != "causal":
            route_attention(self.language_model, config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def train(self, mode: bool = True) -> "DSVLModel":
        """As for any module; but a tower with nothing to learn stays in evaluation mode: DINOv3 draws its positions at
        random in training mode, and others drop layers."""
        super().train(mode)
        self._fingerprint = None  # training engines write weights in ways that cannot be seen
        if not any(parameter.requires_grad for parameter in self.vision_tower.parameters()):
            self.vision_tower.eval()
        self._switch_layers()
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
        **kwargs: Any,
    ) -> DSVLModelOutputWithPast:
        """Run the model.

        Args:
            input_ids: (batch, tokens); every image holds `image_seq_length` copies of `image_token_id`.
            pixel_values: (images of the whole batch, 3, height, width), in reading order.
            attention_mask: (batch, tokens, cached ones included), 0 where padded. Four-dimensional int8 tensors of codes,
                and transformers' own masks where no image is in sight, are handed through.
            cache: a KV cache; `past_key_values` is the same argument.
            inputs_embeds: (batch, tokens, hidden), instead of `input_ids`. Images that come with them take the places of
                embeddings that equal the image token's, unless `mm_token_type_ids` says where they go.
            mm_token_type_ids: (batch, tokens), 1 for image tokens and 0 for all others; of the new tokens or of the whole
                sequence. Told from `input_ids` if absent; required with `inputs_embeds` that hold their images already,
                unless `multimodal_attention` is "causal".
            mm_encoder_outputs: `{"image": get_image_features(...)}`, instead of `pixel_values`, in the order of the places
                that they take.
            image_features: `get_image_features(...).last_hidden_state`, what a frozen tower gave for the same images
                before: (images, tower tokens, tower width), instead of `pixel_values`. Where processes train together, all
                of them pass it, one without images an empty one.
            kwargs: what the decoder takes (`use_cache`, `output_hidden_states`, `output_attentions`, ...).

        Raises:
            TypeError: for a keyword that nobody knows.
            ValueError: if images and placeholders do not match, inputs contradict each other, or a token's modality
                cannot be told.
        """
        self.check_keywords(kwargs, has_positions=position_ids is not None)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Pass exactly one of input_ids and inputs_embeds.")
        if sum(given is not None for given in (pixel_values, mm_encoder_outputs, image_features)) > 1:
            raise ValueError("Pass one of pixel_values, mm_encoder_outputs and image_features: they are the same images.")
        text_config = self.language_model.config
        if not SDPA_SOFTCAPS and text_config._attn_implementation == "sdpa" and _softcaps(text_config):
            raise ValueError(
                "attn_implementation='sdpa' ignores attn_logit_softcapping in transformers below 5.21; pass "
                "attn_implementation='eager' or 'flex_attention', or install transformers 5.21 or newer."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        check_sequence(inputs_embeds, attention_mask, cache)
        types = check_token_types(mm_token_type_ids, inputs_embeds, cache)

        images = (mm_encoder_outputs or {}).get("image")
        given = image_features if pixel_values is None else pixel_values
        has_images = images is not None or (given is not None and len(given) > 0)
        is_image = self.image_tokens(input_ids, inputs_embeds, types, has_images)
        if given is not None and len(given) > 0:
            if self.config.reversed_images and is_image is not None:
                given = self.reverse_images(given, is_image, position_ids, cache)
            encode = self.project_features if pixel_values is None else self.encode_pixels
            images = encode(given)
        embedded = None
        if images is not None and images.pooler_output:
            embedded = torch.cat(list(images.pooler_output)).to(inputs_embeds.device, inputs_embeds.dtype)
        # Features that were passed in may be those of a chunk, which may begin or end inside an image.
        inputs_embeds, check = self._scatter_images(
            input_ids, inputs_embeds, is_image, types, embedded, whole_images=given is not None
        )
        if images is None and self._others_may_see_images(cache):
            blank = self.encode_blank_image(image_features)
            inputs_embeds = inputs_embeds + blank.to(inputs_embeds.device, inputs_embeds.dtype)

        if position_ids is not None and attention_mask is None and cache is None:
            # Positions that begin again are packed conversations, unless the decoder makes a cache: then each would see
            # those before it.
            kwargs.setdefault("use_cache", False)
        token_types = may_hold_images = None
        if self.config.multimodal_attention == "causal":
            pass
        elif isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.ndim == 4):
            attention_mask = self._check_ready_mask(attention_mask, is_image if types is None else types)
            kwargs["multimodal_masks"] = self._step_masks(attention_mask, inputs_embeds.dtype)
        else:
            # How many of the new tokens are image tokens; where it could not be held against placeholders, it is not known.
            image_queries = None if input_ids is None else 0 if embedded is None else len(embedded)
            token_types = self.token_types(inputs_embeds.shape[1], is_image, types, cache)
            known = None if image_queries is None else image_queries > 0
            # The graph of compiled layers is one for MMCA, and takes texts alone as well.
            may_hold_images = sees_images(token_types, cache, True if self.compiles_layers else known)
            attention_mask, kwargs["multimodal_masks"] = self._modal_masks(
                inputs_embeds, attention_mask, position_ids, cache, token_types, image_queries, may_hold_images
            )
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **(kwargs | {"return_dict": True}),
        )
        if check is not None:
            check()
        if token_types is not None and not torch.compiler.is_compiling():  # also in a cache that the decoder made
            remember_types(getattr(outputs, CACHE), token_types, may_hold_images)
        return DSVLModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=images,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def check_keywords(self, kwargs: dict[str, Any], has_positions: bool) -> None:
        """Refuse keyword arguments that neither the decoder nor transformers knows.

        Args:
            kwargs: what `forward` got beside its own arguments.
            has_positions: whether it got `position_ids`.

        Raises:
            TypeError: naming the first that is not known.
            ValueError: for one that is known but cannot be honoured.
        """
        for name in kwargs:
            if name not in self._known_keywords:
                raise TypeError(
                    f"{type(self).__name__}.forward() got an unexpected keyword argument {name!r}: neither this model, nor "
                    f"its decoder {type(self.language_model).__name__}, nor transformers' common arguments know it; check "
                    "its spelling, or leave it out."
                )
        if kwargs.get("cu_seq_lens_q") is not None and not has_positions:
            raise ValueError(
                "cu_seq_lens_q without position_ids: the attention here tells packed conversations by positions that begin "
                "again; pass position_ids."
            )
        if kwargs.get("is_causal") is False and self.config.multimodal_attention != "causal":
            raise ValueError(
                f"is_causal=False does not go with multimodal_attention={self.config.multimodal_attention!r}, which is "
                "causal; leave it out."
            )

    # -- modality ------------------------------------------------------------------------------------------------------

    def _modal_masks(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        token_types: torch.Tensor,
        image_queries: int | None,
        may_hold_images: bool,
    ) -> tuple[Any, dict | None]:
        """The decoder's attention_mask and the `multimodal_masks` beside it (see masks_dsvl.py).

        Args:
            token_types: of the whole sequence, (batch, tokens, cached ones included).
            image_queries: how many of the new tokens are image tokens, if that is known.
            may_hold_images: whether any token of the sequence may be an image token.
        """
        attention = self.config.multimodal_attention
        if attention == "mmca" and not may_hold_images:
            return attention_mask, None
        token_types = token_types.to(inputs_embeds.device)
        text = self.language_model.config
        visible = visibilities(text, inputs_embeds, attention_mask, cache, position_ids)
        few = few_queries(visible, inputs_embeds.shape[1])
        eager = (text._attn_implementation or "eager") == "eager"
        if attention == "mmca_reference" or few or eager:
            codes = coded_masks(visible, token_types, attention, text_alone=image_queries == 0)
            return codes, self._step_masks(codes, inputs_embeds.dtype) if few else None
        masks = {
            k: multimodal_mask(
                v, token_types, text, inputs_embeds.dtype, self.training, image_queries or 0, self.compiles_layers
            )
            for k, v in visible.items()
        }
        # A four-dimensional mask keeps the decoder from building its own; the modality of the keys is short and true.
        keys = {k: key_codes(v, token_types) for k, v in visible.items()}
        return by_layer_type(keys), masks

    def _step_masks(self, codes: Any, dtype: torch.dtype) -> dict[str | None, StepMask] | None:
        """What the layers make of codes under "mmca", made once; None if these are no codes."""
        by_type = codes if isinstance(codes, dict) else {None: codes}
        if self.config.multimodal_attention != "mmca" or any(
            mask is None or mask.dtype != torch.int8 for mask in by_type.values()
        ):
            return None
        return {layer_type: StepMask.of(mask, dtype) for layer_type, mask in by_type.items()}

    def _check_ready_mask(
        self, attention_mask: torch.Tensor | dict[str, torch.Tensor], types: torch.Tensor | None
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        masks = attention_mask.values() if isinstance(attention_mask, dict) else [attention_mask]
        if torch.compiler.is_compiling() or all(getattr(mask, "dtype", None) == torch.int8 for mask in masks):
            return attention_mask
        if types is not None and bool((types == 1).any()):
            raise ValueError(
                f"A four-dimensional attention_mask of {[getattr(m, 'dtype', type(m)) for m in masks]} does not tell text "
                f"from images, as multimodal_attention={self.config.multimodal_attention!r} must; pass the "
                "two-dimensional mask and mm_token_type_ids."
            )
        return attention_mask

    def token_types(
        self, new_tokens: int, is_image: torch.Tensor | None, types: torch.Tensor | None, cache: Cache | None
    ) -> torch.Tensor:
        """The modality of the whole sequence, cached tokens included: (batch, positions), 1 = image.

        A cache remembers the modality of what it holds, so that a loop that feeds new tokens alone need not pass it.

        Args:
            is_image: (batch, new tokens), which of them are image tokens; None if that is not known.
            types: the caller's `mm_token_type_ids`, of the new tokens or of all.
        """
        past = int(cache.get_seq_length()) if cache is not None else 0
        told_by_ids = self.config.multimodal_attention != "mmca_reference"  # where a generated image token is text
        if types is None:
            if is_image is None:
                raise ValueError(
                    "inputs_embeds do not tell text from images; pass mm_token_type_ids (batch, tokens), 1 for image "
                    "tokens and 0 for text."
                )
            types = is_image.long()
        elif is_image is not None and told_by_ids and new_tokens == 1:  # what nobody waits to hold against the ids
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
        # What the cache knows of its own tokens is what was computed with.
        return torch.cat([known[:, :past].to(types.device), types[:, types.shape[1] - new_tokens :]], dim=1)


def _softcaps(text_config: Any) -> bool:
    return getattr(text_config, "attn_logit_softcapping", None) is not None


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
            ValueError: if the checkpoint holds a `DSVLModel` alone, whose head would be made up at random.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if "lm_head.weight" in info["missing_keys"] and not model.config.tie_word_embeddings:
            raise ValueError(
                f"{args[0] if args else kwargs.get('pretrained_model_name_or_path')!r} holds no lm_head.weight: it is the "
                "body of a model (saved from DSVLModel). Load it by DSVLModel.from_pretrained, or save the whole "
                "DSVLForConditionalGeneration."
            )
        # Under ZeRO-3 transformers keeps the key renamings of every sub-model, also those that this checkpoint's keys had no
        # need of, and reverts them when it saves: the saved keys would not be this model's.
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

    def encode_images(self, pixel_values: torch.Tensor, chunk_size: int = 16) -> ImageKVCache:
        """Run images through the whole model, once; see `DSVLModel.encode_images`."""
        return self.model.encode_images(pixel_values, chunk_size)

    def compile_text_prefill(self, **options: Any) -> None:
        """Compile what a prompt over encoded images runs; see `DSVLModel.compile_text_prefill`."""
        self.model.compile_text_prefill(**options)

    def compile_decoder_layers(self, **options: Any) -> None:
        """Compile the decoder's layers for training; see `DSVLModel.compile_decoder_layers`."""
        self.model.compile_decoder_layers(**options)

    @takes_cache
    def prefill(
        self, input_ids: torch.Tensor, image_cache: ImageKVCache, cache: Cache | None = None, **kwargs: Any
    ) -> DSVLCausalLMOutputWithPast:
        """Run prompts over images that are encoded already; see `DSVLModel.prefill_text`.

        Returns:
            `logits` of every row's last token, (batch, 1, vocabulary), and `cache`, as after a call of the whole prompt with
            `pixel_values` and the same `position_ids` (by default those of `generate`, which count what is not padded).
        """
        hidden, cache = self.model.prefill_text(input_ids, image_cache, cache, **kwargs)
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
        """Say which parts learn, and freeze the rest. The default is DeepSpeed-VisualChat's: projector and embeddings.

        Args:
            projector: the projector.
            embeddings: the decoder's token embeddings (and a head that is tied to them).
            vision_tower: the vision tower, but for parameters on which its features do not depend; frozen, it runs without
                a graph.
            language_model: the decoder's layers and norms, without its embeddings.
            lm_head: the head.

        Returns:
            The model itself.

        Raises:
            ValueError: if a tied head should learn without the embeddings that it is.
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
            for name in self.model.unused_tower_parameters():  # no gradient reaches them, for which DDP would wait
                self.model.vision_tower.get_parameter(name).requires_grad_(False)
        self.model.multi_modal_projector.requires_grad_(projector)
        return self.train(self.training)  # a frozen tower is in evaluation mode

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
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool | None = None,
        **kwargs: Any,
    ) -> DSVLCausalLMOutputWithPast:
        """Run the model; inputs as in `DSVLModel.forward`, and:

        Args:
            labels: (batch, tokens), the ids to learn, -100 where nothing is. The loss is the mean over supervised tokens,
                or their sum over `num_items_in_batch` if that is passed, so that it does not depend on how a batch is
                split. With nothing supervised it is 0, with a graph.
            logits_to_keep: compute logits for the last so many tokens only (0: all), or for these indices.
            skip_logits: with labels, compute no logits but those of supervised tokens, and return none. Defaults to True
                in training mode, except in a compiled graph, whose shapes cannot depend on the labels.
            kwargs: besides, `shift_labels`, (batch, tokens), instead of `labels`: what each token is to say next, as context
                parallelism passes them; and `num_items_in_batch`.

        Raises:
            TypeError, ValueError: as `DSVLModel.forward`, and for labels of another shape than the inputs'.
        """
        # No named parameters: the Trainer takes every one that is called a label for a column that all data sets have.
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
            # Token t learns to say token t + 1.
            targets = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        if targets is not None and skip_logits:
            supervised = HostCopy((targets != -100).sum())
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
        supervised: HostCopy,
        num_items_in_batch: torch.Tensor | int | None,
    ) -> torch.Tensor:
        """The loss without the logits of a whole batch: of supervised tokens only, and of a part of these at a time, whose
        logits are computed again in the backward pass.

        Args:
            hidden: (batch, tokens, hidden).
            targets: (batch, tokens), -100 where nothing is supervised.
            supervised: in how many places something is.
            num_items_in_batch: as in `_loss`.
        """
        rows = supervised.tolist()
        if num_items_in_batch is None:
            num_items_in_batch = rows
        first = (targets.flatten() == -100).to(torch.uint8).argsort(stable=True)[: max(rows, 1)]
        hidden, targets = take_rows(hidden.flatten(0, 1), first), targets.flatten()[first]

        def part(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self._loss(self._logits(hidden), targets, num_items_in_batch)

        at_once = max(_LOGITS_AT_ONCE // self.config.text_config.vocab_size, 1)
        # Under ZeRO-3 all processes gather the head for each part, and must do so equally often.
        if rows <= at_once or is_deepspeed_zero3_enabled():
            return part(hidden, targets)
        pairs = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        if not torch.is_grad_enabled():
            return torch.stack([part(*pair) for pair in pairs]).sum()
        return torch.stack([checkpoint(part, *pair, use_reentrant=False) for pair in pairs]).sum()

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head, and what the composed decoder's own causal model does to its logits."""
        text = self.config.text_config
        logits = self.lm_head(hidden)
        if getattr(text, "logits_scaling", None) is not None:  # Granite
            logits = logits / text.logits_scaling
        if getattr(text, "logit_scale", None) is not None:  # Cohere
            logits = logits * text.logit_scale
        if getattr(text, "final_logit_softcapping", None) is not None:  # Gemma 2
            logits = torch.tanh(logits / text.final_logit_softcapping) * text.final_logit_softcapping
        return logits

    def _loss(
        self, logits: torch.Tensor, targets: torch.Tensor, num_items_in_batch: torch.Tensor | int | None
    ) -> torch.Tensor:
        """Cross-entropy of logits (..., vocabulary) and targets (...), -100 where nothing is supervised."""
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

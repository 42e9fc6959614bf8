"""Generation: every step knows the modality of the whole sequence, cached tokens included."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from .cache_dsvl import cached_types, remember_types
from .decoding_dsvl import DSVLDecodingMixin
from .image_cache_dsvl import ImageKVCache
from .inputs_dsvl import PEFT_HINT
from .masks_dsvl import coded_masks, sees_images
from .transformers_dsvl import (
    CACHE,
    CHUNKED_PREFILL_TAKES_IMAGES,
    BaseModelOutputWithPooling,
    create_masks_for_generate,
    is_deepspeed_zero3_enabled,
    rename_cache,
    takes_cache,
)
from .visibility_dsvl import visibilities

NO_IMAGE_CACHE = (
    "This way of decoding does not take an image KV cache; choose greedy search, sampling or beams, or pass pixel_values."
)


class NoImageToken(LogitsProcessor):
    """Keeps the image token from being generated, whatever a generation configuration says."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.image_token_id] = -torch.inf
        return scores


class DSVLGenerationMixin(DSVLDecodingMixin):
    """What `GenerationMixin` does not know: images, and that a key has a modality."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        logits_processor: LogitsProcessorList | None = None,
        image_cache: ImageKVCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; see `GenerationMixin.generate`. Inputs are those of `forward`.

        With `image_cache` of `encode_images`, the images in the order of their places, instead of `pixel_values`, only
        the text of the prompt is computed. Greedy, sampling and beams; every prompt ends with text.

        With a `cache` (or `past_key_values`) of earlier rounds, pass the whole conversation: images whose tokens are in it
        are not encoded again (the new images alone may be passed as well).

        The image token is never generated, as it stands for an image; except under "mmca_reference", whose results are
        compared with the released code, which does not prevent it.
        """
        rename_cache(kwargs)
        # PEFT puts a method of its own model here.
        wrapper: Any = getattr(self.prepare_inputs_for_generation, "__self__", self)
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(f"{type(wrapper.active_peft_config).__name__} cannot generate with a DSVL model. {PEFT_HINT}")
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if image_cache is not None:
            if kwargs.get("assistant_model") is not None:
                raise ValueError(NO_IMAGE_CACHE)
            kwargs["image_cache"] = image_cache
            given = [k for k in ("pixel_values", "image_features", "mm_encoder_outputs") if kwargs.get(k) is not None]
            if given or input_ids is None:
                raise ValueError(
                    f"image_cache goes with input_ids alone, but {', '.join(given) or 'no input_ids'} came with it; its "
                    "images take all places (ImageKVCache.cat joins several)."
                )
        if input_ids is not None:
            if kwargs.get("mm_token_type_ids") is None:  # of the prompt: whatever is generated is text
                kwargs["mm_token_type_ids"] = (input_ids == self.config.image_token_id).long()
            if kwargs.get("pixel_values") is not None:
                self.model.check_placeholders(input_ids == self.config.image_token_id, whole_images=True)
                cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
                # A mask that is longer than the ids comes with the new tokens alone, as transformers has it.
                new_ids = input_ids
                if cache is not None and (mask is None or mask.shape[1] == input_ids.shape[1]):
                    new_ids = input_ids[:, int(cache.get_seq_length()) :]
                    kwargs["pixel_values"] = self._new_images(input_ids, kwargs["pixel_values"], cache)
                if self.config.reversed_images and kwargs["pixel_values"] is not None:
                    # transformers encodes them before the first step, and hands them over in the order of their places.
                    kwargs["pixel_values"] = self.model.reverse_images(
                        kwargs["pixel_values"], new_ids == self.config.image_token_id, cache=cache
                    )
        if kwargs.get("pixel_values") is None:
            kwargs.pop("pixel_values", None)
        if "pixel_values" not in kwargs and kwargs.get("mm_encoder_outputs") is None and is_deepspeed_zero3_enabled():
            # Images are encoded before the first step. Processes that have some wait here, at every layer of the tower,
            # for those that have none.
            self.model.encode_blank_image()
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[])}
        if kwargs.get("image_features") is not None:
            features = kwargs.pop("image_features")
            if self.config.reversed_images and input_ids is not None and len(features):
                features = self.model.reverse_images(
                    features, input_ids == self.config.image_token_id, cache=kwargs.get(CACHE)
                )
            kwargs["mm_encoder_outputs"] = {"image": self.model.project_features(features)}
        if kwargs.get("mm_encoder_outputs"):  # transformers repeats what is in them for beams, in place
            kwargs["mm_encoder_outputs"] = {key: copy.copy(made) for key, made in kwargs["mm_encoder_outputs"].items()}
        assistant, encoded = kwargs.get("assistant_model"), kwargs.get("mm_encoder_outputs") or {}
        if "pixel_values" in kwargs and assistant is not None and hasattr(assistant, "get_image_features"):
            # An assistant sees by its own tower, but is handed what its main model got: both go there, it picks its own.
            pixel_values = kwargs.pop("pixel_values")
            seen_by: dict[str, Any] = {"image": self, "assistant": assistant}
            kwargs["mm_encoder_outputs"] = {
                key: model.get_image_features(pixel_values, return_dict=True) for key, model in seen_by.items()
            }
        elif "assistant" in encoded:
            kwargs["mm_encoder_outputs"] = {"image": encoded["assistant"]}
        if assistant is not None and not hasattr(assistant, "get_image_features") and input_ids is not None:
            del kwargs["mm_token_type_ids"]  # a language model alone refuses it, and here it follows from the ids
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.multimodal_attention != "mmca_reference":
            processors.append(NoImageToken(self.config.image_token_id))
        return super().generate(inputs, *args, logits_processor=processors, **kwargs)

    def _new_images(self, input_ids: torch.Tensor, pixel_values: torch.Tensor, cache: Cache) -> torch.Tensor | None:
        """Of the images of a whole conversation, those whose tokens are not in the cache yet."""

        def count_images(ids: torch.Tensor) -> list[int]:
            return ((ids == self.config.image_token_id).sum(-1) // self.config.image_seq_length).tolist()

        total, new = count_images(input_ids), count_images(input_ids[:, int(cache.get_seq_length()) :])
        if len(pixel_values) == sum(total):
            samples = pixel_values.split(total)
            pixel_values = torch.cat([s[len(s) - count :] for s, count in zip(samples, new, strict=True)])
        return pixel_values if len(pixel_values) else None

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        image_cache = model_kwargs.pop("image_cache", None)
        if image_cache is None:
            images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            if generation_config.prefill_chunk_size and self.config.multimodal_attention == "mmca_reference":
                raise ValueError(
                    "prefill_chunk_size does not go with multimodal_attention='mmca_reference', under which text sees later "
                    "images; leave it out."
                )
            if not CHUNKED_PREFILL_TAKES_IMAGES and generation_config.prefill_chunk_size and images is not None:
                raise ValueError(
                    "prefill_chunk_size does not go with images in transformers below 5.23, which drops them; leave it "
                    "out, or install transformers 5.23 or newer."
                )
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        for option in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
            if getattr(generation_config, option, None):
                raise ValueError(
                    f"{option} concerns all tokens of a prompt, but with an image KV cache only its text is computed; "
                    "leave it out, or pass pixel_values."
                )
        if model_kwargs.get(CACHE) is None:
            raise ValueError("An image KV cache needs a KV cache to be put into; leave use_cache at True.")
        return self.prefill(
            input_ids,
            image_cache,
            model_kwargs[CACHE],
            attention_mask=model_kwargs.get("attention_mask"),
            position_ids=model_kwargs.get("position_ids"),
            copies=max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1),
        )

    @takes_cache
    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        mm_token_type_ids: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_cache: ImageKVCache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one generation step, with the modality of the whole sequence."""
        if image_cache is not None:  # it would have been used by `_prefill`
            raise ValueError(NO_IMAGE_CACHE)
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            **{CACHE: cache},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        new = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
        if mm_encoder_outputs and (
            is_first_iteration
            # An assistant starts from an empty cache in what transformers does not call a first iteration.
            or (new.shape[1] == input_ids.shape[1] and (cache is None or int(cache.get_seq_length()) == 0))
        ):
            inputs["mm_encoder_outputs"] = mm_encoder_outputs
        if self.config.multimodal_attention == "causal" or mm_token_type_ids is None:
            return inputs
        static = cache is not None and cache.is_compileable
        known = cached_types(cache)
        if static and not is_first_iteration and known is not None:
            past = known.shape[1]  # a static cache keeps its length on the device; asking would wait for it
        else:
            past = int(cache.get_seq_length()) if cache is not None else 0
        types = _whole_types(mm_token_type_ids, input_ids, known, past + new.shape[1])
        inputs["mm_token_type_ids"] = types
        if cache is not None and static and new.shape[1] == 1:
            # A decode step's mask is built here, in a fixed shape: a compiled step sees nothing that grows.
            del inputs["mm_token_type_ids"]
            inputs["attention_mask"] = self._static_step_mask(types, attention_mask, cache, inputs.get("position_ids"))
        return inputs

    def _static_step_mask(
        self,
        token_types: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache,
        position_ids: torch.Tensor | None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        config = self.model.language_model.config
        embeds = torch.empty((len(token_types), 1, 0), dtype=self.dtype, device=token_types.device)
        attention = self.config.multimodal_attention
        # Nothing is generated but text: as many may hold images as before.
        may_hold_images = sees_images(token_types, cache, known=False)
        remember_types(cache, token_types, may_hold_images)
        if attention == "mmca" and not may_hold_images:
            return create_masks_for_generate(
                config=config,
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE: cache},
            )
        visible = visibilities(config, embeds, attention_mask, cache, position_ids)
        return coded_masks(visible, token_types, attention)

    @property
    def create_masks_for_generate(self) -> Callable:
        """What `GenerationMixin` calls for a static cache; under MMCA masks are built elsewhere, with the modality."""
        if self.config.multimodal_attention == "causal":
            return create_masks_for_generate
        return lambda *args, attention_mask=None, **kwargs: attention_mask


def _whole_types(types: torch.Tensor, input_ids: torch.Tensor, known: torch.Tensor | None, total: int) -> torch.Tensor:
    """The modality of all `total` tokens of a generation step, from what `generate` was given for `input_ids`.

    `input_ids` is the whole sequence, or what came after a cache; assisted decoding passes the prompt's modality alone,
    and what was generated since is text.
    """
    types = nn.functional.pad(types, (0, max(input_ids.shape[1] - types.shape[1], 0)))
    if known is not None:  # what the cache knows of its own tokens is what was computed with
        held = min(known.shape[1], total)
        before = max(total - types.shape[1], 0)  # tokens that `types` says nothing of
        types = torch.cat([known[:, :held].to(types.device), types[:, max(held - before, 0) :]], dim=1)
    return types[:, :total]


__all__ = ["DSVLGenerationMixin"]

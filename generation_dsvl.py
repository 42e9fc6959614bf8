"""Generation: every step knows the modality of the whole sequence, cached tokens included."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .acceleration_dsvl import acceleration
from .cache_dsvl import cached_types, known_positions, remember_types, whole_positions
from .inputs_dsvl import PEFT_HINT, by_tile, check_image_counts, check_image_numbers, check_num_tiles
from .masks_dsvl import sequence_may_hold_images, step_codes
from .projectors_dsvl import NumberedImages
from .transformers_dsvl import (
    CACHE,
    CHUNKED_PREFILL_TAKES_IMAGES,
    BaseModelOutputWithPooling,
    create_masks_for_generate,
    gathers_weights,
    rename_cache,
    takes_cache,
)

NO_IMAGE_CACHE = (
    "This way of decoding does not take an image KV cache; choose greedy search, sampling or beams, or pass pixel_values."
)


# What the tower takes.
IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")


class NoImageToken(LogitsProcessor):
    """Keeps the image token from being generated, whatever the generation configuration says."""

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.image_token_id] = -torch.inf
        return scores


class DSVLGenerationMixin(GenerationMixin):
    """`GenerationMixin` for a model with images, whose tokens have a modality.

    Attributes:
        image_library: *optional*, a `dsvl.image_library.ImageLibrary`: `generate` asks it for images before it encodes them.
    """

    image_library: Any = None

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        *args: Any,
        logits_processor: LogitsProcessorList | None = None,
        image_cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text; see `GenerationMixin.generate`. Inputs are those of `forward`.

        With a `cache` (or `past_key_values`) of earlier turns, pass the whole conversation: images whose tokens are in the
        cache are not encoded again. (Passing only the new images works too.)

        The image token is never generated, as it stands for an image; except under "mmca_reference", whose results are
        compared with the released code, which does not prevent it.

        Args:
            image_cache: the `ImageKVCache` of `encode_images`, with the images in the order of their tokens, instead of
                `pixel_values`: only the text of the prompt is computed. For greedy search, sampling and beams; every prompt
                ends with text. With a `cache` of earlier turns, those of the new tokens alone. With `numbered_images` they
                hold the numbers that they have in their prompts.
        """
        if "picture_cache" in kwargs:
            warnings.warn("picture_cache is deprecated; pass image_cache.", DeprecationWarning, stacklevel=3)
            image_cache = kwargs.pop("picture_cache")
        rename_cache(kwargs)
        self._refuse_prompt_learning()
        input_ids = inputs if inputs is not None else kwargs.get("input_ids")
        if image_cache is not None:
            self._check_image_cache(input_ids, kwargs)
            kwargs["image_cache"] = image_cache
        if input_ids is not None and kwargs.get("mm_token_type_ids") is None:  # generated tokens are text
            kwargs["mm_token_type_ids"] = (input_ids == self.config.image_token_id).long()
        self._take_new_images(input_ids, kwargs)
        if self.image_library is not None and kwargs.get("pixel_values") is not None:
            self.image_library.replace_images(self, input_ids, kwargs)
        self._project_image_features(input_ids, kwargs)
        self._join_other_processes(kwargs)
        self._prepare_assistant(input_ids, kwargs)
        self._encode_images_of_any_length(kwargs)
        processors = LogitsProcessorList(logits_processor or [])
        if self.config.multimodal_attention != "mmca_reference":
            processors.append(NoImageToken(self.config.image_token_id))
        run = self._numbering(super().generate, input_ids)
        fast = getattr(acceleration(), "generate", None)  # package releases before 0.3 have none
        if fast is not None:
            return fast(self, run, inputs, *args, logits_processor=processors, **kwargs)
        return run(inputs, *args, logits_processor=processors, **kwargs)

    # -- the steps of `generate`: each changes the keyword arguments in place --------------------------------------------

    def _refuse_prompt_learning(self) -> None:
        """PEFT's prompt methods add tokens whose modality is unknown."""
        wrapper: Any = getattr(self.prepare_inputs_for_generation, "__self__", self)  # PEFT puts a method of its model here
        if getattr(getattr(wrapper, "active_peft_config", None), "is_prompt_learning", False):
            raise ValueError(f"{type(wrapper.active_peft_config).__name__} cannot generate with a DSVL model. {PEFT_HINT}")

    def _check_image_cache(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        if kwargs.get("assistant_model") is not None:
            raise ValueError(NO_IMAGE_CACHE)
        others = "pixel_values", "image_features", "mm_encoder_outputs", "image_numbers"
        given = [name for name in others if kwargs.get(name) is not None]
        if given or input_ids is None:
            raise ValueError(
                f"image_cache goes with input_ids alone, but {', '.join(given) or 'no input_ids'} came with it; it must "
                "hold all images of the prompts (ImageKVCache.cat joins several), under their numbers."
            )

    def _take_new_images(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Check `pixel_values`, and keep those of images that are not in the KV cache yet."""
        given = {name: kwargs.pop(name, None) for name in IMAGE_INPUTS}
        images = {name: value for name, value in given.items() if value is not None}
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        tiles, numbers = kwargs.pop("num_tiles", None), kwargs.pop("image_numbers", None)
        if self.config.numbered_images and ("pixel_values" not in images or input_ids is None):
            # `_numbering` counts images that come as something else, or with embeddings of the prompt.
            counted = any(kwargs.get(name) is not None for name in ("image_features", "mm_encoder_outputs", "inputs_embeds"))
            told = {"num_tiles": tiles, "image_numbers": numbers} if counted else {}
            kwargs.update({name: value for name, value in told.items() if value is not None})
        if "pixel_values" not in images:
            if "spatial_shapes" in images and kwargs.get("image_features") is not None:
                kwargs["spatial_shapes"] = images["spatial_shapes"]
            return
        number = len(images["pixel_values"])
        if tiles is not None:
            check_num_tiles(int(tiles.sum()), number)
        if input_ids is not None:
            is_image = input_ids == self.config.image_token_id
            lengths = self.config.tile_lengths(number, images.get("spatial_shapes"))
            if "spatial_shapes" not in images:
                check_image_counts(is_image.sum(-1).tolist(), self.config.image_seq_length, whole_images=True)
            new, numbers = is_image, self._image_numbers(is_image, lengths, tiles, numbers, kwargs)
            if numbers is not None:
                check_image_numbers(len(numbers), number, self._numbered_images(kwargs))
            # A mask that is longer than the ids means that the ids are the new tokens alone, as in transformers.
            if cache is not None and (mask is None or mask.shape[1] == input_ids.shape[1]):
                new = is_image[:, int(cache.get_seq_length()) :]
                kept = _new_images(is_image.sum(-1).tolist(), new.sum(-1).tolist(), lengths)
                images = {name: value[kept] for name, value in images.items()} if kept else {}
                numbers = None if numbers is None else numbers[kept]
            if self.config.reversed_images and images:
                # transformers encodes them before the first step, and passes them on in the order of the image tokens.
                images["pixel_values"] = self.model.reverse_images(images["pixel_values"], new, cache=cache)
            if numbers is not None and images:
                kwargs["image_numbers"] = numbers
        kwargs.update(images)

    def _project_image_features(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Turn `image_features` into `mm_encoder_outputs`."""
        features = kwargs.get("image_features")
        if features is None:
            return
        del kwargs["image_features"]
        if self.config.reversed_images and input_ids is not None and len(features):
            features = self.model.reverse_images(features, input_ids == self.config.image_token_id, cache=kwargs.get(CACHE))
        kwargs["mm_encoder_outputs"] = {"image": self.model.project_features(features, kwargs.pop("spatial_shapes", None))}

    def _join_other_processes(self, kwargs: dict[str, Any]) -> None:
        """Under ZeRO-3 and FSDP, run the tower without images as well.

        Images are encoded before the first step. Processes that have images wait at every layer of the tower for those that
        have none.
        """
        if "pixel_values" not in kwargs and kwargs.get("mm_encoder_outputs") is None and gathers_weights(self):
            self.model.encode_blank_image()
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=[])}

    def _prepare_assistant(self, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
        """Give an assistant model (assisted decoding) its own image embeddings: it gets the arguments of its main model."""
        if kwargs.get("mm_encoder_outputs"):  # transformers repeats their tensors for beams, in place
            kwargs["mm_encoder_outputs"] = {key: copy.copy(made) for key, made in kwargs["mm_encoder_outputs"].items()}
        assistant, encoded = kwargs.get("assistant_model"), kwargs.get("mm_encoder_outputs") or {}
        if "pixel_values" in kwargs and assistant is not None and hasattr(assistant, "get_image_features"):
            images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            encoders: dict[str, Any] = {"image": self, "assistant": assistant}
            numbers = {"image_numbers": kwargs.pop("image_numbers", None)}
            kwargs["mm_encoder_outputs"] = {
                key: model.get_image_features(
                    **images, **(numbers if getattr(model.config, "numbered_images", 0) else {}), return_dict=True
                )
                for key, model in encoders.items()
            }
        elif "assistant" in encoded:  # this model is the assistant
            kwargs["mm_encoder_outputs"] = {"image": encoded["assistant"]}
            kwargs.pop("position_ids", None)  # they are its main model's
        if assistant is not None and not hasattr(assistant, "get_image_features") and input_ids is not None:
            del kwargs["mm_token_type_ids"]  # a language model refuses it, and this model derives it from the ids

    def _encode_images_of_any_length(self, kwargs: dict[str, Any]) -> None:
        """Encode images now where positions depend on how many tokens each has; transformers would do it a little later."""
        depends = self.config.image_layout == "native" and self.config.image_positions == "image"
        if depends and "pixel_values" in kwargs:
            images = {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}
            kwargs["mm_encoder_outputs"] = {"image": self.get_image_features(**images, return_dict=True)}

    def _image_numbers(
        self,
        is_image: torch.Tensor,
        lengths: list[int],
        tiles: torch.Tensor | None,
        given: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> torch.Tensor | None:
        """The number of each tile's image, (tiles,), in models with `numbered_images`.

        Args:
            is_image: (batch, tokens), of the whole conversation, or of the tokens after a cache.
            lengths: of the tiles: of all of them, or of those after the cache.
            tiles, given: the caller's `num_tiles` and `image_numbers`.
            kwargs: of `generate`.

        Raises:
            ValueError: if they cannot be counted.
        """
        numbered_images = self._numbered_images(kwargs)
        if given is not None:
            return by_tile(given, tiles, numbered_images)
        if not numbered_images or not lengths:
            return None
        cache, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
        is_whole = mask is None or mask.shape[1] == is_image.shape[1]
        if cache is not None and not (is_whole and int(is_image.sum()) == sum(lengths)):  # the images after the cache alone
            new = is_image[:, int(cache.get_seq_length()) :] if is_whole else is_image
            return self.model.tile_numbers(new, lengths, tiles, cache=cache)
        return self.model.tile_numbers(is_image, lengths, tiles)

    def _numbered_images(self, kwargs: dict[str, Any]) -> int:
        """The `numbered_images` of this model, or of its assistant model, which gets the same images."""
        assistant = getattr(kwargs.get("assistant_model"), "config", None)
        return self.config.numbered_images or getattr(assistant, "numbered_images", 0)

    def _numbering(self, run: Callable, input_ids: torch.Tensor | None) -> Callable:
        """`GenerationMixin.generate`, in models with `numbered_images` for images that hold their numbers: transformers
        encodes images before the first step, and hands them on in several ways."""
        if not self.config.numbered_images:
            return run

        def numbered_run(*args: Any, **kwargs: Any) -> Any:
            tiles, numbers = kwargs.pop("num_tiles", None), kwargs.pop("image_numbers", None)
            outputs = kwargs.get("mm_encoder_outputs") or {}
            if images := {name: kwargs.pop(name) for name in IMAGE_INPUTS if name in kwargs}:
                outputs = {"image": self.get_image_features(**images, return_dict=True)}
            encoded, embeds = outputs.get("image"), kwargs.get("inputs_embeds")
            if encoded is not None and encoded.pooler_output and not isinstance(encoded, NumberedImages):
                if input_ids is not None or embeds is not None:
                    is_image = self.model.image_tokens(input_ids, embeds, kwargs.get("mm_token_type_ids"), has_images=True)
                    numbers = self._image_numbers(is_image, list(map(len, encoded.pooler_output)), tiles, numbers, kwargs)
                if numbers is not None:
                    outputs = outputs | {"image": self.model.number_images(encoded, numbers)}
            if outputs:
                kwargs["mm_encoder_outputs"] = outputs
            return run(*args, **kwargs)

        return numbered_run

    # -- what transformers calls -----------------------------------------------------------------------------------------

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> Any:
        """The positions of a prompt, cached tokens included. `generate` goes on from the last, by one for each token."""
        if self.config.image_positions == "token":
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        cache, mask, types = (model_kwargs.get(name) for name in (CACHE, "attention_mask", "mm_token_type_ids"))
        images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if model_kwargs.get("image_cache") is not None:
            images = model_kwargs["image_cache"].tile_ranges()
        past = int(cache.get_seq_length()) if cache is not None else 0
        total = max(past + inputs_tensor.shape[1] if mask is None else mask.shape[1], past)
        if types is None:
            has_images = images is not None or model_kwargs.get("pixel_values") is not None
            ids, embeds = (inputs_tensor, None) if inputs_tensor.ndim == 2 else (None, inputs_tensor)
            is_image = self.model.image_tokens(ids, embeds, None, has_images)
            if is_image is None:
                raise ValueError(
                    "inputs_embeds do not tell text from images, whose tokens share positions under "
                    "image_positions='image'; pass mm_token_type_ids (batch, tokens), 1 for image tokens and 0 for text."
                )
            types = is_image.long()
        types = _whole_types(types, inputs_tensor, cached_types(cache), total)
        types = nn.functional.pad(types, (total - types.shape[1], 0))  # of unknown modality: so are their positions
        new = self.model.make_position_ids(types, total - past, images, mask, cache=cache)
        cached = known_positions(cache, len(types), past)
        return new if cached is None else torch.cat([cached.clamp(min=0).to(new), new], dim=1)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Greedy search and sampling, by the acceleration's loop if there is one."""
        run, module = super()._sample, acceleration()
        return run(*args, **kwargs) if module is None else module.sample(self, run, *args, **kwargs)

    def _assisted_decoding(self, *args: Any, **kwargs: Any) -> Any:
        """Speculative decoding, by the acceleration's loop if there is one."""
        run, decode = super()._assisted_decoding, getattr(acceleration(), "decode_speculatively", None)
        return run(*args, **kwargs) if decode is None else decode(self, run, *args, **kwargs)

    def _prefill(
        self,
        input_ids: torch.Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        image_cache, chunked = model_kwargs.pop("image_cache", None), generation_config.prefill_chunk_size
        if image_cache is None:
            images = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
            if chunked and self.config.multimodal_attention == "mmca_reference":
                raise ValueError(
                    "prefill_chunk_size does not go with multimodal_attention='mmca_reference', under which text sees later "
                    "images; omit it."
                )
            if chunked and images is not None and not CHUNKED_PREFILL_TAKES_IMAGES:
                raise ValueError(
                    "prefill_chunk_size does not go with images in transformers below 5.23, which drops them; omit it, or "
                    "install transformers 5.23 or newer."
                )
            return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)
        for option in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
            if getattr(generation_config, option, None):
                raise ValueError(
                    f"{option} concerns all tokens of a prompt, but with an image KV cache only its text is computed; omit "
                    "it, or pass pixel_values."
                )
        if model_kwargs.get(CACHE) is None:
            raise ValueError("An image KV cache is copied into a KV cache; leave use_cache at True.")
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
        image_cache: Any = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one generation step, with the modality of the whole sequence."""
        if image_cache is not None:  # `_prefill` would have taken it
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
        shares_positions, is_causal = self.config.image_positions == "image", self.config.multimodal_attention == "causal"
        if (is_causal and not shares_positions) or mm_token_type_ids is None:
            return inputs
        static = cache is not None and cache.is_compileable
        known = cached_types(cache)
        if static and not is_first_iteration and known is not None:
            past = known.shape[1]  # reading the length of a static cache would wait for the device
        else:
            past = int(cache.get_seq_length()) if cache is not None else 0
        types = _whole_types(mm_token_type_ids, input_ids, known, past + new.shape[1])
        is_step = static and new.shape[1] == 1
        may_hold_images = None
        if cache is not None and (is_step or (static and shares_positions)):  # a compiled call cannot remember anything
            positions = None
            if shares_positions:
                positions = whole_positions(kwargs.get("position_ids"), types, attention_mask, cache)
            may_hold_images = sequence_may_hold_images(types, cache, new_images=False if is_step else None)
            remember_types(cache, types, may_hold_images, positions)
        if cache is not None and is_step and not is_causal:
            self._add_static_step(inputs, types, may_hold_images, attention_mask, cache)
        elif not static or not is_causal:  # nothing that a compiled step takes may grow
            inputs["mm_token_type_ids"] = types
        return inputs

    def _add_static_step(
        self,
        inputs: dict[str, Any],
        token_types: torch.Tensor,
        may_hold_images: bool | None,
        attention_mask: torch.Tensor | None,
        cache: Cache,
    ) -> None:
        """Give a decode step its mask, in a fixed shape: nothing that a compiled step takes may grow."""
        config, attention = self.model.language_model.config, self.config.multimodal_attention
        if attention == "mmca_reference" or may_hold_images:
            inputs["attention_mask"] = None
            inputs["step_codes"] = step_codes(config, attention, token_types, self.dtype, attention_mask, cache)
            return
        inputs["attention_mask"] = create_masks_for_generate(
            config=config,
            inputs_embeds=torch.empty((len(token_types), 1, 0), dtype=self.dtype, device=token_types.device),
            attention_mask=attention_mask,
            position_ids=inputs.get("position_ids"),
            **{CACHE: cache},
        )

    @property
    def create_masks_for_generate(self) -> Callable:
        """`GenerationMixin` calls this for a static cache. Under MMCA masks are built in `_add_static_step`."""
        if self.config.multimodal_attention == "causal":
            return create_masks_for_generate
        return lambda *args, attention_mask=None, **kwargs: attention_mask


def _new_images(total: list[int], new: list[int], lengths: list[int]) -> list[int]:
    """Of the images of a whole conversation, the indices of those of the new tokens; of new images alone, all.

    Args:
        total, new: the number of image tokens of each sample: of all its tokens, and of the new ones.
        lengths: the number of tokens of each image.
    """
    if sum(lengths) != sum(total):
        return list(range(len(lengths)))
    kept, sample, begin, end = [], 0, 0, total[0]
    for index, length in enumerate(lengths):
        while begin >= end and sample + 1 < len(total):
            sample += 1
            end += total[sample]
        if begin >= end - new[sample]:
            kept.append(index)
        begin += length
    return kept


def _whole_types(types: torch.Tensor, input_ids: torch.Tensor, known: torch.Tensor | None, total: int) -> torch.Tensor:
    """The modality of all `total` tokens of a generation step, from the types that `generate` has for `input_ids`.

    `input_ids` is the whole sequence, or the tokens after a cache. Assisted decoding passes the types of the prompt alone;
    tokens generated since are text.
    """
    types = nn.functional.pad(types, (0, max(input_ids.shape[1] - types.shape[1], 0)))
    if known is not None:  # the cache's tokens were computed with the modality that it remembers
        held = min(known.shape[1], total)
        before = max(total - types.shape[1], 0)  # tokens that `types` does not cover
        types = torch.cat([known[:, :held].to(types.device), types[:, max(held - before, 0) :]], dim=1)
    return types[:, :total]


__all__ = ["DSVLGenerationMixin", "NoImageToken"]

"""`generate` for prompts of text, and over image KV caches, with less Python before the model runs.

In every call transformers prepares the generation configuration, special tokens, inputs and the KV cache anew: 3 ms on the
host of an H100, before a prefill of 8. Here what depends on the options alone is prepared once, by its own methods.
"""

import copy
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import distributed
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from ...generation_dsvl import IMAGE_INPUTS
from ...transformers_dsvl import CACHE, gathers_weights
from ...utils.transformers_names import GenerationMode
from ..reuse.applicability import takes_image_cache

# The arguments of a call that are no options of its configuration.
_MODEL_INPUTS = frozenset(("input_ids", "attention_mask", "mm_token_type_ids", "image_cache", CACHE))
_CALL_ARGUMENTS = frozenset(("generation_config", "logits_processor", "stopping_criteria", "streamer"))
_PLAIN_TYPES = (bool, int, float, str, type(None))
# Options that need what is not prepared here, beside beams and assistants: only these values will do.
_NEEDED = {
    "num_return_sequences": (None, 1),
    "use_cache": (True,),
    "cache_implementation": (None, "dynamic", "static"),
    "min_length": (None, 0),
    "min_new_tokens": (None,),
    "prefill_chunk_size": (None,),
    "token_healing": (None, False),
    "return_dict_in_generate": (None, False),
    "guidance_scale": (None, 1),
    "encoder_repetition_penalty": (None, 1),
    "encoder_no_repeat_ngram_size": (None, 0),
    "stop_strings": (None,),
    "compile_config": (None,),
    "is_assistant": (None, False),
}


@dataclass
class _Prepared:
    """What `GenerationMixin.generate` makes of options.

    Attributes:
        options: the options of the call.
        given: the attributes of its `generation_config`, if it has one.
        defaults: the attributes of the model's.
        device: of the inputs.
        config: the resulting configuration; None if a call with these options is left to transformers.
        cache: an empty dynamic KV cache, which is copied; None if another kind is wanted.
    """

    options: dict[str, Any]
    given: dict[str, Any] | None
    defaults: dict[str, Any]
    device: torch.device
    config: GenerationConfig | None
    cache: DynamicCache | None

    def is_for(self, model: Any, options: dict[str, Any], given: Any, device: torch.device) -> bool:
        return (
            self.options == options
            and self.device == device
            and self.given == (None if given is None else vars(given))
            and self.defaults == vars(model.generation_config)
        )


_KEPT = 4  # sets of options for each model
_PREPARED: "WeakKeyDictionary[Any, list[_Prepared]]" = WeakKeyDictionary()


def generate(model: Any, run: Any, inputs: torch.Tensor | None, *args: Any, **kwargs: Any) -> Any:
    """`GenerationMixin.generate`. Greedy search and sampling after a prompt of text, or over an image KV cache, begin here;
    everything else is left to transformers.

    Args:
        model: a `DSVLForConditionalGeneration`.
        run: its `GenerationMixin.generate`.
        inputs, ...: the arguments of `GenerationMixin.generate`, and `image_cache`.
    """
    _encode_new_images(model, inputs, kwargs)
    prepared = None if args else _prepared_for(model, inputs, kwargs)
    if prepared is None or prepared.config is None:
        return run(inputs, *args, **kwargs)
    input_ids, mask = kwargs["input_ids"] if inputs is None else inputs, kwargs["attention_mask"]
    is_whole, ends_with_tokens = torch.stack([(mask == 1).all(), (mask[:, -1] != 0).all()]).tolist()
    if not ends_with_tokens:  # of which transformers warns
        return run(inputs, **kwargs)
    device, length = input_ids.device, input_ids.shape[1]

    config = copy.copy(prepared.config)
    config.max_length = config.max_new_tokens + length
    model_kwargs = {name: kwargs[name] for name in _MODEL_INPUTS - {"input_ids"} if name in kwargs}
    if is_whole and model.config.image_positions == "token":
        model_kwargs["position_ids"] = torch.arange(mask.shape[1], device=device).expand(mask.shape)
    else:
        model_kwargs["position_ids"] = model._prepare_position_ids_for_generation(input_ids, model_kwargs)
    if is_whole:
        model_kwargs["attention_mask"], config._mask_length = None, mask.shape[1]
    streamer = kwargs.get("streamer")
    if streamer is not None:
        streamer.put(input_ids.cpu())
    model_kwargs["logits_to_keep"] = 1
    if model_kwargs.get(CACHE) is None and prepared.cache is not None:
        model_kwargs[CACHE] = _like(prepared.cache)
    else:
        mode = config.get_generation_mode()
        model._prepare_cache_for_generation(config, model_kwargs, mode, len(input_ids), config.max_length - 1)
    processors = model._get_logits_processor(
        config,
        length,
        logits_processor=kwargs.get("logits_processor") or LogitsProcessorList(),
        device=device,
        model_kwargs=model_kwargs,
    )
    criteria = model._get_stopping_criteria(config, kwargs.get("stopping_criteria") or StoppingCriteriaList())
    model_kwargs["use_cache"] = True
    if streamer is not None:
        model_kwargs["streamer"] = streamer
    return model._sample(
        input_ids,
        logits_processor=processors,
        stopping_criteria=criteria,
        generation_config=config,
        synced_gpus=False,
        **model_kwargs,
    )


def _encode_new_images(model: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> None:
    """After `compile_text_prefill`, encode images behind the tokens of a KV cache: both images and text are compiled then,
    where one call for all tokens would not be. Changes the arguments in place."""
    pixels, cache = kwargs.get("pixel_values"), kwargs.get(CACHE)
    if pixels is None or cache is None or model.model.image_reuse.compiled is None:
        return
    if model.training or kwargs.get("assistant_model") is not None or gathers_weights(model):
        return
    images = {name: kwargs[name] for name in IMAGE_INPUTS if kwargs.get(name) is not None}
    lengths = model.config.tile_lengths(len(pixels), images.get("spatial_shapes"))
    input_ids = kwargs.get("input_ids") if inputs is None else inputs
    if int(cache.get_seq_length()) > 0 and takes_image_cache(model, input_ids, lengths, kwargs):
        if getattr(model.config, "numbered_images", 0):  # older code has no field
            images["image_numbers"] = kwargs.pop("image_numbers", None)
        kwargs["image_cache"] = model.encode_images(**images)
        kwargs["image_cache"].numbers = None  # they are those of the call: nothing to compare
        for name in images:
            kwargs.pop(name, None)


def _prepared_for(model: Any, inputs: torch.Tensor | None, kwargs: dict[str, Any]) -> _Prepared | None:
    """What is prepared for a call; None if it is no such call."""
    options = {name: value for name, value in kwargs.items() if name not in _MODEL_INPUTS and name not in _CALL_ARGUMENTS}
    input_ids, mask, given = kwargs.get("input_ids"), kwargs.get("attention_mask"), kwargs.get("generation_config")
    ids = input_ids if inputs is None else inputs
    if (
        not isinstance(ids, torch.Tensor)
        or (inputs is not None and input_ids is not None)
        or ids.dtype != torch.long
        or ids.ndim != 2
        or not isinstance(mask, torch.Tensor)
        or mask.ndim != 2
        or mask.device != ids.device
        or mask.shape[0] != ids.shape[0]
        or ids.numel() == 0
        or ids.device != model.device
        or not all(isinstance(value, _PLAIN_TYPES) for value in options.values())
        or isinstance(kwargs.get(CACHE), tuple)
        or (distributed.is_available() and distributed.is_initialized())
    ):
        return None
    kept = _PREPARED.setdefault(model, [])
    for one in kept:
        if one.is_for(model, options, given, ids.device):
            return one
    made = _prepare(model, options, given, ids.device)
    kept[_KEPT - 1 :] = []
    kept.insert(0, made)
    return made


def _prepare(model: Any, options: dict[str, Any], given: Any, device: torch.device) -> _Prepared:
    defaults = copy.deepcopy(vars(model.generation_config))
    own = None if given is None else copy.deepcopy(vars(given))
    made = _Prepared(options, own, defaults, device, None, None)
    names = vars(GenerationConfig()).keys()
    lengths = options.get("max_length"), (own or {}).get("max_length"), defaults.get("max_length")
    if not options.keys() <= names or any(length is not None for length in lengths):
        return made
    config, others = model._prepare_generation_config(given, **options)
    modes = GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE
    if (
        others
        or config.get_generation_mode() not in modes
        or not config.max_new_tokens
        or any(getattr(config, name, None) not in values for name, values in _NEEDED.items())
    ):
        return made
    model._prepare_special_tokens(config, True, device=device, batch_size=1)
    made.config = config
    if config.cache_implementation in (None, "dynamic"):
        model_kwargs: dict[str, Any] = {}
        model._prepare_cache_for_generation(config, model_kwargs, config.get_generation_mode(), 1, 1)
        cache = model_kwargs.get(CACHE)
        made.cache = cache if type(cache) is DynamicCache else None
    return made


def _like(empty: DynamicCache) -> DynamicCache:
    """Another empty KV cache."""
    cache = copy.copy(empty)
    cache.layers = []
    for layer in empty.layers:
        other = object.__new__(type(layer))  # `copy.copy` takes ten times as long
        other.__dict__.update(layer.__dict__)
        cache.layers.append(other)
    return cache


__all__ = ["generate"]

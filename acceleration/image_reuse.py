"""Exact reuse of images: the keys and values that a decoder computes for an image, put into other prompts at any position.

Under `"mmca"` an image token attends to itself alone, so its path through the decoder depends on its image only, and with
`numbered_images` on the number of the image, which its embedding holds. Positions enter as the rotation of its keys, which
can be applied later. `ImageReuse.encode` runs the unmodified decoder over image tokens at position 0, where the rotation is
the identity; `KeyRotation` rotates the keys to where they are used, by the decoder's own function; `ImageReuse.prefill` runs
the text of a prompt over them.
"""

import weakref
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache

from ..cache_dsvl import cached_types
from ..inputs_dsvl import check_image_numbers, check_num_tiles, check_tiles_are_told
from ..masks_dsvl import AttentionMask, visibilities
from ..transformers_dsvl import BaseModelOutputWithPooling
from .attention.gathered_mask import Slots
from .attention.key_rotation import KeyRotation, probe_rotation, rotate_keys
from .decoder_run import head_size, run_decoder
from .parallel.split_images import SplitImageKVCache, SplitPrefillMask
from .recording import let_compiled_functions_record
from .reuse.compiled_prefill import TEXT_MULTIPLE, TILES_ALONE, CompiledPrefill, own_options, recording_options, run_images
from .reuse.fingerprint import fingerprint_of
from .reuse.image_cache import ImageKVCache, changing_ropes, lengths_by_image
from .reuse.shared_images import SharedImages, SharedPrompt, shares_images
from .reuse.text_prefill import (
    CopiedImages,
    EarlierTokens,
    TextPrefillMask,
    can_extend,
    image_token_order,
    new_tokens,
    remember_prompt,
)


class ImageReuse:
    """Encodes images into an `ImageKVCache`, and runs prompts over it.

    With `numbered_images`, keys and values of an image also depend on its number, which the `ImageKVCache` records.

    Args:
        model: a `DSVLModel`.

    Attributes:
        text_multiple: to a multiple of which the text of prompts is padded, so that few lengths are compiled.
        compiled: the compiled functions, after `compile`.
        weight_changes: how often `fingerprint` found that weights may have changed, in whatever number of them.
    """

    takes_numbers = True  # for the code of checkpoints, which older packages do not know

    def __init__(self, model: Any) -> None:
        # Weak, as the model holds this object: a model that is deleted frees its memory at once.
        self._model = weakref.ref(model)
        self.text_multiple = 1
        self.compiled: CompiledPrefill | None = None
        self.run_decoder: Callable = run_decoder
        self._rotate_keys: Callable = rotate_keys
        self._rotation: KeyRotation | None = None
        self._fingerprint: tuple[str, list[nn.Parameter], list[int]] | None = None
        self._is_fresh = False
        self.weight_changes = 0

    @property
    def model(self) -> Any:
        """The `DSVLModel`."""
        return self._model()

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`, which cannot copy a weak reference: the copy belongs to the model's copy."""
        return self.__dict__ | {"_model": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _model=weakref.ref(state["_model"]))

    @torch.no_grad()
    def encode(
        self,
        pixel_values: torch.Tensor,
        chunk_size: int = 16,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        num_tiles: torch.Tensor | Sequence[int] | None = None,
        image_numbers: torch.Tensor | Sequence[int] | None = None,
        quantize: bool = False,
        offload: bool = False,
    ) -> ImageKVCache:
        """Run tower, projector and decoder over images alone; see `DSVLModel.encode_images`."""
        number = len(pixel_values)
        if number == 0:
            raise ValueError("pixel_values hold no image, so there is nothing to encode; pass at least one.")
        counts = [1] * number if num_tiles is None else [int(count) for count in num_tiles]
        check_num_tiles(sum(counts), number)
        if min(counts) < 1:
            raise ValueError(f"num_tiles={counts}, but every image has a tile; pass those that the processor returned.")
        numbers = self.numbers_of(image_numbers, len(counts), num_tiles)
        of_tiles = None if numbers is None else torch.tensor(numbers).repeat_interleave(torch.tensor(counts))
        self.rotation(pixel_values.device)  # which refuses models whose images cannot be reused
        decoder = self.model.language_model
        dtype = decoder.get_input_embeddings().weight.dtype
        fingerprint = self.fingerprint()
        whole: dict[str, torch.Tensor] = {}
        lengths: list[int] = []
        filled = 0
        for start in range(0, number, chunk_size):
            chunk, of_native = slice(start, start + chunk_size), (pixel_attention_mask, spatial_shapes)
            encoded = self._encode_tiles(pixel_values[chunk], *(None if part is None else part[chunk] for part in of_native))
            if of_tiles is not None:
                images = BaseModelOutputWithPooling(pooler_output=encoded)
                encoded = self.model.number_images(images, of_tiles[chunk]).pooler_output
            lengths += map(len, encoded)
            embeds = torch.cat(encoded).to(dtype)[None]  # one row, as each token attends to itself alone
            run = run_images if self.compiled is None else self.compiled.images
            chunk_keys, chunk_values = run(decoder, embeds)
            made = ImageKVCache(chunk_keys, chunk_values, fingerprint, [lengths[start:]])
            made = made.quantize() if quantize else made
            if not whole:  # reserved at once, as joining the chunks would take twice their memory
                tokens = sum(self.model.config.tile_lengths(number, spatial_shapes))
                whole = {name: _reserve_like(tensor, tokens, offload) for name, tensor in made.tensors.items()}
            for name, tensor in made.tensors.items():
                whole[name][:, filled : filled + embeds.shape[1]].copy_(tensor)
            filled += embeds.shape[1]
        tile_lengths = lengths_by_image(lengths, counts)
        others: dict[str, Any] = {**whole, "is_offloaded": offload, "numbers": numbers}
        return ImageKVCache(fingerprint=fingerprint, tile_lengths=tile_lengths, **others)

    def numbers_of(
        self,
        given: torch.Tensor | Sequence[int] | None,
        images: int,
        num_tiles: torch.Tensor | Sequence[int] | None,
    ) -> list[int] | None:
        """The numbers of images, in models with `numbered_images`: 1, 2, ... by default.

        Raises:
            ValueError: if these are not as many as images, the model has none, or tiles cannot be told from images.
        """
        numbered_images = getattr(self.model.config, "numbered_images", 0)  # older code has no field
        if given is not None:
            check_image_numbers(len(given), images, numbered_images)
            return [int(number) for number in given]
        if not numbered_images:
            return None
        check_tiles_are_told(self.model.config.image_layout, num_tiles)
        return list(range(1, images + 1))

    def _encode_tiles(
        self, pixel_values: torch.Tensor, pixel_attention_mask: torch.Tensor | None, spatial_shapes: torch.Tensor | None
    ) -> list[torch.Tensor]:
        """Tower and projector: for each tile (tokens, hidden)."""
        if self.compiled is None or spatial_shapes is not None or len(pixel_values) > TILES_ALONE:
            return list(self.model.encode(pixel_values, pixel_attention_mask, spatial_shapes).pooler_output)
        let_compiled_functions_record(pixel_values.device)
        # Copies, as the next run of a CUDA graph overwrites its outputs.
        return [self.compiled.tile(self.model, tile).clone() for tile in pixel_values.split(1)]

    @torch.no_grad()
    def prefill(
        self,
        input_ids: torch.Tensor,
        image_cache: ImageKVCache | SplitImageKVCache,
        cache: Cache | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        copies: int = 1,
    ) -> tuple[torch.Tensor, Cache]:
        """Run the text tokens of prompts, and fill a KV cache with text and images.

        The decoder runs once over the text tokens, at their own positions. A text query sees the text keys of this call and
        the rotated keys of the images, as far as the decoder's own mask allows. Then text and images are put into the KV
        cache in the order of the prompt, as after an ordinary prefill.

        Args:
            input_ids: (batch, tokens), as the processor makes them, with the image tokens in the order of `image_cache`;
                every row ends with text. With a KV cache of earlier turns, those of the whole conversation, or the new ones
                with the attention mask of all.
            image_cache: the images of all rows; those of the new tokens alone, if the KV cache holds some. With
                `numbered_images` they hold the numbers that they have in their rows. Images that are spread over processes
                need an empty, dynamic KV cache.
            cache: an empty KV cache of any kind; a dynamic one by default. Or a dynamic or static one without sliding
                windows that this model has filled with the tokens before.
            attention_mask: (batch, tokens), 0 where padded, on the left.
            position_ids: (batch, tokens), of all or of the new ones; by default they count tokens that are not padded, as in
                `generate` under `image_positions="token"`. (The model's own `prefill` passes those of "image".)
            copies: the number of consecutive rows with the same prompt and images, as in beam search.

        Returns:
            The last hidden state of every row's last token, (batch, 1, hidden), and the cache.

        Raises:
            ValueError: if image tokens and images do not match, images hold other numbers than in the prompt, the KV cache
                holds tokens and is of another kind, or the image KV cache belongs to another model.
        """
        decoder = self.model.language_model
        config = decoder.config
        split = image_cache if isinstance(image_cache, SplitImageKVCache) else None
        if isinstance(image_cache, SplitImageKVCache):
            image_cache = self._own_images(image_cache)
        if cache is None:
            cache = DynamicCache(config=config)
        rotation = self.rotation_for(image_cache)
        past, device = int(cache.get_seq_length()), self._device_for(image_cache)
        if past > 0 and (copies > 1 or not can_extend(cache)):
            raise ValueError(
                f"The KV cache, a {type(cache).__name__}, holds {past} tokens, which images of an image KV cache cannot "
                "follow (only one answer each, in a dynamic or static KV cache without sliding windows that this model has "
                "filled); pass the whole conversation with all its images and an empty KV cache."
            )
        input_ids = new_tokens(input_ids, past, attention_mask, position_ids)
        batch, tokens = input_ids.shape
        input_ids = input_ids.to(device)
        is_image = input_ids == self.model.config.image_token_id
        is_text = ~is_image
        if attention_mask is not None:
            attention_mask = attention_mask.to(device)
            is_text = is_text & attention_mask[:, past:].bool()
        token_types = is_image.long()
        if split is not None:
            is_image = split.own_tokens(is_image, copies, self.model.config.image_seq_length)
        if position_ids is None:
            seen = attention_mask if attention_mask is not None else input_ids.new_ones(batch, past + tokens)
            position_ids = (seen.long().cumsum(-1) - 1).clamp(min=0)
        position_ids = position_ids[:, -tokens:].to(device).expand(batch, tokens)

        # Everything that the host needs, in one device-to-host copy.
        figures = [is_image.sum(-1), is_text.sum(-1), is_text[:, -1].long()]
        all_images = image_cache if split is None else split
        if all_images.numbers is not None and past > 0 and (held := cached_types(cache)) is not None:
            figures.append((held[:, :past] == 1).sum(-1).to(device))
        image_counts, text_counts, ends_with_text, *cached_counts = torch.stack(figures).tolist()
        shared = shares_images(cache, image_cache, self.model, is_split=split is not None)
        if shared and past > 0:
            raise ValueError(
                f"The KV cache holds {past} tokens, so it cannot share images in 8 bits, on the host or on other processes; "
                "pass image_cache.to(model.device, model.dtype), or the whole conversation and an empty KV cache."
            )
        # Rows of one prompt share its images.
        row_counts, row_copies = (image_counts[::copies], 1) if shared else (image_counts, copies)
        has_images = split is None or split.own is not None
        order: torch.Tensor | None = torch.zeros(len(row_counts), dtype=torch.long)
        if has_images:
            order = image_token_order(row_counts, image_cache.tile_lengths, row_copies)
        if all_images.numbers is not None:
            all_counts = image_counts if split is None else token_types.sum(-1).tolist()
            cached = cached_counts[0] if cached_counts else [0] * batch
            counts = list(zip(cached[::copies], all_counts[::copies], strict=True))
            check_numbers(all_images.numbers, all_images.tile_lengths, counts, self.model.config)
        if not all(ends_with_text):
            raise ValueError(
                f"Row {ends_with_text.index(0)} of the prompts ends with an image or with padding, but an image KV cache "
                "has no hidden state to continue from; end prompts with text, and pad them on the left."
            )
        text = Slots.gather(is_text, text_counts, self.text_multiple)
        of_prompt = token_types, attention_mask, position_ids, True
        compiled, slots = self.compiled, None
        if compiled is not None and not shared and split is None:
            slots = compiled.slots_for(decoder, cache, past, batch, tokens)
        if compiled is not None and slots is not None:
            earlier_types = None if past == 0 else cached_types(cache)
            inputs = input_ids, is_image, position_ids, attention_mask, text, text_counts, copies
            hidden = compiled.prefill(decoder, (image_cache, rotation), cache, past, slots, *inputs)
            remember_prompt(self.model.config, cache, past, earlier_types, *of_prompt)
            return hidden[:, -1:].clone(), cache
        earlier = EarlierTokens.build(cache, attention_mask) if past > 0 else None
        image = Slots.gather(is_image, image_counts) if has_images else Slots.empty(batch, device)
        image_positions = position_ids.gather(1, image.index)
        images: SharedImages | CopiedImages
        if shared:
            group = None if split is None else split.group
            shape = SharedPrompt(image.every(copies), text.every(copies), tokens, copies, group=group)
            images = SharedImages.build(image_cache, rotation, shape, image_positions[::copies].flatten(), order)
        else:
            keys, values = image_cache.keys, image_cache.values
            if order is not None:
                order = order.to(device)
                keys, values = keys[:, order], values[:, order]
            keys = rotation(keys, image_positions.flatten(), self._rotate_keys)
            # The large copies start before the decoder runs, while the host prepares the rest.
            padded = any(i + t < tokens for i, t in zip(image_counts, text_counts, strict=True))
            images = CopiedImages.build(keys, values, image, text, tokens, padded)

        embeds = decoder.get_input_embeddings()(input_ids.gather(1, text.index))
        softcapped = getattr(config, "attn_logit_softcapping", None) is not None
        prompt = torch.empty((batch, tokens, 0), dtype=embeds.dtype, device=device)
        options = text, image, images, config._attn_implementation, softcapped
        masks: dict[str | None, AttentionMask] = {
            kind: TextPrefillMask.build(one, *options, earlier)
            if split is None
            else SplitPrefillMask.over(one, *options, split.group)
            for kind, one in visibilities(config, prompt, attention_mask, cache if past > 0 else None).items()
        }
        # What reads images layer by layer is not part of a graph that is compiled for all layers.
        run = run_decoder if shared or past > 0 else self.run_decoder
        let_compiled_functions_record(device)
        hidden, text_keys, text_values, devices = run(decoder, embeds, position_ids.gather(1, text.index), masks)
        images.fill(cache, text_keys, text_values, devices)
        earlier_types = None if earlier is None else earlier.types
        remember_prompt(self.model.config, cache, past, earlier_types, *of_prompt)
        return hidden[:, -1:].clone(), cache  # the next run of a CUDA graph overwrites its outputs

    def _own_images(self, split: SplitImageKVCache) -> ImageKVCache:
        """The images of this process; a token that nothing sees if it has none."""
        if split.own is not None:
            return split.own
        config, table = self.model.language_model.config, self.model.language_model.get_input_embeddings().weight
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        states = table.new_zeros(config.num_hidden_layers, 1, heads, head_size(config))
        return ImageKVCache(states, states, self.fingerprint(), [[1]])

    def compile(self, **options: Any) -> None:
        """Compile the decoder's run over text and over images, the vision tower, and the rotation of keys.

        The first prompt then waits for the compilation, and so does the first image. With causal attention under sdpa, all
        later prompts and turns use the same graphs, whatever their lengths. With other decoders and backends, a GPU
        records the decoder as a CUDA graph, once for each number of images and every 32 tokens of text.

        Images that `generate` gets as pixels behind the tokens of a KV cache are then encoded first, too.

        Args:
            options: of `torch.compile`.

        Raises:
            ValueError: if the images of this model cannot be reused.
        """
        self.rotation(self.model.get_input_embeddings().weight.device)
        self.compiled = CompiledPrefill(self.model, options)
        options = recording_options(self.model, options)
        self.run_decoder = torch.compile(run_decoder, **own_options(options))
        if options.get("mode") in ("reduce-overhead", "max-autotune"):  # a graph may not read what another one overwrites
            options["mode"] = "default"
        self._rotate_keys = torch.compile(rotate_keys, **own_options(options))
        self.text_multiple = TEXT_MULTIPLE

    def rotation(self, device: torch.device) -> KeyRotation:
        """How the decoder rotates keys. The first call runs eight tokens through the decoder.

        Raises:
            ValueError: if keys and values of an image depend on more than the image, or the rotation is of another kind.
        """
        config = self.model.config
        ropes = changing_ropes(config.text_config)
        for wrong, depends in (
            (config.multimodal_attention != "mmca", f"multimodal_attention={config.multimodal_attention!r}"),
            (config.reversed_images, "reversed_images=True"),
            (bool(ropes), f"positions of the kind {', '.join(ropes)}"),
        ):
            if wrong:
                raise ValueError(
                    f"With {depends} what the decoder computes for an image depends on more than the image, so it cannot be "
                    "reused; pass pixel_values instead of an image KV cache."
                )
        dtype = self.model.language_model.get_input_embeddings().weight.dtype
        if self._rotation is None or self._rotation.dtype != dtype:
            like = torch.empty(0, dtype=dtype, device=device)
            self._rotation = probe_rotation(self.model.language_model, like)
        return self._rotation

    def rotation_for(self, cache: ImageKVCache) -> KeyRotation:
        """How the keys of a cache are rotated.

        Raises:
            ValueError: if the cache belongs to another model, or has another dtype or device.
        """
        if cache.fingerprint != self.fingerprint():
            raise ValueError(
                f"The image KV cache was encoded by another model (fingerprint {cache.fingerprint[:12]}, this one's is "
                f"{self.fingerprint()[:12]}), or by this one before its weights changed; encode the images again."
            )
        device = self.model.language_model.device
        if not cache.is_offloaded and device not in (cache.device, torch.device("meta")):
            raise ValueError(
                f"The image KV cache is on {cache.device}, but the model on {device}; pass image_cache.to(model.device), or "
                "image_cache.offload() to leave it on the host."
            )
        rotation = self.rotation(self._device_for(cache))
        if not cache.is_quantized and cache.dtype != rotation.dtype:
            raise ValueError(
                f"The image KV cache is {cache.dtype}, but the decoder's keys are {rotation.dtype}; pass "
                f"image_cache.to({rotation.dtype})."
            )
        return rotation

    def _device_for(self, cache: ImageKVCache) -> torch.device:
        """Where prompts over an image KV cache are computed."""
        return self.model.language_model.get_input_embeddings().weight.device if cache.is_offloaded else cache.device

    def fingerprint(self) -> str:
        """A hash that ties an image KV cache to this model: of its configuration, and of samples of every weight that
        influences an image. It is computed again when a weight has changed, or after `train()` and `eval()`."""
        known, is_same = self._fingerprint, False
        if known is not None:
            is_same = [p._version for p in known[1]] == known[2]
            if is_same and self._is_fresh:
                return known[0]
        digest, parameters = fingerprint_of(self.model)
        own = digest, parameters, [p._version for p in parameters]
        self._fingerprint, self._is_fresh = own, True
        if known is None or own[0] != known[0] or not is_same:
            self.weight_changes += 1
        return own[0]

    def forget_fingerprint(self) -> None:
        """Compute the fingerprint again when it is next needed."""
        self._is_fresh = False


def check_numbers(
    numbers: Sequence[int], tile_lengths: Sequence[Sequence[int]], counts: Sequence[tuple[int, int]], config: Any
) -> None:
    """Compare the numbers that encoded images hold with those that they have in prompts.

    Args:
        numbers, tile_lengths: of the images of all rows.
        counts: the image tokens of each row: in the KV cache, and after it.
        config: the model's. Where its images can have any number of tokens, how many the KV cache holds is not known.

    Raises:
        ValueError: if an image holds another number.
    """
    is_tiled, varies = config.image_layout == "tiles", config.image_layout in ("tiles", "native")
    images = iter(zip(numbers, tile_lengths, strict=True))
    for cached, count in counts:
        own: list[int] = []
        alone: list[bool] = []  # single tiles may be parts of an image that come one by one, each with its number
        while count > 0:
            number, lengths = next(images)
            own.append(number)
            alone.append(is_tiled and len(lengths) == 1)
            count -= sum(lengths)
        follows = zip(pairwise(own), pairwise(alone), strict=True)
        grows = all(after - before in ({0, 1} if all(tiles) else {1}) for (before, after), tiles in follows)
        begins = not own or (own[0] > 1 if varies and cached else own[0] == cached // config.image_seq_length + 1)
        if not grows or not begins:
            raise ValueError(
                f"The images of a prompt hold the numbers {own}, but the first image of a prompt is 1, the next 2, those in "
                "the KV cache too; pass these as image_numbers to encode_images."
            )


def _reserve_like(part: torch.Tensor, tokens: int, offload: bool) -> torch.Tensor:
    """Memory for so many tokens like a part of them, (layers, tokens, ...); on the host if it is offloaded."""
    device = torch.device("cpu") if offload else part.device
    pinned = offload and part.device.type == "cuda"
    return torch.empty((len(part), tokens, *part.shape[2:]), dtype=part.dtype, device=device, pin_memory=pinned)


__all__ = ["ImageReuse"]

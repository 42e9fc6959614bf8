"""Images: encoded by tower and projector, and put in their places."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, Cache, PreTrainedConfig, PreTrainedModel

from .cache_dsvl import cached_types
from .configuration_dsvl import DSVLConfig, DSVLQwenVisionConfig
from .transformers_dsvl import (
    BaseModelOutputWithPooling,
    can_return_tuple,
    is_deepspeed_zero3_enabled,
    no_init_weights,
)
from .vision_dsvl import DSVLQwenVisionModel


def make_vision_tower(config: PreTrainedConfig) -> PreTrainedModel:
    """A tower of this configuration, with fresh weights."""
    if config.model_type == DSVLQwenVisionConfig.model_type:
        return DSVLQwenVisionModel._from_config(config)
    return AutoModel.from_config(config)


def tower_features(vision_tower: PreTrainedModel, config: DSVLConfig, pixel_values: torch.Tensor) -> torch.Tensor:
    """What a vision tower gives for images, before projection: (images, tower tokens, tower width).

    A tower with nothing to learn runs without a graph.
    """
    return run_tower(vision_tower, config, pixel_values).last_hidden_state


def run_tower(
    vision_tower: PreTrainedModel,
    config: DSVLConfig,
    pixel_values: torch.Tensor,
    output_hidden_states: bool = False,
    output_attentions: bool = False,
) -> BaseModelOutputWithPooling:
    """As `tower_features`, which are the `last_hidden_state` here; on request with the tower's states and attentions."""
    learns = torch.is_grad_enabled() and (
        pixel_values.requires_grad or any(p.requires_grad for p in vision_tower.parameters())
    )
    last = config.vision_feature_layer == -1
    options = {"output_attentions": True} if output_attentions else {}
    with torch.set_grad_enabled(learns):
        tower = vision_tower(
            pixel_values.to(vision_tower.dtype),
            output_hidden_states=output_hidden_states or not last,
            return_dict=True,
            **options,
        )
        features = tower.last_hidden_state if last else tower.hidden_states[config.vision_feature_layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, config.num_prefix_tokens :]
    return BaseModelOutputWithPooling(
        last_hidden_state=features,
        hidden_states=tower.hidden_states if output_hidden_states else None,
        attentions=tower.attentions if output_attentions else None,
    )


class HostCopy:
    """A tensor on its way to the host, which is asked for now and read later: the device is not waited for if it has come
    that far by then.

    `is_here` says that there is nothing to wait for: the tensor was on the host.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.is_here = not tensor.is_cuda
        self._event: torch.cuda.Event | None = None
        self._values = tensor
        if tensor.is_cuda:
            self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._values.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))

    def tolist(self) -> Any:
        """The values, as Python has them."""
        if self._event is not None:
            self._event.synchronize()
        return self._values.tolist()


class DSVLImagesMixin:
    """What `DSVLModel` does with images."""

    config: DSVLConfig
    vision_tower: PreTrainedModel
    multi_modal_projector: nn.Module
    training: bool
    get_input_embeddings: Callable[[], nn.Module]

    # -- encoding ------------------------------------------------------------------------------------------------------

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode and project images.

        A tower with nothing to learn runs without a graph.

        Args:
            pixel_values: (images, 3, height, width), any float dtype.
            kwargs: `output_hidden_states` and `output_attentions`, for the tower's; `return_dict`.

        Returns:
            `pooler_output`: a list with one (image_seq_length, decoder width) tensor for each image, ready to be passed
            back as `mm_encoder_outputs={"image": ...}`; `last_hidden_state`: the tower's features before projection; on
            request the tower's `hidden_states` and `attentions`. With `return_dict=False` a tuple of these.

        Raises:
            TypeError: for another keyword.
        """
        return self.encode_pixels(pixel_values, **kwargs)

    def encode_pixels(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """As `get_image_features`, whatever `config.return_dict` says."""
        tower = run_tower(self.vision_tower, self.config, pixel_values, **kwargs)
        tower.pooler_output = self.project_features(tower.last_hidden_state).pooler_output
        return tower

    def project_features(self, image_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """The second half of `get_image_features`, from the tower's features (images, tower tokens, tower width)."""
        projected = self.multi_modal_projector(image_features)
        return BaseModelOutputWithPooling(last_hidden_state=image_features, pooler_output=list(projected))

    def unused_tower_parameters(self) -> list[str]:
        """The tower's parameters, by name, on which the features do not depend: heads that pool, layers behind
        `vision_feature_layer`, tokens that only pre-training uses.

        Told by autograd, from a tower of shapes without values, so that it holds for a tower of any type.
        """
        config = copy.deepcopy(self.config.vision_config)
        config._attn_implementation = "eager"
        size = self.config.image_size
        with torch.device("meta"), no_init_weights(), torch.enable_grad():
            tower = type(self.vision_tower)(config).to(self.vision_tower.dtype).eval()
            features = tower_features(tower, self.config, torch.zeros(1, 3, size, size))
            names, parameters = zip(*tower.named_parameters(), strict=True)
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        return [name for name, gradient in zip(names, gradients, strict=True) if gradient is None]

    # -- placing -------------------------------------------------------------------------------------------------------

    def _scatter_images(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        is_image: torch.Tensor | None,
        types: torch.Tensor | None,
        features: torch.Tensor | None,
        whole_images: bool,
    ) -> tuple[torch.Tensor, Callable[[], None] | None]:
        """Put the images' embeddings (image tokens, hidden) where their placeholders are.

        Args:
            is_image: (batch, new tokens), True where an image goes.
            types: the caller's `mm_token_type_ids`, of the new tokens or of all.

        Returns:
            The embeddings; and on an accelerator what is to be called once the decoder has been given its work, and raises
            if images, placeholders and types do not match: by then the device can tell without being waited for.
        """
        tokens = inputs_embeds.shape[1]
        if is_image is None or (input_ids is None and features is None):
            return inputs_embeds, None  # embeddings that already hold their images
        check = None
        # A decode step has nothing to check that is worth waiting for a device.
        worth_it = features is not None or tokens > 1 or (types is not None and not inputs_embeds.is_cuda)
        # Under "mmca_reference" the image token can be generated, as in the released code.
        worth_it &= tokens > 1 or self.config.multimodal_attention != "mmca_reference"
        if not torch.compiler.is_compiling() and worth_it:
            number = 0 if features is None else len(features)
            told = [is_image.sum(-1)]
            # What "mmca_reference" generates is text, whatever its id.
            if types is not None and input_ids is not None and self.config.multimodal_attention != "mmca_reference":
                new = types[:, -tokens:].to(is_image.device)
                told += [new.sum(-1), ((new == 1) != is_image).sum(-1), types.amin(-1), types.amax(-1)]
            counts = HostCopy(torch.stack([part.to(is_image.device) for part in told]))

            def check_values() -> None:
                image_counts, *of_types = counts.tolist()
                if of_types:
                    self._check_types(image_counts, *of_types)
                self.check_counts(image_counts, number, whole_images)

            if counts.is_here or number > is_image.numel():
                check_values()
            else:
                check = check_values
        if features is None:
            return inputs_embeds, check
        # By places, as many as there are features: a mask's backward would ask the device how many it hides.
        places = (~is_image.flatten()).to(inputs_embeds.device, torch.uint8).argsort(stable=True)[: len(features)]
        # No view of something flat: compiled layers would tell the first one's input from the others'.
        return inputs_embeds.index_put((places // tokens, places % tokens), features), check

    def image_tokens(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor,
        types: torch.Tensor | None,
        has_images: bool,
    ) -> torch.Tensor | None:
        """Which of the new tokens are image tokens: (batch, tokens); None if that cannot be told.

        Args:
            inputs_embeds: (batch, tokens, hidden). Without ids and types, those that equal the image token's embedding are
                its places, if there are images to put there.
            types: `mm_token_type_ids`, of the new tokens or of all.
        """
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        if types is not None:
            return types[:, -inputs_embeds.shape[1] :] == 1
        if not has_images:
            return None
        image_token = torch.full((1,), self.config.image_token_id, dtype=torch.long, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds)).all(-1)

    def reverse_images(
        self,
        images: torch.Tensor,
        placeholders: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """Images in reading order, put in the order of the places that they take under `reversed_images`: each
        sample's own, or each packed conversation's, turned round.

        Args:
            images: those of the whole batch, (images, ...): their pixels, or their features.
            placeholders: (batch, new tokens), True where an image goes.
            position_ids: (batch or 1, new tokens), which begin again where packed conversations do.
            cache: what came before the new tokens.

        Raises:
            ValueError: if images are in the cache already: they took the places of those that come now.
        """
        cached = int(cache.get_seq_length()) if cache is not None else 0
        known = cached_types(cache)
        if cached > 0 and (known is None or bool((known[:, :cached] == 1).any())):
            raise ValueError(
                "config.reversed_images puts the last image first, but the cache may hold images already; pass the "
                "whole conversation without a cache."
            )
        order = _reversed_order(placeholders, len(images), self.config.image_seq_length, position_ids)
        return images[order.to(images.device)]

    def _others_may_see_images(self, cache: Cache | None) -> bool:
        """Whether a batch of texts must run the tower and the projector as well.

        In training, other processes may have images where this one has none, and wait for its gradients of the projector;
        under ZeRO-3 they wait for it at every layer of tower and projector, in evaluation too. Alone, a text-only batch is
        then one of zero gradients, rather than one without a graph.
        """
        parts = (self.multi_modal_projector, self.vision_tower)
        waited_for = is_deepspeed_zero3_enabled() or (
            self.training and torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.parameters())
        )
        # A decode step sees images nowhere. Asked last: a static cache's length is a tensor, on which no compiled step may
        # branch.
        return waited_for and (cache is None or cache.get_seq_length() == 0)

    def encode_blank_image(self, image_features: torch.Tensor | None = None) -> torch.Tensor:
        """Zero, by way of tower and projector: what a process without images does where others encode theirs.

        Args:
            image_features: an empty tensor of them, if those of the others are known: then by way of the projector alone.
        """
        if image_features is not None:
            features = image_features.new_zeros(1, *image_features.shape[1:])
            return self.project_features(features).pooler_output[0].sum() * 0
        size = self.config.image_size
        blank = torch.zeros((1, 3, size, size), dtype=self.vision_tower.dtype, device=self.vision_tower.device)
        return self.encode_pixels(blank).pooler_output[0].sum() * 0

    def check_placeholders(
        self, placeholders: torch.Tensor, features: int | None = None, whole_images: bool = False
    ) -> None:
        """Hold the samples' image tokens against the images.

        Args:
            placeholders: (batch, tokens), True for image tokens.
            features: how many embeddings there are to fill them all; None if that is not known yet.
            whole_images: whether every sample must hold whole images.

        Raises:
            ValueError: if they do not match.
        """
        self.check_counts(placeholders.sum(-1).tolist(), features, whole_images)

    def _check_types(
        self, image_counts: list[int], marked: list[int], contradictions: list[int], least: list[int], most: list[int]
    ) -> None:
        """Hold `mm_token_type_ids` against the placeholders among `input_ids`, by numbers of each sample.

        Raises:
            ValueError: for types other than 0 and 1, or that contradict the ids.
        """
        if min(least) < 0 or max(most) > 1:
            raise ValueError(
                f"mm_token_type_ids hold values from {min(least)} to {max(most)}; expected 1 for image tokens and 0 for all "
                "others."
            )
        if any(contradictions):
            raise ValueError(
                f"input_ids hold {image_counts} image tokens (id {self.config.image_token_id}), but mm_token_type_ids mark "
                f"{marked} as such and differ at {contradictions} places of the samples; pass those that the processor gave "
                "with these ids, or leave them out."
            )

    def check_counts(self, counts: list[int], features: int | None = None, whole_images: bool = False) -> None:
        """As `check_placeholders`, by the number of image tokens of each sample."""
        per_image = self.config.image_seq_length
        if features is not None and sum(counts) != features:
            raise ValueError(
                f"The samples hold {counts} image tokens, {sum(counts)} in all, but there are {features} image embeddings "
                f"({features / per_image:g} images of {per_image}); pass as many images as the texts name, in "
                "reading order, and do not truncate image tokens."
            )
        if whole_images and any(count % per_image for count in counts):
            raise ValueError(
                f"The samples hold {counts} image tokens, but an image takes {per_image}: some image is cut or mixed "
                "up; do not truncate image tokens, and use the processor saved with this model."
            )


def _reversed_order(
    placeholders: torch.Tensor, images: int, per_image: int, position_ids: torch.Tensor | None
) -> torch.Tensor:
    """The permutation that turns the images of each sample, or of each packed conversation, round.

    In fixed shapes, so that it can be compiled. If there are not as many images as places, it means nothing, and they are
    refused when they are put there.
    """
    rows, tokens = placeholders.shape
    sample = torch.arange(rows, device=placeholders.device)[:, None].expand(rows, tokens) * (tokens + 1)
    if position_ids is not None:  # a packed conversation begins at 0
        sample = sample + (position_ids == 0).to(placeholders.device).cumsum(-1)
    place = placeholders.flatten().cumsum(0) - 1
    first = placeholders.flatten() & (place % per_image == 0) & (place // per_image < images)
    target = torch.where(first, place // per_image, images)  # the last one takes what is no image's first place
    of_image = sample.new_zeros(images + 1).scatter(0, target, sample.flatten())[:images]
    start, end = torch.searchsorted(of_image, of_image), torch.searchsorted(of_image, of_image, right=True)
    return (start + end - 1 - torch.arange(images, device=sample.device)).clamp(0, images - 1)


__all__ = ["DSVLImagesMixin"]

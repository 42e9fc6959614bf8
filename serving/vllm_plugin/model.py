"""The model that vLLM runs: DSVL's vision tower and projector, and vLLM's own decoder with MMCA."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    StageMissingLayer,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.sequence import IntermediateTensors

from ...configuration_dsvl import DSVLConfig
from ...positions_dsvl import image_positions
from ...processing_dsvl import IMAGE_TOKEN
from ...projectors_dsvl import make_projector
from ...vision_dsvl import make_vision_tower, run_tower
from .attention import route_attention
from .processing import DSVLDummyInputs, DSVLMultiModalProcessor, DSVLProcessingInfo
from .settings import check_model, decoder_architecture

TOWER_PREFIX = "model.vision_tower."  # of weights in a checkpoint
# Of the tensors that a pipeline stage passes to the next.
MODALITY = "is_image"
KV_SCALES = ("k_scale", "v_scale", "kv_scale", "q_scale")


@MULTIMODAL_REGISTRY.register_processor(DSVLMultiModalProcessor, info=DSVLProcessingInfo, dummy_inputs=DSVLDummyInputs)
class DSVLForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsPP, SupportsLoRA, SupportsMRoPE):
    """A DSVL checkpoint in vLLM.

    Raises:
        ValueError: for a checkpoint or settings that are not served, see `check_model`, `DSVLSettings` and
            `route_attention`.
    """

    requires_raw_input_tokens = True  # beside embeddings, to tell image tokens
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            TOWER_PREFIX: "vision_tower.",
            "model.multi_modal_projector.": "multi_modal_projector.",
            "lm_head.": "language_model.lm_head.",
        }
    )
    # Of most decoders; each sets its own when it is built.
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return IMAGE_TOKEN if modality == "image" else None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        model_config = vllm_config.model_config
        config: DSVLConfig = model_config.hf_config
        self.config = config
        check_model(config)
        dtype = torch.get_default_dtype()
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[operator]
            # `AutoModel` makes a tower in the data type of its configuration.
            self.vision_tower = make_vision_tower(config.vision_config).to(dtype).eval()
            self.multi_modal_projector = make_projector(config)
        decoder = maybe_prefix(prefix, "language_model")
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=config.text_config,
                prefix=decoder,
                architectures=[decoder_architecture(config.text_config)],
            )
        self.packed_modules_mapping = getattr(self.language_model, "packed_modules_mapping", self.packed_modules_mapping)
        suppressed = (model_config.try_get_generation_config() or {}).get("suppress_tokens") or []
        self.forbidden_tokens = sorted({config.image_token_id, *suppressed})
        self.is_image: torch.Tensor | None = None
        if config.multimodal_attention == "mmca":
            self.is_image = torch.zeros(_most_tokens(vllm_config), dtype=torch.bool)
            route_attention(self.language_model, vllm_config, self.is_image, prefix=f"{decoder}.")

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        """The embeddings of images, in order: (image tokens of the image, hidden) each.

        Args:
            kwargs: `pixel_values`, and `num_tiles` or `spatial_shapes` and `pixel_attention_mask`, as the processor makes
                them.
        """
        pixel_values = kwargs.get("pixel_values")
        if pixel_values is None:
            return []
        spatial_shapes, num_tiles = kwargs.get("spatial_shapes"), kwargs.get("num_tiles")
        tower = run_tower(self.vision_tower, self.config, pixel_values, kwargs.get("pixel_attention_mask"), spatial_shapes)
        grids = None if spatial_shapes is None else [tuple(shape) for shape in spatial_shapes.tolist()]
        projected = self.multi_modal_projector(tower.last_hidden_state, grids)
        lengths = self.config.tile_lengths(len(projected), spatial_shapes)
        tiles = [tokens[:length] for tokens, length in zip(projected, lengths, strict=True)]
        if num_tiles is None:
            return tiles
        ends = num_tiles.flatten().cumsum(0).tolist()
        return [torch.cat(tiles[start:end]) for start, end in zip([0, *ends], ends, strict=False)]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[torch.Tensor, int]:
        """The positions of a prompt, (3, tokens), and what is added to the index of a token that follows.

        The rows are equal, but for image tokens in a model with `numbered_images`: there the second and third are the number
        of the image. The embeddings that vLLM caches hold no number, so that they fit any place in any prompt, and
        `forward`, which adds the number, is told nothing else about a token's image.
        """
        ids = torch.tensor(input_tokens)
        lengths: list[int] = []
        sizes: list[int] = []
        for feature in sorted(mm_features, key=lambda one: one.mm_position.offset):
            embedded = feature.mm_position.get_num_embeds()
            sizes.append(embedded)
            tile = embedded if self.config.image_layout == "native" else self.config.image_seq_length
            lengths += [tile] * (embedded // tile)
        is_image = (ids == self.config.image_token_id).long()
        if sum(lengths) != is_image.sum():
            raise ValueError(f"{int(is_image.sum())} image tokens in the prompt for images of {sum(lengths)} tokens.")
        positions = torch.arange(len(ids))
        if self.config.image_positions == "image":
            positions = image_positions(is_image[None], self.config.image_seq_length, lengths)[0]
        rows = positions.repeat(3, 1)
        if self.config.numbered_images:
            numbers = torch.arange(1, len(sizes) + 1)
            rows[1:, is_image == 1] = numbers.repeat_interleave(torch.tensor(sizes, dtype=torch.long))
        return rows, int(positions[-1]) + 1 - len(ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        numbers = None
        if positions.ndim == 2:  # rows of `get_mrope_input_positions`
            positions, numbers = positions[0], positions[1]
        if intermediate_tensors is not None:
            inputs_embeds = None
        is_image = None
        if self.is_image is not None:
            is_image = self.is_image[: positions.shape[0]]
            if intermediate_tensors is not None:  # a later pipeline stage may get no ids
                intermediate_tensors = IntermediateTensors(dict(intermediate_tensors.tensors))
                torch.gt(intermediate_tensors.tensors.pop(MODALITY)[:, 0], 0.5, out=is_image)
            elif input_ids is not None:
                torch.eq(input_ids, self.config.image_token_id, out=is_image)
            else:
                raise ValueError("vLLM passed no input_ids, without which image tokens cannot be told from text.")
        if inputs_embeds is not None and is_image is not None and self.config.numbered_images:
            if numbers is None:
                raise ValueError("vLLM passed positions without the numbers of images, which numbered_images needs.")
            # vLLM pads positions with those of an earlier step; a number of an image counts at image tokens alone.
            added = self.multi_modal_projector.image_numbers(numbers.masked_fill(~is_image, 0))
            inputs_embeds = inputs_embeds + added.to(inputs_embeds.dtype)
        ids = None if inputs_embeds is not None else input_ids
        output = self.language_model.model(ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)
        if is_image is not None and isinstance(output, IntermediateTensors):
            hidden_states = output["hidden_states"]
            output = IntermediateTensors(output.tensors | {MODALITY: is_image[:, None].to(hidden_states.dtype)})
        return output

    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """What a pipeline stage gets from the one before: the decoder's, and which tokens are image tokens, (tokens, 1)."""
        empty = self.language_model.make_empty_intermediate_tensors(batch_size, dtype, device)
        if self.is_image is None:
            return empty
        return IntermediateTensors(empty.tensors | {MODALITY: torch.zeros(batch_size, 1, dtype=dtype, device=device)})

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The decoder's, without the tokens that an answer must not contain."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:  # on the process that samples
            logits[:, self.forbidden_tokens] = -torch.inf
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint: the tower by transformers, which knows by which names its releases save a tower's weights.

        Raises:
            ValueError: if the tower's weights are not those of its configuration.
        """
        of_tower: dict[str, torch.Tensor] = {}

        def others() -> Iterable[tuple[str, torch.Tensor]]:
            for name, weight in weights:
                if name.startswith(TOWER_PREFIX):
                    of_tower[name.removeprefix(TOWER_PREFIX)] = weight
                else:
                    yield name, weight

        loaded = AutoWeightsLoader(self).load_weights(others(), mapper=self.hf_to_vllm_mapper)
        if self.is_image is not None and (scales := sorted(name for name in loaded if name.endswith(KV_SCALES))):
            raise ValueError(
                f"The checkpoint holds scales of a quantized KV cache, such as {scales[0]}, which would round off the marks "
                "that multimodal_attention='mmca' has in keys; remove them, and choose --kv-cache-dtype fp8 without scales."
            )
        if isinstance(self.vision_tower, StageMissingLayer):
            return loaded
        tower, info = type(self.vision_tower).from_pretrained(
            None,
            config=self.vision_tower.config,
            state_dict=of_tower,
            dtype=self.vision_tower.dtype,
            output_loading_info=True,
        )
        if wrong := sorted(map(str, {*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]})):
            raise ValueError(
                f"{len(wrong)} weights of the vision tower, such as {wrong[0]}, are missing, unknown or of another shape "
                "than config.json says; copy or download the checkpoint again."
            )
        self.vision_tower.load_state_dict(tower.state_dict())
        return loaded | {f"vision_tower.{name}" for name, _ in self.vision_tower.named_parameters()}

    def get_mm_mapping(self) -> MultiModelKeys:
        """Where an adapter's layers belong."""
        return MultiModelKeys.from_string_field(
            language_model="language_model", connector="multi_modal_projector", tower_model="vision_tower"
        )


def _most_tokens(vllm_config: VllmConfig) -> int:
    """Of a step, those included that it is padded with, to the size of a CUDA graph or to a multiple of the processes."""
    sizes = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    most = max(vllm_config.scheduler_config.max_num_batched_tokens, *sizes)
    return most + vllm_config.parallel_config.tensor_parallel_size


__all__ = ["DSVLForConditionalGeneration"]

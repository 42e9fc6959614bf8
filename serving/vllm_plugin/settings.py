"""What vLLM is told about a DSVL checkpoint before anything is loaded, and what is refused."""

from typing import Any

from transformers import PreTrainedConfig
from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from ...configuration_dsvl import DSVLConfig
from ...processing_dsvl import IMAGE_TOKEN
from ...utils.transformers_names import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from .padded_heads import ELSEWHERE

ARCHITECTURE = "DSVLForConditionalGeneration"
# Of the tokenizer and the renderer of rendering.py.
TOKENIZER_MODE = "dsvl"
ATTENTIONS = ("mmca", "causal")
# Data types of a KV cache that hold the marks of padded heads exactly.
CACHE_DTYPES = ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")


class DSVLSettings(VerifyAndUpdateConfig):
    """vLLM calls these once the configuration of a DSVL checkpoint is read."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Choose tokenizer and positions.

        Raises:
            ValueError: for a model or a setting that is not served.
        """
        config: Any = model_config.hf_config
        check_model(config)
        if envs.VLLM_USE_RUST_FRONTEND:
            raise ValueError(
                "VLLM_USE_RUST_FRONTEND=1 does not go with a DSVL checkpoint: special tokens that a user types would become "
                "images or ends of answers; unset it."
            )
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"--tokenizer-mode {model_config.tokenizer_mode} does not go with a DSVL checkpoint: special tokens that a "
                "user types would become images or ends of answers; leave it at 'auto'."
            )
        model_config.tokenizer_mode = TOKENIZER_MODE
        for flag, value in (
            ("--enable-prompt-embeds", model_config.enable_prompt_embeds),
            ("--enable-mm-embeds", getattr(model_config.multimodal_config, "enable_mm_embeds", False)),
        ):
            if value:
                raise ValueError(f"{flag} does not go with a DSVL checkpoint, which needs the images themselves; omit it.")
        options = getattr(model_config.multimodal_config, "mm_processor_kwargs", None)
        if options:
            raise ValueError(
                f"--mm-processor-kwargs {options} does not go with a DSVL checkpoint, as the number of image tokens follows "
                "from how an image is processed; omit it."
            )
        if model_config.tokenizer != model_config.model:
            raise ValueError(
                f"--tokenizer {model_config.tokenizer} does not go with a DSVL checkpoint, whose own one knows "
                f"{IMAGE_TOKEN}; omit it."
            )
        if config.image_positions == "image" or config.numbered_images:
            # By which vLLM computes positions for a whole prompt, by `get_mrope_input_positions`. The decoder's own rotary
            # layers read the text configuration and know nothing of it.
            config.mrope_section = [1, 1, 1]

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Refuse what would change which token is an image token, or lose the marks of padded heads.

        Raises:
            ValueError: for such a setting.
        """
        config: Any = vllm_config.model_config.hf_config
        if config.multimodal_attention != "mmca":
            return
        cache_dtype = vllm_config.cache_config.cache_dtype
        if cache_dtype not in CACHE_DTYPES:
            raise ValueError(
                f"--kv-cache-dtype {cache_dtype} does not go with multimodal_attention='mmca', whose marks in keys scales "
                f"would round off; choose one of {', '.join(CACHE_DTYPES)}."
            )
        if vllm_config.parallel_config.enable_dbo:
            raise ValueError(
                "--enable-dbo does not go with multimodal_attention='mmca', as two micro-batches would share one list of "
                "image tokens; omit it."
            )


def decoder_architecture(text_config: PreTrainedConfig) -> str:
    """The name under which vLLM has a decoder.

    Raises:
        ValueError: if vLLM does not have it.
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text_config.model_type)
    if name not in ModelRegistry.get_supported_archs():
        raise ValueError(
            f"text_config.model_type={text_config.model_type!r} ({name}) is a decoder that the installed vLLM does not "
            f"have. {ELSEWHERE}"
        )
    return name


def check_model(config: DSVLConfig) -> None:
    """
    Raises:
        ValueError: for a model that vLLM does not serve.
    """
    if config.multimodal_attention not in ATTENTIONS:
        raise ValueError(
            f"multimodal_attention={config.multimodal_attention!r} is not served by vLLM, which computes "
            f"{' and '.join(map(repr, ATTENTIONS))}. {ELSEWHERE}"
        )
    if config.reversed_images:
        raise ValueError(
            "reversed_images=True is not served by vLLM, which computes the images of a prompt one by one in reading order. "
            f"{ELSEWHERE}"
        )
    decoder_architecture(config.text_config)


__all__ = ["ARCHITECTURE", "TOKENIZER_MODE", "DSVLSettings", "check_model", "decoder_architecture"]

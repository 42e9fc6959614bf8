"""vLLM serves DSVL checkpoints: `vllm serve DIR`, `LLM(DIR)`, with this package installed beside vLLM.

vLLM calls `register`, the entry point `vllm.general_plugins` of this distribution, in every process that it starts. Nothing
else of the package imports vLLM.
"""


def register() -> None:
    """Make vLLM know DSVL's model, its checks of the configuration, its tokenizer and its renderer."""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from .settings import ARCHITECTURE, TOKENIZER_MODE, DSVLSettings

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = DSVLSettings
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__name__}.rendering", "DSVLTokenizer")
    RENDERER_REGISTRY.register(TOKENIZER_MODE, f"{__name__}.rendering", "DSVLRenderer")


__all__ = ["register"]

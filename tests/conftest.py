"""Tiny random models and batches that the tests share."""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, StaticCache

from dsvl import DSVLConfig, DSVLForConditionalGeneration, DSVLProcessor
from dsvl.acceleration.decoding import static_steps as static_steps_module
from dsvl.acceleration.decoding.static_steps import StaticSteps, run_step
from dsvl.transformers_dsvl import CACHE

# Where the code that tests compile is kept: not where users' is.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "dsvl-tests-compiled"))

REFERENCE = Path(__file__).parent / "reference"
VOCABULARY, IMAGE_ID, PAD_ID, EOS_ID = 96, 90, 0, 2
IMAGE_SIZE, PER_IMAGE = 8, 5  # 2 x 2 patches of 4 pixels, and CLS
WINDOW = 8  # of the decoders that have one: shorter than most test sequences

_COMMON = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,  # far from uniform attention
    pad_token_id=PAD_ID,
    bos_token_id=1,
    eos_token_id=EOS_ID,
)
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_COMMON),
    "qwen2": lambda: transformers.Qwen2Config(
        **_COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1
    ),
    "qwen3": lambda: transformers.Qwen3Config(**_COMMON, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**_COMMON, sliding_window=WINDOW, head_dim=8),
    "gemma2": lambda: transformers.Gemma2Config(
        **_COMMON,
        sliding_window=WINDOW,
        head_dim=8,
        query_pre_attn_scalar=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
    ),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **_COMMON, sliding_window=WINDOW, head_dim=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**_COMMON, sliding_window=WINDOW),
}


def tiny_vision_config() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=4,
        initializer_factor=4.0,
    )


def tiny_model(
    family: str = "llama",
    attention: str = "mmca",
    backend: str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    image_positions: str = "token",
    numbered_images: int = 0,
    **text_overrides: Any,
) -> DSVLForConditionalGeneration:
    """A random model in evaluation mode; the same seed gives the same weights under every attention."""
    text = FAMILIES[family]()
    for name, value in text_overrides.items():
        setattr(text, name, value)
    config = DSVLConfig(
        tiny_vision_config(),
        text,
        multimodal_attention=attention,
        image_token_id=IMAGE_ID,
        image_positions=image_positions,
        numbered_images=numbered_images,
    )
    torch.manual_seed(seed)
    model = number_images(DSVLForConditionalGeneration(config).to(dtype).eval())
    # The tower keeps sdpa: transformers' eager attention takes its softmax in float32 and would blur the comparison.
    if backend is not None:
        model.set_attn_implementation({"text_config": backend})
    model.generation_config.eos_token_id = None  # random models may say it at once
    return model


def number_images(model: Any, size: float = 1.0) -> Any:
    """The model, its `numbered_images` with random weights, as if they were trained: a new map is zero. What they add to
    embeddings is of about this size."""
    numbers = model.model.multi_modal_projector.image_numbers
    if numbers is not None:
        generator = torch.Generator().manual_seed(9)
        for parameter in numbers.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(drawn * size / parameter.shape[1] ** 0.5 if parameter is numbers.weight else drawn)
    return model


def tiny_tower_config() -> CLIPVisionConfig:
    """A tower for photographs: 28 pixels in patches of 14, so that an image takes 5 tokens as well."""
    return CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )


def save_tiny_llama(directory: Path | str, dtype: torch.dtype = torch.float32, **overrides: Any) -> None:
    """A LLaMA and the reference's tokenizer of 400 tokens, as a directory to compose from."""
    sizes = dict(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.LlamaConfig(**(sizes | overrides))
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(directory)
    AutoTokenizer.from_pretrained(REFERENCE / "tokenizer").save_pretrained(directory)


def rows(*layouts: str, seed: int = 0) -> list[list[int]]:
    """Token ids of layouts such as "ttIt": t is a random text token, I a whole image."""
    generator = torch.Generator().manual_seed(seed)
    ids = []
    for layout in layouts:
        row: list[int] = []
        for symbol in layout:
            token = int(torch.randint(3, IMAGE_ID, (), generator=generator))
            row += [IMAGE_ID] * PER_IMAGE if symbol == "I" else [token]
        ids.append(row)
    return ids


def random_images(count: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def batch(*layouts: str, side: str = "left", dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Any]:
    """Model inputs of several layouts, padded on one side."""
    ids = rows(*layouts, seed=seed)
    longest = max(map(len, ids))

    def pad(row: list[int], value: int) -> list[int]:
        padding = [value] * (longest - len(row))
        return padding + row if side == "left" else row + padding

    input_ids = torch.tensor([pad(row, PAD_ID) for row in ids])
    count = sum(layout.count("I") for layout in layouts)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in ids]),
        "mm_token_type_ids": (input_ids == IMAGE_ID).long(),
        "pixel_values": random_images(count, dtype) if count else None,
    }


@pytest.fixture
def static_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of new tokens of each step with a static KV cache by `StaticSteps`, as they run."""
    made: list[int] = []
    step = StaticSteps.__call__

    def counted(self: StaticSteps, tokens: torch.Tensor) -> torch.Tensor:
        made.append(tokens.shape[1])
        return step(self, tokens)

    monkeypatch.setattr(StaticSteps, "__call__", counted)
    return made


def run_uncompiled(monkeypatch: pytest.MonkeyPatch, model: Any, observe: Callable[[], object] = lambda: None) -> None:
    """Let a model's steps with a static KV cache be those of an accelerator, without compilation.

    Args:
        observe: is called before each step.
    """
    monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda inputs, config: isinstance(inputs[CACHE], StaticCache))
    monkeypatch.setattr(model, "get_compiled_call", lambda config: lambda **inputs: (observe(), model(**inputs))[1])
    monkeypatch.setattr(static_steps_module, "compiled_step", lambda options: lambda *args: (observe(), run_step(*args))[1])


@pytest.fixture(autouse=True, scope="module")
def same_number_of_threads() -> Any:
    """What a file does to the number of threads, on which the rounding of sums depends, changes no other file."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def uncompiled() -> Any:
    """Run compiled functions as they are written: flex_attention has no compiled kernel for float64 on a CPU."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package's log without the handler and the level that a command of an earlier test has set."""
    logger = logging.getLogger("dsvl")
    monkeypatch.setattr(logger, "handlers", [])
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(REFERENCE / "tokenizer")


@pytest.fixture
def processor(tokenizer: Any) -> DSVLProcessor:
    image_processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return DSVLProcessor(image_processor, tokenizer, image_seq_length=PER_IMAGE)


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Real photographs, of different shapes."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    arrays = [data.astronaut(), data.coffee(), data.chelsea(), *load_sample_images().images]
    return [Image.fromarray(array) for array in arrays]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The model and the processor that the server's tests serve."""
    from model_server import load_parts, make_served_checkpoint

    return load_parts(make_served_checkpoint(tmp_path_factory.mktemp("serving")))


@pytest.fixture(scope="module")
def server(parts: Any) -> Any:
    """`dsvl serve` of them, on the loopback address."""
    from model_server import served

    with served(*parts) as one:
        yield one


@pytest.fixture
def single_group(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()

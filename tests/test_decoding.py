"""The decoding loop in which the host runs ahead gives what transformers' own loop gives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAD_ID, batch, run_uncompiled, tiny_model
from plain_kernels import use_plain_few_queries
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CompileConfig, StaticCache, StopStringCriteria, TextStreamer

from dsvl import DSVLForConditionalGeneration
from dsvl.acceleration.decoding import decode_steps, decoding_loop, row_product
from dsvl.acceleration.decoding import static_steps as static_steps_module
from dsvl.acceleration.decoding.row_product import OneRow
from dsvl.cache_dsvl import cached_types
from dsvl.utils.quantization import quantization_config

LAYOUTS = ("ttItttIIttttttIttt", "tttItt", "tttt")


class Collector(TextStreamer):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        self.tokens: list[list[int]] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def both_ways(model: Any, monkeypatch: pytest.MonkeyPatch, run: Any) -> tuple[Any, Any]:
    """The results of `run` by transformers' loop and by ours, whose step is not compiled here: that is tested elsewhere."""
    expected = run()
    with monkeypatch.context() as patch:
        steps: list[int] = []
        run_uncompiled(patch, model, lambda: steps.append(1))
        patch.setattr(model, "_has_unfinished_sequences", None)  # of transformers' loop
        got = run()
    assert steps
    return expected, got


def endings(model: Any, inputs: dict[str, Any], **options: Any) -> list[int]:
    """Tokens that end the rows of an answer, each at another step, if they are its end-of-sequence tokens."""
    free = model.generate(**inputs, max_new_tokens=40, **options | {"eos_token_id": None})
    new = free[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[8 + 7 * number] for number, row in enumerate(new)]


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "temperature": 2.0}, {"repetition_penalty": 1.5}])
@pytest.mark.parametrize("ends", [True, False])
def test_the_same_tokens(monkeypatch: pytest.MonkeyPatch, options: dict, ends: bool) -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS, dtype=torch.float32)
    options = {"do_sample": False} | options
    torch.manual_seed(0)
    eos = endings(model, inputs, **options) if ends else None

    def run() -> torch.Tensor:
        torch.manual_seed(0)
        return model.generate(**inputs, max_new_tokens=40, cache_implementation="static", eos_token_id=eos, **options)

    expected, got = both_ways(model, monkeypatch, run)
    assert got.equal(expected)
    assert (got.shape[1] - inputs["input_ids"].shape[1] < 40) == ends
    if ends:  # rows that ended before the last are padded
        assert (got[:, -1] == PAD_ID).any() and not (got[:, -1] == PAD_ID).all()


@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_every_token_is_streamed_once(monkeypatch: pytest.MonkeyPatch, max_new_tokens: int) -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(LAYOUTS[0], dtype=torch.float32)
    eos = endings(model, inputs, do_sample=False)
    streamers: list[Collector] = []

    def run() -> torch.Tensor:
        streamers.append(Collector())
        options = dict(max_new_tokens=max_new_tokens, do_sample=False, cache_implementation="static", eos_token_id=eos)
        return model.generate(**inputs, streamer=streamers[-1], **options)

    if max_new_tokens == 1:
        monkeypatch.setattr(model, "_valid_auto_compile_criteria", lambda *args: True)
        expected = got = run()
        streamers.append(streamers[0])
    else:
        expected, got = both_ways(model, monkeypatch, run)
    assert got.equal(expected)
    assert all(streamer.ended for streamer in streamers)
    assert streamers[0].tokens == streamers[1].tokens
    assert sum(streamers[1].tokens, []) == got[0].tolist()


def test_a_callers_cache_is_left_as_transformers_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(LAYOUTS[0], dtype=torch.float32)
    eos = endings(model, inputs, do_sample=False)
    caches: list[StaticCache] = []

    def run() -> torch.Tensor:
        caches.append(StaticCache(config=model.config.text_config, max_cache_len=96))
        options = dict(max_new_tokens=40, do_sample=False, eos_token_id=eos)
        return model.generate(**inputs, past_key_values=caches[-1], **options)

    expected, got = both_ways(model, monkeypatch, run)
    assert got.equal(expected) and int(got[0, -1]) in eos
    lengths = [int(cache.get_seq_length()) for cache in caches]
    assert lengths == [got.shape[1] - 1] * 2
    assert cached_types(caches[0]).equal(cached_types(caches[1]))
    more = torch.cat([got, torch.tensor([[5, 6, 7]])], dim=1)
    answers = [model.generate(input_ids=more, past_key_values=cache, max_new_tokens=8, do_sample=False) for cache in caches]
    assert answers[0].equal(answers[1])


def test_a_callers_cache_that_cannot_step_back_is_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model("mistral", dtype=torch.float32), batch(LAYOUTS[0], dtype=torch.float32)
    cache = StaticCache(config=model.config.text_config, max_cache_len=96)
    assert not decoding_loop.can_crop(cache)
    run_uncompiled(monkeypatch, model)
    steps: list[int] = []
    monkeypatch.setattr(decoding_loop, "StepResult", lambda *args: steps.append(1))
    model.generate(**inputs, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert not steps


def test_other_ways_to_end_are_heeded(monkeypatch: pytest.MonkeyPatch, processor: Any) -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(LAYOUTS[0], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    free = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    word = processor.tokenizer.decode(free[9])

    def run() -> torch.Tensor:
        stop = [StopStringCriteria(processor.tokenizer, word)]
        return model.generate(
            **inputs, max_new_tokens=20, do_sample=False, cache_implementation="static", stopping_criteria=stop
        )

    expected, got = both_ways(model, monkeypatch, run)
    assert got.equal(expected) and got.shape[1] <= inputs["input_ids"].shape[1] + 10


def test_a_step_is_queued_before_the_last_one_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny_model(dtype=torch.float32), batch(LAYOUTS[0], dtype=torch.float32)
    model.generation_config.eos_token_id = None
    events: list[str] = []
    is_last = decoding_loop.StepResult.is_last
    monkeypatch.setattr(decoding_loop.StepResult, "is_last", lambda step: events.append("look") or is_last(step))
    run_uncompiled(monkeypatch, model, lambda: events.append("queue"))
    model.generate(**inputs, max_new_tokens=6, do_sample=False, cache_implementation="static")
    # The first of six tokens comes from the prefill, and is looked at. From then on, when the n-th is looked at, the step
    # that follows it is queued.
    assert events == ["look", "queue", *["queue", "look"] * 4, "look"]


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_decoder_in_8_bits_decodes_by_a_compiled_step(tmp_path: Path, static_steps: list[int], kind: str) -> None:
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    config = quantization_config(kind, torch.float32)
    model = DSVLForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cpu"}, quantization_config=config)
    inputs = batch(*LAYOUTS, dtype=torch.float32)
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    compile_config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    compile_config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told so
    got = model.generate(
        **inputs, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=compile_config
    )
    assert static_steps == [1] * 11
    assert got.equal(expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_single_row_is_in_memory_before_it_is_multiplied(rows: int) -> None:
    """Otherwise the compiler computes it again for each output channel, as it writes products of one row itself."""
    inputs = batch(*[LAYOUTS[1]] * rows, dtype=torch.float32)
    factors: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        products = graph.graph.find_nodes(op="call_function", target=torch.nn.functional.linear)
        factors.extend(str(node.args[0].target) for node in products)
        return graph.forward

    model = tiny_model(dtype=torch.float32)
    config = CompileConfig(fullgraph=True, backend=look, mode="default")  # type: ignore[arg-type]
    config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told so
    options = {"max_new_tokens": 4, "do_sample": False}
    got = model.generate(**inputs, **options, cache_implementation="static", compile_config=config)
    assert got.equal(model.generate(**inputs, **options))
    linear = [one for one in model.model.language_model.modules() if isinstance(one, torch.nn.Linear)]
    assert len(factors) == len(linear) + 1  # and the head
    assert (set(factors) == {"as_strided"}) == (rows == 1)
    assert rows == 1 or "as_strided" not in factors


def compiled_steps_agree(model: Any, inputs: dict[str, torch.Tensor], static_steps: list[int]) -> None:
    """Generate 12 tokens over a dynamic KV cache, and the same in 11 compiled steps."""
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    config = CompileConfig(fullgraph=True, backend="eager", mode="default")
    config._compile_all_devices = True  # transformers compiles on accelerators alone, unless told so
    got = model.generate(**inputs, max_new_tokens=12, do_sample=False, cache_implementation="static", compile_config=config)
    assert got.equal(expected)
    assert static_steps == [1] * 11


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_a_step_of_one_row_has_the_kernel_s_products(
    tmp_path: Path, static_steps: list[int], kind: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernel's definition in its place: the decoder's layers in 8 bits, or those with long rows."""
    read: list[torch.dtype] = []

    def launch(row: torch.Tensor, weight: Any, scales: Any, bias: Any, kernel: Any) -> torch.Tensor:
        if not isinstance(row, FakeTensor):  # while the step is traced
            read.append(weight.dtype)
        plain = weight.to(row.dtype) if scales is None else weight.to(row.dtype) * scales.reshape(-1, 1)
        return nn.functional.linear(row, plain, bias)

    monkeypatch.setattr(row_product, "launch_row_product", launch)
    monkeypatch.setattr(row_product, "LEAST_FEATURES", 1)
    monkeypatch.setattr(row_product, "LONG_ROW", 32)  # of an MLP's second layer alone, as in large models
    monkeypatch.setattr(torch.library, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(static_steps_module, "has_step_kernels", lambda device, dtype: True)
    monkeypatch.setattr(decode_steps, "takes_few_queries", lambda *states: False)
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    options: dict[str, Any] = {"device_map": {"": "cpu"}}
    if kind is not None:
        pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
        options["quantization_config"] = quantization_config(kind, torch.float32)
    model = DSVLForConditionalGeneration.from_pretrained(tmp_path, **options)
    inputs = batch(LAYOUTS[0], dtype=torch.float32)
    compiled_steps_agree(model, inputs, static_steps)
    layers = model.config.text_config.num_hidden_layers
    numbers = {None: [torch.float32], "int8": [torch.int8] * 7, "fp8": [row_product.E4M3] * 7}[kind]
    assert read == numbers * layers * 11


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # one and two query heads for a key-value head; capped scores
@pytest.mark.parametrize("layouts", [LAYOUTS[:1], LAYOUTS])
def test_a_step_has_the_kernels_attention(
    static_steps: list[int], family: str, layouts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels' definition in their place: rows of several lengths, and with no image."""
    launched = use_plain_few_queries(monkeypatch)
    model = tiny_model(family, dtype=torch.float32, **({} if family == "llama" else {"layer_types": ["full_attention"] * 4}))
    inputs = batch(*layouts, dtype=torch.float32)
    compiled_steps_agree(model, inputs, static_steps)
    assert launched == [1] * model.config.text_config.num_hidden_layers * 11


def test_on_a_gpu_products_of_one_row_are_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.compile` knows these options, and a step compiled without any gets them; elsewhere it is transformers' way."""
    model = tiny_model()
    assert model._default_compile_config() == CompileConfig()
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert model._default_compile_config().options == {"triton.cudagraphs": True, "coordinate_descent_tuning": True}
    model.get_compiled_call(None)
    assert model._last_compile_config == model._default_compile_config()


def test_steps_take_linear_layers_that_are_called_by_keywords() -> None:
    row, weight = torch.randn(1, 4), torch.randn(3, 4)
    with OneRow(in_kernel=False):
        assert nn.functional.linear(input=row, weight=weight).equal(row @ weight.t())

"""What a CPU cannot show: flex_attention's gradients and memory, compiled decoding, half precision on a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import FAMILIES, IMAGE_ID, batch, random_images, run_uncompiled, tiny_model
from test_attention import packed
from transformers import DynamicCache, StaticCache

from dsvl import DSVLForConditionalGeneration, cli
from dsvl.acceleration.attention import few_queries, kernel_choice, kernel_timings
from dsvl.acceleration.attention.fused_mask import FusedMask
from dsvl.acceleration.attention.kernel_check import check_kernels
from dsvl.acceleration.attention.kernel_choice import can_fuse, unsupported
from dsvl.acceleration.decoding import decoding_loop, recorded_steps, row_product
from dsvl.acceleration.decoding import static_steps as static_steps_module
from dsvl.acceleration.memory.frozen_linear import FrozenLinear, quantize_weight, why_not_in_fp8
from dsvl.image_library import ImageLibrary
from dsvl.utils.cache_cropping import crop
from dsvl.utils.quantization import quantization_config

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_kernels = pytest.mark.skipif(unsupported(torch.device("cuda", 0)) is not None, reason="needs the fused kernels")

LAYOUTS = ("tttItttIIttt", "Itt", "ttttttttttttt", "IItItttttttI", "tt" * 60 + "I" + "t" * 40)


def on_gpu(inputs):
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def gradients(model, inputs, labels):
    model.zero_grad()
    model(**inputs, labels=labels, use_cache=False).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
def test_flex_attention_agrees_with_eager_in_outputs_and_gradients(family):
    """Heads as wide as a kernel wants them; the sequences are longer than one of its blocks."""
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = {"head_dim": 32} if family != "phi3" else {}
    wide |= {"hidden_size": 128} if family in ("phi3", "qwen2", "llama") else {}
    inputs = on_gpu(batch(*LAYOUTS, side="right", dtype=torch.float32))
    real = inputs["attention_mask"].bool()
    labels = torch.where(real & (inputs["input_ids"] != IMAGE_ID), inputs["input_ids"], -100)
    results = []
    for backend in ("eager", "flex_attention"):
        model = tiny_model(family, backend=backend, dtype=torch.float32, initializer_range=0.1, **wide).cuda()
        with torch.no_grad():
            logits = model(**inputs).logits[real]
        results.append((logits, gradients(model, inputs, labels)))
    (expected, expected_gradients), (got, got_gradients) = results
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
    for name, gradient in expected_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-4)
        torch.testing.assert_close(got_gradients[name] / scale, gradient / scale, atol=1e-2, rtol=0, msg=name)


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_packed_conversations_learn_by_flex_attention_as_they_do_apart(family, attention):
    """An image at the very start and the very end of a conversation, texts alone, one longer than a kernel's block."""
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = {"head_dim": 32} if family == "gemma2" else {"head_dim": 32, "hidden_size": 128}
    model = tiny_model(family, attention, "flex_attention", torch.float32, initializer_range=0.1, **wide).cuda().train()
    layouts = ("Itttt", "tt" * 70 + "I", "ttttttttttt", "ttIIt", "I" * 30 + "t", "tttttI")
    inputs, lengths = packed(*layouts)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    inputs, labels = on_gpu(inputs), torch.where(inputs["position_ids"] > 0, inputs["input_ids"], -100).cuda()
    labels[inputs["input_ids"] == IMAGE_ID] = -100
    together = gradients(model, inputs, labels)
    model.zero_grad()
    first = 0
    for layout, ids, own in zip(layouts, inputs["input_ids"].split(lengths, 1), labels.split(lengths, 1), strict=True):
        pixels = inputs["pixel_values"][first : first + layout.count("I")]
        first += len(pixels)
        loss = model(input_ids=ids, pixel_values=pixels if len(pixels) else None, labels=own, use_cache=False).loss
        (loss * (own != -100).sum() / (labels != -100).sum()).backward()
    for name, gradient in ((n, p.grad) for n, p in model.named_parameters() if p.grad is not None):
        scale = gradient.abs().max().clamp(min=1e-4)
        torch.testing.assert_close(together[name] / scale, gradient / scale, atol=1e-2, rtol=0, msg=f"{family} {name}")


def test_flex_attention_builds_nothing_as_large_as_tokens_squared():
    """Nor falls back to a kernel that does after batches of many shapes."""
    model = tiny_model(
        backend="flex_attention", dtype=torch.bfloat16, hidden_size=64, head_dim=16, max_position_embeddings=32768
    )
    model = model.cuda()
    torch._dynamo.reset()
    generator = torch.Generator().manual_seed(0)

    def peak(images: int, text: int) -> tuple[int, int]:
        symbols = "I" * images + "t" * text
        layout = "".join(symbols[i] for i in torch.randperm(len(symbols), generator=generator).tolist())
        inputs = on_gpu(batch(layout, layout, dtype=torch.bfloat16))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.no_grad():
            model.model(**inputs, use_cache=False)
        return inputs["input_ids"].shape[1], torch.cuda.max_memory_allocated() - before

    for step in range(12):
        peak(100 + 37 * step, 500 + 91 * step)
    (short, small), (long, large) = peak(800, 4000), peak(1600, 8000)
    assert long == 2 * short
    assert large < 2.5 * small, (short, small, long, large)  # linear, not fourfold
    assert large < long**2, (long, large)  # less than one byte for each pair


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
def test_compiled_static_decoding_gives_the_tokens_of_the_dynamic_cache(family, static_steps):
    model = tiny_model(family, dtype=torch.float32).cuda()
    inputs = on_gpu(batch("ttItttIIttttttIttt", "tttItt", dtype=torch.float32))
    torch._dynamo.reset()
    expected = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    static_steps.clear()  # those that were recorded
    got = model.generate(**inputs, max_new_tokens=12, do_sample=False, cache_implementation="static")
    assert bool(static_steps) == (family == "llama") == ("_compiled_call" not in model.__dict__)
    assert got.equal(expected)


@pytest.mark.parametrize("drafts", ["prompt lookup", "draft model"])
def test_compiled_speculative_decoding_gives_the_tokens_of_greedy_search(drafts, static_steps):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float32).cuda()
    inputs = on_gpu(batch("ttItttIIttttttIttt", dtype=torch.float32))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    static_steps.clear()  # those that were recorded
    how = {"prompt_lookup_num_tokens": 4}
    if drafts == "draft model":
        assistant = tiny_model(dtype=torch.float32).cuda()
        assistant.generation_config.update(num_assistant_tokens=4, assistant_confidence_threshold=0.0)
        how = {"assistant_model": assistant}
    for _ in range(2):
        assert model.generate(**inputs, **options, **how, cache_implementation="static").equal(expected)
    assert set(static_steps) == {1, 5}
    images = model.encode_images(inputs.pop("pixel_values"))
    if drafts == "prompt lookup":
        assert model.generate(**inputs, image_cache=images, **options, **how, cache_implementation="static").equal(expected)


@pytest.mark.parametrize("kind", [None, "int8", "fp8"])
def test_the_kernels_of_a_step_give_the_logits_of_the_compiler(tmp_path, kind, monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(row_product, "LEAST_FEATURES", 1)
    monkeypatch.setattr(row_product, "LONG_ROW", 1)
    tiny_model(dtype=torch.float16, hidden_size=128, head_dim=32).save_pretrained(tmp_path)
    options = {"dtype": torch.float16, "device_map": {"": "cuda"}}
    if kind is not None:
        pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
        options["quantization_config"] = quantization_config(kind, torch.float16)
    model = DSVLForConditionalGeneration.from_pretrained(tmp_path, **options)
    inputs = on_gpu(batch("ttItttIIttttttIttt", dtype=torch.float16))
    how = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    launched, attended, results = [], [], []
    step = static_steps_module.StaticSteps.__call__

    def keep(*args):
        logits = step(*args)
        results.append(logits.float())
        return logits

    monkeypatch.setattr(static_steps_module.StaticSteps, "__call__", keep)
    launch = row_product.launch_row_product
    monkeypatch.setattr(row_product, "launch_row_product", lambda *args: (launched.append(1), launch(*args))[1])
    attend = few_queries.launch_few_queries
    monkeypatch.setattr(few_queries, "launch_few_queries", lambda *args: (attended.append(1), attend(*args))[1])
    for in_kernel in (False, True):
        monkeypatch.setattr(static_steps_module, "has_step_kernels", lambda *args, here=in_kernel: here)
        model.generate(**inputs, **how)
        assert bool(launched) == in_kernel == bool(attended)
    # The model's own error is 1.3 % in float16, and 5 % in bfloat16.
    torch.testing.assert_close(*results, atol=0.05 * results[0].abs().max().item(), rtol=0)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_decoder_in_8_bits_decodes_by_a_compiled_step(tmp_path, kind, static_steps):
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    torch._dynamo.reset()
    tiny_model(dtype=torch.float32, hidden_size=128, head_dim=32).save_pretrained(tmp_path)
    config = quantization_config(kind, torch.float32)
    model = DSVLForConditionalGeneration.from_pretrained(tmp_path, device_map={"": "cuda"}, quantization_config=config)
    inputs = on_gpu(batch("ttItttIIttttttIttt", "tttItt", dtype=torch.float32))
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**inputs, **options)
    static_steps.clear()  # those that were recorded
    assert model.generate(**inputs, **options, cache_implementation="static").equal(expected)
    assert static_steps == [1] * 11


@needs_kernels
@pytest.mark.parametrize("compiled", [False, True])
def test_weights_in_float32_use_the_fused_kernels_under_autocast(monkeypatch, compiled):
    """As the Trainer trains with bf16=True. Rotary positions make queries and keys float32 again."""
    inputs = on_gpu(batch(*LAYOUTS, side="right", dtype=torch.float32))
    real = inputs["attention_mask"].bool()
    labels = torch.where(real & (inputs["input_ids"] != IMAGE_ID), inputs["input_ids"], -100)
    model = tiny_model(dtype=torch.float32, hidden_size=128, head_dim=32, initializer_range=0.05).cuda().train()
    expected = gradients(model, inputs, labels)
    used, attend = [], FusedMask.attend
    if compiled:
        model.compile_decoder_layers()
    else:
        monkeypatch.setattr(FusedMask, "attend", lambda self, *a, **k: used.append(self.dtype) or attend(self, *a, **k))
    with torch.autocast("cuda", torch.bfloat16):
        got = gradients(model, inputs, labels)
    assert compiled or set(used) == {torch.bfloat16}
    for name, gradient in expected.items():
        if name.endswith("k_proj.bias"):  # no score depends on it: its gradient is rounding alone
            assert gradient.norm() < 1e-6, name
            continue
        assert (got[name] - gradient).norm() <= 0.1 * gradient.norm() + 1e-6, name


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "group_size", "softcap"), [(64, 1, 0.0), (128, 4, 0.0), (256, 2, 50.0)])
def test_the_check_at_first_use_finds_the_kernels_right(dtype, head_dim, group_size, softcap):
    right, found = check_kernels(torch.device("cuda", 0), dtype, head_dim, group_size, softcap)
    assert right, found


@needs_kernels
def test_env_tunes_and_describes_this_gpu(capsys, monkeypatch, tmp_path, request):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernel_choice, "DECISIONS", {})
    request.addfinalizer(kernel_timings.saved.cache_clear)
    assert cli.main(["env", "--tune"]) == 0
    captured = capsys.readouterr()
    assert torch.cuda.get_device_name(0) in captured.out and "tuned, fused against gathered sdpa" in captured.out


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
def test_bfloat16_stays_near_the_whole(backend):
    inputs = on_gpu(batch(*LAYOUTS, dtype=torch.float32))
    real = inputs["attention_mask"].bool()
    overrides = dict(hidden_size=128, head_dim=32, initializer_range=0.05)
    half = tiny_model(backend=backend, dtype=torch.bfloat16, **overrides).cuda()
    whole = tiny_model(backend="eager", dtype=torch.float32, **overrides).cuda()
    with torch.no_grad():
        got, expected = half(**inputs).logits[real].float(), whole(**inputs).logits[real]
    assert (got - expected).norm() / expected.norm() < 0.05


def test_a_static_cache_step_waits_for_nothing():
    """Between the host and the device nothing synchronizes in a decode step's preparation and forward pass."""
    model = tiny_model(dtype=torch.float32).cuda()
    inputs = on_gpu(batch("ttIttt", dtype=torch.float32))
    cache = StaticCache(config=model.config.text_config, max_cache_len=32)
    ids, types = inputs["input_ids"], inputs["mm_token_type_ids"]
    with torch.no_grad():
        model(**inputs, past_key_values=cache)
        ids, types = torch.cat([ids, ids[:, :1]], 1), torch.nn.functional.pad(types, (0, 1))
        mask = torch.ones_like(ids)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step = model.prepare_inputs_for_generation(
                ids, next_sequence_length=1, past_key_values=cache, attention_mask=mask, mm_token_type_ids=types
            )
            model(**step)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("positions", ["token", "image"])
def test_a_training_step_waits_for_nothing(family, is_packed, compiled, positions):
    """On the GPU itself, where the fused kernels apply; tests/test_step.py tells it without one."""
    torch._dynamo.reset()
    wide = {"hidden_size": 128, "head_dim": 32, "image_positions": positions, "numbered_images": 3 * (positions == "image")}
    model = tiny_model(family, dtype=torch.bfloat16, **wide).set_trainable().cuda().train()
    if not can_fuse(model.config.text_config, torch.bfloat16, model.device):
        pytest.skip("the fused kernels do not apply")
    if compiled:
        model.compile_decoder_layers(fullgraph=True)
    inputs = batch(*LAYOUTS[:3], side="right", dtype=torch.bfloat16)
    if is_packed:
        del inputs["attention_mask"]
        inputs["document_ids"] = (torch.arange(inputs["input_ids"].shape[1]) // 9).expand_as(inputs["input_ids"])
    labels = torch.where(inputs["input_ids"] == IMAGE_ID, -100, inputs["input_ids"])
    inputs = on_gpu(inputs | {"labels": labels})
    for step in range(3):  # kernels are compiled in the first
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            model(**inputs, use_cache=False).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_decoding_loop_waits_for_nothing_but_earlier_steps(monkeypatch):
    """The host looks at a step through an event, which lets it queue the next one; nothing else synchronizes."""
    model, inputs = tiny_model(dtype=torch.float32).cuda(), on_gpu(batch("ttIttt", dtype=torch.float32))

    options = dict(max_new_tokens=8, do_sample=False, cache_implementation="static")
    run_uncompiled(monkeypatch, model, lambda: torch.cuda.set_sync_debug_mode("error"))
    try:
        got = model.generate(**inputs, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert got.equal(model.generate(**inputs, max_new_tokens=8, do_sample=False))


def test_compiled_functions_run_in_any_thread():
    """Steps over a static cache, and the text of prompts, are CUDA graphs."""
    torch._dynamo.reset()
    model, fast = (
        tiny_model(backend="sdpa", dtype=torch.bfloat16, hidden_size=128, initializer_range=0.1).cuda() for _ in range(2)
    )
    fast.compile_text_prefill()
    inputs = on_gpu(batch("ttIttIttt" + "t" * 40, dtype=torch.bfloat16))
    pixels = inputs.pop("pixel_values")
    images = fast.encode_images(pixels)
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}

    def answer(_):
        return fast.generate(**inputs, image_cache=images, **how)

    with ThreadPoolExecutor(1) as thread:
        answers = [answer(0), answer(0), *thread.map(answer, range(5))]
    logits = model(**inputs, pixel_values=pixels).logits[0, -1]
    first = answers[0][0, inputs["input_ids"].shape[1]]
    assert logits.max() - logits[first] < 0.05 * logits.std()
    assert all(one.equal(answers[0]) for one in answers)


@pytest.fixture
def recordings(monkeypatch):
    """The recordings of decode steps, as many as there are."""
    made = []
    record = recorded_steps.Recording
    monkeypatch.setattr(recorded_steps, "Recording", lambda *args: (made.append(1), record(*args))[1])
    return made


@pytest.mark.parametrize("attention", ["mmca", "causal"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recorded_steps_give_the_tokens_of_plain_ones(family, attention, recordings, monkeypatch):
    torch.backends.cuda.matmul.allow_tf32 = False
    monkeypatch.setattr(recorded_steps, "RESERVED", 8)
    model = tiny_model(family, attention, dtype=torch.float32).cuda()
    for layouts in (LAYOUTS[:3], LAYOUTS[-1:]):
        inputs = on_gpu(batch(*layouts, dtype=torch.float32))
        how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}
        caches = [DynamicCache(config=model.config.text_config) for _ in range(2)]
        with monkeypatch.context() as patch:
            patch.setattr(decoding_loop, "can_record", lambda *args: False)
            expected = model.generate(**inputs, **how, past_key_values=caches[0])
        assert model.generate(**inputs, **how, past_key_values=caches[1]).equal(expected)
        for layer, other in zip(caches[1].layers, caches[0].layers, strict=True):
            torch.testing.assert_close(layer.keys, other.keys, atol=2e-3, rtol=2e-3)
    has_windows = any(layer.is_sliding for layer in caches[0].layers)
    assert len(recordings) == (0 if has_windows else 4)


def test_steps_that_wait_for_the_gpu_are_not_recorded(recordings, monkeypatch, caplog):
    model, other = (tiny_model(dtype=torch.float32).cuda() for _ in range(2))
    inputs = on_gpu(batch("ttItttIIttt", dtype=torch.float32))
    how = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = other.generate(**inputs, **how)
    mlp = type(model.model.language_model.layers[0].mlp)
    forward = mlp.forward
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", lambda self, states: forward(self, states * (states.sum().item() ** 0)))
        for _ in range(2):
            assert model.generate(**inputs, **how).equal(expected)
    assert caplog.text.count("Decode steps of this model are not recorded") == 1
    assert other.generate(**inputs, **how).equal(expected)
    assert len(recordings) == 2  # those of the other model


def test_recordings_use_the_same_memory_again(recordings):
    model = tiny_model(dtype=torch.float32).cuda()
    inputs = on_gpu(batch("ttItttIIttt", dtype=torch.float32))
    reserved = []
    for _ in range(20):
        model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)
        reserved.append(torch.cuda.memory_reserved())
    assert len(recordings) == 20 and reserved[-1] == reserved[3]


def test_threads_record_beside_each_other(recordings):
    model = tiny_model(dtype=torch.float32).cuda()
    prompts = [on_gpu(batch("ttItttIIttt", dtype=torch.float32, seed=seed)) for seed in range(4)]

    def answer(inputs):
        sampled = model.generate(**inputs, max_new_tokens=40, do_sample=True, eos_token_id=None)
        assert sampled.shape[1] == inputs["input_ids"].shape[1] + 40
        return model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)

    expected = [answer(inputs) for inputs in prompts]
    with ThreadPoolExecutor(4) as threads:
        for got, alone in zip(threads.map(answer, prompts), expected, strict=True):
            assert got.equal(alone)
    assert len(recordings) == 16


def test_the_server_answers_as_the_model_does(tmp_path):
    pytest.importorskip("openai")
    from model_server import (
        SENTENCES,
        alone,
        ask,
        data_url,
        draw_image,
        load_parts,
        make_served_checkpoint,
        question,
        served,
    )

    parts = load_parts(make_served_checkpoint(tmp_path), "cuda")
    own = [
        [{"type": "image", "image": draw_image(number)}] * (number % 3) + [{"type": "text", "text": SENTENCES[number]}]
        for number in range(12)
    ]
    expected = [alone(parts, [{"role": "user", "content": content}]) for content in own]
    with served(*parts) as server:
        server.engine.turn = 5

        def one(number, **options):
            messages = question(SENTENCES[number], *[data_url(draw_image(number))] * (number % 3))
            return ask(server, messages, **options).choices[0].message.content

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(one, range(12))) == expected
            sampled = [list(pool.map(lambda n: one(n, temperature=1.3, top_p=0.9, seed=n), range(12))) for _ in range(2)]
    assert sampled[0] == sampled[1] != expected


PROMPTS = (*LAYOUTS[:3], "IItItttttttt", LAYOUTS[4])  # which end with text


def prefills(model, inputs, cache):
    mask = inputs["attention_mask"]
    prompt = {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        expected = model(**prompt, pixel_values=inputs["pixel_values"], logits_to_keep=1, use_cache=True).logits
    return expected, model.prefill(**prompt, image_cache=cache).logits


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text"])
def test_prompts_over_encoded_images_are_the_whole_prefill(family, backend):
    if family == "gemma2" and backend == "sdpa":
        pytest.skip("softcapping")
    torch.backends.cuda.matmul.allow_tf32 = False
    wide = {"head_dim": 32, "hidden_size": 128, "initializer_range": 0.1}
    model = tiny_model(family, backend=backend, dtype=torch.float32, **wide).cuda()
    for layouts in (PROMPTS, ("tItIIt",), ("tt" * 60 + "I" + "t" * 40,)):
        inputs = on_gpu(batch(*layouts, dtype=torch.float32))
        cache = model.encode_images(inputs["pixel_values"])
        expected, got = prefills(model, inputs, cache)
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)
        away = cache.to("cpu")
        with pytest.raises(ValueError, match="is on cpu, but the model on cuda:0"):
            prefills(model, inputs, away)
        assert prefills(model, inputs, away.to("cuda"))[1].equal(got)


def test_text_over_encoded_images_may_be_compiled():
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float32, hidden_size=128, initializer_range=0.1).cuda()
    model.compile_text_prefill()
    for layouts in (PROMPTS, ("tItIIt",), ("tItIIttt",)):
        inputs = on_gpu(batch(*layouts, dtype=torch.float32))
        expected, got = prefills(model, inputs, model.encode_images(inputs["pixel_values"]))
        torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_turns_of_a_conversation_answer_alike_and_compile_once(kind, dtype):
    """Over encoded images, with new images in later turns, with text alone; a second conversation compiles nothing."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model, fast = (tiny_model(backend="sdpa", dtype=dtype, hidden_size=128, initializer_range=0.1).cuda() for _ in range(2))
    fast.compile_text_prefill()
    compiled = []
    for conversation in range(2):
        config = model.config.text_config
        caches = [
            DynamicCache(config=config)
            if kind == "dynamic"
            else StaticCache(config=config, max_cache_len=448 + 64 * conversation)
            for _ in range(2)
        ]
        ids = torch.empty((1, 0), dtype=torch.long, device="cuda")
        for number, text in enumerate(("ttIttIttt", "Ittt", "tIIItttt", "t" * 40 + "It", "ttttttt", "IIIIII" + "t" * 9)):
            new = batch(text, seed=number + 10 * conversation)["input_ids"].cuda()
            ids = torch.cat([ids, new], 1)
            pixels = random_images(text.count("I"), seed=number).to("cuda", dtype) if "I" in text else None
            how = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False, "disable_compile": True}
            answers = []
            for one, cache in zip((model, fast), caches, strict=True):
                images = {} if pixels is None else {"pixel_values": pixels}
                if one is fast and number == 0:
                    images = {"image_cache": one.encode_images(pixels)}
                answers.append(one.generate(ids, past_key_values=cache, **images, **how))
            compiled.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
            if dtype == torch.float32:
                assert answers[0].equal(answers[1])
            else:  # random logits are close: what a step before has stored is compared
                for layer, other in zip(caches[1].layers, caches[0].layers, strict=True):
                    held = slice(0, int(caches[0].get_seq_length()) - 3)
                    torch.testing.assert_close(layer.values[:, :, held], other.values[:, :, held], atol=0.1, rtol=0.1)
            ids = answers[0]
            crop_both(caches, ids.shape[1] - 3)
    assert compiled[-1] == compiled[0], f"graphs after each turn: {compiled}"


def crop_both(caches, length):
    for cache in caches:
        crop(cache, length)


@pytest.mark.parametrize("kind", [None, "static"])
def test_generation_over_encoded_images_is_the_same(kind):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    model = tiny_model(dtype=torch.float32).cuda()
    inputs = on_gpu(batch(*PROMPTS, dtype=torch.float32))
    how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
    expected = model.generate(**inputs, **how)
    cache = model.encode_images(inputs.pop("pixel_values"))
    assert model.generate(**inputs, image_cache=cache, **how).equal(expected)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_library_in_gpu_memory_and_pinned_main_memory(quantize):
    """Images that are on the GPU, in main memory alone, dropped, and encoded again give the same answers."""
    torch.backends.cuda.matmul.allow_tf32 = False
    model = tiny_model(dtype=torch.float32).cuda()
    size = 5 * ImageLibrary(model, 2**20, quantize=quantize).token_bytes(model)
    inputs = on_gpu(batch(*PROMPTS, dtype=torch.float32))
    how = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **how)
    library = model.image_library = ImageLibrary(model, 2**17, device_bytes=4 * size, quantize=quantize)
    first = model.generate(**inputs, **how)
    assert quantize or first.equal(expected)
    for number in range(12):
        other = on_gpu(batch("tIIt", dtype=torch.float32)) | {"pixel_values": random_images(2, seed=number).float().cuda()}
        model.generate(**other, max_new_tokens=1)
        assert model.generate(**inputs, **how).equal(first)
    assert 0 < library.tiers.device.bytes <= 4 * size and library.tiers.device.evicted > 0
    assert all(one.is_pinned() for name in library.tiers.memory.names() for one in library.tiers.memory.get(name).values())
    assert library.tiers.arena.bytes <= 2**17


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_decoder_over_two_gpus_answers_as_on_one(family):
    """As `device_map="auto"` places it: with the image KV cache, in 8 bits and on the host, a library, compiled decoding."""
    from accelerate import dispatch_model

    torch.backends.cuda.matmul.allow_tf32 = False
    torch._dynamo.reset()
    wide = {"hidden_size": 128, "head_dim": 32, "initializer_range": 0.1}
    model = tiny_model(family, dtype=torch.float32, **wide).cuda()
    inputs = on_gpu(batch(*PROMPTS, dtype=torch.float32))
    pixels = inputs["pixel_values"]
    how = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**inputs, **how)
    in_8_bits = model.generate(**{**inputs, "pixel_values": None}, image_cache=model.encode_images(pixels).quantize(), **how)
    layers = model.config.text_config.num_hidden_layers
    device_map = {name: 0 for name, _ in model.model.named_children() if name != "language_model"}
    device_map = {f"model.{name}": device for name, device in device_map.items()}
    device_map["lm_head"] = 0 if model.config.tie_word_embeddings else 1  # tied weights are placed together
    for name, _ in model.model.language_model.named_children():
        device_map |= {f"model.language_model.{name}": 1 if name == "norm" else 0} if name != "layers" else {}
    device_map |= {f"model.language_model.layers.{number}": int(number >= layers // 2) for number in range(layers)}
    model = dispatch_model(model, device_map)
    assert {parameter.device.index for parameter in model.parameters()} == {0, 1}
    assert model.generate(**inputs, **how).equal(expected)
    assert model.generate(**inputs, **how, cache_implementation="static").equal(expected)
    assert "_compiled_call" in model.__dict__, "nothing was compiled"
    del inputs["pixel_values"]
    cache = model.encode_images(pixels)
    assert model.generate(**inputs, image_cache=cache, **how).equal(expected)
    assert model.generate(**inputs, image_cache=cache, **how, cache_implementation="static").equal(expected)
    assert model.generate(**inputs, image_cache=cache.quantize(), **how).equal(in_8_bits)
    assert model.generate(**inputs, image_cache=cache.offload(), **how).equal(expected)
    model.compile_text_prefill()
    assert model.generate(**inputs, image_cache=cache, **how).equal(expected)
    model.image_library = ImageLibrary(model, 2**24, device_bytes=2**24)
    for _ in range(2):
        assert model.generate(**inputs, pixel_values=pixels, **how).equal(expected)
    assert model.image_library.statistics()["hits"] > 0


HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
needs_fp8 = pytest.mark.skipif(not HOPPER, reason="needs FP8 tensor cores")


@needs_fp8
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
@pytest.mark.parametrize(("out_features", "in_features"), [(256, 128), (4096, 1024), (48, 2752)])
def test_fp8_products_on_tensor_cores_are_those_of_the_same_rounded_numbers(out_features, in_features, rows, bias):
    """Outputs and input gradients, as it is and compiled."""
    assert why_not_in_fp8() is None
    torch._dynamo.reset()
    torch.manual_seed(0)
    linear = torch.nn.Linear(in_features, out_features, bias=bias).bfloat16().cuda().requires_grad_(False)
    on, off = FrozenLinear(linear, "fp8"), FrozenLinear(linear, "fp8", in_fp8=False)
    assert on.in_fp8
    states = torch.randn(2, rows, in_features, device="cuda").bfloat16()
    states[:, : rows // 2] *= 100
    gradient = torch.randn(2, rows, out_features, device="cuda").bfloat16() / 1000
    made = []
    for layer in (off, on, torch.compile(on, fullgraph=True)):
        inputs = states.clone().requires_grad_()
        output = layer(inputs)
        output.backward(gradient)
        made.append((output.detach(), inputs.grad))
    for found in made[1:]:
        for one, other in zip(found, made[0], strict=True):
            assert one.shape == other.shape and one.dtype == torch.bfloat16
            torch.testing.assert_close(one, other, rtol=0.02, atol=0.01 * other.abs().amax().item() if rows else 0)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_has_the_same_8_bit_numbers_as_on_a_cpu(dtype, precision):
    """Saving compares the frozen weights with those of the original files."""
    weight = (torch.randn(2048, 256) * torch.logspace(-6, 2, 2048)[:, None]).to(dtype)
    for found, expected in zip(quantize_weight(weight.cuda(), precision), quantize_weight(weight, precision), strict=True):
        assert found.cpu().equal(expected)


@needs_fp8
def test_a_step_in_fp8_holds_one_8_bit_copy_and_no_transposed_one():
    torch._dynamo.reset()
    linears = [torch.nn.Linear(4096, 4096, bias=False, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    layers = torch.nn.Sequential(*(FrozenLinear(one.requires_grad_(False), "fp8") for one in linears))
    del linears
    states = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = 2**24  # bytes of one in 8 bits
    for run in (layers, torch.compile(layers, fullgraph=True)):
        run(states).sum().backward()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(states).sum().backward()
        assert torch.cuda.max_memory_allocated() - before < 2.5 * weight  # transposed, one layer at a time

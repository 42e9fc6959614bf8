"""Parity with the released DeepSpeed-VisualChat code, through checkpoints that were migrated and loaded from the disk."""

import pytest
import torch
from reference_data import ReferenceCase
from torch import nn
from transformers import DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from dsvl import DSVLConfig
from dsvl.attention_dsvl import route_attention
from dsvl.masks_dsvl import CodedMask, mmca_reference_codes, visibilities

CASES = {
    "A_baseline_mmca_off": "causal",
    "B_baseline_mmca_on": "mmca_reference",
    "C_vit_mmca_on": "mmca_reference",
    "D_perceiver_mmca_on": "mmca_reference",
    "E_qwen_mmca_on": "mmca_reference",
}
RUNS = [
    (name, run)
    for name in CASES
    for run in ("single", "batch", "edge", "dropped_row")
    if f"{run}.input_ids" in ReferenceCase(name).inputs
]
backends = pytest.mark.parametrize("backend", ["eager", "sdpa"])


@backends
@pytest.mark.parametrize(("name", "run"), RUNS)
def test_forward(name, run, backend):
    case = ReferenceCase(name)
    model, inputs, expected = case.model(CASES[name], backend), case.batch(run), case.outputs
    with torch.no_grad():
        images = model.get_image_features(case.inputs[f"{run}.pixel_values"])
        outputs = model(**inputs, output_hidden_states=True)
    torch.testing.assert_close(images.last_hidden_state, expected[f"{run}.image_features"], atol=1e-4, rtol=1e-4)
    projected = torch.stack(images.pooler_output)
    torch.testing.assert_close(projected, expected[f"{run}.image_projected"], atol=1e-4, rtol=1e-4)

    real = inputs["attention_mask"].bool()

    def same(ours: torch.Tensor, key: str) -> None:
        reference = expected[f"{run}.{key}"][:, : real.shape[1]]  # padded to a multiple of 8
        torch.testing.assert_close(ours[real], reference[real], atol=1e-4, rtol=1e-4)

    same(outputs.logits, "logits")
    same(outputs.hidden_states[0], "concat.hidden_states")
    layers = model.config.text_config.num_hidden_layers
    for layer in range(1, layers + 1):
        same(outputs.hidden_states[layer], f"hidden_states.{layer}")
    torch.testing.assert_close(outputs.loss[None], expected[f"{run}.loss"], atol=1e-5, rtol=0)


@backends
@pytest.mark.parametrize(("switch", "attention"), [("mmca_off", "causal"), ("mmca_on", "mmca_reference")])
@pytest.mark.parametrize("run", ["gen", "gen_multi"])
@pytest.mark.parametrize("name", CASES)
def test_greedy_generation(name, run, switch, attention, backend):
    case = ReferenceCase(name)
    expected = case.outputs[f"{run}.{switch}.embed_swapped.output_ids"][0].tolist()
    model, inputs = case.model(attention, backend), case.batch(run)
    inputs.pop("labels")
    prompt = inputs["input_ids"].shape[1]
    generated = model.generate(**inputs, max_new_tokens=case.config["gen_max_new_tokens"], do_sample=False, pad_token_id=2)[
        0, prompt:
    ].tolist()
    assert expected[0] == 1  # the original's output begins with the token that its decoding started from
    assert generated == expected[1:]


@backends
@pytest.mark.parametrize("run", ["single", "batch"])
def test_merged_adapters(run, backend):
    case = ReferenceCase("G_lora")
    model, inputs = case.model("mmca_reference", backend), case.batch(run)
    with torch.no_grad():
        outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    for state in ("fused", "unfused"):
        logits = case.outputs[f"{state}.{run}.logits"][:, : real.shape[1]]
        torch.testing.assert_close(outputs.logits[real], logits[real], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(outputs.loss[None], case.outputs[f"{state}.{run}.loss"], atol=1e-5, rtol=0)


def test_merged_adapters_generate():
    """Case G was generated with the frozen table for generated tokens, so that it is put in here by hand."""
    case = ReferenceCase("G_lora")
    model, inputs = case.model("mmca_reference", "sdpa"), case.batch("gen")
    frozen = case.weights["lang_decoder.model.embed_tokens.weight"]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    types = (inputs["input_ids"] == model.config.image_token_id).long()
    generated: list[int] = []
    for _ in range(case.config["gen_max_new_tokens"]):
        with torch.no_grad():
            step = model(inputs_embeds=embeds, mm_token_type_ids=types, pixel_values=inputs["pixel_values"])
        generated.append(int(step.logits[0, -1].argmax()))
        embeds = torch.cat([embeds, frozen[generated[-1]][None, None]], dim=1)
        types = torch.nn.functional.pad(types, (0, 1))
    for state in ("fused", "unfused"):
        assert generated == case.outputs[f"{state}.gen.output_ids"][0, 1:].tolist()


@backends
@pytest.mark.parametrize(("switch", "attention"), [("mmca_off", "causal"), ("mmca_on", "mmca_reference")])
def test_gradients(switch, attention, backend):
    case = ReferenceCase("H_gradients")
    model = case.model(attention, backend).set_trainable()
    loss = model(**case.batch("batch")).loss
    loss.backward()
    torch.testing.assert_close(loss.detach()[None], case.outputs[f"{switch}.batch.loss"], atol=1e-5, rtol=0)
    parameters = dict(model.named_parameters())
    names = {
        "projection.0.weight": "model.multi_modal_projector.linear.weight",
        "projection.0.bias": "model.multi_modal_projector.linear.bias",
        "projection.1.weight": "model.multi_modal_projector.layer_norm.weight",
        "projection.1.bias": "model.multi_modal_projector.layer_norm.bias",
        "lang_embed.weight": "model.language_model.embed_tokens.weight",
    }
    assert {n for n, p in parameters.items() if p.requires_grad} == set(names.values())
    for theirs, ours in names.items():
        expected = case.outputs[f"{switch}.batch.grad.{theirs}"]
        torch.testing.assert_close(parameters[ours].grad, expected, atol=1e-5, rtol=1e-4, msg=f"{theirs}")


class OneLayer(nn.Module):
    """A single LlamaAttention as a decoder, which is what case F dumped."""

    _supports_attention_backend = True

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.self_attn = LlamaAttention(config, layer_idx=0)


@pytest.mark.parametrize("switch", ["mmca_off", "mmca_on"])
def test_one_attention_layer(switch):
    case = ReferenceCase("F_attention_micro")
    text = {k: v for k, v in case.config["llama"].items() if k != "rope_theta"}
    text_config = LlamaConfig(**text, attn_implementation="eager")
    attention = "mmca_reference" if switch == "mmca_on" else "causal"
    config = DSVLConfig(text_config=text_config, image_token_id=0, multimodal_attention=attention)
    layer = OneLayer(text_config)
    layer.self_attn.load_state_dict(case.weights)
    route_attention(layer, config)
    hidden, modality = case.inputs["hidden_states"], case.inputs["modality_mask"]
    types = (modality == 2).long()
    real = modality != 0

    def run(hidden, types, real, cache, positions):
        kwargs = dict(inputs_embeds=hidden, attention_mask=real, cache=cache)
        visible = visibilities(text_config, **kwargs)[None]
        masks, mask = {None: CodedMask(mmca_reference_codes(visible, types))}, None
        if switch == "mmca_off":
            masks, mask = None, torch.where(visible.dense(), 0.0, torch.finfo(torch.float32).min)
        rotary = LlamaRotaryEmbedding(text_config)(hidden, positions)
        with torch.no_grad():
            inputs = dict(position_embeddings=rotary, attention_mask=mask, past_key_values=cache)
            return layer.self_attn(hidden, multimodal_masks=masks, **inputs)

    positions = case.inputs["position_ids"]
    output, weights = run(hidden, types, real, None, positions)
    torch.testing.assert_close(output, case.outputs[f"{switch}.attn_output"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, case.outputs[f"{switch}.attn_weights"], atol=1e-5, rtol=1e-5)

    # The last position as a decode step. The original forgets there that an image token sees itself alone, so rows that
    # end on an image are held against its own prefill instead.
    cache = DynamicCache(config=text_config)
    run(hidden[:, :-1], types[:, :-1], real[:, :-1], cache, positions[:, :-1])
    step, _ = run(hidden[:, -1:], types, real, cache, positions[:, -1:])
    expected = case.outputs[f"{switch}.decode_last.attn_output"]
    if switch == "mmca_on":
        on_image = types[:, -1] == 1
        expected = torch.where(on_image[:, None, None], case.outputs["mmca_on.attn_output"][:, -1:], expected)
        assert on_image.sum() == 3
    torch.testing.assert_close(step, expected, atol=1e-5, rtol=1e-5)

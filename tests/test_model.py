"""What transformers asks of its own models."""

import copy
import pickle

import pytest
import torch
from accelerate import dispatch_model
from conftest import FAMILIES, IMAGE_ID, VOCABULARY, batch, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from dsvl import DSVLForConditionalGeneration, DSVLModel, modeling_dsvl

LAYOUTS = ("ttIttt", "ttttttt", "IttIttt")


def labelled(*layouts: str, dtype: torch.dtype = torch.float64) -> dict:
    inputs = batch(*layouts, side="right", dtype=dtype)
    supervised = inputs["attention_mask"].bool() & (inputs["input_ids"] != IMAGE_ID)
    supervised[:, :2] = False
    return inputs | {"labels": torch.where(supervised, inputs["input_ids"], -100)}


def test_the_loss_is_the_mean_over_supervised_tokens():
    model, inputs = tiny_model(), labelled(*LAYOUTS)
    with torch.no_grad():
        outputs = model(**inputs)
    targets = inputs["labels"][:, 1:]
    expected = nn.functional.cross_entropy(outputs.logits[:, :-1][targets != -100], targets[targets != -100])
    torch.testing.assert_close(outputs.loss.double(), expected, atol=1e-6, rtol=1e-6)


def test_training_computes_no_logits_but_the_supervised_ones():
    model, inputs = tiny_model().train(), labelled(*LAYOUTS)
    asked = []
    model.lm_head.register_forward_hook(lambda module, args, output: asked.append(output.shape))
    skipped = model(**inputs)
    assert skipped.logits is None
    assert asked == [(int((inputs["labels"][:, 1:] != -100).sum()), VOCABULARY)]
    whole = model(**inputs, skip_logits=False)
    assert whole.logits.shape == (*inputs["input_ids"].shape, VOCABULARY)
    torch.testing.assert_close(skipped.loss, whole.loss)
    gradients = [torch.autograd.grad(out.loss, model.lm_head.weight)[0] for out in (skipped, whole)]
    torch.testing.assert_close(*gradients, atol=1e-7, rtol=1e-5)
    assert model.eval()(**inputs).logits is not None
    assert model(**inputs, skip_logits=True).logits is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_parts_is_the_loss(tied, monkeypatch):
    model, inputs = tiny_model(tie_word_embeddings=tied).train(), labelled(*LAYOUTS)
    whole = model(**inputs).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, parameters, allow_unused=True)
    monkeypatch.setattr(modeling_dsvl, "LOGITS_AT_ONCE", 4 * VOCABULARY + 3)
    asked = []
    model.lm_head.register_forward_hook(lambda module, args, output: asked.append(len(output)))
    loss = model(**inputs).loss
    supervised = int((inputs["labels"][:, 1:] != -100).sum())
    assert max(asked) == 4 and sum(asked) == supervised > 8
    torch.testing.assert_close(loss, whole)
    got = torch.autograd.grad(loss, parameters, allow_unused=True)
    assert sum(asked) == 2 * supervised  # computed again, not kept
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).loss, whole)


@pytest.mark.parametrize("skip_logits", [True, False])
def test_nothing_supervised_is_a_zero_loss_with_a_graph(skip_logits):
    model, inputs = tiny_model().train(), labelled(*LAYOUTS)
    inputs["labels"].fill_(-100)
    loss = model(**inputs, skip_logits=skip_logits).loss
    loss.backward()
    assert loss.item() == 0
    assert model.model.multi_modal_projector.linear.weight.grad.abs().sum() == 0


@pytest.mark.parametrize("skip_logits", [True, False])
def test_the_loss_does_not_depend_on_the_accumulation_split(skip_logits):
    model, inputs = tiny_model().train(), labelled(*LAYOUTS)
    items = (inputs["labels"][:, 1:] != -100).sum()
    whole = model(**inputs, skip_logits=skip_logits).loss
    total, first = 0, 0
    for row, layout in enumerate(LAYOUTS):
        part = {k: v[row : row + 1] for k, v in inputs.items() if k != "pixel_values"}
        pixels = inputs["pixel_values"][first : first + layout.count("I")]
        first += layout.count("I")
        part["pixel_values"] = pixels if len(pixels) else None
        total = total + model(**part, num_items_in_batch=items, skip_logits=skip_logits).loss
    torch.testing.assert_close(total, whole)


def learning(model: nn.Module) -> set[str]:
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = {
        "embeddings": "model.language_model.embed_tokens.",
        "projector": "model.multi_modal_projector.",
        "vision_tower": "model.vision_tower.",
        "lm_head": "lm_head.",
        "language_model": "model.language_model.",
    }
    found = set()
    for name in names:
        found.add(next(part for part, prefix in parts.items() if name.startswith(prefix)))
    return found


def test_set_trainable_says_what_learns():
    model = tiny_model()
    assert learning(model.set_trainable()) == {"projector", "embeddings"}
    for part in ("projector", "embeddings", "vision_tower", "language_model", "lm_head"):
        nothing = dict.fromkeys(("projector", "embeddings", "vision_tower", "language_model", "lm_head"), False)
        assert learning(model.set_trainable(**(nothing | {part: True}))) == {part}


def test_a_tied_head_learns_with_the_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert model.set_trainable().lm_head.weight.requires_grad
    with pytest.raises(ValueError, match="tied to its embeddings.*pass embeddings=True"):
        model.set_trainable(embeddings=False, lm_head=True)


def test_a_frozen_tower_keeps_no_graph():
    model, inputs = tiny_model().train(), labelled(*LAYOUTS)
    features = model.set_trainable().get_image_features(inputs["pixel_values"])
    assert not features.last_hidden_state.requires_grad and features.pooler_output[0].requires_grad
    features = model.set_trainable(vision_tower=True).get_image_features(inputs["pixel_values"])
    assert features.last_hidden_state.requires_grad
    model(**inputs).loss.backward()
    assert model.model.vision_tower.embeddings.patch_embedding.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_neither_loss_nor_gradients(family, reentrant):
    plain, checkpointed = tiny_model(family).train().set_trainable(), tiny_model(family).train().set_trainable()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert checkpointed.model.language_model.layers[0].gradient_checkpointing
    inputs = labelled(*LAYOUTS)
    losses = [model(**inputs, use_cache=False).loss for model in (plain, checkpointed)]
    for loss in losses:
        loss.backward()
    assert losses[0].equal(losses[1])
    for (name, one), two in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (one.grad is None) == (two.grad is None), name
        if one.grad is not None:
            torch.testing.assert_close(one.grad, two.grad, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load_give_the_same_model(family, tied, tmp_path):
    model = tiny_model(family, dtype=torch.float32, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = DSVLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    inputs = batch(*LAYOUTS, dtype=torch.float32)
    with torch.no_grad():
        assert loaded(**inputs).logits.equal(model(**inputs).logits)
    assert "mmca_" not in (tmp_path / "config.json").read_text().replace('"multimodal_attention": "mmca', "")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_routed_by_itself(copied):
    model, inputs = tiny_model(backend="sdpa", dtype=torch.float32), batch(*LAYOUTS, dtype=torch.float32)
    real = inputs["attention_mask"].bool()
    twin = copied(model)
    twin.set_attn_implementation("eager")
    names = [m.model.language_model.layers[0].self_attn.config._attn_implementation for m in (model, twin)]
    assert "mmca_sdpa" in names[0] and "mmca_eager" in names[1]
    twin.config.multimodal_attention = "causal"
    with torch.no_grad():
        assert (model(**inputs).logits - twin(**inputs).logits)[real].abs().max() > 1e-3
        twin.config.multimodal_attention = "mmca"
        torch.testing.assert_close(model(**inputs).logits[real], twin(**inputs).logits[real], atol=1e-5, rtol=1e-5)


def test_attn_implementation_is_the_users_word(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for backend in ("eager", "sdpa", "flex_attention"):
        loaded = DSVLForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=backend)
        assert loaded.config._attn_implementation == backend
        attention = loaded.model.language_model.layers[0].self_attn
        assert attention.config._attn_implementation.startswith(f"mmca_{backend}:")
    with pytest.raises(ValueError, match="[Ff]lash"):
        DSVLForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma2"])
def test_eager_equals_sdpa(family):
    inputs = batch(*LAYOUTS, dtype=torch.float32)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        eager, sdpa = (tiny_model(family, backend=b, dtype=torch.float32)(**inputs).logits for b in ("eager", "sdpa"))
    torch.testing.assert_close(eager[real], sdpa[real], atol=1e-4, rtol=1e-4)


def test_resized_embeddings_stay_consistent():
    model, inputs = tiny_model(), batch(*LAYOUTS)
    with torch.no_grad():
        before = model(**inputs).logits
        model.resize_token_embeddings(128, mean_resizing=False)
        after = model(**inputs).logits
    assert model.config.text_config.vocab_size == 128 and model.lm_head.weight.shape == (128, 32)
    torch.testing.assert_close(after[..., :VOCABULARY], before)


@pytest.mark.parametrize("attention", ["mmca", "mmca_reference"])
def test_device_map_with_offload(attention, tmp_path):
    """Every second layer lives on disk: masks travel to whichever device a layer is run on."""
    plain, spread = (
        tiny_model(attention=attention, dtype=torch.float32),
        tiny_model(attention=attention, dtype=torch.float32),
    )
    device_map = {
        "model.vision_tower": "cpu",
        "model.multi_modal_projector": "disk",
        "model.language_model.embed_tokens": "cpu",
        "model.language_model.layers.0": "cpu",
        "model.language_model.layers.1": "disk",
        "model.language_model.norm": "cpu",
        "model.language_model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    spread = dispatch_model(spread, device_map, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    inputs = batch(*LAYOUTS, dtype=torch.float32)
    with torch.no_grad():
        assert spread(**inputs).logits.equal(plain(**inputs).logits)
    generated = [model.generate(**inputs, max_new_tokens=4, do_sample=False) for model in (plain, spread)]
    assert generated[0].equal(generated[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_half_precision_stays_near_the_whole(dtype, backend):
    half, whole = tiny_model(backend=backend, dtype=dtype), tiny_model(dtype=torch.float32)
    inputs = batch(*LAYOUTS, dtype=torch.float32)  # pixel values come in float32 from the processor
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        got, expected = half(**inputs).logits[real].float(), whole(**inputs).logits[real]
    assert torch.isfinite(got).all()
    assert (got - expected).norm() / expected.norm() < (0.1 if dtype == torch.bfloat16 else 0.02)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_compiles_as_one_graph(backend):
    model, inputs = tiny_model(backend=backend, dtype=torch.float32), batch(*LAYOUTS, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, got = model(**inputs, use_cache=False).logits, compiled(**inputs, use_cache=False).logits
    torch.testing.assert_close(got[real], expected[real], atol=1e-4, rtol=1e-4)


def test_compiled_training_gives_the_same_loss_and_gradients():
    model, inputs = tiny_model(dtype=torch.float32).train(), labelled(*LAYOUTS, dtype=torch.float32)
    expected = model(**inputs, use_cache=False).loss
    expected.backward()
    gradient = model.model.multi_modal_projector.linear.weight.grad.clone()
    model.zero_grad()
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, use_cache=False).loss
    got.backward()
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.model.multi_modal_projector.linear.weight.grad, gradient, atol=1e-5, rtol=1e-4)


def test_trainer_overfits_a_handful_of_samples(tmp_path):
    model = tiny_model(dtype=torch.float32, initializer_range=0.05).set_trainable(language_model=True, lm_head=True)
    samples = []
    for seed in range(4):
        inputs = batch("tttIttt", dtype=torch.float32, seed=seed)
        labels = torch.where(inputs["input_ids"] == IMAGE_ID, -100, inputs["input_ids"])
        samples.append({k: v[0] for k, v in inputs.items() if k != "pixel_values"} | {"labels": labels[0]})
        samples[-1]["pixel_values"] = inputs["pixel_values"] + seed

    def collate(rows: list[dict]) -> dict:
        stacked = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "pixel_values"}
        return stacked | {"pixel_values": torch.cat([row["pixel_values"] for row in rows])}

    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=60,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        logging_steps=10,
        remove_unused_columns=False,
        disable_tqdm=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=samples, data_collator=collate)
    trainer.train()
    assert trainer.model_accepts_loss_kwargs
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] > 1.0 and losses[-1] < 0.1


def test_the_body_alone_loads_as_a_body_and_not_as_a_whole(tmp_path):
    model, inputs = tiny_model(dtype=torch.float32), batch(*LAYOUTS, dtype=torch.float32)
    model.model.save_pretrained(tmp_path)
    body = DSVLModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert body(**inputs).last_hidden_state.equal(model.model(**inputs).last_hidden_state)
    with pytest.raises(ValueError, match="holds no lm_head.weight.*DSVLModel.from_pretrained"):
        DSVLForConditionalGeneration.from_pretrained(tmp_path)


def test_outputs_are_tuples_on_request():
    model, inputs = tiny_model(), batch(*LAYOUTS)
    with torch.no_grad():
        named, plain = model(**inputs), model(**inputs, return_dict=False)
    assert isinstance(plain, tuple) and plain[0].equal(named.logits)


def test_images_that_do_not_match_their_placeholders_are_refused():
    model, inputs = tiny_model(), batch("ttIttt", "Itt")
    for call in (model, lambda **kwargs: model.generate(**kwargs, max_new_tokens=1)):
        with pytest.raises(ValueError, match=r"hold \[5, 5\] image tokens, 10 in all, but there are 5 .*\(1 images of 5\)"):
            call(**(inputs | {"pixel_values": inputs["pixel_values"][:1]}))
        with pytest.raises(ValueError, match=r"hold \[5, 5\] image tokens, 10 in all, but there are 15"):
            call(**(inputs | {"pixel_values": inputs["pixel_values"][[0, 1, 1]]}))
        mixed = inputs["input_ids"].clone()  # as many in all, but not whole images in each sample
        mixed[0, (mixed[0] == IMAGE_ID).nonzero()[0]] = 5
        mixed[1, -1] = IMAGE_ID
        with pytest.raises(ValueError, match=r"hold \[4, 6\] image tokens, but an image takes 5"):
            call(input_ids=mixed, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"])
    with pytest.raises(ValueError, match="10 in all, but there are 0"):
        model(input_ids=inputs["input_ids"])
    with pytest.raises(ValueError, match="does not tell text from images"):
        model(**(inputs | {"attention_mask": torch.ones(2, 1, 10, 10, dtype=torch.bool)}))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(attention_mask=inputs["attention_mask"])


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    model = tiny_model(dtype=torch.float32)
    state = model.state_dict()
    del state["model.multi_modal_projector.linear.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(
        ValueError, match=r"lacks 1 weights, such as model\.multi_modal_projector\.linear\.weight; they would"
    ):
        DSVLForConditionalGeneration.from_pretrained(tmp_path)

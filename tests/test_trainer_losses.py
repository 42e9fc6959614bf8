"""The losses of DSVLTrainer: label smoothing, evaluations without logits of all tokens, predictions."""

import pytest
import torch
from torch import nn
from training_runs import make_checkpoint, make_conversations
from transformers import AutoProcessor, Trainer, TrainingArguments

from dsvl import DSVLForConditionalGeneration, modeling_dsvl
from dsvl.data import load_conversations
from dsvl.training import ConversationCollator, DSVLTrainer, lora_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    make_checkpoint(folder, initializer_range=0.3)
    make_conversations(folder, layout="pptp")
    return folder


@pytest.fixture
def model(folder):
    return DSVLForConditionalGeneration.from_pretrained(folder / "model").set_trainable()


@pytest.fixture(scope="module")
def rows(folder):
    data = load_conversations(folder / "data.jsonl")
    return [data[index] for index in range(len(data))]


@pytest.fixture(scope="module")
def collator(folder):
    return ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))


def make_trainer(model, collator, rows, output, kind=DSVLTrainer, compute_metrics=None, **arguments):
    values = dict(remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no")
    arguments = TrainingArguments(str(output), **values | arguments)
    return kind(
        model=model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collator,
        compute_metrics=compute_metrics,
    )


# -- label smoothing ---------------------------------------------------------------------------------------------------


def smoothed(model, batch, factor):
    """(1 - factor) * nll + factor * mean(-log p) of shifted labels, from the logits of the whole batch."""
    with torch.no_grad():
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, skip_logits=False).logits
    labels, surprise = batch["labels"][:, 1:], -logits[:, :-1].log_softmax(-1)
    counted = labels != -100
    nll = surprise.gather(-1, labels.clamp(min=0)[..., None])[..., 0][counted]
    return ((1 - factor) * nll + factor * surprise.mean(-1)[counted]).mean().item()


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("factor", [1e-9, 0.1, 0.5])
def test_label_smoothing_is_that_of_shifted_labels(model, collator, rows, tmp_path, factor, training):
    trainer = make_trainer(model, collator, rows, tmp_path, label_smoothing_factor=factor)
    batch = collator(rows)
    expected = smoothed(model.eval(), batch, factor)
    model.train(training)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected, abs=1e-5)
    plain = model(**batch).loss.item()
    assert plain == pytest.approx(smoothed(model.eval(), batch, 0), abs=1e-5)  # without the Trainer nothing is smoothed
    assert (abs(plain - expected) < 1e-5) == (factor == 1e-9)


def test_transformers_own_trainer_smooths_shifted_labels_too(model, collator, rows, tmp_path):
    trainer = make_trainer(model.eval(), collator, rows, tmp_path, kind=Trainer, label_smoothing_factor=0.1)
    batch = collator(rows)
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(smoothed(model, batch, 0.1), abs=1e-5)


def test_label_smoothing_obeys_the_number_of_items(model, collator, rows, tmp_path):
    trainer = make_trainer(model, collator, rows, tmp_path, label_smoothing_factor=0.1)
    batch = collator(rows)
    counted = (batch["labels"][:, 1:] != -100).sum()
    whole = trainer.compute_loss(model, dict(batch)).item()
    for items in (counted * 3, int(counted) * 3):
        assert trainer.compute_loss(model, dict(batch), num_items_in_batch=items).item() == pytest.approx(whole / 3)
    parts = [trainer.compute_loss(model, collator([row]), num_items_in_batch=counted).item() for row in rows]
    assert sum(parts) == pytest.approx(whole, abs=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "adapters"])
def test_a_step_with_label_smoothing_has_the_gradients_of_the_formula(
    folder, model, collator, rows, tmp_path, monkeypatch, adapters
):
    monkeypatch.setattr(modeling_dsvl, "LOGITS_AT_ONCE", 2 * model.config.text_config.vocab_size)  # parts, computed again
    if adapters:
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, lora_config(model, 2))
    batch = collator(rows)
    trainer = make_trainer(model, collator, rows, tmp_path, label_smoothing_factor=0.3)
    trainer.current_gradient_accumulation_steps = 1
    trainer.training_step(model, dict(batch))
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    logits = model(**{key: value for key, value in batch.items() if key != "labels"}, skip_logits=False).logits
    loss = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=0.3, ignore_index=-100
    )
    loss.backward()
    assert found
    for name, parameter in model.named_parameters():
        if name in found:
            torch.testing.assert_close(found[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_a_conversation_can_be_memorized_with_smoothed_labels(model, collator, rows, tmp_path):
    model.set_trainable(language_model=True, lm_head=True)
    arguments = dict(label_smoothing_factor=0.1, max_steps=60, learning_rate=1e-2, per_device_train_batch_size=1)
    trainer = make_trainer(model, collator, rows[:1], tmp_path, **arguments)
    trainer.train()
    batch = collator(rows[:1])
    with torch.no_grad():
        said = model.eval()(**batch).logits[:, :-1].argmax(-1)
    labels = batch["labels"][:, 1:]
    assert (said == labels)[labels != -100].all()


# -- evaluation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def head_rows(model, monkeypatch):
    """The number of positions for which the head computes logits, per call."""
    seen = []
    model.lm_head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][..., 0].numel()))
    return seen


def test_an_evaluation_of_the_loss_has_logits_of_supervised_tokens_alone(model, collator, rows, tmp_path, head_rows):
    batch = collator(rows)
    supervised = int((batch["labels"][:, 1:] != -100).sum())
    trainer = make_trainer(model, collator, rows, tmp_path)
    lean = trainer.evaluate()["eval_loss"]
    assert head_rows == [supervised] and supervised < batch["labels"].numel() / 3
    head_rows.clear()
    trainer.args.prediction_loss_only = True
    trainer.compute_metrics = lambda predictions: {}
    assert trainer.predict(rows).predictions is None and head_rows == [supervised]
    with torch.no_grad():
        outputs = model.eval()(**batch)
    assert outputs.logits.shape[:2] == batch["labels"].shape  # as in other models of transformers
    assert outputs.loss.item() == pytest.approx(lean, abs=1e-5)


def test_an_evaluation_with_metrics_has_all_logits(model, collator, rows, tmp_path):
    def count(predictions):
        return {"shape": list(predictions.predictions.shape)}

    trainer = make_trainer(model, collator, rows, tmp_path, compute_metrics=count, per_device_eval_batch_size=len(rows))
    shape = trainer.evaluate()["eval_shape"]
    assert shape == [*collator(rows)["input_ids"].shape, model.config.text_config.vocab_size]


@pytest.mark.parametrize("kind", [Trainer, DSVLTrainer])
def test_predictions_of_rows_with_and_without_images(model, collator, rows, tmp_path, kind):
    mixed = [rows[0], rows[1], rows[2]]  # image, image, text
    trainer = make_trainer(model, collator, mixed, tmp_path, kind=kind, per_device_eval_batch_size=1)
    predicted = trainer.predict(mixed).predictions
    assert predicted.shape[0] == 3 and predicted.shape[2] == model.config.text_config.vocab_size
    for row, sample in enumerate(mixed):
        batch = collator([sample])
        with torch.no_grad():
            expected = model.eval()(**batch).logits[0]
        torch.testing.assert_close(torch.from_numpy(predicted[row, : len(expected)]), expected, atol=1e-5, rtol=1e-5)


# -- nothing to train --------------------------------------------------------------------------------------------------


def test_an_epoch_without_a_trained_token_is_an_error(folder, model, rows, tmp_path):
    processor = AutoProcessor.from_pretrained(folder / "model")
    collator = ConversationCollator(processor, max_length=20, on_bad_sample="skip")
    trainer = make_trainer(model, collator, rows, tmp_path, num_train_epochs=3, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"Nothing was trained in 2 steps: no batch had a token with a label"):
        trainer.train()


def test_noise_is_added_to_the_embeddings_in_training_only(folder, collator, rows, tmp_path):
    """NEFTune: `neftune_noise_alpha`."""
    first = {}
    for alpha in (None, 50.0):
        model = DSVLForConditionalGeneration.from_pretrained(folder / "model").set_trainable()
        before = model.eval()(**collator(rows)).loss.item()
        arguments = dict(neftune_noise_alpha=alpha, learning_rate=0.0, max_steps=1, per_device_train_batch_size=4)
        trainer = make_trainer(model, collator, rows, tmp_path, logging_steps=1, **arguments)
        first[alpha] = trainer.train().training_loss
        assert model.eval()(**collator(rows)).loss.item() == pytest.approx(before, abs=1e-5)
    assert first[None] == pytest.approx(before, abs=1e-5) and abs(first[50.0] - before) > 1e-3

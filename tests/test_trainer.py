"""Parameter groups, evaluations, and complete checkpoints."""

import json
import logging

import pytest
import torch
from conftest import tiny_model, tiny_vision_config
from torch import nn
from training_runs import make_checkpoint, make_conversations
from transformers import LlamaConfig, TrainerControl, TrainerState, TrainingArguments

from dsvl import DSVLConfig, DSVLForConditionalGeneration
from dsvl.configuration_dsvl import PROJECTOR_TYPES
from dsvl.data import load_conversations
from dsvl.training.adapters import lora_config
from dsvl.training.arguments import DSVLTrainingArguments
from dsvl.training.checkpoints import MARKER, CompleteCheckpoints, last_complete_checkpoint, mark_complete, why_incomplete
from dsvl.training.collator import ConversationCollator
from dsvl.training.evaluation import exact_match
from dsvl.training.trainer import DSVLTrainer, count_parameters, parameter_groups

# -- parameter groups --------------------------------------------------------------------------------------------------

EVERYTHING = dict(projector=True, embeddings=True, vision_tower=True, language_model=True, lm_head=True)


def small_model(projector_type="linear", **text):
    values = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    config = DSVLConfig(tiny_vision_config(), LlamaConfig(**values | text), projector_type=projector_type, image_token_id=90)
    torch.manual_seed(0)
    return DSVLForConditionalGeneration(config)


def decays(model, **rates):
    """Parameter name -> its weight decay; every trainable parameter must be in exactly one group."""
    groups = parameter_groups(model, 0.1, **rates)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    names = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sorted(grouped) == sorted(names) and all(group["params"] for group in groups)
    return {names[id(parameter)]: group["weight_decay"] for group in groups for parameter in group["params"]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
def test_matrices_decay_and_nothing_else(projector_type, tied):
    model = small_model(projector_type, tie_word_embeddings=tied)
    model.set_trainable(**EVERYTHING)
    linear = {
        f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    }
    linear |= set() if tied else {"lm_head.weight"}
    found = decays(model)
    assert len(found) == sum(p.requires_grad for p in model.parameters()) and set(found.values()) == {0.0, 0.1}
    assert {name for name, decay in found.items() if decay} == linear


def test_embeddings_and_parameters_outside_of_layers_do_not_decay():
    model = small_model("perceiver")
    model.set_trainable(**EVERYTHING)
    found = decays(model)
    free = [
        "model.language_model.embed_tokens.weight",
        "model.language_model.norm.weight",
        "model.language_model.layers.0.input_layernorm.weight",
        "model.vision_tower.embeddings.class_embedding",
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.vision_tower.pre_layrnorm.weight",
        "model.vision_tower.encoder.layers.0.layer_norm1.bias",
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.bias",
        "model.multi_modal_projector.query",
        "model.multi_modal_projector.position_embedding",
        "model.multi_modal_projector.query_norm.weight",
        "model.multi_modal_projector.linear.bias",
    ]
    assert {name: found[name] for name in free} == dict.fromkeys(free, 0.0)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "phi3"])
def test_norms_of_other_decoders_do_not_decay(family):
    model = tiny_model(family)
    model.set_trainable(**EVERYTHING)
    found = decays(model)
    norms = [name for name, parameter in model.named_parameters() if parameter.ndim == 1 and parameter.requires_grad]
    assert len(norms) > 10 and not any(found[name] for name in norms)


def test_frozen_parameters_are_in_no_group():
    model = small_model()
    model.set_trainable(projector=True, embeddings=False, vision_tower=False, language_model=False, lm_head=False)
    assert set(decays(model)) == {
        f"model.multi_modal_projector.{name}"
        for name in ("linear.weight", "linear.bias", "layer_norm.weight", "layer_norm.bias")
    }


@pytest.mark.parametrize("train", [dict(projector=True, embeddings=True), EVERYTHING], ids=["usual", "everything"])
def test_embeddings_have_their_own_learning_rate(train):
    model = small_model()
    model.set_trainable(**dict.fromkeys(EVERYTHING, False) | train)
    groups = parameter_groups(model, 0.1, {"embeddings": 3e-3})
    with_rate = [group for group in groups if "lr" in group]
    assert [group["lr"] for group in with_rate] == [3e-3]
    (table,) = with_rate[0]["params"]
    assert table is model.get_input_embeddings().weight and with_rate[0]["weight_decay"] == 0
    assert not any("lr" in group for group in parameter_groups(model, 0.1))
    optimizer = torch.optim.AdamW(groups, lr=1e-5)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [1e-5, 3e-3]


def test_every_part_can_have_a_learning_rate():
    peft = pytest.importorskip("peft")
    rates = {"projector": 1e-3, "embeddings": 2e-3, "vision": 3e-3, "language": 4e-3, "head": 5e-3}
    model = small_model()
    model.set_trainable(**dict.fromkeys(EVERYTHING, True))
    found = {id(p): group["lr"] for group in parameter_groups(model, 0.1, rates) for p in group["params"]}
    inner = model.model
    tower, decoder = inner.vision_tower, inner.language_model
    for module, rate in (
        (inner.multi_modal_projector, 1e-3),
        (decoder.embed_tokens, 2e-3),
        (tower, 3e-3),
        (decoder.layers, 4e-3),
    ):
        assert {found[id(parameter)] for parameter in module.parameters() if id(parameter) in found} == {rate}
    assert found[id(decoder.norm.weight)] == 4e-3 and found[id(model.lm_head.weight)] == 5e-3
    adapted = peft.get_peft_model(small_model(), lora_config(small_model(), 4, train=["projector"], vision=True))
    groups = parameter_groups(adapted, 0.1, {"adapters": 6e-3, "projector": 1e-3})
    by_id = {id(parameter): group.get("lr") for group in groups for parameter in group["params"]}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            assert by_id[id(parameter)] == (6e-3 if "lora_" in name else 1e-3), name


def test_the_former_argument_of_the_embeddings_is_read_with_a_warning():
    model = small_model()
    for former in ({"embeddings_learning_rate": 3e-3}, {"learning_rates": 3e-3}):
        with pytest.warns(DeprecationWarning, match="use learning_rates="):
            groups = parameter_groups(model, 0.1, **former)
        assert [group["lr"] for group in groups if "lr" in group] == [3e-3]


def test_a_rate_of_frozen_embeddings_changes_nothing():
    model = small_model()
    model.set_trainable(projector=True, embeddings=False, vision_tower=False, language_model=False, lm_head=False)
    assert not any("lr" in group for group in parameter_groups(model, 0.1, {"embeddings": 3e-3}))


@pytest.mark.parametrize("projector_type", PROJECTOR_TYPES)
def test_groups_of_a_model_with_adapters(projector_type):
    peft = pytest.importorskip("peft")
    model = small_model(projector_type)
    config = lora_config(model, 4, vision=True)
    model = peft.get_peft_model(model, config)
    found = decays(model, learning_rates={"embeddings": 3e-3})
    adapters = {name for name in found if "lora_" in name}
    assert len(adapters) == 2 * (7 + 2 * 6) and all(found[name] for name in adapters)
    full = {name.partition("modules_to_save.default.")[2]: decay for name, decay in found.items() if name not in adapters}
    plain = small_model(projector_type).model.multi_modal_projector
    linear = {f"{name}.weight" for name, module in plain.named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, decay in full.items() if decay} == linear
    assert set(full) == {name for name, _ in plain.named_parameters()} | {"weight"}  # the token embeddings'
    (group,) = [group for group in parameter_groups(model, 0.1, {"embeddings": 3e-3}) if "lr" in group]
    assert [tuple(parameter.shape) for parameter in group["params"]] == [(96, 32)] and group["weight_decay"] == 0


def test_parameters_are_counted_once():
    model = small_model(tie_word_embeddings=True)
    model.set_trainable(projector=True, embeddings=True, vision_tower=False, language_model=False, lm_head=False)
    projector = 16 * 32 + 32 + 2 * 32
    assert count_parameters(model) == (96 * 32 + projector, sum(parameter.numel() for parameter in model.parameters()))


# -- the Trainer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trainer")
    make_checkpoint(folder, initializer_range=0.3)  # large enough that answers depend on the prompts
    make_conversations(folder, layout="ptptp")
    return folder


@pytest.fixture(scope="module")
def model(folder):
    model = DSVLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float64).eval()
    model.generation_config.eos_token_id = None  # random models may generate it first
    return model


@pytest.fixture
def conversations(folder):
    return load_conversations(folder / "data.jsonl")


def make_trainer(model, processor, conversations, output, **arguments):
    arguments = DSVLTrainingArguments(output_dir=str(output), use_cpu=True, report_to="none", **arguments)
    return DSVLTrainer(
        model=model,
        args=arguments,
        eval_dataset=conversations,
        train_dataset=conversations,
        data_collator=ConversationCollator(processor),
    )


def test_the_trainers_optimizer_has_these_groups(processor, conversations, tmp_path):
    model = small_model()
    model.set_trainable(projector=True, embeddings=True, vision_tower=False, language_model=True, lm_head=False)
    rates = dict(learning_rate=1e-4, learning_rates={"embeddings": 5e-3}, weight_decay=0.1)
    trainer = make_trainer(model, processor, conversations, tmp_path, **rates)
    found = {}
    for group in trainer.create_optimizer().param_groups:
        for parameter in group["params"]:
            assert id(parameter) not in found
            found[id(parameter)] = group["lr"], group["weight_decay"]
    by_name = {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(by_name) == len(found)
    assert by_name["model.language_model.embed_tokens.weight"] == (5e-3, 0)
    assert by_name["model.multi_modal_projector.linear.weight"] == (1e-4, 0.1)
    assert by_name["model.multi_modal_projector.linear.bias"] == (1e-4, 0)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5])
def test_the_loss_of_an_evaluation_is_the_mean_over_all_tokens(model, processor, conversations, tmp_path, batch_size):
    collator, total, tokens = ConversationCollator(processor), 0.0, 0
    for sample in conversations:
        batch = collator([sample])
        with torch.no_grad():
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits
        labels = batch["labels"][:, 1:]
        total += nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels.flatten(), reduction="sum").item()
        tokens += (labels != -100).sum().item()
    trainer = make_trainer(model, processor, conversations, tmp_path, per_device_eval_batch_size=batch_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / tokens, abs=1e-6)


# -- exact answers -----------------------------------------------------------------------------------------------------


def alone(model, processor, messages, **kwargs):
    """The answer to a single prompt, without batching."""
    inputs = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    ids = model.generate(**inputs, do_sample=False, **kwargs)
    return processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def half_right(model, processor, conversations):
    """Conversations in which every second reference answer is the model's, and the fraction of these answers."""
    changed, number, right = [], 0, 0
    for sample in conversations:
        messages = []
        for message in sample["messages"]:
            if message["role"] == "assistant":
                answer = alone(model, processor, messages, max_new_tokens=4)
                assert answer
                reference = f" {answer}\n" if number % 2 else answer + " indeed"
                number, right = number + 1, right + number % 2
                message = {"role": "assistant", "content": reference}
            messages.append(message)
        changed.append({"messages": messages})
    answers = [message["content"] for sample in changed for message in sample["messages"] if message["role"] == "assistant"]
    assert number > 5 and len(set(answers)) > number / 2
    return changed, right / number


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batched_answers_equal_those_to_single_prompts(model, processor, half_right, batch_size):
    samples, share = half_right
    collator = ConversationCollator(processor)
    assert exact_match(model, collator, samples, batch_size, max_new_tokens=4) == pytest.approx(share)
    assert collator.counts.tolist() == [0, 0, 0]  # they count training samples only


def test_the_trainer_reports_exact_answers(model, processor, half_right, tmp_path):
    samples, share = half_right
    options = dict(eval_exact_match=True, eval_max_new_tokens=4, per_device_eval_batch_size=2)
    metrics = make_trainer(model, processor, samples, tmp_path, **options).evaluate()
    assert metrics["eval_exact_match"] == pytest.approx(share)
    assert "eval_exact_match" not in make_trainer(model, processor, samples, tmp_path).evaluate()


class Oracle(nn.Module):
    """Answers the questions that it knows, and records the prompts."""

    def __init__(self, processor, answers, says=str):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.processor, self.answers, self.says, self.prompts = processor, answers, says, []

    def generate(self, input_ids, attention_mask, **kwargs):
        assert not self.training and kwargs["do_sample"] is False and not torch.is_grad_enabled()
        assert attention_mask[:, -1].all()  # padded on the left
        rows = []
        for ids in input_ids:
            prompt = self.processor.decode(ids, skip_special_tokens=True)
            self.prompts.append(prompt)
            (question,) = prompt.rpartition("### Question:\n")[2].strip().splitlines()[:1]
            text = self.says(self.answers[question])
            rows.append(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"][: kwargs["max_new_tokens"]])
        longest = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        return torch.cat([input_ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows])], dim=1)


ANSWERS = {"What is red?": "One cup.", "And blue?": "Two dogs", "Which is green?": "No", "How many cats?": "three cats"}


@pytest.fixture
def known():
    """Two conversations, of three turns and of one; answers are texts and lists of parts."""
    messages = []
    for question, answer in ANSWERS.items():
        messages.append({"role": "user", "content": question})
        parts = [{"type": "text", "text": answer[:2]}, {"type": "text", "text": answer[2:]}]
        messages.append({"role": "assistant", "content": answer if len(messages) % 4 == 1 else parts})
    return [{"messages": messages[:6]}, {"messages": messages[6:]}]


def test_right_answers_count_whatever_white_space_is_around_them(processor, known):
    collator = ConversationCollator(processor)
    for says in (str, lambda answer: f"\n {answer}  ", lambda answer: answer + "</s>"):
        assert exact_match(Oracle(processor, ANSWERS, says), collator, known) == 1.0
    for says in (str.upper, lambda answer: answer + "!", lambda answer: ""):
        assert exact_match(Oracle(processor, ANSWERS, says), collator, known) == 0.0
    some = Oracle(processor, ANSWERS | {"And blue?": "Three dogs"})
    assert exact_match(some, collator, known) == 0.75


def test_a_prompt_contains_the_reference_answers_of_earlier_turns(processor, known):
    oracle = Oracle(processor, ANSWERS, str.upper)
    exact_match(oracle, ConversationCollator(processor), known, batch_size=2)
    assert len(oracle.prompts) == 4
    first, second, third, other = oracle.prompts
    assert "One cup." not in first and "One cup." in second and "Two dogs" not in second
    assert "One cup." in third and "Two dogs" in third and "cup" not in other


def test_an_evaluation_leaves_the_model_as_it_was(processor, known):
    for training in (True, False):
        oracle = Oracle(processor, ANSWERS).train(training)
        exact_match(oracle, ConversationCollator(processor), known)
        assert oracle.training is training
        del oracle.answers["And blue?"]
        with pytest.raises(KeyError):
            exact_match(oracle, ConversationCollator(processor), known)
        assert oracle.training is training
        oracle.answers["And blue?"] = "Two dogs"


def test_turns_that_do_not_fit_are_skipped(processor, known):
    measure = ConversationCollator(processor)
    two_turns = measure.processor.count_tokens(known[0]["messages"][:4])
    oracle = Oracle(processor, ANSWERS)
    assert exact_match(oracle, ConversationCollator(processor, two_turns), known) == 1.0
    assert len(oracle.prompts) == 3
    one_turn = min(measure.processor.count_tokens(sample["messages"][:2]) for sample in known)
    with pytest.raises(ValueError, match="first turn of a conversation takes"):
        exact_match(oracle, ConversationCollator(processor, one_turn - 1), known)
    oracle.prompts = []
    assert exact_match(oracle, ConversationCollator(processor, one_turn - 1, "skip"), known) == 0.0
    assert oracle.prompts == []


def test_a_conversation_with_a_broken_image_can_be_skipped(processor, known, tmp_path):
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n")
    content = [{"type": "image", "path": str(tmp_path / "cut.png")}, {"type": "text", "text": "What?"}]
    broken = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "Nothing"}]}
    oracle = Oracle(processor, ANSWERS)
    assert exact_match(oracle, ConversationCollator(processor, on_bad_sample="skip"), [*known, broken]) == 1.0
    with pytest.raises(ValueError, match="cut.png"):
        exact_match(oracle, ConversationCollator(processor), [*known, broken])


# -- checkpoints -------------------------------------------------------------------------------------------------------


def make_files(folder):
    for name in ("model.safetensors", "optimizer.pt", "global_step2/rank0.pt", "global_step2/rank1.pt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 100)
    return folder


def make_complete(folder):
    mark_complete(make_files(folder))
    return folder


def test_a_marked_checkpoint_is_complete(tmp_path):
    checkpoint = make_complete(tmp_path / "checkpoint-2")
    assert why_incomplete(checkpoint) is None
    assert json.loads((checkpoint / MARKER).read_text()) == dict.fromkeys(
        ["global_step2/rank0.pt", "global_step2/rank1.pt", "model.safetensors", "optimizer.pt"], 100
    )
    (checkpoint / "notes.txt").write_text("Additional files are ignored.")
    assert why_incomplete(checkpoint) is None


def test_a_checkpoint_can_be_marked_again(tmp_path):
    """A resumed run overwrites it."""
    checkpoint = make_complete(tmp_path / "checkpoint-2")
    (checkpoint / "optimizer.pt").write_bytes(b"y" * 7)
    (checkpoint / f"{MARKER}.partial").write_text("{")  # of an interrupted attempt
    for _ in range(2):
        mark_complete(checkpoint)
        assert why_incomplete(checkpoint) is None
    assert not (checkpoint / f"{MARKER}.partial").exists()


def shorten(path):
    path.write_bytes(path.read_bytes()[:60])


DAMAGE = {
    "no marker": (lambda c: (c / MARKER).unlink(), f"it has no {MARKER}, so writing it was interrupted"),
    "half a marker": (
        lambda c: (c / MARKER).rename(c / f"{MARKER}.partial"),
        f"it has no {MARKER}, so writing it was interrupted",
    ),
    "empty marker": (lambda c: (c / MARKER).write_text(""), f"{MARKER} is not JSON"),
    "missing file": (lambda c: (c / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    "missing share": (lambda c: (c / "global_step2/rank1.pt").unlink(), "global_step2/rank1.pt is missing"),
    "short file": (lambda c: shorten(c / "model.safetensors"), "model.safetensors has 60 bytes of 100"),
    "empty file": (lambda c: (c / "optimizer.pt").write_bytes(b""), "optimizer.pt has 0 bytes of 100"),
    "long file": (lambda c: (c / "optimizer.pt").write_bytes(b"x" * 101), "optimizer.pt has 101 bytes of 100"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_skipped(tmp_path, caplog, damage):
    earlier, later = (make_complete(tmp_path / f"checkpoint-{step}") for step in (9, 10))
    do, reason = DAMAGE[damage]
    assert last_complete_checkpoint(tmp_path) == str(later)
    assert caplog.records == []
    do(later)
    assert why_incomplete(later) == reason
    with caplog.at_level(logging.WARNING, "dsvl"):
        assert last_complete_checkpoint(tmp_path) == str(earlier)
    assert [record.getMessage() for record in caplog.records] == [f"{later} is skipped: {reason}."]
    assert later.is_dir()


def test_put_aside_renames_an_incomplete_checkpoint(tmp_path):
    make_complete(tmp_path / "checkpoint-2")
    for content in (b"first", b"second"):  # a run that is interrupted twice at the same step
        broken = make_files(tmp_path / "checkpoint-4")
        (broken / "optimizer.pt").write_bytes(content)
        assert last_complete_checkpoint(tmp_path, put_aside=True) == str(tmp_path / "checkpoint-2")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "incomplete-4"]
        assert (tmp_path / "incomplete-4" / "optimizer.pt").read_bytes() == content


def test_older_incomplete_checkpoints_are_left_alone(tmp_path, caplog):
    make_files(tmp_path / "checkpoint-2")
    make_complete(tmp_path / "checkpoint-4")
    assert last_complete_checkpoint(tmp_path, put_aside=True) == str(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-2").is_dir() and caplog.records == []


def test_without_a_complete_checkpoint_there_is_none(tmp_path):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    make_complete(tmp_path / "checkpoint-last")
    make_complete(tmp_path / "old-checkpoint-3")
    (tmp_path / "checkpoint-7").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    make_files(tmp_path / "checkpoint-8")
    assert last_complete_checkpoint(tmp_path) is None


def saved(callback, output, step, best=None, first=True):
    make_files(output / f"checkpoint-{step}")
    state = TrainerState(global_step=step, best_model_checkpoint=best, is_world_process_zero=first)
    callback.on_save(TrainingArguments(output_dir=str(output), use_cpu=True, report_to="none"), state, TrainerControl())
    return sorted(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))


def test_older_checkpoints_go_when_a_newer_one_is_complete(tmp_path):
    callback = CompleteCheckpoints(save_total_limit=2)
    best = str(tmp_path / "checkpoint-8")
    kept = [saved(callback, tmp_path, step, best) for step in (8, 9, 10, 11)]
    assert kept == [[8], [8, 9], [8, 10], [8, 11]]  # the best is kept
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-11")
    unlimited = CompleteCheckpoints()
    assert saved(unlimited, tmp_path, 12) == [8, 11, 12]


def test_only_the_first_process_marks_a_checkpoint(tmp_path):
    assert saved(CompleteCheckpoints(1), tmp_path, 2, first=False) == [2]
    assert why_incomplete(tmp_path / "checkpoint-2") is not None


@pytest.mark.parametrize("event", ["on_step_end", "on_epoch_end"])
def test_the_loss_is_logged_whenever_a_checkpoint_is_written(event):
    for save, log in ((True, False), (False, True), (False, False)):
        control = TrainerControl(should_save=save, should_log=log)
        getattr(CompleteCheckpoints(), event)(None, TrainerState(), control)
        assert control.should_log is (save or log)

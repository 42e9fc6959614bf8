"""Images spread over the processes of a group give the losses and gradients of one process."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import IMAGE_ID, batch, tiny_model
from image_parallel_cases import DEALT
from training_runs import (
    BATCH,
    IN_ORDER,
    STEPS,
    environment,
    free_port,
    furthest,
    losses,
    make_training,
    run,
    runs_once,
    take_back,
    weights,
)

from dsvl.acceleration import check_image_parallel, image_parallel
from dsvl.acceleration.parallel import split_batch
from dsvl.acceleration.parallel.split_images import assign_images

FOLDER = Path(__file__).parent
# With this layout some batches have an image for one process alone, and one has none.
LAYOUT = "ptttpppptttt" * 2


# -- the model ---------------------------------------------------------------------------------------------------------


CASES = [
    "uneven_rows",
    "padded_on_the_right",
    "one_image_for_all",
    "numbered_images",
    "numbered_images_of_packed_rows",
    "rows_of_few_texts",
    "text_alone",
    "text_alone_of_numbered_tiles",
    "text_alone_beside_a_native_tower",
    "packed_rows",
    "packed_rows_in_windows",
    "documents_by_positions",
    "windows",
    "two_layer_types_and_capped_scores",
    "shared_positions",
    "shared_positions_of_packed_rows",
    "checkpointed",
    "checkpointed_with_reentrance",
    "reduced_memory",
    "adapters",
    "frozen_in_int8",
    "frozen_in_fp8",
    "cached_features",
    "images_of_tiles",
    "native_images",
    "the_sum_of_many_batches",
    "fused_kernels",
    "fused_kernels_in_windows",
    "fused_kernels_packed",
]
GENERATIONS = [
    "greedy",
    "one image",
    "text alone",
    "windows of answers",
    "shared positions",
    "beams",
    "sampling",
    "encoded once",
    "numbered",
    "numbered otherwise",
    "numbered, encoded once",
    "on the host",
]


# What three processes measure in the fast tests; two measure everything in the slow ones.
FAST_CASES = [
    "uneven_rows",
    "numbered_images_of_packed_rows",
    "one_image_for_all",
    "text_alone",
    "packed_rows_in_windows",
    "two_layer_types_and_capped_scores",
    "shared_positions",
    "checkpointed",
    "reduced_memory",
    "adapters",
    "frozen_in_int8",
    "images_of_tiles",
    "native_images",
    "fused_kernels_in_windows",
]
# What matters where the processes share the text, beside these.
FAST_DEALT_CASES = [
    *FAST_CASES,
    "rows_of_few_texts",
    "text_alone_of_numbered_tiles",
    "text_alone_beside_a_native_tower",
    "cached_features",
    "fused_kernels_packed",
]
FAST_GENERATIONS = [
    "greedy",
    "beams",
    "sampling",
    "encoded once",
    "numbered",
    "numbered otherwise",
    "numbered, encoded once",
]


# By number of processes: each runs the whole text, or they share it.
SPREAD = {
    3: [*FAST_CASES, *(name + DEALT for name in FAST_DEALT_CASES)],
    2: [*CASES, *(name + DEALT for name in CASES)],
}
GENERATED = {3: FAST_GENERATIONS, 2: GENERATIONS}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The differences of every case, by number of processes; each is measured once."""
    made = {}

    def get(processes):
        if processes not in made:
            output = tmp_path_factory.mktemp("cases") / "differences.json"
            script = FOLDER / "image_parallel_cases.py"
            start(
                [sys.executable, script, output, processes, free_port(), *SPREAD[processes], *GENERATED[processes]],
                timeout=300,
            )
            made[processes] = json.loads(output.read_text())
        return made[processes]

    return get


def start(command, timeout):
    done = subprocess.run(
        list(map(str, command)), env=environment(), cwd=FOLDER, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout + done.stderr


def by_processes(names):
    return [(3, name) for name in names[3]] + [pytest.param(2, name, marks=pytest.mark.slow) for name in names[2]]


@pytest.mark.parametrize(("processes", "name"), by_processes(SPREAD))
def test_processes_have_the_loss_and_every_gradient_of_one(measured, name, processes):
    found = measured(processes)[name]
    assert found["parameters"] > 20
    assert found["loss"] < 1e-10
    assert found["gradients"] < 1e-10
    assert found["logits"] < 1e-10
    assert found["is_restored"]
    assert (found["launched"] > 0) == name.startswith("fused")


@pytest.mark.parametrize(("processes", "name"), by_processes(GENERATED))
def test_processes_generate_the_answers_of_one(measured, name, processes):
    assert measured(processes)[name] is True


# -- which process has which image -------------------------------------------------------------------------------------


def test_the_images_of_every_row_are_balanced():
    assert assign_images([[5, 5, 5, 5], [5]], 2) == [0, 1, 0, 1, 0]
    # The largest first, and images of other rows decide between equal loads.
    assert assign_images([[1, 9, 4, 4], [3], [3]], 2) == [1, 0, 1, 1, 0, 1]
    assert assign_images([[2], [], [2, 2]], 3) == [0, 1, 2]


def test_long_texts_are_shared_unless_there_are_more_image_tokens_for_each_process():
    deals, long = partial(split_batch.deals_text, fuses=True), split_batch.LONG_TEXT
    assert deals(long, 0, 2) and deals(long, 2 * long - 1, 2) and deals(long, 2 * long, 3)
    assert not deals(long, 2 * long, 2) and not deals(long - 1, 0, 2) and not deals(long, 0, 1)
    assert not split_batch.deals_text(long, 0, 2, fuses=False)


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "causal"}, "needs multimodal_attention='mmca', but it is 'causal'"),
        ({"attention": "mmca_reference"}, "needs multimodal_attention='mmca', but it is 'mmca_reference'"),
        ({"backend": "eager"}, "attn_implementation='eager'"),
        ({"attention_dropout": 0.1}, "dropout in the decoder \\(attention_dropout: 0.1\\)"),
        ({"family": "phi3", "resid_pdrop": 0.2}, "dropout in the decoder \\(layers.0.resid_attn_dropout: 0.2\\)"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type='dynamic'"),
    ],
)
def test_models_whose_images_cannot_be_spread_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        check_image_parallel(tiny_model(**options))


def test_a_model_with_compiled_layers_is_refused_in_training():
    model = tiny_model()
    model.compile_decoder_layers()
    check_image_parallel(model.eval(), training=False)
    with pytest.raises(ValueError, match="compiled decoder layers"):
        check_image_parallel(model.train())


def test_reversed_images_are_refused():
    model = tiny_model()
    model.config.reversed_images = True
    with pytest.raises(ValueError, match="reversed_images=True"):
        check_image_parallel(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_attentions": True}, "got output_attentions"),
        ({"input_ids": None}, "got no input_ids"),
        ({"pixel_values": torch.zeros(3, 3, 8, 8)}, "2 images or tiles, of which this process has 2, but 3 came"),
        ({"mm_token_type_ids": torch.zeros(1, 14, dtype=torch.long)}, "contradict input_ids, which hold \\[10\\]"),
        ({"labels": torch.ones(1, 14, dtype=torch.long)}, "10 image tokens are followed by a token with a label"),
        ({"attention_mask": torch.ones(1, 3)}, "attention_mask is of shape \\(1, 3\\)"),
    ],
)
def test_inputs_that_cannot_be_split_are_refused(single_group, changes, message):
    given = {name: value for name, value in (batch("ttIItt") | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        split_batch.split_batch(tiny_model(), given, single_group)


def test_a_single_process_runs_the_model_as_it_is(single_group):
    model, inputs = tiny_model(), batch("ttItt")
    with torch.no_grad(), image_parallel(model):
        assert "forward" not in model.__dict__
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_a_process_takes_the_tokens_of_its_images(single_group):
    inputs = batch("ttIIt", "t")
    split = split_batch.split_batch(tiny_model(), inputs, single_group)
    assert split.tokens.positions[0].tolist() == list(range(13))
    assert split.tokens.is_image.sum() == (inputs["input_ids"] == IMAGE_ID).sum() == 10
    assert split.tokens.positions[1, 0] == 12  # padding on the left is not run


@torch.no_grad()
def test_images_that_hold_numbers_get_no_others(single_group):
    model, inputs = tiny_model(numbered_images=4), batch("ttItIt")
    images = model.get_image_features(inputs.pop("pixel_values"), image_numbers=torch.tensor([3, 1]))
    split = split_batch.split_batch(model, inputs | {"mm_encoder_outputs": {"image": images}}, single_group)
    made = model(**split.inputs).image_outputs.pooler_output
    assert len(made) == 2 and all(one.equal(same) for one, same in zip(made, images.pooler_output, strict=True))


# -- training ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_training(tmp_path_factory.mktemp("training"), LAYOUT)


@pytest.fixture(scope="module")
def alone(folder):
    """Runs of one process, by their flags; each is run once."""
    return runs_once(folder, partial(train, folder))


def train(folder, output, *flags, batch_size=4, processes=1, **start):
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, BATCH, batch_size, *STEPS]
    return run(*base, *IN_ORDER, *flags, processes=processes, **start)


def assert_as_alone(output, single):
    assert losses(output) == pytest.approx(losses(single), abs=1e-5)
    assert len(losses(output)) == 4
    assert furthest(weights(output), weights(single)) < 1e-5


def evaluations(output):
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    return [(entry["eval_loss"], entry["eval_exact_match"]) for entry in history if "eval_loss" in entry]


EVALUATE = ["--eval-exact-match", "--eval-max-new-tokens", "3", "--per-device-eval-batch-size", "2"]
SETUPS = {
    "ddp": [],
    "zero2": ["--deepspeed", "zero2"],
    "zero3": ["--deepspeed", "zero3", "--activation-checkpointing", "true"],
    "adapters": ["--lora-rank", "4", "--lora-vision"],
    "everything": ["--train", "projector", "embeddings", "language", "vision", "head", "--max-grad-norm", "0.1"],
    "packed": ["--packing", "--max-length", "224"],
    "streaming": ["--streaming"],
    "smoothed": ["--label-smoothing-factor", "0.1", "--gradient-accumulation-steps", "2", "--max-grad-norm", "0.05"],
    "zero3 with adapters and tiles": ["--deepspeed", "zero3", "--lora-rank", "4", "--tiled-mlp", "16"],
}
# What a run of one process has beside what its setup shares with image-parallel runs.
SHARED = {name: [flag for flag in flags if flag not in ("--deepspeed", "zero2", "zero3")] for name, flags in SETUPS.items()}


def test_two_processes_train_and_resume_as_one(folder, tmp_path):
    """With evaluation, in processes that are forked, which takes a third of the time."""
    base = ["--model", folder / "model", "--data", folder / "data.jsonl", BATCH, 4, *STEPS, *IN_ORDER]
    base += ["--eval-data", folder / "held_out.jsonl", *EVALUATE]
    resume = ["--resume-from", tmp_path / "two" / "checkpoint-2"]
    runs = [("one", 1, [], False), ("two", 2, [], False), ("resumed", 2, resume, False), ("dealt", 2, [], True)]
    parts = ["--image-parallel", "2"]
    made = [
        {
            "processes": processes,
            "port": free_port(),
            "flags": list(map(str, [*base, *flags, *(parts if processes > 1 else []), "--output", tmp_path / name])),
            "log": str(tmp_path / f"{name}.log"),
            "deals_text": deals_text,
        }
        for name, processes, flags, deals_text in runs
    ]
    (tmp_path / "runs.json").write_text(json.dumps(made))
    start([sys.executable, FOLDER / "forked_training.py", tmp_path / "runs.json"], timeout=600)
    assert "Image parallelism: 1 group of 2 processes" in (tmp_path / "two.log").read_text()
    for name in ("two", "dealt"):
        assert_as_alone(tmp_path / name, tmp_path / "one")
        assert evaluations(tmp_path / name) == [pytest.approx(one, abs=1e-5) for one in evaluations(tmp_path / "one")]
    assert "Resuming from" in (tmp_path / "resumed.log").read_text()
    assert losses(tmp_path / "resumed") == losses(tmp_path / "two")
    assert furthest(weights(tmp_path / "resumed"), weights(tmp_path / "two")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m dsvl.training", str(FOLDER / "dealt_text_training.py")], ids=["", "dealt"])
@pytest.mark.parametrize("setup", SETUPS)
def test_two_processes_train_as_one(folder, tmp_path, alone, setup, program):
    """With evaluation, saving and resuming; each runs the whole text, or they share it."""
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    evaluate = ["--eval-data", folder / "held_out.jsonl", *EVALUATE]
    output, flags = tmp_path / "output", [*SETUPS[setup], *evaluate, "--image-parallel", "2"]
    started = train(folder, output, *flags, processes=2, module=program)
    assert "Image parallelism: 1 group of 2 processes" in started.stderr
    single = alone(*SHARED[setup], *evaluate)
    assert_as_alone(output, single)
    assert evaluations(output) == [pytest.approx(one, abs=1e-5) for one in evaluations(single)]
    final, kept = weights(output), losses(output)
    take_back(output)
    assert "Resuming from" in train(folder, output, *flags, processes=2, module=program).stderr
    assert losses(output) == kept
    assert furthest(weights(output), final) == 0


@pytest.mark.slow
@pytest.mark.parametrize("setup", ["ddp", "zero2", "packed", "streaming"])
def test_groups_of_processes_have_batches_of_their_own(folder, tmp_path, setup):
    """Four processes in two groups train as two processes without groups."""
    if "zero" in setup:
        pytest.importorskip("deepspeed")
    seen = ["--include-num-input-tokens-seen", "all"]
    train(folder, tmp_path / "two", *SETUPS[setup], *seen, batch_size=2, processes=2)
    train(folder, tmp_path / "four", *SETUPS[setup], *seen, "--image-parallel", "2", batch_size=2, processes=4)
    assert_as_alone(tmp_path / "four", tmp_path / "two")
    counted = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["num_input_tokens_seen"] for name in ("two", "four")
    ]
    assert counted[0] == counted[1] > 0


@pytest.mark.slow
def test_a_run_goes_on_without_image_parallelism(folder, tmp_path, alone):
    output = tmp_path / "output"
    train(folder, output, "--image-parallel", "2", processes=2)
    take_back(output)
    assert "Resuming from" in train(folder, output).stderr
    assert_as_alone(output, alone())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image-parallel", "2"], "--image-parallel 2 with 1 process"),
        (["--image-parallel", "0"], "--image-parallel 0: pass a positive number"),
        (["--image-parallel", "2", "--compile-decoder-layers"], "with --compile-decoder-layers"),
        (["--image-parallel", "2", "--attn-implementation", "eager"], "with --attn-implementation eager"),
        (["--image-parallel", "2", "--lora-rank", "2", "--lora-dropout", "0.1"], "with --lora-dropout 0.1"),
        (["--image-parallel", "2", "--train-sampling-strategy", "batch_rebalance"], "batch_rebalance"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(folder, tmp_path, flags, message):
    from dsvl.training.arguments import parse

    base = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", tmp_path / "output"]
    with pytest.raises(ValueError, match=message):
        parse(list(map(str, [*base, *flags])))

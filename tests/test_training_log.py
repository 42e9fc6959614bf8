"""The output of a training: log lines, TensorBoard files and the plot of a finished run."""

import io
import json
import logging
import re
import sys

import pytest
import torch
from training_runs import make_checkpoint, make_conversations
from transformers import TrainerState

from dsvl.cli import main
from dsvl.training.plot import PLOT, curves, plot_training
from dsvl.training.progress_callbacks import duration, log_line
from dsvl.utils.console_log import StderrHandler

pytestmark = pytest.mark.usefixtures("fresh_log")

FLAGS = ["--max-steps", "4", "--save-steps", "2", "--logging-steps", "1", "--use-cpu", "--per-device-train-batch-size", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("log")
    make_checkpoint(folder)
    make_conversations(folder, layout="ppt")
    return folder


def train(folder, output, *flags):
    argv = ["--model", folder / "model", "--data", folder / "data.jsonl", "--output", output, *FLAGS, *flags]
    assert main(["train", *map(str, argv)]) == 0


LINE = r"step (\d)/4 \| loss [\d.]+ \| learning rate [\de.-]+ \| [\d,]+ tokens/s \| 0:00:\d\d left"


@pytest.mark.parametrize("bar", [True, False])
def test_a_line_shows_loss_rate_speed_and_the_time_left(folder, tmp_path, capsys, bar):
    train(folder, tmp_path / "out", "--report-to", "none", "--disable-tqdm", str(not bar))
    found = re.findall(LINE, capsys.readouterr().out)
    assert found == ["1", "2", "3", "4"]
    history = json.loads((tmp_path / "out/trainer_state.json").read_text())["log_history"]
    assert not any(
        {"tokens_per_second", "seconds_left"} & set(entry) for entry in history
    )  # they differ between repetitions of a run


def test_the_speed_is_that_of_tokens_without_padding(folder, tmp_path, monkeypatch):
    from dsvl.training import trainer

    now, seen = [0.0], []
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1.0) or now[0])
    monkeypatch.setattr("dsvl.training.run.TrainingLines.on_log", lambda self, *a, logs=None, **k: seen.append(logs))
    output = tmp_path / "out"
    train(folder, output, "--report-to", "none", "--disable-tqdm", "true", "--include-num-input-tokens-seen", "non_padding")
    logged = [logs for logs in seen if "tokens_per_second" in logs]
    totals = [entry["num_input_tokens_seen"] for entry in logged]
    each = [total - before for total, before in zip(totals, [0, *totals], strict=False)]
    assert [entry["tokens_per_second"] for entry in logged] == each  # a second between two logs
    assert [entry["seconds_left"] for entry in logged] == [3, 2, 1, 0]


def test_lines_of_other_logs(monkeypatch):
    state = TrainerState(global_step=40, max_steps=1000)
    logs = {"loss": 1.23456, "learning_rate": 9.8e-5, "grad_norm": 1.0, "tokens_per_second": 1234.4, "seconds_left": 754.2}
    expected = "step 40/1,000 | loss 1.235 | learning rate 9.8e-05 | 1,234 tokens/s | 0:12:34 left"
    assert log_line(logs, state) == expected
    logs = {"eval_loss": 1.5, "eval_exact_match": 0.25, "eval_runtime": 2.0, "eval_samples_per_second": 1.0, "epoch": 1.0}
    assert log_line(logs, state) == "step 40/1,000 | eval_loss 1.5 | eval_exact_match 0.25"
    logs = {"train_runtime": 90061.0, "train_loss": 2.0}
    for allocated in (None, 10 * 2**30):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=allocated is not None: on_gpu)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda allocated=allocated: allocated)
        memory = "" if allocated is None else " | 10.0 GiB allocated at most"
        assert log_line(logs, state) == f"step 40/1,000 | mean loss 2 | 25:01:01 in all{memory}"
    assert duration(59.6) == "0:01:00"


def test_tensorboard_has_the_curves(folder, tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(folder, tmp_path / "out", "--report-to", "tensorboard")
    (run,) = (tmp_path / "out/runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_finished_run_has_a_plot_in_its_directory_and_on_its_card(folder, tmp_path):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    train(folder, output, "--report-to", "none", "--eval-data", folder / "data.jsonl", "--eval-exact-match")
    svg = (output / PLOT).read_text()
    assert svg.startswith("<?xml") and str(tmp_path) not in svg
    assert f"]({PLOT})" in (output / "README.md").read_text()
    lines = curves(json.loads((output / "trainer_state.json").read_text())["log_history"])
    assert [len(values) for values in lines["loss"].values()] == [4, 2]
    assert list(lines) == ["loss", "exact match"] and len(lines["exact match"]["exact match"]) == 2
    assert plot_training(output / "trainer_state.json", tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_text() == svg


def test_without_matplotlib_there_is_a_message_and_no_plot(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    train(folder, tmp_path / "out", "--report-to", "none")
    assert (
        "The training is not plotted, as matplotlib is not installed; pip install 'dsvl[train]'." in capsys.readouterr().err
    )
    assert not (tmp_path / "out" / PLOT).exists() and PLOT not in (tmp_path / "out/README.md").read_text()


def test_a_single_value_is_no_curve(tmp_path):
    state = tmp_path / "state.json"
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": 2.0}]}))
    assert not plot_training(state, tmp_path / PLOT) and not (tmp_path / PLOT).exists()


def test_the_loss_is_logged_every_ten_steps_by_default(tmp_path):
    from dsvl.training.arguments import parse

    assert parse(["--model", "m", "--data", "d", "--output", "o", "--use-cpu"])[2].logging_steps == 10


def test_lines_go_to_the_current_standard_error(monkeypatch):
    """Notebooks and tests replace and close it after the first training of a process."""
    handler = StderrHandler()
    now = io.StringIO()
    monkeypatch.setattr("sys.stderr", now)
    handler.emit(logging.LogRecord("dsvl", logging.INFO, "", 0, "a line", None, None))
    assert now.getvalue() == "a line\n"

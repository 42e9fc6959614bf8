"""A streaming data set under `Trainer`: all rows and images reach the model, or the batch is refused by name."""

import json

import pytest
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher
from PIL import Image
from torch.utils.data import DataLoader
from training_runs import make_checkpoint, run
from transformers import AutoProcessor, Trainer, TrainingArguments

from dsvl import DSVLForConditionalGeneration
from dsvl.training import ConversationCollator, DSVLTrainer

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dispatched")
    make_checkpoint(folder)
    return folder


def write_rows(folder, layout):
    """A row for each number: with so many images."""
    lines = []
    for index, images in enumerate(layout):
        content = []
        for number in range(images):
            Image.new("RGB", (28, 28), (9 * index, 50 * number, 0)).save(folder / f"{index}_{number}.png")
            content.append({"type": "image", "path": str(folder / f"{index}_{number}.png"), "text": None})
        content.append({"type": "text", "path": None, "text": f"what is {index}?"})
        messages = [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": "red", "path": None}]},
        ]
        lines.append(json.dumps({"messages": messages}))
    path = folder / f"{''.join(map(str, layout))}.jsonl"
    path.write_text("\n".join(lines))
    return path


class Recorder(DSVLForConditionalGeneration):
    def forward(self, **kwargs):
        self.seen.append((len(kwargs["input_ids"]), len(kwargs.get("pixel_values", []))))
        return super().forward(**kwargs)


def train(folder, layout, kind, **arguments):
    rows = datasets.load_dataset("json", data_files=str(write_rows(folder, layout)), split="train", streaming=True)
    model = Recorder.from_pretrained(folder / "model").set_trainable()
    model.seen = []
    values = dict(max_steps=2, per_device_train_batch_size=4, remove_unused_columns=False, use_cpu=True, report_to="none")
    kind(
        model=model,
        args=TrainingArguments(str(folder / "run"), save_strategy="no", disable_tqdm=True, **values | arguments),
        train_dataset=rows,
        data_collator=ConversationCollator(AutoProcessor.from_pretrained(folder / "model")),
    ).train()
    return model.seen


FITTING = [[1, 1, 0, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0], [2, 1, 0, 1]]
TOO_MANY = [[2, 1, 1, 1], [8, 0, 0, 0], [2, 2, 2, 2]]


@pytest.mark.parametrize("layout", FITTING, ids=str)
def test_plain_trainers_dispatcher_keeps_all_rows_and_images(folder, layout):
    assert train(folder, layout, Trainer) == [(4, sum(layout))] * 2


@pytest.mark.parametrize("layout", TOO_MANY, ids=str)
def test_what_the_dispatcher_would_cut_is_refused_by_name(folder, layout):
    with pytest.raises(ValueError, match=rf"4 rows has {sum(layout)} images.*dispatch_batches.*DSVLTrainer"):
        train(folder, layout, Trainer)


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader_workers_refuse_it_as_well(folder, workers):
    with pytest.raises(ValueError, match="DataLoaderDispatcher"):
        train(folder, [2, 2, 2, 2], Trainer, dataloader_num_workers=workers)


@pytest.mark.parametrize("layout", FITTING + TOO_MANY, ids=str)
@pytest.mark.parametrize("kind", [Trainer, DSVLTrainer])
def test_without_the_dispatcher_everything_arrives(folder, layout, kind):
    arguments = {} if kind is DSVLTrainer else {"accelerator_config": {"dispatch_batches": False}}
    assert train(folder, layout, kind, **arguments) == [(4, sum(layout))] * 2


def test_dispatching_that_was_chosen_is_left(folder):
    with pytest.raises(ValueError, match="would cut them"):
        train(folder, [2, 2, 2, 2], DSVLTrainer, accelerator_config={"dispatch_batches": True})


def test_map_style_loaders_are_not_concerned(folder):
    """A loader that is prepared and iterated beside a dispatcher that has ended."""
    path = write_rows(folder, [2, 2])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    collator = ConversationCollator(AutoProcessor.from_pretrained(folder / "model"))
    for row in rows:  # what Arrow gives as well
        for message in row["messages"]:
            message["content"] = [{k: v for k, v in part.items() if v is not None} for part in message["content"]]
    loader = Accelerator(cpu=True).prepare(DataLoader(rows, batch_size=2, collate_fn=collator))
    assert not isinstance(loader, DataLoaderDispatcher)
    (batch,) = loader
    assert len(batch["pixel_values"]) == 4 and next(iter(batch)) == "input_ids"


PROGRAM = """
import os
import sys
from pathlib import Path
from datasets import load_dataset
from transformers import AutoProcessor, Trainer, TrainingArguments
from dsvl import DSVLForConditionalGeneration
from dsvl.training import ConversationCollator, DSVLTrainer
from dsvl.training.distributed import destroy_process_groups

folder, data, kind, out = sys.argv[1:]
kind = {"Trainer": Trainer, "DSVLTrainer": DSVLTrainer}[kind]
rows = load_dataset("json", data_files=data, split="train", streaming=True)
model = DSVLForConditionalGeneration.from_pretrained(folder).set_trainable()
seen = []
class Model(type(model)):
    def forward(self, *args, **kwargs):
        seen.append((len(kwargs["input_ids"]), len(kwargs.get("pixel_values", []))))
        return super().forward(*args, **kwargs)
model.__class__ = Model
arguments = TrainingArguments(out, max_steps=1, per_device_train_batch_size=2, remove_unused_columns=False, use_cpu=True,
                              report_to="none", save_strategy="no", disable_tqdm=True)
trainer = kind(model=model, args=arguments, train_dataset=rows,
               data_collator=ConversationCollator(AutoProcessor.from_pretrained(folder)))
trainer.train()
# A file for each: what two processes print may share a line.
os.makedirs(out, exist_ok=True)
Path(out, f"seen_{arguments.process_index}").write_text(str(seen))
destroy_process_groups()
"""


def test_two_processes_get_all_rows_and_images(folder, tmp_path):
    program, layout = tmp_path / "program.py", [1, 2, 2, 1]
    program.write_text(PROGRAM)
    data = write_rows(folder, layout)
    out = tmp_path / "out"
    run(folder / "model", data, "DSVLTrainer", out, processes=2, module=str(program))
    seen = [(out / f"seen_{process}").read_text() for process in range(2)]
    assert seen == [f"[(2, {sum(layout[:2])})]", f"[(2, {sum(layout[2:])})]"]


@pytest.mark.slow
def test_two_processes_under_the_dispatcher_are_refused_by_name(folder, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    data = write_rows(folder, [1, 0, 0, 1])
    flags = (folder / "model", data, "Trainer", tmp_path / "out")
    done = run(*flags, processes=2, module=str(program), check=False)
    assert done.returncode != 0 and "which reads a streaming data set for 2 processes" in done.stderr

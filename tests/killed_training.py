"""`dsvl train` that is killed at a chosen moment: python killed_training.py MOMENT NUMBER flags...

SIGKILL ends it within a step, or while a checkpoint is written, whose files are then truncated. NUMBER is a step, or
how often the moment comes.
"""

import io
import os
import signal
import sys
from pathlib import Path

import torch
from transformers import Trainer

from dsvl.cli import main
from dsvl.training import checkpoints

moment, step = sys.argv[1], int(sys.argv[2])


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def is_time(trainer):
    return trainer.state.global_step == step


times = 0


def is_last_time():
    global times
    times += 1
    return times == step


if moment == "in a step":
    compute_loss = Trainer.compute_loss

    def between_forward_and_backward(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if is_time(self):
            die()
        return loss

    Trainer.compute_loss = between_forward_and_backward
elif moment == "in the weights":
    save = Trainer._save

    def half_of_the_weights(self, output_dir=None, state_dict=None):
        save(self, output_dir, state_dict)
        if is_time(self):
            for path in Path(output_dir).glob("*.safetensors"):
                os.truncate(path, path.stat().st_size // 2)
            die()

    Trainer._save = half_of_the_weights
elif moment == "in the optimizer":
    save_state = Trainer._save_optimizer_and_scheduler

    def half_of_the_optimizer(self, output_dir):
        if is_time(self):
            written = io.BytesIO()
            torch.save(self.optimizer.state_dict(), written)
            Path(output_dir, "optimizer.pt").write_bytes(written.getvalue()[: written.tell() // 2])
            die()
        save_state(self, output_dir)

    Trainer._save_optimizer_and_scheduler = half_of_the_optimizer
elif moment == "before the mark":
    mark = checkpoints.mark_complete

    def not_marked(checkpoint, sizes=None):
        if checkpoint.name == f"checkpoint-{step}":
            die()
        mark(checkpoint, sizes)

    checkpoints.mark_complete = not_marked
elif moment == "in the trained model":
    from dsvl.training import saving

    move = saving.move_into_place

    def not_moved(partial, output):
        if is_last_time():
            die()
        move(partial, output)

    saving.move_into_place = not_moved
elif moment == "after the trained model":
    from dsvl.training import run

    finish = run.finish

    def not_recorded(output, record):
        if is_last_time():
            die()
        finish(output, record)

    run.finish = not_recorded
elif moment == "in a later step":  # of the second stage
    compute_loss = Trainer.compute_loss

    def in_the_second_stage(self, *args, **kwargs):
        if is_time(self) and "stages/2-" in self.args.output_dir:
            die()
        return compute_loss(self, *args, **kwargs)

    Trainer.compute_loss = in_the_second_stage
elif moment in ("in the composed model", "after the composed model"):
    from dsvl.composition import checkpoint
    from dsvl.training import stages

    if moment.startswith("in"):
        checkpoint.render_card = lambda *args, **kwargs: die()
    else:
        stages.add_model = lambda record, model, field="model": die() if field == "model" else None
elif moment == "between two stages":
    from dsvl.training import stages

    release = stages.release_memory

    def not_released():
        if is_last_time():
            die()
        release()

    stages.release_memory = not_released
elif moment == "while stages are deleted":
    from dsvl.training import stages

    stages.shutil.rmtree = lambda path, ignore_errors=False: die() if path.name == "0-composed" else None
else:
    sys.exit(f"no such moment: {moment}")

sys.exit(main(["train", *sys.argv[3:]]))

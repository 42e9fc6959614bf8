"""Trainer callbacks that print the progress of a training: loss, learning rate, tokens per second, remaining time."""

from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments

TIMES = ("_runtime", "_per_second", "_preparation_time")  # suffixes of an evaluation's timings


class TrainingProgress(ProgressCallback):
    """The progress bar of `Trainer`, with readable log lines.

    Args:
        title: text at the beginning of the bar and of each line, *optional*.
        evaluated: text at the end of the lines of evaluations, *optional*.
    """

    def __init__(self, title: str = "", evaluated: str = "") -> None:
        super().__init__()
        self.title, self.evaluated = title, evaluated

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and self.title:
            self.training_bar.set_description(self.title)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs:
            self.training_bar.write(log_line(logs, state, self.title, self.evaluated))

    def close(self) -> None:
        """Close the bar, so that the next output starts on a new line."""
        if self.training_bar is not None:
            self.training_bar.close()


class TrainingLines(PrinterCallback):
    """The same lines without a bar (`--disable-tqdm`).

    Args:
        title: text at the beginning of each line, *optional*.
        evaluated: text at the end of the lines of evaluations, *optional*.
    """

    def __init__(self, title: str = "", evaluated: str = "") -> None:
        super().__init__()
        self.title, self.evaluated = title, evaluated

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            print(log_line(logs, state, self.title, self.evaluated), flush=True)

    def close(self) -> None:
        """Does nothing: there is no bar."""


def log_line(logs: dict[str, float], state: TrainerState, title: str = "", evaluated: str = "") -> str:
    """A line such as `step 40/1,000 | loss 1.234 | learning rate 9.8e-05 | 1,234 tokens/s | 0:12:34 left`."""
    parts = [title] if title else []
    parts += [f"step {state.global_step:,}/{state.max_steps:,}"]
    if "loss" in logs:
        parts += [f"loss {logs['loss']:.4g}", f"learning rate {logs['learning_rate']:.3g}"]
        if "tokens_per_second" in logs:
            parts.append(f"{logs['tokens_per_second']:,.0f} tokens/s")
        if "seconds_left" in logs:
            parts.append(f"{duration(logs['seconds_left'])} left")
    elif "train_runtime" in logs:
        parts += [f"mean loss {logs['train_loss']:.4g}", f"{duration(logs['train_runtime'])} in all"]
        if torch.cuda.is_available():  # as `dsvl plan` counts, without what the allocator keeps for later
            parts.append(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB allocated at most")
    else:
        metrics = {name: value for name, value in logs.items() if name != "epoch" and not name.endswith(TIMES)}
        parts += [f"{name} {value:.4g}" for name, value in metrics.items()]
        parts += [evaluated] if evaluated else []
    return " | ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes and seconds: 0:12:34."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"

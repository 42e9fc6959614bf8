"""The Trainer: which parameters decay, which learn at their own rate, and evaluations that do not depend on the batches."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..data.streaming import Stream, StreamLoader
from ..hub_card import render_card
from ..publishing.push import push_directory
from ..transformers_dsvl import installed_release
from ..utils.transformers_names import EvalLoopOutput, get_parameter_names
from .evaluation import exact_match
from .facts import training_facts
from .label_smoothing import smoothed_loss

# As in Trainer.get_decay_parameter_names; "embed" beside the modules for what is a parameter of its own (CLIP's CLS token).
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)", r"embed", r"(?:^|\.)query$"]

OLDEST_TRAINING = (5, 23)  # transformers

GROUP_SETTINGS = ("lr", "weight_decay", "betas", "eps", "momentum")  # of an optimizer's group


class DSVLTrainer(Trainer):
    """`Trainer` with DSVL's parameter groups, and its evaluations.

    `eval_loss` is the mean over all supervised tokens, so that it does not depend on batches and processes (the Trainer's is
    a mean of means, in which the last batch's repetitions count). An evaluation that asks for the loss alone (no
    `compute_metrics`, or `prediction_loss_only`) computes the logits of supervised tokens alone. Under `eval_exact_match` it
    also answers the held-out questions.

    `label_smoothing_factor` smooths the loss of the shifted labels, as the model computes it: `(1 - factor) * nll + factor *
    mean(-log p)`, the mean over the vocabulary. Every process reads its own share of a streaming data set
    (`accelerator_config.dispatch_batches` is False unless it was chosen), as accelerate's dispatcher would cut the images of
    a batch to the number of its rows.

    What is logged has `tokens_per_second` (read by all processes, padding aside) and `seconds_left` beside the Trainer's
    values; they are not kept in the state's `log_history`, which stays the same for every repetition of a run.

    Raises:
        ImportError: with transformers below 5.23, whose Trainer names activation checkpointing otherwise.
        ValueError: at the end of an epoch in which not one token was trained.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if installed_release() < OLDEST_TRAINING:
            raise ImportError(
                "Training needs transformers 5.23 or newer, but {}.{} is installed; pip install 'dsvl[train]'.".format(
                    *installed_release()
                )
            )
        super().__init__(*args, **kwargs)
        self.label_smoother = None  # the model computes it: transformers' is for logits of the whole batch
        self._tokens_read = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._tokens_trained = torch.zeros((), device=self.args.device)
        self._asked: list[dict[str, Any]] = []
        self._logged_at: tuple[float, int] | None = None
        self._started_at: tuple[float, int] | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, with an accelerator that lets every process read a streaming data set."""
        if self.args.accelerator_config.dispatch_batches is None:
            self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`."""
        self._started_at = None
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, and counts the tokens without waiting for the device."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            mask = batch.get("attention_mask")  # a pack has none, and next to no padding
            own = batch["input_ids"].numel() if mask is None else mask.sum()
            self._tokens_read += torch.as_tensor(own, device=self._tokens_read.device)
        if num_items is not None:
            self._tokens_trained += torch.as_tensor(num_items, device=self._tokens_trained.device)
        return batches, num_items

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As `Trainer.training_step`, with label smoothing in backward too, where parts of the loss are computed again."""
        with self._smoothed_labels():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.compute_loss`, with label smoothing inside of the model's own loss."""
        with self._smoothed_labels():
            return super().compute_loss(*args, **kwargs)

    @contextlib.contextmanager
    def _smoothed_labels(self) -> Iterator[None]:
        factor = self.args.label_smoothing_factor
        if factor == 0:
            yield
            return
        model = self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model
        plain = model.loss_function
        model.loss_function = smoothed_loss(factor)
        try:
            yield
        finally:
            model.loss_function = plain

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `Trainer.log`; every process must call it at once. Adds what the speed of this process decides."""
        timing = self._timing() if "loss" in logs else {}
        super().log(logs | timing, start_time)
        for key in timing:  # another run of the same seed has the same history
            self.state.log_history[-1].pop(key, None)

    def _timing(self) -> dict[str, float]:
        """Tokens per second since the last log, and the seconds that are left at the mean speed of this call of `train`."""
        now, step = time.perf_counter(), self.state.global_step
        tokens = int(self.accelerator.reduce(self._tokens_read, "sum"))
        self._tokens_read.zero_()
        timing: dict[str, float] = {}
        if self._logged_at is not None:
            timing["tokens_per_second"] = tokens / max(now - self._logged_at[0], 1e-9)
        if self._started_at is not None and step > self._started_at[1]:
            seconds = (now - self._started_at[0]) / (step - self._started_at[1])
            timing["seconds_left"] = seconds * (self.state.max_steps - step)
        self._logged_at = (now, step)
        return timing

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Publish the model and its processor, with a card that states this training, in one commit.

        Nothing else of the output directory goes along: no optimizer, no pickle. Every process must call it.

        Args:
            commit_message, token, revision, private: as of `Trainer.push_to_hub`.
            blocking: must be True.
            kwargs: `create_pr=True` proposes the commit as a pull request.

        Returns:
            In the first process, the `CommitInfo`.

        Raises:
            ValueError: if the model has adapters, which are not merged here, or a check of `dsvl push` fails.
        """
        if not blocking:
            raise ValueError("blocking=False: a push is checked before and after, and so waits; leave it out.")
        if hasattr(self.model, "peft_config"):
            raise ValueError("The model has adapters. Save them, merge them by dsvl merge, and publish that by dsvl push.")
        arguments = self.args
        partial = Path(str(arguments.output_dir)) / ".push.partial"
        self.save_model(str(partial), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            return None
        try:
            (partial / "training_args.bin").unlink(missing_ok=True)
            (partial / "README.md").write_text(self._card(), encoding="utf-8")
            return push_directory(
                partial,
                arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name,
                private=arguments.hub_private_repo if private is None else private,
                revision=revision or arguments.hub_revision,
                token=token or arguments.hub_token,
                commit_message=commit_message or "End of training",
                **kwargs,
            )
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write DSVL's card, with the facts of this training, to the output directory; the arguments are of no use to it."""
        if self.is_world_process_zero():
            (Path(str(self.args.output_dir)) / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        metrics = {key: value for entry in self.state.log_history for key, value in entry.items()}
        return render_card(model.config, [model.name_or_path] if model.name_or_path else [], training_facts(self, metrics))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints, with their optimizer states, stay where they are; `push_to_hub` publishes the model."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The optimizer's class and arguments; `params` holds the groups, unless the optimizer makes its own."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if model is not None and not {"params", "model", "optimizer_dict"} & set(kwargs):
            kwargs["params"] = parameter_groups(model, args.weight_decay, getattr(args, "embeddings_learning_rate", None))
        return optimizer, kwargs

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, and remembers the settings of its groups, which a checkpoint's state would replace."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._asked = [{key: group[key] for key in GROUP_SETTINGS if key in group} for group in optimizer.param_groups]
        return optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer's; but learning rate, decay and betas are those of the arguments, not those of the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._asked:  # DeepSpeed's configuration may have an optimizer of its own
            return
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wrapper holds torch's
        for index, (group, asked) in enumerate(zip(self.optimizer.param_groups, self._asked, strict=True)):
            group.update({key: value for key, value in asked.items() if key != "lr"})
            if group.get("initial_lr", asked["lr"]) == asked["lr"]:
                continue
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ValueError(
                    f"{checkpoint} has the learning rate {group['initial_lr']:g}, which {type(scheduler).__name__} cannot "
                    f"change to {asked['lr']:g}; pass the checkpoint's, or choose another --lr-scheduler-type."
                )
            group["initial_lr"] = scheduler.base_lrs[index] = asked["lr"]
            group["lr"] = asked["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
            scheduler._last_lr[index] = group["lr"]  # what is logged

    def get_train_dataloader(self) -> Any:
        """As the Trainer's; but of a stream each process has its share already, which accelerate would share out again."""
        stream, args = self.train_dataset, self.args
        if not isinstance(stream, Stream):
            return super().get_train_dataloader()
        return StreamLoader(
            stream,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            device=args.device,
            prefetch_factor=args.dataloader_prefetch_factor,
            pin_memory=args.dataloader_pin_memory and not args.use_cpu,
            # Its own: a run that resumes would otherwise draw from the restored one what another run did not.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which would train one step more when it resumes from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._started_at is None:
            self._started_at = self._logged_at = (time.perf_counter(), self.state.global_step)
            self._tokens_read.zero_()
            self._tokens_trained.zero_()
        super()._run_epoch(*args, **kwargs)
        # After a resumption a part of an epoch is no proof.
        if self._started_at[1] == 0 and not self._tokens_trained.item():
            raise ValueError(
                f"Nothing was trained in {self.state.global_step} steps: no batch had a token with a label (-100 is none). "
                "Look at the samples that were skipped, at max_length, and for {% generation %} in the chat template."
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        """As `Trainer.prediction_step`, and counts the loss of every sample once; no logits where none are asked for."""
        labels = inputs["labels"] = inputs["labels"].clone()
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # the processes share so many; what follows are repetitions
            own = state.remainder - self.accelerator.process_index * self.args.eval_batch_size
            labels[max(own, 0) :] = -100
        if prediction_loss_only:
            inputs["skip_logits"] = True
        outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (labels[:, 1:] != -100).sum().to(self.args.device)
        # Each process returns its sum over the mean number of tokens in a process.
        mean = self.accelerator.reduce(outputs[0].float(), "mean")
        tokens = self.accelerator.reduce(tokens, "sum")
        self._eval_loss += torch.stack([mean * tokens, tokens]).double().cpu()
        return outputs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As `Trainer.evaluation_loop`, with `eval_loss` over tokens, and `eval_exact_match` if it is asked for."""
        self._eval_loss = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = (self._eval_loss[0] / self._eval_loss[1].clamp(min=1)).item()
        if getattr(self.args, "eval_exact_match", False):
            with self.accelerator.autocast():  # generate() does not pass by what accelerate put around the model
                share = exact_match(
                    self.model,
                    self.data_collator,
                    self.eval_dataset,
                    batch_size=self.args.per_device_eval_batch_size,
                    max_new_tokens=self.args.eval_max_new_tokens,
                )
            output.metrics[f"{metric_key_prefix}_exact_match"] = share
        return output


def parameter_groups(model: Any, weight_decay: float, embeddings_learning_rate: float | None = None) -> list[dict[str, Any]]:
    """What learns, in groups: no decay on norms, biases and embeddings; embeddings at their own rate.

    Args:
        model: any model whose `get_input_embeddings` names its token embeddings; adapters of PEFT may be on it.
        weight_decay: of all other parameters.
        embeddings_learning_rate: None for the optimizer's own.

    Returns:
        Non-empty groups for a torch optimizer, every trained parameter in exactly one of them.
    """
    decaying = set(get_parameter_names(model, [nn.LayerNorm, nn.Embedding], NO_DECAY))
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in embeddings, name in decaying), []).append(parameter)
    made = []
    for (is_embedding, decays), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        if is_embedding and embeddings_learning_rate is not None:
            group["lr"] = embeddings_learning_rate
        made.append(group)
    return made


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters are trained, and how many there are; partitioned ones (ZeRO-3) in full."""

    def size(parameter: torch.Tensor) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    parameters = list(model.parameters())
    return sum(size(p) for p in parameters if p.requires_grad), sum(map(size, parameters))

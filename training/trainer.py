"""`DSVLTrainer`: parameter groups, label smoothing, streams, and evaluations that do not depend on the batch size."""

import contextlib
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import FullyShardedDataParallelPlugin, save_fsdp_optimizer
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer

from ..composition.chat_template import chat_template_name
from ..data.streaming import Stream, StreamLoader
from ..hub_card import render_card
from ..publishing.push import push_directory
from ..transformers_dsvl import installed_release
from ..utils.transformers_names import SCHEDULER_NAME, EvalLoopOutput, get_parameter_names
from .adapters import base_model
from .checkpoints import send_checkpoint
from .deepspeed_config import whole_size
from .deepspeed_states import loading_what_is_trained, saving_what_is_trained
from .evaluation import exact_match
from .frozen_precision import frozen_linears
from .fsdp import full_state, layer_classes, load_full_state, shard_with_accelerate
from .hosts import Hosts
from .image_groups import ImageGroups
from .label_smoothing import smoothed_loss
from .learning_rates import parse_learning_rates, parts_of_parameters
from .model_card import training_facts
from .repartition import loadable

# As in Trainer.get_decay_parameter_names; "embed" also matches parameters outside of nn.Embedding (CLIP's CLS token).
NO_DECAY = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)", r"embed", r"(?:^|\.)query$"]

OLDEST_TRAINING = (5, 23)  # oldest release of transformers for training

GROUP_SETTINGS = ("lr", "weight_decay", "betas", "eps", "momentum")  # of an optimizer's parameter groups


class DSVLTrainer(Trainer):
    """`Trainer` with DSVL's parameter groups and evaluations.

    `eval_loss` is the mean over all supervised tokens, so that it does not depend on batch size and number of processes (the
    Trainer's is a mean of batch means, in which padding samples of the last batch count). If only the loss is needed (no
    `compute_metrics`, or `prediction_loss_only`), logits of supervised tokens only are computed. With `eval_exact_match`,
    answers to the held-out questions are generated too.

    `label_smoothing_factor` is applied to the shifted labels inside the model's loss: `(1 - factor) * nll + factor *
    mean(-log p)`, with the mean over the vocabulary. Every process reads its own part of a streaming data set
    (`accelerator_config.dispatch_batches` defaults to False), as accelerate's dispatcher would cut the images of a batch to
    the number of rows.

    With `image_parallel` of the arguments, groups of so many processes get the same batches and share their images; see
    `dsvl.acceleration.image_parallel`.

    Logs also contain `tokens_per_second` (of all processes, without padding) and `seconds_left`. They are not kept in the
    state's `log_history`, so that it is equal for every repetition of a run.

    Attributes:
        hosts: which hosts have an output directory of their own; None if there is one directory.

    Raises:
        ImportError: with transformers older than 5.23, whose Trainer has other names for activation checkpointing.
        ValueError: at the end of an epoch in which no token was trained; for an `image_parallel` that does not fit the
            processes, the model or `compute_metrics`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if installed_release() < OLDEST_TRAINING:
            raise ImportError(
                "Training needs transformers 5.23 or newer, but {}.{} is installed; pip install 'dsvl[train]'.".format(
                    *installed_release()
                )
            )
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            self.accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = layer_classes(self.model)
        self.image_groups = ImageGroups(getattr(self.args, "image_parallel", 1))
        self.image_groups.check(self.model)
        if self.image_groups.size > 1 and self.compute_metrics is not None:
            raise ValueError(
                f"image_parallel={self.image_groups.size} with compute_metrics: the processes of a group have the same "
                "samples, which would count several times; drop one of them."
            )
        self.label_smoother = None  # applied in the model's loss: transformers' label smoother needs logits of all tokens
        self.hosts: Hosts | None = None
        self._tokens_read = torch.zeros((), dtype=torch.int64, device=self.args.device)
        self._tokens_trained = torch.zeros((), device=self.args.device)
        self._group_settings: list[dict[str, Any]] = []
        self._logged_at: tuple[float, int] | None = None
        self._started_at: tuple[float, int] | None = None

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, but every process reads a streaming data set by default, and FSDP shards on CPUs too."""
        if self.args.accelerator_config.dispatch_batches is None:
            self.args.accelerator_config.dispatch_batches = False
        super().create_accelerator_and_postprocess()
        if self.args.fsdp:
            plugin = getattr(self.accelerator.state, "fsdp_plugin", None)  # none on CPUs
            shard_with_accelerate(self.accelerator, plugin or FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args))
            self.is_fsdp_enabled = True

    def save_model(
        self, output_dir: str | None = None, _internal_call: bool = False, dtype: torch.dtype | None = None
    ) -> None:
        """As in `Trainer`; under FSDP the weights are gathered in the first process, and trained ones are float32.

        Args:
            output_dir: see `Trainer.save_model`.
            dtype: under FSDP, the dtype of all floating point weights, *optional*, defaults to their own. With layers in 8
                bits, frozen weights are saved as they were loaded.
        """
        if not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        # PEFT saves what is trained.
        state = full_state(self.model, trained_only=hasattr(self.model, "peft_config"))
        if dtype is not None:
            originals = set()
            if any(frozen_linears(self.model)):
                originals = {name for name, one in self.model.named_parameters() if not one.requires_grad}
            state = {
                name: weight.to(dtype) if weight.is_floating_point() and name not in originals else weight
                for name, weight in state.items()
            }
        self._save(output_dir, state_dict=state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As in `Trainer`, without a second copy of the weights: under DeepSpeed of trained ones alone, under FSDP of none.
        Under FSDP every process writes its states."""
        if not self.is_fsdp_enabled:
            deepspeed = saving_what_is_trained(self.model_wrapped) if self.is_deepspeed_enabled else contextlib.nullcontext()
            with deepspeed:
                super()._save_optimizer_and_scheduler(output_dir)
            return
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `Trainer`; under FSDP every process reads its shards of the whole weights."""
        if not self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        load_full_state(self.model if model is None else model, Path(resume_from_checkpoint))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`."""
        self._started_at = None
        return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; also counts tokens, without synchronizing with the device."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        for batch in batches:
            mask = batch.get("attention_mask")  # packs have none, and nearly no padding
            tokens = batch["input_ids"].numel() if mask is None else mask.sum()
            self._tokens_read += torch.as_tensor(tokens, device=self._tokens_read.device)
        if num_items is not None:
            self._tokens_trained += torch.as_tensor(num_items, device=self._tokens_trained.device)
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Any:
        """As in `Trainer`; samples that fill the last batches of an epoch were trained already, and do not count."""
        own = self._own_rows() if batch_samples and self.accelerator.gradient_state.end_of_dataloader else None
        if own is not None:
            labels = batch_samples[-1]["labels"] = batch_samples[-1]["labels"].clone()
            # Where skipped samples left other rows, those of the repetitions are unknown, unless all are.
            if own == 0 or len(labels) == self._train_batch_size:
                labels[own:] = -100
        return super()._get_num_items_in_batch(batch_samples, device)

    def _own_rows(self) -> int | None:
        """How many samples of this process's last batch in an epoch are no repetitions; None if all of them are none."""
        batch_size, groups = self._train_batch_size, self.image_groups
        if groups.count == 1 or self.args.dataloader_drop_last or isinstance(self.train_dataset, IterableDataset):
            return None
        rest = len(self.train_dataset) % (batch_size * groups.count)
        own = min(max(rest - groups.index * batch_size, 0), batch_size)
        return None if rest == 0 or own == batch_size else own

    def get_total_train_batch_size(self, args: Any) -> int:
        """As in `Trainer`; the processes of a group that shares images have one batch."""
        return super().get_total_train_batch_size(args) // self.image_groups.size

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """As in `Trainer`; the tokens of a group that shares images count once."""
        before = self.state.num_input_tokens_seen
        super()._track_num_input_tokens(inputs)
        self.state.num_input_tokens_seen = before + (self.state.num_input_tokens_seen - before) // self.image_groups.size

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`, with label smoothing; it is also active in backward, which recomputes parts of the loss."""
        with self._smoothed_labels():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, with label smoothing in the model's loss, and over the images of this process."""
        with self._smoothed_labels(), self.image_groups.spread(self.model):
            return super().compute_loss(*args, **kwargs)

    @contextlib.contextmanager
    def _smoothed_labels(self) -> Iterator[None]:
        factor = self.args.label_smoothing_factor
        if factor == 0:
            yield
            return
        model = base_model(self.model)
        plain = model.loss_function
        model.loss_function = smoothed_loss(factor)
        try:
            yield
        finally:
            model.loss_function = plain

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`, with tokens per second and remaining time; all processes must call it together."""
        timing = self._timing() if "loss" in logs else {}
        super().log(logs | timing, start_time)
        for key in timing:  # the history does not depend on the speed
            self.state.log_history[-1].pop(key, None)

    def _timing(self) -> dict[str, float]:
        """Tokens per second since the last log, and remaining seconds at the mean speed of this call of `train`."""
        now, step = time.perf_counter(), self.state.global_step
        tokens = int(self.accelerator.reduce(self._tokens_read, "sum")) // self.image_groups.size
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
        """Publish the model, its processor and a model card about this training, in one commit.

        Other files of the output directory, such as optimizer states, are not published. All processes must call it.

        Args:
            commit_message, token, revision, private: see `Trainer.push_to_hub`.
            blocking: must be True.
            kwargs: `create_pr=True` opens a pull request instead.

        Returns:
            The `CommitInfo` in the first process, None in the others.

        Raises:
            ValueError: if the model has adapters, which are not merged here, or a check of `dsvl push` fails.
        """
        if not blocking:
            raise ValueError("blocking=False is not supported, as a push is checked afterwards; drop it.")
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                "The model has adapters; save them, merge them with dsvl merge, and publish the result with dsvl push."
            )
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
        """Write DSVL's model card about this training to the output directory; arguments are ignored."""
        if self.is_world_process_zero():
            (Path(str(self.args.output_dir)) / "README.md").write_text(self._card(), encoding="utf-8")

    def _card(self) -> str:
        model = self.accelerator.unwrap_model(self.model)
        metrics = {key: value for entry in self.state.log_history for key, value in entry.items()}
        return render_card(
            model.config,
            [model.name_or_path] if model.name_or_path else [],
            training_facts(self, metrics),
            chat_template=chat_template_name(getattr(self.processing_class, "chat_template", None)),
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Does nothing: checkpoints with optimizer states are not published."""

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> tuple[Any, dict[str, Any]]:
        """The class and arguments of the optimizer; `params` contains the groups, unless the optimizer makes its own."""
        optimizer, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        if model is not None and not {"params", "model", "optimizer_dict"} & set(kwargs):
            kwargs["params"] = parameter_groups(model, args.weight_decay, getattr(args, "learning_rates", None))
        return optimizer, kwargs

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; remembers the settings of the groups, which loading a checkpoint replaces."""
        optimizer = super().create_optimizer(*args, **kwargs)
        self._group_settings = [
            {key: group[key] for key in GROUP_SETTINGS if key in group} for group in optimizer.param_groups
        ]
        return optimizer

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """As in `Trainer`, which cannot load a DeepSpeed checkpoint of another number of processes."""
        with self._loadable(resume_from_checkpoint):
            prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            for _, layer in frozen_linears(self.model):
                layer.check_share()
        return prepared

    def _load_best_model(self) -> None:
        """As in `Trainer`; the best checkpoint may be of another number of processes, and on another host."""
        if self.hosts is not None:
            send_checkpoint(self.hosts, Path(self.state.best_model_checkpoint).name)
        if self.is_fsdp_enabled:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
            return
        with self._loadable(self.state.best_model_checkpoint):
            super()._load_best_model()

    @contextlib.contextmanager
    def _loadable(self, checkpoint: str | None) -> Iterator[None]:
        if not self.is_deepspeed_enabled:
            yield
            return
        with loading_what_is_trained(), loadable(self, checkpoint):
            yield

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As in `Trainer`, but learning rate, decay and betas are taken from the arguments, not from the checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not self._group_settings:  # the DeepSpeed configuration may define the optimizer
            return
        scheduler = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate's wrapper holds torch's
        for index, (group, settings) in enumerate(zip(self.optimizer.param_groups, self._group_settings, strict=True)):
            group.update({key: value for key, value in settings.items() if key != "lr"})
            if group.get("initial_lr", settings["lr"]) == settings["lr"]:
                continue
            if not isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
                raise ValueError(
                    f"{checkpoint} has the learning rate {group['initial_lr']:g}, which {type(scheduler).__name__} cannot "
                    f"change to {settings['lr']:g}; pass the checkpoint's, or choose another --lr-scheduler-type."
                )
            group["initial_lr"] = scheduler.base_lrs[index] = settings["lr"]
            group["lr"] = settings["lr"] * scheduler.lr_lambdas[index](scheduler.last_epoch)
            scheduler._last_lr[index] = group["lr"]  # what is logged

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; the processes of a group that shares images read the same batches."""
        return self.image_groups.share(super()._get_dataloader(*args, **kwargs))

    def get_train_dataloader(self) -> Any:
        """As in `Trainer`, except for streams, which are already split between the processes."""
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
            # A separate generator, so that resumed runs draw the same numbers from the restored global one.
            generator=torch.Generator().manual_seed(args.seed),
        )

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, which would train one more step when it resumes from a checkpoint of the last step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        if self._started_at is None:
            self._started_at = self._logged_at = (time.perf_counter(), self.state.global_step)
            self._tokens_read.zero_()
            self._tokens_trained.zero_()
        super()._run_epoch(*args, **kwargs)
        # A resumed run may have trained tokens before.
        if self._started_at[1] == 0 and not self._tokens_trained.item():
            raise ValueError(
                f"Nothing was trained in {self.state.global_step} steps: no batch had a token with a label (-100 is none). "
                "Check the skipped samples, max_length, and the {% generation %} blocks of the chat template."
            )

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple:
        """As in `Trainer`, but every sample counts once in the loss, and logits are only computed if they are needed."""
        labels = inputs["labels"] = inputs["labels"].clone()
        state = self.accelerator.gradient_state
        if state.end_of_dataloader and state.remainder > 0:  # samples beyond the remainder are repetitions
            own = state.remainder - self.image_groups.index * self.args.eval_batch_size
            labels[max(own, 0) :] = -100
        if prediction_loss_only:
            inputs["skip_logits"] = True
        outputs = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        tokens = (labels[:, 1:] != -100).sum().to(self.args.device)
        # The model divides by the mean number of tokens per process.
        mean = self.accelerator.reduce(outputs[0].float(), "mean")
        tokens = self.accelerator.reduce(tokens, "sum")
        self._eval_loss += torch.stack([mean * tokens, tokens]).double().cpu()
        return outputs

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, with `eval_loss` over tokens and, if requested, `eval_exact_match`."""
        self._eval_loss = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = (self._eval_loss[0] / self._eval_loss[1].clamp(min=1)).item()
        if getattr(self.args, "eval_exact_match", False):
            with self.accelerator.autocast():  # generate() bypasses accelerate's wrapper of forward
                share = exact_match(
                    self.model,
                    self.data_collator,
                    self.eval_dataset,
                    batch_size=self.args.per_device_eval_batch_size,
                    max_new_tokens=self.args.eval_max_new_tokens,
                )
            output.metrics[f"{metric_key_prefix}_exact_match"] = share
        return output


def parameter_groups(
    model: Any,
    weight_decay: float,
    learning_rates: Mapping[str, float] | float | None = None,
    embeddings_learning_rate: float | None = None,
) -> list[dict[str, Any]]:
    """Group trainable parameters: no weight decay for norms, biases and embeddings; learning rates of parts.

    Args:
        model: a model with `get_input_embeddings`, with or without PEFT adapters.
        weight_decay: weight decay of all other parameters.
        learning_rates: part -> learning rate, *optional*, defaults to that of the optimizer; the parts are `projector`,
            `embeddings`, `vision`, `language`, `head` and `adapters`. Parts that are not trained are ignored.
        embeddings_learning_rate: deprecated, *optional*; use `learning_rates={"embeddings": rate}`.

    Returns:
        Non-empty parameter groups for a torch optimizer; every trainable parameter is in exactly one of them.
    """
    if embeddings_learning_rate is not None or isinstance(learning_rates, float):
        message = "A learning rate of the embeddings alone is deprecated; use learning_rates={'embeddings': rate}."
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        rate = learning_rates if isinstance(learning_rates, float) else embeddings_learning_rate
        learning_rates = {"embeddings": rate} if rate is not None else {}
    rates = parse_learning_rates(learning_rates)
    decaying = set(get_parameter_names(model, [nn.LayerNorm, nn.Embedding], NO_DECAY))
    parts = parts_of_parameters(model)
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # Embeddings are a group even without a rate of their own, as in checkpoints of earlier releases.
            part = parts[name] if parts[name] in rates or parts[name] == "embeddings" else ""
            groups.setdefault((part, name in decaying), []).append(parameter)
    result = []
    for (part, decays), parameters in groups.items():
        group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay if decays else 0.0}
        if part in rates:
            group["lr"] = rates[part]
        result.append(group)
    return result


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The numbers of trainable parameters and of all parameters; partitioned ones (ZeRO-3) and 8-bit ones count in full."""
    in_8_bits = [layer for _, layer in frozen_linears(model)]
    numbers = {id(layer.weight) for layer in in_8_bits}  # parameters where they are sharded, else buffers
    parameters = [parameter for parameter in model.parameters() if id(parameter) not in numbers]
    trained = sum(whole_size(parameter) for parameter in parameters if parameter.requires_grad)
    return trained, sum(map(whole_size, parameters)) + sum(layer.out_features * layer.in_features for layer in in_8_bits)

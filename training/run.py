"""A training run, from arguments to a complete checkpoint."""

import json
import logging
import shutil
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import DistributedType
from transformers import (
    AutoProcessor,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerState,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from ..configuration_dsvl import DSVLConfig
from ..data.streaming import Stream
from ..hub_card import TrainingFacts, render_card
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..publishing.push import push_directory
from ..utils.quantization import quantization_config
from ..utils.transformers_names import TRAINER_STATE_NAME
from .adapters import lora_config, merge_adapters
from .arguments import DataArguments, DSVLTrainingArguments, ModelArguments, parse
from .checkpoints import CompleteCheckpoints, has_optimizer_states, what_is_missing
from .collator import ConversationCollator
from .data_summary import describe_data
from .facts import training_facts
from .features import FeatureCache, fill, owner_of
from .fingerprint import RunRecord, read_record, take_fingerprint
from .kernels import use_liger
from .parts import PARTS
from .plot import PLOT, plot_training
from .progress import TrainingLines, TrainingProgress
from .resumption import WAYS_ON, Start, begin, checkpoints, decide_start, finish, on_first_process
from .sources import open_data, packed
from .trainer import DSVLTrainer, count_parameters
from .weights import check_keys, load_tower, whole_weights

logger = logging.getLogger(__name__)

ADAPTERS = "adapters"  # the folder of a LoRA run's adapters in its output directory
BASE_MODEL = "base_model_name_or_path"  # PEFT's name of what adapters belong to
LAST_DROPS = 0.2  # seconds; Gloo's threads need microseconds of them


def main(argv: list[str]) -> None:
    """Run `dsvl train`."""
    # DeepSpeed calls functions that torch renames, several times a step: that would bury the progress bar.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    model_arguments, data_arguments, arguments = parse(argv)
    _log_to_console(arguments)
    try:
        train(model_arguments, data_arguments, arguments)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what_is_kept(Path(str(arguments.output_dir)))) from None
    finally:
        if dist.is_initialized():
            _leave_the_others()


def what_is_kept(output: Path) -> str:
    """What an interrupted run leaves, and how to go on, in a sentence."""
    complete = [path for path in checkpoints(output) if what_is_missing(path) is None]
    if not complete:
        return "Interrupted before the first checkpoint; nothing is kept, and the same command starts again."
    if not has_optimizer_states(complete[-1]):
        return f"Interrupted. {complete[-1]} is kept, weights alone; pass --overwrite-output to start over."
    return f"Interrupted. {complete[-1]} is kept; the same command goes on from it."


def _leave_the_others() -> None:
    """End the communication of the processes.

    Gloo's worker threads drop a finished barrier, and with it the tensors of the collectives before it, a moment after it
    has returned. They need Python's lock for that, and one that waits for it while the interpreter shuts down aborts the
    process ("terminate called without an active exception"). Destroying the groups would join the threads, but DeepSpeed's
    engine outlives its trainer and keeps them; so they get the lock once more while nothing else wants it.
    """
    gloo = dist.get_backend() == "gloo"
    dist.destroy_process_group()
    if gloo:
        time.sleep(LAST_DROPS)


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: DSVLTrainingArguments
) -> dict[str, float]:
    """Fine-tune a checkpoint, resuming where an earlier start of the same run was interrupted.

    At the end `arguments.output_dir` is a complete DSVL checkpoint; adapters are merged into it, and lie in `adapters/`. A
    run that is finished already changes nothing.

    Returns:
        The metrics of the training and of the last evaluation.

    Raises:
        ValueError: for arguments or data that do not work, and an output directory of another run; where possible, before
            weights are loaded.
    """
    set_seed(arguments.seed)
    DSVLConfig.from_pretrained(model_arguments.model)  # refuses another model's directory
    output = Path(str(arguments.output_dir))
    if Path(model_arguments.model).is_dir() and output.resolve() == Path(model_arguments.model).resolve():
        raise ValueError(f"--output {output} is the directory of --model, which would be replaced; pass another.")
    seed = arguments.seed if arguments.data_seed is None else arguments.data_seed
    train_data, eval_data = open_data(data_arguments, seed, arguments.process_index, arguments.world_size)
    conversations = train_data
    record, start = on_first_process(lambda: _decide(output, model_arguments, data_arguments, arguments))
    publish, arguments.push_to_hub = arguments.push_to_hub, False  # once, when the output directory is complete
    if start.finished:
        logger.info("%s is finished: the trained model is there, and nothing is changed. %s.", output, WAYS_ON)
        if publish and arguments.process_index == 0:
            _publish(arguments)
        return last_metrics(output)

    processor = AutoProcessor.from_pretrained(model_arguments.model)
    features = None
    if data_arguments.cache_image_features is not None:
        features = cached_features(
            data_arguments.cache_image_features,
            [train_data, eval_data],
            model_arguments,
            arguments,
            processor,
            data_arguments.allow_urls,
        )
    collator = ConversationCollator(
        processor,
        data_arguments.max_length,
        data_arguments.on_bad_sample,
        features,
        data_arguments.allow_urls,
        data_arguments.max_bad_samples,
    )
    if isinstance(train_data, Stream):
        train_data.usable = collator.shorten_sample
    if data_arguments.packing:
        train_data = packed(train_data, collator, data_arguments, seed)
    logger.info("Data: %s.", describe_data(train_data, collator))
    model = load_model(model_arguments, arguments)

    callbacks: list[Any] = [CompleteCheckpoints(arguments.save_total_limit)]
    arguments.save_total_limit = None  # kept by the callback
    if arguments.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(arguments.early_stopping_patience))
    trainer = DSVLTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=collator,
        processing_class=processor,
        callbacks=callbacks,
    )
    kind = trainer.accelerator.distributed_type
    if arguments.deepspeed is not None and kind != DistributedType.DEEPSPEED:
        raise RuntimeError(f"--deepspeed was asked for, but accelerate has chosen {kind.value}; look at its environment.")
    for line in describe(trainer, arguments):
        logger.info(line)
    checkpoint = start.checkpoint
    on_first_process(lambda: begin(output, record, start, arguments.overwrite_output))
    if checkpoint is not None:
        logger.info("Resuming from %s.", checkpoint)
        if isinstance(train_data, Stream):
            state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
            batch_size = state.train_batch_size or arguments.train_batch_size  # --auto-find-batch-size may have lowered it
            train_data.start_after(state.global_step * arguments.gradient_accumulation_steps, batch_size)
            arguments.ignore_data_skip = True  # the Trainer would make these batches, images and all, to drop them
    disable_progress_bar()  # of the files that are written, between the lines of the training's own
    progress = TrainingLines() if arguments.disable_tqdm else TrainingProgress()
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trainer.add_callback(progress)
    try:
        metrics = trainer.train(resume_from_checkpoint=checkpoint).metrics
    except KeyboardInterrupt:
        progress.close()
        raise
    _report_counts(collator, train_data)
    if eval_data is not None:
        metrics |= trainer.evaluate()
    facts = training_facts(trainer, metrics, conversations, model_arguments.train, resumed=checkpoint is not None)
    save_trained(trainer, model_arguments, facts)
    on_first_process(lambda: finish(output, record))
    if publish and trainer.is_world_process_zero():
        _publish(arguments)
    return metrics


def _decide(
    output: Path, model_arguments: ModelArguments, data_arguments: DataArguments, arguments: DSVLTrainingArguments
) -> tuple[RunRecord, Start]:
    """The fingerprint of what is asked for, and what it means for this output directory."""
    before = None if arguments.overwrite_output else read_record(output)
    record = take_fingerprint(model_arguments, data_arguments, arguments, before.files if before is not None else None)
    return record, decide_start(output, record, arguments.resume_from_checkpoint, arguments.overwrite_output)


def _publish(arguments: DSVLTrainingArguments) -> None:
    commit = push_directory(
        str(arguments.output_dir),
        arguments.hub_model_id or Path(str(arguments.output_dir)).absolute().name,
        private=arguments.hub_private_repo,
        revision=arguments.hub_revision,
        token=arguments.hub_token,
    )
    logger.info("Published: %s", commit.commit_url)


def last_metrics(output: Path) -> dict[str, float]:
    """The metrics of a finished run, the last value of each."""
    state = TrainerState.load_from_json(str(output / TRAINER_STATE_NAME))
    logged = {name: value for entry in state.log_history for name, value in entry.items()}
    return {name: value for name, value in logged.items() if name.startswith(("train_", "eval_"))}


def cached_features(
    directory: str,
    data: list[Any],
    model_arguments: ModelArguments,
    arguments: DSVLTrainingArguments,
    processor: Any,
    allow_urls: bool = False,
) -> FeatureCache:
    """The cache of the tower's features, filled for these data sets (None among them for none) by all processes."""
    config = DSVLConfig.from_pretrained(model_arguments.model)
    tower = load_tower(model_arguments.model, config, precision(arguments))
    owner = owner_of(tower, config, processor.image_processor)
    with arguments.main_process_first(local=False, desc="opening the cache of image features"):
        cache = FeatureCache(directory, owner)
    fill(
        cache,
        [one for one in data if one is not None],
        tower.to(arguments.device),
        config,
        processor.image_processor,
        workers=arguments.dataloader_num_workers,
        rank=arguments.process_index,
        processes=arguments.world_size,
        allow_urls=allow_urls,
    )
    if dist.is_initialized():
        dist.barrier()
    cache.refresh()
    return cache


def precision(arguments: DSVLTrainingArguments) -> torch.dtype:
    """Of the weights that do not learn, and of all in the end."""
    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def load_model(model_arguments: ModelArguments, arguments: DSVLTrainingArguments) -> Any:
    """Load the model in the precision to train in, and say what learns.

    Under `--bf16` (`--fp16`) weights are loaded in it. Without DeepSpeed, which keeps copies in float32 itself, what learns
    is float32, so that small updates are not rounded away.
    """
    dtype = precision(arguments)
    options: dict[str, Any] = {"dtype": dtype}
    if model_arguments.attn_implementation is not None:
        options["attn_implementation"] = {"text_config": model_arguments.attn_implementation}
    if model_arguments.qlora:
        options["quantization_config"] = quantization_config("4bit", dtype)
    model = DSVLForConditionalGeneration.from_pretrained(model_arguments.model, **options)
    model.config.text_config.use_cache = False
    if arguments.use_liger_kernel:
        use_liger(model)
        arguments.use_liger_kernel = False  # it is in place; the Trainer would look for kernels of the type "dsvl"
    if model_arguments.lora_rank > 0:
        from peft import get_peft_model

        config = lora_config(
            model,
            model_arguments.lora_rank,
            model_arguments.lora_alpha,
            train=model_arguments.train,
            targets=model_arguments.lora_targets,
            language=model_arguments.lora_language,
            vision=model_arguments.lora_vision,
            dropout=model_arguments.lora_dropout,
            dora=model_arguments.dora,
        )
        set_seed(arguments.seed)  # the same adapters to begin with, however much chance loading took
        model = get_peft_model(model, config, autocast_adapter_dtype=arguments.deepspeed is None)
    else:
        model.set_trainable(**{argument: part in model_arguments.train for part, argument in PARTS.items()})
    if model_arguments.compile_decoder_layers:
        (model.get_base_model() if model_arguments.lora_rank > 0 else model).compile_decoder_layers()
    if arguments.deepspeed is None and dtype != torch.float32:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if "language" not in model_arguments.train:  # a frozen decoder computes in its own precision
            model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(dtype))
    return model


def describe(trainer: DSVLTrainer, arguments: DSVLTrainingArguments) -> list[str]:
    """What a run will do, a line each: parameters, optimizer memory."""
    trained, total = count_parameters(trainer.model)
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
    # AdamW's two moments in float32; DeepSpeed's copy of the weights beside them when they are of 16 bits.
    each = 8 + (4 if stage is not None and (arguments.bf16 or arguments.fp16) else 0)
    share = arguments.world_size if stage else 1
    where = f"1/{share} of it, ZeRO-{stage}" if share > 1 else "all of it"
    return [
        f"Parameters: {trained:,} of {total:,} are trained ({trained / total:.2%}).",
        f"Optimizer: {trained * each / share / 2**30:.3f} GiB in each of {arguments.world_size} processes ({where}).",
    ]


def save_trained(trainer: DSVLTrainer, model_arguments: ModelArguments, facts: TrainingFacts) -> None:
    """Make the output directory a complete checkpoint: weights, configuration, code, processor, card.

    Everything is written beside it first; an interrupted call leaves the checkpoints to resume from.
    """
    arguments = trainer.args
    output = Path(arguments.output_dir)
    partial = output / ".trained.partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    adapted = model_arguments.lora_rank > 0
    config = trainer.model.config
    config.text_config.use_cache = True
    config.__dict__.pop("use_cache", None)  # the Trainer's, for the time of the training
    if not adapted and not trainer.is_deepspeed_enabled:
        trainer.model.to(precision(arguments))  # what learnt was float32
    trainer.save_model(str(partial / ADAPTERS if adapted else partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if adapted:
            with whole_weights():
                merged = merge_adapters(model_arguments.model, partial / ADAPTERS)
            merged.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        else:
            check_keys(trainer.model, partial)
        trainer.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        make_shareable(partial)
        if plot_training(partial / TRAINER_STATE_NAME, partial / PLOT):
            facts = replace(facts, plot=PLOT)
        card = render_card(config, [model_arguments.model], facts)
        (partial / "README.md").write_text(card, encoding="utf-8")
        _move(partial, output)
        logger.info("The trained model is in %s.", output)
    trainer.accelerator.wait_for_everyone()


def make_shareable(directory: Path) -> None:
    """Take out of a saved model what is of this machine alone: pickled arguments, and paths."""
    for arguments in directory.rglob("training_args.bin"):
        arguments.unlink()
    (directory / ADAPTERS / "README.md").unlink(missing_ok=True)  # PEFT's draft of a card
    for name, key in ((TRAINER_STATE_NAME, "best_model_checkpoint"), (f"{ADAPTERS}/adapter_config.json", BASE_MODEL)):
        path = directory / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content[key] and Path(content[key]).exists():
            content[key] = Path(content[key]).name
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _move(partial: Path, output: Path) -> None:
    """Move what was written into its place, the configuration last: without it nothing is taken for a checkpoint."""
    (output / "config.json").unlink(missing_ok=True)
    for stale in [*output.glob("*.safetensors"), *output.glob("*.safetensors.index.json")]:
        stale.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()


def _report_counts(collator: ConversationCollator, data: Any) -> None:
    counts = collator.counts
    if dist.is_initialized():
        total = counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
        counts = total.cpu()
    seen, left_out, shortened = counts.tolist()
    if left_out or shortened or data.skipped:
        logger.warning(
            "Of %d conversations put into batches, %d were left out and %d lost rounds that did not fit; %d samples of %s "
            "were broken.",
            seen,
            left_out,
            shortened,
            data.skipped,
            data.source,
        )


class _Console(logging.StreamHandler):
    """Writes to what standard error is now: a notebook or a test may have replaced what it was when the handler was made."""

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """There is nothing to keep."""


def _log_to_console(arguments: DSVLTrainingArguments) -> None:
    package = logging.getLogger(__package__.partition(".")[0])
    if not package.handlers:
        handler = _Console()
        handler.setFormatter(logging.Formatter("%(message)s"))
        package.addHandler(handler)
    package.setLevel(logging.INFO if arguments.process_index == 0 else logging.ERROR)

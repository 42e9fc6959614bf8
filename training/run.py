"""Runs a training from its arguments to a complete checkpoint."""

import logging
import time
from pathlib import Path
from typing import Any

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

from ..acceleration.attention.kernel_choice import agree
from ..configuration_dsvl import DSVLConfig
from ..data.streaming import Stream
from ..publishing.push import push_directory
from ..utils.transformers_names import TRAINER_STATE_NAME
from .adapters import base_model
from .arguments import DataArguments, DSVLTrainingArguments, ModelArguments
from .batch_division import BatchDivision, describe_resuming, with_division
from .checkpoints import CompleteCheckpoints, checkpoints, has_optimizer_states, send_checkpoint, why_incomplete
from .collator import ConversationCollator
from .data_summary import describe_data
from .deepspeed_config import zero_stage
from .distributed import on_first_process
from .feature_cache import FeatureCache, feature_fingerprint, fill_cache
from .fingerprint import RunRecord, take_fingerprint
from .frozen_errors import report_errors
from .frozen_precision import describe_frozen_weights, describe_products
from .hosts import Hosts
from .model_card import training_facts
from .model_loading import load_checkpoint_tower, load_model, precision
from .progress_callbacks import TrainingLines, TrainingProgress, duration
from .repartition import check_states
from .resumption import (
    LAST,
    NO,
    REMEDY,
    Start,
    begin,
    decide_start,
    divide_batch,
    finish,
    record_to_continue,
)
from .saving import StageOfRun, save_trained
from .trainer import DSVLTrainer, count_parameters
from .training_data import open_data, pack_data

logger = logging.getLogger(__name__)


def interruption_message(output: Path, stage: str = "") -> str:
    """The message after Ctrl-C: which checkpoint an interrupted run can resume from, and how.

    Args:
        output: output directory of the run, or of the stage.
        stage: the stage of a recipe, *optional*.
    """
    interrupted = f"Interrupted in {stage}" if stage else "Interrupted"
    complete = [path for path in checkpoints(output) if why_incomplete(path) is None]
    if not complete and stage:
        return f"{interrupted}, before its first checkpoint; the same command starts this stage again."
    if not complete:
        return f"{interrupted} before the first checkpoint; nothing is kept, and the same command starts again."
    if not has_optimizer_states(complete[-1]):
        return f"{interrupted}. {complete[-1]} is kept, but has only weights; pass --overwrite-output to start over."
    return f"{interrupted}. {complete[-1]} is kept; run the same command again to resume from it."


def train(
    model_arguments: ModelArguments, data_arguments: DataArguments, arguments: DSVLTrainingArguments
) -> dict[str, float]:
    """Fine-tune a checkpoint. A run that was interrupted is resumed; for a finished run nothing changes.

    Afterwards `arguments.output_dir` is a complete DSVL checkpoint. Adapters are merged into it and also saved in
    `adapters/`.

    Args:
        model_arguments, data_arguments, arguments: what `parse` returns.

    Returns:
        The metrics of the training and of the last evaluation, name -> value.

    Raises:
        ValueError: if arguments or data are invalid, or the output directory belongs to another run; where possible, before
            weights are loaded.
    """
    set_seed(arguments.seed)
    output = Path(str(arguments.output_dir))
    check_model(model_arguments.model, output)
    data = open_run_data(data_arguments, arguments)
    hosts = Hosts(output)
    if not arguments.overwrite_output:
        receive_run(hosts, arguments.resume_from_checkpoint)
    record, start, batch = on_first_process(lambda: _decide(output, model_arguments, data_arguments, arguments))
    if start.finished:
        return finished_run(output, arguments)
    arguments = with_division(arguments, batch)
    return train_model(model_arguments, data_arguments, arguments, data, record, start, hosts)


def receive_run(hosts: Hosts, resume: str | None) -> None:
    """On hosts with directories of their own, receive what they lack of a run that may be resumed."""
    if not hosts.separate or resume in (None, NO, LAST):
        send_checkpoint(hosts)
        return
    checkpoint = Path(str(resume))
    send_checkpoint(Hosts(checkpoint.parent), checkpoint.name)


def check_model(model: str, output: Path) -> None:
    """Check that the model is a DSVL checkpoint, and that the output would not replace it.

    Raises:
        ValueError: if not.
    """
    DSVLConfig.from_pretrained(model)  # raises ValueError for other models
    if Path(model).is_dir() and output.resolve() == Path(model).resolve():
        raise ValueError(f"--output {output} is the directory of --model, which would be replaced; pass another.")


def open_run_data(data_arguments: DataArguments, arguments: DSVLTrainingArguments) -> tuple[Any, Any]:
    """The training and evaluation data of a run, see `open_data`."""
    size = arguments.image_parallel  # processes that read the same batches
    return open_data(data_arguments, run_seed(arguments), arguments.process_index // size, arguments.world_size // size)


def run_seed(arguments: DSVLTrainingArguments) -> int:
    """The seed of the data."""
    return arguments.seed if arguments.data_seed is None else arguments.data_seed


def finished_run(output: Path, arguments: DSVLTrainingArguments, remedy: str = REMEDY) -> dict[str, float]:
    """Log that a run is finished, and publish it if that is requested; returns its metrics."""
    logger.info("%s is finished: the trained model exists, and is not changed. %s.", output, remedy)
    if arguments.push_to_hub and arguments.process_index == 0:
        _publish(arguments)
    return last_metrics(output)


def train_model(
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    arguments: DSVLTrainingArguments,
    data: tuple[Any, Any],
    record: RunRecord,
    start: Start,
    hosts: Hosts,
    stage: StageOfRun | None = None,
) -> dict[str, float]:
    """Train a model and save it, after `train` has checked the arguments and decided how the run starts.

    Args:
        model_arguments, data_arguments, arguments: arguments of the run, or of a stage of it.
        data: training and evaluation data, see `open_data`.
        record: fingerprint of the run.
        start: how it starts.
        hosts: the hosts with the output directory.
        stage: the place of the training in a recipe, *optional*.

    Returns:
        The metrics of the training and of the last evaluation, name -> value.
    """
    output, seed = Path(str(arguments.output_dir)), run_seed(arguments)
    if start.checkpoint is not None:
        check_states(Path(start.checkpoint), zero_stage(arguments.deepspeed), bool(arguments.fsdp))
    conversations, eval_data = data
    publish, arguments.push_to_hub = arguments.push_to_hub, False  # once, when the output directory is complete
    processor = AutoProcessor.from_pretrained(model_arguments.model)
    for name in ("video_fps", "max_frames"):  # saved with the trained model
        if getattr(data_arguments, name) is not None:
            setattr(processor, name, getattr(data_arguments, name))
    features = None
    if data_arguments.cache_image_features is not None:
        features = open_feature_cache(
            data_arguments.cache_image_features,
            [conversations, eval_data],
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
    if isinstance(conversations, Stream):
        conversations.usable = collator.shorten_sample
    packing = data_arguments.packing
    train_data = pack_data(conversations, collator, data_arguments, seed) if packing else conversations
    logger.info("Data: %s.", describe_data(train_data, collator))
    started = time.monotonic()
    model = load_model(model_arguments, arguments)
    logger.info("Model: loaded in %s.", duration(time.monotonic() - started))
    if model.config.multimodal_attention == "mmca":
        agree(model.config.text_config, precision(arguments), arguments.device)

    callbacks: list[Any] = [CompleteCheckpoints(arguments.save_total_limit, hosts)]
    arguments.save_total_limit = None  # applied by the callback
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
    trainer.hosts = hosts
    backend = trainer.accelerator.distributed_type
    if arguments.deepspeed is not None and backend != DistributedType.DEEPSPEED:
        raise RuntimeError(f"--deepspeed was passed, but accelerate chose {backend.value}; check its environment variables.")
    for line in describe(trainer, arguments):
        logger.info(line)
    hosts.each(lambda: begin(output, record, start, arguments.overwrite_output))
    if model_arguments.frozen_precision_report:
        report_errors(trainer, output)
    if start.checkpoint is not None:
        logger.info(describe_resuming(Path(start.checkpoint), arguments))
        if isinstance(train_data, Stream):
            state = TrainerState.load_from_json(str(Path(start.checkpoint) / TRAINER_STATE_NAME))
            batch_size = arguments.train_batch_size
            if arguments.auto_find_batch_size and state.train_batch_size is not None:  # it may have been lowered
                batch_size = state.train_batch_size
            train_data.start_after(state.global_step * arguments.gradient_accumulation_steps, batch_size)
            arguments.ignore_data_skip = True  # the Trainer would decode the skipped batches
    disable_progress_bar()  # transformers' bars for loading and saving files
    title = stage.title if stage is not None else ""
    precision_of_frozen = model_arguments.frozen_precision
    evaluated = "" if precision_of_frozen is None else f"frozen weights in {precision_of_frozen}"
    progress = TrainingLines(title, evaluated) if arguments.disable_tqdm else TrainingProgress(title, evaluated)
    trainer.remove_callback(PrinterCallback if arguments.disable_tqdm else ProgressCallback)
    trainer.add_callback(progress)
    try:
        metrics = trainer.train(resume_from_checkpoint=start.checkpoint).metrics
    except KeyboardInterrupt:
        progress.close()
        raise
    _report_counts(collator, train_data, arguments.image_parallel)
    if eval_data is not None:
        metrics |= trainer.evaluate()
    resumed = start.checkpoint is not None
    facts = training_facts(trainer, metrics, conversations, model_arguments.train, resumed=resumed)
    save_trained(trainer, model_arguments, facts, stage)
    hosts.each(lambda: finish(output, record))
    if publish and trainer.is_world_process_zero():
        _publish(arguments)
    if stage is not None:  # the next stage needs the memory
        trainer.accelerator.free_memory()
    return metrics


def _decide(
    output: Path, model_arguments: ModelArguments, data_arguments: DataArguments, arguments: DSVLTrainingArguments
) -> tuple[RunRecord, Start, BatchDivision]:
    """The fingerprint of the requested run, how it begins in this output directory, and how its batch is divided."""
    resume, overwrite = arguments.resume_from_checkpoint, arguments.overwrite_output
    before = None if overwrite else record_to_continue(output, resume)
    record = take_fingerprint(model_arguments, data_arguments, arguments, before.files if before is not None else None)
    batch = divide_batch(output, before, record, data_arguments, arguments)
    return record, decide_start(output, record, resume, overwrite), batch


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
    """The metrics of a finished run: the last logged value of each."""
    state = TrainerState.load_from_json(str(output / TRAINER_STATE_NAME))
    logged = {name: value for entry in state.log_history for name, value in entry.items()}
    return {name: value for name, value in logged.items() if name.startswith(("train_", "eval_"))}


def open_feature_cache(
    directory: str,
    data: list[Any],
    model_arguments: ModelArguments,
    arguments: DSVLTrainingArguments,
    processor: Any,
    allow_urls: bool = False,
) -> FeatureCache:
    """Open the cache of image features; all processes compute the features that it lacks.

    Args:
        directory: directory of the cache.
        data: map-style data sets; None among them is ignored.
        model_arguments, arguments: arguments of the run.
        processor: processor of the model.
        allow_urls: whether images may be URLs, *optional*, defaults to False.
    """
    config = DSVLConfig.from_pretrained(model_arguments.model)
    tower = load_checkpoint_tower(model_arguments.model, config, precision(arguments))
    fingerprint = feature_fingerprint(tower, config, processor)
    hosts = Hosts(directory)  # a cache on each host is filled by its own processes
    hosts.each(lambda: FeatureCache(directory, fingerprint))
    cache = FeatureCache(directory, fingerprint)
    fill_cache(
        cache,
        [dataset for dataset in data if dataset is not None],
        tower.to(arguments.device),
        config,
        processor,
        workers=arguments.dataloader_num_workers,
        rank=hosts.members.index(hosts.rank),
        processes=len(hosts.members),
        allow_urls=allow_urls,
        sampling=processor.video_sampling,
    )
    if dist.is_initialized():
        dist.barrier()
    cache.refresh()
    return cache


def describe(trainer: DSVLTrainer, arguments: DSVLTrainingArguments) -> list[str]:
    """The lines that are logged before training: parameters, optimizer memory, what frozen layers do not learn under plain
    MMCA, 8-bit weights and image parallelism."""
    trained, total = count_parameters(trainer.model)
    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
    # AdamW's two moments in float32; for 16-bit weights DeepSpeed also keeps a float32 copy.
    bytes_per_weight = 8 + (4 if stage is not None and (arguments.bf16 or arguments.fp16) else 0)
    method = f"ZeRO-{stage}" if stage else "FSDP2" if trainer.is_fsdp_enabled else None
    share = arguments.world_size if method is not None else 1
    where = f"1/{share}, {method}" if share > 1 else "not partitioned"
    lines = [
        f"Parameters: {trained:,} of {total:,} are trained ({trained / total:.2%}).",
        f"Optimizer: {trained * bytes_per_weight / share / 2**30:.3f} GiB in each of {arguments.world_size} processes "
        f"({where}).",
    ]
    model = base_model(trainer.model)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    decoder = [one for one in model.model.language_model.parameters() if id(one) not in embeddings]
    is_plain = model.config.multimodal_attention == "mmca" and model.config.numbered_images == 0
    if is_plain and not any(parameter.requires_grad for parameter in decoder):
        lines.append(
            "Attention: under 'mmca' without numbered images a decoder whose layers are frozen hardly tells the images of a "
            "conversation apart; for conversations of several images compose again with --numbered-images 1024, or with "
            "--multimodal-attention causal (docs/concepts/which-attention.md)."
        )
    frozen = describe_frozen_weights(trainer.model)
    if frozen is not None:
        lines.append(f"Frozen weights: {frozen}. Products: {describe_products(trainer.model)}.")
        lines.append("Evaluations during training run with these weights; saved models have the original ones.")
    groups = trainer.image_groups
    if groups.size > 1:
        number = f"{groups.count} {'group' if groups.count == 1 else 'groups'} of {groups.size} processes"
        samples = trainer.get_total_train_batch_size(arguments)
        lines.append(
            f"Image parallelism: {number}, which share the images and long texts of a batch; a step has {samples} samples."
        )
    return lines


def _report_counts(collator: ConversationCollator, data: Any, image_parallel: int) -> None:
    """Log how many samples were skipped or shortened, in all processes; those that share images have the same samples."""
    counts = collator.counts
    if dist.is_initialized():
        total = counts.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)
        counts = total.cpu()
    seen, skipped, shortened = (counts // image_parallel).tolist()
    if skipped or shortened or data.skipped:
        logger.warning(
            "Of %d conversations in batches, %d were skipped and %d lost turns beyond the maximum length; %d samples of %s "
            "are broken.",
            seen,
            skipped,
            shortened,
            data.skipped,
            data.source,
        )

"""Saves a trained model as a complete checkpoint directory."""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..composition.chat_template import chat_template_name
from ..hub_card import TrainingFacts, render_card
from ..utils.transformers_names import TRAINER_STATE_NAME
from .adapters import merge_adapters
from .arguments import ModelArguments
from .checkpoints import RECORD
from .fingerprint import STAGE_FACTS
from .hosts import Hosts
from .model_loading import precision
from .plot import PLOT, plot_training
from .trainer import DSVLTrainer
from .zero3 import without_zero3

logger = logging.getLogger(__name__)

ADAPTERS = "adapters"  # directory of a run's adapters, in its output directory
BASE_MODEL = "base_model_name_or_path"  # PEFT's key of the model that adapters belong to


@dataclass(frozen=True)
class StageOfRun:
    """The place of a training in a recipe.

    Attributes:
        name: name of the stage.
        number: its number, from 1.
        count: number of stages.
        earlier: facts of the stages before it.
        plots: their plots, which are copied for the model card.
    """

    name: str
    number: int
    count: int
    earlier: tuple[TrainingFacts, ...] = ()
    plots: tuple[Path, ...] = ()

    @property
    def title(self) -> str:
        """The stage in log lines."""
        return f"stage {self.number}/{self.count}, {self.name}"

    @property
    def plot(self) -> str:
        """The file name of its plot, which differs from those of the other stages."""
        return PLOT if self.number == self.count else f"training-{self.number}-{self.name}.svg"


def save_trained(
    trainer: DSVLTrainer, model_arguments: ModelArguments, facts: TrainingFacts, stage: StageOfRun | None = None
) -> None:
    """Save the trained model to the output directory: weights, configuration, code, processor, model card.

    Everything is written to a temporary directory first, so that an interrupted call leaves the checkpoints to resume from.

    Args:
        trainer: the trainer after training.
        model_arguments: arguments of the run; adapters are merged into the model and kept in `adapters/`.
        facts: contents of the model card.
        stage: the stage of a recipe, *optional*; the card also contains the facts of earlier stages, and those of a stage
            that is not the last are saved for the cards of later ones.
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
    config.__dict__.pop("use_cache", None)  # set by the Trainer during training
    # Trainable weights were float32, except under DeepSpeed.
    dtype = None if adapted else precision(arguments)
    if dtype is not None and not trainer.is_deepspeed_enabled and not trainer.is_fsdp_enabled:
        trainer.model.to(dtype)
    trainer.save_model(str(partial / ADAPTERS if adapted else partial), dtype=dtype)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if adapted:
            with without_zero3():
                merged = merge_adapters(model_arguments.model, partial / ADAPTERS)
            merged.save_pretrained(partial)
            trainer.processing_class.save_pretrained(partial)
        else:
            check_keys(trainer.model, partial)
        trainer.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        make_shareable(partial)
        plot = PLOT if stage is None else stage.plot
        if plot_training(partial / TRAINER_STATE_NAME, partial / plot):
            facts = replace(facts, plot=plot)
        every = [facts]
        if stage is not None:
            every = [*stage.earlier, replace(facts, stage=stage.name)]
            for earlier in stage.plots:
                shutil.copy(earlier, partial)
            if stage.number < stage.count:
                (partial / STAGE_FACTS).write_text(json.dumps(asdict(every[-1]), indent=1) + "\n", encoding="utf-8")
        chat_template = chat_template_name(trainer.processing_class.chat_template)
        card = render_card(config, [model_arguments.model], every, chat_template=chat_template)
        (partial / "README.md").write_text(card, encoding="utf-8")
        move_into_place(partial, output)
        logger.info("The trained model is in %s.", output)
    trainer.accelerator.wait_for_everyone()
    if trainer.hosts is not None and trainer.hosts.separate:
        trainer.hosts.each(lambda: None if trainer.is_world_process_zero() else remove_model(output))
        share_model(trainer.hosts, overwrite=True)


def share_model(hosts: Hosts, overwrite: bool = False) -> None:
    """Send a complete model to hosts with directories of their own. All processes must call it.

    Args:
        hosts: the hosts with the directory of the model.
        overwrite: whether process 0's files replace others, *optional*, defaults to False: they are only sent where they are
            missing.
    """
    hosts.share(lambda: model_files(hosts.directory), overwrite)


def model_files(directory: Path) -> list[Path]:
    """The files of a trained model in the directory of its run; none if there is no directory."""
    if not directory.is_dir():
        return []
    top = [path for path in directory.iterdir() if path.is_file() and path.name != RECORD and not path.name.startswith(".")]
    return [*top, *(path for path in (directory / ADAPTERS).rglob("*") if path.is_file())]


def remove_model(directory: Path) -> None:
    """Remove what makes a directory a model, the configuration first, and its weights."""
    (directory / "config.json").unlink(missing_ok=True)
    for stale in [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]:
        stale.unlink()


def make_shareable(directory: Path) -> None:
    """Remove what belongs to this machine from a saved model: pickled arguments and absolute paths."""
    for arguments in directory.rglob("training_args.bin"):
        arguments.unlink()
    (directory / ADAPTERS / "README.md").unlink(missing_ok=True)  # PEFT's card template
    for name, key in ((TRAINER_STATE_NAME, "best_model_checkpoint"), (f"{ADAPTERS}/adapter_config.json", BASE_MODEL)):
        path = directory / name
        if not path.is_file():
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        if content[key] and Path(content[key]).exists():
            content[key] = Path(content[key]).name
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def move_into_place(partial: Path, output: Path) -> None:
    """Move the files of `partial` to `output`, the configuration last: without it the directory is not a checkpoint."""
    remove_model(output)
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
        target = output / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    partial.rmdir()


def check_keys(model: Any, directory: Path) -> None:
    """Compare the keys of saved weights with those of the model.

    Raises:
        RuntimeError: if they differ; missing weights would be initialized at random on loading.
    """
    from safetensors import safe_open

    saved: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            saved |= set(file.keys())
    own = set(model.state_dict())
    tied = set(model._tied_weights_keys) if model.config.tie_word_embeddings else set()
    if saved - own or own - saved - tied:
        raise RuntimeError(
            f"The saved weights do not match the model: unexpected {sorted(saved - own)[:3]}, missing "
            f"{sorted(own - saved - tied)[:3]}; please report this."
        )

"""`dsvl plan`: prints the GPU memory of training, computed from a model's configuration."""

import argparse
import math
from typing import TYPE_CHECKING, Any

from huggingface_hub.errors import HFValidationError

from ..acceleration.memory.frozen_linear import PRECISIONS
from ..acceleration.memory.tiled_mlp import DEFAULT_TILE
from ..configuration_dsvl import DSVLConfig
from ..utils.deprecation import RenamedFlag
from ..utils.local_paths import check_exists
from .deepspeed_config import ZERO
from .model_states import DTYPES, GIB, MIB
from .trainable_parts import PARTS

if TYPE_CHECKING:
    from .memory_plan import MemoryPlan, Planner


# Defaults of the flags that a recipe sets for each stage.
DEFAULTS = {
    "fsdp": False,
    "micro_batch": 1,
    "train": ["projector", "embeddings"],
    "lora_rank": 0,
    "lora_language": True,
    "lora_vision": False,
    "activation_checkpointing": False,
    "image_parallel": 1,
    "tiled_mlp": None,
    "offload_activations": False,
    "frozen_precision": None,
    "frozen_precision_keep": None,
    "compile_decoder_layers": False,
    "gradient_accumulation": False,
}

# Arguments of `adapters.lora_config` that decide where adapters are, by the names of their flags without "lora".
LORA = ("targets", "language", "vision", "vision_rank", "vision_targets")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `dsvl plan`."""
    parser = commands.add_parser("plan", help="the GPU memory of training, computed from the configuration")
    parser.add_argument(
        "recipe", nargs="?", help="a recipe (a YAML file, or a name of dsvl train --list-recipes): plan each of its stages"
    )
    parser.add_argument(
        "--model",
        type=check_exists,
        help="directory or Hub name of a DSVL checkpoint; its weights are not needed. Required without a recipe",
    )
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME.KEY=VALUE", help="a value of one stage of the recipe"
    )
    parser.add_argument("--world-size", type=int, default=1, help="number of GPUs (default: 1)")
    parser.add_argument(
        "--image-parallel", type=int, metavar="GPUS", help="number of GPUs that share the images of a sample (default: 1)"
    )
    parser.add_argument("--deepspeed", choices=ZERO, help="ZeRO stage (default: data parallelism without DeepSpeed)")
    parser.add_argument("--fsdp", action="store_true", default=None, help="shard by FSDP2 instead")
    parser.add_argument("--micro-batch", type=int, help="samples per GPU in each forward pass (default: 1)")
    parser.add_argument(
        "--sequence-length", type=int, default=2048, help="tokens per sample, image tokens included (default: 2048)"
    )
    parser.add_argument("--images", type=int, default=1, help="images per sample (default: 1)")
    parser.add_argument(
        "--tiles",
        type=int,
        help="tiles per image, with the image layout tiles (default: the most, 1 + max_tiles)",
    )
    parser.add_argument("--pictures", dest="images", type=int, action=RenamedFlag)
    parser.add_argument(
        "--train",
        nargs="*",
        metavar="PART",
        help=f"parts to train: {', '.join(PARTS)} (default: projector embeddings)",
    )
    parser.add_argument("--lora-rank", type=int, help="rank of adapters on the linear layers (default: 0, none)")
    parser.add_argument(
        "--lora-targets",
        nargs="+",
        metavar="LAYER",
        help="names or paths of the layers to adapt (default: all linear layers)",
    )
    parser.add_argument(
        "--no-lora-language", dest="lora_language", action="store_false", default=None, help="do not adapt the decoder"
    )
    parser.add_argument("--lora-vision", action="store_true", default=None, help="adapt the vision tower")
    parser.add_argument("--lora-vision-rank", type=int, help="rank of the tower's adapters (default: --lora-rank)")
    parser.add_argument(
        "--lora-vision-targets", nargs="+", metavar="LAYER", help="layers of the tower to adapt (default: --lora-targets)"
    )
    parser.add_argument(
        "--activation-checkpointing",
        "--gradient-checkpointing",
        action="store_true",
        default=None,
        help="recompute activations in the backward pass",
    )
    parser.add_argument(
        "--tiled-mlp", type=int, metavar="TOKENS", help="run the decoder's MLPs over tiles of this number of tokens"
    )
    parser.add_argument(
        "--offload-activations",
        action="store_true",
        default=None,
        help="with --activation-checkpointing, keep the inputs of the decoder's layers in main memory",
    )
    parser.add_argument(
        "--frozen-precision", choices=PRECISIONS, help="keep frozen linear layers of decoder and vision tower in 8 bits"
    )
    parser.add_argument(
        "--frozen-precision-keep",
        nargs="+",
        metavar="LAYER",
        help="layers that --frozen-precision leaves as they are, or none (default: the decoder's first and last layer)",
    )
    parser.add_argument("--compile-decoder-layers", action="store_true", default=None, help="compile the decoder's layers")
    parser.add_argument(
        "--gradient-accumulation",
        action="store_true",
        default=None,
        help="accumulate gradients over several micro-batches",
    )
    parser.add_argument(
        "--supervised-share", type=float, default=0.25, help="fraction of the text tokens that have a label (default: 0.25)"
    )
    parser.add_argument("--gpu-memory", type=float, default=80, help="memory of one GPU in GiB (default: 80)")
    parser.add_argument(
        "--dtype", choices=DTYPES, help="dtype of weights and activations (default: the configuration's, or bfloat16)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> None:
    from .argument_checks import check_setup
    from .fsdp import check_fsdp
    from .memory_plan import Planner

    if not (math.isfinite(arguments.gpu_memory) and arguments.gpu_memory > 0):
        raise ValueError(f"--gpu-memory {arguments.gpu_memory:g}: pass a positive number of GiB, such as 80.")
    if arguments.recipe is not None:
        _run_recipe(arguments)
        return
    if arguments.stage:
        raise ValueError(f"--stage {arguments.stage[0]} without a recipe; pass the name or file of one first.")
    if arguments.model is None:
        raise ValueError("No model; pass --model DIR, or a recipe.")
    for name, value in DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    check_fsdp(vars(arguments) | {"fp16": arguments.dtype == "float16"})
    check_setup(vars(arguments))
    lora = {name: getattr(arguments, f"lora_{name}") for name in LORA} if arguments.lora_rank else None
    planner = Planner(
        _load_config(arguments.model),
        world_size=arguments.world_size,
        image_parallel=arguments.image_parallel,
        deepspeed=arguments.deepspeed,
        fsdp=arguments.fsdp,
        sequence_length=arguments.sequence_length,
        images=arguments.images,
        tiles=arguments.tiles,
        train=arguments.train,
        lora_rank=arguments.lora_rank,
        lora=lora,
        activation_checkpointing=arguments.activation_checkpointing,
        mlp_tile=arguments.tiled_mlp,
        offload_activations=arguments.offload_activations,
        frozen_precision=arguments.frozen_precision,
        frozen_keep=arguments.frozen_precision_keep,
        compile_decoder_layers=arguments.compile_decoder_layers,
        gradient_accumulation=arguments.gradient_accumulation,
        supervised_share=arguments.supervised_share,
        dtype=arguments.dtype,
        mixed_precision=True,  # as dsvl train --bf16 and --fp16
    )
    _print_plan(planner, arguments.micro_batch, arguments.gpu_memory)


def _run_recipe(arguments: argparse.Namespace) -> None:
    """Print the plan of each stage, and a table of all."""
    from .memory_plan import usable
    from .recipe_plan import plan_stages

    for name in (*DEFAULTS, "lora_targets", "lora_vision_rank", "lora_vision_targets", "deepspeed", "dtype"):
        if getattr(arguments, name) is not None:
            flag = {"lora_language": "no-lora-language"}.get(name, name.replace("_", "-"))
            raise ValueError(f"--{flag} with a recipe, which sets it for each stage; change the recipe, or pass --stage.")
    flags = [word for value in arguments.stage for word in ("--stage", value)]
    flags += ["--model", arguments.model] if arguments.model is not None else []
    stages = plan_stages(
        arguments.recipe,
        flags,
        world_size=arguments.world_size,
        sequence_length=arguments.sequence_length,
        images=arguments.images,
        tiles=arguments.tiles,
        supervised_share=arguments.supervised_share,
    )
    memory = arguments.gpu_memory * GIB
    rows = []
    for stage in stages:
        print(f"stage {stage.name}: {', '.join(stage.notes)}")
        _print_plan(stage.planner, stage.micro_batch, arguments.gpu_memory, stage.name)
        print()
        total = stage.planner.plan(stage.micro_batch).total
        fits = "yes" if total <= usable(memory) else "no"
        rows.append((stage.name, str(stage.micro_batch), size(total), fits, str(stage.planner.largest_micro_batch(memory))))
    heads = ("stage", "micro-batch", "per GPU", "fits", "largest micro-batch")
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())


def _print_plan(planner: "Planner", micro_batch: int, gpu_memory: float, stage: str | None = None) -> None:
    """Print the table of a plan, of a stage of a recipe if it is named, whether it fits, and the largest micro-batch."""
    from .memory_plan import usable

    made = planner.plan(micro_batch)
    print(table(made))
    memory, gpu = gpu_memory * GIB, f"a GPU of {gpu_memory:g} GiB"
    verdict = "fits" if made.total <= usable(memory) else "does not fit"
    usable_size = size(max(usable(memory), 0))
    print(
        f"a micro-batch of {micro_batch} {verdict} {gpu}, of which {usable_size} are usable (CUDA context and fragmentation "
        "aside)"
    )
    largest = planner.largest_micro_batch(memory)
    if largest:
        print(f"largest micro-batch for {gpu}: {largest}")
    else:
        print(f"not even a micro-batch of 1 fits {gpu}; {_remedies(planner, memory, stage)}")


def _load_config(name: str) -> DSVLConfig:
    try:
        return DSVLConfig.from_pretrained(name)
    except (OSError, HFValidationError) as error:
        raise ValueError(
            f"{name} is neither a directory with a config.json nor a model on the Hub; pass a checkpoint, as dsvl compose "
            "makes it."
        ) from error


def table(made: "MemoryPlan") -> str:
    """A plan as a table: GiB per GPU in both phases, or MiB for a small model."""
    phases = made.forward_backward, made.optimizer_step
    rows = {
        "weights": [phase.weights for phase in phases],
        "gradients": [phase.gradients for phase in phases],
        "optimizer states": [phase.optimizer for phase in phases],
        "activations": [phase.activations for phase in phases],
        "buffers": [phase.buffers for phase in phases],
        "total per GPU": [phase.total for phase in phases],
    }
    unit, name_of_unit = (GIB, "GiB") if made.total >= GIB else (MIB, "MiB")
    lines = [
        f"{_parameters(made.parameters)} parameters, {_parameters(made.trained)} of them trained",
        f"{name_of_unit:20}{'forward + backward':>20}{'optimizer step':>18}",
        *(f"{name:20}{first / unit:20,.2f}{second / unit:18,.2f}" for name, (first, second) in rows.items()),
    ]
    if made.cpu:
        lines.append(f"main memory, for each GPU: {size(made.cpu)}")
    return "\n".join(lines)


def size(number: float) -> str:
    """Bytes as text, in GiB, or in MiB below 1 GiB."""
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / MIB:,.2f} MiB"


def _parameters(number: int) -> str:
    return f"{number / 1e9:,.2f} billion" if number >= 1e9 else f"{number / 1e6:,.2f} million"


# What saves activations, in the order in which it is tried: argument of `dsvl train`, its value, and option of `Planner`.
SAVINGS: tuple[tuple[str, Any, str], ...] = (
    ("activation_checkpointing", True, "activation_checkpointing"),
    ("tiled_mlp", DEFAULT_TILE, "mlp_tile"),
    ("offload_activations", True, "offload_activations"),
)


def _remedies(planner: "Planner", memory: float, stage: str | None) -> str:
    """What to change: first the fewest of `SAVINGS` that make a micro-batch of 1 fit, if activations decide.

    Args:
        planner: the planner of a training that does not fit.
        memory: of a GPU, in bytes.
        stage: the stage of a recipe that is planned, whose arguments are values of `--stage`.
    """
    from .memory_plan import usable

    def flag(name: str, value: Any) -> str:
        if stage is not None:
            return f"--stage {stage}.{name}={str(value).lower()}"
        return f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")

    remedies, flags = [], []
    options: dict[str, Any] = {}
    activations_decide = planner.plan(1).optimizer_step.total <= usable(memory)
    for name, value, option in SAVINGS if activations_decide else ():
        if getattr(planner, option):
            continue
        flags.append(flag(name, value))
        options[option] = value
        needed = planner.changed(**options).plan(1)
        if needed.total <= usable(memory):
            host = f" and {size(needed.cpu)} of main memory" if needed.cpu else ""
            remedies.append(f"{' '.join(flags)} (then it fits, with {size(needed.total)}{host})")
            break
    else:
        remedies += flags[:1] if not planner.activation_checkpointing else []
    if planner.fsdp:
        remedies.append("more GPUs (--world-size)")
    elif planner.deepspeed not in ("zero3", "zero3-offload"):
        remedies.append(f"{flag('deepspeed', 'zero3')} on more GPUs (--world-size)")
    if planner.deepspeed != "zero3-offload" and not planner.fsdp:
        remedies.append(flag("deepspeed", "zero3-offload"))
    shorter = "a shorter --sequence-length" if stage is None else f"a smaller max_length (--stage {stage}.max_length=N)"
    remedies.append(shorter if activations_decide else "GPUs with more memory")
    return "try " + ", ".join(remedies[:-1]) + (" or " if remedies[:-1] else "") + remedies[-1] + "."

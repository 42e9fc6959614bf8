"""What `dsvl env` prints: versions, devices, attention."""

import copy
import os
import platform
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import __file__ as package_file
from ..acceleration.attention.kernel_choice import SETTING, VARIABLE, unsupported
from ..acceleration.attention.kernel_timings import HEAD_DIMS, cache_file, driver_version, tuned
from ..acceleration.decoder_run import head_size
from ..acceleration_dsvl import INTERFACE_VERSION, acceleration
from ..configuration_dsvl import DSVLConfig
from ..modeling_dsvl import DSVLForConditionalGeneration
from ..transformers_dsvl import no_init_weights
from ..utils.compiled_code import VARIABLE as COMPILED_CODE
from ..utils.compiled_code import compiled_code_directory
from ..utils.installed_packages import installed_version
from .attention import attention_of, kinds_of_decoders

GIB = 2**30
PACKAGES = (
    *("torch", "transformers", "tokenizers", "huggingface_hub", "safetensors", "accelerate", "numpy", "pillow"),
    *("triton", "deepspeed", "peft", "trl", "liger-kernel", "torchao", "bitsandbytes", "datasets", "torchvision", "av"),
    *("fastapi", "uvicorn", "gradio", "vllm"),
)
# Variables that change which devices and kernels are used, and how fast.
VARIABLES = (
    *(VARIABLE, "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "TRITON_INTERPRET", "TORCH_CUDA_ARCH_LIST", "DS_ACCELERATOR"),
    *(COMPILED_CODE, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCHDYNAMO_DISABLE", "NCCL_DEBUG"),
)


def collect(model: str | None = None) -> dict[str, Any]:
    """Collect the report.

    Args:
        model: *optional*, directory or Hub name of a DSVL checkpoint, whose attention is described. Without it the attention
            of each kind of decoder is.

    Raises:
        ValueError: if it is not a DSVL checkpoint.
    """
    accelerated = acceleration() is not None
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] + [torch.device("cpu")]
    report: dict[str, Any] = {
        "dsvl": installed_version("dsvl") or "not installed",
        "path": str(Path(str(package_file)).parent),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "torch_threads": torch.get_num_threads()},
        "torch": {
            "build": _build(),
            "driver": driver_version() if torch.version.cuda else None,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
        "packages": {name: found for name in PACKAGES if (found := installed_version(name)) is not None},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "acceleration": {"active": accelerated, "interface_version": INTERFACE_VERSION, "fused_kernels": SETTING},
        "compiled_code": {"directory": str(compiled_code_directory()), "mib": _mib(compiled_code_directory())},
        "devices": [_device(device) for device in devices],
    }
    if model is None:
        report["attention"] = {
            str(device): {
                kind: {dtype: asdict(one) for dtype, one in row.items()}
                for kind, row in kinds_of_decoders(device, accelerated).items()
            }
            for device in devices
        }
    else:
        report["model"] = _model(model, devices, accelerated)
    return report


def _mib(directory: Path) -> float:
    """The size of the files in a directory."""
    sizes = [path.stat().st_size for path in directory.rglob("*") if path.is_file()]
    return round(sum(sizes) / 2**20, 1)


def _build() -> str:
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    return f"ROCm {torch.version.hip}" if torch.version.hip else "CPU"


def _device(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {
            "device": "cpu",
            "name": platform.processor() or platform.machine(),
            "dtypes": ["float32", "bfloat16", "float16"],
        }
    properties = torch.cuda.get_device_properties(device)
    dtypes = ["float32", "float16"]
    if torch.cuda.is_bf16_supported(including_emulation=False):
        dtypes.insert(1, "bfloat16")
    found: dict[str, Any] = {
        "device": str(device),
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / GIB, 1),
        "dtypes": dtypes,
    }
    if unsupported(device) is None:
        times = {head_dim: tuned(device, head_dim) for head_dim in HEAD_DIMS}
        found["tuned"] = {str(head_dim): str(one) for head_dim, one in times.items() if one is not None}
        found["tuned_file"] = str(cache_file(device))
    return found


def _model(name: str, devices: list[torch.device], accelerated: bool) -> dict[str, Any]:
    """A checkpoint's decoder and its attention. Its model is built without weights, as transformers then resolves its
    attn_implementation."""
    config = DSVLConfig.from_pretrained(name)
    with torch.device("meta"), no_init_weights():
        model = DSVLForConditionalGeneration(copy.deepcopy(config))
    text = model.config.text_config
    dtype = config.dtype or text.dtype or torch.float32
    code = Path(name) / "acceleration_dsvl.py"
    found = re.search(r"^INTERFACE_VERSION = (\d+)", code.read_text(encoding="utf-8"), re.M) if code.is_file() else None
    return {
        "name": name,
        "decoder": text.model_type,
        "multimodal_attention": config.multimodal_attention,
        "attn_implementation": text._attn_implementation,
        "dtype": str(dtype).removeprefix("torch."),
        "heads": text.num_attention_heads,
        "key_value_heads": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "head_dim": head_size(text),
        "softcap": getattr(text, "attn_logit_softcapping", None),
        "window": getattr(text, "sliding_window", None),
        "attention_dropout": getattr(text, "attention_dropout", None) or 0,
        "code_interface_version": int(found[1]) if found else None,
        "attention": {
            str(device): [asdict(one) for one in attention_of(text, config.multimodal_attention, dtype, device, accelerated)]
            for device in devices
        },
    }


def text(report: dict[str, Any]) -> str:
    """The report as plain text."""
    torch_build = ", ".join(
        [report["torch"]["build"], *(f"{key} {value}" for key, value in report["torch"].items() if key != "build" and value)]
    )
    cpu, acceleration_ = report["cpu"], report["acceleration"]
    active = "active" if acceleration_["active"] else "not active"
    lines = [
        f"dsvl {report['dsvl']}, {report['path']}",
        f"Python {report['python']}, {report['platform']}, {cpu['cores']} CPUs, {cpu['torch_threads']} threads",
        f"torch build: {torch_build}",
        "packages: " + ", ".join(f"{name} {found}" for name, found in report["packages"].items()),
        "environment: " + (", ".join(f"{name}={value}" for name, value in report["environment"].items()) or "nothing set"),
        f"acceleration: {active}, interface version {acceleration_['interface_version']}, fused kernels "
        f"{acceleration_['fused_kernels']}",
        f"compiled code: {report['compiled_code']['directory']}, {report['compiled_code']['mib']} MiB",
        "",
        "Devices",
    ]
    for one in report["devices"]:
        details = [one["name"]]
        if "capability" in one:
            details += [f"compute capability {one['capability']}", f"{one['memory_gib']} GiB"]
        lines.append(f"  {one['device']}: {', '.join([*details, '/'.join(one['dtypes'])])}")
        for head_dim, times in one.get("tuned", {}).items():
            lines.append(f"    heads of up to {head_dim}: {times}")
        if "tuned" in one and not one["tuned"]:
            lines.append("    not tuned (dsvl env --tune)")
    lines.append("")
    if "model" in report:
        lines += _model_lines(report["model"])
        return "\n".join(lines)
    lines.append(
        'Attention of models with multimodal_attention="mmca" and attn_implementation="sdpa", in training and prefill'
    )
    for device, kinds in report["attention"].items():
        lines += [f"  {device}", *_grouped(kinds)]
    lines += [
        "  Elsewhere: decode steps use the decode mask; eager and mmca_reference the definition; flex_attention gathered",
        '  flex_attention; "causal" the decoder\'s own attention.',
    ]
    return "\n".join(lines)


def _grouped(kinds: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """One line for each answer, with the kinds and dtypes that share it."""
    groups: dict[tuple[str, str], dict[str, list[str]]] = {}
    for kind, by_dtype in kinds.items():
        for dtype, one in by_dtype.items():
            groups.setdefault((one["attention"], one["reason"]), {}).setdefault(kind, []).append(dtype)
    lines = []
    for (attention, reason), members in groups.items():
        if len(groups) == 1:
            lines.append(f"    all: {attention} ({reason})")
            continue
        shared = {tuple(dtypes) for dtypes in members.values()}
        if len(shared) == 1:
            which = f"{'all' if len(members) == len(kinds) else ', '.join(members)} in {'/'.join(shared.pop())}"
        else:
            which = ", ".join(f"{kind} in {'/'.join(dtypes)}" for kind, dtypes in members.items())
        lines.append(f"    {which}: {attention} ({reason})")
    return lines


def _model_lines(model: dict[str, Any]) -> list[str]:
    grouped = "" if model["heads"] == model["key_value_heads"] else f" ({model['key_value_heads']} of keys and values)"
    code = model["code_interface_version"]
    lines = [
        f"Model {model['name']}",
        f"  {model['decoder']} decoder, {model['heads']} heads{grouped} of {model['head_dim']}, softcap {model['softcap']}, "
        f"window {model['window']}, attention_dropout {model['attention_dropout']}, {model['dtype']}",
        f"  multimodal_attention {model['multimodal_attention']}, attn_implementation {model['attn_implementation']}",
    ]
    if code is not None and code != INTERFACE_VERSION:
        lines.append(
            f"  its code has interface version {code}: loaded without this package's classes, it runs without acceleration "
            "(dsvl migrate code)"
        )
    lines.append("Attention")
    for device, calls in model["attention"].items():
        lines += [f"  {device}, {one['calls']}: {one['attention']} ({one['reason']})" for one in calls]
    return lines


__all__ = ["collect", "text"]

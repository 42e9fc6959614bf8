"""The arguments and the environment of vLLM's server for those of `dsvl serve`."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig

from ...utils.hosts import LOOPBACK, is_loopback
from ...utils.model_loading import DTYPES
from ..requests import RequestLimits
from .machine import PLUGIN, Machine
from .settings import CONNECTOR, VARIABLE, ServerSettings

MIDDLEWARE = "dsvl.serving.vllm_server.middleware.Gateway"
# Up to this many cores, vLLM's binding of threads would leave too few of them, and threads that wait actively would take
# them from vLLM's other processes.
FEW_CORES = 4
_LIBRARY = "vLLM's prefix cache keeps images at the beginning of a prompt; for a library use --engine transformers"
# Flags without a counterpart -> what to do instead.
UNSUPPORTED = {
    "attn_implementation": "pass vLLM's own after --, such as -- --attention-backend FLASH_ATTN",
    "compile_text_prefill": "vLLM compiles and records graphs itself; -- --enforce-eager turns it off",
    "device": "vLLM finds the devices itself; choose among them by CUDA_VISIBLE_DEVICES",
    "image_cache": _LIBRARY,
    "image_cache_bits": _LIBRARY,
    "image_cache_dir": _LIBRARY,
    "max_tiles": "limit the images of a request by --max-images, and --max-model-len after --",
    "max_video_frames": "vLLM serves no videos; use --engine transformers",
    "max_video_seconds": "vLLM serves no videos; use --engine transformers",
    "max_videos_per_request": "vLLM serves no videos; use --engine transformers",
    "preload": _LIBRARY,
    "quantization": "pass vLLM's own after --, such as -- --quantization fp8",
}


def check_flags(arguments: argparse.Namespace, environment: Mapping[str, str]) -> None:
    """Refuse flags and variables of the environment that would have no effect, or would undo what the command promises.

    Raises:
        ValueError: naming the first of them, and the remedy.
    """
    for name, remedy in UNSUPPORTED.items():
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no effect with --engine vllm; {remedy}")
    if arguments.dtype not in DTYPES:
        raise ValueError(f"--dtype {arguments.dtype} is not known; choose one of {', '.join(DTYPES)}")
    connector = environment.get("VLLM_MEDIA_CONNECTOR", CONNECTOR)
    if connector != CONNECTOR:
        raise ValueError(
            f"VLLM_MEDIA_CONNECTOR is {connector!r}, which would read images without the limits of dsvl serve; unset it, or "
            "start vllm serve yourself"
        )
    plugins = environment.get("VLLM_PLUGINS")
    if plugins is not None and PLUGIN not in plugins.split(","):
        raise ValueError(f"VLLM_PLUGINS is {plugins!r}, so that vLLM does not load dsvl; add {PLUGIN!r}, or unset it")


def vllm_command(
    arguments: argparse.Namespace,
    name: str,
    limits: RequestLimits,
    config: Any,
    greedy: bool,
    machine: Machine,
    environment: Mapping[str, str],
) -> tuple[list[str], dict[str, str]]:
    """The command that starts vLLM's server.

    Args:
        arguments: of `dsvl serve`.
        name: the model's name for clients.
        limits: of requests.
        config: the checkpoint's configuration.
        greedy: see `greedy_by_default`.
        machine: see `find_machine`.
        environment: of this process. What it sets of vLLM's variables is kept.

    Returns:
        The arguments of Python, and the environment.
    """
    limits = replace(limits, videos=0)
    # vLLM would sample with a temperature of 1 where a generation config says nothing of sampling.
    generation = {"max_new_tokens": limits.new_tokens} | ({"temperature": 0.0} if greedy else {})
    text = config.get_text_config()
    dtype = arguments.dtype
    if dtype == "auto":  # as saved, as everywhere in this package; vLLM would make bfloat16 of float32
        dtype = str(config.dtype or text.dtype or "auto").removeprefix("torch.")
    # `vllm serve` asks for the version of a package named vllm, which other builds do not have.
    if machine.distribution == "vllm":
        argv = ["-P", "-m", "vllm.entrypoints.cli.main", "serve", arguments.model]
    else:
        argv = ["-P", "-m", "vllm.entrypoints.openai.api_server", "--model", arguments.model]
    options = {
        "served-model-name": name,
        "host": arguments.host,
        "port": arguments.port,
        "dtype": dtype,
        "max-model-len": text.max_position_embeddings,
        "max-num-seqs": arguments.max_batch,
        "limit-mm-per-prompt": json.dumps({"image": limits.images}),
        "generation-config": "auto",
        "override-generation-config": json.dumps(generation),
        "allowed-origins": "[]",  # vLLM would let every website send requests from a visitor's browser
        "middleware": MIDDLEWARE,
        "uvicorn-log-level": "warning",
    }
    for name, value in options.items():
        argv += [f"--{name}", str(value)]
    argv += ["--disable-fastapi-docs", *arguments.engine_arguments]
    hosts = LOOPBACK if is_loopback(arguments.host) else ("*",)
    # vLLM 0.32 for CPUs ends when it prefills a request with a seed in chunks ("CPU Generator does not use offset").
    settings = ServerSettings(limits, hosts, takes_seeds=not machine.cpu)
    variables = {
        "VLLM_MEDIA_CONNECTOR": CONNECTOR,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "VLLM_MAX_N_SEQUENCES": str(arguments.max_batch),  # choices of one request
    }
    if machine.cpu:
        variables["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, machine.free_gib // 4))
        # oneDNN keeps code for each number of tokens that a step has had, by default for 1,024 of them, which takes hundreds
        # of megabytes.
        variables["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16"
        if machine.cores <= FEW_CORES:
            variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
    return argv, {**variables, **environment, VARIABLE: settings.to_json()}


def greedy_by_default(model: str) -> bool:
    """Whether requests without a temperature are answered greedily: the checkpoint's generation config does not sample.

    Args:
        model: directory or name of a checkpoint.
    """
    try:
        return not GenerationConfig.from_pretrained(model).do_sample
    except OSError:  # it has none
        return True

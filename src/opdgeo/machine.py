"""What plans and results say of the machine that they run on, and how a time is stated."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
from pathlib import Path


@functools.cache
def version(package: str) -> str:
    """The installed version of a package. Its metadata is parsed once: that takes longer than a small matrix."""
    return importlib.metadata.version(package)


def available_memory() -> int:
    """Bytes that a new program can use, by the operating system's own estimate where it gives one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def available_gpu_memory(device: str) -> int:
    """Bytes that are free on a GPU, such as "cuda:0"."""
    import torch

    return torch.cuda.mem_get_info(device)[0]


def keep_freed_memory() -> None:
    """Let this process keep what it frees for its next arrays. For a process that trains, and does nothing beside it.

    By default glibc hands every large block back and gets it anew, zeroed page by page: 6 to 15 % of an OPD step of SmolLM2 on one core
    (`benchmarks/keep_memory.py`). Another C library is left as it is.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def duration(seconds: float) -> str:
    """Seconds in words: whole seconds up to a minute, minutes up to an hour and a half, then hours.

    >>> duration(42.4), duration(90), duration(7200)
    ('42 s', '2 min', '2.0 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def volume(count: int) -> str:
    """Bytes in words.

    >>> volume(4096), volume(590_000), volume(16_400_000_000)
    ('4096 bytes', '0.59 MB', '16.40 GB')
    """
    if count >= 10_000_000:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 10_000 else f"{count} bytes"

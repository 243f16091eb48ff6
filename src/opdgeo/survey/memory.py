"""How much memory a matrix takes, how much there is, and who may start."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Condition

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Settings

PROGRAM = 500 << 20  # bytes of the program with torch and polars


def working_set(matrix: Matrix, checkpoints: Sequence[Checkpoint], settings: Settings) -> int:
    """Bytes that measuring one matrix takes at its peak, from the headers of the base and its checkpoints: W₀ and W₊ as read,
    one float64 matrix with its Gram matrix and eigenvectors, the leading vectors of both, and the masks."""
    rows, cols, small = matrix.rows, matrix.cols, min(matrix.rows, matrix.cols)
    base, *tuned = (c.itemsize(matrix.tensor) for c in checkpoints)
    stored = base + max(tuned)
    rank = min(max(settings.rank, settings.mask_rank), small)
    eigenvectors = 2 * small * small if 6 * rank > small else 0
    return (
        rows * cols * (stored + 8 + 2 * len(settings.mask_share) + 2)
        + 8 * (small * small + eigenvectors)
        + 8 * 4 * rank * (rows + cols)
    )


def available_memory() -> int:
    """Bytes that a new program can use, by the operating system's own estimate where it gives one."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


class Memory:
    """Lets matrices start while their working sets fit together; one alone always may."""

    def __init__(self, limit: int):
        self.limit, self.used, self.freed = limit, 0, Condition()

    @contextmanager
    def room_for(self, size: int) -> Iterator[None]:
        with self.freed:
            self.freed.wait_for(lambda: not self.used or self.used + size <= self.limit)
            self.used += size
        try:
            yield
        finally:
            with self.freed:
                self.used -= size
                self.freed.notify_all()

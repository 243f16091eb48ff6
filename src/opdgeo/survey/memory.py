"""How much memory a matrix takes, how much there is, and who may start."""

from __future__ import annotations

import ctypes
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Condition

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Settings
from opdgeo.numerics.devices import WHOLE
from opdgeo.numerics.masks import KEPT
from opdgeo.numerics.spectra import KRYLOV
from opdgeo.numerics.subspaces import largest_rank

LIBRARIES = 40 << 20  # bytes of what the first matrix loads: LAPACK and its buffers
PAGE = 120 << 20  # bytes that drawing the page takes, when the matrices are gone


def working_set(matrix: Matrix, checkpoints: Sequence[Checkpoint], settings: Settings, *, pairs: bool = False) -> int:
    """Bytes that measuring one matrix takes at its peak, from the headers of the base and its checkpoints: W₀ and W₊ as read
    and the leading vectors of both, and the most that one step adds: W₊ in float64 with its Gram matrix and eigenvectors, ΔW
    in float64, or the masks; with nulls, the masks and a drawn update, which small updates are spared.

    Of `pairs`: W₀ and two W₊, the masks of visible entries of both, or of one with ΔW in float64, and the leading vectors of every update."""
    rows, cols, small = matrix.rows, matrix.cols, min(matrix.rows, matrix.cols)
    base, *tuned = (c.itemsize(matrix.tensor) for c in checkpoints)
    entries, k = rows * cols, min(max(settings.rank, settings.mask_rank), largest_rank(rows, cols))
    factors = 8 * k * (rows + cols)
    spectrum = 8 * entries + 8 * small * small * (3 if 6 * k > small else 1) + factors
    delta = 16 * entries + 8 * small * small if small < KRYLOV else 8 * entries
    if pairs:
        vectors = 8 * min(max(settings.top_k, 64), small) * (rows + cols)
        return entries * (base + 2 * max(tuned)) + max(delta + 3 * entries, 6 * entries) + len(tuned) * vectors
    masks = entries * (2 * len(settings.mask_share) + 3) + 2 * factors
    steps = [spectrum, delta + factors, masks + 2 * 8 * min(entries, KEPT)]
    if settings.nulls:
        steps.append(masks + 8 * entries + spectrum)
    return entries * (base + max(tuned)) + factors + max(steps)


def block_set(matrix: Matrix) -> int:
    """Bytes that a GPU needs beyond `working_set`: it takes blocks of the whole matrix, of which a step holds up to four in float64."""
    return 4 * 8 * min(matrix.rows * matrix.cols, WHOLE)


def peak_memory() -> int:
    """Peak resident set of this process in bytes."""
    with suppress(OSError, StopIteration, ValueError):  # `getrusage` counts the parent's before the program was started
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back() -> None:
    """Return freed memory to the system, where the C library can: what one matrix leaves behind would add to the next."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


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

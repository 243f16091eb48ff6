"""One matrix at the checkpoints of a run, and the random walk that is its null model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdgeo.diagnostics.diagnostic import Settings
from opdgeo.diagnostics.update import Update
from opdgeo.numerics.spectra import Spectrum


@dataclass(kw_only=True)
class Point:
    """What a trajectory keeps of one checkpoint.

    Attributes:
        spectrum: ΔW's leading triplets; None where the matrix did not move, was skipped (`finite` tells which) or its values
            are known from an earlier run.
        increment: ‖W_t − W_{t−1}‖_F; None where the checkpoint before is not there to read.
        finite: whether every entry is a finite number.
    """

    spectrum: Spectrum | None = None
    increment: float | None = None
    finite: bool = True


@dataclass(frozen=True)
class Trajectory:
    """A matrix of `shape` at the checkpoints `points`, in order of training, seen from the one at `index`.

    `update` is ΔW of that checkpoint while it is in memory.
    """

    shape: tuple[int, int]
    settings: Settings
    points: Sequence[Point]
    index: int
    update: Update | None = None

    def lengths(self) -> list[float | None]:
        """The squared length of the walk at every point: the sum of the squared increments; None where one is unknown."""
        lengths: list[float | None] = []
        total: float | None = 0.0
        for point in self.points:
            if point.finite:
                total = None if total is None or point.increment is None else total + point.increment * point.increment
            lengths.append(total if point.finite and total is not None and math.isfinite(total) else None)
        return lengths

    def angle(self, other: int) -> float | None:
        """The angle between this point of the walk and another one, in radians; None where the walk is not known."""
        lengths = self.lengths()
        earlier, later = lengths[min(self.index, other)], lengths[max(self.index, other)]
        return None if earlier is None or later is None else walk_angle(earlier, later)


def walk_angle(earlier: float, later: float) -> float:
    """The angle whose cosine is ‖S‖/‖S + R‖ for a walk with the squared length `earlier` at S and `later` at S + R."""
    return math.acos(min(1.0, math.sqrt(earlier / later))) if later > 0 else 0.0

"""Subspace similarity of a trajectory (PAPER §2): Sim_K(s, t) = ‖V_K(s)ᵀ V_K(t)‖_F² / K, with V_K the top-K right singular
vectors of ΔW. `final.K` compares with the last checkpoint, `previous.K` with the one before; `final.left.K` and
`previous.left.K` do the same for the left singular vectors. One top-32 decomposition of ΔW serves every K.

Of an update of lower rank than K, the K-th direction is one of rounding, and Sim_K is undefined.

Its null is a walk of independent Gaussian increments with the observed norms: checkpoints of one run share a prefix, and
look alike for that reason alone.
"""

from __future__ import annotations

import math

import torch

from opdgeo.diagnostics.update import Settings, Value, undefined, undetermined, unresolved
from opdgeo.numerics.spectra import EPS, Spectrum

READS = ("top_k",)
RANKS = (1, 2, 4, 8, 16, 32)
SIDES = ("right", "left")


def ranks(settings: Settings) -> list[int]:
    """Every K that is measured: `RANKS` and the settings' `top_k`."""
    return sorted({*RANKS, settings.top_k})


def name(other: str, side: str, k: int) -> str:
    """`final.16`; the left side is named, the right one is not.

    >>> name("previous", "left", 8)
    'previous.left.8'
    """
    return f"{other}.{k}" if side == "right" else f"{other}.{side}.{k}"


def variants(settings: Settings) -> list[str]:
    return [name(other, side, k) for other in ("final", "previous") for side in SIDES for k in ranks(settings)]


def similarity(
    first: Spectrum | None, second: Spectrum | None, k: int, side: str = "right", reason: str | None = None
) -> Value:
    """Sim_K of two updates from their leading singular vectors; None stands for an update that did not move."""
    if first is None or second is None:
        return undefined("one of the two updates did not move")
    for of in (first, second):
        if problem := unresolved(of, k, side):
            return undefined(problem)
    lost = first.subspace_error(k, side) + second.subspace_error(k, side)
    if lost >= 1:
        return undefined(undetermined(k))
    one, other = ((s.left if side == "left" else s.right)[:, :k] for s in (first, second))
    value = float(torch.linalg.matrix_norm(one.T @ other)) ** 2 / k
    return Value(min(1.0, value), min(1.0, 2 * lost + 8 * EPS * k), first.method, reason=reason)


def walk_angle(earlier: float, later: float) -> float:
    """The angle whose cosine is ‖S‖/‖S + R‖ for a walk with the squared length `earlier` at S and `later` at S + R."""
    return math.acos(min(1.0, math.sqrt(earlier / later))) if later > 0 else 0.0

"""Subspace similarity of a trajectory (PAPER §2): Sim_K(s, t) = ‖V_K(s)ᵀ V_K(t)‖_F² / K, with V_K the top-K right singular
vectors of ΔW. `final.K` compares with the last checkpoint, `previous.K` with the one before.

Its null is a walk of independent Gaussian increments with the observed norms: checkpoints of one run share a prefix, and
look alike for that reason alone.
"""

from __future__ import annotations

import torch

from opdgeo.diagnostics.update import Settings, Value, undefined, undetermined
from opdgeo.numerics.spectra import EPS, Spectrum

READS = ("top_k",)


def variants(settings: Settings) -> list[str]:
    return [f"final.{settings.top_k}", f"previous.{settings.top_k}"]


def similarity(first: Spectrum | None, second: Spectrum | None, reason: str | None = None) -> Value:
    """Sim_K of two updates' spectra, with K the number of their right vectors; None stands for an update that did not move."""
    if first is None or second is None:
        return undefined("one of the two updates did not move")
    k = first.right.shape[1]
    lost = first.subspace_error(k, "right") + second.subspace_error(k, "right")
    if lost >= 1:
        return undefined(undetermined(k))
    value = float(torch.linalg.matrix_norm(first.right.T @ second.right)) ** 2 / k
    return Value(min(1.0, value), min(1.0, 2 * lost + 8 * EPS * k), first.method, reason=reason)

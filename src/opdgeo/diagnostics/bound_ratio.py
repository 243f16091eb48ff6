"""Measured movement over its worst case (PAPER §3, gate II); never above 1 but for rounding.

`mirsky`: ‖σ(W₊) − σ(W₀)‖₂ / ‖ΔW‖_F. `weyl`: maxᵢ |σᵢ(W₊) − σᵢ(W₀)| / ‖ΔW‖₂. `wedin`: the largest sine of the principal
angles, left and right, over ‖ΔW‖₂ / (σₖ(W₊) − σₖ₊₁(W₀)) with k = `rank`; undefined where that gap is not positive.
"""

from __future__ import annotations

import math

import torch

from opdgeo.diagnostics.update import UNMOVED, Settings, Update, Value, undefined, undetermined
from opdgeo.numerics.spectra import angle_error

READS = ("rank", "mask_rank", "top_k")


def variants(settings: Settings) -> list[str]:
    return ["mirsky", "weyl", "wedin"]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {name: undefined(UNMOVED) for name in variants(update.settings)}
    before, after, largest = update.base.spectrum, update.tuned_spectrum, float(update.delta_spectrum.sigma[0])
    drift = after.sigma - before.sigma
    errors = before.errors + after.errors
    mirsky = float(torch.linalg.vector_norm(drift)) / update.norm
    weyl = float(drift.abs().max()) / largest
    apart = float((drift.abs() + errors).max()) / largest - weyl
    return {
        "mirsky": Value(mirsky, 1.1 * float(torch.linalg.vector_norm(errors)) / update.norm, after.method),
        "weyl": Value(
            weyl,
            1.1
            * (apart + float(errors[drift.abs().argmax()]) / largest + weyl * update.delta_spectrum.error / largest),
            after.method,
        ),
        "wedin": _wedin(update, largest),
    }


def _wedin(update: Update, largest: float) -> Value:
    k, reason = update.base.cut(update.settings.rank)
    before, after = update.base.spectrum, update.tuned_spectrum
    below = float(before.sigma[k]) if k < len(before.sigma) else 0.0
    gap = float(after.sigma[k - 1]) - below
    error = float(after.errors[k - 1]) + (float(before.errors[k]) if k < len(before.errors) else 0.0)
    if gap <= error:
        return undefined(f"singular value {k} of the tuned matrix is not above value {k + 1} of the base")
    uncertain = max(angle_error(before, after, k, side) for side in update.angles)
    if uncertain >= math.pi / 2:
        return undefined(undetermined(k))
    sine = max(math.sin(float(angles.max())) for angles in update.angles.values())
    slack = uncertain * gap / largest + sine * error / largest + sine * gap * update.delta_spectrum.error / largest**2
    return Value(sine * gap / largest, 1.1 * slack, after.method, reason=reason)

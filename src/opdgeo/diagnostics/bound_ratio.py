"""Measured movement over its worst case (PAPER §3, gate II). It is never above 1 but for rounding.

`mirsky`: ‖σ(W₊) − σ(W₀)‖₂ / ‖ΔW‖_F. `weyl`: maxᵢ |σᵢ(W₊) − σᵢ(W₀)| / ‖ΔW‖₂. `wedin`: the largest sine of the principal
angles, left and right, over ‖ΔW‖₂ / (σₖ(W₊) − σₖ₊₁(W₀)) with k = `rank`; undefined where that gap is not positive.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    NONE,
    PAPER,
    UNMOVED,
    Diagnostic,
    Null,
    Settings,
    Value,
    mean_std,
    undefined,
    undetermined,
)

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update

LABELS = {"mirsky": "Mirsky", "weyl": "Weyl", "wedin": "Wedin"}


def variants(settings: Settings) -> list[str]:
    return list(LABELS)


def measure(update: Update) -> dict[str, Value]:
    import torch

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
    from opdgeo.numerics.spectra import angle_error

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
    slack = (
        uncertain * gap / largest
        + sine * error / largest
        + sine * gap * update.delta_spectrum.error / largest / largest
    )
    return Value(sine * gap / largest, 1.1 * slack, after.method, reason=reason)


def null(isotropic: Isotropic) -> Null:
    """From draws of the changes of W₀'s singular values and of the turn of its subspaces."""
    import numpy as np

    shifts, turns = isotropic.shifts, isotropic.turns
    largest = float(isotropic.spectra[:, 0].mean())
    found = {
        "mirsky": mean_std(isotropic.shift_norms / isotropic.norm),
        "weyl": mean_std(shifts.abs().amax(dim=1) / largest),
        "wedin": NONE,
    }
    if turns is not None:
        k, _ = isotropic.base.cut(isotropic.settings.rank)
        sigma = isotropic.base.spectrum.sigma
        gaps = (sigma[k - 1] + shifts[:, k - 1] - sigma[k]).tolist()
        angles = np.max([turn.largest for turn in turns.values()], axis=0)
        wedin = [math.sin(angle) * gap / largest for angle, gap in zip(angles, gaps, strict=False) if gap > 0]
        found["wedin"] = mean_std(wedin) if wedin else NONE
    return found


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="bound_ratio",
    scope="update",
    reads=("rank", "mask_rank", "top_k"),
    variants=variants,
    measure=measure,
    null=null,
    title="Bound ratio",
    formula="measured / bound: Mirsky (σ shift ≤ ‖ΔW‖_F), Weyl and Wedin (≤ ‖ΔW‖₂)",
    meaning="How much of what perturbation theory allows was used. It is never above 1 beyond rounding.",
    caveat="Close to the bound, the update is aligned with the singular vectors of the matrix. Wedin's ratio is undefined where "
    "the gap between the two spectra at the cut is not positive.",
    example="‖ΔW‖_F = 0.5 and singular values that moved by 0.1 in all: Mirsky 0.2.",
    source=f"{PAPER}, §3, gate II",
    label=lambda variant: LABELS.get(variant, variant),
)

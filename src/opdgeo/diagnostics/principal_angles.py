"""Rotation of the principal subspaces (PAPER §2): angles between the top-k singular subspaces of W₀ and W₊, in degrees."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    NONE,
    PAPER,
    Diagnostic,
    Null,
    Settings,
    Value,
    mean_std,
    published,
    undefined,
    undetermined,
)

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update

STATISTICS = {"max": "largest", "mean": "mean"}


def variants(settings: Settings) -> list[str]:
    return [f"{side}.{statistic}" for side in ("left", "right") for statistic in STATISTICS]


def label(variant: str) -> str:
    side, _, statistic = variant.partition(".")
    return f"{side} {STATISTICS.get(statistic, statistic)}"


def measure(update: Update) -> dict[str, Value]:
    from opdgeo.numerics.spectra import angle_error

    if not update.moved:
        return {name: Value(0.0, 0.0, "count") for name in variants(update.settings)}
    k, reason = update.base.cut(update.settings.rank)
    values: dict[str, Value] = {}
    for side, angles in update.angles.items():
        error = angle_error(update.base.spectrum, update.tuned_spectrum, k, side)
        for statistic, angle in (("max", angles.max()), ("mean", angles.mean())):
            known = error < math.pi / 2
            values[f"{side}.{statistic}"] = (
                Value(math.degrees(float(angle)), math.degrees(error), update.tuned_spectrum.method, reason=reason)
                if known
                else undefined(undetermined(k))
            )
    return values


def null(isotropic: Isotropic) -> Null:
    """From draws of the turn of W₀'s top-k subspaces."""
    import numpy as np

    turns = isotropic.turns
    if turns is None:
        return dict.fromkeys(variants(isotropic.settings), NONE)
    found = {}
    for side, turn in turns.items():
        found[f"{side}.max"] = mean_std(np.degrees(turn.largest))
        found[f"{side}.mean"] = mean_std(np.degrees(turn.mean))
    return found


def curve(side: str, update: Update) -> list[float] | None:
    """All angles of a side, ascending."""
    if not update.moved:
        return None
    values: list[float] = update.angles[side].rad2deg().tolist()
    return values


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="principal_angles",
    scope="update",
    unit="degrees",
    reads=("rank", "mask_rank"),
    variants=variants,
    measure=measure,
    null=null,
    title="Principal angles",
    formula="cos θ_i = σ_i(U₀ᵀU₊), top-k singular subspaces; the same for V",
    meaning="How far the leading singular subspaces of the matrix turned, left (outputs) and right (inputs).",
    caveat="The largest angle depends on the gap between the singular values at the cut. So an isotropic update turns it too. "
    "The column “error” of the data file says how well the angle is determined.",
    example="k = 1, v₀ = (1, 0) and v₊ = (0.8, 0.6): cos θ = 0.8, so θ = 36.9°.",
    source=f"{PAPER}, §2, principal-angle rotation",
    log=True,
    label=label,
    charted=("right.max",),
    leads=True,
    published=published("right.max", (10.0, 1.0, 0.5)),  # of one layer: over 10°, about 1°, under 0.5°
    curves={"angle_left": lambda update: curve("left", update), "angle_right": lambda update: curve("right", update)},
)

"""Rotation of the principal subspaces (PAPER §2): angles between the top-k singular subspaces of W₀ and W₊, in degrees."""

from __future__ import annotations

import math

from opdgeo.diagnostics.update import Settings, Update, Value, undefined, undetermined
from opdgeo.numerics.spectra import angle_error

READS = ("rank", "mask_rank")


def variants(settings: Settings) -> list[str]:
    return ["left.max", "left.mean", "right.max", "right.mean"]


def measure(update: Update) -> dict[str, Value]:
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

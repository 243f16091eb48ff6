"""Share of ‖ΔW‖_F² inside W₀'s top-k singular subspaces, left (UᵀΔW), right (ΔW V) and both (UᵀΔW V).

Chance is k/rows, k/cols and their product. PAPER §1 (R5) asks whether updates avoid the principal weights; this asks
the same of directions.
"""

from __future__ import annotations

import torch

from opdgeo.diagnostics.update import UNMOVED, Settings, Update, Value, undefined, undetermined

READS = ("rank", "mask_rank")


def variants(settings: Settings) -> list[str]:
    return [f"{side}.{settings.mask_rank}" for side in ("left", "right", "both")]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {name: undefined(UNMOVED) for name in variants(update.settings)}
    k, reason = update.base.cut(update.settings.mask_rank)
    spectrum = update.base.spectrum
    left, right = spectrum.left[:, :k], spectrum.right[:, :k]
    inside_left, inside_right = update.delta.onto(left, right)
    inside = {"left": inside_left, "right": inside_right, "both": inside_left @ right}
    lost = {side: spectrum.subspace_error(k, side) for side in ("left", "right")}
    lost["both"] = lost["left"] + lost["right"]
    values: dict[str, Value] = {}
    for side, part in inside.items():
        share = min(1.0, float(torch.linalg.vector_norm(part / update.norm)) ** 2)
        # ‖P′x‖² − ‖Px‖² ≤ ‖(P′ − P)x‖ (‖P′x‖ + ‖Px‖) for a unit x
        error = lost[side] * (2 * share**0.5 + lost[side]) + 4 * update.norm_error
        name = f"{side}.{update.settings.mask_rank}"
        values[name] = (
            undefined(undetermined(k))
            if lost[side] >= 1
            else Value(share, min(1.0, error), spectrum.method, reason=reason)
        )
    return values

"""Share of ‖ΔW‖_F² inside W₀'s top-k singular subspaces: left (UᵀΔW), right (ΔW V) and both (UᵀΔW V).

Chance is k/rows, k/cols and their product. The paper asks whether updates avoid the principal weights (PAPER §1, R5). This
asks the same of directions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    PAPER,
    UNMOVED,
    Diagnostic,
    Live,
    Null,
    Settings,
    Value,
    undefined,
    undetermined,
)

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def variants(settings: Settings) -> list[str]:
    return [f"{side}.{settings.mask_rank}" for side in ("left", "right", "both")]


def label(variant: str) -> str:
    side, _, k = variant.partition(".")
    return f"{side} top {k}"


def measure(update: Update) -> dict[str, Value]:
    import torch

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


def null(isotropic: Isotropic) -> Null:
    """Exact: the energy of a Gaussian in a subspace has a Beta law."""
    from opdgeo.numerics.nulls import energy_share

    rows, cols = isotropic.base.shape
    k, _ = isotropic.base.cut(isotropic.settings.mask_rank)
    inside = {"left": k * cols, "right": k * rows, "both": k * k}
    return {
        f"{side}.{isotropic.settings.mask_rank}": energy_share(part, rows * cols)
        for side, part in inside.items()
        if side == "both" or isotropic.base.spectrum.subspace_error(k, side) < 1
    }


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="principal_energy",
    scope="update",
    unit="share",
    reads=("rank", "mask_rank"),
    variants=variants,
    measure=measure,
    null=null,
    title="Principal energy",
    formula="‖P_U ΔW‖², ‖ΔW P_V‖², ‖P_U ΔW P_V‖² over ‖ΔW‖_F²",
    meaning="The share of the update inside the top-k left, right and both singular subspaces of the matrix it started from.",
    caveat="Chance is k/rows, k/cols and their product, which is what the null gives. Above chance the update follows the principal "
    "directions; below it, it avoids them.",
    example="ΔW = [[3, 0], [0, 4]] and the right subspace of (1, 0): 9 / 25 = 36 %.",
    source=f"this program; it puts the off-principal claim of {PAPER}, §2, in terms of energy",
    label=label,
    charted=("both",),
    live=(Live("principal_energy", "both"),),
)

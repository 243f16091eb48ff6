"""‖ΔW‖_F, the size of the update (PAPER §2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, Diagnostic, Live, Null, Value

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def measure(update: Update) -> dict[str, Value]:
    return {"": Value(update.norm, update.norm * update.norm_error, update.norm_method)}


def null(isotropic: Isotropic) -> Null:
    return {"": (isotropic.norm, 0.0)}


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="frobenius_norm",
    scope="update",
    measure=measure,
    null=null,
    title="Frobenius norm",
    formula="‖ΔW‖_F, ΔW = W₊ − W₀",
    meaning="The length of the update of one matrix, in the units of the weights.",
    caveat="This is the size itself. The null has the same value by construction.",
    example="ΔW = [[3, 0], [0, 4]]: √(9 + 16) = 5.",
    source=f"{PAPER}, §2",
    log=True,
    size=True,
    live=(Live("norm"),),
)

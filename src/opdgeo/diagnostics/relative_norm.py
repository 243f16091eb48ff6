"""‖ΔW‖_F / ‖W₀‖_F: the size of the update against the weights it changes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, Diagnostic, Headline, Live, Null, Value, undefined

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    if update.base.norm == 0:
        return {"": undefined("the base matrix is zero")}
    ratio = update.norm / update.base.norm
    return {"": Value(ratio, 2 * ratio * update.norm_error, update.norm_method)}


def null(isotropic: Isotropic) -> Null:
    size = isotropic.base.norm
    return {"": (isotropic.norm / size, 0.0)} if size > 0 else {}


def doubt(mean: float) -> str | None:
    """Two unrelated models are nearly orthogonal, so that their difference is longer than either: ‖W₊ − W₀‖² ≈ ‖W₊‖² + ‖W₀‖²."""
    if mean <= 1:
        return None
    return (
        f"the difference has {100 * mean:.0f} % of the norm of BASE's weights, so the two do not look like base and tuned of one model "
        "(two unrelated models of equal norms differ by 141 %)"
    )


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="relative_norm",
    scope="update",
    unit="share",
    measure=measure,
    null=null,
    title="Relative norm",
    formula="‖ΔW‖_F / ‖W₀‖_F",
    meaning="The length of the update, relative to the length of the matrix it started from.",
    caveat="This is the size of the move, comparable between matrices. The null has the same value by construction.",
    example="‖ΔW‖_F = 0.5 and ‖W₀‖_F = 50: 0.01.",
    source=f"this program; the norms are those of {PAPER}, §2",
    log=True,
    size=True,
    charted=("",),
    headline=Headline("", "relative norm", "the update has {} of the norm of the weights it started from"),
    live=(Live("relative_norm"),),
    doubt=doubt,
)

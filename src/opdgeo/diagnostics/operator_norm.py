"""‖ΔW‖₂, the largest singular value of the update (PAPER §3: the size that Wedin's and Weyl's bounds see)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, Diagnostic, Null, Value, mean_std

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    spectrum = update.delta_spectrum
    return {"": Value(float(spectrum.sigma[0]), spectrum.error, spectrum.method)}


def null(isotropic: Isotropic) -> Null:
    return {"": mean_std(isotropic.spectra[:, 0])}


def sigma(update: Update) -> list[float] | None:
    """The singular values of ΔW: the leading ones, or all of a small matrix."""
    values: list[float] | None = update.delta_spectrum.sigma.tolist() if update.moved else None
    return values


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="operator_norm",
    scope="update",
    reads=("top_k",),
    measure=measure,
    null=null,
    title="Operator norm",
    formula="‖ΔW‖₂ = σ₁(ΔW)",
    meaning="The largest factor by which the update stretches any input.",
    caveat="At a fixed Frobenius norm, a larger operator norm means that the update is concentrated in fewer directions.",
    example="ΔW = [[3, 0], [0, 4]]: 4, for the input (0, 1).",
    source=f"this program; {PAPER}, §3, uses it in its bounds",
    log=True,
    curves={"sigma_update": sigma},
)

"""Stable rank ‖ΔW‖_F² / ‖ΔW‖₂² (PAPER §2): how many directions carry the update. It lies between 1 and the rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, UNMOVED, Diagnostic, Headline, Live, Null, Value, mean_std, undefined

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": undefined(UNMOVED)}
    spectrum = update.delta_spectrum
    largest = float(spectrum.sigma[0])
    value = (update.norm / largest) ** 2
    relative = update.norm_error + spectrum.error / largest
    return {"": Value(value, 2.1 * value * relative, spectrum.method)}


def null(isotropic: Isotropic) -> Null:
    return {"": mean_std((isotropic.norm / isotropic.spectra[:, 0]) ** 2)}


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="stable_rank",
    scope="update",
    counts="directions",
    reads=("top_k",),
    measure=measure,
    null=null,
    title="Stable rank",
    formula="‖ΔW‖_F² / ‖ΔW‖₂²",
    meaning="How many directions carry the update. It is 1 when a single direction does, and about a quarter of the dimension for "
    "a square isotropic update.",
    caveat="It does not change when the update is scaled. Gradients have a low stable rank under every objective. So compare arms "
    "with each other, and not with the null alone.",
    example="Singular values 2, 1, 1: (4 + 1 + 1) / 4 = 1.5.",
    source=f"{PAPER}, §2, stable rank",
    charted=("",),
    leads=True,
    headline=Headline("", "stable rank", "by its stable rank it is carried by {} directions", "where chance gives {}"),
    live=(Live("stable_rank"),),
)

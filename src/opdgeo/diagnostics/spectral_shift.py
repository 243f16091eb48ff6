"""Normalised spectral shift (PAPER §2): NSS = ‖σ(W₊) − σ(W₀)‖₂ / ‖σ(W₀)‖₂."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import NONE, PAPER, Diagnostic, Null, Value, mean_std, published, undefined

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def measure(update: Update) -> dict[str, Value]:
    import torch

    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    if update.base.norm == 0:
        return {"": undefined("the base matrix is zero")}
    before, after = update.base.spectrum, update.tuned_spectrum
    shift = float(torch.linalg.vector_norm(after.sigma - before.sigma)) / update.base.norm
    error = float(torch.linalg.vector_norm(before.errors + after.errors)) / update.base.norm
    return {"": Value(shift, error, after.method)}


def null(isotropic: Isotropic) -> Null:
    size = isotropic.base.norm
    return {"": mean_std(isotropic.shift_norms / size)} if size > 0 else {"": NONE}


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="spectral_shift",
    scope="update",
    reads=("rank", "mask_rank"),
    measure=measure,
    null=null,
    title="Normalised spectral shift",
    formula="‖σ(W₊) − σ(W₀)‖₂ / ‖σ(W₀)‖₂",
    meaning="How far the singular values of the matrix moved, relative to all of them.",
    caveat="It is never above the relative norm (Mirsky). It grows with the size of the update: read it against the null.",
    example="σ(W₀) = 4, 3 and σ(W₊) = 4.3, 3.4: √(0.3² + 0.4²) / 5 = 0.1.",
    source=f"{PAPER}, §2, normalised spectral shift",
    log=True,
    charted=("",),
    published=published("", (1e-3, 1e-4, 1e-5)),  # about
    curves={
        "sigma_base": lambda update: update.base.spectrum.sigma.tolist(),
        "sigma_tuned": lambda update: update.tuned_spectrum.sigma.tolist(),
    },
)

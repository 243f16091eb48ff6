"""Hill exponent of the top-k singular values of ΔW (PAPER §2): [ (1/(k−1)) Σ_{i<k} log(σᵢ/σₖ) ]⁻¹.

A small exponent is a heavy tail: few directions far above the rest.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, UNMOVED, Diagnostic, Null, Settings, Value, mean_std, undefined

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update


def variants(settings: Settings) -> list[str]:
    return [str(settings.top_k)]


def measure(update: Update) -> dict[str, Value]:
    (name,) = variants(update.settings)
    if not update.moved:
        return {name: undefined(UNMOVED)}
    k = min(update.settings.top_k, len(update.delta_spectrum.sigma))
    reason = None if k == update.settings.top_k else f"top {name} cut to {k}: all singular values"
    if k < 2:
        return {name: undefined("the Hill exponent needs at least two singular values")}
    sigma = update.delta_spectrum.sigma[:k].tolist()
    smallest, error = sigma[-1], update.delta_spectrum.error
    if smallest <= error:
        return {name: undefined(f"singular value {k} of the update is zero within rounding")}
    total = sum(math.log(s / smallest) for s in sigma[:-1])
    loose = sum(error / (s - error / 2) + error / (smallest - error / 2) for s in sigma[:-1])
    if total <= loose:
        return {name: undefined(f"the top {k} singular values are equal within rounding")}
    value = (k - 1) / total
    return {name: Value(value, (k - 1) / (total - loose) - value, update.delta_spectrum.method, reason=reason)}


def null(isotropic: Isotropic) -> Null:
    import numpy as np

    draws = isotropic.spectra
    k = draws.shape[1]
    if k < 2:
        return {}
    logs = np.log(draws[:, :-1] / draws[:, -1:]).sum(axis=1)
    return {str(isotropic.settings.top_k): mean_std((k - 1) / logs)}


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="hill_exponent",
    scope="update",
    reads=("top_k",),
    variants=variants,
    measure=measure,
    null=null,
    title="Hill exponent",
    formula="[ (1/(k−1)) Σ_{i<k} log(σ_i/σ_k) ]^{−1} over the top-k singular values of ΔW",
    meaning="How steeply the largest singular values of the update fall. A small exponent is a heavy tail: one or a few directions "
    "stand far above the rest.",
    caveat="The paper does not give its k; the k used here is in the variant. A flat spectrum, as the null has, gives a large "
    "exponent. Of an update of lower rank than k, such as a LoRA that was merged, the last values are the rounding of the stored weights.",
    example="Singular values 4, 2, 1 and k = 3: log 4 and log 2 have the mean 1.04, and 1 / 1.04 = 0.96.",
    source=f"{PAPER}, §2, Hill exponent",
    label=lambda variant: f"top {variant}",
    charted=("",),
)

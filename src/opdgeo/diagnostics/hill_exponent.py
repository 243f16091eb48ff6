"""Hill exponent of the top-k singular values of ΔW (PAPER §2): [ (1/(k−1)) Σ_{i<k} log(σᵢ/σₖ) ]⁻¹.

A small exponent is a heavy tail: few directions far above the rest.
"""

from __future__ import annotations

import math

from opdgeo.diagnostics.update import UNMOVED, Settings, Update, Value, undefined

READS = ("top_k",)


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

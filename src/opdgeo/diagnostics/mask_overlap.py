"""Where the visible updates land (PAPER §2): the share of them inside a mask of W₀'s entries; chance is the mask's share α.

`principal.α`: the top α by magnitude of the rank-`mask_rank` SVD reconstruction of W₀. `low_magnitude.α`: the bottom α by |W₀|.
"""

from __future__ import annotations

import torch

from opdgeo.diagnostics.update import NO_VISIBLE, Settings, Update, Value, undefined, undetermined
from opdgeo.numerics.spectra import EPS

READS = ("rank", "mask_rank", "mask_share", "eta")


def variants(settings: Settings) -> list[str]:
    return [f"{mask}.{share:g}" for share in settings.mask_share for mask in ("principal", "low_magnitude")]


def measure(update: Update) -> dict[str, Value]:
    if not bool(torch.count_nonzero(update.visible)):
        return {name: undefined(NO_VISIBLE) for name in variants(update.settings)}
    k, reason = update.base.cut(update.settings.mask_rank)
    principal, low = update.base.principal, update.base.low_magnitude
    values: dict[str, Value] = {}
    for share in update.settings.mask_share:
        if principal is None:
            values[f"principal.{share:g}"] = undefined(undetermined(k))
        else:
            value, loose = principal[share].overlap(update.visible)
            values[f"principal.{share:g}"] = Value(value, loose + 4 * EPS, update.base.spectrum.method, reason=reason)
        value, _ = low[share].overlap(update.visible)
        values[f"low_magnitude.{share:g}"] = Value(value, 4 * EPS, "count")
    return values

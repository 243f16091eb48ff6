"""Where the visible updates land (PAPER §2): the share of them inside a mask of W₀'s entries. Chance is the mask's share α.

`principal.α`: the top α by magnitude of the rank-`mask_rank` SVD reconstruction of W₀. `low_magnitude.α`: the bottom α by |W₀|.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    NO_VISIBLE,
    PAPER,
    Diagnostic,
    Null,
    Settings,
    Value,
    published,
    undefined,
    undetermined,
)

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update

ROUNDING = 4 * sys.float_info.epsilon


def variants(settings: Settings) -> list[str]:
    return [f"{mask}.{share:g}" for share in settings.mask_share for mask in ("principal", "low_magnitude")]


def label(variant: str) -> str:
    mask, _, share = variant.partition(".")
    return f"{mask.replace('_', ' ')} α = {share}"


def measure(update: Update) -> dict[str, Value]:
    if not bool(update.visible.count_nonzero()):
        return {name: undefined(NO_VISIBLE) for name in variants(update.settings)}
    k, reason = update.base.cut(update.settings.mask_rank)
    principal, low = update.base.principal, update.base.low_magnitude
    values: dict[str, Value] = {}
    for share in update.settings.mask_share:
        if principal is None:
            values[f"principal.{share:g}"] = undefined(undetermined(k))
        else:
            value, loose = principal[share].overlap(update.visible)
            values[f"principal.{share:g}"] = Value(value, loose + ROUNDING, update.base.spectrum.method, reason=reason)
        value, _ = low[share].overlap(update.visible)
        values[f"low_magnitude.{share:g}"] = Value(value, ROUNDING, "count")
    return values


def null(isotropic: Isotropic) -> Null:
    """The share of the visible entries that is expected inside the mask: a ratio of sums of probabilities."""
    return isotropic.inside_masks


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="mask_overlap",
    scope="update",
    unit="share",
    reads=("rank", "mask_rank", "mask_share", "eta"),
    variants=variants,
    measure=measure,
    null=null,
    title="Update–mask overlap",
    formula="|M_* ∩ M| / |M|, M = entries changed under the η rule",
    meaning="The share of the visible changes that fall on the principal weights, or on the weights of lowest magnitude. The "
    "principal weights are the top α of the rank-r reconstruction of W₀.",
    caveat="Chance is α. Small weights have finer bf16 spacing, so a small isotropic update shows there first. The null is then "
    "above α for low magnitude, and only the distance from the null is geometry.",
    example="100 entries moved visibly, 60 of them in the half of smallest |W₀|: 60 %, where α = 50 %.",
    source=f"{PAPER}, §2, update–mask overlap",
    label=label,
    charted=("principal.0.5", "low_magnitude.0.5"),
    published=published(
        "low_magnitude.0.3", (0.3188, 0.5359, 0.7348), ((0.308, 0.311), (0.387, 0.425), (0.511, 0.560))
    ),
)

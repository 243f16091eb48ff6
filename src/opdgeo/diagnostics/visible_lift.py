"""How often two updates meet, over how often they would if each moved its entries anywhere: P(both) / (P(A) P(B)) of the visible
entries.

It knows how many entries each update moved, and its null what W₀'s magnitudes alone bring together.
"""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    NO_VISIBLE,
    ONE_UNMOVED,
    Diagnostic,
    Headline,
    Matrices,
    Null,
    Value,
    share_of,
    undefined,
)
from opdgeo.diagnostics.whole import LIFT

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return {"": undefined(ONE_UNMOVED)}
    counts = pair.counts
    if not counts.first or not counts.second:
        return {"": undefined(f"{NO_VISIBLE} in one of the two updates")}
    lift = counts.both / counts.first * math.prod(pair.shape) / counts.second
    return {"": Value(lift, 4 * sys.float_info.epsilon * lift, "count")}


def null(pair: Pair) -> Null:
    found = pair.chances.lift(math.prod(pair.shape)) if pair.moved and pair.chances else None
    return {} if found is None else {"": found}


def weights(of: Matrices) -> np.ndarray:
    """Entries · Σ bothᵢ / (Σ visibleᵢ · Σ otherᵢ)."""
    import numpy as np

    chance = of.visible * of.visible_other / np.where(of.entries > 0, of.entries, 1.0)
    return float(of.entries.sum()) * share_of(chance, float(of.visible.sum() * of.visible_other.sum()))


DIAGNOSTIC: OfPair = Diagnostic(
    name=LIFT,
    scope="pair",
    reads=("eta",),
    measure=measure,
    null=null,
    title="Lift of the visible entries",
    formula="P(M_A ∩ M_B) / (P(M_A) P(M_B)), M = entries changed under the η rule",
    meaning="How many times more entries both updates moved visibly than if each had moved as many anywhere. 1 is no relation at all.",
    caveat="Small weights move visibly first, in every update, so unrelated updates have a lift above 1 as well: that is the null. "
    "Over all matrices together the lift also knows that some matrices move more than others.",
    example="Of 1000 entries A moved 300, B 200, and 100 of these are the same: 0.1 / (0.3 · 0.2) = 1.67.",
    source="this program; the mask is that of arXiv 2606.07082, §2, update–mask overlap",
    headline=Headline(
        "",
        "lift",
        "the entries that both moved visibly are {} times as many as if each update had moved entries picked at random",
        "unrelated updates have {}, as small weights move first in any",
    ),
    charted=("",),
    weights=weights,
)

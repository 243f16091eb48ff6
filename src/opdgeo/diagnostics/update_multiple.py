"""How much of one update is a multiple of the other: the c that makes ‖ΔW_A − c ΔW_B‖_F smallest, c = ⟨A, B⟩ / ‖B‖_F².

Measured both ways. The product of the two factors is the squared cosine: the share of either's energy that the other explains.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import ONE_UNMOVED, Diagnostic, Matrices, Null, Value, share_of, undefined

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return {"": undefined(ONE_UNMOVED)}
    inner, _, other = pair.inner
    ratio = pair.first.norm / pair.second.norm
    return {"": Value(inner / other * ratio, 3 * ratio * pair.norm_error, pair.first.norm_method)}


def null(pair: Pair) -> Null:
    return {"": (0.0, pair.first.norm / pair.second.norm / math.sqrt(math.prod(pair.shape)))} if pair.moved else {}


def weights(of: Matrices) -> np.ndarray:
    """Σ⟨Aᵢ, Bᵢ⟩ / Σ‖Bᵢ‖²."""
    return share_of(of.other**2, float(of.other @ of.other))


DIAGNOSTIC: OfPair = Diagnostic(
    name="update_multiple",
    scope="pair",
    measure=measure,
    null=null,
    title="Scale factor",
    formula="c = ⟨ΔW_A, ΔW_B⟩ / ‖ΔW_B‖_F², the least-squares factor of ΔW_A ≈ c ΔW_B",
    meaning="How many times the other update this one holds. With a cosine near 1 it says that one is the other, c times as far.",
    caveat="The factor is small where the cosine is, and where this update is the smaller one. Read it beside the cosine. The "
    "factors of the two directions are not inverse to each other: their product is the squared cosine.",
    example="ΔW_A = (2, 0) and ΔW_B = (1, 1): 2 / 2 = 1. The other way round 2 / 4 = 0.5.",
    source="this program",
    around_zero=True,
    directed="{} as a multiple of {}",
    charted=("",),
    weights=weights,
)

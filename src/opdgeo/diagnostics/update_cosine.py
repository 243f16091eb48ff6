"""Do two updates of one base point the same way? The cosine of ΔW_A and ΔW_B, as vectors of entries.

Two independent isotropic updates have the cosine 0, with the standard deviation 1/√entries: whatever their norms.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import ONE_UNMOVED, Diagnostic, Headline, Matrices, Null, Value, share_of, undefined

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def cosine(pair: Pair) -> float:
    inner, own, other = pair.inner
    return max(-1.0, min(1.0, inner / math.sqrt(own * other)))


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return {"": undefined(ONE_UNMOVED)}
    return {"": Value(cosine(pair), 2 * pair.norm_error, pair.first.norm_method)}


def null(pair: Pair) -> Null:
    return {"": (0.0, 1 / math.sqrt(math.prod(pair.shape)))}


def weights(of: Matrices) -> np.ndarray:
    """⟨A, B⟩ over all matrices is Σ cosᵢ aᵢ bᵢ; a matrix where one did not move adds nothing to it, and to the norms what it has."""
    return share_of(of.norm * of.other, math.sqrt(float(of.norm @ of.norm) * float(of.other @ of.other)))


DIAGNOSTIC: OfPair = Diagnostic(
    name="update_cosine",
    scope="pair",
    measure=measure,
    null=null,
    title="Cosine",
    formula="⟨ΔW_A, ΔW_B⟩ / (‖ΔW_A‖_F ‖ΔW_B‖_F)",
    meaning="1: the two updates are the same up to their size. 0: they have nothing in common. −1: one undoes the other. Updates "
    "(task vectors) with cosines near 0 can be added with little conflict.",
    caveat="In many dimensions the cosine of unrelated updates is 0 almost exactly, so a small one can be far beyond chance and "
    "still mean little. Two runs that share their first steps, or one base's rounding, agree for that reason alone.",
    example="ΔW_A = (3, 4) and ΔW_B = (4, 3): 24 / 25 = 0.96.",
    source="this program; task vectors: Ilharco et al., arXiv 2212.04089",
    around_zero=True,
    headline=Headline(
        "", "cosine", "the cosine of the two updates is {}", "independent ones of these sizes have 0 ± {}"
    ),
    charted=("",),
    weights=weights,
)

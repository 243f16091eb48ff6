"""Where both updates moved an entry visibly in bf16, did they move it to the same side?

The null is no fair coin to the last digit: an entry near the edge of its bf16 cell is seen to move to one side more easily, in
both updates alike. So it is a sum over W₀'s entries.
"""

from __future__ import annotations

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

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return {"": undefined(ONE_UNMOVED)}
    counts = pair.counts
    if not counts.both:
        return {"": undefined(f"{NO_VISIBLE} in both updates")}
    return {"": Value(counts.same / counts.both, 0.0, "count")}


def null(pair: Pair) -> Null:
    from opdgeo.diagnostics.pair import BOTH, SAME

    found = pair.chances.share(SAME, BOTH) if pair.moved and pair.chances else None
    return {} if found is None else {"": found}


def weights(of: Matrices) -> np.ndarray:
    """Every entry that both moved visibly counts once."""
    return share_of(of.both, float(of.both.sum()))


DIAGNOSTIC: OfPair = Diagnostic(
    name="sign_agreement",
    scope="pair",
    unit="share",
    reads=("eta",),
    measure=measure,
    null=null,
    title="Sign agreement",
    formula="#{ sign ΔW_A = sign ΔW_B } / #{ both changed under the η rule }",
    meaning="Of the entries that both updates moved visibly in bf16, the share that they moved to the same side. Merging methods "
    "that resolve signs look at this number.",
    caveat="Chance is about a half. It counts entries and not how far they moved, and says nothing about entries that only one "
    "update moved visibly.",
    example="Both moved 200 entries visibly, 150 of them to the same side: 75 %.",
    source="this program; sign conflicts: Yadav et al. (TIES), arXiv 2306.01708",
    headline=Headline(
        "", "signs alike", "of the entries that both moved visibly {} went to the same side", "chance is {}"
    ),
    charted=("",),
    weights=weights,
)

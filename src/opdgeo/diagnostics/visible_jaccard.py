"""Do two updates move the same entries? The entries that both moved visibly in bf16, of those that either did (Jaccard)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    NO_VISIBLE,
    ONE_UNMOVED,
    Diagnostic,
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
    if not counts.either:
        return {"": undefined(f"{NO_VISIBLE} in either update")}
    return {"": Value(counts.both / counts.either, 0.0, "count")}


def null(pair: Pair) -> Null:
    from opdgeo.diagnostics.pair import BOTH, EITHER

    found = pair.chances.share(BOTH, EITHER) if pair.moved and pair.chances else None
    return {} if found is None else {"": found}


def weights(of: Matrices) -> np.ndarray:
    """Every entry that either moved visibly counts once."""
    either = of.visible + of.visible_other - of.both
    return share_of(either, float(either.sum()))


DIAGNOSTIC: OfPair = Diagnostic(
    name="visible_jaccard",
    scope="pair",
    unit="share",
    reads=("eta",),
    measure=measure,
    null=null,
    title="Overlap of the visible entries",
    formula="|M_A ∩ M_B| / |M_A ∪ M_B|, M = entries changed under the η rule",
    meaning="Of the entries that either update moved visibly in bf16, the share that both did.",
    caveat="It grows with the number of visible entries: two updates that move half of all entries at random share a third. And "
    "small weights have finer bf16 spacing, so two unrelated updates meet there. The null has both. An update whose entries are of very "
    "unequal size moves fewer of them visibly than an isotropic one of its norm, and then lies below the null: see the lift.",
    example="A moved 300 entries, B 200, and 100 of these are the same: 100 / 400 = 25 %.",
    source="this program; the mask is that of arXiv 2606.07082, §2, update–mask overlap",
    charted=("",),
    weights=weights,
)

"""Are the leading directions of two updates the same? Sim_K = ‖V_K(A)ᵀ V_K(B)‖_F² / K of their top-K singular vectors, right and left.

The table holds some K, `curves.parquet` all from 1 to the largest. Independent isotropic updates have independent uniform
subspaces: K/dimension, with a known spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    ONE_UNMOVED,
    PAPER,
    Diagnostic,
    Headline,
    Null,
    Settings,
    Value,
    cut,
    undefined,
)
from opdgeo.diagnostics.subspace_similarity import SHOWN, SIDES, ranks, similarity

if TYPE_CHECKING:
    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def variants(settings: Settings) -> list[str]:
    return [f"{side}.{k}" for side in SIDES for k in ranks(settings)]


def label(variant: str) -> str:
    side, _, k = variant.partition(".")
    return f"{side}, K = {k}"


def narrower(variant: str, measured: Iterable[str]) -> list[str]:
    """The smaller K of the same side, the largest first.

    >>> narrower("right.16", ["right.1", "right.8", "right.32", "left.8"])
    ['right.8', 'right.1']
    """
    side, _, most = variant.partition(".")
    found = (int(k) for of, _, k in (v.partition(".") for v in measured) if of == side)
    return [f"{side}.{k}" for k in sorted(found, reverse=True) if k < int(most)]


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return dict.fromkeys(variants(pair.settings), undefined(ONE_UNMOVED))
    values = {}
    for side in SIDES:
        for asked in ranks(pair.settings):
            k, reason = cut(asked, pair.shape)
            of = pair.first.delta_spectrum, pair.second.delta_spectrum
            values[f"{side}.{asked}"] = similarity(*of, k, side, reason)
    return values


def null(pair: Pair) -> Null:
    from opdgeo.numerics.nulls import independent_similarity

    if not pair.moved:
        return {}
    sizes = dict(zip(("left", "right"), pair.shape, strict=True))
    return {
        f"{side}.{asked}": independent_similarity(sizes[side], cut(asked, pair.shape)[0])
        for side in SIDES
        for asked in ranks(pair.settings)
    }


def curve(side: str) -> Callable[[Pair], list[float | None] | None]:
    """Sim_K for K = 1, 2, …; None where the subspace of that K is not determined."""

    def values(pair: Pair) -> list[float | None] | None:
        if not pair.moved:
            return None
        most, _ = cut(max(ranks(pair.settings)), pair.shape)
        of = pair.first.delta_spectrum, pair.second.delta_spectrum
        return [similarity(*of, k, side).value for k in range(1, most + 1)]

    return values


def chance(side: str) -> Callable[[Pair], list[float | None] | None]:
    """The null of `curve`."""

    def values(pair: Pair) -> list[float | None] | None:
        from opdgeo.numerics.nulls import independent_similarity

        if not pair.moved or not pair.settings.nulls:
            return None
        most, _ = cut(max(ranks(pair.settings)), pair.shape)
        size = pair.shape[0] if side == "left" else pair.shape[1]
        return [independent_similarity(size, k)[0] for k in range(1, most + 1)]

    return values


DIAGNOSTIC: OfPair = Diagnostic(
    name="shared_subspace",
    scope="pair",
    unit="share",
    reads=("top_k",),
    variants=variants,
    measure=measure,
    null=null,
    title="Similarity of the top subspaces",
    formula="Sim_K(A, B) = ‖V_K(A)ᵀ V_K(B)‖_F² / K, V_K the top-K right (left) singular vectors of ΔW",
    meaning="How much of the top-K subspace of one update is that of the other. 100 %: the same K directions. Seeds that find the "
    "same channel are alike here even where their cosine is small.",
    caveat="It does not weigh the directions: with K above the number of directions that stand out, the rest is noise and pulls the "
    "number to chance, K over the dimension. Look at the whole curve over K. Tables show "
    f"K = {SHOWN}, or where most matrices do not determine it the largest K measured below that they do; the data files hold every K.",
    example="K = 2, V(A) = e₁, e₂ and V(B) = e₁, e₃: one direction of two, 50 %.",
    source=f"{PAPER}, §2, subspace similarity, between two runs in place of two steps",
    label=label,
    listed=lambda variant: variant.endswith(f".{SHOWN}"),
    instead=narrower,
    headline=Headline(
        f"right.{SHOWN}", f"top-{SHOWN} subspace", "their top directions ({variant}) are {} alike", "chance is {}"
    ),
    charted=(f"right.{SHOWN}", f"left.{SHOWN}"),
    directions=lambda settings: max(ranks(settings)),
    curves={
        "similarity_right": curve("right"),
        "similarity_left": curve("left"),
        "similarity_right_null": chance("right"),
        "similarity_left_null": chance("left"),
    },
)

"""bf16-aware update sparsity (PAPER §2): the share of entries that a bf16 reader sees unchanged.

`bf16_eta`: |ŵ − w| ≤ η·max(|w|, |ŵ|) after the cast. `bf16_exact`: the same bits after the cast. For η below 2⁻⁸, the
finest relative spacing of bf16, the two agree up to the sign of zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import PAPER, Diagnostic, Headline, Live, Null, Settings, Value, published

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update

LABELS = {"bf16_eta": "η rule", "bf16_exact": "bit-equal"}


def variants(settings: Settings) -> list[str]:
    return list(LABELS)


def measure(update: Update) -> dict[str, Value]:
    shares = (int(mask.count_nonzero()) / mask.numel() for mask in update.unchanged)
    return {name: Value(share, 0.0, "count") for name, share in zip(LABELS, shares, strict=True)}


def null(isotropic: Isotropic) -> Null:
    """The mean over entries of the probability that an entry stays in its bf16 cell. For both variants: see the top."""
    found = isotropic.unchanged
    return {} if found is None else dict.fromkeys(LABELS, found)


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="update_sparsity",
    scope="update",
    unit="share",
    weighting="entries",
    reads=("eta",),
    variants=variants,
    measure=measure,
    null=null,
    title="Update sparsity",
    formula="#{ |ŵ − w| ≤ η·max(|w|, |ŵ|) } / #entries, η = 10^{−3}, w and ŵ after the bf16 cast",
    meaning="The share of entries that are the same number before and after training, once both checkpoints are cast to bf16. "
    "The mean is over all entries.",
    caveat="A small update hides below the spacing of bf16 numbers. So a high share mostly says that the update is small: read "
    "it against the null. For bf16 values the η rule is the same as equality of the numbers, because neighbouring bf16 "
    "numbers differ by at least 2⁻⁸ relative, which is more than η. The variant “bit-equal” therefore adds nothing but signed "
    "zeros.",
    example="0.5 → 0.5005 is 0.5 in bf16, whose next number is 0.5039: unchanged. 0.5 → 0.503 becomes that next number: changed.",
    source=f"{PAPER}, §2, bf16-aware update sparsity",
    label=lambda variant: LABELS.get(variant, variant),
    charted=("bf16_eta",),
    leads=True,
    published=published("bf16_eta", (0.081, 0.516, 0.772), ((0.031, 0.047), (0.281, 0.376), (0.523, 0.619))),
    headline=Headline(
        "bf16_eta",
        "unchanged in bf16",
        "after the bf16 cast {} of the entries are unchanged",
        "where an isotropic update of the same size leaves {} unchanged",
    ),
    live=(Live("visible", "bf16_eta", complement=True),),
)

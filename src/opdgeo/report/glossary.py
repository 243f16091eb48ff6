"""What each diagnostic is called, how it is written and how it is read: one entry a diagnostic, shared by terminal, charts and page.

Nothing here computes: a number passes through `number` on its way to a reader, and that is formatting only.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass

ROLES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Order of the matrix roles in every table and chart; other roles follow in alphabetical order."""

ARMS = {"sft": "SFT", "sft-matched": "SFT matched", "opd": "OPD", "rlvr": "RLVR"}
"""Order and names of the arms of the experiment; other arms follow under their own names."""

READINGS = {
    "geometry": "an isotropic update of this size does not give this value",
    "size": "an isotropic update of this size gives the same value",
    "unclear": "the interval of the excess reaches across the margin",
    "by construction": "the null has this value by definition",
}

PRIMARY = (
    ("update_sparsity", "bf16_eta"),
    ("relative_norm", ""),
    ("stable_rank", ""),
    ("hill_exponent", ""),
    ("principal_angles", "right.max"),
    ("spectral_shift", ""),
    ("mask_overlap", "principal.0.5"),
    ("mask_overlap", "low_magnitude.0.5"),
    ("principal_energy", "both"),
    ("subspace_similarity", "final"),
    ("channel_energy", "previous"),
)
"""The variants that get a heatmap and a trajectory (a variant matches by its beginning); the tables hold every variant."""


@dataclass(frozen=True)
class Entry:
    """One diagnostic as a reader meets it. `formula` is trusted HTML; `unit` is share, degrees or number."""

    title: str
    unit: str
    log: bool
    formula: str
    meaning: str
    reading: str
    source: str


_PAPER = "arXiv 2606.07082, "

GLOSSARY: dict[str, Entry] = {
    "update_sparsity": Entry(
        "Update sparsity", "share", False,
        "#{ |ŵ − w| ≤ η·max(|w|, |ŵ|) } / #entries, η = 10<sup>−3</sup>, w and ŵ after the bf16 cast",
        "Share of entries that are the same number before and after training once both checkpoints are cast to bf16. "
        "Averaged over all entries.",
        "A small update hides below bf16's spacing, so a high share mostly says that the update is small: read it against the null. "
        "For bf16 values the η rule equals inequality of the numbers: neighbouring bf16 numbers differ by at least 2⁻⁸ relative, more "
        "than η. The variant “bit-equal” therefore adds nothing but signed zeros.",
        _PAPER + "§2, bf16-aware update sparsity",
    ),
    "frobenius_norm": Entry(
        "Frobenius norm", "number", True, "‖ΔW‖<sub>F</sub>, ΔW = W₊ − W₀",
        "Length of the update of one matrix, in the units of the weights.",
        "The size itself. The null has this value by construction.",
        _PAPER + "§2",
    ),
    "relative_norm": Entry(
        "Relative norm", "share", True, "‖ΔW‖<sub>F</sub> / ‖W₀‖<sub>F</sub>",
        "Length of the update as a share of the length of the matrix it started from.",
        "The size of the move, comparable between matrices. The null has this value by construction.",
        "this program; the norms are those of " + _PAPER + "§2",
    ),
    "operator_norm": Entry(
        "Operator norm", "number", True, "‖ΔW‖₂ = σ₁(ΔW)",
        "The largest factor by which the update stretches any input.",
        "At a fixed Frobenius norm a larger operator norm means that the update is concentrated in fewer directions.",
        "this program; " + _PAPER + "§3 uses it in its bounds",
    ),
    "stable_rank": Entry(
        "Stable rank", "number", False, "‖ΔW‖<sub>F</sub>² / ‖ΔW‖₂²",
        "How many directions carry the update: 1 when a single one does, about a quarter of the dimension for a square isotropic update.",
        "It does not change when the update is scaled. Gradients are of low stable rank under every objective, so compare arms with each "
        "other as well as with the null.",
        _PAPER + "§2, stable rank",
    ),
    "hill_exponent": Entry(
        "Hill exponent", "number", False,
        "[ (1/(k−1)) Σ<sub>i&lt;k</sub> log(σ<sub>i</sub>/σ<sub>k</sub>) ]<sup>−1</sup> over the top-k singular values of ΔW",
        "How steeply the largest singular values of the update fall: a small exponent is a heavy tail, one or a few directions far "
        "above the rest.",
        "The paper does not give its k; this page's k is in the variant. A flat spectrum, as the null has, gives a large exponent.",
        _PAPER + "§2, Hill exponent",
    ),
    "principal_angles": Entry(
        "Principal angles", "degrees", True, "cos θ<sub>i</sub> = σ<sub>i</sub>(U₀ᵀU₊), top-k singular subspaces; the same for V",
        "How far the leading singular subspaces of the matrix turned, left (outputs) and right (inputs).",
        "The largest angle is governed by the gap between singular values at the cut, so an isotropic update turns it too. "
        "“error” in the data file says how well the angle is determined.",
        _PAPER + "§2, principal-angle rotation",
    ),
    "spectral_shift": Entry(
        "Normalised spectral shift", "number", True, "‖σ(W₊) − σ(W₀)‖₂ / ‖σ(W₀)‖₂",
        "How far the singular values of the matrix moved, relative to all of them.",
        "Never above the relative norm (Mirsky). It grows with the size of the update: read it against the null.",
        _PAPER + "§2, normalised spectral shift",
    ),
    "mask_overlap": Entry(
        "Update–mask overlap", "share", False,
        "|M<sub>*</sub> ∩ M| / |M|, M = entries changed under the η rule",
        "Share of the visible changes that fall on the principal weights (top α of the rank-r reconstruction of W₀) "
        "or on the weights of lowest magnitude.",
        "Chance is α. Small weights have finer bf16 spacing, so a small isotropic update shows there first: the null is above α for low "
        "magnitude and only the distance from the null is geometry.",
        _PAPER + "§2, update–mask overlap",
    ),
    "principal_energy": Entry(
        "Principal energy", "share", False, "‖P<sub>U</sub> ΔW‖², ‖ΔW P<sub>V</sub>‖², ‖P<sub>U</sub> ΔW P<sub>V</sub>‖² over ‖ΔW‖<sub>F</sub>²",
        "Share of the update inside the top-k left, right and both singular subspaces of the matrix it started from.",
        "Chance is k/rows, k/cols and their product, which is what the null gives. Above it the update follows the principal directions; "
        "below it, it avoids them.",
        "this program; it puts the off-principal claim of " + _PAPER + "§2 in terms of energy",
    ),
    "subspace_similarity": Entry(
        "Subspace similarity", "share", False, "Sim<sub>K</sub>(t, end) = ‖V<sub>K</sub>(t)ᵀ V<sub>K</sub>(end)‖<sub>F</sub>² / K",
        "How much of the final update's top-K right subspace is there at step t already (and, as “previous”, of the checkpoint before).",
        "Two checkpoints of a run share a prefix and look alike for that reason alone. The null is a walk of independent increments with "
        "the observed norms; only similarity above it says that the channel was found early. Tables show K = 16, right; the data files hold "
        "every K and both sides.",
        _PAPER + "§2, subspace similarity",
    ),
    "channel_energy": Entry(
        "Energy in the earlier channel", "share", False,
        "‖ΔW<sub>t</sub> V<sub>K</sub>(s)‖<sub>F</sub>² / ‖ΔW<sub>t</sub>‖<sub>F</sub>², s the first checkpoint or the one before t",
        "Share of the update that lies in the top-K right subspace of an earlier checkpoint's update.",
        "What training held in that channel would have kept. The null is the walk of the similarity: it keeps what it had, and gains chance, "
        "K/cols, in every new increment.",
        "this program; the subspaces are those of " + _PAPER + "§2, subspace similarity",
    ),
    "bound_ratio": Entry(
        "Bound ratio", "number", False, "measured / bound: Mirsky (σ shift ≤ ‖ΔW‖<sub>F</sub>), Weyl and Wedin (≤ ‖ΔW‖₂)",
        "How much of what perturbation theory allows was used. Never above 1 beyond rounding.",
        "Close to the bound: the update is aligned with the singular vectors of the matrix. Wedin is undefined where the gap between the "
        "two spectra at the cut is not positive.",
        _PAPER + "§3, gate II",
    ),
}  # fmt: skip

_UNKNOWN = Entry("", "number", False, "", "No description of this diagnostic is in this version of opdgeo.", "", "")

_VARIANTS = {
    "bf16_eta": "η rule",
    "bf16_exact": "bit-equal",
    "mirsky": "Mirsky",
    "weyl": "Weyl",
    "wedin": "Wedin",
}


def clean(text: object, limit: int | None = None) -> str:
    """An untrusted name without control, format or surrogate characters (they become U+FFFD), cut to `limit` characters."""
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in str(text))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def entry(diagnostic: str) -> Entry:
    """The glossary's entry, or a bare one under the diagnostic's own name."""
    known = GLOSSARY.get(diagnostic)
    if known is not None:
        return known
    return Entry(
        clean(diagnostic).replace("_", " "), *(getattr(_UNKNOWN, f) for f in list(Entry.__dataclass_fields__)[1:])
    )


def variant_label(diagnostic: str, variant: str) -> str:
    """`mask_overlap`, `low_magnitude.0.5` → `low magnitude α = 0.5`; empty for the empty variant."""
    if variant in _VARIANTS or not variant:
        return _VARIANTS.get(variant, "")
    head, _, tail = variant.partition(".")
    head = clean(head).replace("_", " ")
    tail = clean(tail)
    if diagnostic == "hill_exponent":
        return f"top {clean(variant)}"
    if diagnostic == "mask_overlap":
        return f"{head} α = {tail}"
    if diagnostic == "principal_angles":
        return f"{head} {'largest' if tail == 'max' else tail}"
    if diagnostic == "principal_energy":
        return f"{head} top {tail}"
    if diagnostic == "subspace_similarity":
        side, _, k = tail.rpartition(".")
        return f"to {head}, {side + ', ' if side else ''}K = {k}"
    if diagnostic == "channel_energy":
        side, _, k = tail.rpartition(".")
        return f"{head} checkpoint's{' ' + side if side else ''} top {k}"
    return clean(variant)


def label(diagnostic: str, variant: str) -> str:
    """Title and variant in one line."""
    named = variant_label(diagnostic, variant)
    return entry(diagnostic).title + (f" ({named})" if named else "")


def is_listed(diagnostic: str, variant: str) -> bool:
    """Whether tables and verdicts show this variant: of a similarity K = 16 and the right side, of a channel the right side."""
    if diagnostic == "subspace_similarity":
        return ".left." not in variant and variant.endswith(".16")
    return diagnostic != "channel_energy" or ".left." not in variant


def is_primary(diagnostic: str, variant: str) -> bool:
    """Whether this variant gets a heatmap and a trajectory. Unknown diagnostics do."""
    if not is_listed(diagnostic, variant):
        return False
    if diagnostic not in GLOSSARY:
        return True
    return any(d == diagnostic and (variant == v or variant.startswith(v + ".") or not v) for d, v in PRIMARY)


def expert_of(matrix: str) -> int | None:
    """The number of the expert that a matrix belongs to, which its name carries.

    >>> expert_of("model.layers.3.mlp.experts.7.up_proj.weight")
    7
    """
    found = re.search(r"\.experts\.(\d+)\.", matrix)
    return int(found[1]) if found else None


def role_order(roles: set[str]) -> list[str]:
    """Known roles in their fixed order, then the others alphabetically."""
    return [r for r in ROLES if r in roles] + sorted(roles - set(ROLES))


def arm_of(checkpoint: str) -> tuple[str, int]:
    """`opd-seed2/step-000100` → (`opd`, 2), as `reproduce` names its checkpoints; any other name has the empty arm."""
    match = re.fullmatch(r"([^/]+)/step-\d+", checkpoint)
    return split_seed(match[1]) if match else ("", 0)


def split_seed(folder: str) -> tuple[str, int]:
    """`opd-seed2` → (`opd`, 2), `opd` → (`opd`, 0)."""
    match = re.fullmatch(r"(.+)-seed(\d+)", folder)
    return (match[1], int(match[2])) if match else (folder, 0)


def arm_order(arms: set[str]) -> list[str]:
    """Known arms in their fixed order, then the others alphabetically."""
    return [a for a in ARMS if a in arms] + sorted(arms - set(ARMS))


def arm_label(arm: str) -> str:
    """The name an arm is shown under."""
    return ARMS.get(arm) or clean(arm, 28)


SUFFIX = {"share": " %", "points": " pp", "degrees": "°", "seconds": " s"}


def number(
    value: float | None, unit: str = "number", *, signed: bool = False, bare: bool = False, decimals: int | None = None
) -> str:
    """Three significant digits in the field's notation: `91.9 %`, `0.520°`, `1.30e-04`; an en dash where there is no number.

    `unit` is share (shown in per cent), points (a difference of shares), degrees, number, integer, seconds or bytes. `bare` leaves the
    unit out; `decimals` fixes the digits after the point.
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if unit == "integer":
        return str(int(value))
    if unit == "bytes":
        for scale, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if abs(value) >= scale:
                return f"{value / scale:.1f} {name}"
        return f"{int(value)} B"
    scaled = 100 * value if unit in ("share", "points") else value
    size = abs(scaled)
    if decimals is not None:
        text = f"{scaled:.{decimals}f}"
    elif size == 0:
        text = "0"
    elif size >= 1e5 or size < 1e-3:
        text = f"{scaled:.2e}"
    elif unit == "share" and 99.95 <= size < 100:
        text = f"{scaled:.7g}" if size >= 99.9995 else f"{scaled:.5g}"  # almost all is not all
    else:
        text = f"{scaled:.{max(0, 2 - math.floor(math.log10(size)))}f}"
    if float(text) == 0:
        text = text.removeprefix("-")
    elif signed and scaled > 0:
        text = "+" + text
    return text.replace("-", "−", 1 if text.startswith("-") else 0) + ("" if bare else SUFFIX.get(unit, ""))


def interval_decimals(low: float | None, high: float | None, unit: str) -> int | None:
    """Digits after the point that show the width of an interval to two significant digits; None for the default."""
    if low is None or high is None or not math.isfinite(high - low) or high <= low:
        return None
    scale = 100 if unit in ("share", "points") else 1
    digits = 1 - math.floor(math.log10(scale * (high - low)))
    return digits if 0 <= digits <= 4 else 0 if digits < 0 else None

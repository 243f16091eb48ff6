"""Words and numbers as a reader meets them, shared by terminal, charts and page. What a diagnostic is called and how it is read
stands in the diagnostic itself (`opdgeo.diagnostics`).

Nothing here computes. A number passes through `number` on its way to a reader, and that is formatting only.
"""

from __future__ import annotations

import math
import re
import unicodedata

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic

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


def clean(text: object, limit: int | None = None) -> str:
    """An untrusted name without control, format or surrogate characters (they become U+FFFD), cut to `limit` characters."""
    shown = "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co", "Cn") else c for c in str(text))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def stem(path: str) -> str:
    """The last part of a path or of a name on the hub."""
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or str(path)


def about(name: str) -> Diagnostic:
    """The diagnostic of that name. Data files may name one that this version does not know: it gets a bare one."""
    return DIAGNOSTICS.get(name) or Diagnostic(
        name=name,
        scope="update",
        measure=lambda subject: {},
        title=clean(name).replace("_", " "),
        formula="",
        meaning="No description of this diagnostic is in this version of opdgeo.",
        caveat="",
        source="",
        charted=("",),
    )


def position(name: str) -> int:
    """Where a diagnostic stands in every table and chart; unknown ones come last."""
    return _POSITIONS.get(name, len(_POSITIONS))


_POSITIONS = {name: i for i, name in enumerate(DIAGNOSTICS)}


def variant_label(diagnostic: str, variant: str) -> str:
    """`mask_overlap`, `low_magnitude.0.5` → `low magnitude α = 0.5`; empty for the empty variant."""
    return about(diagnostic).label(clean(variant)) if variant else ""


def label(diagnostic: str, variant: str) -> str:
    """Title and variant in one line."""
    named = variant_label(diagnostic, variant)
    return about(diagnostic).title + (f" ({named})" if named else "")


def is_listed(diagnostic: str, variant: str) -> bool:
    """Whether tables and verdicts show this variant."""
    return about(diagnostic).listed(variant)


def is_primary(diagnostic: str, variant: str) -> bool:
    """Whether this variant gets a heatmap and a trajectory. Those of unknown diagnostics do."""
    starts = about(diagnostic).charted
    return is_listed(diagnostic, variant) and any(not s or variant == s or variant.startswith(s + ".") for s in starts)


def expert_of(matrix: str) -> int | None:
    """The number of the expert that a matrix belongs to, which its name carries.

    >>> expert_of("model.layers.3.mlp.experts.7.up_proj.weight")
    7
    """
    found = re.search(r"\.experts\.([0-9]{1,9})\.", matrix)
    return int(found[1]) if found else None


def role_order(roles: set[str]) -> list[str]:
    """Known roles in their fixed order, then the others alphabetically."""
    return [r for r in ROLES if r in roles] + sorted(roles - set(ROLES))


def short_role(role: str) -> str:
    """`gate_proj` → `gate`, as columns are headed."""
    return clean(role.removesuffix("_proj"), 12)


def arm_of(checkpoint: str) -> tuple[str, int]:
    """`opd-seed2/step-000100` → (`opd`, 2), as `reproduce` names its checkpoints; any other name has the empty arm."""
    match = re.fullmatch(r"([^/]+)/step-\d+", checkpoint)
    return split_seed(match[1]) if match else ("", 0)


def split_seed(folder: str) -> tuple[str, int]:
    """`opd-seed2` → (`opd`, 2), `opd` → (`opd`, 0)."""
    match = re.fullmatch(r"(.+)-seed([0-9]{1,9})", folder)
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
    if low is None or high is None or high <= low:
        return None
    width = (100 if unit in ("share", "points") else 1) * (high - low)
    if not math.isfinite(width):
        return None
    digits = 1 - math.floor(math.log10(width))
    return digits if 0 <= digits <= 4 else 0 if digits < 0 else None

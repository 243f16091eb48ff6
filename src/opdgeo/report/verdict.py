"""The verdict: which diagnostics an isotropic update of the same size would show as well, and which it would not.

No name of a paradigm is given to an update: its readings say how far it is from a null, not where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.report.glossary import GLOSSARY, entry, is_listed, label, variant_label


@dataclass(frozen=True)
class Finding:
    """One diagnostic and variant of the summary next to its null. `side` is above, below or empty."""

    diagnostic: str
    variant: str
    row: dict[str, Any]

    @property
    def title(self) -> str:
        return entry(self.diagnostic).title

    @property
    def detail(self) -> str:
        return variant_label(self.diagnostic, self.variant)

    @property
    def label(self) -> str:
        return label(self.diagnostic, self.variant)

    @property
    def unit(self) -> str:
        return entry(self.diagnostic).unit

    @property
    def over(self) -> int:
        """How many matrices the mean, the null and the excess are over."""
        count: int = self.row.get("matrices", self.row["computed"])
        return count

    @property
    def null(self) -> dict[str, Any] | None:
        null: dict[str, Any] | None = self.row.get("null")
        return null

    @property
    def reading(self) -> str | None:
        if not self.null:
            return None
        if (
            self.diagnostic == "subspace_similarity"
            and self.variant.startswith("final")
            and abs((self.row["mean"] or 0) - 1) < 1e-9
        ):
            return "by construction"  # the last checkpoint compared with itself
        reading: str | None = self.null.get("reading")
        return reading

    @property
    def side(self) -> str:
        excess = self.null.get("excess") if self.null else None
        return "" if not excess else "above" if excess > 0 else "below"


def findings(checkpoint: dict[str, Any]) -> list[Finding]:
    """Every listed row of a summary's checkpoint, in the order of the glossary, unknown diagnostics last."""
    order = {name: i for i, name in enumerate(GLOSSARY)}
    rows = [
        Finding(r["diagnostic"], r["variant"], r)
        for r in checkpoint["diagnostics"]
        if is_listed(r["diagnostic"], r["variant"])
    ]
    return sorted(rows, key=lambda f: order.get(f.diagnostic, len(order)))


def by_reading(checkpoint: dict[str, Any]) -> dict[str, list[Finding]]:
    """Findings under geometry, size, unclear, by construction, `no null` and `not computed`; empty groups are left out."""
    groups: dict[str, list[Finding]] = {}
    for found in findings(checkpoint):
        key = "not computed" if found.row["mean"] is None else found.reading or "no null"
        groups.setdefault(key, []).append(found)
    return groups


def find(checkpoint: dict[str, Any], diagnostic: str, variant: str = "") -> Finding | None:
    """The row of one diagnostic; `variant` matches by its beginning."""
    for found in findings(checkpoint):
        if found.diagnostic == diagnostic and found.variant.startswith(variant):
            return found
    return None


def incomplete(checkpoint: dict[str, Any]) -> list[Finding]:
    """Findings whose mean leaves out matrices that moved."""
    return [f for f in findings(checkpoint) if f.over < f.row["total"] - unmoved(checkpoint)]


def unmoved(checkpoint: dict[str, Any]) -> int:
    """How many matrices did not move while others did: no mean counts them."""
    return 0 if did_not_move(checkpoint) else int(checkpoint.get("unmoved", 0))


THRESHOLD = 0.8
"""The similarity that counts as locked in the one sentence; the data files have a range of them."""


@dataclass(frozen=True)
class Early:
    """How early the final update's top-`rank` right subspace is there, beside the walk null.

    `similarity` and `chance`: at the first checkpoint, `first`; `step` and `null_step`: from which on it stays at or above
    `threshold`, None: not before the last checkpoint. Of similarities without a value only `reason` is known. `unit` is
    step, or checkpoint where checkpoints have none.
    """

    unit: str = "step"
    rank: int = 0
    first: int = 0
    similarity: float | None = None
    chance: float | None = None
    threshold: float = THRESHOLD
    step: int | None = None
    null_step: int | None = None
    reason: str | None = None


def early(checkpoints: list[dict[str, Any]], locking: list[dict[str, Any]]) -> Early | None:
    """`Early` of one run of at least two checkpoints, for K = 16 or the largest K below it that has a value."""
    reason = None
    unit = "step" if all(c.get("step") is not None for c in checkpoints) else "checkpoint"
    for row in sorted(locking, key=lambda r: -r["rank"]):
        if row["side"] != "right" or row["rank"] > 16 or not row.get("steps"):
            continue
        of = [d for d in checkpoints[0]["diagnostics"] if d["diagnostic"] == "subspace_similarity"]
        entry_ = next((d for d in of if d["variant"] == f"final.{row['rank']}"), None)
        if entry_ is None or entry_["mean"] is None:
            reason = reason or (entry_ or {}).get("reason")
            continue
        at = min(range(len(row["thresholds"])), key=lambda i: abs(row["thresholds"][i] - THRESHOLD))
        chance = (entry_["null"] or {}).get("mean")
        return Early(
            unit, row["rank"], row["steps"][0], entry_["mean"], chance, row["thresholds"][at], row["step"][at],
            row["null_step"][at], reason,
        )  # fmt: skip
    return Early(unit, reason=reason) if reason else None


def did_not_move(checkpoint: dict[str, Any]) -> bool:
    """Whether every measured matrix is the same in both checkpoints."""
    norm = find(checkpoint, "frobenius_norm") or find(checkpoint, "relative_norm")
    return norm is not None and norm.row["mean"] == 0

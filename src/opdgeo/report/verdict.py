"""The verdict: which values an isotropic update of the same size would have as well, and which it would not.

An update is given no name of a paradigm. Its readings say how far it is from a null, and not where it comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic, of_runs
from opdgeo.diagnostics.diagnostic import Part
from opdgeo.report.glossary import about, is_listed, label, position, variant_label


@dataclass(frozen=True)
class Finding:
    """One diagnostic and variant of the summary next to its null. `side` is above, below or empty.

    The row can be of another variant, which stands for this one (`Diagnostic.instead`); the words are those of the row.
    """

    diagnostic: str
    variant: str
    row: dict[str, Any]

    @property
    def title(self) -> str:
        return about(self.diagnostic).title

    @property
    def detail(self) -> str:
        return variant_label(self.diagnostic, self.row["variant"])

    @property
    def label(self) -> str:
        return label(self.diagnostic, self.row["variant"])

    @property
    def unit(self) -> str:
        return about(self.diagnostic).unit

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
        itself = about(self.diagnostic).itself
        if itself is not None and self.variant.startswith(itself) and abs((self.row["mean"] or 0) - 1) < 1e-9:
            return "by construction"  # the last checkpoint compared with itself
        reading: str | None = self.null.get("reading")
        return reading

    @property
    def side(self) -> str:
        excess = self.null.get("excess") if self.null else None
        return "" if not excess else "above" if excess > 0 else "below"


def findings(checkpoint: dict[str, Any], diagnostic: str | None = None) -> list[Finding]:
    """Every listed row of a summary's checkpoint, or the one that stands for it, in the order of the diagnostics, unknown ones last.
    `diagnostic`: of that one alone."""
    rows = [
        Finding(r["diagnostic"], r["variant"], _standing(r, checkpoint))
        for r in checkpoint["diagnostics"]
        if diagnostic in (None, r["diagnostic"]) and is_listed(r["diagnostic"], r["variant"])
    ]
    return sorted(rows, key=lambda f: position(f.diagnostic))


def _standing(row: dict[str, Any], checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The row, or the first in its place that at least half of the matrices that moved determine; failing that, the one that most do."""
    if "total" not in row:  # a mean over seeds counts no matrices
        return row
    of = {r["variant"]: r for r in checkpoint["diagnostics"] if r["diagnostic"] == row["diagnostic"]}
    choice = [row, *(of[v] for v in about(row["diagnostic"]).instead(row["variant"], of))]

    def determined(r: dict[str, Any]) -> int:
        return 0 if r["mean"] is None else Finding(r["diagnostic"], r["variant"], r).over

    moved = row["total"] - checkpoint.get("unmoved", 0)
    known = (r for r in choice if 0 < moved <= 2 * determined(r))
    return next(known, max(choice, key=determined))


def by_reading(checkpoint: dict[str, Any]) -> dict[str, list[Finding]]:
    """Findings under geometry, size, unclear, by construction, `no null` and `not computed`; empty groups are left out."""
    groups: dict[str, list[Finding]] = {}
    for found in findings(checkpoint):
        key = "not computed" if found.row["mean"] is None else found.reading or "no null"
        groups.setdefault(key, []).append(found)
    return groups


def find(checkpoint: dict[str, Any], diagnostic: str, variant: str = "") -> Finding | None:
    """The row of one diagnostic; `variant` matches by its beginning."""
    for found in findings(checkpoint, diagnostic):
        if found.variant.startswith(variant):
            return found
    return None


def headlines(checkpoint: dict[str, Any]) -> list[tuple[Diagnostic, Finding | None]]:
    """The diagnostics of the first lines with their rows, the size of the update first; None for one that is not there. Of a pair of
    updates, those of pairs."""
    scope = "pair" if "other" in checkpoint else "update"
    ordered = sorted((d for d in DIAGNOSTICS.values() if d.scope == scope), key=lambda d: not d.size)
    named = [(d, d.headline) for d in ordered]
    return [(d, find(checkpoint, d.name, headline.variant)) for d, headline in named if headline]


def incomplete(checkpoint: dict[str, Any]) -> list[Finding]:
    """Findings whose mean leaves out matrices that moved."""
    still = unmoved(checkpoint)
    return [f for f in findings(checkpoint) if f.over < f.row["total"] - still]


def unmoved(checkpoint: dict[str, Any]) -> int:
    """How many matrices did not move while others did: no mean counts them."""
    return 0 if did_not_move(checkpoint) else int(checkpoint.get("unmoved", 0))


def answers(checkpoints: list[dict[str, Any]], whole: dict[str, list[dict[str, Any]]]) -> list[list[Part]]:
    """What the diagnostics of whole runs say of a run of these checkpoints, a sentence each."""
    found = (d.answer(checkpoints, whole.get(name, [])) for name, d in of_runs().items() if d.answer)
    return [said for said in found if said]


def unmeasured(checkpoint: dict[str, Any]) -> bool:
    """Whether no diagnostic has a value, as where every matrix holds NaN."""
    return all(f.row["mean"] is None for f in findings(checkpoint))


def did_not_move(checkpoint: dict[str, Any]) -> bool:
    """Whether every measured matrix is the same in both checkpoints."""
    size = size_of(checkpoint)
    return size is not None and size.row["mean"] == 0


def size_of(checkpoint: dict[str, Any]) -> Finding | None:
    """The first row that says how large the update is."""
    sizes = {r["diagnostic"] for r in checkpoint["diagnostics"] if about(r["diagnostic"]).size}
    return next((f for name in sorted(sizes, key=position) for f in findings(checkpoint, name)), None)

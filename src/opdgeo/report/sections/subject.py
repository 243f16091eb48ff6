"""What the page says about one update."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opdgeo.diagnostics import Diagnostic
from opdgeo.report.glossary import about
from opdgeo.report.verdict import (
    Finding,
    by_reading,
    did_not_move,
    findings,
    headlines,
    incomplete,
    unmeasured,
    unmoved,
)
from opdgeo.report.view import say, shown


@dataclass(frozen=True)
class Variants:
    """Findings of one diagnostic under its title."""

    title: str
    found: list[Finding]


@dataclass(frozen=True)
class Incomplete:
    """Diagnostics whose mean is over `over` of `total` matrices; `every` where that is so of most of them."""

    over: int
    total: int
    every: bool
    found: list[Variants]

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.over, self.total, *((f.diagnostic, f.variant) for group in self.found for f in group.found))


@dataclass(frozen=True)
class Subject:
    """The last update of a run.

    Attributes:
        still: no measured matrix moved. `still_moved`: none did, but some did at earlier checkpoints.
        unmeasured: no diagnostic has a value.
        unmoved: how many of the `total` matrices did not move while others did.
        groups: findings by their reading.
        nulls: whether any finding has a null.
    """

    arm: str
    name: str
    still: bool
    still_moved: bool
    unmeasured: bool
    unmoved: int
    total: int
    headlines: list[tuple[Diagnostic, Finding | None]]
    lead: Markup
    groups: dict[str, list[Variants]]
    nulls: bool
    incomplete: list[Incomplete]
    findings: list[Finding]


def subject_of(arm: str, checkpoints: list[dict[str, Any]]) -> Subject:
    *earlier, checkpoint = checkpoints
    found, still = findings(checkpoint), did_not_move(checkpoint)
    return Subject(
        arm=arm,
        name=checkpoint["checkpoint"],
        still=still,
        still_moved=still and not all(map(did_not_move, earlier)),
        unmeasured=unmeasured(checkpoint),
        unmoved=unmoved(checkpoint),
        total=max((f.row["total"] for f in found), default=0),
        headlines=headlines(checkpoint),
        lead=_lead(checkpoint),
        groups={reading: _by_diagnostic(group) for reading, group in by_reading(checkpoint).items()},
        nulls=any(f.null for f in found),
        incomplete=_incomplete(checkpoint),
        findings=found,
    )


def _lead(checkpoint: dict[str, Any]) -> Markup:
    """The first sentence about one update: its headlines with their numbers."""
    said: list[Markup] = []
    for d, found in headlines(checkpoint):
        if d.headline is None or not d.headline.clause or found is None or found.row["mean"] is None:
            continue
        clause = say(d.headline.clause, Markup("<strong>{}</strong>").format(shown(found.row["mean"], found.unit)))
        null = found.null.get("mean") if found.null else None
        if d.headline.beside and null is not None:
            clause += ", " + say(d.headline.beside, shown(null, found.unit))
        said.append(clause)
    text = Markup("; ").join(said)
    if unmoved(checkpoint):
        return Markup("In the matrices that moved {}.").format(text)
    return Markup("{}{}.").format(text[:1].upper(), text[1:])


def _by_diagnostic(found: Iterable[Finding]) -> list[Variants]:
    grouped: dict[str, list[Finding]] = {}
    for one in found:
        grouped.setdefault(one.diagnostic, []).append(one)
    return [Variants(about(d).title, rows) for d, rows in grouped.items()]


def _incomplete(checkpoint: dict[str, Any]) -> list[Incomplete]:
    """Findings whose mean leaves matrices out, grouped by how many are there."""
    grouped: dict[tuple[int, int], list[Finding]] = {}
    for found in incomplete(checkpoint):
        grouped.setdefault((found.over, found.row["total"]), []).append(found)
    most, half = max((len(g) for g in grouped.values()), default=0), len(findings(checkpoint)) / 2
    return [
        Incomplete(over, total, len(group) == most and len(group) > half, _by_diagnostic(group))
        for (over, total), group in sorted(grouped.items(), key=lambda item: -len(item[1]))
    ]

"""The first section: what happened, and what of it size explains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from opdgeo.diagnostics.diagnostic import Part
from opdgeo.report.data import Results
from opdgeo.report.glossary import about, variant_label
from opdgeo.report.sections.section import Section, View
from opdgeo.report.sections.subject import Incomplete, Subject
from opdgeo.report.verdict import answers


@dataclass(frozen=True)
class Shared:
    """A diagnostic and the variants of it that a list of `Verdict.shared` names."""

    title: str
    details: list[str]


@dataclass(frozen=True)
class Verdict:
    """Attributes:
    answers: sentences of a trajectory, in parts.
    checkpoints: names of a trajectory's checkpoints.
    missing: what is incomplete, with the arms in which it is.
    problems: whether matrices were skipped.
    shared: diagnostics that read `geometry` in every arm, in some and in none.
    """

    subjects: list[Subject]
    answers: list[list[Part]]
    checkpoints: list[str]
    remarks: list[str]
    missing: list[tuple[Incomplete, list[str]]]
    problems: bool
    shared: dict[str, list[Shared]]


def find(view: View) -> Verdict:
    track = next(iter(view.runs.values())) if view.kind == "track" else []
    return Verdict(
        subjects=view.subjects,
        answers=answers(track, view.results.whole) if track else [],
        checkpoints=[c["checkpoint"] for c in track],
        remarks=view.run.get("remarks") or [],
        missing=_missing(view.subjects),
        problems=not skipped(view.everything).is_empty(),
        shared=_shared(view.subjects),
    )


def skipped(results: Results) -> pl.DataFrame:
    """Matrices skipped as a whole, with the reason, in the order of the table."""
    rows = results.rows(pl.col("status") == "skipped")
    return rows.select("checkpoint", "matrix", "reason").unique(maintain_order=True)


def _missing(subjects: list[Subject]) -> list[tuple[Incomplete, list[str]]]:
    """What is incomplete, arms with the same gap in one entry."""
    merged: dict[Any, tuple[Incomplete, list[str]]] = {}
    for subject in subjects:
        for part in subject.incomplete:
            _, arms = merged.setdefault(part.key, (part, []))
            if subject.arm:
                arms.append(subject.arm)
    return list(merged.values())


def _shared(subjects: list[Subject]) -> dict[str, list[Shared]]:
    """Which diagnostics read `geometry` in every arm, in some and in none. A reading that all arms share marks no paradigm."""
    readings: dict[tuple[str, str], list[bool]] = {}
    for subject in subjects if len(subjects) > 1 else []:
        for found in subject.findings:
            if found.reading in ("geometry", "size", "unclear"):
                readings.setdefault((found.diagnostic, found.variant), []).append(found.reading == "geometry")
    out: dict[str, dict[str, list[str]]] = {"every": {}, "some": {}, "none": {}}
    for (diagnostic, variant), got in readings.items():
        key = "every" if all(got) and len(got) == len(subjects) else "some" if any(got) else "none"
        out[key].setdefault(about(diagnostic).title, []).append(variant_label(diagnostic, variant))
    return {key: [Shared(t, [d for d in details if d]) for t, details in group.items()] for key, group in out.items()}


SECTION = Section("verdict", "", "", find)

"""The claims of a study with their verdicts, below what the study can and cannot decide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.report import charts, limits
from opdgeo.report.charts import style_of
from opdgeo.report.glossary import arm_label, arm_order, clean
from opdgeo.report.sections.section import Figure, Section, View
from opdgeo.report.terminal import control_name, unit_of
from opdgeo.report.view import points, slug

ArmRow = tuple[str, int, dict[str, Any]]
"""An arm's name, the index of its colour, and what was measured of it."""


@dataclass(frozen=True)
class Limit:
    """A row of the table of what a study can decide; `cells` holds (value, null, unit) a column."""

    name: str
    exploratory: bool
    learning_rate: float | None
    sequences: int | None
    cells: list[tuple[float | None, float | None, str]]


@dataclass(frozen=True)
class Limits:
    text: list[str]
    heads: list[str]
    rows: list[Limit]
    note: str


@dataclass(frozen=True)
class Control:
    """The same rule on another comparison."""

    name: str
    full: str
    verdict: str
    explanation: str
    rows: list[ArmRow]
    unit: str


@dataclass(frozen=True)
class Claim:
    """`entry` is the claim's own entry in claims.json."""

    entry: dict[str, Any]
    unit: str
    rows: list[ArmRow]
    chart: Figure | None
    controls: list[Control]


@dataclass(frozen=True)
class Claims:
    claims: list[Claim]
    limits: Limits
    left_out: list[str]
    rehearsal: bool


def find(view: View) -> Claims | None:
    entries = view.claims.get("claims", [])
    if not entries:
        return None
    found = [_claim(entry, view) for entry in entries]
    return Claims(found, _limits(view), view.claims.get("left_out") or [], view.claims.get("rehearsal", False))


def _limits(view: View) -> Limits:
    table = [
        Limit(
            name=limits.ARMS.get(row["arm"], arm_label(row["arm"])),
            exploratory=row.get("exploratory", False),
            learning_rate=row.get("learning_rate"),
            sequences=row.get("sequences"),
            cells=[(row.get(key), row.get(f"{key}_null"), unit) for key, _, unit in limits.COLUMNS],
        )
        for row in limits.rows(view.claims)
    ]
    heads = [name for _, name, _ in limits.COLUMNS]
    return Limits(limits.paragraphs(view.claims), heads, table, limits.note(view.claims))


def _claim(entry: dict[str, Any], view: View) -> Claim:
    unit = unit_of(entry.get("unit"))
    rows = _arm_rows(entry.get("measured") or {})
    chart = None
    if any(got.get("mean") is not None for _, _, got in rows):
        axis = {"share": "%", "points": "percentage points", "degrees": "degrees"}.get(unit, "")
        name = f"claim-{slug(str(entry['id']))}"
        chart = view.draw(charts.claim_panel(name, clean(entry["id"]), unit, axis, rows))
    controls = [
        Control(
            name=control_name(control),
            full=control.get("control", ""),
            verdict=control["verdict"],
            explanation=control.get("explanation") or "",
            rows=_arm_rows(control.get("measured") or {}),
            unit=_control_unit(control, unit),
        )
        for control in entry.get("controls") or []
    ]
    return Claim(entry, unit, rows, chart, controls)


def _arm_rows(measured: dict[str, Any]) -> list[ArmRow]:
    known = arm_order(set(measured))
    return [(arm_label(arm), style_of(arm, known), measured[arm]) for arm in known]


def _control_unit(control: dict[str, Any], unit: str) -> str:
    """Unit of a control's values: those of the claim, unless it holds ratios to the null or differences from it."""
    name = str(control.get("control", ""))
    if "ratio to the null" in name:
        return "number"
    return points(unit) if "difference from the null" in name else unit


SECTION = Section("claims", "Claims of the paper", "Claims", find)

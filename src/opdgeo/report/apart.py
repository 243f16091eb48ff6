"""How far every arm of a study is from the null of its size, from claims.json: a table on the page and in text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.report.glossary import about, arm_label, arm_order, number, position, variant_label

TITLE = "How far every arm is from the null of its size"
NOTE = (
    "At its last checkpoint: the value over the isotropic null of the same size for ratios, else minus it, with Student's 95 % interval "
    "over seeds; an arm of one seed has none. An arm at 1, or at 0, is what its size alone explains."
)


@dataclass(frozen=True)
class Distances:
    """`columns` holds head and unit; a row has the arm, how many seeds, and an entry of claims.json's `from_null` a column."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, int, list[dict[str, Any] | None]]]
    title: str = TITLE
    note: str = NOTE


def of(claims: dict[str, Any]) -> Distances | None:
    """None where the study has no nulls."""
    found: list[dict[str, Any]] = claims.get("from_null") or []
    names = sorted(dict.fromkeys(row["name"] for row in found), key=lambda name: position(name.partition(".")[0]))
    rows: list[tuple[str, int, list[dict[str, Any] | None]]] = []
    for arm in arm_order({row["arm"] for row in found}):
        here = {row["name"]: row for row in found if row["arm"] == arm}
        rows.append((arm_label(arm), max(row["seeds"] for row in here.values()), [here.get(name) for name in names]))
    ratios = {row["name"]: row["ratio"] for row in found}
    return Distances([_compared(name, ratios[name]) for name in names], rows) if rows else None


def as_text(claims: dict[str, Any]) -> list[str]:
    """Lines of Markdown; none where the study has no nulls."""
    table = of(claims)
    if table is None:
        return []
    lines = [f"## {TITLE}", "", NOTE, "", "| arm | seeds | " + " | ".join(head for head, _ in table.columns) + " |"]
    lines.append("|---" * (2 + len(table.columns)) + "|")
    for arm, seeds, cells in table.rows:
        shown = ["" if c is None else _shown(c, unit) for c, (_, unit) in zip(cells, table.columns, strict=True)]
        lines.append(f"| {arm} | {seeds} | " + " | ".join(shown) + " |")
    return [*lines, ""]


def _shown(row: dict[str, Any], unit: str) -> str:
    signed = not row["ratio"]
    ends = (number(row[key], unit, signed=signed, bare=True) for key in ("low", "high"))
    mean = number(row["excess"], unit, signed=signed)
    return mean if row["low"] is None else f"{mean} [{', '.join(ends)}]"


def _compared(name: str, ratio: bool) -> tuple[str, str]:
    """`mask_overlap.low_magnitude.0.5` → `Update–mask overlap (low magnitude α = 0.5), value − null`, points."""
    diagnostic, _, variants = name.partition(".")
    known = about(diagnostic)
    details = ", ".join(filter(None, (variant_label(diagnostic, variant) for variant in variants.split("+"))))
    unit = "number" if ratio else "points" if known.unit == "share" else known.unit
    return f"{known.title}{f' ({details})' if details else ''}, value\u00a0{'/' if ratio else '−'}\u00a0null", unit

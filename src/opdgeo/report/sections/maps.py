"""Maps of value and excess over layers and roles."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from opdgeo.diagnostics import Diagnostic
from opdgeo.report import charts
from opdgeo.report.glossary import about, arm_label, clean, expert_of, is_primary, label, number, position, role_order
from opdgeo.report.sections.section import AXIS, Figure, Section, View, compares_itself, scale_of
from opdgeo.report.view import slug

Cells = dict[tuple[int | None, str], tuple[float, str]]
"""(layer, role) → value and tooltip."""


@dataclass(frozen=True)
class Block:
    """The maps of one diagnostic and variant."""

    title: str
    charts: list[Figure]


@dataclass(frozen=True)
class Maps:
    blocks: list[Block]
    many: bool


def find(view: View) -> Maps | None:
    """Value and excess over the null by layer and role; with several arms one map each on one scale."""
    table = view.final.filter((pl.col("status") == "computed") & pl.col("value").is_finite())
    if table["matrix"].n_unique() < 2:
        return None
    blocks = []
    pairs = table.select("diagnostic", "variant").unique(maintain_order=True).rows()
    for diagnostic, variant in sorted(pairs, key=lambda p: position(p[0])):
        rows = table.filter((pl.col("diagnostic") == diagnostic) & (pl.col("variant") == variant))
        if is_primary(diagnostic, variant) and not compares_itself(diagnostic, rows):
            blocks.append(Block(label(diagnostic, variant), _maps(rows, diagnostic, variant, view)))
    return Maps(blocks, len(view.last) > 1) if blocks else None


def _maps(rows: pl.DataFrame, diagnostic: str, variant: str, view: View) -> list[Figure]:
    known, many = about(diagnostic), len(view.last) > 1
    places: dict[str, Any] = {
        "roles": role_order(set(rows["role"].to_list())),
        "layers": sorted(set(rows["layer"].to_list()), key=lambda x: -1 if x is None else x),
    }
    shown = rows["value"].to_list()
    made = []
    for arm, checkpoint in view.last.items():
        part = rows.filter(pl.col("checkpoint") == checkpoint)
        tag = f"-{slug(arm)}" if many else ""
        name = f"heatmap-{slug(diagnostic)}-{slug(variant)}".rstrip("-") + tag
        caption = (arm_label(arm) if many else "Value") + AXIS.get(known.unit, "")
        scale, cells, limits = scale_of(diagnostic), _cells(part, known, False), (min(shown), max(shown))
        made.append(view.draw(charts.heatmap(name, caption, scale, cells, **places, limits=limits)))
        with_null = part.filter(pl.col("null_mean").is_finite())
        if not many and not with_null.is_empty() and not known.size:
            caption = "Value − null" + {"share": ", percentage points", "degrees": ", degrees"}.get(known.unit, "")
            cells = _cells(with_null, known, True)
            spread = [v for v, _ in cells.values()]
            limits = (min(spread), max(spread))
            chart = charts.heatmap(name + "-excess", caption, scale, cells, **places, limits=limits, excess=True)
            made.append(view.draw(chart))
    return made


def _cells(rows: pl.DataFrame, known: Diagnostic, excess: bool) -> Cells:
    """Several matrices may share a place: their mean gives the colour, and the tooltip says so."""
    gathered: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for row in rows.select("layer", "role", "matrix", "value", "null_mean").to_dicts():
        gathered.setdefault((row["layer"], row["role"]), []).append(row)
    cells = {}
    for place, found in gathered.items():
        colour = sum(r["value"] - (r["null_mean"] if excess else 0) for r in found) / len(found)
        tip = f"{clean(found[0]['matrix'])}: {number(found[0]['value'], known.unit)}"
        if found[0]["null_mean"] is not None:
            tip += f", null {number(found[0]['null_mean'], known.unit)}"
        several = f"{clean(place[1])}: {_several(found)}, colour is their mean"
        cells[place] = (colour, tip if len(found) == 1 else several)
    return cells


def _several(rows: list[dict[str, Any]]) -> str:
    return "all experts" if all(expert_of(r["matrix"]) is not None for r in rows) else "several matrices"


SECTION = Section("heatmaps", "Layers and roles", "Layers and roles", find)

"""Maps of value and excess over layers and roles: tables whose cells are coloured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from opdgeo.diagnostics import Diagnostic
from opdgeo.report import charts
from opdgeo.report.charts import Scale
from opdgeo.report.glossary import about, arm_label, clean, expert_of, is_primary, label, number, role_order
from opdgeo.report.sections.section import AXIS, Section, View, compares_itself, with_values
from opdgeo.report.view import points, slug

Place = tuple[int | None, str]
"""Layer and role."""


@dataclass(frozen=True)
class Cell:
    """`value` is what the colour shows, `exact` the matrix's own value; None where several matrices share the place."""

    value: float
    exact: float | None
    tip: str
    colour: str = ""


@dataclass(frozen=True)
class Map:
    """Rows from the first layer to the last; a place without a value holds None. `ends` are the ends of the colour scale, in words."""

    caption: str
    roles: list[str]
    rows: list[tuple[int | None, list[Cell | None]]]
    ramp: list[str]
    ends: tuple[str, str]
    unit: str
    excess: bool


@dataclass(frozen=True)
class Block:
    """The maps of one diagnostic and variant."""

    title: str
    maps: list[Map]


@dataclass(frozen=True)
class Maps:
    blocks: list[Block]
    many: bool


def find(view: View) -> Maps | None:
    """Value and excess over the null by layer and role; with several arms one map each on one scale."""
    blocks = []
    for diagnostic, variant, rows in view.parts:
        rows = with_values(rows) if is_primary(diagnostic, variant) else rows.clear()
        if rows["matrix"].n_unique() > 1 and not compares_itself(diagnostic, rows):
            blocks.append(Block(label(diagnostic, variant), _maps(rows, diagnostic, variant, view)))
    return Maps(blocks, len(view.last) > 1) if blocks else None


def _maps(rows: pl.DataFrame, diagnostic: str, variant: str, view: View) -> list[Map]:
    known, many = about(diagnostic), len(view.last) > 1
    roles = role_order(set(rows["role"].to_list()))
    layers = sorted(set(rows["layer"].to_list()), key=lambda x: -1 if x is None else x)
    shown = (rows["value"].min(), rows["value"].max())
    made = []
    for arm, checkpoint in view.last.items():
        part = rows.filter(pl.col("checkpoint") == checkpoint)
        tag = f"-{slug(arm)}" if many else ""
        name = f"heatmap-{slug(diagnostic)}-{slug(variant)}".rstrip("-") + tag
        wanted: list[tuple[str, str, bool]] = [
            (name, (arm_label(arm) if many else "Value") + AXIS.get(known.unit, ""), False)
        ]
        if not many and not known.size and part["null_mean"].is_finite().any():
            unit = {"share": ", percentage points", "degrees": ", degrees"}.get(known.unit, "")
            wanted.append((f"{name}-excess", f"Value − null{unit}", True))
        for name, caption, excess in wanted:
            found = cells(part, known, excess)
            spread = [cell.value for cell in found.values()]
            limits: Any = (min(spread), max(spread)) if excess else shown
            where: dict[str, Any] = {"roles": roles, "layers": layers, "limits": limits, "excess": excess}
            made.append(draw(view, name, caption, found, known, **where))
    return made


def draw(
    view: View,
    name: str,
    caption: str,
    cells: dict[Place, Cell],
    known: Diagnostic,
    *,
    roles: list[str],
    layers: list[int | None],
    limits: tuple[float, float],
    excess: bool,
) -> Map:
    """A map as a coloured table for the page, and as a chart called `name` for figures/."""
    values = {place: cell.value for place, cell in cells.items()}
    scale = Scale(known.unit, known.log)
    view.keep(charts.heatmap(name, caption, scale, values, roles=roles, layers=layers, limits=limits, excess=excess))
    colours = dict(zip(cells, charts.colours([c.value for c in cells.values()], limits, excess), strict=True))
    rows: list[tuple[int | None, list[Cell | None]]] = []
    for layer in layers:
        places = [(layer, role) for role in roles]
        found = [cells.get(place) for place in places]
        rows.append(
            (layer, [c and Cell(c.value, c.exact, c.tip, colours[p]) for p, c in zip(places, found, strict=True)])
        )
    far = max(map(abs, limits))
    unit = points(known.unit) if excess else known.unit
    low, high = (-far, far) if excess else limits
    ramp = charts.colours([low + (high - low) * i / 8 for i in range(9)], limits, excess)
    ends = (number(low, unit, signed=excess), number(high, unit, signed=excess))
    return Map(caption, roles, rows, ramp, ends, known.unit, excess)


def cells(rows: pl.DataFrame, known: Diagnostic, excess: bool) -> dict[Place, Cell]:
    """Several matrices may share a place: their mean gives the colour, and the tooltip says so."""
    if excess:
        rows = rows.filter(pl.col("null_mean").is_finite())
    value = pl.col("value") - pl.col("null_mean") if excess else pl.col("value")
    gathered = rows.group_by("layer", "role", maintain_order=True).agg(
        value.mean().alias("colour"),
        pl.len().alias("count"),
        pl.col("matrix", "value", "null_mean").first(),
        last=pl.col("matrix").last(),
    )
    cells = {}
    for row in gathered.iter_rows(named=True):
        tip = f"{clean(row['matrix'])}: {number(row['value'], known.unit)}"
        if row["null_mean"] is not None:
            tip += f", null {number(row['null_mean'], known.unit)}"
        if row["count"] > 1:
            experts = all(expert_of(row[key]) is not None for key in ("matrix", "last"))
            tip = f"{clean(row['role'])}: {'all experts' if experts else 'several matrices'}, colour is their mean"
        cells[row["layer"], row["role"]] = Cell(row["colour"], row["value"] if row["count"] == 1 else None, tip)
    return cells


SECTION = Section("heatmaps", "Layers and roles", "Layers and roles", find)

"""The page of `relate`: matrices of pairs in the order of a clustering, the curves over K, every number of every pair."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import polars as pl

from opdgeo.diagnostics import CURVES, DIAGNOSTICS, of_pairs
from opdgeo.diagnostics.diagnostic import Diagnostic
from opdgeo.report import charts
from opdgeo.report.charts import Chart, Scale, Series
from opdgeo.report.data import Results
from opdgeo.report.glossary import clean, label, number, role_order, stem
from opdgeo.report.pairs import Cell, Pairs
from opdgeo.report.sections import maps, provenance
from opdgeo.report.sections.section import AXIS, Figure, View
from opdgeo.report.verdict import findings
from opdgeo.report.view import environment, slug

_MAX_CURVES, _MAX_MAPS = 12, 6
"""Pairs that have charts of their own, the most alike first; the data files hold all."""


def build(results: Results) -> tuple[str, list[Chart]]:
    """The page as HTML text and the charts in it, in the order of the page."""
    view, pairs = View(results), Pairs(results.pairs)
    ranked = pairs.by_likeness()
    leading = pairs.leading()
    context = {
        "base": clean(stem((results.run.get("base") or {}).get("path", "base")), 60),
        "names": pairs.ordered(),
        "sentences": pairs.sentences(),
        "still": list(pairs.still()),
        "remarks": results.run.get("remarks") or [],
        "sizes": _sizes(results),
        "leading": label(*leading) if leading else "",
        "matrices": [matrix(pairs, d, variant) for d, variant in pairs.columns()],
        "lines": _lines(pairs, ranked or pairs.unordered()),
        "curves": _curves(view, pairs, ranked),
        "maps": _maps(view, pairs, ranked),
        "pairs": [_table(pairs, *pair) for pair in ranked or pairs.unordered()],
        "left": max(0, len(ranked) - _MAX_CURVES),
        "diagnostics": [d for d in of_pairs().values() if any(c.name == d.name for c, _ in pairs.columns())],
        "run": results.run,
        "provenance": provenance.find(view),
    }
    page = environment().get_template("pairs.html.j2").render(context)
    return page, view.charts


def charts_of(results: Results) -> list[Chart]:
    """The charts of the page alone, none of them drawn."""
    view, pairs = View(results), Pairs(results.pairs)
    ranked = pairs.by_likeness()
    _curves(view, pairs, ranked)
    _maps(view, pairs, ranked)
    return view.charts


def _sizes(results: Results) -> dict[str, Any]:
    """What is known of each update alone: the heads of the columns, and a row of (value, null, unit) an update."""
    every = findings(results.summary[0])
    rows = []
    for one in results.summary:
        by_place = {(f.diagnostic, f.variant): f for f in findings(one)}
        shown = [by_place.get((f.diagnostic, f.variant)) for f in every]
        cells = [
            (None, None, "number")
            if f is None
            else (f.row["mean"], (f.null or {}).get("mean") if not DIAGNOSTICS[f.diagnostic].size else None, f.unit)
            for f in shown
        ]
        rows.append(
            {"name": one["checkpoint"], "step": one.get("step"), "unmoved": one.get("unmoved", 0), "cells": cells}
        )
    return {"heads": [f.label for f in every], "rows": rows, "steps": any(row["step"] is not None for row in rows)}


def matrix(pairs: Pairs, diagnostic: Diagnostic, variant: str) -> dict[str, Any]:
    """One number of all pairs: rows and columns in the order of the clustering. The colour is the distance from chance, of what is
    beyond it; without nulls the size of the number."""
    names = pairs.ordered()
    cells = [[None if a == b else pairs.cell(a, b, diagnostic.name, variant) for b in names] for a in names]
    largest = max((abs(_distance(c)) for row in cells for c in row if c is not None), default=0.0)
    rows = []
    for name, row in zip(names, cells, strict=True):
        rows.append((name, [c and _shown(c, largest, (name, other)) for other, c in zip(names, row, strict=True)]))
    return {
        "title": label(diagnostic.name, variant),
        "directed": bool(diagnostic.directed),
        "unit": diagnostic.unit,
        "rows": rows,
    }


def _distance(cell: Cell) -> float:
    """How far the number lies from chance; 0 where it is not beyond it, and the number itself without a null."""
    if cell.value is None or cell.reading not in ("beyond chance", "no null"):
        return 0.0
    return cell.value - (0.0 if cell.around else cell.chance or 0.0)


def _shown(cell: Cell, largest: float, names: tuple[str, str]) -> dict[str, Any]:
    value, unit = cell.value, cell.found.unit
    tip = f"{clean(names[0])} and {clean(names[1])}: {number(value, unit)}"
    if value is None:
        tip = f"{clean(names[0])} and {clean(names[1])}: {clean(cell.found.row.get('reason') or 'undefined')}"
    elif cell.chance is not None:
        tip += f", chance {cell.chance_text()}" + (f"; {cell.reading}" if cell.found.reading else "")
    tip += f"; {cell.instead}" if cell.instead else ""
    return {
        "value": value,
        "chance": None if value is None else cell.chance,
        "around": cell.around,
        "instead": cell.instead,
        "beyond": cell.reading == "beyond chance",
        "strength": round(100 * abs(_distance(cell)) / largest) if largest else 0,
        "below": _distance(cell) < 0,
        "tip": tip,
    }


def _lines(pairs: Pairs, ranked: list[tuple[str, str]]) -> dict[str, Any]:
    """A row a pair, the most alike first, of what is the same both ways."""
    columns = [(d, variant) for d, variant in pairs.columns() if not d.directed]
    left = [pair for pair in pairs.unordered() if pair not in ranked]
    return {
        "heads": [label(d.name, variant) for d, variant in columns],
        "rows": [
            (*(pairs.short(name, 40) for name in pair), [(pairs.cell(*pair, d.name, v), d.unit) for d, v in columns])
            for pair in [*ranked, *left]
        ],
    }


def _table(pairs: Pairs, first: str, other: str) -> dict[str, Any]:
    rows = []
    for pair in ((first, other), (other, first)):
        for found in findings(pairs.by_names.get(pair, {"diagnostics": []})):
            direction = pairs.direction(found.diagnostic, *pair, 40)
            rows.append({"found": found, "cell": Cell(found), "direction": direction})
    return {"first": first, "other": other, "rows": rows}


def _curves(view: View, pairs: Pairs, ranked: list[tuple[str, str]]) -> list[Figure]:
    """One chart a pair: the mean over matrices of each curve over K, with its null."""
    named = [
        (d, curve)
        for d in of_pairs().values()
        for curve in d.curves
        if curve not in CURVES and f"{curve}_null" in d.curves
    ]
    found = []
    for place, (first, other) in enumerate(ranked[:_MAX_CURVES]):
        rows = view.everything.curves.filter((pl.col("checkpoint") == first) & (pl.col("other") == other)).collect()
        lines = []
        for style, (_, curve) in enumerate(named):
            y, null = (_mean_curve(rows, name) for name in (curve, f"{curve}_null"))
            known = [k for k, value in enumerate(y) if value is not None]
            if known:
                chance = [null[k] if k < len(null) else None for k in known]
                x, shown = [k + 1 for k in known], [y[k] for k in known]
                text = curve.rpartition("_")[2]
                lines.append(Series(text, x, shown, null=chance, style=style))  # type: ignore[arg-type]
        if lines:
            title = f"{pairs.short(first, 26)} and {pairs.short(other, 26)}{AXIS.get(named[0][0].unit, '')}"
            name = f"curve-{place + 1}-{slug(first)}-{slug(other)}"
            chart = charts.trajectory(name, title, Scale(named[0][0].unit), lines, "K")
            found.append(
                view.draw(replace(chart, alt=f"{title}: similarity of the top K directions over K, chance in grey"))
            )
    return found


def _mean_curve(rows: pl.DataFrame, curve: str) -> list[float | None]:
    """The mean over matrices at each K, of the matrices that are determined up to the most frequent K: one set along the whole
    line."""
    values = rows.filter(pl.col("curve") == curve)["values"].to_list()
    ends = [max((k + 1 for k, value in enumerate(v) if value is not None), default=0) for v in values]
    end = max(sorted(set(ends), reverse=True), key=ends.count, default=0)
    found: list[float | None] = []
    for k in range(end):
        known = [v[k] for v, e in zip(values, ends, strict=True) if e == end and v[k] is not None]
        found.append(sum(known) / len(known) if known else None)
    return found


def _maps(view: View, pairs: Pairs, ranked: list[tuple[str, str]]) -> list[maps.Map]:
    """The leading diagnostic by layer and role, one map a pair on one scale."""
    leading = pairs.leading()
    if leading is None:
        return []
    known = of_pairs()[leading[0]]
    table = view.everything.rows(
        pl.col("diagnostic") == leading[0], pl.col("variant") == leading[1], pl.col("value").is_finite()
    )
    if table["matrix"].n_unique() < 2:
        return []
    limits = float(table["value"].to_numpy().min()), float(table["value"].to_numpy().max())
    found = []
    for place, (first, other) in enumerate(ranked[:_MAX_MAPS]):
        rows = table.filter((pl.col("checkpoint") == first) & (pl.col("other") == other))
        roles = role_order(set(rows["role"].to_list()))
        layers = sorted(set(rows["layer"].to_list()), key=lambda x: -1 if x is None else x)
        caption = f"{pairs.short(first, 26)} and {pairs.short(other, 26)}{AXIS.get(known.unit, '')}"
        name = f"map-{place + 1}-{slug(first)}-{slug(other)}"
        where: dict[str, Any] = {"roles": roles, "layers": layers, "limits": limits}
        cells = maps.cells(rows, known, False)
        found.append(maps.draw(view, name, caption, cells, known, **where, excess=limits[0] < 0))
    return found

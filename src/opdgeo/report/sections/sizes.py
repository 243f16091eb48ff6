"""How much of every diagnostic size explains: its values against the relative norm of the update, beside the null as a curve."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic
from opdgeo.report import apart, charts
from opdgeo.report.apart import Distances
from opdgeo.report.charts import ARM_STYLE, GLYPHS, Band, Hollow, Points, over_size, style_of
from opdgeo.report.data import runs
from opdgeo.report.glossary import (
    about,
    arm_label,
    arm_order,
    clean,
    is_listed,
    is_primary,
    label,
    number,
    position,
    role_order,
)
from opdgeo.report.sections.section import AXIS, Figure, Section, View, compares_itself, scale_of, which, with_values
from opdgeo.report.verdict import find as finding
from opdgeo.report.view import slug

ONE_BY_ONE = 600
"""Points that are drawn one by one; more are gathered in a grid of `GRID` cells, and a cell's dot is larger the more it holds."""
GRID = (44, 30)
NODES = 16
"""Nodes of the null's curve over matrices."""
THIRDS = (("early", "first third"), ("middle", "middle third"), ("late", "last third"))

SIZE = next((d, d.headline.variant) for d in DIAGNOSTICS.values() if d.size and d.headline)
"""The diagnostic and variant on the x axis: the relative norm."""


@dataclass(frozen=True)
class Key:
    """An entry of the legend, which hides and shows a series."""

    series: str
    glyph: str
    style: int
    name: str


@dataclass(frozen=True)
class Row:
    """A point of the charts in words: its role or arm, the classes by which the keys hide it, and (value, null) a column."""

    name: str
    kind: str
    classes: str
    cells: list[tuple[float | None, float | None]]


@dataclass(frozen=True)
class Table:
    """What the charts that lead show, as rows; `columns` holds name and unit, `kind` is empty where all rows are of one."""

    title: str
    head: str
    kind: str
    columns: list[tuple[str, str]]
    rows: list[Row]


@dataclass(frozen=True)
class Sizes:
    """Attributes:
    charts: those that lead, or all others; with the same chart on a linear axis where it is logarithmic.
    table, distances: the same as rows, and how far the arms of a study are from the null; with the charts that lead.
    keys: the series. `thirds`: the layers that can be hidden, (class, name).
    points: what a point is. `null`: what the grey is.
    published: whether values of the paper are among the marks.
    """

    charts: list[tuple[Figure, Figure | None]]
    keys: list[Key]
    thirds: Sequence[tuple[str, str]]
    points: str
    null: str
    published: bool
    table: Table | None
    distances: Distances | None


@dataclass(frozen=True)
class Drawn:
    """One chart before it is drawn."""

    points: list[Points]
    band: Band | None
    whole: tuple[float, float, float | None] | None = None
    hollow: Sequence[Hollow] = ()


def find(view: View, leads: bool) -> Sizes | None:
    """The charts of the diagnostics that lead, or of the others."""
    return _of_matrices(view, leads) if view.kind == "compare" else _of_checkpoints(view, leads)


def _of_matrices(view: View, leads: bool) -> Sizes | None:
    """Of one update: every matrix a point, coloured by role."""
    sizes = with_values(view.final(*which(SIZE[0].name, SIZE[1])))
    sizes = sizes.filter(pl.col("value") > 0)
    roles = role_order(set(sizes["role"].to_list()))
    deepest, many = sizes["layer"].max(), sizes.height > ONE_BY_ONE
    charts_of, shown = {}, {}
    for diagnostic, variant in _pairs(view.measured, leads):
        rows = with_values(view.final(*which(diagnostic, variant)))
        rows = rows.join(sizes.select("matrix", x="value"), on="matrix", maintain_order="left")
        if rows["null_mean"].is_finite().any():
            rows = rows.filter(pl.col("null_mean").is_finite())
        if not rows.is_empty() and not compares_itself(diagnostic, rows):
            charts_of[diagnostic, variant] = Drawn(
                [p for i, role in enumerate(roles) for p in _matrices(rows, role, i, diagnostic, deepest)],
                _band_of_matrices(rows),
                _whole(view.results.summary[-1], diagnostic, variant),
            )
            if leads and not many:
                shown[diagnostic, variant] = {
                    name: (value, null) for name, value, null in rows.select("matrix", "value", "null_mean").iter_rows()
                }
    keys = [
        Key(f"g{i}", "●" if many else GLYPHS[i % len(GLYPHS)], i % len(charts.SERIES), role)
        for i, role in enumerate(roles)
    ]
    points = (
        "a dot stands for matrices of one role, larger for two to nine and larger still for ten or more"
        if many
        else "a dot is a matrix"
    )
    null = "the nulls of matrices of about the same size, joined, with two standard deviations" + (
        "" if many else "; a short grey line is the null of a single matrix"
    )
    table = None
    if shown:
        rows_of = [
            Row(
                clean(matrix),
                clean(role, 40),
                f"g{roles.index(role)} {_third(layer, deepest)}".rstrip(),
                [(size, None), *(found.get(matrix, (None, None)) for found in shown.values())],
            )
            for matrix, role, layer, size in sizes.select("matrix", "role", "layer", "value").iter_rows()
        ]
        table = Table("Every matrix that moved", "matrix", "role", _columns(shown), rows_of)
    return _made(view, charts_of, keys, () if many or not deepest else THIRDS, points, null, table=table)


def _third(layer: int | None, deepest: Any) -> str:
    return THIRDS[min(2, 3 * layer // (deepest + 1))][0] if deepest and layer is not None else ""


def _columns(shown: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(label(*pair), about(pair[0]).unit) for pair in ((SIZE[0].name, SIZE[1]), *shown)]


def _matrices(rows: pl.DataFrame, role: str, index: int, diagnostic: str, deepest: Any) -> Iterator[Points]:
    unit, scale = about(diagnostic).unit, scale_of(diagnostic)
    gathered = rows.height > ONE_BY_ONE
    log = scale.log and bool((rows["value"] > 0).all())
    ends = rows["value"].min(), rows["value"].max(), rows["x"].min(), rows["x"].max()
    part = rows.filter(pl.col("role") == role)
    if part.is_empty():
        return
    x, y = part["x"].to_numpy(), part["value"].to_numpy()
    where: dict[str, Any] = {"style": index % len(charts.SERIES), "marker": 0 if gathered else index % len(GLYPHS)}
    if gathered:
        x, y, counts = _grid(x, y, ends, log)
        where["counts"] = counts
        tips = [f"{clean(role)}: {n} {'matrix' if n == 1 else 'matrices'}" for n in counts]
    else:
        tips = [
            f"{clean(m)}: {number(v, unit)}" + (f", null {number(n, unit)}" if n is not None else "")
            for m, v, n in part.select("matrix", "value", "null_mean").iter_rows()
        ]
        if deepest:
            where["classes"] = [_third(layer, deepest) for layer in part["layer"]]
    yield Points(role, f"g{index}", x.tolist(), y.tolist(), tips, **where)


def _grid(x: Any, y: Any, ends: tuple[Any, ...], log: bool) -> tuple[Any, Any, list[int]]:
    """The centres of the cells that hold points, and how many each holds."""
    low_y, high_y, low_x, high_x = ends
    u, (a, b) = np.log(x), np.log([low_x, high_x])
    v, (c, d) = (np.log(y), np.log([low_y, high_y])) if log else (y, (low_y, high_y))
    wide, tall = (b - a) / GRID[0] or 1.0, (d - c) / GRID[1] or 1.0
    cells = np.stack([np.floor((u - a) / wide), np.floor((v - c) / tall)], axis=1)
    cells, counts = np.unique(np.minimum(cells, np.subtract(GRID, 1)), axis=0, return_counts=True)
    at_x, at_y = np.exp(a + (cells[:, 0] + 0.5) * wide), c + (cells[:, 1] + 0.5) * tall
    return at_x, np.exp(at_y) if log else at_y, counts.tolist()


def _band_of_matrices(rows: pl.DataFrame) -> Band | None:
    """The nulls of matrices of about the same size, joined. They differ by the matrices' shapes and weights, so the band is wide."""
    known = rows.filter(pl.col("null_mean").is_finite()).sort("x")
    if known.is_empty():
        return None
    x, mean = known["x"].to_numpy(), known["null_mean"].to_numpy()
    wide = 2 * known["null_std"].fill_null(0.0).fill_nan(0.0).to_numpy()
    parts = np.array_split(np.arange(len(x)), max(1, min(NODES, len(x) // 4)))
    middle = [float(np.median(mean[p])) for p in parts]
    low, high = [float((mean - wide)[p].min()) for p in parts], [float((mean + wide)[p].max()) for p in parts]
    nodes = [float(np.median(x[p])) for p in parts]
    nodes, middle, low, high = [x[0], *nodes, x[-1]], *([v[0], *v, v[-1]] for v in (middle, low, high))
    each = (x.tolist(), mean.tolist()) if len(x) <= ONE_BY_ONE else ((), ())
    return Band(nodes, middle, low, high, each)


def _whole(checkpoint: dict[str, Any], diagnostic: str, variant: str) -> tuple[float, float, float | None] | None:
    size, found = finding(checkpoint, SIZE[0].name, SIZE[1]), finding(checkpoint, diagnostic, variant)
    if size is None or found is None or not size.row["mean"] or found.row["mean"] is None:
        return None
    return size.row["mean"], found.row["mean"], (found.null or {}).get("mean")


def _of_checkpoints(view: View, leads: bool) -> Sizes | None:
    """Of a run or a study: every checkpoint of every arm and seed a point. Colour is the paradigm, shape the control."""
    by_run = runs(view.everything.summary)
    arms = arm_order({arm for arm, _ in by_run})
    paradigms = list(dict.fromkeys(map(_paradigm, arms)))
    controls = list(dict.fromkeys(["", *(arm.removeprefix(_paradigm(arm)) for arm in arms)]))
    styles = {arm: style_of(_paradigm(arm), paradigms) if arm else 0 for arm in arms}
    markers = {arm: controls.index(arm.removeprefix(_paradigm(arm))) % len(GLYPHS) for arm in arms}
    study = view.kind == "reproduce"
    charts_of = {}
    last = [row for checkpoints in by_run.values() for row in checkpoints[-1]["diagnostics"]]
    for diagnostic, variant in _pairs(dict.fromkeys((r["diagnostic"], r["variant"]) for r in last), leads):
        unit, points, nulls = about(diagnostic).unit, [], []
        for (arm, seed), checkpoints in by_run.items():
            at = [(c, w) for c in checkpoints if (w := _whole(c, diagnostic, variant)) is not None]
            if at:
                tips = [
                    f"{clean(c['checkpoint'])}: {number(w[1], unit)}"
                    + (f", null {number(w[2], unit)}" if w[2] is not None else "")
                    for c, w in at
                ]
                name = arm_label(arm) + (f", seed {seed}" if seed else "")
                x, y = [w[0] for _, w in at], [w[1] for _, w in at]
                style: dict[str, Any] = {"style": styles[arm], "marker": markers[arm]}
                points.append(Points(name, f"g{arms.index(arm)}", x, y, tips, **style, path=True))
            for checkpoint, (size, _, null) in at:
                if null is not None:
                    row = finding(checkpoint, diagnostic, variant)
                    std = (row.null or {}).get("std") if row else None
                    nulls.append((size, null, 2 * (std or 0.0)))
        nulls.sort()
        band = None
        if nulls:
            nx, mean, wide = map(np.asarray, zip(*nulls, strict=True))
            band = Band(nx.tolist(), mean.tolist(), (mean - wide).tolist(), (mean + wide).tolist())
        if points:
            hollow = _published(about(diagnostic), variant) if study else []
            charts_of[diagnostic, variant] = Drawn(points, band, hollow=hollow)
    keys = [Key(f"g{i}", GLYPHS[markers[a]], styles[a], arm_label(a)) for i, a in enumerate(arms)] if study else []
    what = (
        "a mark is a checkpoint of an arm and a seed" if study else "a mark is a checkpoint, the steps joined in order"
    )
    grey = "the nulls at the sizes of these points, joined, with two standard deviations of one matrix"
    listed = {pair: checkpoints[-1:] if study else checkpoints for pair, checkpoints in by_run.items()}
    rows = [
        Row(
            clean(c["checkpoint"], 60),
            arm_label(arm),
            f"g{arms.index(arm)}",
            [(_mean(c, SIZE[0].name, SIZE[1])[0], None), *(_mean(c, *pair) for pair in charts_of)],
        )
        for (arm, _), checkpoints in listed.items()
        for c in checkpoints
    ]
    title = "The last checkpoint of every arm and seed" if study else "Every checkpoint"
    table = Table(title, "checkpoint", "arm" if study else "", _columns(charts_of), rows) if leads else None
    distances = apart.of(view.claims) if study and leads else None
    return _made(view, charts_of, keys, (), what, grey, table=table, distances=distances)


def _mean(checkpoint: dict[str, Any], diagnostic: str, variant: str) -> tuple[float | None, float | None]:
    found = finding(checkpoint, diagnostic, variant)
    return (None, None) if found is None else (found.row["mean"], (found.null or {}).get("mean"))


def _paradigm(arm: str) -> str:
    """`opd-half` is OPD with a control."""
    first = arm.partition("-")[0]
    return first if first in ARM_STYLE else arm


def _published(known: Diagnostic, variant: str) -> list[Hollow]:
    return [
        Hollow(arm_label(p.paradigm), p.relative_norm, p.value, p.null, style_of(p.paradigm))
        for p in known.published
        if p.variant == variant
    ]


def _pairs(found: Iterable[tuple[Any, ...]], leads: bool) -> list[tuple[str, str]]:
    """What has a chart, in order: of what is no size itself the charted variants, and those of which values are published; of a
    diagnostic without either its first variant."""
    of: dict[str, list[str]] = {}
    for diagnostic, variant in found:
        of.setdefault(str(diagnostic), []).append(str(variant))
    pairs = []
    for diagnostic in sorted(of, key=position):
        known, listed = about(diagnostic), [v for v in of[diagnostic] if is_listed(diagnostic, v)]
        if known.size or known.leads != leads:
            continue
        of_note = [v for v in listed if is_primary(diagnostic, v) or any(p.variant == v for p in known.published)]
        pairs += [(diagnostic, variant) for variant in of_note or listed[:1]]
    return pairs


def _made(
    view: View,
    charts_of: dict[tuple[str, str], Drawn],
    keys: list[Key],
    thirds: Sequence[tuple[str, str]],
    points: str,
    null: str,
    *,
    table: Table | None,
    distances: Distances | None = None,
) -> Sizes | None:
    if not charts_of:
        return None
    made = []
    for (diagnostic, variant), drawn in charts_of.items():
        known = about(diagnostic)
        name = f"size-{slug(diagnostic)}-{slug(variant)}".rstrip("-")
        title = label(diagnostic, variant) + AXIS.get(known.unit, "")
        alt = f"{title} against the {SIZE[0].title.lower()}"
        if drawn.whole is not None:
            alt += f": mean {number(drawn.whole[1], known.unit)}"
            alt += f", null {number(drawn.whole[2], known.unit)}" if drawn.whole[2] is not None else ""
        scale = scale_of(diagnostic)
        axes = [scale, *([replace(scale, log=False)] if scale.log else [])]
        shown = [
            view.draw(
                over_size(
                    name if axis == scale else f"{name}-linear",
                    title,
                    axis,
                    drawn.points,
                    drawn.band,
                    drawn.hollow,
                    size=SIZE[0].title.lower(),
                    whole=drawn.whole,
                    alt=alt,
                )
            )
            for axis in axes
        ]
        made.append((shown[0], shown[1] if len(shown) > 1 else None))
    published = any(d.hollow for d in charts_of.values())
    has_null = any(d.band for d in charts_of.values())
    return Sizes(made, keys, thirds, points, null if has_null else "", published, table, distances)


FIRST = Section("sizes", "How much size explains", "Size", partial(find, leads=True))
OTHERS = Section("sizes-others", "The other diagnostics over size", "", partial(find, leads=False))

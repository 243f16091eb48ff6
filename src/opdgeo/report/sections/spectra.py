"""Singular values of the updates against those of a Gaussian one, and how one matrix changed."""

from __future__ import annotations

import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS
from opdgeo.report import charts
from opdgeo.report.charts import style_of
from opdgeo.report.data import collected
from opdgeo.report.glossary import arm_label, clean
from opdgeo.report.sections.section import Figure, Section, View, which
from opdgeo.report.sections.sizes import SIZE
from opdgeo.report.view import slug

FILE = "curves.parquet"
DRAWN = 40
"""Spectra of an arm that are drawn: enough to see the spread, and the page stays small."""


def find(view: View) -> list[Figure] | None:
    groups = []
    for arm, checkpoint in view.last.items():
        moved = view.final(pl.col("checkpoint") == checkpoint, *which(SIZE[0].name, SIZE[1]), pl.col("value") > 0)
        some = moved[:: -(-len(moved) // DRAWN) or 1]
        shapes = {m: (rows, cols) for m, rows, cols in some.select("matrix", "rows", "cols").iter_rows()}
        curves = view.results.curves.filter(pl.col("checkpoint") == checkpoint, pl.col("curve") == "sigma_update")
        chosen = curves.filter(pl.col("matrix").is_in(list(shapes))).select("matrix", "values")
        part = collected(chosen, FILE)
        if len(part):
            groups.append(
                (
                    arm_label(arm) if arm else "median matrix",
                    style_of(arm, view.arms) if arm else 0,
                    part["values"].to_list(),
                    [shapes[m] for m in part["matrix"]],
                )
            )
    if not groups:
        return None
    out = [view.draw(charts.update_spectra("spectra-updates", "Singular values of ΔW, σᵢ / ‖ΔW‖F", groups))]
    for arm in view.last:
        out += _typical_matrix(arm, view)
    return out


def _typical_matrix(arm: str, view: View) -> list[Figure]:
    """Of the matrix whose singular values moved by the median amount."""
    moved = next(name for name, d in DIAGNOSTICS.items() if "sigma_tuned" in d.curves)
    rows = view.final(
        pl.col("checkpoint") == view.last[arm], pl.col("diagnostic") == moved, pl.col("value").is_finite()
    ).sort("value", "matrix")
    if rows.is_empty():
        return []
    matrix = rows["matrix"][len(rows) // 2]
    its_own = (pl.col("checkpoint") == view.last[arm]) & (pl.col("matrix") == matrix)
    found = dict(collected(view.results.curves.filter(its_own).select("curve", "values"), FILE).rows())
    if not all(found.get(c) for c in ("sigma_base", "sigma_tuned", "sigma_update")):
        return []
    three = (found["sigma_base"], found["sigma_tuned"], found["sigma_update"])
    who = f"{arm_label(arm)}. " if arm else ""
    tag = f"-{slug(arm)}" if arm else ""
    out = []
    if not arm:
        out.append(view.draw(charts.spectra("spectra-matrix", f"Singular values of {clean(matrix, 40)}", *three)))
    title = f"{who}Shift of {clean(matrix, 40)}"
    out.append(view.draw(charts.spectrum_shift(f"spectra-shift{tag}", title, *three)))
    return out


SECTION = Section("spectra", "Spectra", "Spectra", find)

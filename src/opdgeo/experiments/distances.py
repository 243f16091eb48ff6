"""How far every arm is from the null of its own size, with an interval over seeds. It reports: no rule reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from opdgeo.experiments.rules import ANGLES, HILL, LOW, NORM, QUANTITIES, SHIFT, SPARSITY, STABLE_RANK
from opdgeo.experiments.statistics import t_interval

APART = (SPARSITY, ANGLES, SHIFT, LOW, STABLE_RANK, HILL)
"""Quantities of the tables that people read, in order."""


def from_null(rows: pl.DataFrame, of: Sequence[str] = ("arm",)) -> pl.DataFrame:
    """The distance at every checkpoint that all seeds of an arm share: the data of the chart over size.

    Columns: those of `of`, `step`, `name` (of the quantity), `seeds` (how many), `norm` (mean ‖ΔW‖_F), `value`, `null`, `ratio`, `excess`
    (value over null where `ratio`, else value minus null), and `low` and `high`, the 95 % t interval of the excess over seeds, null for
    one seed.

    Args:
        rows: those of `reduced.reduced`.
        of: the columns that tell arms apart.
    """
    compared = [q for q in QUANTITIES if q is not NORM]
    excesses = rows.filter(pl.col("excess").is_finite(), pl.col("name").is_in([q.name for q in compared]))
    norms = rows.filter(pl.col("name") == NORM.name).select(*of, "seed", "step", norm="value")
    together = excesses.join(norms, on=[*of, "seed", "step"]).group_by(*of, "step", "name", maintain_order=True)
    means = together.agg(pl.len().alias("seeds"), pl.col("norm", "value", "null").mean(), each=pl.col("excess")).filter(
        pl.col("seeds") == pl.col("seeds").max().over(*of, "name")
    )
    log = {q.name: q.ratio for q in compared}
    found = []
    for name, each in means.select("name", "each").iter_rows():
        values = np.log(each) if log[name] else np.array(each)
        ends = [x if np.isfinite(x) else None for x in (values.mean(), *t_interval(values))]
        found.append([x if x is None else float(np.exp(x) if log[name] else x) for x in ends])
    columns = {
        key: pl.Series([one[place] for one in found], dtype=pl.Float64)
        for place, key in enumerate(("excess", "low", "high"))
    }
    return means.drop("each").with_columns(ratio=pl.col("name").replace_strict(log, return_dtype=pl.Boolean), **columns)


def at_the_end(distances: Iterable[dict[str, Any]], of: Sequence[str] = ("arm",)) -> list[dict[str, Any]]:
    """Of the rows of `from_null` those of each arm's last checkpoint, of the quantities that people read."""
    shown, last = {q.name for q in APART}, dict[tuple[Any, ...], dict[str, Any]]()
    for row in sorted((row for row in distances if row["name"] in shown), key=lambda row: row["step"]):
        last[(*(row[key] for key in of), row["name"])] = row
    return list(last.values())

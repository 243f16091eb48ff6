"""The experts of a mixture, those that moved furthest first."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from opdgeo.report.data import collected
from opdgeo.report.glossary import about, expert_of, is_primary, label
from opdgeo.report.sections.section import Section, View, which

FILE = "measurements.parquet"
FURTHEST = 20
"""Experts of an arm that are listed; the charts and maps show how all are distributed."""

Key = tuple[str, str]
"""Diagnostic and variant."""


@dataclass(frozen=True)
class Expert:
    layer: int | None
    number: int | None
    role: str
    values: dict[Key, float | None]


@dataclass(frozen=True)
class Block:
    """The experts of one arm; `columns` holds key, name and unit, `total` counts all experts' matrices."""

    arm: str
    columns: list[tuple[Key, str, str]]
    rows: list[Expert]
    total: int


def find(view: View) -> list[Block] | None:
    blocks = []
    experts = pl.col("matrix").str.contains(r"\.experts\.\d+\.")
    for arm, checkpoint in view.last.items():
        table = view.results.measurements.filter(pl.col("checkpoint") == checkpoint, experts)
        pairs = [pair for pair in view.measured if is_primary(*pair)]
        size = next((p for p in pairs if about(p[0]).size), None)
        if size is None:
            names = collected(table.select("matrix").unique(maintain_order=True), FILE)["matrix"]
        else:
            sizes = table.filter(*which(*size)).select("matrix", "value")
            ranked = sizes.sort("value", descending=True, nulls_last=True, maintain_order=True)
            names = collected(ranked, FILE)["matrix"]
        first = names.head(FURTHEST).to_list()
        found: dict[str, Expert] = {}
        for row in collected(table.filter(pl.col("matrix").is_in(first)), FILE).iter_rows(named=True):
            expert = Expert(row["layer"], expert_of(row["matrix"]), row["role"], {})
            found.setdefault(row["matrix"], expert).values[row["diagnostic"], row["variant"]] = row["value"]
        if found:
            columns: list[tuple[Key, str, str]] = [
                ((pair[0], pair[1]), label(*pair), about(pair[0]).unit) for pair in pairs
            ]
            blocks.append(Block(arm, columns, [found[name] for name in first], len(names)))
    return blocks or None


SECTION = Section("experts", "Experts", "Experts", find)

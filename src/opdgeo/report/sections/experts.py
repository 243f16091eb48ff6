"""The experts of a mixture, those that moved furthest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from opdgeo.diagnostics import Diagnostic
from opdgeo.report.glossary import about, expert_of, is_primary, label
from opdgeo.report.sections.section import MAX_LISTED, Section, View

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
    for arm, checkpoint in view.last.items():
        table = view.final.filter(
            (pl.col("checkpoint") == checkpoint) & pl.col("matrix").str.contains(r"\.experts\.\d+\.")
        )
        columns: dict[Key, Diagnostic] = {}
        found: dict[str, Expert] = {}
        for row in table.to_dicts():
            key = (row["diagnostic"], row["variant"])
            if is_primary(*key):
                columns[key] = about(key[0])
                expert = Expert(row["layer"], expert_of(row["matrix"]), row["role"], {})
                found.setdefault(row["matrix"], expert).values[key] = row["value"]
        if found:
            size: Any = next((key for key, known in columns.items() if known.size), None)
            rows = sorted(found.values(), key=lambda e: -(e.values.get(size) or 0.0))
            names = [(key, label(*key), known.unit) for key, known in columns.items()]
            blocks.append(Block(arm, names, rows[:MAX_LISTED], len(rows)))
    return blocks or None


SECTION = Section("experts", "Experts", "Experts", find)

"""Every diagnostic: its table against the null, what it says of itself, and its distribution over matrices."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic
from opdgeo.report import charts
from opdgeo.report.charts import Group, style_of
from opdgeo.report.glossary import about, arm_label, is_listed, label, position, role_order, variant_label
from opdgeo.report.sections.section import Figure, Section, View, compares_itself, scale_of
from opdgeo.report.sections.subject import Subject
from opdgeo.report.view import slug


@dataclass(frozen=True)
class Block:
    """One diagnostic; `reasons` says why it is undefined in places."""

    about: Diagnostic
    charts: list[Figure] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Values:
    """`by_entries` names the diagnostics whose mean is over entries; `other_arms` counts the arms that are not shown."""

    subjects: list[Subject]
    blocks: list[Block]
    by_entries: list[str]
    other_arms: int


def find(view: View) -> Values:
    return Values(
        subjects=view.subjects,
        blocks=_blocks(view),
        by_entries=[d.title.lower() for d in DIAGNOSTICS.values() if d.weighting == "entries"],
        other_arms=len({arm for arm, _ in view.everything.runs()} - set(view.arms)),
    )


def _blocks(view: View) -> list[Block]:
    """The distribution of each variant over matrices, beside the null: by arm, or by role where there is one update."""
    blocks: dict[str, Block] = {}
    pairs = view.final.select("diagnostic", "variant").unique(maintain_order=True).rows()
    for diagnostic, variant in sorted(pairs, key=lambda p: position(p[0])):
        known = about(diagnostic)
        block = blocks.setdefault(diagnostic, Block(known))
        rows = view.final.filter((pl.col("diagnostic") == diagnostic) & (pl.col("variant") == variant))
        block.reasons.extend(r for r in _reasons(rows) if r not in block.reasons)
        rows = rows.filter((pl.col("status") == "computed") & pl.col("value").is_finite())
        if not is_listed(diagnostic, variant) or rows.is_empty() or compares_itself(diagnostic, rows):
            continue
        if len(view.last) > 1:
            groups = [
                _group(arm_label(arm), rows.filter(pl.col("checkpoint") == checkpoint), style_of(arm, view.arms))
                for arm, checkpoint in view.last.items()
            ]
        else:
            roles = role_order(set(rows["role"].to_list()))
            groups = [_group(role, rows.filter(pl.col("role") == role), 0) for role in roles]
        title = label(diagnostic, variant)
        name = f"distribution-{slug(diagnostic)}-{slug(variant)}".rstrip("-")
        caption = variant_label(diagnostic, variant) or known.title
        unit = {"share": "%", "degrees": "degrees"}.get(known.unit, "")
        block.charts.append(view.draw(charts.distribution(name, title, scale_of(diagnostic), groups, unit, caption)))
    return list(blocks.values())


def _group(name: str, rows: pl.DataFrame, style: int) -> Group:
    nulls = rows.filter(pl.col("null_mean").is_finite())
    rows = rows if nulls.is_empty() else nulls  # as in the tables: matrices that did not move have no null
    return Group(
        name, rows["value"].to_list(), nulls["null_mean"].to_list(), nulls["null_std"].fill_null(0.0).to_list(), style
    )


def _reasons(rows: pl.DataFrame) -> list[str]:
    undefined = rows.filter(pl.col("status") == "undefined")
    return [str(r) for r in undefined["reason"].drop_nulls().unique(maintain_order=True).to_list()][:3]


SECTION = Section("diagnostics", "Diagnostics against their nulls", "Diagnostics", find)

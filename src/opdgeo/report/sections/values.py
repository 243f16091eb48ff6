"""Every diagnostic: its table against the null, what it says of itself, and its distribution over matrices."""

from __future__ import annotations

from dataclasses import dataclass, field

import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic
from opdgeo.report import charts
from opdgeo.report.charts import Group, style_of
from opdgeo.report.glossary import about, arm_label, is_listed, label, role_order, variant_label
from opdgeo.report.sections.section import Figure, Section, View, compares_itself, scale_of, with_values
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
    """Attributes:
    by_entries: titles of the diagnostics whose mean is over entries.
    other_arms: how many arms are not shown.
    above: whether the charts over size stand for the distributions. Those are in figures/ then.
    dots: how many matrices of a row are drawn one by one.
    """

    subjects: list[Subject]
    blocks: list[Block]
    by_entries: list[str]
    other_arms: int
    above: bool
    dots: int = charts.DOTS


def find(view: View) -> Values:
    above = view.kind == "compare" and not view.subjects[0].still
    return Values(
        subjects=view.subjects,
        blocks=_blocks(view, above),
        by_entries=[d.title.lower() for d in DIAGNOSTICS.values() if d.weighting == "entries"],
        other_arms=len({arm for arm, _ in view.everything.runs()} - set(view.arms)),
        above=above,
    )


def _blocks(view: View, above: bool) -> list[Block]:
    """The distribution of each variant over matrices, beside the null: by arm, or by role where there is one update."""
    blocks: dict[str, Block] = {}
    for diagnostic, variant, rows in view.parts:
        known = about(diagnostic)
        block = blocks.setdefault(diagnostic, Block(known))
        block.reasons.extend(r for r in _reasons(rows) if r not in block.reasons)
        rows = with_values(rows)
        if not is_listed(diagnostic, variant) or rows.is_empty() or compares_itself(diagnostic, rows):
            continue
        if len(view.last) > 1:
            groups = [
                _group(arm_label(arm), rows.filter(pl.col("checkpoint") == checkpoint), style_of(arm, view.arms))
                for arm, checkpoint in view.last.items()
            ]
        else:
            by_role = rows.partition_by("role", as_dict=True)
            groups = [_group(role, by_role[(role,)], 0) for role in role_order({role for (role,) in by_role})]
        title = label(diagnostic, variant)
        name = f"distribution-{slug(diagnostic)}-{slug(variant)}".rstrip("-")
        caption = variant_label(diagnostic, variant) or known.title
        unit = {"share": "%", "degrees": "degrees"}.get(known.unit, "")
        chart = charts.distribution(name, title, scale_of(diagnostic), groups, unit, caption)
        if above:
            view.keep(chart)
        else:
            block.charts.append(view.draw(chart))
    return list(blocks.values())


def _group(name: str, rows: pl.DataFrame, style: int) -> Group:
    nulls = rows.filter(pl.col("null_mean").is_finite())
    rows = rows if nulls.is_empty() else nulls  # as in the tables: matrices that did not move have no null
    stds = nulls["null_std"].fill_null(0.0)
    return Group(name, rows["value"].to_numpy(), nulls["null_mean"].to_numpy(), stds.to_numpy(), style)


def _reasons(rows: pl.DataFrame) -> list[str]:
    undefined = rows.filter(pl.col("status") == "undefined")
    return [str(r) for r in undefined["reason"].drop_nulls().unique(maintain_order=True).to_list()][:3]


SECTION = Section("diagnostics", "Diagnostics against their nulls", "Diagnostics", find)

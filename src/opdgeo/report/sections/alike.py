"""How alike the last updates of a study's arms are: a sentence a pair, matrices of pairs, every number over the seeds. No verdict."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.diagnostics.diagnostic import Diagnostic, Part
from opdgeo.report import limits
from opdgeo.report.pairs import Pairs, of_study
from opdgeo.report.pairs_page import matrix
from opdgeo.report.sections.section import Section, View
from opdgeo.report.verdict import Finding


@dataclass(frozen=True)
class Group:
    """Updates of one base.

    Attributes:
        names: in the order of the clustering.
        sentences: one a pair, the most alike first; of one arm in several seeds those of the most and the least alike.
        beside: the same of pairs with a noise arm.
        matrices: one a number, of three updates or more.
        columns, rows: the table: of each pair its names, the seeds, and a finding a column, or None.
    """

    names: list[str]
    sentences: list[list[Part]]
    beside: list[list[Part]]
    matrices: list[dict[str, Any]]
    columns: list[tuple[Diagnostic, str]]
    rows: list[tuple[str, str, int, list[Finding | None]]]


@dataclass(frozen=True)
class Alike:
    """The arms of one anchor, and one arm in several seeds."""

    arms: Group | None
    seeds: Group | None


def find(view: View) -> Alike | None:
    between, among = of_study(view.claims)
    if not between.names and not among.names:
        return None
    ranked, noise = between.by_likeness(), set(limits.ARMS.values())
    every = [*ranked, *(pair for pair in between.unordered() if pair not in ranked)]
    said: dict[bool, list[list[Part]]] = {False: [], True: []}
    for pair in every:
        said[bool(set(pair) & noise)].append(between.said(*pair))
    arms = _group(between, said[False], said[True]) if between.names else None
    return Alike(arms, _group(among, among.sentences(), []) if among.names else None)


def _group(pairs: Pairs, sentences: list[list[Part]], beside: list[list[Part]]) -> Group:
    columns, names = pairs.columns(), pairs.ordered()
    rows = []
    for pair in pairs.by_likeness() or pairs.unordered():
        cells = [pairs.cell(*pair, d.name, variant) for d, variant in columns]
        found = [None if cell is None else cell.found for cell in cells]
        rows.append((*pair, max(len(one.row["seeds"]) for one in found if one), found))
    matrices = [matrix(pairs, d, variant) for d, variant in columns] if len(names) > 2 else []
    return Group(names, sentences, beside, matrices, columns, rows)


SECTION = Section("alike", "Do these updates move alike?", "Pairs", find)

"""What a section of the page is, and what all of them are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import polars as pl
from markupsafe import Markup

from opdgeo.report import charts
from opdgeo.report.charts import Chart, Scale
from opdgeo.report.data import Results, collected
from opdgeo.report.glossary import ARMS, about, arm_of, position, split_seed
from opdgeo.report.sections.subject import Subject, subject_of

Data = TypeVar("Data")

AXIS = {"share": ", %", "degrees": ", degrees"}
"""The unit behind the name of an axis."""

MAX_LISTED = 60
"""Skipped matrices and unmatched tensors listed by name; the data files hold all."""


@dataclass(frozen=True)
class Figure:
    """A chart as it stands in the page. It is drawn when a template asks for it."""

    chart: Chart

    @property
    def svg(self) -> Markup:
        return Markup(charts.inline_svg(self.chart))

    @property
    def caption(self) -> str:
        return self.chart.caption


@dataclass(frozen=True)
class View:
    """The results as the page shows them.

    Attributes:
        everything: all that the data files hold.
        results: the same, a study with controls cut to its four main arms. The other arms are judged in the claims.
        charts: every chart, in the order of the page; `draw` adds one to the page, `keep` to figures/ alone.
    """

    everything: Results
    charts: list[Chart] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.everything.kind

    @property
    def run(self) -> dict[str, Any]:
        return self.everything.run

    @property
    def claims(self) -> dict[str, Any]:
        return self.everything.claims or {}

    @property
    def seeds(self) -> list[int]:
        return self.claims.get("seeds") or []

    @cached_property
    def results(self) -> Results:
        return _main_arms(self.everything)

    @cached_property
    def runs(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        return self.results.runs()

    @cached_property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for arm, _ in self.runs))

    @cached_property
    def subjects(self) -> list[Subject]:
        """The last update of the first seed of every arm; the one update or run where there are no arms."""
        first = {arm: min(s for a, s in self.runs if a == arm) for arm in self.arms}
        return [subject_of(arm, run) for (arm, seed), run in self.runs.items() if seed == first[arm]]

    @cached_property
    def last(self) -> dict[str, str]:
        """Arm → its last checkpoint."""
        return {s.arm: s.name for s in self.subjects}

    def final(self, *wanted: pl.Expr) -> pl.DataFrame:
        """The measurements of these last checkpoints for which all of `wanted` hold."""
        return self.results.rows(pl.col("checkpoint").is_in(list(self.last.values())), *wanted)

    @cached_property
    def measured(self) -> list[tuple[str, str]]:
        """Every diagnostic and variant, in the order of tables and charts."""
        pairs = self.results.measurements.select("diagnostic", "variant").unique(maintain_order=True)
        return sorted(collected(pairs, "measurements.parquet").rows(), key=lambda pair: position(pair[0]))

    @property
    def parts(self) -> Iterator[tuple[str, str, pl.DataFrame]]:
        """`final` by diagnostic and variant, one after the other."""
        for pair in self.measured:
            yield *pair, self.final(*which(*pair))

    def draw(self, chart: Chart) -> Figure:
        self.charts.append(chart)
        return Figure(chart)

    def keep(self, chart: Chart) -> None:
        """Add a chart for figures/ only: the page shows the same as a table."""
        self.charts.append(chart)


@dataclass(frozen=True)
class Section(Generic[Data]):
    """One section of the page. A new one is an object in `page.SECTIONS`.

    Attributes:
        id: its anchor; its template is `sections/ID.html.j2`, which finds the section's data as `data` and the View as `view`.
        title: its heading.
        link: its name in the navigation.
        find: what it shows; None where the section does not apply to these results.
    """

    id: str
    title: str
    link: str
    find: Callable[[View], Data | None]


def _main_arms(results: Results) -> Results:
    """A study with controls, cut to its four main arms. The data files hold the others' rows."""
    kept = {arm for arm, _ in results.runs()} & set(ARMS)
    if results.kind != "reproduce" or not kept:
        return results
    names = [c["checkpoint"] for c in results.summary if arm_of(c["checkpoint"])[0] in kept]
    return replace(
        results,
        measurements=results.measurements.filter(pl.col("checkpoint").is_in(names)),
        curves=results.curves.filter(pl.col("checkpoint").is_in(names)),
        summary=[c for c in results.summary if arm_of(c["checkpoint"])[0] in kept],
        logs={folder: rows for folder, rows in results.logs.items() if split_seed(folder)[0] in kept},
    )


def which(diagnostic: str, variant: str) -> tuple[pl.Expr, pl.Expr]:
    """The rows of one diagnostic and variant."""
    return pl.col("diagnostic") == diagnostic, pl.col("variant") == variant


def with_values(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.filter((pl.col("status") == "computed") & pl.col("value").is_finite())


def compares_itself(diagnostic: str, rows: pl.DataFrame) -> bool:
    """The last checkpoint compared with itself: 1 everywhere, nothing to draw."""
    return about(diagnostic).itself is not None and bool(((rows["value"] - 1).abs() < 1e-9).all())


def scale_of(diagnostic: str) -> Scale:
    known = about(diagnostic)
    return Scale(known.unit, known.log)

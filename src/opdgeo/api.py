"""Measuring and reporting in one object: what `opdgeo.compare`, `track`, `relate` and `load` return can write its own page.

The survey knows nothing of the report, so the two are joined here, above both.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import cached_property, wraps
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from opdgeo import survey

if TYPE_CHECKING:
    from opdgeo.report.charts import Chart

P = ParamSpec("P")


class Result(survey.Result):
    """What `compare`, `track`, `relate` and `load` return, and what the data files hold."""

    def report(self, path: str | Path) -> Path:
        """Write the data files and `report.html` into the folder `path`; returns the page's path."""
        from opdgeo.report import write_report

        self.save(path)
        return write_report(Path(path))

    @cached_property
    def charts(self) -> dict[str, Chart]:
        """The charts of the page by name, in its order. A notebook shows one as it is; `.figure()` makes a matplotlib figure of it."""
        from opdgeo.report.notebook import charts

        return charts(self)

    def __repr__(self) -> str:
        """What a terminal shows: the short table that the command prints, 80 columns wide."""
        from rich.console import Console

        from opdgeo.report.pairs import print_pairs
        from opdgeo.report.terminal import print_summary

        shown = io.StringIO()
        console = Console(file=shown, width=80, color_system=None)
        if "pairs" in self.summary:
            print_pairs(self.summary, console)
        else:
            print_summary(self.summary, console, everything=False)
        return shown.getvalue().rstrip()

    def _repr_html_(self) -> str:
        """What a notebook shows: a short table of the means beside their nulls."""
        from opdgeo.report.notebook import table

        return table(self)


def _reporting(measure: Callable[P, survey.Result]) -> Callable[P, Result]:
    @wraps(measure)
    def measured(*args: P.args, **keywords: P.kwargs) -> Result:
        found = measure(*args, **keywords)
        return Result(found.measurements, found.curves, found.summary, found.run)

    return measured


compare = _reporting(survey.compare)
load = _reporting(survey.load_result)
relate = _reporting(survey.relate)
track = _reporting(survey.track)

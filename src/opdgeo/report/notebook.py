"""A result in a notebook: a short table as HTML, and its charts by name."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from opdgeo.diagnostics import of_pairs
from opdgeo.errors import ConfigError
from opdgeo.report import page, pairs_page
from opdgeo.report.charts import Chart
from opdgeo.report.data import Results, pairs_of, runs, summary_of, whole_runs
from opdgeo.report.glossary import ARMS, is_primary
from opdgeo.report.pairs import Pairs
from opdgeo.report.terminal import unmoved_text
from opdgeo.report.verdict import answers, find, findings, unmoved
from opdgeo.report.view import embedded, environment
from opdgeo.survey.results import Result

MOST = 12
"""Arms or pairs of a table; the summary has all."""


class Charts(dict[str, Chart]):
    """Charts by name, in the order of the page.

    Raises:
        ConfigError: a name that the page does not have is asked for.
    """

    def __missing__(self, name: str) -> Chart:
        near = difflib.get_close_matches(str(name), self, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "`list(result.charts)` has all."
        raise ConfigError(
            f"this result has no chart {name!r}; expected a name such as {', '.join(list(self)[:3])}. {hint}"
        )


def charts(result: Result) -> Charts:
    """The charts of the result's page by name, in the order of the page."""
    results = _results(result)
    found = pairs_page.charts_of(results) if results.kind == "relate" else page.charts_of(results)
    return Charts((chart.name, chart) for chart in found)


def table(result: Result) -> str:
    """The means of the last checkpoint beside their nulls; of several updates a line a pair, of several arms a column an arm."""
    summary = result.summary
    base = str((result.run.get("base") or {}).get("path", "base"))
    if summary.get("pairs"):
        content = _of_pairs(summary)
    else:
        by_run = runs(summary_of(summary, _HERE))
        arms = [arm for arm, seed in by_run if seed == 0]
        content = _of_arms(by_run, arms) if len(arms) > 1 else _of_run(next(iter(by_run.values())), summary)
    empty: dict[str, Any] = dict.fromkeys(("answers", "notices", "pairs", "arms"), ())
    template = environment().get_template("notebook.html.j2")
    return embedded(template.render(empty | {"sub": f"from {base}"} | content))


_HERE = Path("summary")  # what messages name in place of a file


def _results(result: Result) -> Results:
    summary = result.summary
    return Results(
        result.measurements.lazy(),
        result.curves.lazy(),
        summary_of(summary, _HERE),
        result.run,
        whole=whole_runs(summary, _HERE),
        pairs=pairs_of(summary, _HERE),
    )


def _of_run(checkpoints: list[dict[str, Any]], summary: dict[str, Any]) -> dict[str, Any]:
    last = checkpoints[-1]
    still = unmoved(last)
    return {
        "title": last["checkpoint"],
        "answers": answers(checkpoints, whole_runs(summary, _HERE)) if len(checkpoints) > 1 else (),
        "notices": [unmoved_text(still, last)] if still else (),
        "findings": [f for f in findings(last) if is_primary(f.diagnostic, f.variant)],
    }


def _of_arms(by_run: dict[tuple[str, int], list[dict[str, Any]]], arms: list[str]) -> dict[str, Any]:
    shown = ([arm for arm in ARMS if arm in arms] or arms)[:MOST]
    last = [by_run[arm, 0][-1] for arm in shown]
    rows = [f for f in findings(last[0]) if is_primary(f.diagnostic, f.variant)]
    return {
        "title": f"{len(arms)} arms",
        "arms": shown,
        "rows": [(f, [find(c, f.diagnostic, f.variant) for c in last]) for f in rows],
    }


def _of_pairs(summary: dict[str, Any]) -> dict[str, Any]:
    pairs = Pairs(pairs_of(summary, _HERE))
    heads = [(d, d.headline) for d in of_pairs().values() if d.headline]
    ranked = pairs.by_likeness() or pairs.unordered()
    lines = []
    for pair in ranked[:MOST]:
        cells = [(pairs.cell(*pair, d.name, headline.variant), d.unit) for d, headline in heads]
        lines.append((" and ".join(pairs.short(name, 40) for name in pair), cells))
    return {
        "title": f"{len(pairs.names)} updates",
        "answers": pairs.sentences(),
        "notices": [
            f"{pairs.short(a, 40)} and {pairs.short(b, 40)}: {n} of {total} matrices did not move in one of the two."
            for a, b, n, total in pairs.still()
        ],
        "pairs": lines,
        "heads": [headline.column for _, headline in heads],
        "left": len(ranked) - len(lines),
    }

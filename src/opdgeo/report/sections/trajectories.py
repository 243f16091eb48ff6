"""Diagnostics against the step, and what the diagnostics of whole runs say."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from opdgeo.diagnostics import Diagnostic, of_runs
from opdgeo.report import charts
from opdgeo.report.charts import Series
from opdgeo.report.glossary import about, arm_label, is_primary, label, position, split_seed
from opdgeo.report.sections.over_seeds import against_step, over_seeds
from opdgeo.report.sections.section import AXIS, Figure, Section, View, scale_of
from opdgeo.report.verdict import Finding, findings
from opdgeo.report.view import slug

Checkpoints = list[dict[str, Any]]
"""The entries of one run in summary.json, in order."""


@dataclass(frozen=True)
class Row:
    """Of a run or a variant: for every threshold the step and the null's."""

    name: str
    steps: list[tuple[int | None, int | None]]


@dataclass(frozen=True)
class Part:
    """What one diagnostic of whole runs says."""

    about: Diagnostic
    charts: list[Figure]
    thresholds: list[float]
    rows: list[Row]


@dataclass(frozen=True)
class Trajectories:
    charts: list[Figure]
    whole: list[Part]


def find(view: View) -> Trajectories | None:
    if max(len(c) for c in view.runs.values()) < 2:
        return None
    drawn = _trajectories(view)
    return Trajectories(drawn, _whole_runs(view)) if drawn else None


def _trajectories(view: View) -> list[Figure]:
    """Each primary diagnostic with its null. A band is the range over seeds, or the middle 80 % of the matrices."""
    out = []
    last = [f for c in view.runs.values() for f in findings(c[-1])]
    wanted = dict.fromkeys((f.diagnostic, f.variant) for f in last if is_primary(f.diagnostic, f.variant))
    for diagnostic, variant in sorted(wanted, key=lambda p: position(p[0])):
        if view.kind == "reproduce":
            series, x_label = _of_arms(view, diagnostic, variant)
        else:
            series, x_label = _of_one_run(next(iter(view.runs.values())), diagnostic, variant)
        if series:
            known = about(diagnostic)
            title = label(diagnostic, variant) + AXIS.get(known.unit, "")
            name = f"trajectory-{slug(diagnostic)}-{slug(variant)}".rstrip("-")
            walk = known.scope == "trajectory"
            out.append(view.draw(charts.trajectory(name, title, scale_of(diagnostic), series, x_label, walk=walk)))
    return out


def _of_arms(view: View, diagnostic: str, variant: str) -> tuple[list[Series], str]:
    lines: dict[str, list[dict[int, float]]] = {}
    nulls: dict[str, list[dict[int, float]]] = {}
    for (arm, _), checkpoints in view.runs.items():
        rows = [(c.get("step", i), _row(c, diagnostic, variant)) for i, c in enumerate(checkpoints)]
        got = [(step, f) for step, f in rows if f is not None]
        lines.setdefault(arm, []).append({s: f.row["mean"] for s, f in got if f.row["mean"] is not None})
        with_null = [(s, f.null["mean"]) for s, f in got if f.null and f.null.get("mean") is not None]
        nulls.setdefault(arm, []).append(dict(with_null))
    series = over_seeds([(a, [s for s in seeds if s]) for a, seeds in lines.items()], nulls)
    return against_step(series) if series else ([], "step")


def _of_one_run(checkpoints: Checkpoints, diagnostic: str, variant: str) -> tuple[list[Series], str]:
    stepped = all(c.get("step") is not None for c in checkpoints)
    rows = [(c["step"] if stepped else i + 1, _row(c, diagnostic, variant)) for i, c in enumerate(checkpoints)]
    got = [(x, f) for x, f in rows if f is not None and f.row["mean"] is not None]
    if not got:
        return [], "step"
    band = all(f.row.get("p10") is not None and f.row.get("p90") is not None for _, f in got)
    one = Series("mean", [float(x) for x, _ in got], [f.row["mean"] for _, f in got])
    if band:
        one = replace(one, low=[f.row["p10"] for _, f in got], high=[f.row["p90"] for _, f in got])
    if not about(diagnostic).size:
        null, std = ([f.null.get(key) if f.null else None for _, f in got] for key in ("mean", "std"))
        one = replace(one, null=null, null_std=std)
    return [one], "step" if stepped else "checkpoint"


def _row(checkpoint: dict[str, Any], diagnostic: str, variant: str) -> Finding | None:
    return next((f for f in findings(checkpoint, diagnostic) if f.variant == variant), None)


def _whole_runs(view: View) -> list[Part]:
    """A part for every diagnostic of whole runs: of one run every K and side with charts, of several runs the listed one."""
    parts = []
    one = next(iter(view.runs.values())) if len(view.runs) == 1 else None
    for d in of_runs().values():
        rows = [(f"{row['side']}.{row['rank']}", row) for row in view.results.whole.get(d.name, [])]
        if not rows:
            continue
        listed = [(variant, row) for variant, row in rows if d.listed(variant)]
        out = []
        if one:
            out = _panels(about(d.of or ""), one, sorted({row["rank"] for _, row in rows}), view)
            variant, row = (listed or rows)[0]
            lines = [
                ("mean", row["step"], False),
                ("half the matrices", row["median_step"], False),
                ("null: walk", row["null_step"], True),
            ]
            title = f"{d.title}, {d.label(variant)}"
            out.append(view.draw(charts.thresholds(slug(d.name), title, row["thresholds"], lines)))
        shown = rows if one else listed
        table = [
            Row(
                d.label(variant) if one else _run_label(row["run"]),
                list(zip(row["step"], row["null_step"], strict=True)),
            )
            for variant, row in shown
        ]
        parts.append(Part(d, out, shown[0][1]["thresholds"] if shown else [], table))
    return parts


def _panels(known: Diagnostic, checkpoints: Checkpoints, ranks: list[int], view: View) -> list[Figure]:
    """The charts of one run that have a line for every K."""
    out = []
    for panel in known.panels:
        lines: dict[int, list[tuple[float, dict[str, Any]]]] = {k: [] for k in ranks}
        for n, checkpoint in enumerate(checkpoints, 1):
            step = checkpoint["step"] if checkpoint.get("step") is not None else n
            for row in checkpoint["diagnostics"]:
                k = panel.rank(row["variant"]) if row["diagnostic"] == known.name else None
                if k in lines and row["mean"] is not None:
                    lines[k].append((float(step), row))
        series = []
        for i, (k, points) in enumerate(lines.items()):
            if points:
                null = [(row["null"] or {}).get("mean") for _, row in points]
                x, y = [at for at, _ in points], [row["mean"] for _, row in points]
                series.append(Series(f"K = {k}", x, y, null=null, style=i % len(charts.SERIES)))
        if series:
            scale = scale_of(known.name)
            out.append(view.draw(charts.trajectory(panel.name, panel.title, scale, series, walk=True)))
    return out


def _run_label(run: str) -> str:
    arm, seed = split_seed(run)
    return arm_label(arm) + (f", seed {seed}" if seed else "")


SECTION = Section("trajectories", "Trajectories", "Trajectories", find)

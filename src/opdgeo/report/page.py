"""The HTML page: which numbers and charts go where. Every number passes through `_shown`, which keeps the exact value beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from importlib import resources
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup, escape

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic, of_runs
from opdgeo.report import charts, limits
from opdgeo.report.charts import Chart, Group, Scale, Series, style_of
from opdgeo.report.data import Results
from opdgeo.report.glossary import (
    ARMS,
    READINGS,
    about,
    arm_label,
    arm_of,
    arm_order,
    clean,
    expert_of,
    interval_decimals,
    is_listed,
    is_primary,
    label,
    number,
    position,
    role_order,
    split_seed,
    variant_label,
)
from opdgeo.report.terminal import OUTCOMES, control_name, unit_of
from opdgeo.report.verdict import Finding, answers, by_reading, did_not_move, findings, headlines, incomplete, unmoved

_MAX_LISTED = 60
"""Skipped matrices and unmatched tensors listed by name; the data files hold all."""


def build(results: Results) -> tuple[str, list[Chart]]:
    """The page as HTML text and the charts in it, in the order of the page."""
    made = _Charts()
    everything, results = results, _main_arms(results)
    runs = results.runs()
    arms = list(dict.fromkeys(arm for arm, _ in runs))
    subjects = [
        _subject(arm, checkpoints)
        for (arm, seed), checkpoints in runs.items()
        if seed == min(s for a, s in runs if a == arm)
    ]
    last = {s["arm"]: s["name"] for s in subjects}
    context = {
        "kind": results.kind,
        "run": results.run,
        "title": _title(results),
        "subjects": subjects,
        "answers": answers(next(iter(runs.values())), results.whole) if results.kind == "track" else [],
        "checkpoints": [c["checkpoint"] for c in next(iter(runs.values()))] if results.kind == "track" else [],
        "remarks": results.run.get("remarks") or [],
        "shared": _shared(subjects),
        "missing": _missing(subjects),
        "claims": _claims(results, made),
        "limits": _limits(results),
        "left_out": (results.claims or {}).get("left_out") or [],
        "rehearsal": (results.claims or {}).get("rehearsal", False),
        "logs": _logs(results, made),
        "outcomes": (results.claims or {}).get("outcomes") or {},
        "outcome_columns": OUTCOMES,
        "diagnostics": _diagnostics(results, last, arms, made),
        "heatmaps": _heatmaps(results, last, made),
        "experts": _experts(results, last),
        "trajectories": _trajectories(results, made),
        "whole": _whole_runs(results, made),
        "by_entries": [d.title.lower() for d in DIAGNOSTICS.values() if d.weighting == "entries"],
        "spectra": _spectra(results, last, arms, made),
        "provenance": _provenance(everything),
        "problems": _problems(everything),
        "other_arms": sorted({arm for arm, _ in everything.runs()} - set(arms)),
        "seeds": (results.claims or {}).get("seeds") or [],
        "readings": READINGS,
    }
    return environment().from_string(_resource("page.html.j2")).render(
        context, style=Markup(_resource("style.css"))
    ), made.all


def environment() -> jinja2.Environment:
    """What turns a template into a page: everything is text unless it was made here."""
    made = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {
        "num": _shown,
        "interval": _interval,
        "clean": clean,
        "arm": arm_label,
        "points": _points,
        "excess": _excess,
        "mean": _arm_mean,
        "title_of": lambda name: about(name).title,
        "formula": _formula,
        "said": lambda part: clean(part) if isinstance(part, str) else _shown(*part),
        "capitalize_first": lambda text: text[:1].upper() + text[1:],
    }
    return made


def _resource(name: str) -> str:
    return resources.files("opdgeo.report").joinpath(name).read_text(encoding="utf-8")


def _main_arms(results: Results) -> Results:
    """A study with controls, cut to its four main arms. The other arms are judged in the claims, and the data files hold their rows."""
    kept = {arm for arm, _ in results.runs()} & set(ARMS)
    if results.kind != "reproduce" or not kept:
        return results

    def main(table: pl.DataFrame) -> pl.DataFrame:
        return table.filter(pl.col("checkpoint").map_elements(lambda c: arm_of(c)[0] in kept, pl.Boolean))

    return replace(
        results,
        measurements=main(results.measurements),
        curves=main(results.curves),
        summary=[c for c in results.summary if arm_of(c["checkpoint"])[0] in kept],
        logs={folder: rows for folder, rows in results.logs.items() if split_seed(folder)[0] in kept},
    )


class _Charts:
    """Collects the charts of a page and turns each into markup."""

    def __init__(self) -> None:
        self.all: list[Chart] = []

    def add(self, chart: Chart, note: str = "") -> dict[str, Any]:
        self.all.append(chart)
        return {"svg": Markup(charts.inline_svg(chart)), "caption": chart.caption, "note": note}


def _shown(
    value: float | None, unit: str = "number", signed: bool = False, decimals: int | None = None, bare: bool = False
) -> Markup:
    """A number of the data files with its exact value in a <data> element; an en dash where there is none."""
    text = number(value, unit, signed=signed, decimals=decimals, bare=bare)
    if value is None or value != value:
        return Markup('<span class="nil">–</span>')
    return Markup('<data value="{}">{}</data>').format(repr(value), text)


def _formula(text: str) -> Markup:
    """A diagnostic's formula with its subscripts (`_x`, `_{xy}`) and superscripts (`^x`, `^{xy}`) set.

    >>> _formula("‖ΔW‖_F² / σ_{i<k}")
    Markup('‖ΔW‖<sub>F</sub>² / σ<sub>i&lt;k</sub>')
    """
    tags = {"_": "sub", "^": "sup"}
    found = re.sub(
        r"([_^])(?:\{([^}]*)\}|(\w|\*))",
        lambda m: f"<{tags[m[1]]}>{m[2] or m[3]}</{tags[m[1]]}>",
        str(escape(text)),
    )
    return Markup(found)


def _lead(checkpoint: dict[str, Any]) -> Markup:
    """The first sentence about one update: its headlines with their numbers."""
    said: list[Markup] = []
    for d, found in headlines(checkpoint):
        if d.headline is None or not d.headline.clause or found is None or found.row["mean"] is None:
            continue
        clause = _say(d.headline.clause, Markup("<strong>{}</strong>").format(_shown(found.row["mean"], found.unit)))
        null = found.null.get("mean") if found.null else None
        if d.headline.beside and null is not None:
            clause += ", " + _say(d.headline.beside, _shown(null, found.unit))
        said.append(clause)
    text = Markup("; ").join(said)
    if unmoved(checkpoint):
        return Markup("In the matrices that moved {}.").format(text)
    return Markup("{}{}.").format(text[:1].upper(), text[1:])


def _say(clause: str, number: Markup) -> Markup:
    """A part of a sentence with its number."""
    before, _, after = clause.partition("{}")
    return Markup("{}{}{}").format(before, number, after)


def _interval(low: float | None, high: float | None, unit: str = "number", signed: bool = False) -> Markup:
    if low is None or high is None:
        return Markup("")
    decimals = interval_decimals(low, high, unit)
    ends = (_shown(v, unit, signed=signed, decimals=decimals, bare=True) for v in (low, high))
    return Markup('<span class="interval">[{}, {}]</span>').format(*ends)


def _excess(null: dict[str, Any], unit: str) -> Markup:
    """The mean excess with the digits of its interval."""
    return _shown(
        null.get("excess"), unit, signed=True, decimals=interval_decimals(null.get("low"), null.get("high"), unit)
    )


def _arm_mean(got: dict[str, Any], unit: str) -> Markup:
    """The mean of an arm with the digits of its interval."""
    return _shown(got.get("mean"), unit, decimals=interval_decimals(got.get("low"), got.get("high"), unit))


def _points(unit: str) -> str:
    """Unit of a difference of two values in `unit`."""
    return "points" if unit == "share" else unit


def _title(results: Results) -> dict[str, str]:
    if results.kind == "reproduce":
        preset = (results.claims or {}).get("preset")
        return {
            "head": "SFT, OPD and RLVR: where the weights moved",
            "sub": f"opdgeo reproduce, preset {clean(preset)}" if preset else "opdgeo reproduce",
        }
    base = clean(_stem((results.run.get("base") or {}).get("path", "base")), 60)
    return {
        "head": "Where the weights moved",
        "sub": f"{base} → {clean(results.summary[-1]['checkpoint'], 60)}",
    }


def _stem(path: str) -> str:
    return re.split(r"[/\\]", str(path).rstrip("/\\"))[-1] or str(path)


def _subject(arm: str, checkpoints: list[dict[str, Any]]) -> dict[str, Any]:
    """What the verdict says about the last update of a run."""
    *earlier, checkpoint = checkpoints
    groups = by_reading(checkpoint)
    return {
        "arm": arm,
        "name": checkpoint["checkpoint"],
        "step": checkpoint.get("step"),
        "still": did_not_move(checkpoint),
        "still_moved": did_not_move(checkpoint) and not all(map(did_not_move, earlier)),
        "unmoved": unmoved(checkpoint),
        "total": max((f.row["total"] for f in findings(checkpoint)), default=0),
        "headlines": headlines(checkpoint),
        "lead": _lead(checkpoint),
        "groups": {key: _by_diagnostic(found) for key, found in groups.items()},
        "nulls": any(f.null for f in findings(checkpoint)),
        "incomplete": _incomplete(checkpoint),
        "findings": findings(checkpoint),
    }


def _by_diagnostic(found: Iterable[Finding]) -> list[dict[str, Any]]:
    grouped: dict[str, list[Finding]] = {}
    for one in found:
        grouped.setdefault(one.diagnostic, []).append(one)
    return [{"title": about(d).title, "found": rows} for d, rows in grouped.items()]


def _incomplete(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """Findings whose mean leaves matrices out, grouped by how many are there; `every` where it is all diagnostics alike."""
    grouped: dict[tuple[int, int], list[Finding]] = {}
    for found in incomplete(checkpoint):
        grouped.setdefault((found.over, found.row["total"]), []).append(found)
    most = max((len(g) for g in grouped.values()), default=0)
    return [
        {
            "over": c,
            "total": t,
            "every": len(group) == most and len(group) > len(findings(checkpoint)) / 2,
            "found": _by_diagnostic(group),
        }
        for (c, t), group in sorted(grouped.items(), key=lambda item: -len(item[1]))
    ]


def _missing(subjects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What is incomplete, arms with the same gap in one entry."""
    merged: dict[Any, dict[str, Any]] = {}
    for subject in subjects:
        for part in subject["incomplete"]:
            key = (
                part["over"],
                part["total"],
                tuple((f.diagnostic, f.variant) for g in part["found"] for f in g["found"]),
            )
            merged.setdefault(key, {**part, "arms": []})["arms"].append(subject["arm"])
    return [{**part, "arms": [a for a in part["arms"] if a]} for part in merged.values()]


def _shared(subjects: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Which diagnostics read `geometry` in every arm, in some and in none. A reading that all arms share marks no paradigm."""
    readings: dict[tuple[str, str], list[bool]] = {}
    for subject in subjects if len(subjects) > 1 else []:
        for found in subject["findings"]:
            if found.reading in ("geometry", "size", "unclear"):
                readings.setdefault((found.diagnostic, found.variant), []).append(found.reading == "geometry")
    out: dict[str, dict[str, list[str]]] = {"every": {}, "some": {}, "none": {}}
    for (diagnostic, variant), got in readings.items():
        key = "every" if all(got) and len(got) == len(subjects) else "some" if any(got) else "none"
        out[key].setdefault(about(diagnostic).title, []).append(variant_label(diagnostic, variant))
    return {
        key: [{"title": t, "details": [d for d in details if d]} for t, details in group.items()]
        for key, group in out.items()
    }


def _limits(results: Results) -> dict[str, Any]:
    """What a study can and cannot decide, and its table: each row's name and budget, then (value, null, unit) a column."""
    claims = results.claims or {}
    table = []
    for row in limits.rows(claims):
        cells = [(row.get(key), row.get(f"{key}_null"), unit) for key, _, unit in limits.COLUMNS]
        budget = {key: row.get(key) for key in ("learning_rate", "sequences")}
        name = limits.ARMS.get(row["arm"], arm_label(row["arm"]))
        table.append({"name": name, "exploratory": row.get("exploratory", False), **budget, "cells": cells})
    heads = [name for _, name, _ in limits.COLUMNS]
    return {"text": limits.paragraphs(claims), "heads": heads, "rows": table, "note": limits.note(claims)}


def _claims(results: Results, made: _Charts) -> list[dict[str, Any]]:
    """Every claim with its chart and its controls: the same rule on other comparisons."""
    out = []
    for claim in (results.claims or {}).get("claims", []):
        unit = unit_of(claim.get("unit"))
        rows = _arm_rows(claim.get("measured") or {})
        chart = None
        if any(got.get("mean") is not None for _, _, got in rows):
            axis = {"share": "%", "points": "percentage points", "degrees": "degrees"}.get(unit, "")
            panel = charts.claim_panel(f"claim-{_slug(str(claim['id']))}", clean(claim["id"]), unit, axis, rows)
            chart = made.add(panel)
        controls = [
            {
                "name": control_name(control),
                "full": control.get("control", ""),
                "verdict": control["verdict"],
                "explanation": control.get("explanation") or "",
                "rows": _arm_rows(control.get("measured") or {}),
                "unit": _control_unit(control, unit),
            }
            for control in claim.get("controls") or []
        ]
        out.append({**claim, "unit": unit, "rows": rows, "chart": chart, "controls": controls})
    return out


def _arm_rows(measured: dict[str, Any]) -> list[tuple[str, int, dict[str, Any]]]:
    known = arm_order(set(measured))
    return [(arm_label(arm), style_of(arm, known), measured[arm]) for arm in known]


def _control_unit(control: dict[str, Any], unit: str) -> str:
    """Unit of a control's values: those of the claim, unless it holds ratios to the null or differences from it."""
    name = str(control.get("control", ""))
    if "ratio to the null" in name:
        return "number"
    return _points(unit) if "difference from the null" in name else unit


def _logs(results: Results, made: _Charts) -> list[dict[str, Any]]:
    """Accuracy, distance to the teacher and completion length against the step, mean over seeds."""
    wanted = (
        ("accuracy_greedy", "Accuracy, greedy", "share", False),
        ("accuracy_sampled", "Accuracy, sampled", "share", False),
        ("kl_teacher", "KL to the teacher", "number", False),
        ("completion_length", "Completion length", "number", False),
    )
    grouped: dict[str, list[list[dict[str, Any]]]] = {}
    for folder, rows in results.logs.items():
        grouped.setdefault(split_seed(folder)[0], []).append(
            [r for r in rows if r.get("event") == "eval" and r.get("step") is not None]
        )
    out = []
    for key, title, unit, log in wanted:
        lines = []
        for arm in arm_order(set(grouped)):
            seeds = [{r["step"]: r[key] for r in rows if r.get(key) is not None} for rows in grouped[arm]]
            lines.append((arm, [s for s in seeds if s]))
        series = _series_over_seeds(lines)
        if series:
            unit_title = {"kl_teacher": ", nats", "completion_length": ", tokens"}.get(key, ", %")
            chart = charts.trajectory(f"log-{key}", title + unit_title, Scale(unit, log), *_against_step(series))
            out.append(made.add(chart))
    return out


def _series_over_seeds(
    lines: list[tuple[str, list[dict[int, float]]]], nulls: dict[str, list[dict[int, float]]] | None = None
) -> list[Series]:
    known = [arm for arm, _ in lines]
    out = []
    for arm, seeds in lines:
        steps = sorted(set.intersection(*(set(s) for s in seeds))) if seeds else []
        if not steps:
            continue
        columns = [[s[t] for s in seeds] for t in steps]
        spread = len(seeds) > 1
        null = None
        if nulls and nulls.get(arm):
            null = [_mean([n[t] for n in nulls[arm] if t in n]) for t in steps]
        low, high = ([of(c) for c in columns] if spread else None for of in (min, max))
        means = [sum(c) / len(c) for c in columns]
        line = Series(arm_label(arm), [float(t) for t in steps], means, low=low, high=high, null=null)
        out.append(replace(line, style=style_of(arm, known)))
    return out


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _against_step(series: list[Series]) -> tuple[list[Series], str]:
    """Arms of different length are drawn against the share of their training, so that one does not squeeze the others."""
    ends = {s.x[-1] for s in series}
    if len(ends) < 2 or min(ends) <= 0:
        return series, "step"
    return [replace(s, x=[x / s.x[-1] for x in s.x]) for s in series], "share of the arm's training, %"


def _diagnostics(results: Results, last: dict[str, str], arms: list[str], made: _Charts) -> list[dict[str, Any]]:
    """One block a diagnostic: what it says of itself, and the distribution of each variant over matrices, beside the null."""
    many = len(last) > 1
    table = results.measurements.filter(pl.col("checkpoint").is_in(list(last.values())))
    present = dict.fromkeys(
        (r["diagnostic"], r["variant"])
        for r in table.select("diagnostic", "variant").unique(maintain_order=True).to_dicts()
    )
    blocks: dict[str, dict[str, Any]] = {}
    for diagnostic, variant in sorted(present, key=lambda p: position(p[0])):
        known = about(diagnostic)
        block = blocks.setdefault(diagnostic, {"about": known, "charts": [], "reasons": []})
        rows = table.filter((pl.col("diagnostic") == diagnostic) & (pl.col("variant") == variant))
        block["reasons"] += [r for r in _reasons(rows) if r not in block["reasons"]]
        rows = rows.filter((pl.col("status") == "computed") & pl.col("value").is_finite())
        if not is_listed(diagnostic, variant) or rows.is_empty() or _is_self_comparison(diagnostic, rows):
            continue
        groups = []
        if many:
            for arm, checkpoint in last.items():
                groups.append(
                    _group(arm_label(arm), rows.filter(pl.col("checkpoint") == checkpoint), style_of(arm, arms))
                )
        else:
            groups += [
                _group(role, rows.filter(pl.col("role") == role), 0) for role in role_order(set(rows["role"].to_list()))
            ]
        title = label(diagnostic, variant)
        name = f"distribution-{_slug(diagnostic)}-{_slug(variant)}".rstrip("-")
        caption = variant_label(diagnostic, variant) or known.title
        unit = {"share": "%", "degrees": "degrees"}.get(known.unit, "")
        block["charts"].append(made.add(charts.distribution(name, title, _scale(known), groups, unit, caption)))
    return list(blocks.values())


def _is_self_comparison(diagnostic: str, rows: pl.DataFrame) -> bool:
    """The last checkpoint compared with itself: 1 everywhere, nothing to draw."""
    return about(diagnostic).itself is not None and bool(((rows["value"] - 1).abs() < 1e-9).all())


def _scale(known: Diagnostic) -> Scale:
    return Scale(known.unit, known.log)


_AXIS = {"share": ", %", "degrees": ", degrees"}
"""The unit behind the name of an axis."""


def _group(name: str, rows: pl.DataFrame, style: int) -> Group:
    nulls = rows.filter(pl.col("null_mean").is_finite())
    rows = rows if nulls.is_empty() else nulls  # as in the tables: matrices that did not move have no null
    return Group(
        name, rows["value"].to_list(), nulls["null_mean"].to_list(), nulls["null_std"].fill_null(0.0).to_list(), style
    )


def _reasons(rows: pl.DataFrame) -> list[str]:
    undefined = rows.filter(pl.col("status") == "undefined")
    return [str(r) for r in undefined["reason"].drop_nulls().unique(maintain_order=True).to_list()][:3]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-.")[:40]


def _heatmaps(results: Results, last: dict[str, str], made: _Charts) -> list[dict[str, Any]]:
    """Value and excess over the null by layer and role; with several arms one map each on one scale."""
    blocks = []
    many = len(last) > 1
    table = results.measurements.filter(
        pl.col("checkpoint").is_in(list(last.values())) & (pl.col("status") == "computed") & pl.col("value").is_finite()
    )
    if table["matrix"].n_unique() < 2:
        return []
    pairs = table.select("diagnostic", "variant").unique(maintain_order=True).rows()
    for diagnostic, variant in sorted(pairs, key=lambda p: position(p[0])):
        if not is_primary(diagnostic, variant):
            continue
        known = about(diagnostic)
        rows = table.filter((pl.col("diagnostic") == diagnostic) & (pl.col("variant") == variant))
        if _is_self_comparison(diagnostic, rows):
            continue
        roles = role_order(set(rows["role"].to_list()))
        layers = sorted(set(rows["layer"].to_list()), key=lambda x: -1 if x is None else x)
        shown = rows["value"].to_list()
        limits = (min(shown), max(shown))
        block: dict[str, Any] = {"title": label(diagnostic, variant), "charts": []}
        for arm, checkpoint in last.items():
            part = rows.filter(pl.col("checkpoint") == checkpoint)
            tag = f"-{_slug(arm)}" if many else ""
            name = f"heatmap-{_slug(diagnostic)}-{_slug(variant)}".rstrip("-") + tag
            caption = (arm_label(arm) if many else "Value") + _AXIS.get(known.unit, "")
            cells = _cells(part, known, False)
            chart = charts.heatmap(name, caption, _scale(known), cells, roles=roles, layers=layers, limits=limits)
            block["charts"].append(made.add(chart))
            with_null = part.filter(pl.col("null_mean").is_finite())
            if not many and not with_null.is_empty() and not known.size:
                caption = "Value − null" + {"share": ", percentage points", "degrees": ", degrees"}.get(known.unit, "")
                cells = _cells(with_null, known, True)
                spread = [v for v, _ in cells.values()]
                where: dict[str, Any] = {"roles": roles, "layers": layers, "limits": (min(spread), max(spread))}
                chart = charts.heatmap(name + "-excess", caption, _scale(known), cells, **where, excess=True)
                block["charts"].append(made.add(chart))
        blocks.append(block)
    return blocks


def _cells(rows: pl.DataFrame, known: Diagnostic, excess: bool) -> dict[tuple[int | None, str], tuple[float, str]]:
    """(layer, role) → value and tooltip. Several matrices may share a place: their mean gives the colour, and the tooltip says so."""
    gathered: dict[tuple[int | None, str], list[dict[str, Any]]] = {}
    for row in rows.select("layer", "role", "matrix", "value", "null_mean").to_dicts():
        gathered.setdefault((row["layer"], row["role"]), []).append(row)
    cells = {}
    for place, found in gathered.items():
        colour = sum(r["value"] - (r["null_mean"] if excess else 0) for r in found) / len(found)
        tip = f"{clean(found[0]['matrix'])}: {number(found[0]['value'], known.unit)}"
        if found[0]["null_mean"] is not None:
            tip += f", null {number(found[0]['null_mean'], known.unit)}"
        cells[place] = (
            colour,
            tip if len(found) == 1 else f"{clean(place[1])}: {_several(found)}, colour is their mean",
        )
    return cells


def _several(rows: list[dict[str, Any]]) -> str:
    return "all experts" if all(expert_of(r["matrix"]) is not None for r in rows) else "several matrices"


def _experts(results: Results, last: dict[str, str]) -> list[dict[str, Any]]:
    """The experts' matrices of every last checkpoint with their primary diagnostics, those that moved furthest first."""
    blocks = []
    for arm, checkpoint in last.items():
        table = results.measurements.filter(
            (pl.col("checkpoint") == checkpoint) & pl.col("matrix").str.contains(r"\.experts\.\d+\.")
        )
        columns: dict[tuple[str, str], Diagnostic] = {}
        found: dict[str, dict[str, Any]] = {}
        for row in table.to_dicts():
            key = (row["diagnostic"], row["variant"])
            if is_primary(*key):
                columns[key] = about(key[0])
                one = found.setdefault(row["matrix"], row | {"expert": expert_of(row["matrix"]), "values": {}})
                one["values"][key] = row["value"]
        if found:
            size = next((key for key, known in columns.items() if known.size), None)
            rows = sorted(found.values(), key=lambda r: -(r["values"].get(size) or 0.0))
            names = [(key, label(*key), known.unit) for key, known in columns.items()]
            blocks.append({"arm": arm, "columns": names, "rows": rows[:_MAX_LISTED], "total": len(rows)})
    return blocks


def _trajectories(results: Results, made: _Charts) -> list[dict[str, Any]]:
    """Each primary diagnostic against the step, with its null. A band is the range over seeds, or the middle 80 % of the matrices."""
    runs = results.runs()
    if max(len(c) for c in runs.values()) < 2:
        return []
    out = []
    wanted = dict.fromkeys(
        (f.diagnostic, f.variant) for c in runs.values() for f in findings(c[-1]) if is_primary(f.diagnostic, f.variant)
    )
    for diagnostic, variant in sorted(wanted, key=lambda p: position(p[0])):
        known = about(diagnostic)
        title = label(diagnostic, variant) + _AXIS.get(known.unit, "")
        x_label = "step"
        if results.kind == "reproduce":
            lines: dict[str, list[dict[int, float]]] = {}
            nulls: dict[str, list[dict[int, float]]] = {}
            for (arm, _), checkpoints in runs.items():
                got = [
                    (c.get("step", i), f)
                    for i, c in enumerate(checkpoints)
                    if (f := _row(c, diagnostic, variant)) is not None
                ]
                lines.setdefault(arm, []).append({s: f.row["mean"] for s, f in got if f.row["mean"] is not None})
                nulls.setdefault(arm, []).append(
                    {s: f.null["mean"] for s, f in got if f.null and f.null.get("mean") is not None}
                )
            series = _series_over_seeds([(a, [s for s in seeds if s]) for a, seeds in lines.items()], nulls)
            if series:
                series, x_label = _against_step(series)
        else:
            series, x_label = _single_run(next(iter(runs.values())), diagnostic, variant)
        if not series:
            continue
        name = f"trajectory-{_slug(diagnostic)}-{_slug(variant)}".rstrip("-")
        walk = known.scope == "trajectory"
        out.append(made.add(charts.trajectory(name, title, _scale(known), series, x_label, walk=walk)))
    return out


def _whole_runs(results: Results, made: _Charts) -> list[dict[str, Any]]:
    """A part for every diagnostic of whole runs: of one run every K and side with charts, of several runs the listed one."""
    runs, parts = results.runs(), []
    one = next(iter(runs.values())) if len(runs) == 1 else None
    for d in of_runs().values():
        rows = [(f"{row['side']}.{row['rank']}", row) for row in results.whole.get(d.name, [])]
        if not rows:
            continue
        listed = [(variant, row) for variant, row in rows if d.listed(variant)]
        out = []
        if one:
            out = _panels(about(d.of or ""), one, sorted({row["rank"] for _, row in rows}), made)
            variant, row = (listed or rows)[0]
            lines = [
                ("mean", row["step"], False),
                ("half the matrices", row["median_step"], False),
                ("null: walk", row["null_step"], True),
            ]
            title = f"{d.title}, {d.label(variant)}"
            out.append(made.add(charts.thresholds(_slug(d.name), title, row["thresholds"], lines)))
        shown = rows if one else listed
        table = [
            {
                "name": d.label(variant) if one else _run_label(row["run"]),
                "steps": list(zip(row["step"], row["null_step"], strict=True)),
            }
            for variant, row in shown
        ]
        thresholds = shown[0][1]["thresholds"] if shown else []
        parts.append({"about": d, "charts": out, "thresholds": thresholds, "rows": table})
    return parts


def _panels(
    known: Diagnostic, checkpoints: list[dict[str, Any]], ranks: list[int], made: _Charts
) -> list[dict[str, Any]]:
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
            out.append(made.add(charts.trajectory(panel.name, panel.title, _scale(known), series, walk=True)))
    return out


def _run_label(run: str) -> str:
    arm, seed = split_seed(run)
    return arm_label(arm) + (f", seed {seed}" if seed else "")


def _row(checkpoint: dict[str, Any], diagnostic: str, variant: str) -> Finding | None:
    return next((f for f in findings(checkpoint) if (f.diagnostic, f.variant) == (diagnostic, variant)), None)


def _single_run(checkpoints: list[dict[str, Any]], diagnostic: str, variant: str) -> tuple[list[Series], str]:
    stepped = all(c.get("step") is not None for c in checkpoints)
    got = [
        (c["step"] if stepped else i + 1, f)
        for i, c in enumerate(checkpoints)
        if (f := _row(c, diagnostic, variant)) is not None
    ]
    got = [(x, f) for x, f in got if f.row["mean"] is not None]
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


def _spectra(results: Results, last: dict[str, str], arms: list[str], made: _Charts) -> list[dict[str, Any]]:
    """Spectra of the updates against a Gaussian one, and how one matrix changed: the one that changed by the median amount."""
    curves = results.curves.filter(pl.col("checkpoint").is_in(list(last.values())))
    shapes = {
        (r["checkpoint"], r["matrix"]): (r["rows"], r["cols"])
        for r in results.measurements.select("checkpoint", "matrix", "rows", "cols").unique().to_dicts()
    }
    groups = []
    for arm, checkpoint in last.items():
        part = curves.filter((pl.col("checkpoint") == checkpoint) & (pl.col("curve") == "sigma_update")).to_dicts()
        part = [r for r in part if r["values"] and max(r["values"]) > 0 and (checkpoint, r["matrix"]) in shapes]
        if len(part) > 40:  # enough to see the spread; the file stays small
            part = part[:: -(-len(part) // 40)]
        if part:
            groups.append(
                (
                    arm_label(arm) if arm else "median matrix",
                    style_of(arm, arms) if arm else 0,
                    [r["values"] for r in part],
                    [shapes[checkpoint, r["matrix"]] for r in part],
                )
            )
    if not groups:
        return []
    moved = next(name for name, d in DIAGNOSTICS.items() if "sigma_tuned" in d.curves)
    out = [made.add(charts.update_spectra("spectra-updates", "Singular values of ΔW, σᵢ / ‖ΔW‖F", groups))]
    for arm, checkpoint in list(last.items()):
        rows = results.measurements.filter(
            (pl.col("checkpoint") == checkpoint) & (pl.col("diagnostic") == moved) & pl.col("value").is_finite()
        ).sort("value", "matrix")
        if rows.is_empty():
            continue
        matrix = rows["matrix"][len(rows) // 2]
        found = {
            r["curve"]: r["values"]
            for r in curves.filter((pl.col("checkpoint") == checkpoint) & (pl.col("matrix") == matrix)).to_dicts()
        }
        if not all(found.get(c) for c in ("sigma_base", "sigma_tuned", "sigma_update")):
            continue
        three = (found["sigma_base"], found["sigma_tuned"], found["sigma_update"])
        who = f"{arm_label(arm)}. " if arm else ""
        tag = f"-{_slug(arm)}" if arm else ""
        if not arm:
            out.append(made.add(charts.spectra("spectra-matrix", f"Singular values of {clean(matrix, 40)}", *three)))
        out.append(made.add(charts.spectrum_shift(f"spectra-shift{tag}", f"{who}Shift of {clean(matrix, 40)}", *three)))
    return out


def _problems(results: Results) -> list[dict[str, Any]]:
    """Matrices skipped as a whole, with the reason, first those of the newest checkpoint."""
    rows = (
        results.measurements.filter(pl.col("status") == "skipped")
        .select("checkpoint", "matrix", "reason")
        .unique(maintain_order=True)
    )
    return [dict(r) for r in rows.to_dicts()]


def _provenance(results: Results) -> dict[str, Any]:
    run = results.run
    parts = run.get("arms") or {"": {key: run.get(key) for key in ("base", "checkpoints", "pairing")}}
    manifests: list[dict[str, Any]] = []
    seen = set()
    for part in parts.values():
        for role, one in [
            ("base", part.get("base") or {}),
            *(("checkpoint", c) for c in part.get("checkpoints") or []),
        ]:
            key = (one.get("path"), one.get("checkpoint"))
            if one and key not in seen:
                seen.add(key)
                manifests.append({**one, "role": role})
    pairings = [{"arm": arm, **(part.get("pairing") or {})} for arm, part in parts.items() if part.get("pairing")]
    alike = (
        all(
            {k: v for k, v in p.items() if k != "arm"} == {k: v for k, v in pairings[0].items() if k != "arm"}
            for p in pairings
        )
        if pairings
        else False
    )
    return {
        "settings": list(_flat(run.get("settings") or {})),
        "versions": list((run.get("versions") or {}).items()),
        "timings": list(_flat(run.get("timings") or {})),
        "manifests": manifests,
        "pairings": [{**pairings[0], "arm": ""}] if alike else pairings,
        "limit": _MAX_LISTED,
        "checkpoint_arms": bool(results.claims) and any(arm_of(c["checkpoint"])[0] for c in results.summary),
    }


def _flat(data: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if not isinstance(value, list) else ", ".join(map(str, value))

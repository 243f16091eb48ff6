"""What `opdgeo signals` found, in words, in the terminal and as a page. Reads the data files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from markupsafe import Markup
from rich.console import Console
from rich.text import Text

from opdgeo.report.charts import Chart, Group, Scale, Series, distribution, inline_svg, trajectory
from opdgeo.report.data import _broken, _json, _table
from opdgeo.report.glossary import clean, number
from opdgeo.report.terminal import _new_table, print_table
from opdgeo.report.view import environment

TABLE = "signals.parquet"
NAMES = {"sft": "SFT", "opd": "OPD", "rlvr": "RLVR", "random_credit": "random credit", "weights": "weights"}
STYLES = {"sft": 1, "opd": 0, "rlvr": 2, "random_credit": 6}
OBJECTIVE_PAIRS = (("opd", "rlvr"), ("opd", "sft"), ("rlvr", "sft"))
ALIKE = 0.8  # second moments that are aligned by more have the same shape, in words
FAITHFUL = 0.5  # a split-half reliability below this is called noisy

Summary = list[dict[str, Any]]


def name_of(objective: str) -> str:
    """SFT, OPD, RLVR, random credit, OPD/RLVR mixture 0.5, top gaps 25 %, random 25 %."""
    kind, _, share = objective.partition(".")
    if share:
        return {"mixture": f"mixture {share}"}.get(
            kind
        ) or f"{'top-gap' if kind == 'top' else 'random'} {100 * float(share):g} %"
    return NAMES.get(objective) or clean(objective)


class Found:
    """The rows of one checkpoint of the summary, by what they are about."""

    def __init__(self, rows: Summary):
        self.rows = {(r["objective"], r["other"], r["quantity"], r["unit"], r["side"]): r for r in rows}

    def get(
        self, objective: str, quantity: str, other: str | None = None, side: str = "right", unit: str = "sequence"
    ) -> dict[str, Any] | None:
        row = self.rows.get((objective, other, quantity, unit, side))
        return row if row is not None and row["value"] is not None else None

    def text(self, *where: Any, unit: str = "number", **more: Any) -> str:
        """The value with its interval; an en dash where there is none."""
        row = self.get(*where, **more)
        if row is None:
            return "–"
        shown = number(row["value"], unit)
        if row["low"] is None:
            return shown
        return f"{shown} [{number(row['low'], unit, bare=True)}, {number(row['high'], unit, bare=True)}]"


def by_checkpoint(summary: Summary) -> dict[str, Found]:
    names = dict.fromkeys(r["checkpoint"] for r in summary)
    return {name: Found([r for r in summary if r["checkpoint"] == name]) for name in names}


def sentences(found: Found) -> list[str]:
    """The findings of one checkpoint in words: means over matrices, right second moments of sequence gradients."""
    said = _headline(found)
    ranks = [f"{name_of(o)} {found.text(o, 'effective_rank')}" for o in ("sft", "opd", "rlvr", "random_credit")]
    said.append(f"Directions that the gradients fill (effective rank): {', '.join(ranks)}.")
    pairs = {}
    for a, b in OBJECTIVE_PAIRS:
        if row := found.get(a, "alignment", b):
            pairs[a, b] = f"{name_of(a)} and {name_of(b)} {found.text(a, 'alignment', b)}{_noisy(row)}"
    if pairs:
        chances = [row["chance"] for a, b in pairs if (row := found.get(a, "alignment", b))]
        said.append(
            f"Alignment of second moments, 1 is the same up to size: {'; '.join(pairs.values())}; "
            f"unrelated ones would have {number(min(chances))}–{number(max(chances))}."
        )
    said += _against_random(found)
    inside = [
        f"{name_of(o)} {found.text(o, 'weight_alignment', 'weights', unit='share')}"
        for o in ("sft", "opd", "rlvr", "random_credit")
        if found.get(o, "weight_alignment", "weights")
    ]
    if inside:
        chance = next(
            r["chance"] for r in found.rows.values() if r["quantity"] == "weight_alignment" and r["side"] == "right"
        )
        said.append(
            f"Inside the weights' own leading right directions: {', '.join(inside)}; chance is {number(chance, 'share')}."
        )
    means = [
        f"{name_of(o)} {found.text(o, 'mean_share', side='', unit='share')}"
        for o in ("sft", "opd", "rlvr")
        if found.get(o, "mean_share", side="")
    ]
    if means:
        said.append(
            f"The mean gradient's part of the second moment: {', '.join(means)}; the rest differs from sample to sample."
        )
    said += _masks(found)
    said += _mixture(found)
    return said


def _headline(found: Found) -> list[str]:
    """A verdict on the shapes, by the whole interval of each alignment, and whether tokens or credit set SFT apart."""
    groups: dict[str, list[str]] = {}
    for a, b in OBJECTIVE_PAIRS:
        row = found.get(a, "alignment", b)
        if row is None or row["low"] is None:
            verdict = "cannot be compared: too little credit"
        elif (row["reliability"] or 0) < FAITHFUL:
            verdict = "too noisy to compare (raise --prompts)"
        elif row["low"] >= ALIKE:
            verdict = f"spread in the same directions, up to size (alignment above {ALIKE:g} by the whole interval)"
        elif row["high"] < ALIKE:
            verdict = f"spread in different directions (alignment below {ALIKE:g} by the whole interval)"
        else:
            verdict = f"open, the interval of their alignment reaches across {ALIKE:g}"
        groups.setdefault(verdict, []).append(f"{name_of(a)} and {name_of(b)}")
    said = (
        "The gradients of " + "; of ".join(f"{', '.join(pairs)}: {verdict}" for verdict, pairs in groups.items()) + "."
    )
    random = found.get("sft", "alignment", "random_credit")
    near = [found.get(o, "alignment", "sft") for o in ("opd", "rlvr")]
    if random and all(r and r["low"] is not None and r["low"] <= random["value"] <= r["high"] for r in near):
        said += (
            " SFT is as close to the two as to credit of random sign on their tokens: what sets it apart, if anything, is whose "
            "tokens it is given, not the credit they get."
        )
    return [said]


def _noisy(row: dict[str, Any]) -> str:
    known = row["reliability"]
    if known is None or known >= FAITHFUL:
        return ""
    return f" (noisy: two halves of the prompts agree by {number(known)} only; raise --prompts)"


def _against_random(found: Found) -> list[str]:
    both = found.get("opd", "alignment", "rlvr")
    ends = [found.get(o, "alignment", "random_credit") for o in ("opd", "rlvr")]
    if both is None or both["low"] is None or None in ends:
        return []
    values = [e["value"] for e in ends if e]
    verdict = (
        "less"
        if both["high"] < min(values)
        else "more"
        if both["low"] > max(values)
        else "neither clearly more nor clearly less"
    )
    return [
        f"With credit of random sign on the same tokens, OPD is aligned {found.text('opd', 'alignment', 'random_credit')}, RLVR "
        f"{found.text('rlvr', 'alignment', 'random_credit')}: the two agree {verdict} with each other than with credit that "
        "knows no objective."
    ]


def _masks(found: Found) -> list[str]:
    said = []
    for kind in ("random", "top"):
        parts = []
        for share in ("0.5", "0.25"):
            o = f"{kind}.{share}"
            row = found.get(o, "second_moment_ratio", "opd")
            if row is None:
                continue
            expected = f", {number(row['chance'])} expected" if row["chance"] is not None else ""
            parts.append(
                f"{name_of(o)} multiplies the second moment by {found.text(o, 'second_moment_ratio', 'opd')}{expected}, its alignment "
                f"with full OPD is {found.text(o, 'alignment', 'opd')}, that of the mean gradients {found.text(o, 'mean_cosine', 'opd', side='')}"
            )
        if parts:
            said.append("Masking tokens: " + "; ".join(parts) + ".")
    return said


def _mixture(found: Found) -> list[str]:
    o = "mixture.0.5"
    row = found.get(o, "mixture_error", "opd + rlvr")
    if row is None:
        return []
    return [
        f"Mixture formula at α = 0.5: with the cross term it is an identity (relative error {number(row['value'])}); without it the error is "
        f"{found.text(o, 'mixture_error_without_cross', 'opd + rlvr', unit='share')}. Predicted from half of the prompts and measured on the "
        f"others it misses by {found.text(o, 'mixture_error_held_out', 'opd + rlvr', unit='share')}, where two measurements differ by "
        f"{found.text(o, 'mixture_noise', 'opd + rlvr', unit='share')}."
    ]


def tables(found: Found, intervals: bool = True) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, head and rows of the tables of one checkpoint, as text; without `intervals` they fit a terminal."""

    def text(*where: Any, **more: Any) -> str:
        shown = found.text(*where, **more)
        return shown if intervals else shown.partition(" [")[0]

    def plain(row: dict[str, Any] | None, column: str) -> str:
        return number(row[column] if row else None, decimals=2)

    objectives = dict.fromkeys(o for o, _, q, _, s in found.rows if q == "second_moment" and s == "right")
    head = ["objective", "rank right", "left", "in W right", "left", "add up", "mean"]
    inside: dict[str, Any] = {"other": "weights", "unit": "share"}
    rows = []
    for o in objectives:
        ranks = [text(o, "effective_rank", side=side) for side in ("right", "left")]
        shares = [text(o, "weight_alignment", side=side, **inside) for side in ("right", "left")]
        rows.append([name_of(o), *ranks, *shares, text(o, "coherence"), text(o, "mean_share", side="", unit="share")])
    pairs = dict.fromkeys((o, p) for o, p, q, u, _ in found.rows if q == "alignment" and u == "sequence")
    lines = []
    for o, p in pairs:
        if not intervals and o.startswith("mixture."):
            continue  # the page and the data files hold them
        right, left = (found.get(o, "alignment", p, side=s) for s in ("right", "left"))
        overlap = found.get(o, "subspace_overlap", p)
        of_right = [text(o, "alignment", p), plain(right, "chance"), plain(right, "reliability")]
        of_left = [text(o, "alignment", p, side="left"), plain(left, "chance")]
        top = [plain(overlap, "value"), plain(overlap, "reliability")]
        lines.append([f"{name_of(o)} – {name_of(p)}", *of_right, *of_left, *top, text(o, "mean_cosine", p, side="")])
    pair_head = ["pair", "right", "chance", "halves", "left", "chance", "top", "halves", "means"]
    shown = range(len(pair_head)) if intervals else (0, 1, 2, 3, 4, 6, 8)
    picked = [[line[i] for i in shown] for line in (pair_head, *lines)]
    return [("Second moments, by objective", head, rows), ("Alignment, by pair", picked[0], picked[1:])]


def print_signals(summary: Summary, console: Console | None = None) -> None:
    """Tables and findings of every checkpoint; numbers are means over matrices with 95 % intervals over prompts."""
    console = console or Console()
    for checkpoint, found in by_checkpoint(summary).items():
        for title, head, rows in tables(found, intervals=False):
            table = _new_table(f"{checkpoint}: {title}")
            for i, column in enumerate(head):
                table.add_column(column, justify="right" if i else "left", no_wrap=bool(i))
            for row in rows:
                table.add_row(*(Text(cell) for cell in row))
            print_table(table, console)
            console.print()
        for sentence in sentences(found):
            console.print(Text(f"• {sentence}"))
        console.print()


def build(out: Path) -> tuple[str, list[Chart]]:
    """The page as HTML text, and its charts.

    Raises:
        ConfigError: a data file is missing or damaged.
    """
    table = _table(
        out / TABLE, ("checkpoint", "matrix", "objective", "other", "quantity", "unit", "side", "value", "chance")
    )
    spectra = _table(out / "signals_spectra.parquet", ("checkpoint", "matrix", "objective", "unit", "side", "values"))
    content, run = _json(out / "signals.json"), _json(out / "run.json")
    summary = content.get("summary") if isinstance(content, dict) else None
    if not isinstance(summary, list) or not summary or not isinstance(run, dict):
        raise _broken(out / "signals.json", "no summary", 'a list under "summary", and run.json beside it')
    made: list[Chart] = []
    parts = []
    for i, (checkpoint, found) in enumerate(by_checkpoint(summary).items()):
        here = pl.col("checkpoint") == checkpoint
        charts = _charts(f"{i + 1:02d}", table.filter(here), spectra.filter(here), found)
        made += charts
        shown = [{"caption": c.caption, "svg": Markup(inline_svg(c))} for c in charts]
        parts.append({"name": checkpoint, "sentences": sentences(found), "tables": tables(found), "charts": shown})
    matrices = table["matrix"].drop_nulls().n_unique()
    page = environment().get_template("signals.html.j2").render(parts=parts, run=run, matrices=matrices)
    return page, made


def _charts(prefix: str, table: pl.DataFrame, spectra: pl.DataFrame, found: Found) -> list[Chart]:
    right = table.filter((pl.col("side") == "right") & (pl.col("unit") == "sequence") & pl.col("value").is_not_null())
    made = []
    groups = []
    for a, b in dict.fromkeys(right.filter(quantity="alignment").select("objective", "other").iter_rows()):
        rows = right.filter(quantity="alignment", objective=a, other=b)
        rows = rows.filter(pl.col("reliability") >= FAITHFUL)
        if len(rows):
            groups.append(
                Group(
                    f"{name_of(a)} – {name_of(b)}", rows["value"].to_list(), rows["chance"].to_list(), [0.0] * len(rows)
                )
            )
    if groups:
        title, axis = "Alignment of right second moments", "1: the same up to size; grey: unrelated"
        caption = f"{title}, one dot a matrix (those with split-half reliability of {FAITHFUL:g} or more)"
        made.append(distribution(f"{prefix}-alignment", title, Scale(), groups, axis, caption))
    ranks = right.filter(quantity="effective_rank")
    groups = [
        Group(name_of(o), ranks.filter(objective=o)["value"].to_list(), style=STYLES.get(o, 5))
        for o in dict.fromkeys(ranks["objective"])
    ]
    if groups:
        made.append(
            distribution(
                f"{prefix}-rank", "Effective rank of right second moments, one dot a matrix", Scale(log=True), groups
            )
        )
    shown = []
    grid = np.linspace(0, 1, 60)
    for o in STYLES:
        kept = spectra.filter(
            (pl.col("side") == "right") & (pl.col("unit") == "sequence") & (pl.col("objective") == o)
        )["values"]
        if len(kept):
            curves = [np.interp(grid, (np.arange(len(v)) + 0.5) / len(v), np.asarray(v) * len(v)) for v in kept]
            shown.append(
                Series(
                    name_of(o), (100 * grid).tolist(), np.maximum(np.mean(curves, 0), 1e-6).tolist(), style=STYLES[o]
                )
            )
    if shown:
        title = "Eigenvalues of right second moments over their mean, averaged over matrices"
        made.append(trajectory(f"{prefix}-spectra", title, Scale(log=True), shown, "index, % of the directions"))
    made += _mixture_chart(prefix, found)
    return made


def _mixture_chart(prefix: str, found: Found) -> list[Chart]:
    alphas = sorted({float(o.partition(".")[2]) for o, _, q, _, _ in found.rows if q == "mixture_error"})
    lines = {
        "mixture_error_without_cross": "no cross term",
        "mixture_error_held_out": "other prompts",
        "mixture_noise": "noise",
    }
    series = []
    for style, (quantity, label) in enumerate(lines.items()):
        rows = [(a, found.get(f"mixture.{a:g}", quantity, "opd + rlvr")) for a in alphas]
        known = [(a, r) for a, r in rows if r is not None and r["low"] is not None]
        if known:
            value, low, high = ([r[c] for _, r in known] for c in ("value", "low", "high"))
            series.append(Series(label, [a for a, _ in known], value, low=low, high=high, style=style))
    title = "Mixture formula: relative Frobenius error, %, with 95 % intervals"
    return [trajectory(f"{prefix}-mixture", title, Scale("share"), series, "α, the share of OPD")] if series else []

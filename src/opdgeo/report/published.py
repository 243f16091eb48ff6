"""Published pairs, measured: the paper's value beside ours, over the size of the update, in the terminal and as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic
from opdgeo.errors import ConfigError
from opdgeo.report.charts import GLYPHS, Band, Chart, Hollow, Points, over_size, style_of
from opdgeo.report.data import _check, _json, load_summary
from opdgeo.report.glossary import about, clean, is_primary, label, number
from opdgeo.report.sections.section import AXIS, Figure, scale_of
from opdgeo.report.sections.sizes import SIZE
from opdgeo.report.terminal import _new_table, print_table
from opdgeo.report.verdict import Finding, find, findings
from opdgeo.report.view import environment, slug

TABLE = "published.json"
SPARSITY = next((d, d.headline.variant) for d in DIAGNOSTICS.values() if d.weighting == "entries" and d.headline)
"""The diagnostic of which the paper gives a value for every pair: the share of entries that stay as they are."""
_TEXT = str
_PAIR = {
    **dict.fromkeys(("name", "base", "tuned", "method", "paradigm", "data", "ids", "status"), _TEXT),
    "unchanged": (int, float),
    "note?": _TEXT,
    "reason?": (_TEXT, None),
}


class Pair:
    """A published pair and, where it was measured, its summary."""

    def __init__(self, facts: dict[str, Any], out: Path):
        self.facts, self.name = facts, clean(facts["name"], 60)
        self.page = (out / facts["name"] / "report.html").is_file()
        self.summary = load_summary(out / facts["name"])[-1] if facts["status"] == "measured" else None

    def found(self, diagnostic: str, variant: str) -> Finding | None:
        return find(self.summary, diagnostic, variant) if self.summary else None

    def value(self, diagnostic: str, variant: str) -> tuple[float, float | None, float] | None:
        """Mean, the null's mean and its spread."""
        found = self.found(diagnostic, variant)
        if found is None or found.row["mean"] is None:
            return None
        null = found.null or {}
        return found.row["mean"], null.get("mean"), null.get("std") or 0.0

    @property
    def size(self) -> float | None:
        """The relative norm of the update; None where it was not measured or did not move."""
        found = self.value(SIZE[0].name, SIZE[1])
        return found[0] or None if found else None


def load(out: Path) -> list[Pair]:
    """Raises:
    ConfigError: the list or the data files of a pair are missing or damaged.
    """
    data = _json(out / TABLE)
    pairs = data.get("pairs") if isinstance(data, dict) else None
    _check(pairs, [_PAIR], out / TABLE, "pairs")
    assert isinstance(pairs, list)
    for facts in pairs:
        if Path(facts["name"]).name != facts["name"]:  # a folder of this one, and no path
            raise ConfigError(
                f"{out / TABLE} names a pair {clean(facts['name'], 60)!r}; expected the name of a folder in {out}."
            )
    return [Pair(facts, out) for facts in pairs]


def print_published(out: Path, console: Console | None = None) -> None:
    """A line a pair: the paper's unchanged share, ours, and that of an isotropic update of the same size."""
    console = console or Console()
    table = _new_table("Unchanged in bf16")
    table.add_column("pair")
    table.add_column("method", no_wrap=True)
    for name in ("size", "paper", "here", "by chance"):
        table.add_column(name, justify="right", no_wrap=True)
    for pair in load(out):
        size, found = pair.size, pair.value(SPARSITY[0].name, SPARSITY[1])
        table.add_row(
            Text(pair.name),
            Text(clean(pair.facts["method"], 12)),
            number(size),
            number(pair.facts["unchanged"], "share"),
            number(found[0] if found else None, "share"),
            Text(number(found[1] if found else None, "share"), style="dim"),
        )
    print_table(table, console)
    console.print(
        Text("size: relative norm of the update; by chance: an isotropic update of the same size"), style="dim"
    )


def build(out: Path) -> tuple[str, list[Chart]]:
    """The page as HTML text and the charts in it."""
    pairs = load(out)
    shown = [pair for pair in pairs if pair.size]
    charts = [_chart(shown, known, variant) for known, variant in _columns(shown)]
    markers = {pair.name: i % len(GLYPHS) for i, pair in enumerate(shown)}
    heads = [
        (known.title, known.unit, known.name, variant) for known, variant in _columns(shown) if known != SPARSITY[0]
    ]
    rows = [
        {
            "pair": pair,
            "glyph": GLYPHS[markers[pair.name]] if pair.name in markers else "",
            "style": style_of(pair.facts["paradigm"]),
            "unchanged": pair.value(SPARSITY[0].name, SPARSITY[1]),
            "reading": (f.reading if (f := pair.found(SPARSITY[0].name, SPARSITY[1])) else None),
            "others": [(pair.value(name, variant), unit) for _, unit, name, variant in heads],
        }
        for pair in pairs
    ]
    page = (
        environment()
        .get_template("published.html.j2")
        .render(
            rows=rows,
            heads=[head[0] for head in heads],
            charts=[Figure(chart) for chart in charts],
            measured=len(shown),
            ids=clean(pairs[0].facts["ids"]) if pairs else "",
        )
    )
    return page, charts


def _columns(pairs: list[Pair]) -> list[tuple[Diagnostic, str]]:
    """What has a chart: the unchanged share, then the others that lead, in their order."""
    there = [
        (about(f.diagnostic), f.variant) for pair in pairs[:1] for f in findings(pair.summary or {"diagnostics": []})
    ]
    led = [(d, v) for d, v in there if d.leads and not d.size and is_primary(d.name, v)]
    return sorted(led, key=lambda one: not _is_sparsity(*one))


def _is_sparsity(known: Diagnostic, variant: str) -> bool:
    return known == SPARSITY[0] and variant.startswith(SPARSITY[1])


def _chart(pairs: list[Pair], known: Diagnostic, variant: str) -> Chart:
    points, hollow, nulls = [], [], []
    for place, pair in enumerate(pairs):
        x, found = pair.size, pair.value(known.name, variant)
        if x is None or found is None:
            continue
        value, null, spread = found
        style = style_of(pair.facts["paradigm"])
        tip = f"{pair.name}: {number(value, known.unit)}" + (
            f", null {number(null, known.unit)}" if null is not None else ""
        )
        points.append(Points(pair.name, f"g{place}", [x], [value], [tip], style=style, marker=place))
        if _is_sparsity(known, variant):
            hollow.append(Hollow(f"{pair.name}, paper", (x, x), pair.facts["unchanged"], style=style))
        if null is not None:
            nulls.append((x, null, 2 * spread))
    nulls.sort()
    band = None
    if nulls:
        band = Band(
            [n[0] for n in nulls],
            [n[1] for n in nulls],
            [n[1] - n[2] for n in nulls],
            [n[1] + n[2] for n in nulls],
        )
    title = label(known.name, variant) + AXIS.get(known.unit, "")
    name = f"published-{slug(known.name)}-{slug(variant)}".rstrip("-")
    alt = f"{title} of {len(points)} published pairs against the {SIZE[0].title.lower()} of the update"
    return over_size(name, title, scale_of(known.name), points, band, hollow, size=SIZE[0].title.lower(), alt=alt)

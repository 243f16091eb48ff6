"""Pairs of updates in words and in a terminal: how alike each is, beside what independent updates of the same sizes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from opdgeo.diagnostics import of_pairs
from opdgeo.diagnostics.diagnostic import ONE_UNMOVED, Diagnostic, Part
from opdgeo.report.data import pairs_of
from opdgeo.report.glossary import arm_label, clean, is_primary, number, split_seed
from opdgeo.report.limits import ARMS
from opdgeo.report.terminal import _new_table, print_table
from opdgeo.report.verdict import Finding, findings, headlines

READINGS = {"geometry": "beyond chance", "size": "chance", "unclear": "unclear"}
"""The readings of summary.json in the words of a pair."""
_STYLE = {"beyond chance": "bold cyan", "chance": "dim", "unclear": "yellow"}

Summary = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One number of a pair: of all its matrices together where there is such a value, else their mean."""

    found: Finding

    @property
    def value(self) -> float | None:
        together: dict[str, Any] | None = self.found.row.get("together")
        mean: float | None = self.found.row["mean"]
        return together["value"] if together else mean

    @property
    def around(self) -> bool:
        """Whether chance is 0 and only its spread tells something."""
        return of_pairs()[self.found.diagnostic].around_zero

    @property
    def chance(self) -> float | None:
        """What independent updates have: the mean, or where that is 0 one standard deviation."""
        together: dict[str, Any] | None = self.found.row.get("together")
        null: dict[str, Any] = together or self.found.null or {}
        names = ("null_std", "std") if self.around else ("null_mean", "mean")
        return null.get(names[0] if together else names[1])

    @property
    def instead(self) -> str:
        """The words of the variant that stands for the one asked for; empty where it stands for itself."""
        return self.found.detail if self.found.row["variant"] != self.found.variant else ""

    def chance_text(self) -> str:
        """In letters; empty without a null."""
        text = number(self.chance, self.found.unit)
        return "" if self.chance is None else f"± {text}" if self.around else text

    @property
    def reading(self) -> str:
        if self.found.row["mean"] is None:
            return "undefined"
        return READINGS.get(self.found.reading or "", "no null")

    @property
    def side(self) -> str:
        return {"above": "↑", "below": "↓"}.get(self.found.side, "") if self.reading == "beyond chance" else ""


class Pairs:
    """The pairs of a summary, by their two names."""

    def __init__(self, pairs: list[dict[str, Any]]):
        self.by_names = {(p["checkpoint"], p["other"]): p for p in pairs}
        self._found = {names: {(f.diagnostic, f.variant): f for f in findings(p)} for names, p in self.by_names.items()}
        self.names = list(dict.fromkeys(name for p in pairs for name in (p["checkpoint"], p["other"])))

    def short(self, name: str, limit: int) -> str:
        """A name for a table: without the folder that all have in common, such as `step-000100`, and cut."""
        ends = {n.rpartition("/")[2] for n in self.names}
        if len(ends) == 1 and all("/" in n for n in self.names):
            name = name.rpartition("/")[0]
        return clean(name, limit)

    def direction(self, diagnostic: str, first: str, other: str, limit: int) -> str:
        """Which of two updates a diagnostic holds against which; empty where both ways are the same."""
        return of_pairs()[diagnostic].directed.format(self.short(first, limit), self.short(other, limit))

    def unordered(self) -> list[tuple[str, str]]:
        """Each pair once, in the order of the names."""
        return [(a, b) for i, a in enumerate(self.names) for b in self.names[i + 1 :] if (a, b) in self.by_names]

    def cell(self, first: str, other: str, diagnostic: str, variant: str) -> Cell | None:
        """The number of `first` against `other`; of a diagnostic that is the same both ways, from whichever row holds it."""
        for names in ((first, other), (other, first)):
            if found := self._found.get(names, {}).get((diagnostic, variant)):
                return Cell(found)
        return None

    def columns(self) -> list[tuple[Diagnostic, str]]:
        """What there is a matrix of: the primary variants of the diagnostics, in their order."""
        one: dict[str, Any] = next(iter(self.by_names.values()), {"diagnostics": []})
        return [
            (of_pairs()[f.diagnostic], f.variant)
            for f in findings(one)
            if f.diagnostic in of_pairs() and is_primary(f.diagnostic, f.variant)
        ]

    def ordered(self) -> list[str]:
        """The names such that updates that are alike stand together: average linkage of 1 − the first diagnostic that is the same
        both ways, its leaves in the best order (scipy)."""
        leading = self.leading()
        if len(self.names) < 3 or leading is None:
            return self.names
        from scipy.cluster.hierarchy import leaves_list, linkage

        distances = []
        for i, a in enumerate(self.names):
            for b in self.names[i + 1 :]:
                cell = self.cell(a, b, *leading)
                distances.append(2.0 if cell is None or cell.value is None else max(0.0, 1 - cell.value))
        return [self.names[i] for i in leaves_list(linkage(distances, "average", optimal_ordering=True))]

    def leading(self) -> tuple[str, str] | None:
        """The diagnostic and variant by which pairs are ordered."""
        return next(((d.name, v) for d, v in self.columns() if not d.directed), None)

    def by_likeness(self) -> list[tuple[str, str]]:
        """The pairs with a value, the most alike first."""
        leading = self.leading()
        if leading is None:
            return []
        known = [
            (cell.value, pair)
            for pair in self.unordered()
            if (cell := self.cell(*pair, *leading)) and cell.value is not None
        ]
        return [pair for _, pair in sorted(known, key=lambda item: -item[0])]

    def said(self, first: str, other: str) -> list[Part]:
        """One sentence about a pair: its headlines with their numbers."""
        parts: list[Part] = [f"{self.short(first, 60)} and {self.short(other, 60)}: "]
        for d, found in headlines(self.by_names[first, other]):
            if d.headline is None or found is None or found.row["mean"] is None:
                continue
            cell = Cell(found)
            parts += [] if len(parts) == 1 else ["; "]
            parts += _filled(d.headline.clause.replace("{variant}", found.detail), cell.value, d.unit)
            if d.headline.beside and cell.chance is not None:
                parts += [" (", *_filled(d.headline.beside, cell.chance, d.unit), ")"]
        return [*parts, "."] if len(parts) > 1 else [*parts, "nothing can be compared: ", self.why(first, other), "."]

    def sentences(self) -> list[list[Part]]:
        """What is said first: of two updates how alike they are; of more, of the most and the least alike pair."""
        every = self.by_likeness() or self.unordered()
        chosen = every if len(every) < 2 else [every[0], every[-1]]
        lead = [""] if len(chosen) < 2 else ["Most alike: ", "Least alike: "]
        return [[text, *self.said(*pair)] for text, pair in zip(lead, chosen, strict=True)]

    def still(self) -> Iterator[tuple[str, str, int, int]]:
        """Pairs with matrices of which one or both did not move: names, how many, of how many."""
        for (first, other), pair in self.by_names.items():
            if pair.get("unmoved") and (first, other) in self.unordered():
                yield first, other, pair["unmoved"], max((row["total"] for row in pair["diagnostics"]), default=0)

    def why(self, first: str, other: str) -> str:
        reasons = [row.get("reason") for row in self.by_names[first, other]["diagnostics"]]
        return clean(next((r for r in reasons if r), "no reason is known"))


def of_study(claims: dict[str, Any]) -> tuple[Pairs, Pairs]:
    """The pairs of a study, claims.json's `related`: of arms that start from one checkpoint, and of one arm in several seeds.

    Every number is a mean over seeds and has no reading: the study reports them.
    """
    between: dict[tuple[str, str], list[dict[str, Any]]] = {}
    among: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in claims.get("related") or []:
        if row["diagnostic"] not in of_pairs():
            continue
        same = split_seed(row["arm"])[0] == split_seed(row["other"])[0]
        null = None if row["null"] is None else {"mean": row["null"], "std": row["null_std"]}
        first, second = (ARMS.get(arm, arm_label(arm)) for arm in (row["arm"], row["other"]))
        group = among if same else between
        group.setdefault((first, second), []).append(row | {"mean": row["value"], "null": null})
    arms, seeds = (
        Pairs([{"checkpoint": a, "other": b, "diagnostics": rows} for (a, b), rows in group.items()])
        for group in (between, among)
    )
    return arms, seeds


def _filled(clause: str, value: float | None, unit: str) -> list[Part]:
    before, _, after = clause.partition("{}")
    return [part for part in (before, (value, unit), after) if part != ""]


def print_pairs(summary: Summary, console: Console | None = None) -> None:
    """Print the pairs of a summary: of two updates every number, of more one line a pair.

    Raises ConfigError when the summary has another shape.
    """
    console = console or Console()
    pairs = Pairs(pairs_of(summary, Path("summary")))
    for said in pairs.sentences():
        console.print(Text("".join(p if isinstance(p, str) else number(*p) for p in said), style="bold"))
    for first, other, count, total in pairs.still():
        text = f"{pairs.short(first, 40)} and {pairs.short(other, 40)}: {count} of {total} matrices did not move in one of the two"
        console.print(Text(f"{text}; means, nulls and excesses are over the others.", style="yellow"))
    if len(pairs.names) == 2:
        _print_one(pairs, console)
    else:
        _print_lines(pairs, console)


def _print_lines(pairs: Pairs, console: Console) -> None:
    """One line a pair: the headlines, chance in brackets."""
    table = _new_table("Pairs: all matrices together, chance in brackets; ↑ ↓: above or below it")
    table.add_column("pair")
    shown = [(d, d.headline) for d in of_pairs().values() if d.headline]
    for _, headline in shown:
        table.add_column(headline.column, justify="right", no_wrap=True)
    place = {name: i for i, name in enumerate(pairs.ordered())}
    for pair in sorted(pairs.unordered(), key=lambda p: sorted(place[name] for name in p)):
        cells = []
        for d, headline in shown:
            cell = pairs.cell(*pair, d.name, headline.variant)
            text = Text(f"{number(None if cell is None else cell.value, d.unit)} {cell.side if cell else ''}".rstrip())
            if cell is not None and cell.reading == "beyond chance":
                text.stylize("bold cyan")
            if cell is not None and cell.chance is not None:
                text.append(f"\n({cell.chance_text()})", style="dim")
            if cell is not None and cell.instead:
                text.append(f"\n{cell.instead}", style="dim")
            cells.append(text)
        table.add_row(Text(" and ".join(pairs.short(name, 24) for name in pair)), *cells)
    print_table(table, console)
    console.print(Text("Every number of every pair, both ways, is on the page and in summary.json."))


def _print_one(pairs: Pairs, console: Console) -> None:
    first, other = pairs.names
    table = _new_table(f"{first} and {other}")
    table.add_column("diagnostic")
    for name in ("all", "mean", "chance"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reading", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    whys: dict[str, dict[str, None]] = {}
    for pair in ((first, other), (other, first)):
        for found in findings(pairs.by_names.get(pair, {"diagnostics": []})):
            cell = Cell(found)
            if found.row["mean"] is None and found.row.get("reason"):
                whys.setdefault(found.row["reason"], {})[found.title] = None
            said = Text(found.title)
            detail = ", ".join(filter(None, (found.detail, pairs.direction(found.diagnostic, *pair, 24))))
            if detail:
                said.append(f" {detail}", style="dim")
            table.add_row(
                said,
                number(cell.value if found.row.get("together") else None, found.unit),
                number(found.row["mean"], found.unit),
                Text(cell.chance_text(), style="dim"),
                Text(f"{cell.reading} {cell.side}".rstrip(), style=_STYLE.get(cell.reading, "")),
                Text(f"{found.over}/{found.row['total']}", style="" if found.over == found.row["total"] else "yellow"),
            )
    print_table(table, console)
    console.print(
        Text(
            "all: all matrices together as one long vector; mean: over matrices, each once. chance: of all, else of the mean."
        )
    )
    for why, titles in whys.items():
        smaller = why != ONE_UNMOVED and any(d.curves and d.title in titles for d in of_pairs().values())
        more = " No smaller K in the table is determined either; curves.parquet holds every K." if smaller else ""
        console.print(Text(f"–: {clean(why)} ({', '.join(titles)}).{more}"))

"""The results in a terminal: every diagnostic next to its null. Needs neither matplotlib nor torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from opdgeo.report.data import load_claims, load_summary, load_whole_runs, runs
from opdgeo.report.glossary import ARMS, SUFFIX, about, arm_label, clean, interval_decimals, is_primary, number, stem
from opdgeo.report.verdict import (
    Finding,
    answers,
    by_reading,
    did_not_move,
    find,
    findings,
    headlines,
    incomplete,
    size_of,
    unmeasured,
    unmoved,
)

_STYLE = {"geometry": "bold cyan", "size": "dim", "unclear": "yellow", "by construction": "dim"}
_GOOD, _BAD = ("holds", "still holds"), ("reversed", "fails", "does not")
_UNSURE = ("no difference", "depends", "open", "inconclusive")
_VERDICT = dict.fromkeys(_GOOD, "bold green") | dict.fromkeys(_BAD, "bold red") | dict.fromkeys(_UNSURE, "yellow")


def print_summary(
    out_or_summary: Path | str | dict[str, Any],
    console: Console | None = None,
    *,
    everything: bool = True,
    base: str = "",
) -> None:
    """Print the diagnostics of a run: its last checkpoint in full, the earlier ones in one table. Several arms stand side by side.

    Without `everything`, one line a diagnostic, which fits a terminal of 80 columns and 25 lines with what `compare` says after it.
    `base` is the place of the checkpoint before training; tables are titled with its name.
    Raises ConfigError when the folder has no readable summary.json.
    """
    console = console or Console()
    grouped = runs(load_summary(out_or_summary))
    if len(grouped) > 1:
        _print_arms({arm: checkpoints for (arm, seed), checkpoints in grouped.items() if seed == 0}, console)
        return
    for checkpoints in grouped.values():
        if len(checkpoints) > 1:
            for said in answers(checkpoints, load_whole_runs(out_or_summary)):
                parts = (clean(part) if isinstance(part, str) else number(*part) for part in said)
                console.print(Text("".join(parts), style="bold"))
            _print_trajectory(checkpoints, console, base)
        else:
            checkpoints = [_by_itself(checkpoints[0])]
        show = _print_full if everything else _print_brief
        show(checkpoints[-1], console, checkpoints[:-1], base)


def print_claims(claims: dict[str, Any] | Path | str, console: Console | None = None) -> None:
    """Print the claims: their verdicts, and for each arm the value with its null.

    `claims` is the content of claims.json or the folder that holds it. Raises ConfigError when it has another shape.
    """
    console = console or Console()
    claims = load_claims(claims)
    verdicts, values = _new_table("Claims of the paper"), _new_table("Values, with the null in brackets")
    verdicts.add_column("", style="bold", no_wrap=True)
    verdicts.add_column("claim")
    for name in ("as the paper compares", "after matching"):
        verdicts.add_column(name, width=14)
    used = dict.fromkeys(arm for claim in claims["claims"] for arm in claim.get("measured") or {})
    arms = [arm for arm in ARMS if arm in used] or list(used)
    others = []
    values.add_column("", style="bold", no_wrap=True)
    for arm in arms:
        values.add_column(arm_label(arm), justify="right")
    for claim in claims["claims"]:
        outcomes = [claim["verdict"], claim.get("after_matching") or ""]
        judged = (Text(clean(v), style=_VERDICT.get(v, "")) for v in outcomes)
        verdicts.add_row(Text(clean(claim["id"])), Text(clean(claim["claim"])), *judged)
        unit, cells = unit_of(claim.get("unit")), []
        for got in ((claim.get("measured") or {}).get(arm) or {} for arm in arms):
            cell = Text(number(got.get("mean"), unit))
            cell.append(f" ({number(got.get('null'), unit, bare=True)})", style="dim")
            cells.append(cell)
        measured = set(claim.get("measured") or {})
        if measured & set(arms):
            values.add_row(Text(clean(claim["id"])), *cells)
        if measured - set(arms):
            others.append(f"{claim['id']}: {claim.get('explanation') or ''}")
    print_table(verdicts, console)
    console.print()
    print_table(values, console)
    console.print()
    for line in others:
        console.print(Text(clean(line)))
    if claims.get("rehearsal"):
        console.print(
            Text("a rehearsal: every arm trained for a few steps, and the numbers mean nothing", style="bold")
        )
    reached_by = claims.get("outcomes") or {}
    for arm in [arm for arm in ARMS if arm in reached_by] or list(reached_by):
        reached = reached_by[arm]
        parts = []
        for key, name, unit in OUTCOMES:
            if ends := reached.get(key):
                start, end = (number((ends.get(at) or {}).get("mean"), unit) for at in ("start", "end"))
                parts.append(f"{name} {start} → {end}")
        console.print(Text(f"{arm_label(arm)}: " + ", ".join(parts)))
    for line in claims.get("left_out") or []:
        console.print(Text("not tested: " + clean(line), style="dim"))


def print_channel(rows: list[dict[str, Any]], console: Console | None = None) -> None:
    """Print the rows of `Channel.table()`."""
    table = _new_table("Channel")
    table.add_column("role")
    for name in ("matrices", "K", "energy inside", "chance", "smallest gap at K"):
        table.add_column(name, justify="right")
    for row in rows:
        low, high = row["k"]
        table.add_row(
            row["role"],
            str(row["matrices"]),
            str(low) if low == high else f"{low}–{high}",
            number(row["inside"], "share"),
            Text(number(row["chance"], "share"), style="dim"),
            number(row["gap"], "share"),
        )
    print_table(table, console or Console())


OUTCOMES = (
    ("accuracy_greedy", "greedy accuracy", "share"),
    ("accuracy_sampled", "sampled accuracy", "share"),
    ("kl_teacher", "KL to the teacher", "number"),
    ("kl_origin", "KL from the start", "number"),
    ("completion_length", "completion length", "number"),
)


def control_name(control: dict[str, Any]) -> str:
    """The short name of a control: what stands before its colon."""
    return clean(str(control.get("control", "")).partition(":")[0])


def unit_of(name: str | None) -> str:
    """The unit of a claim as `glossary.number` knows it."""
    return {"share": "share", "points": "points", "degrees": "degrees", "degree": "degrees", "seconds": "seconds"}.get(
        name or "", "number"
    )


def _interval(mean: float | None, low: float | None, high: float | None, unit: str, signed: bool = False) -> str:
    if low is None or high is None:
        return number(mean, unit, signed=signed)
    decimals = interval_decimals(low, high, unit)
    shown = [number(v, unit, signed=signed, bare=True, decimals=decimals) for v in (mean, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]{SUFFIX.get(unit, '')}"


def _by_itself(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint without what compares it with others."""
    rows = [row for row in checkpoint["diagnostics"] if about(row["diagnostic"]).scope != "trajectory"]
    return checkpoint | {"diagnostics": rows or checkpoint["diagnostics"]}


def _title(checkpoint: dict[str, Any], base: str) -> str:
    """Which pair, in its direction, and how many of its matrices moved."""
    pair = f"{clean(stem(base), 60)} → " if base else ""
    size, moved = size_of(checkpoint), ""
    if size and (computed := size.row["computed"]):
        of = f"{computed} measured" if computed < size.row["total"] else computed
        moved = f": {computed - checkpoint.get('unmoved', 0)} of {of} matrices moved"
    return f"{pair}{clean(checkpoint['checkpoint'], 60)}{moved}"


def _print_full(checkpoint: dict[str, Any], console: Console, earlier: Sequence[dict[str, Any]], base: str) -> None:
    if still := unmoved(checkpoint):
        console.print(Text(unmoved_text(still, checkpoint), style="yellow"))
    table = _new_table(_title(checkpoint, base))
    table.add_column("diagnostic")
    wide = console.width >= 100
    for name in ("mean", "null", "excess [95 %]" if wide else "excess"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("reading", no_wrap=True)
    table.add_column("of", justify="right", no_wrap=True)
    for found in findings(checkpoint):
        row, null = found.row, found.null or {}
        unit = "points" if found.unit == "share" else found.unit
        excess = ""
        if found.reading != "by construction":
            low = null.get("low") if wide else None
            excess = _interval(null.get("excess"), low, null.get("high"), unit, signed=True)
        table.add_row(
            _name(found),
            number(row["mean"], found.unit),
            Text(number(null.get("mean"), found.unit), style="dim"),
            Text(excess),
            _reading(found),
            Text(f"{found.over}/{row['total']}", style="" if found.over == row["total"] else "yellow"),
        )
    print_table(table, console)
    console.print(
        Text(
            "mean: over matrices or entries; null: an isotropic update of that size; excess: mean − null (pp: percentage points); "
            "of: matrices with a value. `opdgeo explain WORD` tells more.",
            style="dim",
        )
    )
    for line in [*sentences(checkpoint, earlier), *_lacking(checkpoint), *_noted(findings(checkpoint))]:
        console.print(Text(line))


def _print_brief(checkpoint: dict[str, Any], console: Console, earlier: Sequence[dict[str, Any]], base: str) -> None:
    """One line a diagnostic, then the size of the update and how many of its numbers that size explains."""
    every = findings(checkpoint)
    if still := unmoved(checkpoint):
        console.print(Text(unmoved_text(still, checkpoint), style="yellow"))
    if not earlier:
        table = _new_table(_title(checkpoint, base))
        table.add_column("diagnostic")
        table.add_column("measured", justify="right", no_wrap=True)
        table.add_column("by chance", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for found in every:
            if is_primary(found.diagnostic, found.variant):
                itself = found.reading == "by construction"
                null = Text("" if itself else number((found.null or {}).get("mean"), found.unit), style="dim")
                table.add_row(
                    _name(found), number(found.row["mean"], found.unit), null, Text() if itself else _reading(found)
                )
        print_table(table, console)
    for line in sentences(checkpoint, earlier)[:1]:
        console.print(Text(line))
    if did_not_move(checkpoint):
        return
    counts = {key: len(group) for key, group in by_reading(checkpoint).items()}
    if judged := {key: counts[key] for key in ("geometry", "size", "unclear") if key in counts}:
        words = {"geometry": "beyond it", "size": "explained by it", "unclear": "unclear"}
        said = ", ".join(f"{n} {words[key]}" for key, n in judged.items())
        console.print(
            Text(f"Of {sum(judged.values())} numbers beside their chance at that size (--all lists them): {said}.")
        )
    elif "no null" in counts:
        console.print(Text("Without null models nothing separates geometry from size."))
    for line in _lacking(checkpoint, primary=True):
        console.print(Text(line, style="yellow"))
    for line in _noted([f for f in every if is_primary(f.diagnostic, f.variant)]):
        console.print(Text(line, style="dim"))


def _new_table(title: str) -> Table:
    return Table(
        title=Text(clean(title), style="bold"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
    )


def print_table(table: Table, console: Console) -> None:
    """Print a table whose labels wrap where it is too wide, and whose numbers are always whole: if need be the terminal wraps its lines."""
    for column in table.columns:
        lines = (line for cell in (column.header, *column.cells) for line in str(cell).split("\n"))
        if column.no_wrap:
            column.min_width = max(map(cell_len, lines))
    least = Measurement.get(console, console.options.update(width=1 << 16), table).minimum
    if least > console.width:
        table.width = least
    console.print(table, crop=False)


def _name(found: Finding) -> Text:
    text = Text(found.title)
    if found.detail:
        text.append(f" {found.detail}", style="dim")
    return text


def _reading(found: Finding) -> Text:
    if found.row["mean"] is None:
        return Text("undefined", style="yellow")
    if found.reading is None:
        return Text("no null", style="dim")
    return Text(clean(found.reading) + _arrow(found), style=_STYLE.get(found.reading, ""))


def _arrow(found: Finding) -> str:
    """The side of the null on which a number lies that size does not explain."""
    return {"above": " ↑", "below": " ↓"}.get(found.side, "") if found.reading == "geometry" else ""


def sentences(checkpoint: dict[str, Any], earlier: Sequence[dict[str, Any]] = ()) -> list[str]:
    """The verdict in plain words, for a terminal; `earlier` are the checkpoints of the run before this one."""
    if did_not_move(checkpoint) and not all(map(did_not_move, earlier)):
        return [
            f"{clean(checkpoint['checkpoint'])}, the last checkpoint, holds the weights of BASE; earlier checkpoints do not. "
            "Is BASE the checkpoint where training started?"
        ]
    if did_not_move(checkpoint):
        return ["The weights did not move: every measured matrix is the same in both checkpoints."]
    if unmeasured(checkpoint):
        return ["No matrix could be measured."]
    said = []
    for d, found in headlines(checkpoint):
        if d.headline and d.headline.clause and found and found.row["mean"] is not None:
            said.append(d.headline.clause.format(number(found.row["mean"], found.unit)))
            if d.headline.beside and found.null and found.null.get("mean") is not None:
                said[-1] += ", " + d.headline.beside.format(number(found.null["mean"], found.unit))
    lines = [f"Size: {'; '.join(said)}."] if said else []
    groups = by_reading(checkpoint)
    for key, text in (
        ("geometry", "Differs from an isotropic update of that size"),
        ("size", "Same as an isotropic update of that size"),
        ("unclear", "Unclear"),
    ):
        if groups.get(key):
            lines.append(f"{text}: {', '.join(names(groups[key]))}.")
    if groups.get("no null"):
        lines.append("Without null models nothing separates geometry from size.")
    return lines


def _lacking(checkpoint: dict[str, Any], *, primary: bool = False) -> list[str]:
    """What is not over all matrices that moved, and why; `primary`: of what the short table shows."""
    if did_not_move(checkpoint):
        return []
    lines, still = [], unmoved(checkpoint)
    left_out: dict[tuple[int, int, str | None], list[Finding]] = {}
    for found in incomplete(checkpoint):
        if primary and not is_primary(found.diagnostic, found.variant):
            continue
        total = found.row["total"] - still
        left_out.setdefault((found.over, total, found.row.get("reason")), []).append(found)
    for (over, total, reason), group in left_out.items():
        shown = [f for f in findings(checkpoint) if not primary or is_primary(f.diagnostic, f.variant)]
        what = "every diagnostic" if len(group) == len(shown) else ", ".join(names(group))
        lines.append(
            f"Over {over} of {total} matrices{' that moved' if still else ''}: {what}{f' ({clean(reason)})' if reason else ''}."
        )
    return lines


def _noted(shown: Sequence[Finding]) -> list[str]:
    """What the rows of matrices with a value say of it, such as a rank that was cut; of how many where not all say so."""
    grouped: dict[str, list[Finding]] = {}
    for found in shown:
        notes = found.row.get("notes") or {}
        said = (f"{clean(note)}{f' ({n} matrices)' if n < found.over else ''}" for note, n in notes.items())
        grouped.setdefault(", ".join(said), []).append(found)
    lines = (f"{', '.join(names(group))}: {said}." for said, group in grouped.items() if said)
    return [line[:1].upper() + line[1:] for line in lines]


def unmoved_text(still: int, checkpoint: dict[str, Any]) -> str:
    """What is said first where `still` matrices did not move."""
    total = max((found.row["total"] for found in findings(checkpoint)), default=still)
    return f"{still} of {total} matrices did not move; means, nulls and excesses are over the others."


def names(found: list[Finding]) -> list[str]:
    """One name a diagnostic, its variants in brackets."""
    grouped: dict[str, list[str]] = {}
    for one in found:
        grouped.setdefault(one.title, []).append(one.detail)
    return [
        (title if title.startswith(("Hill", "Frobenius")) else title[0].lower() + title[1:])
        + (f" ({', '.join(v)})" if any(v) else "")
        for title, v in grouped.items()
    ]


def _print_trajectory(checkpoints: list[dict[str, Any]], console: Console, base: str) -> None:
    """Mean of each primary diagnostic by checkpoint, its null underneath; then what is not shown, and why.

    Where not all checkpoints fit, some are chosen evenly, with the first and the last.
    """
    room, every = max(2, (console.width - 30) // 13), checkpoints
    if len(checkpoints) > room:
        checkpoints = [checkpoints[round(i * (len(checkpoints) - 1) / (room - 1))] for i in range(room)]
    start = f" from {clean(stem(base), 60)}" if base else ""
    table, whys = _new_table(f"Trajectory{start}: mean over matrices, null underneath"), dict[str, list[Finding]]()
    table.add_column("diagnostic")
    for checkpoint in checkpoints:
        name, step = checkpoint["checkpoint"].rpartition("/")[2], checkpoint.get("step")
        name = f"step {step}" if len(name) > 11 and step is not None else clean(name, 11)  # the step is what differs
        table.add_column(Text(name), justify="right", no_wrap=True)
    for column in findings(checkpoints[-1]):
        if is_primary(column.diagnostic, column.variant):
            cells = [find(c, column.diagnostic, column.variant) for c in checkpoints]
            table.add_row(_name(column), *(_cell(found, "\n") for found in cells))
            for found in cells:
                if found is None or found.row["mean"] is None:
                    whys.setdefault((found and found.row.get("reason")) or "not measured", []).append(column)
    print_table(table, console)
    if left := [c for c in every if not any(c is shown for shown in checkpoints)]:
        names_ = ", ".join(clean(c["checkpoint"].rpartition("/")[2]) for c in left)
        console.print(Text(f"Not shown, for want of room: {names_}. summary.json and the page have all {len(every)}."))
    for why, columns in whys.items():
        console.print(Text(f"–: {clean(why)} ({', '.join(names(list({id(c): c for c in columns}.values())))})"))


def _cell(found: Finding | None, between: str = " ", *, arrows: bool = False) -> Text:
    """The number, with an arrow where size does not explain it if `arrows` are asked for, and its null."""
    if found is None:
        return Text("–")
    text = Text(number(found.row["mean"], found.unit) + (_arrow(found) if arrows else ""))
    if arrows and found.reading == "geometry":
        text.stylize("bold cyan")
    if found.null and found.reading != "by construction":
        text.append(f"{between}({number(found.null.get('mean'), found.unit)})", style="dim")
    return text


def _print_arms(arms: dict[str, list[dict[str, Any]]], console: Console) -> None:
    """Last checkpoint of every arm side by side: mean, its null in brackets, and whether it differs."""
    table = _new_table("Last checkpoint of every arm (first seed): mean over matrices (null); ↑ ↓: reading “geometry”")
    table.add_column("diagnostic")
    for arm in arms:
        table.add_column(Text(arm_label(arm)), justify="right", no_wrap=True)
    between = " " if console.width >= 120 else "\n"
    last = {arm: checkpoints[-1] for arm, checkpoints in arms.items()}
    for column in findings(next(iter(last.values()))):
        cells = []
        for checkpoint in last.values():
            found = next((f for f in findings(checkpoint, column.diagnostic) if f.variant == column.variant), None)
            cell = _cell(found, between, arrows=True)
            if found is not None and found.over < found.row["total"]:
                cell.append(f"{between}{found.over}/{found.row['total']}", style="yellow")
            cells.append(cell)
        table.add_row(_name(column), *cells)
    print_table(table, console)

"""What the commands share: exit statuses, and how those that measure checkpoints take options and end."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.errors import ConfigError

if TYPE_CHECKING:  # --help imports no torch
    from opdgeo.diagnostics import Settings
    from opdgeo.survey import Result
    from opdgeo.survey.request import Execution, Request

DONE, BUG, REFUSED, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 130


def survey_options(command: argparse.ArgumentParser, *, factors: bool = True) -> None:
    """The options of every command that measures checkpoints; `factors`: also those of what compares with the base's factors."""
    command.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-out"), help="results folder (default: %(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the result of another update in OUT")
    command.add_argument(
        "--roles", default="all", help="attention, mlp, all or role names such as q_proj,o_proj (default: all)"
    )
    if factors:
        command.add_argument("--rank", type=int, default=512, help="rank of the principal subspaces (default: 512)")
    command.add_argument("--top-k", type=int, default=16, help="singular triplets of the update (default: 16)")
    if factors:
        command.add_argument(
            "--mask-rank", type=int, default=64, help="rank behind the principal mask and energy (default: 64)"
        )
        command.add_argument(
            "--mask-share", default="0.5,0.3", help="mask sizes as shares of the entries (default: 0.5,0.3)"
        )
    command.add_argument(
        "--eta", type=float, default=1e-3, help="relative tolerance of an unchanged entry (default: 1e-3)"
    )
    command.add_argument(
        "--nulls",
        type=int,
        default=4,
        help="null updates drawn per matrix where no closed form serves; 0 for no nulls (default: 4)",
    )
    if factors:
        command.add_argument(
            "--null", choices=("gaussian", "shuffled"), default="gaussian", help="null model (default: gaussian)"
        )
    command.add_argument(
        "--engine", choices=("local", "ray"), default="local", help="where matrices are measured (default: local)"
    )
    command.add_argument(
        "--ray-address",
        metavar="HOST:PORT",
        help="the Ray cluster of --engine ray; its nodes see the checkpoints at the same paths (default: $RAY_ADDRESS, else one on this machine)",
    )
    command.add_argument(
        "--workers", type=int, help="matrices measured at a time (default: one per CPU core, or four per GPU)"
    )
    command.add_argument(
        "--device", default="cpu", help="cpu, cuda for every visible GPU, or one such as cuda:1 (default: cpu)"
    )
    command.add_argument(
        "--plan",
        action="store_true",
        help="only say what would be measured, in how much time and memory; reads headers",
    )
    command.add_argument("--no-cache", action="store_true", help="neither read nor keep the base's factors on disk")
    if factors:
        command.add_argument("--all", action="store_true", help="print every number, not one line a diagnostic")
    command.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else (docs/result.schema.json)"
    )
    command.add_argument("--no-report", action="store_true", help="write the data files only, no report.html")


def settings(args: argparse.Namespace) -> Settings:
    """The settings that the options name."""
    from dataclasses import fields

    from opdgeo.diagnostics import Settings

    given = {f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    try:
        if "mask_share" in given:
            given["mask_share"] = tuple(float(x) for x in args.mask_share.split(","))
    except ValueError:
        raise ConfigError(f"--mask-share is {args.mask_share!r}; expected numbers such as 0.5,0.3.") from None
    return Settings(**given)


def execution(args: argparse.Namespace) -> Execution:
    """How the options want it carried out."""
    from opdgeo.survey.request import Execution

    return Execution(
        engine=args.engine,
        address=args.ray_address,
        workers=args.workers,
        device=args.device,
        cache=not args.no_cache,
        progress=sys.stderr.isatty(),
        out=args.out,
        overwrite=args.overwrite,
    )


def measure(args: argparse.Namespace, request: Request) -> int:
    """Measure `request`, or with --plan only say what it would take; returns the exit status."""
    from opdgeo.survey.run import plan_text, survey

    if args.plan:
        print(plan_text(request, args.workers))
        return DONE
    return finish(args, survey(request, execution(args)))


def finish(args: argparse.Namespace, result: Result) -> int:
    """Save `result` into OUT, print its table, write the page; returns the exit status."""
    from opdgeo.report.glossary import clean

    result.save(args.out)
    if args.json:
        page = None if args.no_report else str(_page(args.out))
        facts = {
            "format": 1,
            "out": str(args.out),
            "report": page,
            "notes": _notes(result),
            "skipped": len(result.skipped),
        }
        print(json.dumps(facts | {"summary": result.summary}, allow_nan=False))
    else:
        _tell(args, result)
    if result.skipped:
        print(
            f"opdgeo: {len(result.skipped)} matrices were not computed, first {clean(result.skipped[0])}; see `reason`",
            file=sys.stderr,
        )
        return INCOMPLETE
    return DONE


def _tell(args: argparse.Namespace, result: Result) -> None:
    show(result.summary, result.run, everything=getattr(args, "all", False), notes=_notes(result))
    if not args.no_report:
        print(f"report: {_page(args.out)}")
    print(f"data:   {args.out}/measurements.parquet, curves.parquet, summary.json, run.json")


def show(summary: dict[str, Any], run: dict[str, Any], *, everything: bool, notes: list[str]) -> None:
    """Print the table of a result between its notes, what changes the reading first. `run` is checked (`report.data.load`)."""
    from opdgeo.report.terminal import print_summary

    remarks = len(run.get("remarks") or [])
    for note in notes[:remarks]:
        print(f"note: {note}")
    if "pairs" in summary:
        from opdgeo.report.pairs import print_pairs

        print_pairs(summary)
    else:
        print_summary(summary, everything=everything, base=(run.get("base") or {}).get("path", ""))
    for note in notes[remarks:]:
        print(f"note: {note}")


def _page(out: Path) -> Path:
    from opdgeo.report import write_report

    return write_report(out)


def _notes(result: Result) -> list[str]:
    """What to know of the checkpoints and of this run, what changes the reading first."""
    run, notes = result.run, notes_of(result.run)
    if reused := run["reused"]:
        entries = [*result.summary["checkpoints"], *result.summary.get("pairs", [])]
        names = {d["diagnostic"] for one in entries for d in one["diagnostics"]}
        least, measured = min(reused.get(name, 0) for name in names), run["pairing"]["measured"]
        what = (
            ", ".join(reused)
            if not least
            else "every number"
            if least == measured
            else f"{least} of {measured} matrices"
        )
        notes.insert(len(run["remarks"]), f"taken over from an earlier run: {what}")
    return notes


def notes_of(run: dict[str, Any]) -> list[str]:
    """What run.json says that is worth knowing beside the table, its remarks first."""
    from opdgeo.report.glossary import clean

    notes = [clean(remark) for remark in run.get("remarks") or []]
    for label in ("base_only", "tuned_only", "unrecognised"):
        if names := (run.get("pairing") or {}).get(label):
            some = ", ".join(map(clean, names[:3]))
            notes.append(
                f"{label.replace('_', ' ')}: {len(names)} tensors not measured, such as {some} (all in run.json)"
            )
    of_checkpoints = (
        note for c in (run.get("base") or {}, *(run.get("checkpoints") or [])) for note in c.get("notes", [])
    )
    return notes + [clean(note) for note in dict.fromkeys(of_checkpoints)]

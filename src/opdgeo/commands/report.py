"""`opdgeo report`: the page, from the data files."""

from __future__ import annotations

import argparse
from pathlib import Path

from opdgeo.commands.common import DONE, notes_of, show
from opdgeo.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "report",
        help="rebuild the page from the data files, and print the table again",
        description="Rebuild report.html from the data files, and print the table of compare, track or relate again. No checkpoint is read.",
    )
    command.add_argument("out", metavar="OUT", nargs="+", type=Path, help="results folders")
    command.add_argument("--all", action="store_true", help="print every number, not one line a diagnostic")
    command.add_argument("--figures", action="store_true", help="also write figures/*.svg and figures/*.pdf")
    command.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also write what one study found as a page of text"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.report import write_report

    for out in args.out:
        page = write_report(out, figures=args.figures)
        print_again(out, everything=args.all)
        print(f"report: {page}")
    if args.markdown:
        from opdgeo.report.markdown import write_markdown

        if len(args.out) != 1:
            raise ConfigError(f"--markdown was given with {len(args.out)} folders; expected one study.")
        print(f"text:   {write_markdown(args.out[0], args.markdown)}")
    return DONE


def print_again(out: Path, *, everything: bool) -> None:
    """The table of a result of compare, track or relate, and its notes; nothing of another folder."""
    from opdgeo.report.data import summary_and_run

    if (out / "summary.json").is_file() and not (out / "claims.json").exists():
        summary, run = summary_and_run(out)
        show(summary, run, everything=everything, notes=notes_of(run))

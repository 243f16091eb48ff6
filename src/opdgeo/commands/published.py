"""`opdgeo published`: the released pairs that the paper measured, listed and measured."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.commands.common import DONE, INCOMPLETE, REFUSED, execution, settings, survey_options
from opdgeo.errors import ConfigError

if TYPE_CHECKING:  # --help imports no torch
    from opdgeo.experiments.released import Published
    from opdgeo.survey import Result

EPILOG = """\
examples:
  opdgeo published                                            the list
  opdgeo published --plan Polaris-4B-Preview                  what one would fetch and take; reads headers
  opdgeo published -o published --disk 60GB                   all, one by one; given again it goes on
  opdgeo published -o published Klear-Reasoner-8B --roles attention

OUT/report.html has the paper's values beside these, OUT/NAME the results of a pair. docs/hub.md says what is fetched and kept.
"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "published",
        help="list and measure the released pairs that the paper measured",
        description="List the released models whose unchanged share the paper gives, with their bases; with -o, fetch and measure them one "
        "by one, beside null models and the paper's value.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("names", metavar="NAME", nargs="*", help="some of the list (default: all)")
    survey_options(command)
    command.add_argument(
        "--disk",
        default="60GB",
        metavar="SIZE",
        help="weights that may lie on the disk at a time, such as 60GB (default: 60GB)",
    )
    command.add_argument("--keep", action="store_true", help="leave the fetched weights on the disk")
    command.set_defaults(run=run, out=None)


def run(args: argparse.Namespace) -> int:
    from opdgeo.experiments import released

    pairs = released.chosen(args.names)
    disk = _bytes(args.disk)
    if args.plan:
        return _plan(args, pairs)
    if args.out is None:
        _list(args, pairs)
        return DONE

    def tell(text: str) -> None:
        print(f"opdgeo: {text}", file=sys.stderr, flush=True)

    rows = released.measure(
        pairs,
        args.out,
        execution(args),
        roles=args.roles,
        settings=settings(args),
        disk=disk,
        keep=args.keep,
        tell=tell,
        each=lambda pair, folder, result: _one(args, folder, result),
    )
    return _finish(args, [row for row in rows if row["status"] != "measured"], len(rows))


def _plan(args: argparse.Namespace, pairs: list[Published]) -> int:
    from opdgeo.experiments import released
    from opdgeo.survey.run import plan_text

    for pair in pairs:
        asked = released.request_of(pair, roles=args.roles, settings=settings(args))
        print(f"{pair.name}\n{plan_text(asked, args.workers)}\n")
    return DONE


def _list(args: argparse.Namespace, pairs: list[Published]) -> None:
    from opdgeo.experiments.released import IDS

    if args.json:
        print(json.dumps({"format": 1, "pairs": [asdict(pair) | {"ids": IDS} for pair in pairs]}))
        return
    for pair in pairs:
        print(f"{pair.name:24} {pair.method:5} on {pair.data:15} {100 * pair.unchanged:5.1f} % unchanged in the paper")
        print(f"    {pair.base} → {pair.tuned}" + (f"\n    {pair.note}" if pair.note else ""))
    print(f"\nNames: {IDS}.\nopdgeo published -o OUT [NAME …] measures them; --plan says what that takes.")


def _one(args: argparse.Namespace, folder: Path, result: Result) -> None:
    from opdgeo.report import write_report

    if not args.no_report:
        write_report(folder)
    if args.all and not args.json:
        from opdgeo.report.terminal import print_summary

        print_summary(result.summary, everything=True)


def _finish(args: argparse.Namespace, failed: list[dict[str, str]], count: int) -> int:
    from opdgeo.report import write_report
    from opdgeo.report.published import TABLE, print_published

    if args.json:
        print((args.out / TABLE).read_text(encoding="utf-8"))
    else:
        print_published(args.out)
    if not args.no_report:
        page = write_report(args.out)
        print(f"report: {page}", file=sys.stderr if args.json else sys.stdout)
    if failed:
        first = failed[0]
        print(
            f"opdgeo: {len(failed)} of {count} pairs were not measured, first {first['name']}: {first['reason']}",
            file=sys.stderr,
        )
        return REFUSED if len(failed) == count else INCOMPLETE
    return DONE


def _bytes(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MGT])B", text.strip(), re.IGNORECASE | re.ASCII)
    if not found or not float(found[1]):
        raise ConfigError(f"--disk is {text!r}; expected a size such as 60GB or 500MB.")
    return int(float(found[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[found[2].upper()])

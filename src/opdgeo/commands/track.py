"""`opdgeo track`: a trajectory, finished or still growing."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from opdgeo.commands.common import execution, finish, measure, settings, survey_options
from opdgeo.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "track",
        help="measure a trajectory",
        description="Measure every checkpoint of a run against BASE, and how early the final update subspace appears.",
    )
    command.add_argument("base", metavar="BASE", help="the checkpoint where training started")
    command.add_argument(
        "checkpoints",
        metavar="RUN_DIR | CKPT",
        nargs="+",
        help="a folder of step-* or checkpoint-* folders, or checkpoints in order",
    )
    command.add_argument(
        "--follow",
        action="store_true",
        help="measure a run that is still going on, checkpoint by checkpoint, until it says that it is over",
    )
    command.add_argument(
        "--idle",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="end --follow after so long without a new one (default: 30)",
    )
    survey_options(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.survey.request import Request

    if args.follow and not args.plan:
        return _follow(args)
    return measure(args, Request.of_run(args.base, args.checkpoints, roles=args.roles, settings=settings(args)))


def _follow(args: argparse.Namespace) -> int:
    from opdgeo.report import write_report
    from opdgeo.survey.follow import follow

    if len(args.checkpoints) != 1 or args.engine != "local":
        raise ConfigError("--follow takes one run folder and measures on this machine. Leave the rest out.")

    def report(_: object) -> None:
        if not args.no_report:
            write_report(args.out)

    result = follow(
        args.base,
        args.checkpoints[0],
        replace(execution(args), progress=False),
        roles=args.roles,
        settings=settings(args),
        idle=args.idle,
        tell=lambda text: print(f"opdgeo: {text}", file=sys.stderr, flush=True),
        each=report,
    )
    return finish(args, result)

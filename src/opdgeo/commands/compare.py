"""`opdgeo compare`: one update."""

from __future__ import annotations

import argparse

from opdgeo.commands.common import measure, settings, survey_options


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "compare",
        help="measure one update",
        description="Measure the update from BASE to TUNED, matrix by matrix, beside null models.",
    )
    command.add_argument(
        "base",
        metavar="BASE",
        help="checkpoint before training: a folder or file of weights in any format of docs/formats.md",
    )
    command.add_argument("tuned", metavar="TUNED", help="checkpoint after training, or a PEFT adapter of BASE")
    survey_options(command)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.survey.request import Request

    return measure(args, Request.of_update(args.base, args.tuned, roles=args.roles, settings=settings(args)))

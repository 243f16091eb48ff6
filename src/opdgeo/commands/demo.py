"""`opdgeo demo`: two models that come with the package, measured and shown. No network."""

from __future__ import annotations

import argparse
from pathlib import Path

from opdgeo.commands.common import measure, settings, survey_options


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "demo",
        help="measure two packaged models: a first table and page, without network",
        description="Compare the packaged base (a Qwen3 of 1.6 M parameters) with the teacher that was trained from it: the table in "
        "the terminal, and report.html in OUT. The options are those of compare.",
    )
    survey_options(command)
    command.set_defaults(run=run, out=Path("opdgeo-demo"), overwrite=True)


def run(args: argparse.Namespace) -> int:
    import opdgeo
    from opdgeo.survey.request import Request

    models = Path(opdgeo.__file__).parent / "assets" / "tiny"
    return measure(
        args, Request.of_update(models / "base", models / "teacher", roles=args.roles, settings=settings(args))
    )

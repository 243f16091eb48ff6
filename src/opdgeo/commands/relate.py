"""`opdgeo relate`: do these updates of one base move alike?"""

from __future__ import annotations

import argparse

from opdgeo.commands.common import measure, settings, survey_options

EPILOG = """\
examples:
  opdgeo relate anchor/ runs/opd-seed0/step-000100 runs/opd-seed1/step-000100 -o seeds
  opdgeo relate Qwen3-8B-Base/ my-sft/ my-rlvr/ my-lora/ --roles attention -o alike

Each pair is read against two independent random updates of the same sizes: cosine, factor, signs, visible entries,
top subspaces and shared channel. `opdgeo explain NAME` says what a number means, docs/relate.md how to read the page.
"""


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "relate",
        help="measure how alike several updates of one base are",
        description="Compare the updates from BASE to A, B, …, every pair of them, matrix by matrix, beside what independent updates "
        "of the same sizes share by chance.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("base", metavar="BASE", help="the checkpoint that all of them started from")
    command.add_argument("first", metavar="A", help="a checkpoint after training, or a PEFT adapter of BASE")
    command.add_argument("others", metavar="B", nargs="+", help="one or more others")
    survey_options(command, factors=False)
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.survey.request import Request

    updates = [args.first, *args.others]
    return measure(args, Request.of_pairs(args.base, updates, roles=args.roles, settings=settings(args)))

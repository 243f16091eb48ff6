"""`opdgeo reproduce`: all arms, and a verdict on each of the paper's claims."""

from __future__ import annotations

import argparse
from pathlib import Path

from opdgeo.commands.common import DONE


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "reproduce",
        help="train all arms, measure them, and judge the paper's claims",
        description="Train SFT, OPD, RLVR and a matched SFT from a shared anchor, with --study full also every control, measure every "
        "update and trajectory, and judge each claim by a rule written before the run. Finished parts are kept: the same command "
        "goes on after an interruption.",
    )
    command.add_argument("--preset", default="tiny", help="models, task and settings (default: tiny)")
    command.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-study"), help="folder of the study (default: opdgeo-study)"
    )
    command.add_argument(
        "--seeds", type=int, default=1, help="independent repetitions, each with its own anchor (default: 1)"
    )
    command.add_argument("--first-seed", type=int, default=0, help="the first of these seeds (default: 0)")
    command.add_argument(
        "--study",
        choices=("small", "full"),
        default="small",
        help="small: the four paradigms (default); full: every control, with --seeds 3 in two to three hours on two cores",
    )
    command.add_argument("--workers", type=int, help="arms trained at a time (default: one per CPU core, at most 2)")
    command.add_argument(
        "--rehearse",
        action="store_true",
        help="give every arm a few steps: whether the whole study runs, not what it finds",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.experiments.reproduce import reproduce
    from opdgeo.report.terminal import print_claims

    claims = reproduce(
        args.preset,
        args.out,
        seeds=args.seeds,
        first_seed=args.first_seed,
        workers=args.workers,
        study=args.study,
        rehearse=args.rehearse,
    )
    print_claims(claims)
    print(f"report: {args.out / 'report.html'}")
    return DONE

"""`opdgeo signals`: the gradients that each objective gives a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opdgeo.commands.common import DONE


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "signals",
        help="compare the gradients that SFT, OPD and RLVR give a checkpoint",
        description="At each checkpoint, sample held-out prompts and take the gradient of every token under every objective (SFT, OPD, "
        "RLVR, their mixtures, token masks). Says how many directions the gradients of an objective fill, how far the objectives' "
        "second moments agree with each other, with chance, with credit of random sign and with the weights' principal directions, what "
        "masking tokens does, and whether mixtures follow the paper's formula.",
        epilog="example: opdgeo signals runs/opd/step-000020 runs/opd/step-000100 -o signals",
    )
    command.add_argument(
        "checkpoints",
        metavar="CHECKPOINT | RUN_DIR",
        nargs="+",
        help="Hugging Face folders, a run's folder (all its checkpoints), or tiny/base",
    )
    command.add_argument(
        "-o", "--out", type=Path, default=Path("opdgeo-signals"), help="results folder (default: opdgeo-signals)"
    )
    command.add_argument("--teacher", help="gives OPD's credit (default: the run's own, else the preset's)")
    command.add_argument(
        "--preset", default="tiny", help="task, lengths and teacher of a checkpoint outside a run (default: tiny)"
    )
    command.add_argument("--task", help="another task than the run's")
    command.add_argument("--prompts", type=int, default=64, help="held-out prompts; at least 4 (default: 64)")
    command.add_argument("--generations", type=int, default=8, help="samples of one prompt (default: 8)")
    command.add_argument(
        "--roles", default="all", help="attention, mlp, all or role names such as q_proj,o_proj (default: all)"
    )
    command.add_argument("--layers", help="such as 0,3, or all (default: the middle and the last)")
    command.add_argument("--top-k", type=int, default=16, help="leading directions compared (default: 16)")
    command.add_argument("--seed", type=int, default=0, help="of prompts, samples, masks and bootstrap (default: 0)")
    command.add_argument("--device", default="cpu", help="cpu, cuda, or one GPU such as cuda:1 (default: cpu)")
    command.add_argument("--no-report", action="store_true", help="write the data files only, no report.html")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.experiments.gradient_moments import signals
    from opdgeo.report import write_report
    from opdgeo.report.signals import print_signals

    names = ("preset", "task", "prompts", "generations", "roles", "layers", "top_k", "seed", "device", "out")
    result = signals(
        args.checkpoints, args.teacher, progress=sys.stderr.isatty(), **{name: getattr(args, name) for name in names}
    )
    result.save(args.out)
    print_signals(result.summary)
    if not args.no_report:
        print(f"report: {write_report(args.out)}")
    print(f"data:   {args.out}/signals.parquet, signals_spectra.parquet, signals.json, run.json")
    return DONE

"""`opdgeo evaluate`: avg@k of a checkpoint."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opdgeo.commands.common import DONE


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "evaluate",
        help="avg@k of a checkpoint on problems with answers",
        description="Sample k completions of every problem, verify them, and write the share that is right (avg@k) with its "
        "settings to OUT/evaluation.json and every completion to OUT/completions.jsonl.",
    )
    command.add_argument("model", metavar="CKPT", help="checkpoint folder, preset model or hub id")
    command.add_argument(
        "problems",
        metavar="PROBLEMS",
        help="a .jsonl or .parquet file with prompt (or problem) and answer, a dataset of the hub such as HuggingFaceH4/aime_2024, "
        "or `task`: the held-out problems of the run that CKPT belongs to",
    )
    command.add_argument("-k", type=int, default=8, help="samples of a problem (default: 8)")
    command.add_argument("-o", "--out", type=Path, default=Path("opdgeo-evaluation"), help="folder for the results")
    command.add_argument("--limit", type=int, help="the first so many problems only")
    command.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    command.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    command.add_argument("--max-tokens", type=int, default=8192, help="longest completion (default: 8192)")
    command.add_argument("--batch", type=int, default=16, help="completions at a time (default: 16)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--plain", action="store_true", help="prompts as they are, without the chat template")
    command.add_argument(
        "--trust-run",
        action="store_true",
        help="with `task`: take the task from the run's config.json even where it names files, datasets or unusual options",
    )
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.training.benchmark import evaluate

    names = ("k", "limit", "temperature", "top_p", "max_tokens", "batch", "seed", "plain", "device", "trust_run")
    result = evaluate(
        args.model, args.problems, args.out, **{n: getattr(args, n) for n in names}, progress=sys.stderr.isatty()
    )
    low, high = result["interval"]
    print(
        f"avg@{args.k}: {100 * result['average']:.1f} %  (95 % interval over problems {100 * low:.1f}–{100 * high:.1f}), "
        f"{result['problems']} problems, {result['mean_tokens']:.0f} tokens a completion, {100 * result['cut']:.1f} % cut"
    )
    print(f"data: {args.out}/evaluation.json, completions.jsonl")
    return DONE

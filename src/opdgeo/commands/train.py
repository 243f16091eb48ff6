"""`opdgeo train`: one arm."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.commands.common import DONE
from opdgeo.errors import ConfigError
from opdgeo.machine import keep_freed_memory

if TYPE_CHECKING:  # --help imports no torch
    from opdgeo.training.config import TrainConfig

# Options that are settings of OUT/config.json under the same name.
OVERRIDES = (
    "steps",
    "seed",
    "alpha",
    "token_share",
    "token_choice",
    "rollouts",
    "record_rollouts",
    "monitor",
    "channel",
    "constrain",
    "moments",
    "unconstrained",
    "vllm",
)


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "train",
        help="train one arm: sft, opd or rlvr",
        description="Train one arm on TRL. The three paradigms share the model, the task and the trainer; they differ in who "
        "writes the tokens and what credit a token gets.",
    )
    command.add_argument(
        "paradigm",
        metavar="{sft|opd|rlvr}",
        help="demonstrations, teacher gap, or verifier reward; or another arm of the preset, such as sft-matched",
    )
    command.add_argument(
        "--preset", default="tiny", help="models, task and settings: tiny (default), smollm2 or qwen3-8b"
    )
    command.add_argument("-o", "--out", type=Path, help="the arm's folder (default: opdgeo-PARADIGM)")
    command.add_argument("--model", help="start from this checkpoint instead of the preset's")
    command.add_argument("--steps", type=int, help="optimizer steps")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--alpha", type=float, help="share of the teacher's signal in the advantage: 1 is OPD, 0 is RLVR"
    )
    command.add_argument("--token-share", type=float, help="train on this share of each sample's tokens, rescaled")
    command.add_argument(
        "--token-choice", choices=("top", "random"), help="which tokens: largest student-teacher gap, or random"
    )
    command.add_argument(
        "--rollouts",
        metavar="student|teacher|FILE",
        help="who writes the tokens of opd and rlvr: student, teacher, or the rollouts.jsonl of an earlier run",
    )
    command.add_argument(
        "--vllm",
        choices=("off", "colocate", "server"),
        help="let vLLM write the student's rollouts, here or on a server",
    )
    command.add_argument(
        "--record-rollouts", action="store_true", default=None, help="keep every completion in OUT/rollouts.jsonl"
    )
    command.add_argument(
        "--monitor",
        type=int,
        metavar="STEPS",
        help="measure the update's geometry every so many steps (default: 25; 0: never)",
    )
    command.add_argument("--channel", help="hold the update in this channel: what `opdgeo channel` wrote")
    command.add_argument(
        "--constrain",
        choices=("gradient", "update", "adapter"),
        help="project gradients (the paper), the update too (exact), or train a LoRA with a frozen A (exact, less memory)",
    )
    command.add_argument(
        "--moments", choices=("reset", "project", "keep"), help="Adam's moments at the start (default: reset)"
    )
    command.add_argument(
        "--unconstrained", choices=("free", "frozen"), help="parameters that the channel does not hold (default: free)"
    )
    command.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        dest="settings",
        help="any other setting of OUT/config.json, the value as JSON, such as micro_batch=2",
    )
    command.add_argument(
        "--plan",
        nargs="?",
        const="",
        metavar="HARDWARE",
        help="only say what the run would take, by part, here or on stated hardware such as h100x8; refuse what cannot fit",
    )
    command.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.experiments.presets import make_teacher, train_config
    from opdgeo.training.distributed import is_main
    from opdgeo.training.models import resolve
    from opdgeo.training.train import train

    overrides = dict(_setting(text) for text in args.settings)
    overrides |= {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    config = train_config(args.paradigm, args.preset, origin=args.model, **overrides)
    out = args.out or Path(f"opdgeo-{args.paradigm}")
    if args.plan is not None:
        return _train_plan(config, args.plan or None)
    keep_freed_memory()
    make_teacher(config, progress=True)
    last = train(config, out, resume=args.resume, progress=True)
    if not is_main():
        return DONE
    print(f"last checkpoint: {last}")
    print(f"measure it:      opdgeo track {resolve(config.origin)} {out}")
    return DONE


def _train_plan(config: TrainConfig, hardware: str | None) -> int:
    from opdgeo.training import resources

    made = resources.plan(config, resources.hardware(hardware))
    print(resources.describe(made))
    resources.refuse_what_cannot_fit(made)
    return DONE


def _setting(text: str) -> tuple[str, object]:
    """NAME=VALUE; a value that is not JSON is a text."""
    name, equals, value = text.partition("=")
    if not (equals and name):
        raise ConfigError(f"--set is {text!r}; expected NAME=VALUE, such as --set micro_batch=2.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value

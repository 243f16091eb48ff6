"""`opdgeo channel`: the subspace of an update."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from opdgeo.commands.common import DONE
from opdgeo.errors import ConfigError


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "channel",
        help="extract the subspace of an update, as a PEFT adapter too",
        description="The top-K singular subspace of the update from BASE to CKPT for every matrix, in DIR/channel.safetensors, and as "
        "a LoRA adapter of BASE in DIR/adapter. `opdgeo train … --channel DIR --constrain update` holds training in it.",
    )
    command.add_argument("base", metavar="BASE", help="checkpoint before training")
    command.add_argument("tuned", metavar="CKPT", help="checkpoint after training")
    command.add_argument(
        "-k", default="16", help="directions of a matrix: a number, a share of its energy such as 0.9, or stable_rank"
    )
    command.add_argument(
        "-o", "--out", metavar="DIR", type=Path, default=Path("opdgeo-channel"), help="folder (default: opdgeo-channel)"
    )
    command.add_argument(
        "--side", choices=("right", "left"), default="right", help="directions of inputs (default) or outputs"
    )
    command.add_argument("--roles", default="all", help="as for compare (default: all)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.report.terminal import print_channel
    from opdgeo.training.channel import Channel, parse_choice

    progress = None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        progress = lambda matrices: track(matrices, "matrices", console=Console(stderr=True))  # noqa: E731
    channel = Channel.extract(args.base, args.tuned, parse_choice(args.k), args.side, args.roles, progress)
    path = channel.save(args.out)
    print_channel(channel.table())
    print(f"channel: {path}")
    try:
        print(f"adapter: {channel.to_adapter(args.base, args.out / 'adapter')}  (A = Vᵀ, B = 0, scale 1)")
    except ConfigError as error:
        print(f"no adapter: {error}")
    return DONE

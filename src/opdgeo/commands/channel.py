"""`opdgeo channel`: the subspace of an update."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.commands.common import DONE
from opdgeo.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # --help imports no torch
    from opdgeo.checkpoints import Checkpoint


ADAPTER = "adapter"


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "channel",
        help="extract the subspace of an update, as a PEFT adapter too",
        description="The top-K singular subspace of the update from BASE to CKPT for every matrix, in OUT/channel.safetensors, and as "
        "a LoRA adapter of BASE in OUT/adapter. `opdgeo train … --channel OUT --constrain update` holds training in it.",
    )
    command.add_argument("base", metavar="BASE", help="checkpoint before training")
    command.add_argument("tuned", metavar="CKPT", help="checkpoint after training")
    command.add_argument(
        "-k", default="16", help="directions of a matrix: a number, a share of its energy such as 0.9, or stable_rank"
    )
    command.add_argument(
        "-o", "--out", metavar="DIR", type=Path, default=Path("opdgeo-channel"), help="folder (default: opdgeo-channel)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace the channel of another update in OUT")
    command.add_argument(
        "--side", choices=("right", "left"), default="right", help="directions of inputs (default) or outputs"
    )
    command.add_argument("--roles", default="all", help="as for compare (default: all)")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.checkpoints import open_checkpoint
    from opdgeo.report.terminal import print_channel
    from opdgeo.survey.output import check_folder
    from opdgeo.training.channel import FILE, Channel, parse_choice

    choice = parse_choice(args.k)
    base = open_checkpoint(args.base)
    tuned = open_checkpoint(args.tuned, base)
    path = args.out if args.out.suffix == ".safetensors" else args.out / FILE
    folder = path.parent
    _check_earlier(path, (base, tuned), overwrite=args.overwrite)
    check_folder(folder, (), 1)
    progress = None
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        progress = lambda matrices: track(matrices, "matrices", console=Console(stderr=True))  # noqa: E731
    channel = Channel.extract(base, tuned, choice, args.side, args.roles, progress)
    channel.save(path)
    for stale in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / ADAPTER / stale).unlink(missing_ok=True)
    with suppress(OSError):  # it holds something else, or is not there
        (folder / ADAPTER).rmdir()
    print_channel(channel.table())
    print(f"channel: {path}")
    try:
        print(f"adapter: {channel.to_adapter(args.base, folder / ADAPTER)}  (A = Vᵀ, B = 0, scale 1)")
    except ConfigError as error:
        print(f"no adapter: {error}")
    return DONE


def _check_earlier(path: Path, update: tuple[Checkpoint, Checkpoint], *, overwrite: bool) -> None:
    """Whether the channel of `update` may be written: beside no result of another command, and over no other update's channel.

    Raises:
        ConfigError: it may not; the message says what lies there.
    """
    from opdgeo.survey.output import check_study
    from opdgeo.training.channel import Channel

    folder = path.parent
    check_study(folder)
    for name, what in (("run.json", "the result of a measurement"), ("log.jsonl", "a training run")):
        if (folder / name).exists():
            raise ConfigError(f"{folder} holds {what}. Give -o another folder for the channel.")
    if overwrite:
        return
    if path.exists():
        try:
            source = Channel.load(path).source
            before = [source[end] for end in ("base", "tuned")]
            if [Path(end).resolve() for end in before] == [c.path.resolve() for c in update]:
                return
            what = f"the channel of another update, {before[0]} → {before[1]}"
        except CheckpointError:
            what = "a file that is not a readable channel"
        except (KeyError, TypeError):  # a random one, or a part of another
            what = "the channel of another update"
    elif (folder / ADAPTER).exists():
        what = f"{ADAPTER}/ without a channel"
    else:
        return
    raise ConfigError(f"{folder} holds {what}. Give -o another folder, or add --overwrite to replace it.")

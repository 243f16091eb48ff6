"""`opdgeo cache`: the kept factors of base checkpoints."""

from __future__ import annotations

import argparse

from opdgeo.commands.common import DONE


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "cache",
        help="list or clear the kept factors of base checkpoints",
        description="compare and track keep the factors of BASE, so that its next checkpoint takes about half the time. The folder "
        "is $OPDGEO_CACHE, else opdgeo/spectra in the user's cache folder; $OPDGEO_CACHE_GB is its limit (default: 20).",
    )
    command.add_argument("action", choices=("list", "clear"), nargs="?", default="list")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from datetime import datetime

    from opdgeo.survey.cache import SpectrumCache

    cache = SpectrumCache()
    if args.action == "clear":
        print(f"{cache.folder}: {cache.clear() / 1e9:.2f} GB freed")
        return DONE
    entries = cache.entries()
    for path, size, used in entries:
        print(f"{size / 1e6:8.1f} MB  {datetime.fromtimestamp(used):%Y-%m-%d %H:%M}  {path.stem[:16]}")
    print(f"{cache.folder}: {len(entries)} spectra, {sum(e[1] for e in entries) / 1e9:.2f} of {cache.limit / 1e9:g} GB")
    return DONE

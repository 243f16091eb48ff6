"""`opdgeo --completion SHELL`: a script by which a shell completes commands, options, their values and files."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")


def script(command_line: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of `SHELLS`, by shtab: it is made once, and completing starts no Python."""
    import shtab

    from opdgeo.diagnostics import DIAGNOSTICS
    from opdgeo.experiments.released import PAIRS

    names = {"diagnostic": list(DIAGNOSTICS), "names": [pair.name for pair in PAIRS]}
    for action in _actions(command_line):
        if action.dest in names and not action.option_strings:
            action.choices = names[action.dest]
        elif action.choices is None and (not action.option_strings or action.type is Path):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(command_line, shell))


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
        else:
            yield action

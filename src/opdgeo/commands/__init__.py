"""The command line: one file a command, each with `add` (its options) and `run` (what it does).

Only the standard library is imported here and at the top of those files, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import sys
from typing import NoReturn

from opdgeo.commands import (
    cache,
    channel,
    compare,
    completion,
    demo,
    evaluate,
    explain,
    published,
    relate,
    report,
    reproduce,
    signals,
    track,
    train,
)
from opdgeo.commands.common import DONE, INTERRUPTED, REFUSED
from opdgeo.commands.streams import forgiving_output
from opdgeo.errors import OpdgeoError, printable

COMMANDS = (
    demo,
    compare,
    track,
    relate,
    published,
    train,
    evaluate,
    reproduce,
    signals,
    channel,
    cache,
    report,
    explain,
)

# Disks and machines that are full, broken or forbidden: no bug of ours.
MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.EMFILE,
    errno.ENFILE,
}

EPILOG = """\
examples:
  opdgeo demo
  opdgeo compare Qwen3-8B-Base/ my-sft-run/checkpoint-500 -o update
  opdgeo track anchor/ runs/opd -o trajectory
  opdgeo relate anchor/ runs/sft/step-000100 runs/opd/step-000100 -o alike
  opdgeo published -o published
  opdgeo train opd --steps 100 -o runs/opd
  opdgeo reproduce --seeds 3 -o study

exit status: 0 done; 2 the request cannot be met; 3 finished, but some matrices were not computed; 1 a bug
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    main = argparse.ArgumentParser(
        prog="opdgeo",
        description="Where post-training moves a language model's weights.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--version", action="store_true", help="print the version and exit")
    main.add_argument(
        "--completion",
        choices=completion.SHELLS,
        metavar="SHELL",
        help="print a script that makes bash, zsh or fish complete this command line, and exit",
    )
    commands = main.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return main


def main(argv: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its status."""
    output = forgiving_output()
    status = _run(argv)
    if output is not None:
        output.flush()
        if output.failed:
            print(f"opdgeo: standard output could not be written: {output.failed}", file=sys.stderr)
            status = status or REFUSED
    sys.exit(status)


def _run(argv: list[str] | None) -> int:
    command_line = parser()
    _refuse_a_typo(command_line, sys.argv[1:] if argv is None else argv)
    args, unknown = command_line.parse_known_args(argv)
    if unknown:
        _refuse_unknown(command_line, args.command, unknown)
    if args.version:
        from opdgeo import __version__

        print(f"opdgeo {__version__}")
        return DONE
    if args.completion:
        print(completion.script(command_line, args.completion))
        return DONE
    if args.command is None:
        command_line.print_help()
        return DONE
    try:
        return int(args.run(args))
    except OpdgeoError as error:
        print(f"opdgeo: {error}", file=sys.stderr)
        return REFUSED
    except OSError as error:
        if error.errno not in MACHINE:
            raise  # a bug
        print(f"opdgeo: {printable(str(error))}. Give the command again when that is mended.", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("opdgeo: interrupted; nothing half-written was left", file=sys.stderr)
        return INTERRUPTED


def _refuse_a_typo(command_line: argparse.ArgumentParser, argv: list[str]) -> None:
    """Say which command was meant; argparse lists them all."""
    names = [command.__name__.rpartition(".")[2] for command in COMMANDS]
    if argv and argv[0] not in names and (near := difflib.get_close_matches(argv[0], names, n=1)):
        command_line.error(f"there is no command {printable(argv[0])!r}; did you mean {near[0]}?")


def _refuse_unknown(command_line: argparse.ArgumentParser, command: str | None, unknown: list[str]) -> NoReturn:
    """Say what `command` does not take, in its own usage and with the option that was meant; argparse shows that of the program."""
    of = command_line
    for action in command_line._actions:
        if command and isinstance(action, argparse._SubParsersAction):
            of = action.choices[command]
    options = [name for action in of._actions for name in action.option_strings]
    given = (each.partition("=")[0] for each in unknown if each.startswith("-"))
    near = next((found[0] for each in given if (found := difflib.get_close_matches(each, options, n=1))), None)
    hint = f"; did you mean {near}?" if near else ""
    of.error(f"unrecognized arguments: {printable(' '.join(unknown))}{hint}")


if __name__ == "__main__":
    main()

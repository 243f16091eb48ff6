"""Standard output that may be closed, full, or unable to show a letter, without a result being lost over it."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata

_ASCII = {
    "–": "-",
    "−": "-",
    "×": "x",
    "°": " deg",
    "η": "eta",
    "σ": "sigma",
    "Δ": "d",
    "α": "alpha",
    "→": "->",
    "↑": "^",
    "↓": "v",
    "≤": "<=",
    "≥": ">=",
    "‖": "||",
    "§": "section ",
}


class Output(io.TextIOWrapper):
    """A stream that goes on when nobody reads it any more, and spells out what its encoding lacks.

    `failed` is why the rest of the output was lost, such as a full disk; a reader that left, as `head` does, is no failure.
    """

    failed = ""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            self.failed = str(error)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self.fileno())
        os.close(nothing)


def spelled(error: UnicodeError) -> tuple[str, int]:
    """What stands for letters that an encoding lacks: their spelling, their base letters, else ``?``."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    bases = (unicodedata.normalize("NFKD", c).encode("ascii", "ignore").decode() for c in lacking)
    return "".join(_ASCII.get(c, base) or "?" for c, base in zip(lacking, bases, strict=True)), error.end


def forgiving_output() -> Output | None:
    """Put an `Output` in the place of this process's standard output; None where a caller has put another there.

    A stream that was closed before the start leads nowhere.
    """
    codecs.register_error("spelled", spelled)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    elif isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="spelled")
    out = sys.stdout
    if out is None:
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if out is not sys.__stdout__ or not isinstance(out, io.TextIOWrapper):
        return None
    encoding, line_buffering = out.encoding, out.line_buffering
    output = Output(out.detach(), encoding=encoding, errors="spelled", line_buffering=line_buffering)
    sys.stdout = output
    return output

"""Answers compared as mathematics, by math-verify in a process of its own that may take neither long nor much.

The text of a model is untrusted: ``9^9^9^9`` is an honest answer to sympy, and one product of integers in C that no signal ends.
So the comparison runs beside this program, with limits of memory and time; what breaks them is a wrong answer.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import select
import subprocess
import sys
import threading
from contextlib import suppress

from opdgeo.errors import ConfigError

SECONDS = 5  # that one answer may take to parse, and one pair to compare, by math-verify's own clock
PATIENCE = 3 * SECONDS + 5.0  # until the process is ended: two answers and their comparison
START = 120.0  # until it must have loaded sympy
MEMORY = 3 << 30  # bytes of address space
LONGEST = 1 << 16  # characters of a completion, from its end: the last answer counts

_CHILD = """
import json, os, resource, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import math_verify
resource.setrlimit(resource.RLIMIT_AS, ({memory}, {memory}))
print("ready", file=answers, flush=True)
for line in sys.stdin:
    answer, completion = json.loads(line)
    try:
        gold = math_verify.parse("$" + answer + "$", parsing_timeout={seconds})
        found = math_verify.parse(completion, parsing_timeout={seconds})
        equal = math_verify.verify(gold, found, timeout_seconds={seconds})
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        equal = False
    print(int(bool(equal)), file=answers, flush=True)
"""


def same(completion: str, answer: str) -> bool:
    """Whether the last answer in `completion` equals `answer` as mathematics. One that takes too long or too much does not.

    Raises:
        ConfigError: math-verify is not installed, or does not start.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigError(
            "the task `problems` needs the package math-verify, which is not installed; try: pip install 'opdgeo[tasks]'"
        )
    with _lock:
        return _checker().ask(completion[-LONGEST:], answer[-LONGEST:])


class _Checker:
    def __init__(self) -> None:
        self.owner = os.getpid()
        code = _CHILD.format(memory=MEMORY, seconds=SECONDS)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if self._line(START) != b"ready\n":
            self.end()
            raise ConfigError("math-verify did not start; try: python -c 'import math_verify'.")

    def ask(self, completion: str, answer: str) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps([answer, completion]).encode() + b"\n")
            self.process.stdin.flush()
            found = self._line(PATIENCE)
        except OSError:
            found = b""
        if found not in (b"0\n", b"1\n"):
            self.end()
        return found == b"1\n"

    def _line(self, seconds: float) -> bytes:
        """What it says next; nothing where it takes longer, or has ended."""
        assert self.process.stdout is not None
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            return b""
        return self.process.stdout.readline()

    @property
    def usable(self) -> bool:
        """Not after a fork, whose other side would read the same answers, nor when it has ended."""
        return self.owner == os.getpid() and self.process.poll() is None

    def end(self) -> None:
        if self.owner != os.getpid():
            return
        self.process.kill()
        for stream in (self.process.stdin, self.process.stdout):
            with suppress(OSError):
                stream and stream.close()
        self.process.wait()


_lock = threading.Lock()
_running: list[_Checker] = []


def _checker() -> _Checker:
    if not (_running and _running[0].usable):
        _running[:] = [_Checker()]
    return _running[0]


@atexit.register
def _end() -> None:
    for checker in _running:
        checker.end()

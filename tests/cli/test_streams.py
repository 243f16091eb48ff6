"""A result is not lost over where its summary is printed: a reader that leaves, a full disk, an old terminal, a closed stream."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from program import SOURCE, run_python

EXPLAIN = [sys.executable, "-m", "opdgeo", "explain", "stable_rank"]
# opdgeo, its standard output a pipe that nobody reads, and written at once as with PYTHONUNBUFFERED
UNREAD = """
import io, os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.close(writer)
sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)
from opdgeo.commands import main
main(sys.argv[1:])
"""


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(SOURCE), **changes}


def test_a_reader_that_leaves_costs_no_page(tmp_path: Path) -> None:
    few = ("--roles", "q_proj", "--nulls", "0")
    done = run_python("-c", UNREAD, "compare", "tiny/base", "tiny/teacher", *few, "-o", tmp_path / "out")
    assert (done.stderr, done.returncode) == ("", 0)
    assert (tmp_path / "out" / "report.html").is_file()


@pytest.mark.needs("full")
def test_a_full_disk_under_the_summary_is_told(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(EXPLAIN, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert done.returncode == 2
    assert done.stderr.startswith("opdgeo: standard output could not be written: ") and done.stderr.count("\n") == 1


def test_a_terminal_of_ascii_shows_spellings() -> None:
    done = subprocess.run(EXPLAIN, capture_output=True, env=environment(PYTHONIOENCODING="ascii"))
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"||dW||_F2 / ||dW||22" in done.stdout and done.stdout.isascii()


@pytest.mark.parametrize("closed", [1, 2])
def test_a_closed_stream_leads_nowhere(closed: int) -> None:
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}>&-', "sh", *EXPLAIN], capture_output=True, env=environment()
    )
    assert done.returncode == 0 and done.stderr == b""

"""A thinned minute of `make torture`: a few inputs of every kind, some kills, some broken disks. The whole takes most of an hour."""

from __future__ import annotations

import errno
from pathlib import Path

from program import run_python
from torture import kills
from torture.corpus import corpus
from torture.families import FAMILIES

TESTS = Path(__file__).parents[1]


def test_inputs_of_every_kind_end_well(tmp_path: Path) -> None:
    """The sound ones are accepted; the others are, or are refused, within limits and with nothing else touched."""
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r}); from torture.__main__ import main; sys.exit(main())"
    done = run_python("-c", code, "--seed", 7, "--inputs", 700, "--jobs", 1, "--no-kills")
    assert done.returncode == 0, done.stdout + done.stderr
    for family in FAMILIES:
        assert family.name in done.stdout
        assert all(corpus()[source] for source in family.sources or (family.name,))


def test_runs_that_are_killed_go_on(tmp_path: Path) -> None:
    report = kills.kill_matrix(
        tmp_path, {("SIGTERM", "cache save", "changed setting"), ("SIGINT", "part save", "follow")}
    )
    assert report.cases == 2 and not report.wrong, report.wrong


def test_a_disk_that_fails_is_told_and_costs_nothing(tmp_path: Path) -> None:
    report = kills.faults(
        tmp_path, [dict(longest=1000), dict(fault=12, errno=errno.ENOSPC), dict(reads=9, errno=errno.EIO)]
    )
    assert report.cases == 3 and not report.wrong, report.wrong

"""What standard error says while a survey runs: the matrix at hand, how far it is, the time left."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from opdgeo.checkpoints import Matrix
from opdgeo.survey import progress
from opdgeo.survey.progress import Fetching, Measuring

WORK = [Matrix(f"{layer}.{role}", "", layer, role, 8, 8) for layer in (0, 1) for role in ("q_proj", "up_proj")]


def test_the_matrix_at_hand_is_the_one_begun_last() -> None:
    """Two at a time, in the order of the work."""
    with Measuring(False, WORK, 2) as bar:
        said = [bar.at_hand()]
        for matrix in WORK:
            bar.advance(matrix)
            said.append(bar.at_hand())
    assert said == [
        "0 of 4 matrices, at layer 0 up_proj",
        "1 of 4 matrices, at layer 1 q_proj",
        "2 of 4 matrices, at layer 1 up_proj",
        "3 of 4 matrices, at layer 1 up_proj",
        "4 of 4 matrices",
    ]


def test_a_terminal_sees_it_with_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=100)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    with Measuring(True, WORK, 1) as bar:
        bar.advance(WORK[0])
        bar.bar.refresh()
    assert "1 of 4 matrices, at layer 0 up_proj" in seen.getvalue()
    assert "25%" in seen.getvalue()
    assert ":" in seen.getvalue()
    with Fetching(True, 4_000_000) as fetching:
        fetching.advance(1_000_000)
        fetching.bar.refresh()
    assert "1.0/4.0 MB" in seen.getvalue()


def test_where_there_is_no_terminal_a_line_says_it_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [time.monotonic()]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Fetching(False, 4_000_000_000) as bar:
        for _ in range(3):
            now[0] += 20.0
            bar.advance(1_000_000_000)
    assert capsys.readouterr().err == "opdgeo: fetched 2.00 of 4.00 GB, about 40 s left\n"

"""The plan reads headers, writes nothing, and refuses what cannot fit."""

from __future__ import annotations

from pathlib import Path

import pytest

import opdgeo
import planted
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.survey import memory, plan
from test_compare import BASE, TUNED, program, write_pair


def test_a_plan_names_every_shape_and_what_is_left_out(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    out = tmp_path / "out"
    for command in (["compare", base, tuned], ["track", base, tuned]):
        done = program(*command, "--plan", "-o", out)
        assert done.returncode == 0, done.stderr
        shapes = {BASE[name].shape for name in planted.linear(BASE)}
        for rows, cols in shapes:
            assert f"{rows}×{cols}" in done.stdout
        assert f"{len(planted.linear(BASE))} matrices" in done.stdout
        assert "GB available" in done.stdout
        assert "norm" in done.stdout
    assert not out.exists()


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    opened = [open_checkpoint(base), open_checkpoint(tuned)]
    work = pair(*opened).matrices
    sizes = {m: memory.working_set(m, opened, opdgeo.Settings()) for m in work}
    monkeypatch.setattr(plan, "available_memory", lambda: max(sizes.values()) - 1)
    fitting = {m.role for m in work if sizes[m] < max(sizes.values())}
    with pytest.raises(opdgeo.errors.ConfigError, match="GB are available") as refused:
        opdgeo.compare(base, tuned)
    assert all(role in str(refused.value) for role in fitting)
    monkeypatch.setattr(plan, "available_memory", lambda: 10)
    with pytest.raises(opdgeo.errors.ConfigError, match="more memory"):
        opdgeo.compare(base, tuned)
    assert program("compare", base, tuned, "--plan", "--rank", "0").returncode == 2


def test_matrices_wait_until_there_is_room() -> None:
    room = memory.Memory(10)
    with room.room_for(100):  # one alone always may
        assert room.used == 100
    with room.room_for(4), room.room_for(6):
        assert room.used == 10
    assert room.used == 0

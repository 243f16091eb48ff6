"""A run that is killed goes on from its finished matrices and ends with the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import opdgeo
import planted
from opdgeo.survey import measure as measuring
from test_compare import SOURCE, program

FILES = ("measurements.parquet", "curves.parquet", "summary.json")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two checkpoints of six layers, large enough that a run lasts some seconds."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    names = [planted.tensor_name(layer, module) for layer in range(6) for module in ("self_attn.q_proj", "mlp.up_proj")]
    weights = {name: planted.weights(rng, 320, 256) for name in names}
    planted.write_checkpoint(folder / "base", weights, "bfloat16")
    for step in (10, 20):
        weights = {name: w + 3e-4 * rng.standard_normal(w.shape) for name, w in weights.items()}
        planted.write_checkpoint(folder / "run" / f"step-{step:06d}", weights, "bfloat16")
    return folder


def test_twenty_kills_leave_no_trace(run_folder: Path, tmp_path: Path) -> None:
    arguments = ["track", run_folder / "base", run_folder / "run", "--no-report", "--no-cache", "--nulls", "1"]
    started = time.perf_counter()
    whole = program(*arguments, "-o", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    lasted = time.perf_counter() - started
    pick, environment = random.Random(0), {**os.environ, "PYTHONPATH": str(SOURCE)}
    kills, rounds, partly = 0, 0, 0
    while kills < 20:
        out, kept, rounds = tmp_path / f"killed-{rounds}", 0, rounds + 1
        while not (out / "run.json").exists():
            command = [sys.executable, "-m", "opdgeo", *map(str, arguments), "-o", str(out)]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                assert process.wait(timeout=lasted * pick.uniform(0.3, 1.0)) == 0
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            now = len(list((out / ".parts").glob("*.json")))
            if not (out / "run.json").exists():
                assert now >= kept, "a finished matrix was lost"
                kept = now
                partly += 0 < now < 12
        if (out / ".parts").exists():  # killed on its way out: the next run clears up
            assert program(*arguments, "-o", out).returncode == 0
        for file in FILES:
            assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
        assert not (out / ".parts").exists()
    assert partly, "no kill came in the middle of the matrices"


def test_finished_matrices_are_not_measured_again(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run_folder / "run" / "step-000010"
    measured: list[str] = []
    original = measuring.measure

    def counted(matrix, *arguments, **options):  # type: ignore[no-untyped-def]
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(matrix.name)
        return original(matrix, *arguments, **options)

    monkeypatch.setattr(measuring, "measure", counted)

    def compare(**options: object) -> opdgeo.Result | None:
        measured.clear()
        try:
            return opdgeo.compare(run_folder / "base", checkpoint, workers=1, cache=False, out=tmp_path, **options)  # type: ignore[arg-type]
        except KeyboardInterrupt:
            return None

    settings = opdgeo.Settings(nulls=0)
    assert compare(settings=settings) is None
    assert compare(settings=settings) is None
    last = compare(settings=settings)
    assert last is not None
    assert len(measured) == 2, "5 + 5 + 2 of 12"
    assert compare(settings=opdgeo.Settings(nulls=0, rank=64)) is None, "another rank is another run"
    for file in (tmp_path / ".parts").iterdir():
        file.write_text(file.read_text()[:100])  # damaged: measured again
    assert compare(settings=settings) is None
    assert compare(settings=settings) is None
    again = compare(settings=settings)
    assert again is not None
    assert again.measurements.equals(last.measurements)
    last.save(tmp_path)
    assert not (tmp_path / ".parts").exists()
    assert json.loads((tmp_path / "run.json").read_text())["pairing"]["measured"] == 12

"""`track --follow`: a run that grows, deletes its old checkpoints, and says when it is over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from opdgeo.checkpoints import Matrix, open_checkpoint
from opdgeo.errors import CheckpointError
from opdgeo.numerics.spectra import spectrum
from opdgeo.survey import follow
from opdgeo.survey.measure import Step
from opdgeo.survey.request import Execution
from opdgeo.survey.trail import Trail
from program import start_opdgeo

NAMES = [planted.tensor_name(0, module) for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]


@pytest.fixture
def growing(tmp_path: Path) -> tuple[Path, list[Path]]:
    """A base and four checkpoints, written elsewhere."""
    rng = np.random.default_rng(4)
    weights = {name: planted.weights(rng, 48, 40) for name in NAMES}
    base = planted.write_checkpoint(tmp_path / "base", weights, "float32")
    written = []
    for step in (10, 20, 30, 40):
        weights = {n: w + planted.low_rank_update(rng, w, 6, 0.01) for n, w in weights.items()}
        written.append(planted.write_checkpoint(tmp_path / "later" / f"checkpoint-{step}", weights, "float32"))
    return base, written


def publish(folder: Path, run: Path) -> None:
    """As transformers writes it: weights first, trainer_state.json last."""
    (run / folder.name).mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        shutil.copyfile(file, run / folder.name / file.name)
    state = {"global_step": int(folder.name.removeprefix("checkpoint-")), "max_steps": 40}
    (run / folder.name / "trainer_state.json").write_text(json.dumps(state))


def test_a_growing_run_ends_with_the_rows_of_track(growing: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, written = growing
    run, out = tmp_path / "run", tmp_path / "out"
    command = ["track", base, run, "--follow", "-o", out, "--no-report", "--no-cache", "--nulls", 1, "--idle", 2]
    process = start_opdgeo(*command)
    try:
        for count, folder in enumerate(written, 1):
            publish(folder, run)
            if folder is written[2]:  # the run keeps its last two
                shutil.rmtree(run / written[0].name)
            deadline = time.monotonic() + 60
            while process.poll() is None and time.monotonic() < deadline:
                seen = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
                if len(seen.get("checkpoints", ())) == count:
                    assert count == 4 or seen["growing"]
                    break
                time.sleep(0.2)
        assert process.wait(60) == 0, process.output()[1]
    finally:
        process.kill()
    followed = pl.read_parquet(out / "measurements.parquet")
    settings = opdgeo.Settings(nulls=1)
    plain = opdgeo.track(base, list(written), settings=settings, cache=False).measurements
    assert followed.equals(plain)
    assert not (out / ".parts").exists()
    assert json.loads((out / "run.json").read_text())["growing"] is False


def test_what_is_still_being_written_is_not_read(
    growing: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, written = growing
    run = tmp_path / "run"
    seen = follow.Growing(run, open_checkpoint(base), tmp_path / "out", "all")
    assert seen.look() == []  # no folder yet
    partial = run / "checkpoint-10"
    partial.mkdir(parents=True)
    whole = (written[0] / "model.safetensors").read_bytes()
    (partial / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    monkeypatch.setattr(follow, "SETTLE", 0.3)
    assert seen.look() == []
    time.sleep(0.4)
    assert seen.look() == []  # settled, and half a file
    (partial / "model.safetensors").write_bytes(whole)
    assert seen.look() == []  # it just changed
    time.sleep(0.4)
    assert seen.look() == ["checkpoint-10"]
    (partial / "trainer_state.json").write_text('{"global_step": 10, "max_')
    assert not seen.over()
    (partial / "trainer_state.json").write_text('{"global_step": 10, "max_steps": 10}')
    assert seen.over()


def test_a_run_that_never_comes_is_named(growing: tuple[Path, list[Path]], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no complete checkpoint appeared in .*nowhere"):
        follow.follow(growing[0], tmp_path / "nowhere", Execution(out=tmp_path / "out"), idle=0.001)


def test_a_checkpoint_that_does_not_open_is_told_once(growing: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, written = growing
    publish(written[0], tmp_path / "run")
    (tmp_path / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"broken")
    heard: list[str] = []
    with pytest.raises(CheckpointError, match=r"no complete checkpoint .*not a readable safetensors file"):
        follow.follow(base, tmp_path / "run", Execution(out=tmp_path / "out"), idle=0.06, tell=heard.append)
    assert [line for line in heard if line.startswith("checkpoint-10 cannot be read yet")] == heard[:1]


def test_a_checkpoint_of_another_shape_is_left_out_and_told(growing: tuple[Path, list[Path]], tmp_path: Path) -> None:
    base, written = growing
    for place in written[:3]:
        publish(place, tmp_path / "run")
    odd = tmp_path / "run" / written[1].name / "model.safetensors"
    save_file({name: torch.ones(3, 2) for name in NAMES}, odd)
    heard: list[str] = []
    result = follow.follow(base, tmp_path / "run", Execution(out=tmp_path / "out"), idle=0.002, tell=heard.append)
    named = [c["checkpoint"] for c in result.summary["checkpoints"]]
    assert named == [written[0].name, written[2].name]
    assert any(line.startswith(f"{written[1].name} cannot be read yet") and "3×2" in line for line in heard)


@pytest.mark.parametrize("state", [{"max_steps": "x", "global_step": 3}, {"max_steps": 9, "global_step": None}])
def test_a_state_of_other_types_ends_no_run(
    state: dict[str, object], growing: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, written = growing
    publish(written[0], tmp_path / "run")
    seen = follow.Growing(tmp_path / "run", open_checkpoint(base), tmp_path / "out", "all")
    seen.look()
    (tmp_path / "run" / written[0].name / "trainer_state.json").write_text(json.dumps(state))
    assert not seen.over()


def test_a_state_that_is_no_file_is_not_waited_for(growing: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A pipe that nobody writes to, and brackets without end."""
    base, written = growing
    publish(written[0], tmp_path / "run")
    seen = follow.Growing(tmp_path / "run", open_checkpoint(base), tmp_path / "out", "all")
    state = tmp_path / "run" / written[0].name / "trainer_state.json"
    seen.look()
    state.write_text("[" * 100_000)
    assert not seen.over()
    state.unlink()
    os.mkfifo(state)
    signal.alarm(60)  # a read of the pipe would never end
    try:
        assert seen.look() == [] and not seen.over()
    finally:
        signal.alarm(0)


def test_kept_steps_come_back_on_the_device_that_measures(tmp_path: Path) -> None:
    matrix = Matrix(NAMES[0], NAMES[0], 0, "q_proj", 6, 5)
    trail = Trail(tmp_path, ("key",))
    trail.save(matrix, 0, Step(spectrum=spectrum(torch.eye(6, 5, dtype=torch.float64), 2)))
    for device in ("cpu", "meta"):
        kept = trail.load(matrix, 0, device)
        assert kept is not None and kept.spectrum is not None
        assert {getattr(kept.spectrum, t).device.type for t in ("left", "right")} == {device}
        assert {getattr(kept.spectrum, t).device.type for t in ("sigma", "errors")} == {"cpu"}, "values are on the host"

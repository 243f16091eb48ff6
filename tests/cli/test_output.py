"""`-o` never loses a result in silence: another update's stays, and a folder that cannot be written is refused before measuring."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

import planted
from opdgeo.checkpoints import Matrix
from opdgeo.errors import ConfigError
from opdgeo.survey.output import check_folder
from program import run_opdgeo

NAME = planted.tensor_name(0, "mlp.up_proj")
FAST = ("--nulls", 0, "--no-report", "--no-cache")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, another base, and a run of two steps, one matrix each."""
    folder = tmp_path_factory.mktemp("output")
    rng = np.random.default_rng(0)
    weights = planted.weights(rng, 24, 16)
    for name in ("base", "other", "run/step-000001", "run/step-000002"):
        weights = weights + 1e-3 * rng.standard_normal(weights.shape)
        planted.write_checkpoint(folder / name, {NAME: weights}, "float32")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def test_another_updates_result_stays(folders: Path, tmp_path: Path) -> None:
    base, other, run, out = folders / "base", folders / "other", folders / "run", tmp_path / "out"
    one, two = run / "step-000001", run / "step-000002"
    assert run_opdgeo("compare", base, one, "-o", out, *FAST).returncode == 0
    kept = contents(out)
    for wanted in (("compare", base, two), ("compare", other, one), ("track", base, two), ("track", other, run),
                   ("track", other, run, "--follow", "--idle", 0)):  # fmt: skip
        done = run_opdgeo(*wanted, "-o", out, *FAST)
        assert done.returncode == 2, (wanted, done.stdout)
        for said in (str(base), str(one), "--overwrite", str(out)):
            assert said in done.stderr, done.stderr
        assert contents(out) == kept
    assert run_opdgeo("compare", base, one, "-o", out, *FAST, "--rank", 4).returncode == 0, "the same pair goes on"
    moved = shutil.copytree(one, tmp_path / "copy" / "elsewhere")
    assert run_opdgeo("compare", base, moved, "-o", out, *FAST).returncode == 0, "the same files in another place"
    done = run_opdgeo("compare", base, two, "-o", out, *FAST, "--overwrite")
    assert done.returncode == 0, done.stderr
    (measured,) = json.loads((out / "run.json").read_text())["checkpoints"]
    assert measured["path"] == str(two)
    assert run_opdgeo("track", base, run, "-o", out, *FAST).returncode == 0, "a trajectory with the pair in it"
    kept = contents(out)
    done = run_opdgeo("track", base, one, "-o", out, *FAST)
    assert done.returncode == 2 and "and 1 more" in done.stderr, "a checkpoint's numbers would be lost"
    assert contents(out) == kept


def test_what_is_no_result_stays(folders: Path, tmp_path: Path) -> None:
    pair = folders / "base", folders / "other"
    for name, options, said in (
        ("claims.json", ("--overwrite",), "a study"), ("signals.json", ("--overwrite",), "signals"),
        ("run.json", (), "not of compare, track or relate"),
    ):  # fmt: skip
        out = tmp_path / name.partition(".")[0]
        out.mkdir()
        (out / name).write_text('{"base": 3}')
        done = run_opdgeo("compare", *pair, "-o", out, *FAST, *options)
        assert done.returncode == 2 and said in done.stderr, done.stderr
        assert contents(out) == {name: b'{"base": 3}'}


def test_a_training_runs_folder_stays_as_it_is(folders: Path, tmp_path: Path) -> None:
    base, run = folders / "base", shutil.copytree(folders / "run", tmp_path / "run")
    one, two = run / "step-000001", run / "step-000002"
    logged = tmp_path / "logged"
    logged.mkdir()
    (logged / "log.jsonl").write_text("{}")
    kept = contents(tmp_path)
    wanted = [
        (run, "a training run", ("compare", base, one)),
        (run, "a training run", ("track", base, run, "--overwrite")),
        (run, "a training run", ("track", base, run, "--follow", "--idle", 0)),
        (logged, "a training run", ("relate", base, one, two)),
        (one, "the weights of a checkpoint", ("compare", base, one)),
    ]
    for out, what, command in wanted:
        done = run_opdgeo(*command, "-o", out, *FAST)
        assert done.returncode == 2, command
        assert f"{out} holds {what}. Give -o another folder" in done.stderr
        assert contents(tmp_path) == kept
    below = run_opdgeo("track", base, run, "-o", run / "geometry", *FAST)
    assert below.returncode == 0, below.stderr
    results = tmp_path / "results"
    (results / "step-000001").mkdir(parents=True)  # a folder of results, named like the steps
    assert run_opdgeo("compare", base, one, "-o", results, *FAST).returncode == 0
    # a result that an earlier version left in the run
    for name in ("run.json", "measurements.parquet", "summary.json"):
        shutil.copy(run / "geometry" / name, run / name)
    assert run_opdgeo("track", base, run, "-o", run, *FAST).returncode == 0, "the same result goes on"


@pytest.mark.parametrize("command", ["compare", "track"])
def test_a_folder_that_cannot_be_written_is_refused_before_measuring(
    command: str, folders: Path, tmp_path: Path
) -> None:
    pair = folders / "base", folders / "run" / "step-000001"
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run_opdgeo(command, *pair, "-o", out, *FAST)
        assert done.returncode == 2 and f"{tmp_path / 'file'} is a file" in done.stderr, done.stderr
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out" / "run.json").mkdir(parents=True)
    done = run_opdgeo(command, *pair, "-o", tmp_path / "out", *FAST)
    assert done.returncode == 2 and "run.json is a folder" in done.stderr, done.stderr
    done = run_opdgeo(command, *pair, "-o", "/proc/opdgeo" if Path("/proc").is_dir() else "/dev/opdgeo", *FAST)
    assert done.returncode == 2 and "cannot be written" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_disk_without_room_for_the_results_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=5_000_000))
    large = [Matrix(NAME, NAME, 0, "up_proj", 4096, 4096)] * 252
    check_folder(tmp_path, large[:2], 1)
    with pytest.raises(ConfigError, match=r"has 5\.0 MB free"):
        check_folder(tmp_path, large, 1)
    monkeypatch.undo()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no file may grow, as on a disk without a free block
    try:
        with pytest.raises(ConfigError, match="cannot be written"):
            check_folder(tmp_path / "new", large[:2], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []

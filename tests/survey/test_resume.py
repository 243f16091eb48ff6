"""A run that is killed goes on from its finished matrices and ends with the bytes of one that was not; a run with other settings
measures what depends on them, and nothing else."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import opdgeo
import planted
from opdgeo.checkpoints import open_checkpoint
from opdgeo.commands import main
from opdgeo.diagnostics import DIAGNOSTICS, Base, Settings, Update, diagnostics, of_trajectories
from opdgeo.diagnostics.gaussian_null import gaussian_null
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.report import data
from opdgeo.survey import engines
from opdgeo.survey.parts import Parts
from opdgeo.survey.results import load_result
from program import kept_matrices, run_python

FILES = ("measurements.parquet", "curves.parquet", "summary.json")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and a checkpoint of twelve matrices."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    names = [planted.tensor_name(layer, module) for layer in range(6) for module in ("self_attn.q_proj", "mlp.up_proj")]
    weights = {name: planted.weights(rng, 48, 40) for name in names}
    planted.write_checkpoint(folder / "base", weights, "bfloat16")
    weights = {name: w + 3e-4 * rng.standard_normal(w.shape) for name, w in weights.items()}
    planted.write_checkpoint(folder / "tuned", weights, "bfloat16")
    return folder


# The program, killed just before it changes OUT for the N-th time; it writes down how often it did.
KILLED = """
import os, signal, sys
from opdgeo.commands import main
out, last, note = sys.argv[1], int(sys.argv[2]), os.open(sys.argv[3], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
changes = 0
def watch(event, args):
    global changes
    if event == "open":
        changing = args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(out)
    else:  # what rmtree removes is named relative to its folder
        changing = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and (str(args[0]).startswith(out) or args[-1] != -1)
    if changing:
        changes += 1
        os.pwrite(note, b"%d" % changes, 0)
        if changes == last:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(watch)
write = os.write
def counted(file, content):  # of the journal
    watch("open", (out, None, os.O_WRONLY))
    return write(file, content)
os.write = counted
main(["track", *sys.argv[4:], "-o", out])
"""


def test_a_kill_before_any_change_of_the_folder_leaves_no_trace(
    small_run: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """A kill between two changes finds the same files as one just before the second, so these are all kills that there are."""
    base, run = small_run
    arguments = [*map(str, (base, *run[:2])), "--no-report", "--no-cache", "--nulls", "1"]

    def killed(out: Path, change: int) -> int:
        done = run_python("-c", KILLED, out, change, tmp_path / "changes", *arguments)
        assert done.returncode == (-signal.SIGKILL if change else 0), done.stderr
        return int((tmp_path / "changes").read_text())

    whole = tmp_path / "whole"
    changes = killed(whole, 0)
    assert changes >= 20
    partly = set()
    for change in range(1, changes + 1):
        out = tmp_path / f"killed-{change}"
        assert killed(out, change) == change
        finished = kept_matrices(out)
        partly.add(finished)
        kept = 3 if (out / "run.json").exists() else finished
        with pytest.raises(SystemExit, match="0"):
            main(["track", *arguments, "-o", str(out)])
        reused = json.loads((out / "run.json").read_text())["reused"]
        assert set(reused.values()) == ({kept} if kept else set()), "a finished matrix was lost"
        for file in FILES:
            assert (out / file).read_bytes() == (whole / file).read_bytes(), file
        assert {f.name for f in out.iterdir()} == {*FILES, "run.json"}
        shutil.rmtree(out)
    assert partly == {0, 1, 2, 3}


def test_finished_matrices_are_not_measured_again(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run_folder / "tuned"
    measured: list[str] = []
    original = engines.measure

    def counted(job, matrix, *arguments):  # type: ignore[no-untyped-def]
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(matrix.name)
        return original(job, matrix, *arguments)

    monkeypatch.setattr(engines, "measure", counted)

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
    assert compare(settings=opdgeo.Settings(nulls=0, rank=64)) is None, "another rank measures every matrix again"
    for file in (tmp_path / ".parts").iterdir():
        lines = file.read_text().splitlines()
        file.write_text("\n".join(line[:100] for line in lines))  # damaged: measured again
    assert compare(settings=settings) is None
    assert compare(settings=settings) is None
    again = compare(settings=settings)
    assert again is not None
    assert again.measurements.equals(last.measurements)
    last.save(tmp_path)
    assert not (tmp_path / ".parts").exists()
    assert json.loads((tmp_path / "run.json").read_text())["pairing"]["measured"] == 12


CHANGES = {
    "rank": 5,
    "top_k": 3,
    "mask_rank": 9,
    "mask_share": (0.4,),
    "eta": 0.02,
    "nulls": 3,
    "null": "shuffled",
}


class Watched(Settings):
    """Settings that note in `read` which of them are asked for."""

    def __getattribute__(self, name: str) -> object:
        if name in CHANGES:
            object.__getattribute__(self, "__dict__").setdefault("read", set()).add(name)
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("relative", [1e-3, 0.3])
def test_every_diagnostic_says_which_settings_it_reads(relative: float) -> None:
    rng = np.random.default_rng(0)
    before = torch.from_numpy(planted.weights(rng, 40, 32))
    after = before + relative * before.std() * torch.randn(40, 32, generator=torch.Generator().manual_seed(0))
    for name, diagnostic in diagnostics().items():
        settings = Watched(rank=6, top_k=4, mask_rank=8, nulls=2)
        settings.__dict__["read"] = set()
        diagnostic.measure(Update(Base(before, settings), after))
        assert settings.__dict__["read"] == set(diagnostic.reads), name
        settings.__dict__["read"] = set()
        gaussian_null(Update(Base(before, settings), after), [diagnostic], "seed")
        assert settings.__dict__["read"] <= {*diagnostic.reads, "nulls", "null"}, name


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and three checkpoints of three matrices, one of which does not move at first."""
    folder = tmp_path_factory.mktemp("small")
    rng = np.random.default_rng(1)
    names = [planted.tensor_name(0, module) for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    weights = {name: planted.weights(rng, 40, 32) for name in names}
    base = planted.write_checkpoint(folder / "base", weights, "float32")
    run = []
    for step in (1, 2, 3):
        weights = {n: w + 3e-4 * (n != names[0] or step > 1) * rng.standard_normal(w.shape) for n, w in weights.items()}
        run.append(planted.write_checkpoint(folder / f"step-{step}", weights, "float32"))
    return base, run


FIRST = opdgeo.Settings(rank=6, top_k=4, mask_rank=8, nulls=2)


@pytest.fixture(scope="module")
def earlier(small_run: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """An OUT of `FIRST`, finished and not."""
    folder = tmp_path_factory.mktemp("earlier")
    outs = {finished: folder / str(finished) for finished in (True, False)}
    for finished, out in outs.items():
        result = opdgeo.track(*small_run, settings=FIRST, cache=False, out=out)
        if finished:
            result.save(out)
    return outs


@pytest.fixture(scope="module")
def fresh(small_run: tuple[Path, list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The OUT of a run with one setting changed that found nothing there."""
    folder = tmp_path_factory.mktemp("fresh")

    @functools.cache
    def made(setting: str) -> Path:
        then = replace(FIRST, **{setting: CHANGES[setting]})
        opdgeo.track(*small_run, settings=then, cache=False).save(folder / setting)
        return folder / setting

    return made


@pytest.mark.parametrize("setting", CHANGES)
@pytest.mark.parametrize("finished", [True, False])
def test_a_changed_setting_measures_exactly_what_reads_it(
    setting: str,
    finished: bool,
    small_run: tuple[Path, list[Path]],
    earlier: dict[bool, Path],
    fresh: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, run = small_run
    expected = fresh(setting)
    shutil.copytree(earlier[finished], tmp_path / "out")
    then = replace(FIRST, **{setting: CHANGES[setting]})
    measured: set[str] = set()
    sampled: set[str] = set()
    for name, diagnostic in diagnostics().items():

        def traced(update, name=name, original=diagnostic.measure):  # type: ignore[no-untyped-def]
            (sampled if update.sampled else measured).add(name)
            return original(update)

        monkeypatch.setitem(DIAGNOSTICS, name, replace(diagnostic, measure=traced))
    again = opdgeo.track(base, run, settings=then, cache=False, out=tmp_path / "out")
    reading = {name for name, d in diagnostics().items() if setting in d.reads}
    assert measured == reading
    assert setting in ("nulls", "null") or sampled <= reading
    similar = {name for name, d in of_trajectories().items() if setting not in d.reads}
    assert set(again.run["reused"]) == set(diagnostics()) - reading | similar
    assert set(again.run["reused"].values()) == {3}
    again.save(tmp_path / "out")
    for file in FILES:
        assert (tmp_path / "out" / file).read_bytes() == (expected / file).read_bytes(), file


def test_a_finished_run_is_not_measured_again_unless_its_files_changed(
    small_run: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, run = small_run
    settings = opdgeo.Settings(nulls=0)
    opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path).save(tmp_path)
    before = {file: (tmp_path / file).read_bytes() for file in FILES}
    monkeypatch.setattr(engines, "measure", None)  # calling it would fail
    opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path).save(tmp_path)
    assert {file: (tmp_path / file).read_bytes() for file in FILES} == before
    opdgeo.track(base, run, roles="mlp", settings=settings, cache=False, out=tmp_path)
    with pytest.raises(TypeError):
        opdgeo.track(base, run[:2], settings=settings, cache=False, out=tmp_path)
    os.utime(run[0] / "model.safetensors")
    with pytest.raises(TypeError):
        opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path)


def test_another_config_is_another_input(tmp_path: Path) -> None:
    """Head counts divide fused tensors: rows measured with other ones are not taken over."""
    planted.write_checkpoint(tmp_path, {planted.tensor_name(0, "mlp.up_proj"): np.eye(4)}, "float32")
    digests = set()
    for heads in (2, 4, 2):
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
        digests.add(Parts(None, [open_checkpoint(tmp_path)], trajectory=False, device="cpu").inputs)
    assert len(digests) == 2


def test_a_base_swapped_for_one_of_the_same_size_and_time_is_measured(
    small_run: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    """The numbers in a results folder are always those of the bytes whose hash it holds: overwritten in place, or replaced."""
    base, run = tmp_path / "base", small_run[1]
    settings = opdgeo.Settings(nulls=0, rank=4)
    file = base / "model.safetensors"
    base.mkdir()
    file.write_bytes((small_run[0] / "model.safetensors").read_bytes())
    time_ = file.stat().st_mtime_ns
    opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path / "out").save(tmp_path / "out")
    other = bytearray(file.read_bytes())
    for replaced in (False, True):
        aside = base / "aside" if replaced else file
        other[-2 - 4 * replaced] ^= 0x10  # of one of the last numbers
        aside.write_bytes(other)
        os.utime(aside, ns=(time_, time_))
        aside.replace(file)
        again = opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path / "out")
        again.save(tmp_path / "out")
        fresh = opdgeo.track(base, run, settings=settings, cache=False)
        assert again.measurements.equals(fresh.measurements)
        assert again.run["base"] == fresh.run["base"]
        assert not again.run["reused"]


def test_a_file_that_changes_while_it_is_measured_is_refused(
    small_run: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    file = base / "model.safetensors"
    file.write_bytes((small_run[0] / "model.safetensors").read_bytes())
    time_, original = file.stat().st_mtime_ns, engines.measure

    def swapped(*arguments):  # type: ignore[no-untyped-def]
        found = original(*arguments)
        with file.open("r+b") as stream:
            stream.seek(-2, os.SEEK_END)
            stream.write(b"\x10")
        os.utime(file, ns=(time_, time_))
        return found

    monkeypatch.setattr(engines, "measure", swapped)
    with pytest.raises(CheckpointError, match="changed or replaced while it was measured"):
        opdgeo.compare(base, small_run[1][0], settings=opdgeo.Settings(nulls=0, rank=4), cache=False)


def test_results_of_other_bytes_are_not_taken_over(small_run: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """A file system that says nothing of a change: the hashes differ all the same."""
    base, run = small_run
    settings = opdgeo.Settings(nulls=0, rank=4)
    opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path).save(tmp_path)
    recorded = json.loads((tmp_path / "run.json").read_text())
    recorded["base"]["files"][0]["sha256"] = "0" * 64
    for other in (recorded, [], 7, {}, recorded | {"base": None}, recorded | {"checkpoints": [3]}):
        (tmp_path / "run.json").write_text(json.dumps(other))
        assert not opdgeo.track(base, run, settings=settings, cache=False, out=tmp_path).run["reused"]
        shutil.rmtree(tmp_path / ".parts")


def test_damaged_results_are_refused_and_measured_again(small_run: tuple[Path, list[Path]], tmp_path: Path) -> None:
    """Bytes of a table's footer (some make polars panic), tables of other columns, JSON without end, folders in place of files."""
    base, run = small_run
    settings = opdgeo.Settings(nulls=0, rank=4)
    opdgeo.compare(base, run[0], settings=settings, cache=False, out=tmp_path).save(tmp_path)
    table = tmp_path / "measurements.parquet"
    whole, right = table.read_bytes(), pl.read_parquet(table)
    for place in range(len(whole) - 1200, len(whole) - 8, 11):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        table.write_bytes(damaged)
        with suppress(ConfigError):
            load_result(tmp_path)
        with suppress(ConfigError):
            data.load(tmp_path)
    others = [right.drop("matrix"), right.with_columns(pl.lit(1).alias("value")), right.rename({"role": "x"})]
    for other in others:
        other.write_parquet(table)
        with pytest.raises(ConfigError, match="not a complete results folder"):
            load_result(tmp_path)
    strange = [
        right.with_columns(pl.lit(text).alias(column))
        for column, text in (("checkpoint", "x"), ("diagnostic", "x"), ("status", None))
    ]
    for other in (*others, *strange):
        other.with_columns(pl.col("status").cast(pl.String)).write_parquet(table)
        again = opdgeo.compare(base, run[0], settings=settings, cache=False, out=tmp_path)
        assert not again.run["reused"] and again.measurements.equals(right)
        shutil.rmtree(tmp_path / ".parts")
    table.write_bytes(whole)
    (tmp_path / "summary.json").write_text("[" * 100_000)
    for load in (load_result, data.load):
        with pytest.raises(ConfigError):
            load(tmp_path)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "summary.json").mkdir()
    with pytest.raises(ConfigError, match=r"summary\.json"):
        load_result(tmp_path)
    run_json = tmp_path / "run.json"
    run_json.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="damaged"):
        opdgeo.compare(base, run[0], settings=settings, cache=False, out=tmp_path, overwrite=False)


@pytest.mark.parametrize(
    "change",
    [
        {"checkpoint": "x"},
        {"checkpoint": "base"},
        {"diagnostic": "x"},
        {"value": "x"},
        {"rows": None},
        {"layer": 1 << 40},
    ],
)
def test_rows_of_a_journal_that_no_table_takes_are_measured_again(
    change: dict[str, object], small_run: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    base, run = small_run
    settings = opdgeo.Settings(nulls=0, rank=4)
    expected = opdgeo.compare(base, run[0], settings=settings, cache=False, out=tmp_path).measurements
    (journal,) = (tmp_path / ".parts").iterdir()
    lines = [json.loads(line) for line in journal.read_text().splitlines() if line]
    columns, first, *_ = lines[0]["measured"]["rows"]
    row = dict(zip(columns, first, strict=True)) | change
    lines[0]["measured"]["rows"][:2] = [list(row), list(row.values())]
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = opdgeo.compare(base, run[0], settings=settings, cache=False, out=tmp_path)
    assert set(again.run["reused"].values()) == {2} and again.measurements.equals(expected)

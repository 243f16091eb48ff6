"""Thousands of matrices: tables that are written piece by piece hold what tables in memory hold, and a journal keeps every whole line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import planted
from opdgeo import Settings, survey
from opdgeo.files import Journal
from opdgeo.survey import results, tables
from opdgeo.survey.results import OnDisk, load_result

FILES = ("measurements.parquet", "curves.parquet", "summary.json")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base and two checkpoints of 24 experts of two shapes; some do not move, one is not finite."""
    folder = tmp_path_factory.mktemp("experts")
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (24, 16), "up_proj": (24, 16), "down_proj": (16, 24)}
    weights = {
        f"model.layers.{layer}.mlp.experts.{e}.{role}.weight": planted.weights(rng, *shape)
        for layer in range(2) for e in range(4) for role, shape in shapes.items()
    }  # fmt: skip
    base = planted.write_checkpoint(folder / "base", weights, "float32")
    steps = []
    for step in (1, 2):
        still = list(weights)[:3]
        weights = {n: w + 1e-3 * (n not in still) * rng.standard_normal(w.shape) for n, w in weights.items()}
        stored = dict(weights)
        stored[list(weights)[5]] = np.full_like(weights[list(weights)[5]], np.nan)
        steps.append(planted.write_checkpoint(folder / f"step-{step}", stored, "float32"))
    return base, steps


@pytest.mark.parametrize("nulls", [0, 1])
def test_tables_in_files_hold_what_those_in_memory_hold(
    nulls: int, run: tuple[Path, list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(rank=4, top_k=4, mask_rank=4, nulls=nulls)
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    in_memory = survey.track(*run, settings=settings, cache=False, out=whole)
    assert type(in_memory) is results.Result
    in_memory.save(whole)
    monkeypatch.setattr(tables, "GROUP", 300)
    monkeypatch.setattr(tables, "CHUNK", 100)
    found = survey.track(*run, settings=settings, cache=False, out=pieces)
    assert isinstance(found, OnDisk) and len(in_memory.measurements) > 900
    assert found.skipped == in_memory.skipped and len(found.skipped) == 1
    found.save(pieces)
    assert {f.name for f in pieces.iterdir()} == {*FILES, "run.json"}
    assert (pieces / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
    again = load_result(pieces)
    for table, other, read in (
        (in_memory.measurements, found.measurements, again.measurements),
        (in_memory.curves, found.curves, again.curves),
    ):
        assert table.schema == other.schema
        assert table.equals(other) and table.equals(read)


@pytest.mark.parametrize(("matrices", "files"), [(40, 0), (400, 1)])
def test_long_tables_are_in_files_from_their_first_rows_on(
    matrices: int, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "GROUP", 1000)
    monkeypatch.setattr(tables, "CHUNK", 50)
    taken = tables.Tables(["tuned"], tmp_path, matrices)
    row = dict.fromkeys(results.MEASUREMENTS) | {"checkpoint": "tuned", "matrix": "m", "diagnostic": "stable_rank"}
    for _ in range(5):  # 50 rows of the first matrices: fewer than a group, of 400 or of 4000 that will come
        taken.add([row] * 10, [])
    assert len(list(tmp_path.glob("*measurements.parquet"))) == files
    held = [frame for of_place in taken.frames[0].values() for frame in of_place]
    assert sum(map(len, held)) == (0 if files else 50)


def test_a_bootstrap_in_pieces_is_one_of_all_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "has value": np.ones(50, bool), "has null_mean": np.ones(50, bool), "has null_std": np.ones(50, bool),
        "value": np.random.default_rng(0).normal(size=50), "null_mean": np.zeros(50), "null_std": np.ones(50),
        "rows": np.arange(1, 51), "cols": np.ones(50, int), "moved": np.ones(50, bool),
    }  # fmt: skip
    for name in ("update_sparsity", "stable_rank"):
        diagnostic, found = results.DIAGNOSTICS[name], []
        for at_a_time in (1 << 20, 777, 1):
            monkeypatch.setattr(results, "PICKED", at_a_time)
            found += [results._against_null(results._Rows(rows), diagnostic, "gaussian")]
        assert found[0] and found[0] == found[1] == found[2]


def test_a_journal_that_was_cut_short_loses_its_last_line_alone(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    lines = [b'{"a":1}', b'{"b":"\xc3\xa4"}', b'{"c":[1.5,null]}']
    first = Journal(path)
    places = [first.add(line) for line in lines]
    assert [first.read(*place) for place in places] == lines
    path.write_bytes(path.read_bytes()[:-3])
    second = Journal(path)
    place = second.add(b"{}")
    assert second.read(*place) == b"{}"
    found = {start: line.rstrip(b"\n") for start, line in second.lines()}
    assert [found[start] for start, _ in places[:2]] == lines[:2]
    assert found[place[0]] == b"{}"
    assert found[places[2][0]] == lines[2][:-3]

"""`benchmarks/identity.py` calls two versions identical only where every byte is, but for what belongs to an ignored diagnostic."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import polars as pl
import pytest

SPEC = importlib.util.spec_from_file_location("identity", Path(__file__).parents[2] / "benchmarks" / "identity.py")
assert SPEC is not None
assert SPEC.loader is not None
identity = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(identity)

ROW = {"checkpoint": "step-000001", "matrix": "w", "diagnostic": "stable_rank", "variant": "", "value": 2.5, "error": 1e-9, "method": "svd",
       "null_mean": 4.0, "null_std": 0.5}  # fmt: skip
ROWS = [ROW, ROW | {"diagnostic": "hill_exponent", "value": None}]


def version(folder: Path, rows: list[dict], summed: dict, claims: dict) -> SimpleNamespace:
    """What a version left of the case `track`."""
    case = folder / "track"
    case.mkdir(parents=True)
    pl.DataFrame(rows).write_parquet(case / "measurements.parquet")
    pl.DataFrame({"curve": ["sigma_base"], "values": [[3.0, 1.0]]}).write_parquet(case / "curves.parquet")
    (case / "summary.json").write_text(json.dumps(summed))
    (case / "claims.json").write_text(json.dumps(claims))
    return SimpleNamespace(name=folder.name, results=folder)


def summary(*diagnostics: str) -> dict:
    entries = [{"diagnostic": name, "variant": "", "mean": 2.5} for name in diagnostics]
    return {"checkpoints": [{"checkpoint": "step-000001", "diagnostics": entries}]}


def verdict(before: SimpleNamespace, after: SimpleNamespace, *ignored: str) -> bool:
    return identity.report(before, after, ["track"], set(ignored))


def test_a_last_digit_is_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = summary("stable_rank"), {"claims": [{"id": "R3", "diagnostic": "stable_rank"}]}
    one = version(tmp_path / "one", ROWS, *facts)
    assert verdict(one, version(tmp_path / "same", ROWS, *facts))
    moved = [ROWS[0] | {"value": 2.5000000000000004}, ROWS[1]]
    assert not verdict(one, version(tmp_path / "other", moved, *facts))
    said = capsys.readouterr().out
    assert "2.5000000000000004" in said and "NOT identical: one and other." in said
    (tmp_path / "same" / "track" / "summary.json").unlink()
    assert not verdict(one, SimpleNamespace(name="same", results=tmp_path / "same"))


def test_an_ignored_diagnostic_may_come_and_nothing_else(tmp_path: Path) -> None:
    before = version(tmp_path / "before", ROWS, summary("stable_rank"), {"claims": []})
    more = [*ROWS, ROW | {"diagnostic": "effective_rank", "value": 7.0}]
    both = summary("stable_rank", "effective_rank")
    after = version(tmp_path / "after", more, both, {"claims": [{"diagnostic": "effective_rank"}]})
    assert not verdict(before, after)
    assert verdict(before, after, "effective_rank")
    assert not verdict(before, after, "hill_exponent")


def test_numbers_are_held_against_their_own_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = summary("stable_rank"), {"claims": []}
    names = ("same", "within", "beyond", "wider", "gone")
    before = [ROW | {"matrix": name} for name in names]
    after = [*before]
    for i, change in enumerate(
        [{"null_mean": 5.0}, {"value": 2.5 + 1.5e-9}, {"value": 2.5 + 3e-9}, {"error": 2e-9}, {"value": None}]
    ):
        after[i] = after[i] | change
    assert not verdict(version(tmp_path / "before", before, *facts), version(tmp_path / "after", after, *facts))
    said = capsys.readouterr().out
    assert "values: 2 of 4 changed, 1 by more than both errors" in said and "'beyond'" in said
    assert "known before alone: 1; stable_rank 1" in said and "known after alone: 0" in said
    assert "errors: 1 grew" in said and "'wider'" in said
    assert "nulls: 1 of 5 moved" in said and "2 at most" in said


def test_a_case_that_wrote_nothing_is_no_proof(tmp_path: Path) -> None:
    empty = [SimpleNamespace(name=name, results=tmp_path / name) for name in ("one", "other")]
    with pytest.raises(SystemExit, match="neither version wrote"):
        identity.report(*empty, ["layer"], set())

"""The study from one end to the other, with real training, at a size that fits a test."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from opdgeo.errors import ConfigError
from opdgeo.experiments import presets
from opdgeo.experiments.reproduce import reproduce
from opdgeo.survey.results import CURVES, MEASUREMENTS

SHORT = {"steps": 3, "sequences_per_step": 8, "eval_prompts": 16, "checkpoints": (0.5, 1.0)}
ARMS = ("sft", "sft-matched", "opd", "rlvr")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "short", {arm: presets.PRESETS["tiny"][arm] | SHORT for arm in ARMS})
        claims = reproduce("short", out, seeds=1)
        # A second call finds everything done and says the same.
        assert reproduce("short", out, seeds=1) == claims
    return out, claims


def test_data_files_have_the_contracts_columns(study: tuple[Path, dict]) -> None:
    out, _ = study
    table = pl.read_parquet(out / "measurements.parquet")
    assert dict(table.schema) == {
        name: dtype() if isinstance(dtype, type) else dtype for name, dtype in MEASUREMENTS.items()
    }
    assert list(pl.read_parquet(out / "curves.parquet").columns) == list(CURVES)
    steps = {f"{arm}/step-00000{step}" for arm in ARMS for step in (2, 3)}
    assert set(table["checkpoint"]) == steps
    assert set(table["status"]) <= {"computed", "undefined"}
    nulls = table.filter((pl.col("diagnostic") == "stable_rank") & (pl.col("status") == "computed"))
    assert len(nulls) and nulls["null_mean"].null_count() == 0


def test_every_claim_has_a_rule_a_verdict_and_controls(study: tuple[Path, dict]) -> None:
    out, claims = study
    assert json.loads((out / "claims.json").read_text()) == claims
    assert [c["id"] for c in claims["claims"]] == ["R1", "R3", "R4", "R5a", "R5b", "L1", "L2", "L3", "L4"]
    for claim in claims["claims"]:
        assert claim["verdict"] in ("holds", "fails", "inconclusive")
        assert claim["rule"] and claim["explanation"]
        assert set(claim["measured"]) == set(ARMS)
        assert len(claim["controls"]) == 2
    assert claims["outcomes"]["opd"]["prompts"] == 16
    assert (out / "report.html").stat().st_size > 10_000


def test_sft_starts_from_the_base_and_the_others_from_its_last_checkpoint(study: tuple[Path, dict]) -> None:
    out, _ = study
    origins = {arm: json.loads((out / "arms" / arm / "config.json").read_text())["origin"] for arm in ARMS}
    assert origins["sft"] == "tiny/base"
    assert {origins[arm] for arm in ARMS[1:]} == {str((out / "arms" / "sft" / "step-000003").resolve())}


def test_unknown_presets_and_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tiny"):
        reproduce("tny", tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        reproduce("tiny", tmp_path, seeds=0)
    with pytest.raises(ConfigError, match="no arm 'rlvr' in preset 'smollm2'"):
        reproduce("smollm2", tmp_path)
    assert not list(tmp_path.iterdir())

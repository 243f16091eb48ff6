"""The study from one end to the other, with real training, at a size that fits a test."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from filelock import FileLock

import recompute_claims
from opdgeo.errors import ConfigError
from opdgeo.experiments import presets, related
from opdgeo.experiments.presets import train_config
from opdgeo.experiments.reproduce import plan, reproduce
from opdgeo.experiments.rules import CONTROLS
from opdgeo.experiments.study import BY_NAME as ARMS_OF_FULL
from opdgeo.experiments.study import FEWER, chosen, configure
from opdgeo.survey.results import CURVES, MEASUREMENTS
from program import run_opdgeo, run_python

ARMS = ("sft", "sft-matched", "opd", "rlvr")


@dataclass(frozen=True)
class Study:
    """A finished study: its folder, `claims.json`, the page, and what the recomputation found different."""

    out: Path
    claims: dict
    page: str
    differing: list[str]

    @classmethod
    def of(cls, out: Path, claims: dict) -> Study:
        return cls(out, claims, (out / "report.html").read_text(), recompute_claims.main(out))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Every arm of the full study, as its users rehearse it."""
    out = tmp_path_factory.mktemp("study")
    done = run_opdgeo("reproduce", "--study", "full", "--rehearse", "-o", out)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = sum(arm.tracked for arm in ARMS_OF_FULL.values())
    assert f"done ({len(ARMS_OF_FULL) + measured + 4} of" in done.stderr  # and three models, and the pairs of arms
    return Study.of(out, json.loads((out / "claims.json").read_text()))


@pytest.fixture(scope="module")
def small(full: Study) -> Study:
    """The small study in the same folder, whose arms are all there."""
    finished = ("arms/*/log.jsonl", "related/*/run.json")
    trained = {log: log.stat().st_mtime_ns for kind in finished for log in full.out.glob(kind)}
    with pytest.MonkeyPatch.context() as patch:  # the second call draws the page of the same data
        patch.setattr("opdgeo.report.write_report", lambda out: out)
        claims = reproduce("tiny", full.out, rehearse=True)
    # It finds everything done and says the same.
    assert reproduce("tiny", full.out, rehearse=True) == claims
    assert {log: log.stat().st_mtime_ns for kind in finished for log in full.out.glob(kind)} == trained
    return Study.of(full.out, claims)


def test_data_files_have_the_contracts_columns(small: Study) -> None:
    out = small.out
    table = pl.read_parquet(out / "measurements.parquet")
    assert dict(table.schema) == {
        name: dtype() if isinstance(dtype, type) else dtype for name, dtype in MEASUREMENTS.items()
    }
    assert list(pl.read_parquet(out / "curves.parquet").columns) == list(CURVES)
    steps = {f"{arm}/step-00000{step}" for arm in ARMS for step in (1, 3, 5)}
    assert set(table["checkpoint"]) == steps
    assert set(table["status"]) <= {"computed", "undefined"}
    nulls = table.filter((pl.col("diagnostic") == "stable_rank") & (pl.col("status") == "computed"))
    assert len(nulls) and nulls["null_mean"].null_count() == 0


def test_the_arms_of_an_anchor_are_related(full: Study, small: Study) -> None:
    """The full study relates five arms, and the small one in its folder takes three of them."""
    named = [{(row["arm"], row["other"]) for row in study.claims["related"]} for study in (full, small)]
    assert [len(pairs) for pairs in named] == [10, 3] and named[1] == set(itertools.combinations(ARMS[1:], 2))
    table = pl.read_parquet(small.out / "relations.parquet")
    assert dict(table.schema) == {name: kind() for name, kind in related.COLUMNS.items()}
    assert set(table["arm"]) == set(ARMS[1:])
    assert '<section id="alike">' in full.page and "The pairs with a noise arm" in full.page


def test_every_claim_has_a_rule_a_verdict_and_controls(small: Study) -> None:
    out, claims = small.out, small.claims
    assert json.loads((out / "claims.json").read_text()) == claims
    assert [c["id"] for c in claims["claims"]] == ["R1", "R3", "R4", "R5", "R5a", "R5b", "L1", "L2", "L3", "L4"]
    assert [line.partition(" ")[0] for line in claims["left_out"]][:5] == ["R2", "S1", "C1", "C2", "C3"]
    for claim in claims["claims"]:
        assert claim["verdict"] == "open", "one seed decides nothing"
        assert claim["after_matching"] in ("still holds", "does not", "inconclusive")
        assert claim["rule"] and claim["explanation"] and claim["after_matching_rule"]
        if claim["id"] != "R5":
            assert set(claim["measured"]) == set(ARMS)
            names = [c["name"] for c in claim["controls"]]
            assert {"beyond size", "equal norm", "equal norm, beyond size", "equal accuracy"} <= set(names)
    assert claims["outcomes"]["opd"]["prompts"] == 8
    assert (out / "report.html").stat().st_size > 10_000


def test_sft_starts_from_the_base_and_the_others_from_its_last_checkpoint(small: Study) -> None:
    out = small.out
    origins = {arm: json.loads((out / "arms" / arm / "config.json").read_text())["origin"] for arm in ARMS}
    assert origins["sft"] == "tiny/base"
    assert {origins[arm] for arm in ARMS[1:]} == {str((out / "arms" / "sft" / "step-000005").resolve())}


def test_unknown_presets_and_seeds_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="tiny"):
        reproduce("tny", tmp_path)
    with pytest.raises(ConfigError, match="at least 1"):
        reproduce("tiny", tmp_path, seeds=0)
    three = {arm: presets.PRESETS["tiny"][arm] for arm in ARMS[:-1]}
    monkeypatch.setitem(presets.PRESETS, "three", three)
    with pytest.raises(ConfigError, match="no arm 'rlvr' in preset 'three'"):
        reproduce("three", tmp_path)
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another opdgeo reproduce works in"):
        reproduce("tiny", tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_killed_study_leaves_no_worker_behind() -> None:
    script = (
        "import os, signal, time; from opdgeo.experiments import reproduce\n"
        "if __name__ == '__main__':\n"
        "    reproduce.PRELOADED.clear()  # it trains nothing\n"
        "    pool = reproduce._pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 300)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = run_python("-c", script)
    assert done.returncode == -signal.SIGKILL
    worker = int(done.stdout)
    for _ in range(100):
        listed = subprocess.run(["ps", "-o", "stat=", "-p", str(worker)], capture_output=True, text=True)
        if listed.stdout.strip()[:1] in ("", "Z"):  # gone, or ended where nobody waits for orphans, as in a container
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    raise AssertionError("the worker outlived its study")


def test_every_number_of_a_real_study_is_recomputed_without_the_package(full: Study, small: Study) -> None:
    assert full.differing == small.differing == []


def test_the_full_study_trains_every_arm_and_judges_every_claim(full: Study) -> None:
    claims = full.claims
    ids = ["R1", "R2", "R3", "R4", "R5", "R5a", "R5b", "L1", "L2", "L3", "L4", "S1", "C1", "C2", "C3"]
    assert [c["id"] for c in claims["claims"]] == ids
    assert claims["rehearsal"] and claims["study"] == "full" and claims["left_out"] == []
    assert {p.name for p in (full.out / "arms").iterdir()} == set(claims["outcomes"]) == set(ARMS_OF_FULL)
    assert {c["name"] for c in claims["claims"][0]["controls"]} == {k.name for k in CONTROLS}
    assert "This was a rehearsal" in full.page and "control arms are judged in the claims" in full.page


def test_arms_differ_from_the_arm_they_are_like_in_their_axes_and_changes_alone(tmp_path: Path) -> None:
    for arm in ARMS_OF_FULL.values():
        config = configure(arm, 1, "tiny", tmp_path)
        like = train_config(arm.like, "tiny", seed=1, origin=config.origin)
        differing = set(config.differences(like)) - {"arm"}
        allowed = {"rollouts", *arm.credit, *arm.changes}
        allowed |= {"steps", "checkpoints", *FEWER} if arm.part != 1 else set()
        allowed |= {"data_seed"} if arm.start_at != 1 else set()
        allowed |= {"channel", "constrain"} if arm.where else set()
        assert differing <= allowed, arm.name
        assert max(config.checkpoint_steps) == config.steps
        if arm.part != 1 and arm.start_at == 1:
            assert config.checkpoint_steps == like.checkpoint_steps[: len(config.checkpoint_steps)], (
                "read at the same steps"
            )


def test_a_real_models_small_study_has_a_noise_arm_of_its_own(tmp_path: Path) -> None:
    jobs = {job.name: job for job in plan(chosen("small", "smollm2"), range(1), "smollm2", tmp_path)}
    coin, rlvr = (jobs[name].config for name in ("coin", "rlvr"))
    assert coin and rlvr and coin.credit == "coin"
    assert set(coin.differences(rlvr)) == {"arm", "credit"}
    assert coin.origin.endswith("arms/sft/step-000024")
    assert "coin" not in {job.name for job in plan(chosen("small", "tiny"), range(1), "tiny", tmp_path)}


def test_the_full_study_is_for_the_preset_whose_models_it_makes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--study small"):
        reproduce("smollm2", tmp_path, study="full")
    with pytest.raises(ConfigError, match="small, full"):
        reproduce("tiny", tmp_path, study="ful")
    assert not list(tmp_path.iterdir())

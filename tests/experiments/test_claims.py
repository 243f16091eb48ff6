"""The rules of the claims, on measurements whose verdicts are known beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

import recompute_claims
from opdgeo.experiments import claims as claims_module
from opdgeo.experiments.claims import crossing, judge, missing, outcomes
from opdgeo.experiments.distances import at_the_end, from_null
from opdgeo.experiments.reduced import reduced
from opdgeo.experiments.rules import CLAIMS, CONTROLS, PARADIGMS
from opdgeo.survey.results import MEASUREMENTS
from planted_study import PAPER, PLAIN, S1, logs, measurements


def verdicts(table: pl.DataFrame) -> dict[str, str]:
    return {c["id"]: c["verdict"] for c in judge(table, logs())}


@pytest.fixture(scope="module")
def judged() -> dict[str, dict[str, Any]]:
    return {c["id"]: c for c in judge(measurements(PAPER, {}), logs())}


def test_every_claim_holds_on_the_papers_own_pattern(judged: dict[str, dict[str, Any]]) -> None:
    ids = ["R1", "R2", "R3", "R4", "R5", "R5a", "R5b", "L1", "L2", "L3", "L4", "S1", "C1", "C2", "C3"]
    assert {id: c["verdict"] for id, c in judged.items()} == dict.fromkeys(ids, "holds")
    assert list(judged) == ids
    for claim in judged.values():
        assert claim["after_matching"] in ("still holds", "does not", "inconclusive")
        if claim["id"] != "R5":
            assert all(
                {"value", "low", "high", "required", "outcome", "effects"} <= c.keys() for c in claim["comparisons"]
            )
            got = claim["measured"][
                "s1-opd-free" if claim["id"] == "S1" else "opd-small" if claim["id"] == "R2" else "opd"
            ]
            assert got["low"] <= got["mean"] <= got["high"] and len(got["seeds"]) == 2
            assert claim["id"] == "S1" or {"null", "excess", "excess_low", "excess_high"} <= got.keys()


@pytest.mark.parametrize("claim", [c for c in CLAIMS if c.id[0] in "RL" and c.id != "R2"], ids=lambda c: c.id)
def test_no_claim_holds_when_its_pattern_is_turned_round(claim: Any) -> None:
    reverse = {"sft": "rlvr", "sft-matched": "opd", "opd": "sft", "rlvr": "sft-matched"}
    turned = {key: {arm: arms[reverse[arm]] for arm in arms} for key, arms in PLAIN.items()}
    turned["mask_overlap/principal.0.5"] = dict.fromkeys(PARADIGMS, 0.6)
    turned["frobenius_norm/"] = dict.fromkeys(PARADIGMS, 1.0)
    assert verdicts(measurements(turned, {}, noise=0.001))[claim.id] in ("reversed", "no difference")


def test_noise_between_seeds_leaves_a_claim_open() -> None:
    close = {**PLAIN, "update_sparsity/bf16_eta": {"sft": 0.50, "sft-matched": 0.5, "opd": 0.53, "rlvr": 0.56}}
    assert verdicts(measurements(close, {}, noise=0.08))["R1"] == "open"


def test_with_one_seed_every_verdict_is_open() -> None:
    for claim in judge(measurements(PAPER, {}, seeds=1), logs(seeds=1)):
        assert claim["verdict"] == "open" and claim["after_matching"] == "inconclusive", claim["id"]
        assert all(c["low"] is None and c["high"] is None and c["outcome"] == "open" for c in claim["comparisons"])
        assert all(c["verdict"] == "open" for c in claim["controls"])
        assert claim["id"] == "R5" or "(one seed)" in claim["explanation"]


def test_a_difference_of_size_alone_does_not_survive_the_null() -> None:
    key = "update_sparsity/bf16_eta"
    claim = next(c for c in judge(measurements(PLAIN, {key: PLAIN[key]})) if c["id"] == "R1")
    assert claim["verdict"] == "holds"
    controls = {c["name"]: c for c in claim["controls"]}
    assert controls["beyond size"]["verdict"] == "no difference", "every arm equals its null, so no order is left"
    assert controls["matched SFT"]["verdict"] in ("open", "no difference")
    assert claim["after_matching"] == "does not"
    assert claim["measured"]["opd"]["null"] == pytest.approx(0.52)


def test_the_sparsity_is_averaged_over_entries() -> None:
    table = measurements(PLAIN, {}, noise=0.0).with_columns(
        pl.when((pl.col("matrix") == "m0") & (pl.col("diagnostic") == "update_sparsity"))
        .then(1.0)
        .otherwise("value")
        .alias("value")
    )
    entries = [(8 + m) * 8 for m in range(12)]
    expected = (1.0 * entries[0] + 0.52 * sum(entries[1:])) / sum(entries)
    claim = next(c for c in judge(table) if c["id"] == "R1")
    assert claim["measured"]["opd"]["mean"] == pytest.approx(expected, rel=1e-12)


def test_outcomes_take_the_first_and_last_evaluation_of_every_seed() -> None:
    def log(start: float, end: float) -> list[dict[str, Any]]:
        evals = [
            {"event": "eval", "step": s, "prompts": 64, "accuracy_greedy": a, "accuracy_sampled": a, "kl_teacher": 1 - a,
             "completion_length": 20.0}
            for s, a in ((0, start), (50, 0.0), (100, end))
        ]  # fmt: skip
        return [{"event": "step", "step": 1}, *evals]

    runs = {arm: log(0.5, 0.7) for arm in PARADIGMS} | {"opd-seed1": log(0.4, 0.8)}
    opd = outcomes(runs)["opd"]
    assert opd["prompts"] == 64
    assert opd["accuracy_greedy"]["start"]["seeds"] == [0.5, 0.4]
    assert opd["accuracy_greedy"]["end"] == {"mean": 0.75, "seeds": [0.7, 0.8]}


def by_norm(slope: dict[str, float], ends: dict[str, float]) -> pl.DataFrame:
    """Spectral shifts that are `slope` times the norm, which grows to `ends`, at ten checkpoints; nulls half the norm."""
    rows = []
    for arm, end in ends.items():
        for seed in range(3):
            rng = np.random.default_rng(seed)
            for matrix, factor in enumerate(1 + 0.05 * rng.standard_normal(10)):
                for step in range(1, 11):
                    norm = end * step / 10
                    for diagnostic, value in (("frobenius_norm", norm), ("spectral_shift", slope[arm] * norm * factor)):
                        rows.append(
                            dict.fromkeys(MEASUREMENTS)
                            | {
                                "checkpoint": f"{arm}{f'-seed{seed}' if seed else ''}/step-{step:06d}", "step": step,
                                "matrix": f"m{matrix}", "rows": 8, "cols": 8, "diagnostic": diagnostic, "variant": "",
                                "value": value, "null_mean": norm / 2, "status": "computed",
                            }
                        )  # fmt: skip
    return pl.DataFrame(rows, schema=MEASUREMENTS, orient="row")


@pytest.mark.parametrize(
    ("slopes", "matched"),
    [((1.0, 1.0, 1.0), "does not"), ((3.0, 2.0, 1.0), "still holds")],
    ids=["size alone", "more than size"],
)
def test_only_what_is_left_at_equal_norm_still_holds(slopes: tuple[float, ...], matched: str) -> None:
    ends = {"sft": 4.0, "sft-matched": 4.0, "opd": 2.0, "rlvr": 1.0}
    sft, opd, rlvr = slopes
    table = by_norm({"sft": sft, "sft-matched": sft, "opd": opd, "rlvr": rlvr}, ends)
    full = pl.concat([table, *(table.filter(pl.col("diagnostic") == "spectral_shift").with_columns(
        pl.lit(d).alias("diagnostic"), pl.lit(v).alias("variant"))
        for d, v in [key.split("/") for key in PLAIN if key not in ("frobenius_norm/", "spectral_shift/")])])  # fmt: skip
    claim = next(c for c in judge(full) if c["id"] == "R4")
    assert claim["verdict"] == "holds"
    assert claim["after_matching"] == matched
    equal = next(c for c in claim["controls"] if c["name"] == "equal norm")
    (points,) = equal["read_at"]["points"].values()
    assert points == [pytest.approx(np.linspace(0.4, 1.0, 5))] * 3, (
        "from the largest first norm to the smallest last one"
    )
    assert equal["measured"]["opd"]["mean"] == pytest.approx(opd, rel=0.1), "read at norm 1"


def test_trajectories_without_a_common_norm_are_inconclusive() -> None:
    far = {
        **PLAIN,
        "frobenius_norm/": {"sft": (1.0, 4.7), "sft-matched": (1.0, 4.7), "opd": (0.1, 0.45), "rlvr": (0.1, 0.4)},
    }
    claim = next(c for c in judge(measurements(far, {})) if c["id"] == "R1")
    equal = next(c for c in claim["controls"] if c["name"] == "equal norm")
    assert equal["verdict"] == "open" and "no common" in equal["explanation"]
    assert claim["after_matching"] != "still holds"


def test_the_first_crossing_is_read_between_its_checkpoints() -> None:
    assert crossing(np.array([1.0, 3.0, 2.0, 5.0]), 2.5) == (0, 0.75)
    assert crossing(np.array([1.0, 3.0]), 3.0) == (0, 1.0)


def test_recovery_is_the_share_of_what_training_the_matrices_brings(judged: dict[str, dict[str, Any]]) -> None:
    recovery = judged["S1"]["recovery"]
    assert recovery["opd"]["update"]["mean"] == pytest.approx(1.0)
    assert recovery["sft"]["update"]["mean"] == pytest.approx((0.52 - 0.45) / 0.15)
    assert recovery["opd"]["random"]["mean"] == pytest.approx(1 / 3)
    assert set(recovery["opd"]) == set(S1) - {"free", "frozen"}
    contrast = next(c for c in judged["S1"]["controls"] if c["name"] == "recovery")
    assert contrast["verdict"] == "holds"
    assert contrast["comparisons"][0]["value"] == pytest.approx(0.6 - 0.8 * 0.6 - 0.2 * 0.45)


def test_a_study_says_what_it_left_out() -> None:
    left = missing(measurements(PLAIN, {}), {})
    assert [line.partition(" ")[0] for line in left if not line.startswith("control")] == ["R2", "S1", "C1", "C2", "C3"]
    assert sum(line.startswith("control") for line in left) == 9
    assert missing(measurements(PAPER, {}), logs())[0].startswith("control")


def test_every_control_stands_in_for_arms_that_the_study_trains() -> None:
    from opdgeo.experiments.study import BY_NAME

    for control in CONTROLS:
        for claim in CLAIMS:
            if claim.quantity.diagnostic != "accuracy_sampled" and claim.id.startswith(
                tuple(control.claims.split("|"))
            ):
                assert all(control.arm(arm) in BY_NAME for arm in claim.arms), (control.name, claim.id)


def test_every_number_is_recomputed_without_the_package(tmp_path: Path, judged: dict[str, dict[str, Any]]) -> None:
    source = Path(recompute_claims.__file__).read_text()
    assert "opdgeo" not in source
    nulls = {key: {arm: 0.9 for arm in arms} for key, arms in PAPER.items()}
    table, runs = measurements(PAPER, nulls), logs()
    for folder, rows in runs.items():
        (tmp_path / "arms" / folder).mkdir(parents=True)
        (tmp_path / "arms" / folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table.write_parquet(tmp_path / "measurements.parquet")
    seeds = sorted({int(folder.partition("-seed")[2] or 0) for folder in runs})
    apart = at_the_end(from_null(reduced(table)).to_dicts())
    claims = {"seeds": seeds, "outcomes": outcomes(runs), "claims": judge(table, runs), "from_null": apart}
    assert {row["arm"] for row in apart} == set(PAPER["stable_rank/"]) and {row["step"] for row in apart} == {100}
    assert all(row["seeds"] == len(seeds) and row["low"] < row["excess"] < row["high"] for row in apart)
    (tmp_path / "claims.json").write_text(json.dumps(claims))
    # Another seed was begun in the same folder: the claims do not count it.
    (tmp_path / "arms" / f"opd-seed{len(seeds)}").mkdir()
    row = json.dumps({"event": "eval", "step": 0, "accuracy_sampled": 0.0, "prompts": 1})
    (tmp_path / "arms" / f"opd-seed{len(seeds)}" / "log.jsonl").write_text(row + "\n")
    assert recompute_claims.main(tmp_path) == []

    claims["claims"][0]["measured"]["opd"]["low"] += 1e-3
    claims["claims"][-1]["verdict"] = "open"
    apart[0]["high"] *= 1.001
    (tmp_path / "claims.json").write_text(json.dumps(claims))
    wrong = recompute_claims.main(tmp_path)
    assert any("R1/opd/low" in line for line in wrong) and any("C3/verdict" in line for line in wrong)
    assert any(line.startswith("from null/") for line in wrong)


def test_similarities_are_compared_at_one_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL arm ends at step 40: beside it, OPD's rivals are read as similar to their own step 40, not to their step 100."""
    monkeypatch.setattr(claims_module, "CLAIMS", [c for c in CLAIMS if c.id == "L4"])
    rows = []

    def add(arm: str, step: int, variant: str, value: float) -> None:
        rows.extend(
            dict.fromkeys(MEASUREMENTS)
            | {
                "checkpoint": f"{arm}/step-{step:06d}", "step": step, "matrix": f"m{m}", "rows": 8, "cols": 8,
                "diagnostic": diagnostic, "variant": kind, "value": number + 1e-3 * m, "null_mean": 0.3, "status": "computed",
            }
            for m in range(12)
            for diagnostic, kind, number in (("subspace_similarity", variant, value), ("frobenius_norm", "", 0.1 + step))
        )  # fmt: skip

    for arm in PARADIGMS:  # every arm turns alike: 0.9 from 20 to 40, and less the longer it goes on
        for step, final in ((20, 0.7), (40, 0.8), (100, 1.0)):
            add(arm, step, "final.16", final)
            add(arm, step, "previous.16", 0.9)
    for arm in ("opd-forward-kl", "opd-reverse-kl", "sft-own-samples"):
        for step, final in ((20, 0.9), (40, 1.0)):
            add(arm, step, "final.16", final)
            add(arm, step, "previous.16", 0.9)
    table = pl.DataFrame(rows, schema=MEASUREMENTS, orient="row").unique(maintain_order=True)
    (claim,) = judge(table)
    controls = {c["name"]: c for c in claim["controls"]}
    for name in ("forward KL", "full reverse KL", "SFT on own samples"):
        assert all(c["value"] == pytest.approx(0) for c in controls[name]["comparisons"]), controls[name]["explanation"]
        assert all(got["mean"] == pytest.approx(0.9055) for got in controls[name]["measured"].values())
    # Without a checkpoint at the common end beside the first one, there is nothing to compare.
    gone_on = pl.concat([table, table.filter(pl.col("step") == 20, ~pl.col("checkpoint").str.contains("kl")).with_columns(
        pl.lit(30).cast(pl.Int64).alias("step"), pl.col("checkpoint").str.replace("000020", "000030"))])  # fmt: skip
    (claim,) = judge(gone_on)
    forward = next(c for c in claim["controls"] if c["name"] == "forward KL")
    assert forward["verdict"] == "open" and "goes on after step 40" in forward["explanation"]


def test_matrices_of_different_sizes_that_are_equally_sparse_give_that_number() -> None:
    table = measurements(PLAIN, {}, noise=0.0)
    huge = pl.when(pl.col("matrix") == "m0").then(10_000).otherwise("rows").alias("rows")
    claim = next(c for c in judge(table.with_columns(huge)) if c["id"] == "R1")
    assert claim["measured"]["opd"]["mean"] == pytest.approx(0.52, rel=1e-9)

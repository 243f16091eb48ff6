"""The rules of the claims, on measurements whose verdicts are known beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from opdgeo.experiments.claims import judge, outcomes
from opdgeo.experiments.rules import CLAIMS, PARADIGMS
from opdgeo.survey.results import MEASUREMENTS

# What the paper reports, as final means; the null is the same for every arm unless a test says otherwise.
PAPER = {
    "update_sparsity/bf16_eta": {"sft": 0.08, "sft-matched": 0.5, "opd": 0.52, "rlvr": 0.77},
    "principal_angles/left.mean": {"sft": 10.0, "sft-matched": 1.0, "opd": 1.0, "rlvr": 0.4},
    "principal_angles/right.mean": {"sft": 10.0, "sft-matched": 1.0, "opd": 1.0, "rlvr": 0.4},
    "spectral_shift/": {"sft": 1e-3, "sft-matched": 1e-4, "opd": 1e-4, "rlvr": 1e-5},
    "mask_overlap/principal.0.5": {"sft": 0.49, "sft-matched": 0.4, "opd": 0.4, "rlvr": 0.3},
    "mask_overlap/low_magnitude.0.5": {"sft": 0.52, "sft-matched": 0.6, "opd": 0.6, "rlvr": 0.75},
    "stable_rank/": {"sft": (8.0, 16.0), "sft-matched": (5.0, 5.1), "opd": (5.0, 5.2), "rlvr": (8.0, 5.2)},
    "hill_exponent/16": {"sft": (2.0, 6.0), "sft-matched": (2.3, 2.9), "opd": (2.3, 2.9), "rlvr": (3.0, 2.0)},
    "subspace_similarity/final.16": {"sft": (0.3, 1.0), "sft-matched": (0.8, 1.0), "opd": (0.8, 1.0), "rlvr": (0.4, 1.0)},
    "frobenius_norm/": {"sft": 4.7, "sft-matched": 0.45, "opd": 0.45, "rlvr": 0.17},
}  # fmt: skip


def measurements(
    final: dict[str, dict[str, Any]], nulls: dict[str, Any], seeds: int = 2, noise: float = 0.01
) -> pl.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for key, arms in final.items():
        diagnostic, variant = key.split("/")
        for arm, value in arms.items():
            first, last = value if isinstance(value, tuple) else (value, value)
            for seed in range(seeds):
                folder = arm if seed == 0 else f"{arm}-seed{seed}"
                for matrix in range(12):
                    for step, mean in ((20, first), (100, last)):
                        rows.append(
                            dict.fromkeys(MEASUREMENTS)
                            | {
                                "checkpoint": f"{folder}/step-{step:06d}", "step": step, "matrix": f"m{matrix}", "layer": 0,
                                "role": "q_proj", "rows": 8 + matrix, "cols": 8, "diagnostic": diagnostic, "variant": variant,
                                "value": mean * (1 + noise * rng.standard_normal()), "null_mean": nulls.get(key, {}).get(arm, 1.0),
                                "null_std": 0.0, "status": "computed",
                            }
                        )  # fmt: skip
    return pl.DataFrame(rows, schema=MEASUREMENTS, orient="row")


def verdicts(table: pl.DataFrame) -> dict[str, str]:
    return {c["id"]: c["verdict"] for c in judge(table)}


def test_every_claim_holds_on_the_papers_own_pattern() -> None:
    assert verdicts(measurements(PAPER, {})) == {c.id: "holds" for c in CLAIMS}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda c: c.id)
def test_every_claim_fails_when_its_pattern_is_turned_round(claim: Any) -> None:
    reverse = {"sft": "rlvr", "sft-matched": "opd", "opd": "sft", "rlvr": "sft-matched"}
    turned = {key: {arm: arms[reverse[arm]] for arm in arms} for key, arms in PAPER.items()}
    turned["mask_overlap/principal.0.5"] = dict.fromkeys(PARADIGMS, 0.6)
    turned["frobenius_norm/"] = dict.fromkeys(PARADIGMS, 1.0)
    assert verdicts(measurements(turned, {}))[claim.id] == "fails"


def test_noise_makes_a_claim_inconclusive() -> None:
    close = {**PAPER, "update_sparsity/bf16_eta": {"sft": 0.50, "sft-matched": 0.5, "opd": 0.53, "rlvr": 0.56}}
    assert verdicts(measurements(close, {}, noise=0.08))["R1"] == "inconclusive"


def test_a_difference_of_size_alone_does_not_survive_the_null() -> None:
    key = "update_sparsity/bf16_eta"
    claim = next(c for c in judge(measurements(PAPER, {key: PAPER[key]})) if c["id"] == "R1")
    assert claim["verdict"] == "holds"
    matched, beyond = claim["controls"]
    assert beyond["verdict"] == "fails", "every arm equals its null, so no order is left"
    assert matched["verdict"] == "inconclusive" or matched["verdict"] == "fails"
    assert claim["measured"]["opd"]["null"] == pytest.approx(0.52)


def test_the_sparsity_is_averaged_over_entries() -> None:
    table = measurements(PAPER, {}, noise=0.0).with_columns(
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

    logs = {arm: log(0.5, 0.7) for arm in PARADIGMS} | {"opd-seed1": log(0.4, 0.8)}
    opd = outcomes(logs)["opd"]
    assert opd["prompts"] == 64
    assert opd["accuracy_greedy"]["start"]["seeds"] == [0.5, 0.4]
    assert opd["accuracy_greedy"]["end"] == {"mean": 0.75, "seeds": [0.7, 0.8]}

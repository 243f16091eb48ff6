"""Measurements and evaluations of a study whose verdicts are known: the pattern that the paper reports."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl

from opdgeo.experiments.rules import ALPHAS, PARADIGMS, SPARSE, TEACHER_TOKENS, s1
from opdgeo.survey.results import MEASUREMENTS

# What the paper reports, as final means (or first and last); the null is the same for every arm unless a test says otherwise.
PAPER: dict[str, dict[str, Any]] = {
    "update_sparsity/bf16_eta": {"sft": 0.08, "sft-matched": 0.5, "opd": 0.52, "rlvr": 0.77},
    "principal_angles/left.mean": {"sft": 10.0, "sft-matched": 1.0, "opd": 1.0, "rlvr": 0.4},
    "principal_angles/right.mean": {"sft": 10.0, "sft-matched": 1.0, "opd": 1.0, "rlvr": 0.4},
    "spectral_shift/": {"sft": 1e-3, "sft-matched": 1e-4, "opd": 1e-4, "rlvr": 1e-5},
    "mask_overlap/principal.0.5": {"sft": 0.49, "sft-matched": 0.4, "opd": 0.4, "rlvr": 0.3},
    "mask_overlap/low_magnitude.0.5": {"sft": 0.52, "sft-matched": 0.6, "opd": 0.6, "rlvr": 0.75},
    "stable_rank/": {"sft": (8.0, 16.0), "sft-matched": (5.0, 5.1), "opd": (5.0, 5.2), "rlvr": (8.0, 5.2)},
    "hill_exponent/16": {"sft": (2.0, 6.0), "sft-matched": (2.3, 2.9), "opd": (2.3, 2.9), "rlvr": (3.0, 2.0)},
    "subspace_similarity/final.16": {"sft": (0.3, 1.0), "sft-matched": (0.8, 1.0), "opd": (0.8, 1.0), "rlvr": (0.4, 1.0)},
    "frobenius_norm/": {"sft": (1.0, 4.7), "sft-matched": (0.1, 0.45), "opd": (0.1, 0.45), "rlvr": (0.05, 0.17)},
}  # fmt: skip
PLAIN = {key: dict(arms) for key, arms in PAPER.items()}  # the four paradigms alone
for _arms in PAPER.values():  # and the arms of R2, C1, C2 and C3
    for _arm in (*SPARSE, TEACHER_TOKENS, *(f"opd-alpha-{a:g}" for a in ALPHAS), "opd-weak-teacher"):
        _arms[_arm] = _arms["opd"]
    for _family in ("small", "digits"):
        _arms |= {f"{arm}-{_family}": _arms[arm] for arm in PARADIGMS}
PAPER["stable_rank/"]["opd-alpha-0.01"] = (8.0, 8.2)
PAPER["frobenius_norm/"] |= {"s1-opd-free": (0.1, 0.3), "s1-sft-matched-free": (0.2, 0.5)}
# Accuracies of S1: OPD keeps all in its channel, SFT half of what it gains, a random channel a third.
S1 = {"free": (0.6, 0.6), "frozen": (0.45, 0.45), "random": (0.5, 0.5), "other": (0.5, 0.5), "half": (0.55, 0.5)}
S1 |= dict.fromkeys(("gradient", "update", "adapter", "double"), (0.6, 0.52))


def logs(seeds: int = 2) -> dict[str, list[dict[str, Any]]]:
    """Evaluations of every arm of `PAPER` at the checkpoints of `measurements`, and the arms of S1."""

    def run(end: float) -> list[dict[str, Any]]:
        rows = []
        for step, done in ((0, 0.0), (20, 0.5), (100, 1.0)):
            accuracy = 0.4 + (end - 0.4) * done
            rows.append(
                {"event": "eval", "step": step, "prompts": 8192, "accuracy_greedy": accuracy, "accuracy_sampled": accuracy,
                 "kl_teacher": 1.0 - accuracy, "kl_origin": done * end, "completion_length": 20.0}
            )  # fmt: skip
        return rows

    ends = {arm: 0.7 for arm in PAPER["stable_rank/"]}
    for what, (opd, sft) in S1.items():
        ends |= {s1("opd", what): opd, s1("sft", what): sft, s1("sft-matched", what): sft}
    return {
        arm if s == 0 else f"{arm}-seed{s}": run(end + 0.002 * s) for arm, end in ends.items() for s in range(seeds)
    }


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

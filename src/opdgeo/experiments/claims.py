"""The claims of the paper (PAPER §1) that the study judges, each by a rule that stands here before any run.

A rule is a list of comparisons. A comparison has a statistic (a difference or a log ratio of means over matrices, computed
per seed), a 95 % bootstrap interval over seeds and matrices, and a required size. It is met when the whole interval is
beyond the required size, failed when the whole interval falls short of it, open otherwise. A claim holds when every
comparison is met, fails when one is failed, and is inconclusive otherwise.

Every claim is judged three times: as the paper compares (SFT from the base, OPD and RLVR from the anchor); with the matched
SFT (OPD's start, learning rate, steps and sequences) in SFT's place; and on the excess over an isotropic update of the same
size. Only what survives the last two says something about the paradigm rather than about how far the weights moved.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

BOOTSTRAP = 1000
SFT, MATCHED, OPD, RLVR = "sft", "sft-matched", "opd", "rlvr"
PARADIGMS = (SFT, MATCHED, OPD, RLVR)


@dataclass(frozen=True)
class Quantity:
    """A number per matrix and checkpoint: the mean of some rows of `measurements.parquet`."""

    diagnostic: str
    variants: tuple[str, ...]
    unit: str
    ratio: bool  # compared as a ratio (a positive quantity without a natural upper end) or as a difference (a share)


@dataclass(frozen=True)
class Comparison:
    """`value` maps arm means to a statistic; the comparison is met where the statistic is above `required`."""

    text: str
    value: Callable[[Means], float]
    required: float


@dataclass(frozen=True)
class Claim:
    id: str
    claim: str
    paper: str
    quantity: Quantity
    comparisons: tuple[Comparison, ...]

    @property
    def rule(self) -> str:
        """The whole rule in words."""
        tests = "; ".join(c.text for c in self.comparisons)
        return f"Holds if all of these are met by their whole 95 % interval, fails if one is missed by its whole interval: {tests}."


class Means:
    """Means over matrices for one resample: ``means(arm)`` at the last checkpoint, ``means(arm, "first")`` at the first.

    `series(arm)` gives the mean at every checkpoint; `other` is a second quantity of the same claim (norms for L2).
    """

    def __init__(self, values: dict[str, np.ndarray], other: dict[str, np.ndarray]):
        self.values, self.other = values, other

    def __call__(self, arm: str, when: str = "last") -> float:
        return float(self.values[arm][0 if when == "first" else -1])

    def series(self, arm: str) -> np.ndarray:
        return self.values[arm]

    def norm(self, arm: str) -> float:
        return float(self.other[arm][-1])


def _difference(low: str, high: str, required: float) -> Comparison:
    text = f"{high.upper()} minus {low.upper()} above {required:g}"
    return Comparison(text, lambda m: m(high) - m(low), required)


def _ratio(low: str, high: str, required: float) -> Comparison:
    return Comparison(f"{high.upper()} over {low.upper()} above {required:g}", lambda m: m(high) / m(low), required)


def _growth(arm: str, required: float) -> Comparison:
    return Comparison(
        f"{arm.upper()} last over first checkpoint above {required:g}", lambda m: m(arm) / m(arm, "first"), required
    )


def _decline(arm: str, required: float) -> Comparison:
    return Comparison(
        f"{arm.upper()} first over last checkpoint above {required:g}", lambda m: m(arm, "first") / m(arm), required
    )


def _band(arm: str, width: float) -> Comparison:
    return Comparison(
        f"{arm.upper()} largest over smallest checkpoint mean below {width:g}",
        lambda m: -float(m.series(arm).max() / m.series(arm).min()),
        -width,
    )


SPARSITY = Quantity("update_sparsity", ("bf16_eta",), "share", ratio=False)
ANGLES = Quantity("principal_angles", ("left.mean", "right.mean"), "degrees", ratio=True)
SHIFT = Quantity("spectral_shift", ("",), "number", ratio=True)
PRINCIPAL = Quantity("mask_overlap", ("principal.0.5",), "share", ratio=False)
LOW = Quantity("mask_overlap", ("low_magnitude.0.5",), "share", ratio=False)
STABLE_RANK = Quantity("stable_rank", ("",), "number", ratio=True)
HILL = Quantity("hill_exponent", ("16",), "number", ratio=True)
SIMILARITY = Quantity("subspace_similarity", ("final.16",), "share", ratio=False)
NORM = Quantity("frobenius_norm", ("",), "number", ratio=True)

CLAIMS = (
    Claim(
        "R1", "OPD updates fewer weights than SFT, more than RLVR (bf16-visible)",
        "unchanged: SFT 8.1 %, OPD 51.6 %, RLVR 77.2 %", SPARSITY,
        (_difference(SFT, OPD, 0.02), _difference(OPD, RLVR, 0.02)),
    ),
    Claim(
        "R3", "Principal subspaces rotate most under SFT, least under RLVR",
        "representative layer: SFT > 10°, OPD ≈ 1°, RLVR < 0.5°", ANGLES,
        (_ratio(OPD, SFT, 1.2), _ratio(RLVR, OPD, 1.2)),
    ),
    Claim(
        "R4", "Singular values drift most under SFT, least under RLVR",
        "NSS about 1e-3, 1e-4, 1e-5", SHIFT, (_ratio(OPD, SFT, 1.2), _ratio(RLVR, OPD, 1.2)),
    ),
    Claim(
        "R5a", "Visible updates of OPD and RLVR avoid principal weights",
        "below the random baseline", PRINCIPAL,
        (
            Comparison("0.5 minus OPD above 0.02", lambda m: 0.5 - m(OPD), 0.02),
            Comparison("0.5 minus RLVR above 0.02", lambda m: 0.5 - m(RLVR), 0.02),
        ),
    ),
    Claim(
        "R5b", "Visible updates gather on low-magnitude weights, least under SFT, most under RLVR",
        "low-magnitude overlap: SFT 31.88 %, OPD 53.59 %, RLVR 73.48 % (random 30 %)", LOW,
        (
            Comparison("OPD minus 0.5 above 0.02", lambda m: m(OPD) - 0.5, 0.02),
            _difference(SFT, OPD, 0.02), _difference(OPD, RLVR, 0.02),
        ),
    ),
    Claim(
        "L1", "OPD's update stays in a narrow stable-rank band; SFT's expands; RLVR's contracts",
        "stable rank against step", STABLE_RANK,
        (_band(OPD, 1.25), _growth(SFT, 1.1), _decline(RLVR, 1.1)),
    ),
    Claim(
        "L2", "The narrow band is not because the update is small: OPD's norm exceeds RLVR's at about the same stable rank",
        "final Frobenius norm: SFT 4.701, OPD 0.452, RLVR 0.168", STABLE_RANK,
        (
            Comparison("OPD's norm over RLVR's above 1.5", lambda m: m.norm(OPD) / m.norm(RLVR), 1.5),
            Comparison(
                "stable ranks of OPD and RLVR within a factor 1.25",
                lambda m: -math.exp(abs(math.log(m(OPD) / m(RLVR)))), -1.25,
            ),
        ),
    ),
    Claim(
        "L3", "The spectrum's shape changes mildly under OPD, rises sharply under SFT, falls under RLVR",
        "Hill exponent under OPD 2.34 → 2.93", HILL,
        (_band(OPD, 1.5), _growth(SFT, 1.5), _decline(RLVR, 1.05)),
    ),
    Claim(
        "L4", "Under OPD the final update subspace is there from the first checkpoint; SFT and RLVR reach it gradually",
        "Sim_16(t, end)", SIMILARITY,
        (
            Comparison("at the first checkpoint OPD minus SFT above 0.05", lambda m: m(OPD, "first") - m(SFT, "first"), 0.05),
            Comparison("at the first checkpoint OPD minus RLVR above 0.05", lambda m: m(OPD, "first") - m(RLVR, "first"), 0.05),
        ),
    ),
)  # fmt: skip


def judge(measurements: pl.DataFrame) -> list[dict[str, Any]]:
    """Judge every claim on the study's measurements (`checkpoint` is "ARM/step-N"); the content of `claims.json`'s list."""
    table = measurements.with_columns(
        pl.col("checkpoint").str.extract(r"^(.+?)(?:-seed\d+)?/").alias("arm"),
        pl.col("checkpoint").str.extract(r"-seed(\d+)/").cast(pl.Int64).fill_null(0).alias("seed"),
    )
    return [_judge(claim, table) for claim in CLAIMS]


def _judge(claim: Claim, table: pl.DataFrame) -> dict[str, Any]:
    q = claim.quantity
    raw, null = _values(table, q, "value"), _values(table, q, "null_mean")
    norms = _values(table, NORM, "value")
    matched_sft = {**raw, SFT: raw[MATCHED]}
    if q.ratio:
        excess = {arm: raw[arm] / null[arm] for arm in raw}
        how = "ratio to the null"
    else:
        excess = {arm: raw[arm] - null[arm] for arm in raw}
        how = "difference from the null"
    shifted = claim if q.ratio else _about_zero(claim)
    verdict, explanation = _verdict(claim, raw, norms)
    controls = []
    for name, content, rule in (
        ("matched SFT: OPD's start, learning rate, steps and sequences", matched_sft, claim),
        (f"beyond size: {how} in place of the value", excess, shifted),
    ):
        outcome, why = _verdict(rule, content, norms)
        measured = {arm: _measured(content[arm]) for arm in (PARADIGMS if content is excess else (MATCHED, OPD, RLVR))}
        controls.append({"control": name, "verdict": outcome, "explanation": why, "measured": measured})
    return {
        "id": claim.id,
        "claim": claim.claim,
        "paper": claim.paper,
        "rule": claim.rule,
        "verdict": verdict,
        "explanation": explanation,
        "diagnostic": q.diagnostic,
        "variants": list(q.variants),
        "unit": q.unit,
        "at": "first checkpoint" if claim.id == "L4" else "last checkpoint",
        "measured": {arm: _measured(raw[arm], null[arm], first=claim.id == "L4") for arm in PARADIGMS},
        "controls": controls,
    }


def outcomes(logs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """What training did: for each arm the accuracy, KL to the teacher and length at its start and end, each seed's and the mean.

    `logs` maps an arm's folder ("opd", "opd-seed1", …) to the rows of its log.jsonl.
    """
    out: dict[str, dict[str, Any]] = {}
    for arm in PARADIGMS:
        runs = [rows for name, rows in logs.items() if name.partition("-seed")[0] == arm]
        evals = [sorted((r for r in rows if r["event"] == "eval"), key=lambda r: r["step"]) for rows in runs]
        out[arm] = {"prompts": evals[0][0]["prompts"]}
        for name in ("accuracy_greedy", "accuracy_sampled", "kl_teacher", "completion_length"):
            start, end = ([float(e[i][name]) for e in evals] for i in (0, -1))
            out[arm][name] = {
                "start": {"mean": sum(start) / len(start), "seeds": start},
                "end": {"mean": sum(end) / len(end), "seeds": end},
            }
    return out


def _about_zero(claim: Claim) -> Claim:
    """The same rule for excesses: a fixed chance level (0.5) becomes zero."""
    moved = {
        "R5a": (
            Comparison("minus OPD's excess above 0.02", lambda m: -m(OPD), 0.02),
            Comparison("minus RLVR's excess above 0.02", lambda m: -m(RLVR), 0.02),
        ),
        "R5b": (
            Comparison("OPD's excess above 0.02", lambda m: m(OPD), 0.02),
            _difference(SFT, OPD, 0.02),
            _difference(OPD, RLVR, 0.02),
        ),
    }
    if claim.id not in moved:
        return claim
    return Claim(claim.id, claim.claim, claim.paper, claim.quantity, moved[claim.id])


def _values(table: pl.DataFrame, q: Quantity, column: str) -> dict[str, np.ndarray]:
    """Per arm an array (seeds, matrices, checkpoints) of the quantity; NaN where it was not computed.

    The sparsity is averaged over entries: its values carry each matrix's share of them.
    """
    rows = (
        table.filter((pl.col("diagnostic") == q.diagnostic) & pl.col("variant").is_in(q.variants))
        .group_by("arm", "seed", "matrix", "step", maintain_order=True)
        .agg(pl.col(column).mean(), (pl.col("rows") * pl.col("cols")).first().alias("entries"))
    )
    out = {}
    for arm in PARADIGMS:
        part = rows.filter(pl.col("arm") == arm)
        seeds, names, steps = (part[c].unique().sort().to_list() for c in ("seed", "matrix", "step"))
        array = np.full((len(seeds), len(names), len(steps)), np.nan)
        for seed, name, step, value in part.select("seed", "matrix", "step", column).iter_rows():
            if value is not None:
                array[seeds.index(seed), names.index(name), steps.index(step)] = value
        if q.diagnostic == "update_sparsity":  # averaged over entries, as the paper does
            sizes = {m: e for m, e in part.select("matrix", "entries").iter_rows()}
            weight = np.array([sizes[m] for m in names], dtype=float)
            array = array * (weight / weight.mean())[None, :, None]
        out[arm] = array
    return out


def _verdict(claim: Claim, values: dict[str, np.ndarray], norms: dict[str, np.ndarray]) -> tuple[str, str]:
    arms = {arm: _resampled(v) for arm, v in values.items()}
    sizes = {arm: _resampled(v) for arm, v in norms.items()}

    def means(i: int) -> Means:  # row 0 is the sample itself
        return Means({arm: v[i] for arm, v in arms.items()}, {arm: v[i] for arm, v in sizes.items()})

    samples = np.array([[c.value(means(i)) for c in claim.comparisons] for i in range(1, BOOTSTRAP + 1)])
    whole = means(0)
    outcomes, parts = [], []
    for comparison, column in zip(claim.comparisons, samples.T, strict=True):
        low, high = np.quantile(column, [0.025, 0.975])
        outcome = "met" if low > comparison.required else "missed" if high < comparison.required else "open"
        outcomes.append(outcome)
        sign = -1 if comparison.required < 0 else 1  # bands are tested on the negated width
        shown = sorted((sign * low, sign * high))
        parts.append(
            f"{comparison.text}: {sign * comparison.value(whole):.3g} [{shown[0]:.3g}, {shown[1]:.3g}], {outcome}"
        )
    verdict = "fails" if "missed" in outcomes else "inconclusive" if "open" in outcomes else "holds"
    return verdict, "; ".join(parts)


def _resampled(values: np.ndarray) -> np.ndarray:
    """Means over seeds and matrices, (1 + BOOTSTRAP, checkpoints): of `values` itself, then of each bootstrap resample.

    Seeds and matrices are resampled independently of each other, with the same draws for every arm (the comparison is paired).
    """
    rng = np.random.default_rng(0)
    seeds, matrices, _ = values.shape
    by_seed = np.vstack([np.ones(seeds), rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=BOOTSTRAP)])
    by_matrix = np.vstack(
        [np.ones(matrices), rng.multinomial(matrices, np.full(matrices, 1 / matrices), size=BOOTSTRAP)]
    )
    known = ~np.isnan(values)
    total = np.einsum("bs,bm,smc->bc", by_seed, by_matrix, np.where(known, values, 0.0), optimize=True)
    return total / np.einsum("bs,bm,smc->bc", by_seed, by_matrix, known.astype(float), optimize=True)


def _known(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _measured(values: np.ndarray, null: np.ndarray | None = None, *, first: bool = False) -> dict[str, Any]:
    """Mean, 95 % bootstrap interval over seeds and matrices, and each seed's mean, at one checkpoint."""
    at = values[:, :, 0 if first else -1]
    low, high = np.quantile(_resampled(values)[1:, 0 if first else -1], [0.025, 0.975])
    with np.errstate(invalid="ignore"):
        mean, by_seed = np.nanmean(at), np.nanmean(at, axis=1)
    out: dict[str, Any] = {
        "mean": _known(mean),
        "low": _known(low),
        "high": _known(high),
        "seeds": [_known(x) for x in by_seed],
    }
    if null is not None:
        out["null"] = _known(np.nanmean(null[:, :, 0 if first else -1]))
    return out

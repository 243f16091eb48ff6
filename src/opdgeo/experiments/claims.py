"""Judging the claims (`rules.py`) on a study's data; the content of `claims.json`. `tests/recompute_claims.py` does it once more.

**Values.** A quantity is a mean over rows of `measurements.parquet` for each arm, seed, matrix and checkpoint; its means over
matrices are unweighted, except those of a diagnostic that is averaged over entries (of those matrices that a resample drew).
The excess over the null is value − null for shares and value / null otherwise, matrix by matrix (`excess_as` in claims.json).
Value, null and excess are over the same rows: one without a null, as that of a matrix that did not move, counts only where the
arm has no null at all.

**Intervals.** 1,000 bootstrap resamples of seeds and of matrices, independently, with the same draws for every arm (the
comparison is paired); with one seed, of matrices alone. Accuracies (S1): of seeds, and of the prompts as binomial counts.
Where trajectories are read at equal norm, accuracy or KL, the point of reading is not resampled. A claim uses the seeds that all
its arms have.

**Equal norm, accuracy, KL.** The key's mean over seeds (and matrices) is taken at every checkpoint of every arm; five
equidistant values from the largest of the first to the smallest of the last ones are reached by all arms; each arm is read
there by linear interpolation between the two checkpoints around the first crossing. A rule about the first or the last
checkpoint takes the first or the last of the five.

**Common ends.** Where a control puts shorter arms beside longer ones, all are read at the steps that they share. Similarity to the
end is then similarity to the last of these: for an arm that goes on it is known from the checkpoint before, which the
next one was compared with, and from no earlier one.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS
from opdgeo.experiments.rules import (
    ACCURACY,
    CLAIMS,
    CONTROLS,
    EXPLORATORY,
    MATCHED,
    NORM,
    OPD,
    PARADIGMS,
    PREVIOUS,
    R5,
    SIMILARITY,
    STABLE_RANK,
    Claim,
    Comparison,
    Control,
    OwnControl,
    Quantity,
    s1,
)

BOOTSTRAP = 1000
POINTS = 5
KEYS = {"norm": "‖ΔW‖_F", "accuracy": "sampled accuracy", "kl": "KL from the start"}
OUTCOMES = ("accuracy_greedy", "accuracy_sampled", "kl_teacher", "kl_origin", "completion_length")
Logs = dict[str, list[dict[str, Any]]]


class Data:
    """A study's numbers as arrays. Arrays are (seeds, matrices, checkpoints), NaN where a number was not computed."""

    def __init__(self, measurements: pl.DataFrame, logs: Logs):
        self.table = measurements.with_columns(
            pl.col("checkpoint").str.extract(r"^(.+?)(?:-seed\d+)?/").alias("arm"),
            pl.col("checkpoint").str.extract(r"-seed(\d+)/").cast(pl.Int64).fill_null(0).alias("seed"),
        )
        value, null = pl.col("value"), pl.col("null_mean")
        alone = null.is_null().all().over("arm", "diagnostic")
        self.table = self.table.with_columns(
            compared=pl.when(null.is_not_null() | alone).then(value), null_mean=pl.when(value.is_not_null()).then(null)
        )
        self.evals: dict[str, dict[int, list[dict[str, Any]]]] = {}
        self.outside: dict[str, dict[int, float]] = {}
        """Arm → seed → share of the update's energy outside the channel after the last step."""
        for folder, rows in logs.items():
            arm, _, seed = folder.partition("-seed")
            evals = sorted((r for r in rows if r["event"] == "eval"), key=lambda r: r["step"])
            self.evals.setdefault(arm, {})[int(seed or 0)] = evals
            leaks = [
                r["channel/outside"] for r in rows if r["event"] == "step" and r.get("channel/outside") is not None
            ]
            if leaks:
                self.outside.setdefault(arm, {})[int(seed or 0)] = float(leaks[-1])
        self._kept: dict[Any, Any] = {}
        self._weights: dict[tuple[str, Quantity], np.ndarray] = {}
        tracked = self.table.select("arm", "seed").unique().iter_rows()
        self.tracked: dict[str, set[int]] = {}
        for arm, seed in tracked:
            self.tracked.setdefault(arm, set()).add(seed)

    def seeds(self, arms: Iterable[str], *, tracked: bool = True) -> list[int]:
        """The seeds that every one of `arms` has; none when an arm is missing."""
        known = self.tracked if tracked else {arm: set(runs) for arm, runs in self.evals.items()}
        return sorted(set.intersection(*(known.get(arm, set()) for arm in arms)))

    def values(self, arm: str, q: Quantity, column: str, seeds: list[int]) -> np.ndarray:
        key = (arm, q.diagnostic, q.variants, column)
        if key not in self._kept:
            self._kept[key] = self._array(arm, q, column)
        known, array = self._kept[key]
        return np.asarray(array[[known.index(seed) for seed in seeds]])

    def _array(self, arm: str, q: Quantity, column: str) -> tuple[list[int], np.ndarray]:
        rows = (
            self.table.filter(
                (pl.col("arm") == arm) & (pl.col("diagnostic") == q.diagnostic) & pl.col("variant").is_in(q.variants)
            )
            .group_by("seed", "matrix", "step", maintain_order=True)
            .agg(pl.col(column).mean(), (pl.col("rows") * pl.col("cols")).first().alias("entries"))
        )
        seeds, names, steps = (rows[c].unique().sort().to_list() for c in ("seed", "matrix", "step"))
        array = np.full((len(seeds), len(names), len(steps)), np.nan)
        for seed, name, step, value in rows.select("seed", "matrix", "step", column).iter_rows():
            if value is not None:
                array[seeds.index(seed), names.index(name), steps.index(step)] = value
        self._weights[arm, q] = np.ones(len(names))
        if DIAGNOSTICS[q.diagnostic].weighting == "entries":  # as the paper does
            sizes = dict(rows.select("matrix", "entries").iter_rows())
            self._weights[arm, q] = np.array([sizes[m] for m in names], dtype=float)
        return seeds, array

    def weights(self, arm: str, q: Quantity) -> np.ndarray:
        """What each matrix counts in a mean (matrices,): its entries for sparsity, else 1."""
        self.values(arm, q, "value", [])
        return self._weights[arm, q]

    def until(self, arm: str, q: Quantity, column: str, seeds: list[int], end: int) -> np.ndarray:
        """`values` up to the checkpoint `end`; similarities are those to `end`, NaN where they were not measured."""
        steps = self.steps(arm)
        array = self.values(arm, q, column, seeds)[:, :, : steps.index(end) + 1].copy()
        if q is SIMILARITY and end != steps[-1]:
            array[:] = np.nan
            array[:, :, -2:-1] = self.values(arm, PREVIOUS, column, seeds)[:, :, steps.index(end), None]
            array[:, :, -1] = 1.0
        return array

    def steps(self, arm: str) -> list[int]:
        found: list[int] = self.table.filter(pl.col("arm") == arm)["step"].unique().sort().to_list()
        return found

    def key(self, arm: str, read: str, seeds: list[int]) -> np.ndarray:
        """The mean over seeds (and matrices) of norm, accuracy or KL from the start at every checkpoint of `arm`."""
        if read == "norm":
            return np.asarray(np.nanmean(self.values(arm, NORM, "value", seeds), axis=(0, 1)))
        column = {"accuracy": "accuracy_sampled", "kl": "kl_origin"}[read]
        rows: list[dict[int, Any]] = [
            {r["step"]: r.get(column) for r in self.evals.get(arm, {}).get(seed, [])} for seed in seeds
        ]
        found: list[list[Any]] = [[seed.get(step) for seed in rows] for step in self.steps(arm)]
        return np.array([np.nan if None in at else np.mean(at) for at in found], dtype=float)


class Content:
    """What a rule is tested on: values, nulls and norms of the arms, under one control."""

    def __init__(self, data: Data, claim: Claim, control: Control | None, arms: list[str]):
        control = control or Control("", "")
        q, self.unmatched, self.points = claim.quantity, "", dict[str, list[float]]()
        stand_in = {arm: control.arm(arm) for arm in arms}
        self.seeds = data.seeds(stand_in.values())
        self.values, self.nulls, self.norms = ({arm: np.empty(0) for arm in arms} for _ in range(3))
        self.weights = {arm: data.weights(real, q) for arm, real in stand_in.items()}
        for group in claim.groups or (tuple(arms),):
            self._read(data, q, control, {arm: stand_in[arm] for arm in group}, claim.at)
        with np.errstate(invalid="ignore", divide="ignore"):
            self.excess = {a: v / self.nulls[a] if q.ratio else v - self.nulls[a] for a, v in self.values.items()}
        self.tested = self.excess if control.excess else self.values
        self.chance = 0.0 if control.excess else 0.5

    def _read(self, data: Data, q: Quantity, control: Control, group: dict[str, str], at: str) -> None:
        def arrays(arm: str, end: int) -> list[np.ndarray]:
            columns = ((q, "compared"), (q, "null_mean"), (NORM, "value"))
            return [data.until(arm, quantity, column, self.seeds, end) for quantity, column in columns]

        if control.read == "last":
            shared = set.intersection(*(set(data.steps(arm)) for arm in group.values()))
            aligned = bool(shared) and bool(control.arms or "shared" in at)
            for name, arm in group.items():
                steps = data.steps(arm)
                first, end = (min(shared), max(shared)) if aligned else (steps[0], steps[-1])
                kept = [i for i, step in enumerate(steps) if not aligned or step in shared]
                self.values[name], self.nulls[name], self.norms[name] = (a[:, :, kept] for a in arrays(arm, end))
                if q is SIMILARITY and end != steps[-1] and steps.index(first) < steps.index(end) - 1:
                    self.unmatched = (
                        f"{arm} goes on after step {end}, the last that all arms have, and its similarity to that step was not "
                        f"measured at step {first}"
                    )
            return
        keys = {name: data.key(arm, control.read, self.seeds) for name, arm in group.items()}
        low, high = max(k[0] for k in keys.values()), min(k[-1] for k in keys.values())
        what = KEYS[control.read]
        if not low < high:
            self.unmatched = (
                f"no common {what}: the largest at a first checkpoint is {low:.3g}, the smallest at a last {high:.3g}"
            )
            return
        grid = np.linspace(low, high, POINTS)
        self.points["/".join(sorted(set(group.values())))] = grid.tolist()
        for name, arm in group.items():
            places = [crossing(keys[name], value) for value in grid]
            self.values[name], self.nulls[name], self.norms[name] = (
                np.stack([between(a, i, w) for i, w in places], axis=2) for a in arrays(arm, data.steps(arm)[-1])
            )


def crossing(key: np.ndarray, value: float) -> tuple[int, float]:
    """(i, w) such that (1 − w)·key[i] + w·key[i + 1] is `value`, at the first place where the key passes it."""
    for i, (here, there) in enumerate(itertools.pairwise(key)):
        if min(here, there) <= value <= max(here, there):
            return i, 0.0 if here == there else float((value - here) / (there - here))
    return len(key) - 2, 1.0  # the last value itself, up to rounding


def between(array: np.ndarray, i: int, w: float) -> np.ndarray:
    return np.asarray((1 - w) * array[..., i] + w * array[..., i + 1])


class Means:
    """`rules.Sample` for one resample of a `Content`."""

    def __init__(self, values: dict[str, np.ndarray], norms: dict[str, np.ndarray], chance: float):
        self.values, self.norms, self.chance = values, norms, chance

    def __call__(self, arm: str, when: str = "last") -> float:
        return float(self.values[arm][0 if when == "first" else -1])

    def series(self, arm: str) -> np.ndarray:
        return self.values[arm]

    def norm(self, arm: str) -> float:
        return float(self.norms[arm][-1])

    def accuracy(self, arm: str) -> float:
        return float(self.values[arm][-1])


def judge(measurements: pl.DataFrame, logs: Logs | None = None) -> list[dict[str, Any]]:
    """Judge every claim whose arms are there; the content of `claims.json`'s list.

    Args:
        measurements: the study's rows; `checkpoint` is "ARM/step-N" or "ARM-seedM/step-N".
        logs: an arm's folder ("opd", "opd-seed1", …) → the rows of its log.jsonl.
    """
    data = Data(*_counted(measurements, logs or {}))
    out = []
    for claim in CLAIMS:
        if claim.quantity is ACCURACY:
            if data.seeds(claim.arms, tracked=False):
                out.append(_judge_accuracy(claim, data))
        elif data.seeds(claim.arms):
            out.append(_judge(claim, data))
    return _with_r5(out)


def _counted(measurements: pl.DataFrame, logs: Logs) -> tuple[pl.DataFrame, Logs]:
    """Both without the exploratory seeds."""
    seed = pl.col("checkpoint").str.extract(r"-seed(\d+)/").cast(pl.Int64)
    kept = measurements.filter(~seed.is_in(list(EXPLORATORY)).fill_null(False))
    return kept, {name: rows for name, rows in logs.items() if int(name.partition("-seed")[2] or 0) not in EXPLORATORY}


def missing(measurements: pl.DataFrame, logs: Logs) -> list[str]:
    """What a study left out: claims and controls whose arms it did not train."""
    data = Data(measurements, logs)
    claims = [f"{c.id} ({c.claim})" for c in CLAIMS if not data.seeds(c.arms, tracked=c.quantity is not ACCURACY)]
    arms = set(CLAIMS[0].arms)
    controls = [f"control: {k.name} ({k.text})" for k in CONTROLS if not data.seeds(k.arm(arm) for arm in arms)]
    return claims + controls


def _judge(claim: Claim, data: Data) -> dict[str, Any]:
    arms = list(claim.arms)
    plain = Content(data, claim, None, arms)
    verdict, comparisons = _verdict(claim.comparisons, _samples(plain))
    controls = []
    for control in CONTROLS:
        stand_in = [control.arm(arm) for arm in arms]
        changes = stand_in != arms or control.excess or control.read != "last"
        if claim.id.startswith(tuple(control.claims.split("|"))) and changes and data.seeds(stand_in):
            controls.append(_control(claim, control, Content(data, claim, control, arms)))
    shown = arms if set(arms) - set(PARADIGMS) else [a for a in PARADIGMS if data.seeds([*arms, a])]
    return _entry(claim, verdict, comparisons, controls) | {
        "seeds": plain.seeds,
        "measured": _all_measured(Content(data, claim, None, shown) if shown != arms else plain, shown, claim),
    }


def _control(claim: Claim, control: Control, content: Content) -> dict[str, Any]:
    how = f" ({'ratio to' if claim.quantity.ratio else 'difference from'} the null)" if control.excess else ""
    tests = claim.matched if claim.matched and control.read != "last" else claim.comparisons
    out: dict[str, Any] = {"control": f"{control.name}: {control.text}{how}", "name": control.name}
    if content.unmatched:
        return out | {
            "verdict": "inconclusive", "explanation": content.unmatched, "comparisons": [], "seeds": content.seeds,
            "measured": {},
        }  # fmt: skip
    verdict, comparisons = _verdict(tests, _samples(content))
    out |= {
        "verdict": verdict,
        "explanation": _explain(comparisons),
        "comparisons": comparisons,
        "seeds": content.seeds,
    }
    if content.points:
        out["read_at"] = {"key": control.read, "points": content.points}
    names = {arm: control.arm(arm) for arm in content.values}
    return out | {"measured": _all_measured(content, list(names), claim, names)}


def _all_measured(
    content: Content, arms: list[str], claim: Claim, names: dict[str, str] | None = None
) -> dict[str, Any]:
    index = 0 if claim.at.startswith("first") else -1
    out = {}
    for arm in arms:
        if content.tested is content.excess:
            out[(names or {}).get(arm, arm)] = _measured(content.excess[arm], index, content.weights[arm])
            continue
        got = _measured(content.values[arm], index, content.weights[arm])
        with np.errstate(invalid="ignore"):
            got["null"] = _known(_mean(content.nulls[arm][:, :, index], content.weights[arm]))
        excess = _measured(content.excess[arm], index, content.weights[arm])
        got |= {"excess": excess["mean"], "excess_low": excess["low"], "excess_high": excess["high"]}
        out[(names or {}).get(arm, arm)] = got
    return out


def _entry(
    claim: Claim, verdict: str, comparisons: list[dict[str, Any]], controls: list[dict[str, Any]]
) -> dict[str, Any]:
    named = {control["name"]: control["verdict"] for control in controls}
    return {
        "id": claim.id,
        "claim": claim.claim,
        "paper": claim.paper,
        "rule": claim.rule,
        "verdict": verdict,
        "explanation": _explain(comparisons),
        "comparisons": comparisons,
        "after_matching": _after(verdict, [named.get(name, "inconclusive") for name in claim.after]),
        "after_matching_rule": "Still holds when the claim holds and holds under: " + "; ".join(claim.after)
        + ". Does not when one of these fails; else inconclusive.",
        "diagnostic": claim.quantity.diagnostic,
        "variants": list(claim.quantity.variants),
        "unit": claim.quantity.unit,
        "excess_as": "ratio" if claim.quantity.ratio else "difference",
        "at": claim.at,
        "controls": controls,
    }  # fmt: skip


def _after(verdict: str, others: list[str]) -> str:
    judged = [verdict, *others]
    return "does not" if "fails" in judged else "inconclusive" if "inconclusive" in judged else "still holds"


def _with_r5(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put R5, the sum of R5a and R5b, before them."""
    parts = [c for c in claims if c["id"] in ("R5a", "R5b")]
    if len(parts) < 2:
        return claims

    def both(key: str, good: str, bad: str) -> str:
        values = [part[key] for part in parts]
        return bad if bad in values else good if values == [good, good] else "inconclusive"

    whole = {
        "id": "R5", "claim": R5, "paper": "; ".join(p["paper"] for p in parts),
        "rule": "Holds if R5a and R5b both hold, fails if one of them fails, else inconclusive.",
        "verdict": both("verdict", "holds", "fails"),
        "explanation": "; ".join(f"{p['id']} {p['verdict']}" for p in parts), "comparisons": [],
        "after_matching": both("after_matching", "still holds", "does not"),
        "after_matching_rule": "Still holds if both still hold, does not if one does not, else inconclusive.",
        "parts": [p["id"] for p in parts], "unit": "share", "seeds": parts[0]["seeds"], "controls": [],
        "measured": {},
    }  # fmt: skip
    at = claims.index(parts[0])
    return [*claims[:at], whole, *claims[at:]]


def _verdict(tests: tuple[Comparison, ...], samples: list[Means]) -> tuple[str, list[dict[str, Any]]]:
    """The verdict of a list of comparisons on (1 + BOOTSTRAP) samples, the first of which is the data itself."""
    out = []
    for test in tests:
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = np.array([test.value(sample) for sample in samples])
        low, high = (float(x) for x in np.quantile(drawn[1:], [0.025, 0.975]))
        if test.below:
            outcome = "met" if high < test.required else "missed" if low > test.required else "open"
        else:
            outcome = "met" if low > test.required else "missed" if high < test.required else "open"
        out.append(
            {
                "text": test.text, "value": _known(float(drawn[0])), "low": _known(low), "high": _known(high),
                "required": test.required, "below": test.below, "outcome": outcome,
            }
        )  # fmt: skip
    outcomes = [c["outcome"] for c in out]
    return "fails" if "missed" in outcomes else "inconclusive" if "open" in outcomes else "holds", out


def _explain(comparisons: list[dict[str, Any]]) -> str:
    def shown(x: float | None) -> str:
        return "undefined" if x is None else f"{x:.3g}"

    return "; ".join(
        f"{c['text']}: {shown(c['value'])} [{shown(c['low'])}, {shown(c['high'])}], {c['outcome']}" for c in comparisons
    )


def _samples(content: Content) -> list[Means]:
    values = {arm: _resampled(v, content.weights[arm]) for arm, v in content.tested.items()}
    norms = {arm: _resampled(v) for arm, v in content.norms.items()}
    return [
        Means({a: v[i] for a, v in values.items()}, {a: v[i] for a, v in norms.items()}, content.chance)
        for i in range(BOOTSTRAP + 1)
    ]


def _resampled(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Means over seeds and matrices, (1 + BOOTSTRAP, checkpoints): of `values` itself, then of each bootstrap resample.

    `weights` (matrices,) are what the matrices count in a mean; they sum to 1 again over the matrices that a resample draws.
    """
    rng = np.random.default_rng(0)
    seeds, matrices, _ = values.shape
    by_seed = np.vstack([np.ones(seeds), rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=BOOTSTRAP)])
    by_matrix = np.vstack(
        [np.ones(matrices), rng.multinomial(matrices, np.full(matrices, 1 / matrices), size=BOOTSTRAP)]
    )
    if weights is not None:
        by_matrix = by_matrix * weights
    known = ~np.isnan(values)
    total = np.einsum("bs,bm,smc->bc", by_seed, by_matrix, np.where(known, values, 0.0), optimize=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(total / np.einsum("bs,bm,smc->bc", by_seed, by_matrix, known.astype(float), optimize=True))


def _measured(values: np.ndarray, index: int, weights: np.ndarray) -> dict[str, Any]:
    """Mean, 95 % bootstrap interval over seeds and matrices, and each seed's mean, at one checkpoint."""
    low, high = np.quantile(_resampled(values, weights)[1:, index], [0.025, 0.975])
    return {
        "mean": _known(_mean(values[:, :, index], weights)),
        "low": _known(float(low)),
        "high": _known(float(high)),
        "seeds": [_known(_mean(seed, weights)) for seed in values[:, :, index]],
    }


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The mean of what is known of `values` (…, matrices), where matrices count by `weights`."""
    known = np.isfinite(values)
    if not known.any():
        return float("nan")
    counts = np.broadcast_to(1.0 if weights is None else weights, values.shape)
    return float(np.average(values[known], weights=counts[known]))


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# S1: accuracies of the runs that go on from 20 % of training.


def _judge_accuracy(claim: Claim, data: Data) -> dict[str, Any]:
    arms = [arm for arm in data.evals if arm.startswith("s1-")]
    verdict, comparisons = _verdict(claim.comparisons, _accuracies(data, list(claim.arms)))
    controls = []
    for own in claim.own_controls:
        used = list(dict.fromkeys(arm for c in own.comparisons for arm in c.arms))
        if data.seeds(used, tracked=False):
            controls.append(_own_control(own, data, used))
    return _entry(claim, verdict, comparisons, controls) | {
        "seeds": data.seeds(claim.arms, tracked=False),
        "measured": {arm: _accuracy_measured(data, arm) for arm in sorted(arms)},
        "recovery": _recoveries(data, arms),
        "k": [early_rank(data, seed) for seed in data.seeds([OPD])],
    }


def _own_control(own: OwnControl, data: Data, used: list[str]) -> dict[str, Any]:
    out: dict[str, Any] = {"control": f"{own.name}: {own.text}", "name": own.name}
    stop = stopping_place(data) if own.stop else None
    samples = _accuracies(data, used, stop)
    verdict, comparisons = _verdict(own.comparisons, samples)
    out |= {"verdict": verdict, "explanation": _explain(comparisons), "comparisons": comparisons}
    if stop:
        out["read_at"] = {"key": "step", "evaluation": stop[0], "share": stop[1]}
    return out | {
        "seeds": data.seeds(used, tracked=False),
        "measured": {arm: _accuracy_measured(data, arm, stop) for arm in used},
    }


def stopping_place(data: Data) -> tuple[int, float]:
    """Where the free matched SFT has moved as far as the free OPD at its end: (evaluation i, share of the way to i + 1)."""
    ours, theirs = s1(MATCHED, "free"), s1(OPD, "free")
    seeds = data.seeds([ours, theirs])
    if not seeds:
        return len(next(iter(data.evals[ours].values()))) - 2, 1.0
    path = np.concatenate([[0.0], data.key(ours, "norm", seeds)])
    return crossing(path, min(float(data.key(theirs, "norm", seeds)[-1]), float(path[-1])))


def _accuracy(data: Data, arm: str, seed: int, stop: tuple[int, float] | None) -> tuple[float, int]:
    """Sampled accuracy after the last step (or at `stop`, for the matched SFT), and the prompts behind it."""
    evals = data.evals[arm][seed]
    if stop is None or not arm.startswith(s1(MATCHED, "")):
        return float(evals[-1]["accuracy_sampled"]), int(evals[-1]["prompts"])
    i, w = stop
    here, there = evals[i], evals[i + 1]
    return (1 - w) * here["accuracy_sampled"] + w * there["accuracy_sampled"], min(here["prompts"], there["prompts"])


def _drawn(data: Data, arm: str, seeds: list[int], stop: tuple[int, float] | None = None) -> np.ndarray:
    """Mean accuracy over seeds (1 + BOOTSTRAP,): itself, then with seeds and prompts drawn anew."""
    known = [_accuracy(data, arm, seed, stop) for seed in seeds]
    weights = np.random.default_rng(0).multinomial(len(seeds), np.full(len(seeds), 1 / len(seeds)), size=BOOTSTRAP)
    rng = np.random.default_rng(zlib.crc32(arm.encode()))
    counts = np.stack([rng.binomial(n, min(1.0, max(0.0, p)), size=BOOTSTRAP) / n for p, n in known], axis=1)
    return np.concatenate([[np.mean([p for p, _ in known])], (weights * counts).sum(1) / len(seeds)])


def _accuracies(data: Data, arms: list[str], stop: tuple[int, float] | None = None) -> list[Means]:
    seeds = data.seeds(arms, tracked=False)
    drawn = {arm: _drawn(data, arm, seeds, stop) for arm in arms}
    return [Means({arm: d[i : i + 1] for arm, d in drawn.items()}, {}, 0.0) for i in range(BOOTSTRAP + 1)]


def _accuracy_measured(data: Data, arm: str, stop: tuple[int, float] | None = None) -> dict[str, Any]:
    seeds = data.seeds([arm], tracked=False)
    drawn = _drawn(data, arm, seeds, stop)
    low, high = np.quantile(drawn[1:], [0.025, 0.975])
    each = [_accuracy(data, arm, seed, stop)[0] for seed in seeds]
    out = {"mean": float(drawn[0]), "low": float(low), "high": float(high), "seeds": each}
    leaks = [data.outside[arm][seed] for seed in seeds if seed in data.outside.get(arm, {})]
    return out | ({"outside": sum(leaks) / len(leaks)} if leaks else {})


def early_rank(data: Data, seed: int) -> int:
    """K of S1: the whole number just below the mean stable rank of OPD's update at its first checkpoint."""
    return max(1, math.floor(_mean(data.values(OPD, STABLE_RANK, "value", [seed])[:, :, 0])))


def _recoveries(data: Data, arms: list[str]) -> dict[str, dict[str, Any]]:
    """paradigm → constraint → recovery, its interval and each seed's, after the last step."""
    out: dict[str, dict[str, Any]] = {}

    def accuracy(arm: str, seed: int) -> float:
        return _accuracy(data, arm, seed, None)[0]

    for paradigm in PARADIGMS:
        free, frozen = s1(paradigm, "free"), s1(paradigm, "frozen")
        for arm in sorted(a for a in arms if a.startswith(s1(paradigm, "")) and a not in (free, frozen)):
            what = arm.removeprefix(s1(paradigm, ""))
            if paradigm == "sft" and what.startswith("matched-"):
                continue
            seeds = data.seeds([arm, free, frozen], tracked=False)
            if not seeds:
                continue
            drawn = _share_recovered(*(_drawn(data, a, seeds) for a in (arm, free, frozen)))
            each = _share_recovered(*(np.array([accuracy(a, seed) for seed in seeds]) for a in (arm, free, frozen)))
            low, high = np.quantile(drawn[1:], [0.025, 0.975])
            out.setdefault(paradigm, {})[what] = {
                "mean": _known(float(drawn[0])), "low": _known(float(low)), "high": _known(float(high)),
                "seeds": [_known(float(x)) for x in each],
            }  # fmt: skip
    return out


def _share_recovered(held: np.ndarray, free: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    gained = free - frozen
    return np.divide(held - frozen, gained, out=np.full(len(gained), np.nan), where=gained > 0)


def outcomes(logs: Logs) -> dict[str, dict[str, Any]]:
    """What training did: for each arm the accuracies, KLs and length at its start and end, each seed's and the mean.

    `logs` maps an arm's folder ("opd", "opd-seed1", …) to the rows of its log.jsonl; what an arm did not measure is left out.
    """
    out: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(name.partition("-seed")[0] for name in logs):
        runs = [rows for name, rows in logs.items() if name.partition("-seed")[0] == arm]
        evals = [sorted((r for r in rows if r["event"] == "eval"), key=lambda r: r["step"]) for rows in runs]
        out[arm] = {"prompts": evals[0][-1]["prompts"]}
        for name in OUTCOMES:
            start: list[Any] = [e[0].get(name) for e in evals]
            end: list[Any] = [e[-1].get(name) for e in evals]
            if all(isinstance(x, float) for x in start + end):
                out[arm][name] = {
                    "start": {"mean": sum(start) / len(start), "seeds": start},
                    "end": {"mean": sum(end) / len(end), "seeds": end},
                }
    return out

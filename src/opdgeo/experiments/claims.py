"""Judging the claims (`rules.py`) on a study's data; the content of `claims.json`. `tests/recompute_claims.py` does it once more.

**Values** are those of `reduced.py`: means over matrices, one a seed and checkpoint, with null and excess over it.

**Effects.** Every comparison gives one effect a seed (or one a checkpoint), from that seed's arms alone. Intervals, tests and
verdicts over the seeds are those of `statistics.py`; with one seed there is no interval and every verdict is open. A claim uses the
seeds that all its arms have.

**Equal norm, accuracy, KL.** Within a seed, five equidistant values of the key, from the largest of the arms' first to the smallest of their
last checkpoints, are reached by all arms; each arm is read there by linear interpolation between the two checkpoints
around the first crossing. A rule about the first or the last checkpoint takes the first or the last of the five.

**Common ends.** Where a control puts shorter arms beside longer ones, all are read at the steps that they share. Similarity to the
end is then similarity to the last of these: for an arm that goes on it is known from the checkpoint before, which the
next one was compared with, and from no earlier one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from opdgeo.experiments.reduced import OUTSIDE, Logs, arm_and_seed, reduced
from opdgeo.experiments.rules import (
    ACCURACY,
    CLAIMS,
    CONTROLS,
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
from opdgeo.experiments.statistics import (
    HOLDS,
    MOST_FLIPPED,
    OPEN,
    REVERSED,
    SAME,
    SHOWN,
    Compared,
    sign_flip,
    t_interval,
    verdict,
)

POINTS = 5
KEYS = {"norm": "‖ΔW‖_F", "accuracy": "sampled accuracy", "kl": "KL from the start"}
OUTCOMES = ("accuracy_greedy", "accuracy_sampled", "kl_teacher", "kl_origin", "completion_length")
AGAINST = (REVERSED, SAME)
COLUMNS = ("value", "null", "excess")


class Data:
    """Reduced rows as arrays (seeds, checkpoints), NaN where a number was not computed."""

    def __init__(self, rows: pl.DataFrame):
        self.cells: dict[tuple[str, str], dict[int, dict[int, tuple[float, ...]]]] = {}
        self.measured: dict[str, set[int]] = {}
        """Arm → steps that are measured, with a norm."""
        for arm, seed, step, name, *numbers in rows.select("arm", "seed", "step", "name", *COLUMNS).iter_rows():
            found = tuple(math.nan if x is None else x for x in numbers)
            self.cells.setdefault((arm, name), {}).setdefault(seed, {})[step] = found
            if name == NORM.name:
                self.measured.setdefault(arm, set()).add(step)

    def seeds(self, arms: Iterable[str], name: str = NORM.name) -> list[int]:
        """The seeds in which every one of `arms` has the number `name`; none when an arm is missing."""
        return sorted(set.intersection(*(set(self.cells.get((arm, name), ())) for arm in arms)))

    def steps(self, arm: str) -> list[int]:
        return sorted(self.measured.get(arm, ()))

    def values(self, arm: str, q: Quantity, column: str, seeds: list[int]) -> np.ndarray:
        """(seeds, checkpoints); `column` is value, null or excess."""
        cells, nothing = self.cells.get((arm, q.name), {}), (math.nan,) * len(COLUMNS)
        at = COLUMNS.index(column)
        return np.array([[cells.get(s, {}).get(step, nothing)[at] for step in self.steps(arm)] for s in seeds])

    def until(self, arm: str, q: Quantity, column: str, seeds: list[int], end: int) -> np.ndarray:
        """`values` up to the checkpoint `end`; similarities are those to `end`, NaN where they were not measured."""
        steps = self.steps(arm)
        array = self.values(arm, q, column, seeds)[:, : steps.index(end) + 1].copy()
        if q is SIMILARITY and end != steps[-1]:
            array[:] = np.nan
            array[:, -2:-1] = self.values(arm, PREVIOUS, column, seeds)[:, steps.index(end), None]
            array[:, -1] = 1.0
        return array

    def evaluated(self, arm: str, name: str, seed: int) -> dict[int, float]:
        """Step → a number of the evaluations."""
        return {step: found[0] for step, found in sorted(self.cells.get((arm, name), {}).get(seed, {}).items())}

    def key(self, arm: str, read: str, seed: int) -> np.ndarray:
        """Norm, accuracy or KL from the start at every checkpoint of `arm`."""
        if read == "norm":
            return np.asarray(self.values(arm, NORM, "value", [seed])[0])
        found = self.evaluated(arm, {"accuracy": "accuracy_sampled", "kl": "kl_origin"}[read], seed)
        return np.array([found.get(step, math.nan) for step in self.steps(arm)])


class Content:
    """What a rule is tested on: values, nulls, excesses and norms of the arms (seeds, points), under one control."""

    def __init__(self, data: Data, claim: Claim, control: Control | None, arms: list[str]):
        control = control or Control("", "")
        q, self.unmatched, self.points = claim.quantity, "", dict[str, list[list[float]]]()
        stand_in = {arm: control.arm(arm) for arm in arms}
        self.seeds = data.seeds(stand_in.values())
        self.of: dict[str, dict[str, np.ndarray]] = {column: {} for column in (*COLUMNS, "norm")}
        for group in claim.groups or (tuple(arms),):
            self._read(data, q, control, {arm: stand_in[arm] for arm in group}, claim.at)
        self.tested = self.of["excess" if control.excess else "value"]
        self.by_excess = control.excess
        self.chance = 0.0 if control.excess else 0.5

    def _read(self, data: Data, q: Quantity, control: Control, group: dict[str, str], at: str) -> None:
        def arrays(arm: str, end: int) -> dict[str, np.ndarray]:
            found = {column: data.until(arm, q, column, self.seeds, end) for column in COLUMNS}
            return found | {"norm": data.until(arm, NORM, "value", self.seeds, end)}

        if control.read == "last":
            shared = set.intersection(*(set(data.steps(arm)) for arm in group.values()))
            aligned = bool(shared) and bool(control.arms or "shared" in at)
            for name, arm in group.items():
                steps = data.steps(arm)
                first, end = (min(shared), max(shared)) if aligned else (steps[0], steps[-1])
                kept = [i for i, step in enumerate(steps) if not aligned or step in shared]
                for column, array in arrays(arm, end).items():
                    self.of[column][name] = array[:, kept]
                if q is SIMILARITY and end != steps[-1] and steps.index(first) < steps.index(end) - 1:
                    self.unmatched = (
                        f"{arm} goes on after step {end}, the last that all arms have, and its similarity to that step was not "
                        f"measured at step {first}"
                    )
            return
        whole = {name: arrays(arm, data.steps(arm)[-1]) for name, arm in group.items()}
        read: dict[str, dict[str, list[np.ndarray]]] = {n: {c: [] for c in self.of} for n in group}
        grids = []
        for i, seed in enumerate(self.seeds):
            keys = {name: data.key(arm, control.read, seed) for name, arm in group.items()}
            what = KEYS[control.read]
            if not all(np.isfinite(k).all() for k in keys.values()):
                self.unmatched = f"{what} was not measured at every checkpoint in seed {seed}"
                return
            low, high = max(k[0] for k in keys.values()), min(k[-1] for k in keys.values())
            if not low < high:
                self.unmatched = f"no common {what} in seed {seed}: the largest at a first checkpoint is {low:.3g}, the smallest at a last {high:.3g}"
                return
            grids.append(np.linspace(low, high, POINTS).tolist())
            for name in group:
                places = [crossing(keys[name], value) for value in grids[-1]]
                for column, array in whole[name].items():
                    read[name][column].append(np.array([between(array[i], j, w) for j, w in places]))
        self.points["/".join(sorted(set(group.values())))] = grids
        for name in group:
            for column in self.of:
                self.of[column][name] = np.array(read[name][column])

    def samples(self) -> list[Means]:
        """One a seed."""
        return [
            Means({a: v[i] for a, v in self.tested.items()}, {a: v[i] for a, v in self.of["norm"].items()}, self.chance)
            for i in range(len(self.seeds))
        ]


def crossing(key: np.ndarray, value: float) -> tuple[int, float]:
    """(i, w) such that (1 − w)·key[i] + w·key[i + 1] is `value`, at the first place where the key passes it."""
    for i, (here, there) in enumerate(itertools.pairwise(key)):
        if min(here, there) <= value <= max(here, there):
            return i, 0.0 if here == there else float((value - here) / (there - here))
    return len(key) - 2, 1.0  # the last value itself, up to rounding


def between(array: np.ndarray, i: int, w: float) -> np.ndarray:
    return np.asarray((1 - w) * array[..., i] + w * array[..., i + 1])


class Means:
    """`rules.Sample` for one seed."""

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
    """Judge every claim whose arms are there; the content of `claims.json`'s list. Arguments as those of `reduced.reduced`."""
    return judge_rows(reduced(measurements, logs))


def judge_rows(rows: pl.DataFrame) -> list[dict[str, Any]]:
    """The same, of reduced rows."""
    data, out = Data(rows), []
    for claim in CLAIMS:
        if claim.quantity is ACCURACY:
            if data.seeds(claim.arms, ACCURACY.name):
                out.append(_judge_accuracy(claim, data))
        elif data.seeds(claim.arms):
            out.append(_judge(claim, data))
    return _with_r5(out)


def missing(measurements: pl.DataFrame, logs: Logs) -> list[str]:
    """What a study left out: claims and controls whose arms it did not train."""
    data = Data(reduced(measurements, logs))
    claims = [f"{c.id} ({c.claim})" for c in CLAIMS if not data.seeds(c.arms, _needed(c))]
    arms = set(CLAIMS[0].arms)
    controls = [f"control: {k.name} ({k.text})" for k in CONTROLS if not data.seeds(k.arm(arm) for arm in arms)]
    return claims + controls


def _needed(claim: Claim) -> str:
    return ACCURACY.name if claim.quantity is ACCURACY else NORM.name


def controls_of(claim: Claim, data: Data) -> list[Control]:
    """The controls that change something for `claim` and whose arms are there."""
    found = []
    for control in CONTROLS:
        stand_in = [control.arm(arm) for arm in claim.arms]
        changes = stand_in != list(claim.arms) or control.excess or control.read != "last"
        if claim.id.startswith(tuple(control.claims.split("|"))) and changes and data.seeds(stand_in):
            found.append(control)
    return found


def _judge(claim: Claim, data: Data) -> dict[str, Any]:
    arms = list(claim.arms)
    plain = Content(data, claim, None, arms)
    found, comparisons = compare(claim.comparisons, plain.samples(), plain.seeds)
    controls = [_control(claim, c, Content(data, claim, c, arms)) for c in controls_of(claim, data)]
    shown = arms if set(arms) - set(PARADIGMS) else [a for a in PARADIGMS if data.seeds([*arms, a])]
    return _entry(claim, found, comparisons, controls) | {
        "seeds": plain.seeds,
        "measured": _all_measured(Content(data, claim, None, shown) if shown != arms else plain, shown, claim),
    }


def _control(claim: Claim, control: Control, content: Content) -> dict[str, Any]:
    how = f" ({'ratio to' if claim.quantity.ratio else 'difference from'} the null)" if control.excess else ""
    tests = claim.matched if claim.matched and control.read != "last" else claim.comparisons
    out: dict[str, Any] = {"control": f"{control.name}: {control.text}{how}", "name": control.name}
    if content.unmatched:
        return out | {
            "verdict": OPEN,
            "explanation": content.unmatched,
            "comparisons": [],
            "seeds": content.seeds,
            "measured": {},
        }
    found, comparisons = compare(tests, content.samples(), content.seeds)
    out |= {
        "verdict": found,
        "explanation": _explain(comparisons),
        "comparisons": comparisons,
        "seeds": content.seeds,
    }
    if content.points:
        out["read_at"] = {"key": control.read, "points": content.points}
    names = {arm: control.arm(arm) for arm in content.tested}
    return out | {"measured": _all_measured(content, list(names), claim, names)}


def _all_measured(
    content: Content, arms: list[str], claim: Claim, names: dict[str, str] | None = None
) -> dict[str, Any]:
    index = 0 if claim.at.startswith("first") else -1
    out = {}
    for arm in arms:
        got = _measured(content.tested[arm][:, index])
        if not content.by_excess:
            excess = _measured(content.of["excess"][arm][:, index])
            got |= {"null": _measured(content.of["null"][arm][:, index])["mean"], "excess": excess["mean"]}
            got |= {"excess_low": excess["low"], "excess_high": excess["high"]}
        out[(names or {}).get(arm, arm)] = got
    return out


def _entry(
    claim: Claim, found: str, comparisons: list[dict[str, Any]], controls: list[dict[str, Any]]
) -> dict[str, Any]:
    named = {control["name"]: control["verdict"] for control in controls}
    return {
        "id": claim.id,
        "claim": claim.claim,
        "paper": claim.paper,
        "rule": claim.rule,
        "verdict": found,
        "explanation": _explain(comparisons),
        "comparisons": comparisons,
        "also_without_learning": [
            name for name, said in named.items() if name.startswith("noise in") and said == found != OPEN
        ],
        "after_matching": _after(found, [named.get(name, OPEN) for name in claim.after]),
        "after_matching_rule": "Still holds when the claim holds and holds under: "
        + "; ".join(claim.after)
        + ". Does not when one of these is reversed or shows no difference; else inconclusive.",
        "diagnostic": claim.quantity.diagnostic,
        "variants": list(claim.quantity.variants),
        "unit": claim.quantity.unit,
        "excess_as": "ratio" if claim.quantity.ratio else "difference",
        "at": claim.at,
        "controls": controls,
    }


def _after(found: str, others: list[str]) -> str:
    judged = [found, *others]
    return "does not" if set(AGAINST) & set(judged) else "still holds" if set(judged) == {HOLDS} else "inconclusive"


def _with_r5(claims: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put R5, the sum of R5a and R5b, before them."""
    parts = [c for c in claims if c["id"] in ("R5a", "R5b")]
    if len(parts) < 2:
        return claims
    values, after = ([part[key] for part in parts] for key in ("verdict", "after_matching"))
    whole = {
        "id": "R5",
        "claim": R5,
        "paper": "; ".join(p["paper"] for p in parts),
        "rule": "Holds if R5a and R5b both hold; reversed, or no difference, if one of them is; else open.",
        "verdict": HOLDS if values == [HOLDS, HOLDS] else next((kind for kind in AGAINST if kind in values), OPEN),
        "explanation": "; ".join(f"{p['id']} {p['verdict']}" for p in parts),
        "comparisons": [],
        "after_matching": "does not"
        if "does not" in after
        else "still holds"
        if set(after) == {"still holds"}
        else "inconclusive",
        "after_matching_rule": "Still holds if both still hold, does not if one does not, else inconclusive.",
        "parts": [p["id"] for p in parts],
        "unit": "share",
        "seeds": parts[0]["seeds"],
        "controls": [],
        "measured": {},
    }
    at = claims.index(parts[0])
    return [*claims[:at], whole, *claims[at:]]


def effects_of(test: Comparison, samples: Sequence[Means]) -> np.ndarray:
    """The effects of one comparison (components, seeds)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.array([test.effects(sample) for sample in samples]).T


def compared(test: Comparison, effects: np.ndarray) -> list[Compared]:
    """What `statistics` judges, one a component; nothing where an effect is not defined."""
    if not effects.size or not np.isfinite(effects).all():
        return []
    asks = test.of.asks
    return [Compared(tuple(e), test.least, sameness=asks == "same", either=asks == "other") for e in effects.tolist()]


def compared_again(comparisons: Sequence[dict[str, Any]]) -> list[Compared]:
    """What `compare` judged, from its comparisons for claims.json; all of them have to be defined."""
    return [
        Compared(
            tuple(e),
            math.log(c["required"]) if c["log"] else c["required"],
            sameness=c["asks"] == "same",
            either=c["asks"] == "other",
        )
        for c in comparisons
        for e in c["effects"]
    ]


def compare(
    tests: Sequence[Comparison], samples: Sequence[Means], seeds: list[int]
) -> tuple[str, list[dict[str, Any]]]:
    """The verdict of a conjunction of comparisons at one point of the regime, and each comparison with its effects."""
    out, all_of = [], list[Compared]()
    for test in tests:
        effects = effects_of(test, samples)
        here = compared(test, effects)
        all_of += here
        out.append(_described(test, effects, here))
    whole = bool(all_of) and all(c["p"] for c in out)
    return (verdict(all_of) if whole else OPEN), out


def _described(test: Comparison, effects: np.ndarray, here: list[Compared]) -> dict[str, Any]:
    """A comparison for claims.json. Of several checkpoints the one that decides is shown: the least certain to hold."""
    shown = max(range(len(here)), key=lambda i: (here[i].p(HOLDS), abs(float(np.mean(effects[i]))))) if here else 0
    x = effects[shown] if effects.size else np.array([np.nan])
    low, high = (float(end) for end in t_interval(x))
    scale = math.exp if test.of.log else float

    def scaled(value: float) -> float | None:
        return scale(value) if math.isfinite(value) else None

    return {
        "text": test.text,
        "value": scaled(float(x.mean())),
        "low": scaled(low),
        "high": scaled(high),
        "required": test.margin,
        "below": test.of.asks == "same",
        "outcome": verdict(here) if here else OPEN,
        "asks": test.of.asks,
        "log": test.of.log,
        "effects": [[_known(v) for v in row] for row in effects.tolist()],
        "p": {kind: max(c.p(kind) for c in here) if kind == HOLDS else min(c.p(kind) for c in here) for kind in SHOWN}
        if here
        else {},
        "sign_flip": sign_flip(x) if here and 1 < len(x) <= MOST_FLIPPED else None,
    }


def _explain(comparisons: list[dict[str, Any]]) -> str:
    def shown(c: dict[str, Any]) -> str:
        if c["value"] is None:
            return "undefined"
        return f"{c['value']:.3g} " + ("(one seed)" if c["low"] is None else f"[{c['low']:.3g}, {c['high']:.3g}]")

    return "; ".join(f"{c['text']}: {shown(c)}, {c['outcome']}" for c in comparisons)


def _measured(values: np.ndarray) -> dict[str, Any]:
    """Mean over seeds (seeds,), 95 % t interval (None with one seed), and each seed's value."""
    known = values[np.isfinite(values)]
    low, high = (float(x) for x in t_interval(known)) if len(known) else (math.nan, math.nan)
    mean = float(known.mean()) if len(known) else math.nan
    return {"mean": _known(mean), "low": _known(low), "high": _known(high), "seeds": [_known(float(x)) for x in values]}


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


# S1: accuracies of the runs that go on from an early checkpoint.


def accuracy_samples(data: Data, arms: Iterable[str], seeds: list[int]) -> list[Means]:
    """One a seed: the accuracy after the last step, sampled on the same prompts with the same random numbers for every arm."""
    return [
        Means({arm: np.array([*data.evaluated(arm, ACCURACY.name, s).values()][-1:]) for arm in arms}, {}, 0.0)
        for s in seeds
    ]


def _judge_accuracy(claim: Claim, data: Data) -> dict[str, Any]:
    arms = sorted({arm for arm, name in data.cells if arm.startswith("s1-") and name == ACCURACY.name})
    seeds = data.seeds(claim.arms, ACCURACY.name)
    found, comparisons = compare(claim.comparisons, accuracy_samples(data, claim.arms, seeds), seeds)
    controls = []
    for own in claim.own_controls:
        used = list(dict.fromkeys(arm for c in own.comparisons for arm in c.arms))
        if data.seeds(used, ACCURACY.name):
            controls.append(_own_control(own, data, used))
    return _entry(claim, found, comparisons, controls) | {
        "seeds": seeds,
        "measured": {arm: _accuracy_measured(data, arm) for arm in arms},
        "recovery": _recoveries(data, arms),
        "k": [early_rank(data, seed) for seed in data.seeds([OPD])],
    }


def _own_control(own: OwnControl, data: Data, used: list[str]) -> dict[str, Any]:
    seeds = data.seeds(used, ACCURACY.name)
    found, comparisons = compare(own.comparisons, accuracy_samples(data, used, seeds), seeds)
    return {
        "control": f"{own.name}: {own.text}",
        "name": own.name,
        "verdict": found,
        "explanation": _explain(comparisons),
        "comparisons": comparisons,
        "seeds": seeds,
        "measured": {arm: _accuracy_measured(data, arm) for arm in used},
    }


def _last(data: Data, arm: str, name: str, seed: int) -> float:
    return ([*data.evaluated(arm, name, seed).values()] or [math.nan])[-1]


def _accuracy_measured(data: Data, arm: str) -> dict[str, Any]:
    seeds = data.seeds([arm], ACCURACY.name)
    out = _measured(np.array([_last(data, arm, ACCURACY.name, seed) for seed in seeds]))
    leaks = [_last(data, arm, OUTSIDE, seed) for seed in data.seeds([arm], OUTSIDE)]
    return out | ({"outside": sum(leaks) / len(leaks)} if leaks else {})


def early_rank(data: Data, seed: int) -> int:
    """K of S1: the whole number just below the mean stable rank of OPD's update at its first checkpoint."""
    return max(1, math.floor(data.values(OPD, STABLE_RANK, "value", [seed])[0, 0]))


def _recoveries(data: Data, arms: list[str]) -> dict[str, dict[str, Any]]:
    """paradigm → constraint → (held − frozen) / (free − frozen) after the last step, of the means and of each seed.

    A ratio has no interval where free and frozen meet: the verdicts are on the contrast instead.
    """
    out: dict[str, dict[str, Any]] = {}
    for paradigm in PARADIGMS:
        free, frozen = s1(paradigm, "free"), s1(paradigm, "frozen")
        for arm in (a for a in arms if a.startswith(s1(paradigm, "")) and a not in (free, frozen)):
            what = arm.removeprefix(s1(paradigm, ""))
            seeds = data.seeds([arm, free, frozen], ACCURACY.name)
            if (paradigm == "sft" and what.startswith("matched-")) or not seeds:
                continue
            three = [np.array([_last(data, a, ACCURACY.name, s) for s in seeds]) for a in (arm, free, frozen)]
            (whole,) = _share_recovered(*(x.mean(keepdims=True) for x in three))
            out.setdefault(paradigm, {})[what] = {
                "mean": _known(float(whole)),
                "low": None,
                "high": None,
                "seeds": [_known(float(x)) for x in _share_recovered(*three)],
            }
    return out


def _share_recovered(held: np.ndarray, free: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    gained = free - frozen
    return np.divide(held - frozen, gained, out=np.full(len(gained), np.nan), where=gained > 0)


def outcomes(logs: Logs) -> dict[str, dict[str, Any]]:
    """What training did: for each arm the accuracies, KLs and length at its start and end, each seed's and the mean.

    `logs` maps an arm's folder ("opd", "opd-seed1", …) to the rows of its log.jsonl; what an arm did not measure is left out.
    """
    out: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(arm_and_seed(name)[0] for name in logs):
        runs = [rows for name, rows in logs.items() if arm_and_seed(name)[0] == arm]
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

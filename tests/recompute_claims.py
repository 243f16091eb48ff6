"""Compute every number of a study's `claims.json` once more, from `measurements.parquet` and the arms' `log.jsonl` alone.

    python tests/recompute_claims.py STUDY        (exit 0: all numbers agree; 1: the first differences are listed)

Nothing of the package is imported: rules are told apart by the words of their comparisons, means and bootstraps are written
out here in another way. What is checked, for every claim and every control: the values per arm with interval, seeds, null and
excess; each comparison's statistic, interval and outcome; the verdicts and the verdict after matching; the outcomes of training.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

DRAWS, POINTS = 1000, 5
RATIO = {"principal_angles", "spectral_shift", "stable_rank", "hill_exponent"}
UPPER = {"SFT": "sft", "SFT-MATCHED": "sft-matched", "OPD": "opd", "RLVR": "rlvr"}


def arm_name(shown: str) -> str:
    return UPPER.get(shown, shown)


class Study:
    def __init__(self, folder: Path):
        self.claims = json.loads((folder / "claims.json").read_text())
        split = pl.read_parquet(folder / "measurements.parquet").with_columns(
            pl.col("checkpoint").str.split("/").list.first().alias("run")
        )
        self.rows: dict[str, pl.DataFrame] = {str(run): part for (run,), part in split.group_by("run")}
        self.logs: dict[str, list[dict[str, Any]]] = {}
        self.outside: dict[str, float] = {}
        for path in sorted((folder / "arms").glob("*/log.jsonl")):
            if int(path.parent.name.partition("-seed")[2] or 0) not in self.claims["seeds"]:
                continue  # a study of more seeds was begun here
            rows = [json.loads(line) for line in path.read_text().splitlines() if line]
            for row in rows:
                if row["event"] == "step" and row.get("channel/outside") is not None:
                    self.outside[path.parent.name] = row["channel/outside"]
            self.logs[path.parent.name] = sorted((r for r in rows if r["event"] == "eval"), key=lambda r: r["step"])
        self.cache: dict[Any, Any] = {}
        self.counts: dict[tuple[str, str], np.ndarray] = {}
        """What each matrix of an arm counts in a mean of a diagnostic."""

    @staticmethod
    def run(arm: str, seed: int) -> str:
        return arm if seed == 0 else f"{arm}-seed{seed}"

    def steps(self, arm: str) -> list[int]:
        return sorted(set(self.rows[self.run(arm, 0)]["step"].to_list()))

    def array(self, arm: str, seeds: list[int], diagnostic: str, variants: list[str], column: str) -> np.ndarray:
        """(seeds, matrices, checkpoints)"""
        key = (arm, tuple(seeds), diagnostic, tuple(variants), column)
        if key in self.cache:
            return self.cache[key]
        out = []
        for seed in seeds:
            part = self.rows[self.run(arm, seed)].filter(
                (pl.col("diagnostic") == diagnostic) & pl.col("variant").is_in(variants)
            )
            cells: dict[tuple[str, int], list[float]] = {}
            sizes: dict[str, int] = {}
            whole = diagnostic == "frobenius_norm"  # read as a size, beside no null
            for row in part.to_dicts():
                here = cells.setdefault((row["matrix"], row["step"]), [])
                pair = row["value"], row["null_mean"]
                if row[column] is not None and (None not in pair or whole):
                    here.append(row[column])
                sizes[row["matrix"]] = row["rows"] * row["cols"]
            names = sorted(sizes)
            out.append(np.array([[np.mean(cells.get((m, s)) or [np.nan]) for s in self.steps(arm)] for m in names]))
            counts = [float(sizes[m]) if diagnostic == "update_sparsity" else 1.0 for m in names]
        self.cache[key] = np.stack(out)
        self.counts[arm, diagnostic] = np.array(counts)
        return self.cache[key]

    def to_end(self, arm: str, seeds: list[int], column: str, end: int) -> np.ndarray:
        """The similarity of every checkpoint with the one at `end`, NaN where the table does not hold it."""
        if end == self.steps(arm)[-1]:
            return self.array(arm, seeds, "subspace_similarity", ["final.16"], column)
        previous = self.array(arm, seeds, "subspace_similarity", ["previous.16"], column)
        at = self.steps(arm).index(end)
        out = np.full_like(previous, np.nan)
        out[:, :, at] = 1.0
        if at:
            out[:, :, at - 1] = previous[:, :, at]
        return out

    def evaluations(self, arm: str, seed: int) -> list[dict[str, Any]]:
        return self.logs[self.run(arm, seed)]


def draws(seeds: int, matrices: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    first = rng.multinomial(seeds, [1 / seeds] * seeds, size=DRAWS)
    return first, rng.multinomial(matrices, [1 / matrices] * matrices, size=DRAWS)


def bootstrap(values: np.ndarray, counts: np.ndarray | float = 1.0) -> np.ndarray:
    """(DRAWS + 1, checkpoints), the data itself first; matrices count by `counts`."""
    by_seed, by_matrix = draws(*values.shape[:2])
    by_seed = np.concatenate([np.ones((1, values.shape[0])), by_seed])
    by_matrix = np.concatenate([np.ones((1, values.shape[1])), by_matrix]) * counts
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    out = []
    for checkpoint in range(values.shape[2]):
        top = ((by_seed @ filled[:, :, checkpoint]) * by_matrix).sum(1)
        bottom = ((by_seed @ known[:, :, checkpoint].astype(float)) * by_matrix).sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            out.append(top / bottom)
    return np.stack(out, axis=1)


def cross(key: np.ndarray, value: float) -> tuple[int, float]:
    for i in range(len(key) - 1):
        low, high = sorted((key[i], key[i + 1]))
        if low <= value <= high:
            return i, 0.0 if low == high else (value - key[i]) / (key[i + 1] - key[i])
    return len(key) - 2, 1.0


def blend(array: np.ndarray, place: tuple[int, float]) -> np.ndarray:
    i, w = place
    return array[..., i] * (1 - w) + array[..., i + 1] * w


def recovered(held: np.ndarray, free: np.ndarray, frozen: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(free > frozen, (held - frozen) / (free - frozen), np.nan)


def statistic(text: str, of: dict[str, np.ndarray], norms: dict[str, np.ndarray], chance: float) -> np.ndarray:
    """The comparison called `text` on series (draws, checkpoints) of each arm."""

    def last(arm: str) -> np.ndarray:
        return of[arm_name(arm)][:, -1]

    def first(arm: str) -> np.ndarray:
        return of[arm_name(arm)][:, 0]

    if m := re.match(r"chance \(0\.5\) minus (\S+) above", text):
        return chance - last(m[1])
    if m := re.match(r"(\S+) minus chance \(0\.5\) above", text):
        return last(m[1]) - chance
    if m := re.match(r"at the first checkpoint (\S+) minus (\S+) above", text):
        return first(m[1]) - first(m[2])
    if m := re.match(r"(\S+) minus (\S+) above", text):
        return last(m[1]) - last(m[2])
    if m := re.match(r"(\S+) last over first checkpoint above", text):
        return last(m[1]) / first(m[1])
    if m := re.match(r"(\S+) first over last checkpoint above", text):
        return first(m[1]) / last(m[1])
    if m := re.match(r"(\S+) largest over smallest checkpoint mean below", text):
        return of[arm_name(m[1])].max(1) / of[arm_name(m[1])].min(1)
    if m := re.match(r"(\S+)'s norm over (\S+)'s above", text):
        return norms[arm_name(m[1])][:, -1] / norms[arm_name(m[2])][:, -1]
    if m := re.match(r"stable ranks of (\S+) and (\S+) within a factor", text):
        return np.exp(np.abs(np.log(last(m[1]) / last(m[2]))))
    if m := re.match(r"(\S+) (?:within|beyond) a factor \S+ of (\S+) at (?:every|some) shared checkpoint", text):
        return np.exp(np.abs(np.log(of[arm_name(m[1])] / of[arm_name(m[2])])).max(1))
    if m := re.match(r"(\S+) over (\S+) above", text):
        return last(m[1]) / last(m[2])
    raise ValueError(f"no statistic for {text!r}")


def arms_in(text: str) -> list[str]:
    words = re.findall(r"(?:SFT-MATCHED|SFT|OPD|RLVR|(?:sft|opd|rlvr)-[a-z0-9.-]*[a-z0-9])(?=['\s,;]|$)", text)
    return list(dict.fromkeys(arm_name(w) for w in words))


class Checker:
    def __init__(self, study: Study):
        self.study, self.wrong, self.checked = study, list[str](), 0

    def same(self, where: str, stated: Any, ours: Any) -> None:
        self.checked += 1
        if isinstance(ours, float | np.floating):
            ours = float(ours) if math.isfinite(ours) else None
        if isinstance(stated, float | int) and isinstance(ours, float | int) and not isinstance(stated, bool | str):
            if math.isclose(stated, ours, rel_tol=1e-6, abs_tol=1e-9):
                return
        elif stated == ours:
            return
        self.wrong.append(f"{where}: claims.json says {stated!r}, recomputed {ours!r}")

    def run(self) -> None:
        named: dict[str, dict[str, Any]] = {}
        for claim in self.study.claims["claims"]:
            named[claim["id"]] = claim
            if claim.get("parts"):
                continue
            if claim["diagnostic"] == "accuracy_sampled":
                self.accuracy_claim(claim)
            else:
                self.claim(claim)
            self.after(claim)
        for claim in named.values():
            if claim.get("parts"):
                self.sum_of_parts(claim, [named[part] for part in claim["parts"]])
        self.outcomes()
        self.noise()

    # one claim on measurements

    def claim(self, claim: dict[str, Any]) -> None:
        tested = list(dict.fromkeys(arm for c in claim["comparisons"] for arm in arms_in(c["text"])))
        self.content(claim["id"], claim, claim, tested, {}, excess=False, read=None, shared="shared" in claim["at"])
        for control in claim["controls"]:
            name = control["name"]
            stand_in = self.stand_ins(name, tested)
            read = {"equal accuracy": "accuracy", "equal KL from the start": "kl"}.get(
                name, "norm" if name.startswith("equal norm") else None
            )
            if not control["comparisons"]:
                self.same(f"{claim['id']}/{name}/verdict", control["verdict"], "inconclusive")
                continue
            self.content(
                f"{claim['id']}/{name}", claim, control, tested, stand_in, excess="beyond size" in name, read=read,
                shared="shared" in claim["at"] or name != "beyond size",
            )  # fmt: skip

    @staticmethod
    def stand_ins(name: str, arms: list[str]) -> dict[str, str]:
        """arm of the rule → arm in its place under a control"""
        suffix = {"SGD": "-sgd", "bf16 weights": "-bf16", "clipped gradients": "-clip"}.get(name)
        out = {}
        for arm in arms:
            plain_sft = re.fullmatch(r"sft(-(?!matched).*)?", arm)
            if name == "beyond size":
                continue
            if suffix:
                out[arm] = {"sft": f"sft-matched{suffix}", "opd": f"opd{suffix}", "rlvr": f"rlvr{suffix}"}.get(arm, arm)
            elif name == "SFT on own samples":
                out[arm] = "sft-own-samples" if arm == "sft" else arm
            else:
                new = "sft-matched" + arm[3:] if plain_sft else arm
                if arm == "opd":
                    new = {"full reverse KL": "opd-reverse-kl", "forward KL": "opd-forward-kl"}.get(name, new)
                out[arm] = new
        return out

    def content(
        self, where: str, claim: dict[str, Any], stated: dict[str, Any], tested: list[str], stand_in: dict[str, str],
        *, excess: bool, read: str | None, shared: bool,
    ) -> None:  # fmt: skip
        study, diagnostic, variants = self.study, claim["diagnostic"], claim["variants"]
        seeds, ratio = stated["seeds"], diagnostic in RATIO
        real = {arm: stand_in.get(arm, arm) for arm in tested}
        if stated is claim:  # the main table shows the other paradigms too
            real |= {arm: arm for arm in stated["measured"]}
        values, nulls, norms = {}, {}, {}
        groups = [tested]
        if claim["id"] == "R2":
            groups = [[a for a in tested if a.endswith(s)] for s in ("-small", "-digits")]
            groups.insert(0, [a for a in tested if a not in groups[0] + groups[1]])
        if stated is claim:
            groups.append([a for a in real if a not in tested])
        for group in groups:
            arrays = {
                arm: [
                    study.array(real[arm], seeds, diagnostic, variants, "value"),
                    study.array(real[arm], seeds, diagnostic, variants, "null_mean"),
                    study.array(real[arm], seeds, "frobenius_norm", [""], "value"),
                ]
                for arm in group
            }
            if read:
                keys = {arm: self.key(real[arm], seeds, read) for arm in group}
                low, high = max(k[0] for k in keys.values()), min(k[-1] for k in keys.values())
                grid = [low + (high - low) * i / (POINTS - 1) for i in range(POINTS)]
                points = stated["read_at"]["points"]["/".join(sorted({real[a] for a in group}))]
                for i, value in enumerate(grid):
                    self.same(f"{where}/read_at/{i}", points[i], value)
                arrays = {
                    arm: [np.stack([blend(a, cross(keys[arm], v)) for v in grid], axis=2) for a in three]
                    for arm, three in arrays.items()
                }
            elif shared and group:
                common = set.intersection(*(set(study.steps(real[arm])) for arm in group))
                for arm, three in arrays.items():
                    kept = [i for i, s in enumerate(study.steps(real[arm])) if s in common]
                    if diagnostic == "subspace_similarity" and kept:
                        three[:2] = (study.to_end(real[arm], seeds, c, max(common)) for c in ("value", "null_mean"))
                    arrays[arm] = [a[:, :, kept] if kept else a for a in three]
            for arm, three in arrays.items():
                values[arm], nulls[arm], norms[arm] = three
        with np.errstate(invalid="ignore", divide="ignore"):
            above = {a: values[a] / nulls[a] if ratio else values[a] - nulls[a] for a in values}
        on = above if excess else values
        counts = {arm: study.counts[real[arm], diagnostic] for arm in on}
        index = 0 if claim["at"].startswith("first") else -1
        for arm in real:
            if real[arm] in stated["measured"]:
                self.measured(
                    f"{where}/{real[arm]}", stated["measured"][real[arm]], on[arm], None if excess else nulls[arm],
                    above[arm], index, counts[arm],
                )  # fmt: skip
        self.same(f"{where}/arms", sorted(stated["measured"]), sorted({real[a] for a in real}))
        self.comparisons(
            where, stated,
            lambda text: statistic(
                text, {a: bootstrap(v, counts[a]) for a, v in on.items()}, {a: bootstrap(v) for a, v in norms.items()},
                0.0 if excess else 0.5,
            ),
        )  # fmt: skip

    def key(self, arm: str, seeds: list[int], read: str) -> np.ndarray:
        if read == "norm":
            return np.nanmean(self.study.array(arm, seeds, "frobenius_norm", [""], "value"), axis=(0, 1))
        column = "accuracy_sampled" if read == "accuracy" else "kl_origin"
        found = [{r["step"]: r[column] for r in self.study.evaluations(arm, seed)} for seed in seeds]
        return np.array([np.mean([one[step] for one in found]) for step in self.study.steps(arm)])

    def measured(
        self,
        where: str,
        stated: dict[str, Any],
        values: np.ndarray,
        nulls: np.ndarray | None,
        above: np.ndarray,
        index: int,
        counts: np.ndarray,
    ) -> None:
        def mean(x: np.ndarray) -> float:
            share = np.isfinite(x) * counts
            return float((np.nan_to_num(x) * share).sum() / share.sum()) if share.any() else math.nan

        low, high = np.quantile(bootstrap(values, counts)[1:, index], [0.025, 0.975])
        self.same(f"{where}/mean", stated["mean"], mean(values[:, :, index]))
        self.same(f"{where}/low", stated["low"], low)
        self.same(f"{where}/high", stated["high"], high)
        for i, seed in enumerate(values[:, :, index]):
            self.same(f"{where}/seeds/{i}", stated["seeds"][i], mean(seed))
        if nulls is not None:
            self.same(f"{where}/null", stated["null"], mean(nulls[:, :, index]))
            low, high = np.quantile(bootstrap(above, counts)[1:, index], [0.025, 0.975])
            self.same(f"{where}/excess", stated["excess"], mean(above[:, :, index]))
            self.same(f"{where}/excess_low", stated["excess_low"], low)
            self.same(f"{where}/excess_high", stated["excess_high"], high)

    def comparisons(self, where: str, stated: dict[str, Any], compute: Any) -> None:
        outcomes = []
        for c in stated["comparisons"]:
            with np.errstate(invalid="ignore", divide="ignore"):
                drawn = compute(c["text"])
            low, high = np.quantile(drawn[1:], [0.025, 0.975])
            required = float(re.search(r"(?:above|below|within a factor|beyond a factor) (-?[\d.]+)", c["text"])[1])  # type: ignore[index]
            below = " below " in c["text"] or " within a factor " in c["text"]
            self.same(f"{where}/{c['text']}/value", c["value"], drawn[0])
            self.same(f"{where}/{c['text']}/low", c["low"], low)
            self.same(f"{where}/{c['text']}/high", c["high"], high)
            self.same(f"{where}/{c['text']}/required", c["required"], required)
            good, bad = (high < required, low > required) if below else (low > required, high < required)
            outcomes.append("met" if good else "missed" if bad else "open")
            self.same(f"{where}/{c['text']}/outcome", c["outcome"], outcomes[-1])
        verdict = "fails" if "missed" in outcomes else "inconclusive" if "open" in outcomes else "holds"
        self.same(f"{where}/verdict", stated["verdict"], verdict)

    def after(self, claim: dict[str, Any]) -> None:
        names = re.match(
            r"Still holds when the claim holds and holds under: (.*)\. Does not", claim["after_matching_rule"]
        )
        by_name = {c["name"]: c["verdict"] for c in claim["controls"]}
        all_of = [claim["verdict"], *(by_name.get(n, "inconclusive") for n in names[1].split("; "))]  # type: ignore[index]
        expected = "does not" if "fails" in all_of else "inconclusive" if "inconclusive" in all_of else "still holds"
        self.same(f"{claim['id']}/after_matching", claim["after_matching"], expected)

    def sum_of_parts(self, claim: dict[str, Any], parts: list[dict[str, Any]]) -> None:
        for key, good, bad in (("verdict", "holds", "fails"), ("after_matching", "still holds", "does not")):
            got = [p[key] for p in parts]
            expected = bad if bad in got else good if all(g == good for g in got) else "inconclusive"
            self.same(f"{claim['id']}/{key}", claim[key], expected)

    # S1, on accuracies

    def accuracy_claim(self, claim: dict[str, Any]) -> None:
        for arm, stated in claim["measured"].items():
            self.accuracy(f"S1/{arm}", stated, arm, None)
        self.comparisons("S1", claim, lambda text: self.accuracy_statistic(text, claim["seeds"], None))
        for control in claim["controls"]:
            where, stop = f"S1/{control['name']}", None
            if "read_at" in control:
                stop = self.stop()
                self.same(f"{where}/read_at/evaluation", control["read_at"]["evaluation"], stop[0])
                self.same(f"{where}/read_at/share", control["read_at"]["share"], stop[1])
            for arm, stated in control["measured"].items():
                self.accuracy(f"{where}/{arm}", stated, arm, stop)
            self.comparisons(
                where, control, lambda text, c=control, s=stop: self.accuracy_statistic(text, c["seeds"], s)
            )
        for seed, k in enumerate(claim["k"]):
            ranks = self.study.array("opd", [seed], "stable_rank", [""], "value")[0][:, 0]
            self.same(f"S1/k/{seed}", k, max(1, math.floor(ranks[np.isfinite(ranks)].mean())))
        for paradigm, kinds in claim["recovery"].items():
            for what, stated in kinds.items():
                seeds = list(range(len(stated["seeds"])))
                arms = [f"s1-{paradigm}-{w}" for w in (what, "free", "frozen")]
                held, free, frozen = (self.drawn(arm, seeds, None) for arm in arms)
                drawn = recovered(held, free, frozen)
                where = f"S1/recovery/{paradigm}/{what}"
                self.same(f"{where}/mean", stated["mean"], drawn[0])
                low, high = np.quantile(drawn[1:], [0.025, 0.975])
                self.same(f"{where}/low", stated["low"], low)
                self.same(f"{where}/high", stated["high"], high)
                for seed in seeds:
                    one = recovered(*(np.array([self.reached(arm, seed, None)[0]]) for arm in arms))
                    self.same(f"{where}/seeds/{seed}", stated["seeds"][seed], one[0])

    def stop(self) -> tuple[int, float]:
        ours, theirs = "s1-sft-matched-free", "s1-opd-free"
        seeds = [s for s in range(100) if all(self.study.run(a, s) in self.study.rows for a in (ours, theirs))]
        path = np.concatenate([[0.0], self.key(ours, seeds, "norm")])
        return cross(path, min(self.key(theirs, seeds, "norm")[-1], path[-1]))

    def reached(self, arm: str, seed: int, stop: tuple[int, float] | None) -> tuple[float, int]:
        evals = self.study.evaluations(arm, seed)
        if stop is None or not arm.startswith("s1-sft-matched-"):
            return evals[-1]["accuracy_sampled"], evals[-1]["prompts"]
        i, w = stop
        value = evals[i]["accuracy_sampled"] * (1 - w) + evals[i + 1]["accuracy_sampled"] * w
        return value, min(evals[i]["prompts"], evals[i + 1]["prompts"])

    def drawn(self, arm: str, seeds: list[int], stop: tuple[int, float] | None) -> np.ndarray:
        rng, found = np.random.default_rng(zlib.crc32(arm.encode())), [self.reached(arm, s, stop) for s in seeds]
        counts = [rng.binomial(n, min(1.0, max(0.0, p)), size=DRAWS) / n for p, n in found]
        weights = np.random.default_rng(0).multinomial(len(seeds), [1 / len(seeds)] * len(seeds), size=DRAWS)
        mixed = sum(weights[:, i] * counts[i] for i in range(len(seeds))) / len(seeds)
        return np.concatenate([[sum(p for p, _ in found) / len(found)], mixed])

    def accuracy(self, where: str, stated: dict[str, Any], arm: str, stop: tuple[int, float] | None) -> None:
        seeds = [s for s in range(100) if self.study.run(arm, s) in self.study.logs]
        drawn = self.drawn(arm, seeds, stop)
        low, high = np.quantile(drawn[1:], [0.025, 0.975])
        for key, ours in (("mean", drawn[0]), ("low", low), ("high", high)):
            self.same(f"{where}/{key}", stated[key], ours)
        for i, seed in enumerate(seeds):
            self.same(f"{where}/seeds/{i}", stated["seeds"][i], self.reached(arm, seed, stop)[0])
        runs = [self.study.run(arm, seed) for seed in seeds]
        leaks = [self.study.outside[run] for run in runs if run in self.study.outside]
        self.same(f"{where}/outside", stated.get("outside"), sum(leaks) / len(leaks) if leaks else None)

    def accuracy_statistic(self, text: str, seeds: list[int], stop: tuple[int, float] | None) -> np.ndarray:
        def of(paradigm: str, what: str) -> np.ndarray:
            return self.drawn(f"s1-{paradigm}-{what}", seeds, stop)

        def recovery(paradigm: str, what: str) -> np.ndarray:
            return recovered(of(paradigm, what), of(paradigm, "free"), of(paradigm, "frozen"))

        if m := re.match(r"OPD: projected \((\w+)\) minus free", text):
            return of("opd", m[1]) - of("opd", "free")
        if m := re.match(r"(matched )?SFT: free minus projected \((\w+)\)", text):
            paradigm = "sft-matched" if m[1] else "sft"
            return of(paradigm, "free") - of(paradigm, m[2])
        if m := re.match(r"(\S+)'s recovery \((\w+)\) above", text):
            return recovery(arm_name(m[1]), m[2])
        if m := re.match(r"recovery \((\w+)\) of (\S+) minus that of (\S+) above", text):
            return recovery(arm_name(m[2]), m[1]) - recovery(arm_name(m[3]), m[1])
        if m := re.match(r"(\S+)'s recovery in its own channel minus that in (a random one|other) above", text):
            arm = arm_name(m[1])
            return recovery(arm, "update") - recovery(arm, "random" if "random" in m[2] else "other")
        raise ValueError(f"no statistic for {text!r}")

    def outcomes(self) -> None:
        for arm, stated in self.study.claims["outcomes"].items():
            runs = [rows for run, rows in self.study.logs.items() if re.fullmatch(re.escape(arm) + r"(-seed\d+)?", run)]
            for name, ends in stated.items():
                if name == "prompts":
                    continue
                for end, index in (("start", 0), ("end", -1)):
                    found = [rows[index][name] for rows in runs]
                    self.same(f"outcomes/{arm}/{name}/{end}", ends[end]["mean"], sum(found) / len(found))
                    self.same(f"outcomes/{arm}/{name}/{end}/seeds", sorted(ends[end]["seeds"]), sorted(found))

    def noise(self) -> None:
        """The rows above the verdicts: means at the last checkpoint, similarity at the first."""
        shown = {
            "norm": ("frobenius_norm", [""]), "unchanged": ("update_sparsity", ["bf16_eta"]), "stable_rank": ("stable_rank", [""]),
            "angle": ("principal_angles", ["left.mean", "right.mean"]), "shift": ("spectral_shift", [""]),
            "low_magnitude": ("mask_overlap", ["low_magnitude.0.5"]), "similarity": ("subspace_similarity", ["final.16"]),
        }  # fmt: skip
        for row in (self.study.claims.get("noise") or {}).get("rows", []):
            for name, (diagnostic, variants) in shown.items():
                at = 0 if name == "similarity" else -1
                for key, column in ((name, "value"), (f"{name}_null", "null_mean")):
                    found = self.study.array(row["name"], row["seeds"], diagnostic, variants, column)[:, :, at]
                    share = np.isfinite(found) * self.study.counts[row["name"], diagnostic]
                    if key in row:
                        mean = (np.nan_to_num(found) * share).sum() / share.sum() if share.any() else math.nan
                        self.same(f"noise/{row['name']}/{key}", row[key], mean)


def main(folder: Path) -> list[str]:
    """The differences found; prints how many numbers were compared."""
    checker = Checker(Study(folder))
    checker.run()
    print(f"{checker.checked} numbers and verdicts recomputed, {len(checker.wrong)} differ")
    return checker.wrong


if __name__ == "__main__":
    differing = main(Path(sys.argv[1]))
    print("\n".join(differing[:20]))
    sys.exit(bool(differing))

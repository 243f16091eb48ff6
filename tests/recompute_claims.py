"""Compute every number and verdict of a study's claims once more, by another route.

    python tests/recompute_claims.py STUDY                              from STUDY/measurements.parquet and the arms' log.jsonl
    python tests/recompute_claims.py --units docs/results/units FILE    FILE is what confirmatory.py wrote with --json

(exit 0: all numbers agree; 1: the first differences are listed). Nothing of the package is imported. Comparisons are told apart by their
words, means over matrices are taken one cell at a time, tests are scipy's, and outcomes of prompts are counted from their bits.
What is checked, for every claim, point and control: each comparison's effect in every seed, its interval, its outcome; the
verdicts, at a point, over the regime and after matching; the values per arm with their intervals; what training reached; how far
every arm is from the null of its size.
"""

from __future__ import annotations

import functools
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy import special, stats

POINTS, ALPHA = 5, 0.05
RATIO = {"principal_angles", "spectral_shift", "stable_rank", "hill_exponent", "frobenius_norm"}
UPPER = {"SFT": "sft", "SFT-MATCHED": "sft-matched", "OPD": "opd", "RLVR": "rlvr"}
SIMILARITY, PREVIOUS = "subspace_similarity.final.16", "subspace_similarity.previous.16"
NORM, ACCURACY = "frobenius_norm", "accuracy_sampled"
Cell = dict[int, tuple[float, float, float]]  # step → value, null, excess


def arm_name(shown: str) -> str:
    return UPPER.get(shown, shown)


@functools.cache
def student(df: int) -> float:
    return float(stats.t.ppf(0.975, df))


def interval(x: list[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean."""
    half = student(len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))
    return float(np.mean(x) - half), float(np.mean(x) + half)


class Numbers:
    """(arm, seed, quantity) → step → (value, null, excess), all of them means over matrices."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, int, str], Cell] = {}
        self.measured: dict[str, list[int]] = {}

    def add(self, key: tuple[str, int, str], step: int, numbers: tuple[Any, ...]) -> None:
        self.cells.setdefault(key, {})[step] = tuple(math.nan if x is None else float(x) for x in numbers)  # type: ignore[assignment]

    @functools.cached_property
    def by_seed(self) -> dict[tuple[str, str], dict[int, Cell]]:
        """(arm, quantity) → seed → cell; asked for after all is added."""
        found: dict[tuple[str, str], dict[int, Cell]] = {}
        for (arm, seed, name), cell in self.cells.items():
            found.setdefault((arm, name), {})[seed] = cell
        return found

    def steps(self, arm: str) -> list[int]:
        if arm not in self.measured:  # asked for after all is added
            self.measured[arm] = sorted({step for cell in self.by_seed.get((arm, NORM), {}).values() for step in cell})
        return self.measured[arm]

    def seeds(self, arms: list[str], name: str = NORM) -> list[int]:
        have = [set(self.by_seed.get((arm, name), {})) for arm in arms]
        return sorted(set.intersection(*have))

    def series(self, arm: str, seed: int, name: str, column: int, end: int) -> list[float]:
        """Up to the step `end`; a similarity is that with the checkpoint at `end`."""
        steps = [s for s in self.steps(arm) if s <= end]
        nothing = (math.nan,) * 3
        if name == SIMILARITY and end != self.steps(arm)[-1]:
            last = self.cells.get((arm, seed, PREVIOUS), {}).get(end, nothing)[column]
            return [*[math.nan] * (len(steps) - 2), *([last] if len(steps) > 1 else []), 1.0]
        return [self.cells.get((arm, seed, name), {}).get(s, nothing)[column] for s in steps]

    def last(self, arm: str, seed: int, name: str) -> float:
        cell = self.cells.get((arm, seed, name), {})
        return cell[max(cell)][0] if cell else math.nan


def of_study(folder: Path, seeds: list[int]) -> Numbers:
    numbers = Numbers()
    whole = pl.read_parquet(folder / "measurements.parquet")
    wanted = {
        "update_sparsity": [["bf16_eta"]], "principal_angles": [["left.mean", "right.mean"]], "spectral_shift": [[""]],
        "mask_overlap": [["principal.0.5"], ["low_magnitude.0.5"]], "stable_rank": [[""]], "hill_exponent": [["16"]],
        "subspace_similarity": [["final.16"], ["previous.16"]], "frobenius_norm": [[""]],
    }  # fmt: skip
    for (run, diagnostic), part in whole.with_columns(run=pl.col("checkpoint").str.split("/").list.first()).group_by(
        "run", "diagnostic"
    ):
        arm, _, seed = str(run).partition("-seed")
        for variants in wanted.get(str(diagnostic), []):
            name = f"{diagnostic}.{'+'.join(variants)}".rstrip(".")
            rows = [row for row in part.to_dicts() if row["variant"] in variants]
            bare = all(row["null_mean"] is None for row in rows)
            cells: dict[tuple[int, str], list[tuple[Any, Any]]] = {}
            sizes: dict[str, int] = {}
            for row in rows:
                pair = row["value"], row["null_mean"]
                if diagnostic != "frobenius_norm" and not bare and pair[1] is None:
                    pair = None, None
                cells.setdefault((row["step"], row["matrix"]), []).append(
                    (pair[0], pair[1] if pair[0] is not None else None)
                )
                sizes[row["matrix"]] = row["rows"] * row["cols"] if diagnostic == "update_sparsity" else 1
            for step in {s for s, _ in cells}:
                columns: list[list[tuple[float, float]]] = [[], [], []]
                for matrix, size in sizes.items():
                    here = cells.get((step, matrix), [])
                    value, null = ([p[i] for p in here if p[i] is not None] for i in (0, 1))
                    v, n = np.mean(value or [math.nan]), np.mean(null or [math.nan])
                    e = (v / n if n else math.nan) if diagnostic in RATIO else v - n
                    for column, x in zip(columns, (v, n, e), strict=True):
                        if math.isfinite(x):
                            column.append((float(x), size))
                found = tuple(sum(x * w for x, w in c) / sum(w for _, w in c) if c else math.nan for c in columns)
                numbers.add((arm, int(seed or 0), name), step, found)
    for path in sorted((folder / "arms").glob("*/log.jsonl")):
        arm, _, text = path.parent.name.partition("-seed")
        seed = int(text or 0)
        if seed not in seeds:
            continue  # a study of more seeds was begun here
        for row in (json.loads(line) for line in path.read_text().splitlines() if line):
            if row["event"] == "eval":
                for name in (ACCURACY, "accuracy_greedy", "kl_origin", "kl_teacher", "completion_length"):
                    if row.get(name) is not None:
                        numbers.add((arm, seed, name), row["step"], (row[name], None, None))
            elif row["event"] == "step" and row.get("channel/outside") is not None:
                numbers.add((arm, seed, "channel_outside"), row["step"], (row["channel/outside"], None, None))
    for key in [k for k in numbers.cells if k[1] not in seeds]:
        del numbers.cells[key]
    return numbers


def of_units(folder: Path, point: dict[str, Any]) -> tuple[Numbers, list[str]]:
    """The numbers of a point, with the arms that it borrows; and where an accuracy is not the mean of its outcomes."""
    numbers, wrong = Numbers(), list[str]()
    for path in sorted(folder.glob("*.parquet")):
        said = pl.read_parquet_metadata(path)
        if said["rules"] not in point["rules"] or said["rehearsal"] == "True":
            continue
        seeds = range(point["first"], point["first"] + point["seeds"])
        for row in pl.read_parquet(path).to_dicts():
            own = said["point"] == point["name"]
            if not (own or point["borrows"].get(row["arm"]) == said["point"]) or (not own and row["seed"] not in seeds):
                continue
            numbers.add((row["arm"], row["seed"], row["name"]), row["step"], (row["value"], row["null"], row["excess"]))
            if row["right"] is not None:
                right = sum(byte.bit_count() for byte in row["right"])
                count = round(right / row["value"]) if row["value"] else 0
                if not math.isclose(right, row["value"] * count, abs_tol=1e-6) or count > 8 * len(row["right"]):
                    wrong.append(
                        f"{path.name}/{row['arm']}/{row['name']}: {row['value']} is not the mean of its outcomes"
                    )
    return numbers, wrong


def cross(key: list[float], value: float) -> tuple[int, float]:
    for i in range(len(key) - 1):
        low, high = sorted((key[i], key[i + 1]))
        if low <= value <= high:
            return i, 0.0 if low == high else (value - key[i]) / (key[i + 1] - key[i])
    return len(key) - 2, 1.0


def log(x: float, over: float) -> float:
    return math.log(x / over) if over and x / over > 0 else math.nan


def apart(ours: list[float], theirs: list[float]) -> list[float]:
    return [log(x, y) for x, y in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else [math.nan]


def effects(text: str, of: dict[str, list[float]], norms: dict[str, list[float]], chance: float) -> list[float]:
    """The effects of one seed, by the words of the comparison."""

    def last(arm: str) -> float:
        return of[arm_name(arm)][-1]

    def first(arm: str) -> float:
        return of[arm_name(arm)][0]

    def held(a: str, b: str, c: str) -> float:
        return last(a) - 0.8 * last(b) - 0.2 * last(c)

    rules: list[tuple[str, Callable[..., float | list[float]]]] = [
        (r"chance \(0\.5\) minus (\S+) above", lambda a: chance - last(a)),
        (r"(\S+) minus chance \(0\.5\) above", lambda a: last(a) - chance),
        (r"at the first checkpoint (\S+) minus (\S+) above", lambda a, b: first(a) - first(b)),
        (r"accuracy of (\S+) and of (\S+) within", lambda a, b: last(a) - last(b)),
        (r"accuracy of (\S+) minus that of (\S+) above", lambda a, b: last(a) - last(b)),
        (r"accuracy of (\S+) minus \.8 of (\S+) minus \.2 of (\S+) above", held),
        (r"the contrast of (\S+) \(with (\S+), (\S+)\) minus that of (\S+) \(with (\S+), (\S+)\) above",
         lambda *x: held(*x[:3]) - held(*x[3:])),
        (r"(\S+) minus (\S+) above", lambda a, b: last(a) - last(b)),
        (r"(\S+) last over first checkpoint above", lambda a: log(last(a), first(a))),
        (r"(\S+) first over last checkpoint above", lambda a: log(first(a), last(a))),
        (r"(\S+) at every checkpoint within a factor \S+ of the first", lambda a: [log(x, first(a)) for x in of[arm_name(a)][1:]]),
        (r"(\S+) within a factor \S+ of (\S+) at every shared checkpoint",
         lambda a, b: apart(of[arm_name(a)], of[arm_name(b)])),
        (r"(\S+) beyond a factor \S+ of (\S+) at the last shared checkpoint", lambda a, b: log(last(a), last(b))),
        (r"(\S+) and (\S+) within a factor", lambda a, b: log(last(a), last(b))),
        (r"(\S+)'s norm over (\S+)'s above", lambda a, b: log(norms[arm_name(a)][-1], norms[arm_name(b)][-1])),
        (r"(\S+) over (\S+) above", lambda a, b: log(last(a), last(b))),
    ]  # fmt: skip
    for pattern, compute in rules:
        if m := re.match(pattern, text):
            found = compute(*m.groups())
            return found if isinstance(found, list) else [found]
    raise ValueError(f"no statistic for {text!r}")


def arms_in(text: str) -> list[str]:
    words = re.findall(r"(?:SFT-MATCHED|SFT|OPD|RLVR|(?:s1|sft|opd|rlvr)-[a-z0-9.-]*[a-z0-9])(?=['\s,;)]|$)", text)
    return list(dict.fromkeys(arm_name(w) for w in words))


def one_sided(x: list[float], bound: float) -> float:
    """p of mean ≤ bound."""
    if len(x) < 2:
        return 1.0
    if np.std(x) == 0:
        return 0.0 if x[0] > bound else 1.0
    t = (np.mean(x) - bound) / (np.std(x, ddof=1) / math.sqrt(len(x)))
    return float(special.stdtr(len(x) - 1, -t))  # Student's distribution


def p_values(x: list[float], margin: float, asks: str) -> dict[str, float]:
    minus = [-e for e in x]
    above, below = (min(1.0, 2 * one_sided(e, margin)) for e in (x, minus))
    same = max(one_sided(x, -margin), one_sided(minus, -margin))
    if asks == "same":
        return {"holds": same, "reversed": min(above, below), "no difference": 1.0}
    if asks == "other":
        return {"holds": min(above, below), "reversed": 1.0, "no difference": same}
    return {"holds": above, "reversed": below, "no difference": same}


def holm(p: list[float]) -> list[float]:
    order, out, running = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        out[i] = running
    return out


def joint(each: list[dict[str, float]]) -> dict[str, float]:
    return {"holds": max(p["holds"] for p in each)} | {
        k: min(holm([p[k] for p in each])) for k in ("reversed", "no difference")
    }


def said(p: dict[str, float]) -> str:
    return next((k for k in ("holds", "reversed", "no difference") if p[k] <= ALPHA), "open")


class Checker:
    def __init__(self) -> None:
        self.wrong, self.checked = list[str](), 0

    def same(self, where: str, stated: Any, ours: Any) -> None:
        self.checked += 1
        if isinstance(ours, float | np.floating):
            ours = float(ours) if math.isfinite(ours) else None
        if isinstance(stated, float | int) and isinstance(ours, float | int) and not isinstance(stated, bool | str):
            if math.isclose(stated, ours, rel_tol=1e-6, abs_tol=1e-9):
                return
        elif stated == ours:
            return
        self.wrong.append(f"{where}: stated {stated!r}, recomputed {ours!r}")

    # reading the arms

    @staticmethod
    def stand_ins(name: str, arms: list[str]) -> dict[str, str]:
        """arm of the rule → arm in its place under a control"""
        suffix = {"SGD": "-sgd", "bf16 weights": "-bf16", "clipped gradients": "-clip"}.get(name)
        noise = re.match(r"noise in (\S+)'s place", name)
        out = {}
        for arm in arms:
            plain_sft = re.fullmatch(r"sft(-(?!matched).*)?", arm)
            if name in ("beyond size", "", "as the paper compares"):
                continue
            if noise and arm == arm_name(noise[1]):
                out[arm] = "coin" if arm == "rlvr" else "opd-random-sign"
            elif suffix:
                out[arm] = {"sft": f"sft-matched{suffix}", "opd": f"opd{suffix}", "rlvr": f"rlvr{suffix}"}.get(arm, arm)
            elif name == "SFT on own samples":
                out[arm] = "sft-own-samples" if arm == "sft" else arm
            else:
                new = "sft-matched" + arm[3:] if plain_sft else arm
                if arm == "opd":
                    new = {"full reverse KL": "opd-reverse-kl", "forward KL": "opd-forward-kl"}.get(name, new)
                out[arm] = new
        return out

    def read(
        self,
        n: Numbers,
        seed: int,
        quantity: str,
        real: dict[str, str],
        groups: list[list[str]],
        control: str,
        shared: bool,
    ) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
        """Arm → (values, nulls, excesses) at the points of reading, and arm → norms, of one seed."""
        key = {"equal accuracy": ACCURACY, "equal KL from the start": "kl_origin"}.get(
            control, NORM if control.startswith("equal norm") else ""
        )
        columns, norms = {}, {}
        for group in groups:
            steps = {arm: n.steps(real[arm]) for arm in group}
            common = set.intersection(*map(set, steps.values()))
            lined = bool(common) and shared and not key
            whole = {}
            for arm in group:
                end = max(common) if lined else steps[arm][-1]
                four = [n.series(real[arm], seed, quantity, c, end) for c in range(3)] + [
                    n.series(real[arm], seed, NORM, 0, end)
                ]
                kept = [i for i, s in enumerate(steps[arm]) if not lined or s in common]
                whole[arm] = [[x[i] for i in kept] for x in four]
            if key:
                found = {}
                for arm in group:
                    cell = n.cells.get((real[arm], seed, key), {})
                    found[arm] = [cell[s][0] if s in cell else math.nan for s in steps[arm]]
                low, high = max(k[0] for k in found.values()), min(k[-1] for k in found.values())
                if not low < high or not all(math.isfinite(x) for k in found.values() for x in k):
                    return {}, {}
                for arm in group:
                    places = [cross(found[arm], low + (high - low) * i / (POINTS - 1)) for i in range(POINTS)]
                    whole[arm] = [[x[i] * (1 - w) + x[i + 1] * w for i, w in places] for x in whole[arm]]
            for arm in group:
                columns[arm], norms[arm] = whole[arm][:3], whole[arm][3]
        return columns, norms

    def reading(
        self, where: str, n: Numbers, claim: dict[str, Any], stated: dict[str, Any], control: str, seeds: list[int]
    ) -> str:
        """Check one list of comparisons; the verdict that we find."""
        tested = list(dict.fromkeys(arm for c in claim["tested"] for arm in arms_in(c)))
        real = {arm: self.stand_ins(control, tested).get(arm, arm) for arm in tested}
        groups = [tested]
        if claim["id"] == "R2":
            groups = [[a for a in tested if a.endswith(s)] for s in ("-small", "-digits")]
            groups.insert(0, [a for a in tested if a not in groups[0] + groups[1]])
        excess = "beyond size" in control
        lined = "shared" in claim["at"] or bool(self.stand_ins(control, tested))
        by_seed: list[tuple[dict[str, list[float]], dict[str, list[float]]]] = []
        index = 0 if claim["at"].startswith("first") else -1
        three: dict[str, list[list[float]]] = {arm: [] for arm in tested}
        for seed in seeds:
            if claim["quantity"] == ACCURACY:
                by_seed.append(({arm: [n.last(arm, seed, ACCURACY)] for arm in tested}, {}))
                continue
            columns, norms = self.read(n, seed, claim["quantity"], real, groups, control, lined)
            if not columns:
                self.same(f"{where}/verdict", stated["verdict"], "open")
                return "open"
            by_seed.append(({arm: c[2 if excess else 0] for arm, c in columns.items()}, norms))
            for arm, c in columns.items():
                three[arm].append([x[index] for x in c])
        if not stated["comparisons"]:
            return "open"
        all_of: list[dict[str, float]] = []
        defined = True
        for c in stated["comparisons"]:
            at = f"{where}/{c['text']}"
            ours = [effects(c["text"], of, norms, 0.0 if excess else 0.5) for of, norms in by_seed]
            components = [list(e) for e in zip(*ours, strict=True)]
            for i, (mine, theirs) in enumerate(zip(components, c["effects"], strict=True)):
                for j, (x, y) in enumerate(zip(mine, theirs, strict=True)):
                    self.same(f"{at}/effects/{i}/{seeds[j]}", y, x)
            margin = float(re.search(r"(?:above|within a factor|beyond a factor|within) (-?[\d.]+)", c["text"])[1])  # type: ignore[index]
            logs = " factor " in c["text"] or bool(re.search(r"\bover\b", c["text"]))
            self.same(f"{at}/required", c["required"], margin)
            asks = "same" if " within " in c["text"] else "other" if " beyond " in c["text"] else "more"
            if not components or not all(math.isfinite(x) for e in components for x in e):
                defined = False
                self.same(f"{at}/outcome", c["outcome"], "open")
                continue
            each = [p_values(e, math.log(margin) if logs else margin, asks) for e in components]
            all_of += each
            self.same(f"{at}/outcome", c["outcome"], said(joint(each)))
            shown = max(range(len(each)), key=lambda i: (each[i]["holds"], abs(np.mean(components[i]))))
            x, scale = components[shown], math.exp if logs else float
            self.same(f"{at}/value", c["value"], scale(float(np.mean(x))))
            if len(x) > 1 and np.std(x) > 0:
                ends = interval(x)
                self.same(f"{at}/low", c["low"], scale(ends[0]))
                self.same(f"{at}/high", c["high"], scale(ends[1]))
                centre = abs(sum(x))
                flips = [abs(sum(e * (1 if k >> b & 1 else -1) for b, e in enumerate(x))) for k in range(2 ** len(x))]
                self.same(f"{at}/sign_flip", c["sign_flip"], sum(f >= centre * (1 - 1e-12) for f in flips) / len(flips))
            elif len(x) == 1:
                self.same(f"{at}/low", c["low"], None)
        verdict = said(joint(all_of)) if all_of and defined else "open"
        self.last_p = joint(all_of) if all_of and defined else None
        for arm, rows in three.items():
            if stated.get("measured") and rows:
                self.measured(f"{where}/{real[arm]}", stated["measured"][real[arm]], rows, excess)
        return verdict

    def measured(self, where: str, stated: dict[str, Any], rows: list[list[float]], excess: bool) -> None:
        """`rows`: value, null and excess of every seed."""
        for column, keys in (
            (2 if excess else 0, ("mean", "low", "high")),
            (2, ("excess", "excess_low", "excess_high")),
        ):
            if keys[0] not in stated:
                continue
            x = [row[column] for row in rows if math.isfinite(row[column])]
            self.same(f"{where}/{keys[0]}", stated[keys[0]], np.mean(x) if x else math.nan)
            if len(x) > 1 and np.std(x) > 0:
                ends = interval(x)
                self.same(f"{where}/{keys[1]}", stated[keys[1]], ends[0])
                self.same(f"{where}/{keys[2]}", stated[keys[2]], ends[1])
        if "null" in stated:
            nulls = [row[1] for row in rows if math.isfinite(row[1])]
            self.same(f"{where}/null", stated["null"], np.mean(nulls) if nulls else math.nan)

    # a study

    def study(self, folder: Path) -> None:
        claims = json.loads((folder / "claims.json").read_text())
        n = of_study(folder, claims["seeds"])
        named = {c["id"]: c for c in claims["claims"]}
        for claim in claims["claims"]:
            if claim.get("parts"):
                parts = [named[part] for part in claim["parts"]]
                verdicts = [p["verdict"] for p in parts]
                expected = (
                    "holds"
                    if verdicts == ["holds"] * len(parts)
                    else next((k for k in ("reversed", "no difference") if k in verdicts), "open")
                )
                self.same(f"{claim['id']}/verdict", claim["verdict"], expected)
                continue
            quantity = f"{claim['diagnostic']}.{'+'.join(claim['variants'])}".rstrip(".")
            about = {
                "id": claim["id"],
                "at": claim["at"],
                "quantity": quantity,
                "tested": [c["text"] for c in claim["comparisons"]],
            }
            plain = {**claim, "measured": {}} if quantity == ACCURACY else claim
            self.same(
                f"{claim['id']}/verdict",
                claim["verdict"],
                self.reading(claim["id"], n, about, plain, "", claim["seeds"]),
            )
            by_name = {}
            for control in claim["controls"]:
                where = f"{claim['id']}/{control['name']}"
                own = about | ({"tested": [c["text"] for c in control["comparisons"]]} if quantity == ACCURACY else {})
                shown = {**control, "measured": {}} if quantity == ACCURACY else control
                by_name[control["name"]] = self.reading(where, n, own, shown, control["name"], control["seeds"])
                self.same(f"{where}/verdict", control["verdict"], by_name[control["name"]])
            names = re.match(
                r"Still holds when the claim holds and holds under: (.*)\. Does not", claim["after_matching_rule"]
            )
            all_of = {claim["verdict"], *(by_name.get(name, "open") for name in names[1].split("; "))}  # type: ignore[index]
            after = (
                "does not"
                if all_of & {"reversed", "no difference"}
                else "still holds"
                if all_of == {"holds"}
                else "inconclusive"
            )
            self.same(f"{claim['id']}/after_matching", claim["after_matching"], after)
            if quantity == ACCURACY:
                self.accuracies(claim, n)
        for arm, stated in claims["outcomes"].items():
            for name, ends in stated.items():
                cells = [cell for (a, _, q), cell in sorted(n.cells.items()) if a == arm and q == name]
                if name != "prompts":
                    for end, pick in (("start", min), ("end", max)):
                        self.same(
                            f"outcomes/{arm}/{name}/{end}",
                            ends[end]["mean"],
                            np.mean([cell[pick(cell)][0] for cell in cells]),
                        )
        self.noise(claims, n)
        for row in claims.get("from_null", []):
            self.from_null(n, row)

    def from_null(self, n: Numbers, row: dict[str, Any]) -> None:
        """How far an arm is from the null of its size at a checkpoint: one number a seed, then Student's interval."""
        each = [
            cell[row["step"]]
            for cell in n.by_seed.get((row["arm"], row["name"]), {}).values()
            if math.isfinite(cell.get(row["step"], (math.nan,) * 3)[2])
        ]
        log = row["name"].partition(".")[0] in RATIO
        x = [math.log(excess) if log else excess for _, _, excess in each]
        scale = math.exp if log else float
        where = f"from null/{row.get('point', '')}/{row['arm']}/{row['name']}/{row['step']}"
        ours = {"ratio": log, "seeds": len(x), "excess": scale(float(np.mean(x)))}
        ours |= {"value": np.mean([v for v, _, _ in each]), "null": np.mean([null for _, null, _ in each])}
        if len(x) < 2:
            ours |= {"low": None, "high": None}
        elif np.std(x) > 0:
            ends = interval(x)
            ours |= {"low": scale(ends[0]), "high": scale(ends[1])}
        for key, found in ours.items():
            self.same(f"{where}/{key}", row[key], found)

    def accuracies(self, claim: dict[str, Any], n: Numbers) -> None:
        for arm, stated in claim["measured"].items():
            seeds = n.seeds([arm], ACCURACY)
            self.measured(f"S1/{arm}", stated, [[n.last(arm, s, ACCURACY), math.nan, math.nan] for s in seeds], False)
            leaks = [n.last(arm, s, "channel_outside") for s in n.seeds([arm], "channel_outside")]
            self.same(f"S1/{arm}/outside", stated.get("outside"), np.mean(leaks) if leaks else None)
        for i, seed in enumerate(n.seeds(["opd"])):
            self.same(
                f"S1/k/{seed}",
                claim["k"][i],
                max(1, math.floor(n.series("opd", seed, "stable_rank", 0, n.steps("opd")[0])[0])),
            )
        for paradigm, kinds in claim["recovery"].items():
            for what, stated in kinds.items():
                arms = [f"s1-{paradigm}-{w}" for w in (what, "free", "frozen")]
                seeds = n.seeds(arms, ACCURACY)
                held, free, frozen = (np.mean([n.last(a, s, ACCURACY) for s in seeds]) for a in arms)
                self.same(
                    f"S1/recovery/{paradigm}/{what}",
                    stated["mean"],
                    (held - frozen) / (free - frozen) if free > frozen else math.nan,
                )

    def noise(self, claims: dict[str, Any], n: Numbers) -> None:
        """The rows above the verdicts: means at the last checkpoint, similarity at the first."""
        shown = {
            "norm": NORM, "unchanged": "update_sparsity.bf16_eta", "stable_rank": "stable_rank",
            "angle": "principal_angles.left.mean+right.mean", "shift": "spectral_shift",
            "low_magnitude": "mask_overlap.low_magnitude.0.5", "similarity": SIMILARITY,
        }  # fmt: skip
        for row in (claims.get("noise") or {}).get("rows", []):
            for name, quantity in shown.items():
                for key, column in ((name, 0), (f"{name}_null", 1)):
                    found = [
                        n.series(row["name"], s, quantity, column, n.steps(row["name"])[-1])[
                            0 if name == "similarity" else -1
                        ]
                        for s in row["seeds"]
                    ]
                    found = [x for x in found if math.isfinite(x)]
                    if key in row:
                        self.same(f"noise/{row['name']}/{key}", row[key], np.mean(found) if found else math.nan)

    # the confirmatory study

    def units(self, folder: Path, file: Path) -> None:
        stated = json.loads(file.read_text())
        numbers = {}
        for point in stated["regime"]:
            numbers[point["name"]], wrong = of_units(folder, point)
            self.wrong += wrong
        for row in stated["sizes"]:
            self.from_null(numbers[row["point"]], row)
        for row in stated["gains"]:
            self.gained(folder / f"{row['point']}-seed{row['seed']}.parquet", row)
        for claim in stated["claims"]:
            p_of: dict[str, dict[str, float]] = {}
            for name, at in claim["points"].items():
                n, where = numbers[name], f"{claim['id']}/{name}"
                if not at["comparisons"]:
                    continue
                texts = [c["text"] for c in at["comparisons"]]
                about = {"id": claim["id"], "at": claim["at"], "quantity": claim["quantity"], "tested": texts}
                sft = any("sft" in arms_in(t) for t in texts)
                seeds = self.of_all(n, about, "matched SFT" if sft else "")
                self.reading(where, n, about, {**at, "measured": {}}, "matched SFT" if sft else "", seeds)
                if at["complete"] and self.last_p:
                    p_of[name] = self.last_p
                for kind in ("noise", "others"):
                    for control, other in at[kind].items():
                        own = about | (
                            {"tested": [c["text"] for c in other["comparisons"]]}
                            if claim["quantity"] == ACCURACY
                            else {}
                        )
                        seeds = self.of_all(n, own, control)
                        found = self.reading(f"{where}/{control}", n, own, other, control, seeds)
                        self.same(f"{where}/{control}/verdict", other["verdict"], found)
            names = list(p_of)
            corrected = {
                k: dict(zip(names, holm([p_of[x][k] for x in names]), strict=True))
                for k in ("holds", "reversed", "no difference")
            }
            each = {name: said({k: corrected[k][name] for k in corrected}) for name in names}
            for name, at in claim["points"].items():
                self.same(f"{claim['id']}/{name}/verdict", at["verdict"], each.get(name, "open"))
            shown = set(each.values()) - {"open"}
            over = "depends" if len(shown) > 1 else shown.pop() if shown and "open" not in each.values() else "open"
            self.same(
                f"{claim['id']}/verdict", claim["verdict"], over if len(names) == len(claim["points"]) else "open"
            )

    def gained(self, path: Path, row: dict[str, Any]) -> None:
        """From the numbers of prompts that turned right and wrong between the first evaluation and the last."""
        cells = pl.read_parquet(path).filter(arm=row["arm"], name=ACCURACY).sort("step")
        first, last = (int.from_bytes(cells["right"][i], "big") for i in (0, -1))
        n = 8 * len(cells["right"][0])
        better, worse = (last & ~first).bit_count(), (first & ~last).bit_count()
        mean = (better - worse) / n
        half = stats.t.ppf(0.975, n - 1) * math.sqrt(((better + worse) / n - mean**2) / (n - 1))
        ours = {"before": cells["value"][0], "after": cells["value"][-1], "low": mean - half, "high": mean + half}
        for name, value in ours.items():
            self.same(f"{path.name}/{row['arm']}/{name}", row[name], value)

    def of_all(self, n: Numbers, about: dict[str, Any], control: str) -> list[int]:
        tested = list(dict.fromkeys(arm for c in about["tested"] for arm in arms_in(c)))
        stand_in = self.stand_ins(control, tested)
        return n.seeds([stand_in.get(a, a) for a in tested], ACCURACY if about["quantity"] == ACCURACY else NORM)


def main(folder: Path, file: Path | None = None) -> list[str]:
    """The differences found in a study's folder, or in the file of verdicts on a folder of units."""
    checker = Checker()
    checker.study(folder) if file is None else checker.units(folder, file)
    print(f"{checker.checked} numbers and verdicts recomputed, {len(checker.wrong)} differ")
    return checker.wrong


if __name__ == "__main__":
    given = [Path(a) for a in sys.argv[1:] if a != "--units"]
    differing = main(*given)
    print("\n".join(differing[:20]))
    sys.exit(bool(differing))

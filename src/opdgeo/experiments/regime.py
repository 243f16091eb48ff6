"""The regimes of the confirmatory studies, as data: their points, arms and seeds, and the order in which these are worth running.

There are two, by preset: `tiny`, whose points make a map over learning rate and batch, and `smollm2`, the real model at two rates. Each has its own
rules' hash, units and page. A point is a learning rate with batches and steps. What an arm is otherwise stands in `study.py`. All arms of a point and seed start from that
seed's own anchor. The seeds are FIRST and on, in order; a verdict at a point is given when all its planned seeds are there, and
not before. What a point borrows from another one is trained once: those arms have the same settings in both.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from opdgeo.experiments.presets import PRESETS
from opdgeo.experiments.rules import (
    ALPHAS,
    CLAIMS,
    COIN,
    CONTROLS,
    EXPLORATORY,
    FROZEN,
    KINDS,
    MATCHED,
    OPD,
    RANDOM_SIGN,
    RLVR,
    SFT,
    SPARSE,
    TEACHER_TOKENS,
    VERSION,
    s1,
)
from opdgeo.experiments.statistics import ALPHA

FIRST = 101
"""The first confirmatory seed."""
MAIN, S1 = "main", "s1"
PLAIN = (SFT, MATCHED, OPD, RLVR, COIN, RANDOM_SIGN)


@dataclass(frozen=True)
class Point:
    name: str
    text: str
    learning_rate: float
    steps: int
    arms: tuple[str, ...]
    seeds: int
    sequences: int = 64
    """A step, of every arm."""
    borrows: dict[str, str] = field(default_factory=dict)
    """Arm → the point whose arm it is."""

    @property
    def all_arms(self) -> tuple[str, ...]:
        return (*self.arms, *self.borrows)


POINTS = (
    Point(MAIN, "lr 1e-5, 100 steps, 64 sequences", 1e-5, 100,
          (*PLAIN, *SPARSE, TEACHER_TOKENS, *(f"opd-alpha-{a:g}" for a in ALPHAS)), seeds=7),
    Point("batch-16", "lr 1e-5, 100 steps, RLVR with 16 sequences", 1e-5, 100, (SFT, RLVR, COIN), 5, 16,
          dict.fromkeys((MATCHED, OPD, RANDOM_SIGN), MAIN)),
    Point("hot", "lr 1e-4, 100 steps, 64 sequences", 1e-4, 100, PLAIN, 5),
    Point(S1, "held in a channel: lr 1e-4, from step 10 to step 100, 64 sequences", 1e-4, 100,
          (*(s1(OPD, what) for what in ("free", "frozen", "update", "random", "other", "coin", "half")),
           *(s1(MATCHED, what) for what in ("free", "frozen", "update", "random"))), 5),
    Point("batch-128", "lr 1e-5, 100 steps, RLVR with 128 sequences", 1e-5, 100, (SFT, RLVR, COIN), 5, 128,
          dict.fromkeys((MATCHED, OPD, RANDOM_SIGN), MAIN)),
    Point("proportions", "lr 1e-5; OPD 29 steps of 16, RLVR 100 of 128: the paper's 299 of 64 and 1023 of 512", 1e-5, 29,
          (SFT, MATCHED, OPD, RANDOM_SIGN), 5, 16, dict.fromkeys((RLVR, COIN), "batch-128")),
    Point("between", "lr 3e-5, 100 steps, 64 sequences", 3e-5, 100, PLAIN, 5),
)  # fmt: skip
"""In order of worth."""
BY_NAME = {point.name: point for point in POINTS}

EVALUATED: dict[str, Any] = {
    "eval_prompts": 1024,
    "eval_prompts_between": 256,
    "eval_samples": 1,
    "eval_kl_origin": True,
    "monitor": 0,
}
"""Of a point's paradigms and noise arms; accuracy and KL are read between checkpoints there, and decide nothing. The other arms are
not evaluated: their claims are about the stable rank."""
NOISE_GAINS = 0.02
"""A noise arm that is shown to gain more accuracy than this has learned: no noise control, and the protocol is void."""
EARLY_ANCHOR = 24
"""Steps of SFT after which S1's anchor is stopped, so that there is much left to learn."""
LEG_FROM = 10
"""Steps after which S1 takes its channels; its arms go on from there with fresh moments and fresh prompts."""
S1_EVALUATED: dict[str, Any] = {
    "eval_prompts": 2048,
    "eval_prompts_between": 0,
    "eval_start": False,
    "eval_samples": 4,
    "eval_kl_origin": False,
    "monitor": 0,
    "checkpoints": (1.0,),
}


@dataclass(frozen=True)
class Regime:
    """Points that are judged together."""

    preset: str
    points: tuple[Point, ...]
    frozen: str
    """The day on which its rules were fixed."""
    evaluated: dict[str, Any]
    folder: str
    """Of its units' files, below docs/results."""
    title: str
    version: int = VERSION
    before: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Rules of an earlier version → the points whose rules have not changed since, so that its units count."""

    @property
    def by_name(self) -> dict[str, Point]:
        return {point.name: point for point in self.points}


TINY = Regime("tiny", POINTS, FROZEN, EVALUATED, "units", "What the confirmatory study found")
SMOLLM2_ARMS = (SFT, MATCHED, OPD, RLVR, COIN)
SMOLLM2 = Regime(
    "smollm2",
    (
        Point("smollm2", "lr 3e-5, 100 steps, 64 sequences", 3e-5, 100, SMOLLM2_ARMS, seeds=2),
        Point("smollm2-1e-5", "lr 1e-5, 100 steps, 64 sequences", 1e-5, 100, SMOLLM2_ARMS, seeds=2),
    ),
    "2026-11-28",
    EVALUATED | {"eval_prompts_between": 128},
    "smollm2",
    "What the study of SmolLM2 found",
    version=2,
    before={"33f0eada8738b793": ("smollm2",)},
)
REGIMES = {of.preset: of for of in (TINY, SMOLLM2)}


def units(of: Regime = TINY) -> Iterator[tuple[Point, int]]:
    """Every (point, seed) in order of worth."""
    for point in of.points:
        for seed in planned(point):
            yield point, seed


def planned(point: Point) -> list[int]:
    return [FIRST + i for i in range(point.seeds)]


def as_data(of: Regime = TINY) -> dict[str, Any]:
    """Everything that a confirmatory verdict depends on, as JSON can hold it."""
    shared = {
        "version": of.version,
        "alpha": ALPHA,
        "exploratory": sorted(EXPLORATORY),
        "first_seed": FIRST,
        "kinds": {name: [kind.says, kind.asks, kind.log] for name, kind in KINDS.items()},
        "claims": [asdict(claim) for claim in CLAIMS],
        "controls": [asdict(control) for control in CONTROLS],
        "points": [asdict(point) for point in of.points],
        "evaluated": of.evaluated,
        "noise_gains": NOISE_GAINS,
    }
    if of == TINY:  # not `is`: a worker has a copy
        return shared | {"s1": {**S1_EVALUATED, "anchor": EARLY_ANCHOR, "from": LEG_FROM}}
    return shared | {"preset": of.preset, "settings": PRESETS[of.preset]}


def counting(point: Point, of: Regime = TINY) -> set[str]:
    """The hashes of the rules by which a unit of `point` may have been made: today's, and those of versions that had the same."""
    return {rules_hash(of), *(rules for rules, names in of.before.items() if point.name in names)}


def rules_hash(of: Regime = TINY) -> str:
    """The fingerprint of `as_data`: what stands in the protocol, in every unit's file and in claims.json."""
    text = json.dumps(as_data(of), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""Statistics of the protocol (docs/protocol.md): what may be said of a claim after n independent seeds.

    python -m opdgeo.experiments.statistics coverage     # how often each interval holds the truth, by simulation
    python -m opdgeo.experiments.statistics power        # how many seeds each claim needs, from the pilots' variances

**The unit of replication is the seed.** Every comparison is first made within a seed (its arms share anchor and prompts), with the
matrices as they are, a fixed population: one number a seed. Positive quantities are compared as logarithms of ratios. From the n
numbers come a t interval and, beside it, an exact sign-flip test, which asks for symmetry in the place of normality.

**Recovery is a linear contrast**, held − share · free − (1 − share) · frozen: above 0 where at least that share of what training the
matrices brings is kept. A ratio has no interval where free and frozen are near each other; the contrast always has one.

**Verdicts on one comparison**, with an effect x in the claim's direction and a margin m > 0, at level α:

    holds           x > m                 the two-sided 1 − α interval lies above m
    reversed        x < −m                it lies below −m
    no difference   −m < x < m            two one-sided tests: the two-sided 1 − 2α interval lies within ± m
    open            none of these is shown

At most one of the first three can be. A comparison may claim *sameness* instead: it holds where no difference is shown, and is
reversed where |x| > m is; or a difference in either direction, which holds where |x| > m is shown. **A claim of several comparisons** holds when all of them hold and is open when nothing is shown;
one that is reversed or without difference is enough against it, so those are unions and take Holm's correction. **Over the
regime** (points such as learning rates), a verdict that differs between points is *depends*; Holm's correction over the points.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import integrate, special, stats

HOLDS, REVERSED, SAME, DEPENDS, OPEN = "holds", "reversed", "no difference", "depends", "open"
VERDICTS = (HOLDS, REVERSED, SAME, DEPENDS, OPEN)
SHOWN = (HOLDS, REVERSED, SAME)
"""What can be shown of one comparison."""
ALPHA = 0.05
MOST_FLIPPED = 20


def t_interval(x: np.ndarray | Sequence[float], confidence: float = 1 - ALPHA) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of Student's interval for the mean of `x` (…, seeds), for every leading index.

    One seed says nothing of its variance: the interval is then the whole line.
    """
    x = np.asarray(x, float)
    n = x.shape[-1]
    if n < 2:
        whole = np.full(x.shape[:-1], np.inf)
        return -whole, whole
    half = special.stdtrit(n - 1, (1 + confidence) / 2) * x.std(-1, ddof=1) / math.sqrt(n)
    return x.mean(-1) - half, x.mean(-1) + half


def sign_flip(x: np.ndarray | Sequence[float], null: float = 0.0) -> float:
    """Exact two-sided p of the mean of `x` (seeds,) being `null`, over all 2ⁿ signs of x − null; never below 2 / 2ⁿ.

    Raises:
        ValueError: more than 20 seeds, for which the t interval is as good and this one slow.
    """
    centred = np.asarray(x, float) - null
    if len(centred) > MOST_FLIPPED:
        raise ValueError(
            f"{len(centred)} seeds; expected at most {MOST_FLIPPED} for an exact test. Use the t interval."
        )
    signs = np.array(list(itertools.product((1.0, -1.0), repeat=len(centred))))
    sums = np.abs(signs @ centred)
    return float((sums >= sums[0] * (1 - 1e-12)).mean())


def recovery_contrast(held: np.ndarray, free: np.ndarray, frozen: np.ndarray, share: float = 0.8) -> np.ndarray:
    """held − share · free − (1 − share) · frozen, seed by seed: ≥ 0 where at least `share` of free − frozen is recovered."""
    return np.asarray(held) - share * np.asarray(free) - (1 - share) * np.asarray(frozen)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given: reject those at most α, and a true null falls with chance at most α."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def tost(x: np.ndarray | Sequence[float], margin: float) -> float:
    """p of equivalence: the larger p of the one-sided t tests of mean ≤ −margin and mean ≥ margin."""
    mean, error, df = _mean_and_error(np.asarray(x, float))
    return max(_one_sided(mean, error, df, -margin), _one_sided(-mean, error, df, -margin))


def _mean_and_error(x: np.ndarray) -> tuple[float, float, int]:
    """Mean, its standard error and the degrees of freedom of `x` (seeds,); no error with one seed."""
    df = len(x) - 1
    return float(x.mean()), float(x.std(ddof=1)) / math.sqrt(len(x)) if df > 0 else math.nan, df


def _one_sided(mean: float, error: float, df: int, bound: float) -> float:
    """p of a mean ≤ bound against one > bound; 1 with one seed."""
    if df < 1:
        return 1.0
    if error == 0:
        return 0.0 if mean > bound else 1.0
    return float(special.stdtr(df, -(mean - bound) / error))


@dataclass(frozen=True)
class Compared:
    """One comparison: the effect of every seed in the claim's direction, and the smallest that matters."""

    effects: tuple[float, ...]
    margin: float
    sameness: bool = False
    """The claim is that there is no difference as large as the margin."""
    either: bool = False
    """The claim is that there is one, in whichever direction."""

    def __post_init__(self) -> None:
        if not self.margin > 0 or not all(map(math.isfinite, self.effects)):
            raise ValueError(
                f"margin {self.margin!r}, effects {self.effects!r}; expected a positive margin and finite effects"
            )

    def p(self, kind: str) -> float:
        """The p value behind `kind`, to be compared with α; holds and reversed are two-sided."""
        return self._p[kind]

    @functools.cached_property
    def _p(self) -> dict[str, float]:
        mean, error, df = _mean_and_error(np.array(self.effects))
        above, below = (min(1.0, 2 * _one_sided(sign * mean, error, df, self.margin)) for sign in (1, -1))
        same = max(_one_sided(sign * mean, error, df, -self.margin) for sign in (1, -1))
        if self.either:
            return {HOLDS: min(above, below), REVERSED: 1.0, SAME: same}
        if self.sameness:
            return {HOLDS: same, REVERSED: min(above, below), SAME: 1.0}
        return {HOLDS: above, REVERSED: below, SAME: same}


def verdict(comparisons: Sequence[Compared], alpha: float = ALPHA) -> str:
    """The verdict of a claim that is the conjunction of `comparisons`, at one point of the regime."""
    return _read(_p_values(comparisons), alpha)


def over_the_regime(points: Mapping[str, Sequence[Compared]], alpha: float = ALPHA) -> tuple[str, dict[str, str]]:
    """The verdict over all points of a regime, and that of each point, corrected for their number.

    What holds (or is reversed, or is no difference) at every point is that. Where two points show different things the
    claim depends on the regime. Otherwise, with some points open, it is open.
    """
    kinds = {name: _p_values(comparisons) for name, comparisons in points.items()}
    corrected = {kind: dict(zip(kinds, holm([p[kind] for p in kinds.values()]), strict=True)) for kind in SHOWN}
    each = {name: _read({kind: corrected[kind][name] for kind in SHOWN}, alpha) for name in kinds}
    shown = set(each.values()) - {OPEN}
    if len(shown) > 1:
        return DEPENDS, each
    return (shown.pop() if shown and OPEN not in each.values() else OPEN), each


def _p_values(comparisons: Sequence[Compared]) -> dict[str, float]:
    """The p value behind each verdict on a conjunction: all comparisons for holds, the best of them, by Holm, for the others."""
    return {HOLDS: max(c.p(HOLDS) for c in comparisons)} | {
        kind: min(holm([c.p(kind) for c in comparisons])) for kind in (REVERSED, SAME)
    }


def _read(p: Mapping[str, float], alpha: float) -> str:
    """Reversed counts before no difference: it is the stronger thing to say against a claim."""
    return next((kind for kind in SHOWN if p[kind] <= alpha), OPEN)


# How many seeds


@dataclass(frozen=True)
class Pilot:
    """What a pilot says of one comparison: the standard deviation between seeds of its per-seed effect."""

    claim: str
    effect: str
    sd: float
    margin: float
    truth: float
    """The effect that should be told from the margin: above it the claim should hold, within ± it no difference be found."""


PILOTS = (
    Pilot("L1", "RLVR's stable rank, first over last checkpoint, minus 1", 0.08, 0.1, 0.2),
    Pilot("L1", "the same, if it does not contract", 0.08, 0.1, 0.0),
    Pilot("C2", "log stable rank, teacher's over student's rollouts", 0.13, math.log(1.25), 0.0),
    Pilot("C2", "the same, if it differs by 8 %", 0.13, math.log(1.25), 0.08),
    Pilot("S1", "accuracy, OPD held minus free, 1,024 prompts × 1", 0.018, 0.03, 0.0),
    Pilot("S1", "the same, 2,048 prompts × 4", 0.011, 0.03, 0.0),
    Pilot("S1", "the same, against a truth 1.5 points below", 0.011, 0.03, -0.015),
)
"""Standard deviations from exploratory runs of the tiny study; margins as in the protocol."""


def power(pilot: Pilot, seeds: int, alpha: float = ALPHA) -> float:
    """The chance that `seeds` seeds show what is true of `pilot`, for normal effects: exact, by quadrature."""
    df, error = seeds - 1, pilot.sd / math.sqrt(seeds)
    if abs(pilot.truth) > pilot.margin:
        critical = stats.t.ppf(1 - alpha / 2, df)
        return float(stats.nct.sf(critical, df, (abs(pilot.truth) - pilot.margin) / error))
    critical = stats.t.ppf(1 - alpha, df)

    def inside(u: float) -> float:
        """The chance that both one-sided tests reject, given the sample's standard deviation u · sd."""
        half = pilot.margin - critical * u * error
        if half <= 0:
            return 0.0
        chance = stats.norm.cdf((half - pilot.truth) / error) - stats.norm.cdf((-half - pilot.truth) / error)
        return float(chance * stats.chi.pdf(u * math.sqrt(df), df) * math.sqrt(df))

    largest = pilot.margin / (critical * error)
    return float(integrate.quad(inside, 0, min(largest, 1 + 12 / math.sqrt(df)), limit=200)[0])


MOST_SEEDS = 100


def seeds_for(pilot: Pilot, wanted: float, alpha: float = ALPHA) -> int | None:
    """The fewest seeds with power `wanted`; None when MOST_SEEDS are not enough."""
    return next((n for n in range(2, MOST_SEEDS + 1) if power(pilot, n, alpha) >= wanted), None)


def would_show(comparisons: Sequence[Compared], points: int = 1, wanted: float = 0.8) -> tuple[str, int | None]:
    """The verdict of a claim if every effect is what was seen, and the fewest seeds that show it with power `wanted`.

    A plan, not a test: means and standard deviations are taken from the seeds that are there. Bonferroni's correction over the
    `points` of the regime, and over comparisons where one is enough, stands for Holm's, so the number is rather too large.
    """
    plans: list[tuple[str, Pilot]] = []
    for c in comparisons:
        mean, sd = float(np.mean(c.effects)), max(float(np.std(c.effects, ddof=1)), 1e-9)
        inside = abs(mean) <= c.margin
        kind = SAME if inside else HOLDS if mean > 0 or c.either else REVERSED
        if c.sameness:
            kind = HOLDS if inside else REVERSED
        plans.append((kind, Pilot("", "", sd, c.margin, mean)))
    against = [(kind, plan) for kind, plan in plans if kind != HOLDS]
    alpha = ALPHA / points / (len(comparisons) if against else 1)
    needed = [(seeds_for(plan, wanted, alpha) or math.inf, kind) for kind, plan in against or plans]
    seeds, kind = min(needed) if against else max(needed)
    return kind, None if math.isinf(seeds) else int(seeds)


def power_table() -> list[str]:
    """The pilots and the seeds that they ask for, as lines of Markdown."""
    lines = [
        "| claim | effect | SD between seeds | margin | truth | to be shown | seeds for 80 % | for 90 % | power with 5 | 7 | 9 |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for p in PILOTS:
        shown = HOLDS if p.truth > p.margin else REVERSED if p.truth < -p.margin else SAME
        counts = [seeds_for(p, wanted) or f"> {MOST_SEEDS}" for wanted in (0.8, 0.9)]
        chances = [f"{power(p, n):.2f}" for n in (5, 7, 9)]
        cells = [p.claim, p.effect, f"{p.sd:g}", f"{p.margin:.3g}", f"{p.truth:g}", shown, *counts, *chances]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


# How often an interval holds the truth


@dataclass(frozen=True)
class Simulated:
    """A kind of per-seed effect, drawn for `count` studies of n seeds, and its true mean."""

    name: str
    draw: Callable[[np.random.Generator, int, int], np.ndarray]
    truth: float


def _normal(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    return rng.normal(0.3, 0.1, (count, n))


def _heavy(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    return rng.standard_t(5, (count, n))


def _log_ratio(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """The log of the ratio of two means over 28 matrices; matrices differ alike in every seed, seeds by 13 %."""
    matrices = np.exp(rng.normal(0, 0.5, (count, 1, 28)))
    arms = [np.exp(rng.normal(0, 0.09, (count, n, 1)) + rng.normal(0, 0.1, (count, n, 28))) for _ in range(2)]
    one, other = ((matrices * arm).mean(-1) for arm in arms)
    return np.log(one / other)


def _accuracies(rng: np.random.Generator, count: int, n: int, means: Sequence[float]) -> list[np.ndarray]:
    """Accuracies (count, n) of arms tested on the same 1,024 prompts: correlated between arms, different by seed."""
    hard = rng.normal(0, 0.05, (count, n))  # what a seed's anchor makes easier for all its arms
    return [rng.binomial(1024, np.clip(m + hard + rng.normal(0, 0.01, (count, n)), 0, 1)) / 1024 for m in means]


def _difference(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    held, free = _accuracies(rng, count, n, (0.5, 0.52))
    return held - free


def _contrast(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    held, free, frozen = _accuracies(rng, count, n, (0.52, 0.55, 0.4))
    return recovery_contrast(held, free, frozen)


SIMULATED = (
    Simulated("normal effects", _normal, 0.3),
    Simulated("heavy tails (t with 5 degrees of freedom)", _heavy, 0.0),
    Simulated("log ratio of means over matrices", _log_ratio, 0.0),
    Simulated("difference of accuracies, paired", _difference, -0.02),
    Simulated("recovery contrast of accuracies", _contrast, 0.0),
)
SEEDS = (3, 5, 7, 9)


def coverage(kind: Simulated, seeds: int, count: int, confidence: float = 1 - ALPHA) -> float:
    """The share of `count` simulated studies whose t interval holds the truth."""
    low, high = t_interval(kind.draw(np.random.default_rng(seeds), count, seeds), confidence)
    return float(((low <= kind.truth) & (kind.truth <= high)).mean())


def bootstrap_coverage(seeds: int, count: int) -> float:
    """The same for the percentile bootstrap over seeds that `claims.py` takes, for normal effects; for comparison."""
    rng = np.random.default_rng(seeds)
    x = rng.normal(0, 1, (count, seeds))
    means = np.stack([x[np.arange(count)[:, None], rng.integers(0, seeds, (count, seeds))].mean(1) for _ in range(400)])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    return float(((low <= 0) & (high >= 0)).mean())


def sign_flip_rejections(seeds: int, count: int) -> float:
    """How often the sign-flip test rejects at 5 % where the mean is 0, for heavy-tailed effects."""
    rng = np.random.default_rng(seeds)
    return float(np.mean([sign_flip(rng.standard_t(5, seeds)) <= ALPHA for _ in range(count)]))


def coverage_table(count: int = 20_000) -> list[str]:
    """The coverage of every interval that a verdict uses, as lines of Markdown."""
    lines = [
        "| interval | effects | " + " | ".join(f"{n} seeds" for n in SEEDS) + " |",
        "|---" * (len(SEEDS) + 2) + "|",
    ]
    for confidence, use in ((1 - ALPHA, "holds, reversed"), (1 - 2 * ALPHA, "no difference")):
        for kind in SIMULATED:
            shares = " | ".join(f"{100 * coverage(kind, n, count, confidence):.1f} %" for n in SEEDS)
            lines.append(f"| t, {confidence:.0%} ({use}) | {kind.name} | {shares} |")
    shares = " | ".join(f"{100 * bootstrap_coverage(n, count // 10):.0f} %" for n in SEEDS)
    lines.append(f"| percentile bootstrap, 95 % (the finished study's) | normal effects | {shares} |")
    shares = " | ".join(f"{100 * sign_flip_rejections(n, count // 10):.1f} %" for n in SEEDS)
    lines.append(f"| sign-flip test, rejections at 5 % | heavy tails, no effect | {shares} |")
    error = 100 * math.sqrt(0.05 * 0.95 / count)
    return [
        *lines,
        "",
        f"{count} simulated studies a cell, Monte Carlo error {error:.2f} points (the last two rows: a tenth of them).",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m opdgeo.experiments.statistics")
    parser.add_argument("what", choices=("coverage", "power"))
    what = parser.parse_args(arguments).what
    print("\n".join(coverage_table() if what == "coverage" else power_table()))


if __name__ == "__main__":
    main()

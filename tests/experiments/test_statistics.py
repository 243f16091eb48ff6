"""Intervals, tests and verdicts on planted data, and against other routes to the same number."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from opdgeo.experiments.statistics import (
    DEPENDS,
    HOLDS,
    OPEN,
    PILOTS,
    REVERSED,
    SAME,
    SIMULATED,
    Compared,
    Pilot,
    bootstrap_coverage,
    coverage,
    holm,
    over_the_regime,
    power,
    power_table,
    recovery_contrast,
    seeds_for,
    sign_flip,
    sign_flip_rejections,
    t_interval,
    tost,
    verdict,
    would_show,
)

MARGIN = 0.1


def planted(mean: float, sd: float = 0.03, seeds: int = 7, seed: int = 0) -> Compared:
    """Effects with exactly this mean and standard deviation, as one study of `seeds` seeds could show them."""
    x = np.random.default_rng(seed).normal(size=seeds)
    return Compared(tuple(mean + sd * (x - x.mean()) / x.std(ddof=1)), MARGIN)


def test_the_interval_is_students() -> None:
    low, high = t_interval([1.0, 2.0, 3.0])  # mean 2, standard error 1/√3, t(0.975; 2) = 4.302653
    assert (low, high) == (
        pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-6),
        pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-6),
    )
    many = t_interval(np.array([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]), 0.9)
    assert many[0].shape == (2,) and many[0][1] == many[1][1] == 5
    assert t_interval([4.0]) == (-math.inf, math.inf), "one seed has no interval"


def test_sign_flips_are_counted_one_by_one() -> None:
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([-1.0, 2.0, 3.0]) == 4 / 8  # |±1 ±2 ±3| ≥ 4: 6, 4 and their negatives
    assert sign_flip([1.5, 2.5], null=2.0) == 1.0
    assert sign_flip(np.arange(1, 8)) == 2 / 2**7
    with pytest.raises(ValueError, match="at most 20"):
        sign_flip(np.ones(21))


def test_recovery_is_linear() -> None:
    held, free, frozen = np.array([0.48, 0.40]), np.array([0.5, 0.5]), np.array([0.4, 0.5])
    assert recovery_contrast(held, free, frozen) == pytest.approx([0.0, -0.1])
    assert recovery_contrast(held, free, frozen, share=0.5) == pytest.approx([0.03, -0.1])


def test_holm_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.001]) == pytest.approx([0.5, 0.002])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_keeps_the_chance_of_any_false_rejection() -> None:
    rng = np.random.default_rng(0)
    wrong = np.mean([min(holm(list(rng.uniform(size=4)))) <= 0.05 for _ in range(4000)])
    assert wrong < 0.05 + 3 * (0.05 * 0.95 / 4000) ** 0.5


@pytest.mark.parametrize("mean", [0.0, 0.05, 0.09, 0.2, -0.08])
def test_equivalence_is_an_interval_inside_the_margin(mean: float) -> None:
    x = np.array(planted(mean).effects)
    low, high = t_interval(x, 0.9)
    assert (tost(x, MARGIN) <= 0.05) == bool(low > -MARGIN and high < MARGIN)
    above = stats.ttest_1samp(x, -MARGIN, alternative="greater").pvalue
    below = stats.ttest_1samp(x, MARGIN, alternative="less").pvalue
    assert tost(x, MARGIN) == pytest.approx(max(above, below))


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [(0.2, 0.03, HOLDS), (-0.2, 0.03, REVERSED), (0.0, 0.03, SAME), (0.04, 0.03, SAME), (0.1, 0.03, OPEN), (0.2, 0.3, OPEN), (0.0, 0.3, OPEN)],
)  # fmt: skip
def test_a_planted_effect_gets_its_verdict(mean: float, sd: float, expected: str) -> None:
    assert verdict([planted(mean, sd)]) == expected
    low, high = t_interval(planted(mean, sd).effects)
    assert (expected == HOLDS) == bool(low > MARGIN) and (expected == REVERSED) == bool(high < -MARGIN)


@pytest.mark.parametrize(
    ("mean", "expected"), [(0.0, HOLDS), (0.05, HOLDS), (0.2, REVERSED), (-0.2, REVERSED), (0.1, OPEN)]
)
def test_a_claim_of_sameness_holds_where_no_difference_is_shown(mean: float, expected: str) -> None:
    assert verdict([Compared(planted(mean).effects, MARGIN, sameness=True)]) == expected
    assert verdict([planted(0.3), Compared(planted(mean, seed=5).effects, MARGIN, sameness=True)]) == expected


@pytest.mark.parametrize(("mean", "expected"), [(0.2, HOLDS), (-0.2, HOLDS), (0.0, SAME), (0.1, OPEN)])
def test_a_claim_of_any_difference_holds_in_either_direction(mean: float, expected: str) -> None:
    assert verdict([Compared(planted(mean).effects, MARGIN, either=True)]) == expected


def test_one_seed_decides_nothing() -> None:
    assert verdict([Compared((5.0,), MARGIN)]) == OPEN


def test_a_conjunction_holds_whole_and_falls_by_one_part() -> None:
    good, bad, same, unclear = planted(0.2), planted(-0.2, seed=1), planted(0.0, seed=2), planted(0.1, seed=3)
    assert verdict([good, planted(0.3, seed=4)]) == HOLDS
    assert verdict([good, bad]) == REVERSED
    assert verdict([good, same]) == SAME
    assert verdict([good, bad, same]) == REVERSED
    assert verdict([good, unclear]) == OPEN


def test_a_union_takes_holms_correction() -> None:
    """One comparison that alone is reversed at 5 % no longer is beside nine others that say nothing."""
    x = np.array(planted(0.0, 0.05, seeds=6).effects)
    alone = next(
        Compared(tuple(x - s), MARGIN)
        for s in np.arange(0.1, 0.4, 1e-3)
        if verdict([Compared(tuple(x - s), MARGIN)]) == REVERSED
    )
    nothing = [planted(0.1, 0.05, seeds=6, seed=i) for i in range(1, 10)]
    assert verdict([alone]) == REVERSED and verdict([alone, *nothing]) == OPEN


def test_a_claim_that_differs_between_learning_rates_depends() -> None:
    points = {"1e-5": [planted(0.2)], "1e-4": [planted(0.0, seed=1)]}
    assert over_the_regime(points) == (DEPENDS, {"1e-5": HOLDS, "1e-4": SAME})
    assert over_the_regime({**points, "1e-4": [planted(-0.2, seed=1)]})[0] == DEPENDS
    assert (
        over_the_regime({name: [planted(0.2, seed=i)] for i, name in enumerate(("1e-5", "3e-5", "1e-4"))})[0] == HOLDS
    )
    assert over_the_regime({"1e-5": [planted(0.2)], "1e-4": [planted(0.1, seed=1)]}) == (
        OPEN,
        {"1e-5": HOLDS, "1e-4": OPEN},
    )
    assert over_the_regime({name: [planted(0.0, seed=i)] for i, name in enumerate("ab")})[0] == SAME
    assert over_the_regime({"a": [planted(-0.2)]}) == (REVERSED, {"a": REVERSED})


def test_a_false_verdict_is_rare() -> None:
    """At the border of two verdicts neither is given more often than its level."""
    rng = np.random.default_rng(1)
    got = [verdict([Compared(tuple(rng.normal(MARGIN, 0.05, 5)), MARGIN)]) for _ in range(1500)]
    assert got.count(HOLDS) / 1500 < 0.025 + 3 * 0.004
    assert got.count(SAME) / 1500 < 0.05 + 3 * 0.0056
    assert got.count(REVERSED) == 0


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(ValueError, match="positive margin"):
        Compared((1.0, 2.0), 0.0)
    with pytest.raises(ValueError, match="finite effects"):
        Compared((1.0, math.nan), 0.1)


@pytest.mark.parametrize("kind", SIMULATED, ids=lambda kind: kind.name)
def test_intervals_hold_the_truth_as_often_as_they_say(kind: object) -> None:
    for seeds in (3, 5, 7, 9):
        assert 0.93 <= coverage(kind, seeds, 4000) <= 0.97, seeds  # type: ignore[arg-type]


def test_a_percentile_bootstrap_over_three_seeds_does_not() -> None:
    assert bootstrap_coverage(3, 1000) < 0.85


def test_the_sign_flip_test_keeps_its_level() -> None:
    assert sign_flip_rejections(7, 1000) < 0.05 + 3 * (0.05 * 0.95 / 1000) ** 0.5
    assert sign_flip_rejections(3, 100) == 0, "three seeds cannot reach 5 %"


@pytest.mark.parametrize(("truth", "kind"), [(0.2, HOLDS), (0.0, SAME), (0.05, SAME), (-0.2, REVERSED)])
def test_power_is_the_share_of_studies_that_say_so(truth: float, kind: str) -> None:
    pilot = Pilot("-", "-", 0.08, MARGIN, truth)
    rng = np.random.default_rng(0)
    got = np.mean([verdict([Compared(tuple(rng.normal(truth, 0.08, 6)), MARGIN)]) == kind for _ in range(2000)])
    assert power(pilot, 6) == pytest.approx(got, abs=4 * (0.25 / 2000) ** 0.5)


def test_the_table_says_how_many_seeds_a_pilot_asks_for() -> None:
    lines = power_table()
    assert len(lines) == len(PILOTS) + 2
    for pilot in PILOTS:
        n = seeds_for(pilot, 0.8)
        assert n is not None and power(pilot, n) >= 0.8 > power(pilot, n - 1)
    assert seeds_for(Pilot("-", "-", 1.0, 0.1, 0.11), 0.8) is None


def test_seeds_that_would_show_a_verdict_show_it_in_four_of_five_studies() -> None:
    rng = np.random.default_rng(0)
    for mean, kind in ((0.18, HOLDS), (0.0, SAME), (-0.16, REVERSED)):
        seen = planted(mean, sd=0.08)
        said, seeds = would_show([seen])
        assert said == kind and seeds is not None and seeds > 5
        for n, enough in ((seeds, True), (seeds - 2, False)):
            got = np.mean([verdict([Compared(tuple(rng.normal(mean, 0.08, n)), MARGIN)]) == kind for _ in range(2000)])
            assert (got > 0.8 - 4 * (0.16 / 2000) ** 0.5) if enough else (got < 0.8), (kind, n)


def test_a_claim_needs_all_its_comparisons_to_hold_and_one_to_fail() -> None:
    easy, hard, against = planted(0.5, 0.08), planted(0.15, 0.08), planted(-0.3, 0.08)
    assert would_show([easy, hard]) == would_show([hard])
    assert would_show([easy, hard, against])[0] == REVERSED
    assert would_show([easy, hard, against])[1] == would_show([against], points=3)[1], "Bonferroni over three"
    assert would_show([hard], points=6)[1] > would_show([hard])[1]  # type: ignore[operator]
    assert would_show([planted(0.101, 0.08)]) == (HOLDS, None), "too near its margin"
    same, other = (Compared(easy.effects, MARGIN, sameness=s, either=not s) for s in (True, False))
    assert would_show([same])[0] == REVERSED and would_show([other])[0] == HOLDS
    assert would_show([Compared(tuple(-x for x in easy.effects), MARGIN, either=True)])[0] == HOLDS
    assert would_show([Compared((0.2, 0.2), MARGIN)]) == (HOLDS, 2)

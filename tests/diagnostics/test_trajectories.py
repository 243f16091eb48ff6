"""Planted trajectories, and which rows a mean is over: each checkpoint is told from its neighbours."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from opdgeo.diagnostics import DIAGNOSTICS, Base, Settings, Trajectory, Update
from opdgeo.diagnostics.diagnostic import Published
from opdgeo.diagnostics.rows import compared
from opdgeo.diagnostics.trajectory import Point, walk_angle
from opdgeo.diagnostics.update import LowRankUpdate
from opdgeo.numerics.spectra import LowRankMatrix, spectrum

ROWS, COLS = 14, 11
# Of four checkpoints, which left and right basis directions ΔW has, strongest first, with the singular values 4 and 3.
DIRECTIONS = [((0, 1), (0, 1)), ((1, 2), (2, 3)), ((2, 3), (2, 0)), ((3, 1), (0, 5))]
SIGMA = (4.0, 3.0)


@pytest.fixture(scope="module")
def run() -> list[Trajectory]:
    """The matrix at each checkpoint. The walk's increments are 1, 2, 3 and 4."""
    settings = Settings(top_k=2, rank=4, mask_rank=4)
    rng = torch.Generator().manual_seed(0)
    base = Base(torch.randn(ROWS, COLS, dtype=torch.float64, generator=rng), settings)
    deltas = []
    for left, right in DIRECTIONS:
        delta = torch.zeros(ROWS, COLS, dtype=torch.float64)
        for u, v, s in zip(left, right, SIGMA, strict=True):
            delta[u, v] = s
        deltas.append(delta)
    points = [Point(spectrum=spectrum(d, 5), increment=i) for i, d in enumerate(deltas, 1)]
    updates = [Update(base, base.weights + d) for d in deltas]
    return [Trajectory((ROWS, COLS), settings, points, i, update) for i, update in enumerate(updates)]


def shared(side: str, k: int, one: int, other: int) -> set[int]:
    at = ("left", "right").index(side)
    return set(DIRECTIONS[one][at][:k]) & set(DIRECTIONS[other][at][:k])


def test_similarities_are_the_shares_of_common_directions(run: list[Trajectory]) -> None:
    for t, here in enumerate(run):
        found = DIAGNOSTICS["subspace_similarity"].measure(here)
        for side, k, kind in itertools.product(("left", "right"), (1, 2), ("final", "previous")):
            value = found[f"{kind}.{k}" if side == "right" else f"{kind}.left.{k}"]
            other = len(run) - 1 if kind == "final" else t - 1
            if other < 0:
                assert value.status == "undefined" and value.reason == "there is no earlier checkpoint"
            else:
                assert value.value == pytest.approx(len(shared(side, k, t, other)) / k, abs=1e-9)
                assert value.error is not None and value.error < 1e-9
        assert found["final.4"].status == ("undefined")  # each update has rank 2


def test_energies_are_those_of_the_directions_in_the_earlier_channel(run: list[Trajectory]) -> None:
    for t, here in enumerate(run):
        found = DIAGNOSTICS["channel_energy"].measure(here)
        for side, kind in itertools.product(("left", "right"), ("first", "previous")):
            value = found[f"{kind}.2" if side == "right" else f"{kind}.left.2"]
            if t == 0:
                assert value.status == "undefined"
                continue
            common = shared(side, 2, t, 0 if kind == "first" else t - 1)
            own = DIRECTIONS[t][("left", "right").index(side)]
            expected = sum(s**2 for s, d in zip(SIGMA, own, strict=True) if d in common) / 25
            assert value.value == pytest.approx(expected, abs=1e-9)
            assert value.error is not None and value.error < 1e-8


def test_the_walk_of_a_trajectory(run: list[Trajectory]) -> None:
    """cos² of the angle between two points is the share of the later one's squared length that the earlier one has."""
    lengths = [1, 5, 14, 30]
    assert run[0].lengths() == lengths
    for t, other in itertools.product(range(4), range(4)):
        angle = run[t].angle(other)
        first, later = sorted((lengths[t], lengths[other]))
        assert angle == pytest.approx(math.acos(math.sqrt(first / later)), abs=1e-12)
    assert walk_angle(1 + 1e-9, 1.0) == 0 == walk_angle(0.0, 0.0)  # where rounding left the later one shorter
    gaps = [Point(increment=1.0), Point(finite=False), Point(increment=2.0), Point(), Point(increment=1.0)]
    there = Trajectory((3, 3), Settings(), gaps, 2)
    assert there.lengths() == [1.0, None, 5.0, None, None]
    assert [there.angle(i) is None for i in range(5)] == [False, True, False, True, True]


def test_the_null_of_the_energy_in_an_earlier_channel(run: list[Trajectory]) -> None:
    """It keeps cos²θ of what a Gaussian has in its own channel, and gains chance."""
    from opdgeo.numerics.nulls import own_energy

    own, spread = own_energy(ROWS, COLS, 2)
    for t, here in enumerate(run):
        found = DIAGNOSTICS["channel_energy"].null(here)
        kept = {"first": [1, 1 / 5, 1 / 14, 1 / 30][t], "previous": [None, 1 / 5, 5 / 14, 14 / 30][t]}
        expected = {} if t == 0 else kept
        assert {k.partition(".")[0] for k in found} == set(expected)
        for kind, share in expected.items():
            for variant, size in ((f"{kind}.2", COLS), (f"{kind}.left.2", ROWS)):
                assert share is not None
                assert found[variant] == pytest.approx(
                    (share * own + (1 - share) * 2 / size, share * spread), abs=1e-12
                )


@pytest.mark.parametrize(
    ("valued", "nulled", "moved", "expected"),
    [
        ("1101", "0110", None, "0100"),  # with a value and a null
        ("1101", "0010", None, "1101"),  # no row has both: with a value
        ("1101", "0000", "0110", "0100"),  # no nulls at all: those of matrices that moved
        ("1101", "0000", "0010", "1101"),  # none of these moved
        ("1101", "1001", "0100", "1001"),  # a null decides before movement
    ],
)
def test_the_rows_of_a_mean(valued: str, nulled: str, moved: str | None, expected: str) -> None:
    masks = [None if m is None else np.array([c == "1" for c in m]) for m in (valued, nulled, moved)]
    assert masks[0] is not None and masks[1] is not None
    found = compared(masks[0], masks[1], masks[2])
    assert "".join(str(int(f)) for f in found) == expected


def test_the_papers_norms_relative_to_weights_of_two_sizes() -> None:
    """A matrix of 4096 × 4096 entries of standard deviation s has the norm 4096 s."""
    one = Published("", "sft", 0.1, norm=4096 * 0.06)
    assert one.relative_norm == pytest.approx((2, 3))


def test_the_nulls_beside_the_papers_values_are_those_of_gaussian_weights() -> None:
    """docs/paper.md, §5; of a part of the matrix, whose update has the same size an entry."""
    from opdgeo.diagnostics.gaussian_null import gaussian_null

    side, checked = 384, 0
    wanted = [DIAGNOSTICS["update_sparsity"], DIAGNOSTICS["mask_overlap"]]
    rng = torch.Generator().manual_seed(0)
    for at, std in enumerate((0.02, 0.03)):
        base = Base(std * torch.randn(side, side, generator=rng), Settings())
        for norm in {p.norm for d in wanted for p in d.published}:
            drawn = torch.randn(side, side, generator=rng) * (norm / 4096)
            update = Update(base, base.weights + drawn)
            found, _ = gaussian_null(update, wanted, "test")
            for d in wanted:
                for one in (p for p in d.published if p.norm == norm):
                    assert one.null is not None
                    assert found[d.name, one.variant][0] == pytest.approx(one.null[at], abs=0.004)
                    checked += 1
    assert checked == 12


def test_where_a_run_locks_in_a_planted_table() -> None:
    """Two matrices at steps 10 to 40; their similarities to the end, and those of their nulls."""
    import polars as pl

    values = {"a": (0.2, 0.9, 0.7, 1.0), "b": (0.6, 0.7, 0.9, 1.0)}
    chances = {"a": (0.1, 0.5, 0.6, 1.0), "b": (0.1, 0.5, 0.8, 1.0)}
    rows = [
        {
            "checkpoint": f"run/step-{10 * t}",
            "step": 10 * t,
            "matrix": m,
            "diagnostic": "subspace_similarity",
            "variant": "final.left.4",
            "value": values[m][t - 1],
            "null_mean": chances[m][t - 1],
        }
        for t in (3, 1, 4, 2)
        for m in values
    ]
    (found,) = DIAGNOSTICS["locking"].measure(pl.DataFrame(rows))
    assert (found["run"], found["side"], found["rank"], found["steps"]) == ("run", "left", 4, [10, 20, 30])
    at = {t: i for i, t in enumerate(found["thresholds"])}
    expected = {
        0.5: (20, 20, 10),
        0.7: (20, 30, 20),
        0.8: (20, None, 30),
        0.9: (None, None, 30),
        0.95: (None, None, None),
    }
    for threshold, steps in expected.items():
        of = tuple(found[name][at[threshold]] for name in ("step", "null_step", "median_step"))
        assert of == steps, threshold


def test_a_base_of_zeros_has_no_relative_shift() -> None:
    from opdgeo.diagnostics.gaussian_null import gaussian_null

    shift = DIAGNOSTICS["spectral_shift"]
    update = Update(
        Base(torch.zeros(80, 70, dtype=torch.float64), Settings(rank=4, mask_rank=4)), torch.ones(80, 70).double()
    )
    assert shift.measure(update)[""].status == "undefined"
    assert all(math.isnan(x) for x in gaussian_null(update, [shift], "test")[0].get((shift.name, ""), (math.nan,)))


def test_the_error_of_a_norm_of_factors_is_relative() -> None:
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 3, dtype=torch.float64, generator=rng) for n in (9, 7))
    base = Base(torch.randn(9, 7, dtype=torch.float64, generator=rng), Settings(rank=2, mask_rank=2))
    errors = [LowRankUpdate(base, LowRankMatrix(left * scale, right)).norm_error for scale in (1e-6, 1.0, 1e6)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-9) == pytest.approx(errors[2], rel=1e-9)
    assert 0 < errors[1] < 1e-12
    assert LowRankUpdate(base, LowRankMatrix(left * 0, right)).norm_error == 0


def test_what_is_a_share_is_shown_in_per_cent() -> None:
    shares = """relative_norm update_sparsity mask_overlap principal_energy subspace_similarity channel_energy sign_agreement visible_jaccard
        shared_subspace shared_channel"""
    assert {name for name, d in DIAGNOSTICS.items() if d.unit == "share"} == set(shares.split())
    assert {name for name, d in DIAGNOSTICS.items() if d.unit == "degrees"} == {"principal_angles"}


def test_the_names_of_the_curves() -> None:
    """As `curves.parquet` has them."""
    expected = {f"sigma_{of}" for of in ("base", "tuned", "update")} | {f"angle_{side}" for side in ("left", "right")}
    expected |= {f"similarity_{side}{null}" for side in ("left", "right") for null in ("", "_null")}
    assert {curve for d in DIAGNOSTICS.values() for curve in d.curves} == expected


def test_whether_a_matrix_moved_between_dtypes() -> None:
    stored = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    base = Base(stored, Settings(rank=2, mask_rank=2))
    nudged = stored.float()
    nudged[4, 3] += 1e-6
    assert [Update(base, w).moved for w in (stored.clone(), stored.float(), stored.double(), nudged)] == [
        False,
        False,
        False,
        True,
    ]

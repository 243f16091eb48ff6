"""Singular values and subspaces against planted truth that is exact to the last bit.

Hadamard matrices are orthogonal up to a power of two and have entries ±1. So H₁ D H₂ᵀ has known singular values and vectors,
and with few enough bits in D every sum in it is exact: the matrix given to opdgeo has exactly the planted answer. Columns turned by
an angle whose sine and cosine are rational keep that, for a D that the denominator divides. Small sizes take the roads of
large ones through `SMALL`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor

from examples import examples
from opdgeo.numerics import spectra
from opdgeo.numerics.lapack import gram_matrix
from opdgeo.numerics.spectra import (
    DenseMatrix,
    LowRankMatrix,
    Spectrum,
    angle_error,
    principal_angles,
    spectrum,
    truncated_svd,
    truncation_error,
)

CASES = examples(80, suppress_health_check=list(HealthCheck))
SLACK = 1e-15  # rounding of the comparison itself


@pytest.fixture(params=["svd", "gram"])
def road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(spectra, "SMALL", 10**9 if request.param == "svd" else 1)
    yield request.param


def hadamard(order: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(order):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)], 0)
    return h


@dataclass(frozen=True)
class Planted:
    """A matrix and its exact singular values (all, descending) and orthonormal singular vectors."""

    matrix: Tensor
    sigma: Tensor
    left: Tensor
    right: Tensor


def plant(
    rows: int, cols: int, values: list[int], turn: int = 0, at: int = 1, scale: int = 0, seed: int = 0
) -> Planted:
    """A (2^rows, 2^cols) matrix with singular values proportional to `values` (descending; the rest 0).

    Args:
        turn: 0, or p: the left vectors at `at` − 1 and `at` are turned into each other by 2·atan 2⁻ᵖ.
        scale: the power of two that multiplies the matrix.
        seed: of the order and the signs of rows and columns.
    """
    rng = torch.Generator().manual_seed(seed)
    left, right = hadamard(rows), hadamard(cols)
    left = left[torch.randperm(len(left), generator=rng)] * (2.0 * torch.randint(2, (len(left), 1), generator=rng) - 1)
    right = right[torch.randperm(len(right), generator=rng)] * (
        2.0 * torch.randint(2, (len(right), 1), generator=rng) - 1
    )
    count = min(len(left), len(right))
    d = torch.zeros(count, dtype=torch.float64)
    d[: len(values)] = torch.tensor(values[:count], dtype=torch.float64)
    left, right = left[:, :count], right[:, :count]
    whole = 1.0
    if turn:
        c, s, whole = 4.0**turn - 1, 2.0 * 2.0**turn, 4.0**turn + 1
        u = left.clone() * whole
        a, b = left[:, at - 1], left[:, at]
        u[:, at - 1], u[:, at] = c * a + s * b, c * b - s * a
        left = u
    matrix = (left * d) @ right.T  # whole times what it stands for: an exact sum of integers
    assert float(matrix.abs().max()) < 2.0**53
    size = whole * 2.0 ** ((rows + cols) / 2)
    up, rest = math.ldexp(1.0, scale // 2), math.ldexp(1.0, scale - scale // 2)
    return Planted(
        matrix * up * rest,
        d * size * up * rest,
        left / (whole * 2.0 ** (rows / 2)),
        right / 2.0 ** (cols / 2),
    )


def spans(found: Tensor, exact: Tensor) -> float:
    """sin of the largest angle between two subspaces."""
    return float(torch.sin(principal_angles(exact, found).max()))


def holds(found: Spectrum, truth: Planted, k: int) -> None:
    """Every error of `found` is below the one it states, and none is far from float64."""
    count = len(found.sigma)
    difference = (found.sigma - truth.sigma[:count]).abs()
    largest = float(truth.sigma[0])
    assert bool((difference <= found.errors + SLACK * largest).all()), (found.method, difference, found.errors)
    assert float(found.errors.max()) <= found.error
    if count == len(truth.sigma) and float(truth.sigma[-1]) >= 1e-6 * largest:
        assert float(difference.max()) <= 1e-9 * largest
    if k == 0:
        return
    for side, vectors, exact in (("left", found.left, truth.left), ("right", found.right, truth.right)):
        error = found.subspace_error(k, side)
        assert error == 1 or spans(vectors[:, :k], exact[:, :k]) <= error + SLACK * k, (found.method, side, k, error)
        unit = vectors.T @ vectors - torch.eye(vectors.shape[1], dtype=torch.float64)
        assert float(unit.abs().max()) < 1e-12
    off = truncation_error(found, k)
    if math.isfinite(off):
        exact = (truth.left[:, :k] * truth.sigma[:k]) @ truth.right[:, :k].T
        ours = (found.left[:, :k] * found.sigma[:k]) @ found.right[:, :k].T
        assert float(torch.linalg.matrix_norm(ours - exact, 2)) <= off + 8 * SLACK * largest, found.method


def spectra_of(most: int) -> st.SearchStrategy[list[int]]:
    """Descending positive integers: spread, clustered, repeated, graded to 2⁻²⁴ of the largest, fewer than the size."""
    spread = st.lists(st.integers(1, 2**20), min_size=1, max_size=most)
    clustered = st.builds(
        lambda centre, steps: [centre + s for s in steps],
        st.integers(2**18, 2**24),
        st.lists(st.integers(0, 3), min_size=1, max_size=most),
    )
    graded = st.lists(st.integers(0, 24).map(lambda p: 2**p), min_size=1, max_size=most)
    full = st.builds(
        lambda top, seed: [top + (seed * i * i) % 97 for i in range(most)], st.integers(1, 2**20), st.integers(1, 96)
    )
    return st.one_of(spread, clustered, graded, full).map(lambda v: sorted(v, reverse=True))


@CASES
@given(st.data())
def test_the_true_error_is_below_the_stated_one(road: str, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(0, 5)), data.draw(st.integers(0, 5))
    size = 2 ** min(rows, cols)
    values = data.draw(spectra_of(size))
    turn = data.draw(st.sampled_from([0, 1, 2, 5])) if size > 1 else 0
    at = data.draw(st.integers(1, size - 1)) if size > 1 else 1
    truth = plant(
        rows,
        cols,
        values,
        turn,
        at,
        data.draw(st.sampled_from([-900, -300, -40, 0, 13, 300, 900])),
        data.draw(st.integers(0, 99)),
    )
    k = data.draw(st.integers(1, size))
    holds(spectrum(truth.matrix, k), truth, k)


@CASES
@given(st.data())
def test_angles_between_two_spectra_are_within_their_error(road: str, data: st.DataObject) -> None:
    rows, cols = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    size = 2 ** min(rows, cols)
    values, seed = data.draw(spectra_of(size)), data.draw(st.integers(0, 99))
    k = data.draw(st.integers(1, max(1, size // 2)))
    turn = data.draw(st.integers(1, 9))
    first, second = (spectrum(plant(rows, cols, values, t, k, 0, seed).matrix, k) for t in (0, turn))
    for side, angle in (("left", 2 * math.atan(2.0**-turn)), ("right", 0.0)):
        error = angle_error(first, second, k, side)
        if error == math.pi / 2:
            continue
        found = principal_angles(getattr(first, side)[:, :k], getattr(second, side)[:, :k])
        # A turn beyond 90° comes back on the other side.
        expected = angle if angle <= math.pi / 2 else math.pi - angle
        assert abs(float(found[-1]) - expected) <= error + SLACK * k
        assert float(found[:-1].abs().sum()) <= (error + SLACK * k) * k


@examples(20, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_the_leading_triplets_are_within_their_error(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "SMALL", 1)
        patch.setattr(spectra, "KRYLOV", 1)
        rows, cols = data.draw(st.sampled_from([7, 8, 9])), data.draw(st.sampled_from([8, 9]))
        truth = plant(
            rows,
            cols,
            data.draw(spectra_of(64)),
            0,
            1,
            data.draw(st.sampled_from([-900, 0, 700])),
            data.draw(st.integers(0, 99)),
        )
        k = data.draw(st.integers(1, 2))
        angle = data.draw(st.sampled_from([1e-7, 1e-5, math.inf]))
        found = truncated_svd(DenseMatrix(truth.matrix), k, angle=angle)
        holds(found, truth, k if found.right.shape[1] else 0)
        assert found.below(k) >= float(truth.sigma[k]) * (1 - 1e-9) - found.error


@pytest.mark.parametrize(("rows", "cols"), [(8, 8), (8, 9), (9, 8)])
def test_the_krylov_road_is_taken_where_the_top_stands_out(rows: int, cols: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spectra, "SMALL", 1)
        patch.setattr(spectra, "KRYLOV", 1)
        truth = plant(rows, cols, [2**20 // (i + 1) for i in range(40)])
        found = truncated_svd(DenseMatrix(truth.matrix), 2)
        assert found.method == "krylov"
        assert found.subspace_error(2, "right") < 1e-5
        holds(found, truth, 2)


def test_a_flat_top_sends_the_krylov_road_to_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "SMALL", 1)
    monkeypatch.setattr(spectra, "KRYLOV", 1)
    truth = plant(8, 8, [2**20 - i for i in range(256)])
    found = truncated_svd(DenseMatrix(truth.matrix), 2, angle=1e-5)
    assert found.method == "gram (krylov did not converge)"
    holds(found, truth, 2)


def test_values_that_a_gram_matrix_cannot_hold_come_from_an_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectra, "SMALL", 1)
    truth = plant(4, 4, [2**24] * 4 + [2**20] * 4 + [1] * 8)
    found = spectrum(truth.matrix, 4)
    assert found.method == "gram, svdvals"
    holds(found, truth, 4)
    deficient = plant(4, 4, [8, 4, 2])
    holds(spectrum(deficient.matrix, 3), deficient, 3)
    assert spectrum(deficient.matrix, 5).subspace_error(5, "left") == 1


def test_a_zero_matrix_and_one_entry(road: str) -> None:
    zero = spectrum(torch.zeros(6, 4, dtype=torch.float64), 2)
    assert zero.sigma.tolist() == [0.0] * 4
    assert zero.subspace_error(2, "left") == 1
    assert spectrum(torch.full((1, 1), -3.0, dtype=torch.float64), 1).sigma.tolist() == [3.0]


def test_the_gram_matrix_of_a_matrix_with_one_sign() -> None:
    # Sums that only grow are the worst for rounding; a matrix of positive entries has them all.
    rng = torch.Generator().manual_seed(0)
    matrix = torch.rand(700, 260, dtype=torch.float64, generator=rng)
    found, exact = spectrum(matrix, 8), torch.linalg.svd(matrix, full_matrices=False)
    assert found.method == "gram"
    assert bool(((found.sigma - exact.S).abs() <= found.errors).all())
    whole = matrix.T @ matrix
    assert torch.allclose(torch.triu(gram_matrix(matrix)), torch.triu(whole), rtol=1e-13, atol=0)


@pytest.mark.parametrize("shape", [(260, 260), (220, 900), (900, 220)])
def test_real_sizes_agree_with_the_svd(shape: tuple[int, int]) -> None:
    rng = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, dtype=torch.float64, generator=rng)
    left, sigma, right_t = torch.linalg.svd(matrix, full_matrices=False)
    found = spectrum(matrix, 30)
    assert found.method == "gram"
    assert bool(((found.sigma - sigma).abs() <= found.errors).all())
    assert spans(found.left, left[:, :30]) <= found.subspace_error(30, "left")
    assert spans(found.right, right_t[:30].T) <= found.subspace_error(30, "right")
    assert found.subspace_error(30, "left") < 1e-7


@CASES
@given(
    order=st.tuples(st.integers(5, 7), st.integers(5, 7)),
    values=st.lists(st.integers(1, 2**20), min_size=1, max_size=9),
    k=st.integers(1, 12),
    scale=st.integers(-60, 60),
    seed=st.integers(0, 9),
    mixed=st.integers(0, 3),
)
def test_factors_keep_spectrum_and_subspaces(
    order: tuple[int, int], values: list[int], k: int, scale: int, seed: int, mixed: int
) -> None:
    """M = (L G)(R G⁻ᵀ)ᵀ with L Rᵀ planted and G a whole-numbered triangle with a whole-numbered inverse: exact factors."""
    values = sorted(values, reverse=True)
    exact = plant(*order, values, scale=scale, seed=seed)
    r = len(values)
    mixing = torch.eye(r, dtype=torch.float64)
    for i in range(r - 1):
        mixing[i, i + 1] = float(mixed)
    # ±1 times whole numbers times a power of two: every product is exact.
    left = exact.left[:, :r].sign() * torch.tensor(values, dtype=torch.float64) * 2.0**scale
    right = exact.right[:, :r].sign()
    factors = LowRankMatrix(left @ mixing, right @ torch.linalg.inv(mixing).T)
    found = truncated_svd(factors, k)
    assert len(found.sigma) == max(k, r)
    truth = torch.cat([exact.sigma[:r], torch.zeros(max(0, k - r), dtype=torch.float64)])
    assert bool(((found.sigma - truth).abs() <= found.errors).all())
    assert abs(factors.norm - float(torch.linalg.vector_norm(exact.sigma))) <= factors.error
    assert factors.error <= 1e-12 * (1 + mixed) ** (2 * r) * float(exact.sigma[0])
    for side in ("left", "right"):
        vectors, planted = getattr(found, side), getattr(exact, side)[:, :k]
        gram = vectors.T @ vectors
        assert float((gram - torch.eye(k, dtype=torch.float64)).abs().max()) <= 1e-13
        bound = found.subspace_error(k, side)
        assert k <= r or bound == 1.0
        if bound < 1:
            apart = planted - vectors @ (vectors.T @ planted)
            assert float(torch.linalg.matrix_norm(apart, 2)) <= bound + 1e-14
    other = torch.randn(factors.shape[1], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    whole = factors.dense()
    for mine, dense in ((factors @ other, whole @ other), (torch.cat(list(factors.row_blocks())), whole)):
        torch.testing.assert_close(mine, dense, rtol=1e-9, atol=1e-9 * factors.norm)
    torch.testing.assert_close(factors.T.dense(), whole.T, rtol=1e-12, atol=1e-12 * factors.norm)

"""Where a method begins and ends: directions to start from, and what lies on an edge."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from opdgeo.numerics.dense import by_svd
from opdgeo.numerics.gram import by_gram
from opdgeo.numerics.krylov import Goal, block_krylov
from opdgeo.numerics.moments import Products
from opdgeo.numerics.nulls import factor, shifts
from opdgeo.numerics.operators import DenseMatrix, LowRankMatrix
from opdgeo.numerics.subspaces import share_outside


@pytest.mark.parametrize("shape", [(130, 90), (90, 130), (100, 100)])
def test_known_directions_spare_blocks(shape: tuple[int, int]) -> None:
    """From the leading right directions on, a basis suffices in which random ones get nowhere; whatever the shape."""
    rng = torch.Generator().manual_seed(0)
    small = min(shape)
    left, right = (torch.linalg.qr(torch.randn(n, small, dtype=torch.float64, generator=rng)).Q for n in shape)
    sigma = torch.linspace(10, 1, small, dtype=torch.float64)
    matrix = DenseMatrix(left * sigma @ right.T)
    goal = Goal(k=4, rank=4, tolerance=1e-7, angle=1e-5, basis=6 * 12)
    assert block_krylov(matrix, goal) is None
    for known in (4, 20):
        found = block_krylov(matrix, goal, right[:, :known])
        assert found is not None and found.errors.max() <= 3e-7 * 10
        assert bool(((found.sigma - sigma[:4]).abs() <= found.errors).all())


@pytest.mark.parametrize("shape", [(9, 6), (6, 9), (6, 6)])
def test_the_mean_of_the_shifts_is_that_of_many_matrices(shape: tuple[int, int]) -> None:
    """To second order; drawn in pairs ±G, whose first order cancels."""
    rng = torch.Generator().manual_seed(0)
    sigma = torch.tensor([9.0, 7.5, 5.0, 4.0, 2.5, 1.5], dtype=torch.float64)
    matrix, scale = torch.zeros(*shape, dtype=torch.float64), 0.02
    matrix.diagonal().copy_(sigma)
    noise = scale * torch.randn(4000, *shape, dtype=torch.float64, generator=rng)
    both = torch.linalg.svdvals(matrix + noise) + torch.linalg.svdvals(matrix - noise)
    expected = (both / 2 - sigma).mean(dim=0)
    spread = (both / 2 - sigma).std(dim=0) / math.sqrt(len(noise))
    found = shifts(sigma, *shape, scale, 64, torch.Generator().manual_seed(1))
    first = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale
    assert float((found - first).std(dim=0).max()) < 1e-15
    assert bool(((found - first).mean(dim=0) - expected).abs().le(4.5 * spread + 0.01 * expected.abs()).all())


def test_a_cosine_with_what_is_all_noise_is_not_a_number() -> None:
    """Two blocks that are opposite: their inner product, which estimates the squared norm of the mean, is negative."""
    x, y = torch.tensor([0.03, 0.04]), torch.tensor([0.0, 2.0])
    entries = {"noise": torch.stack([x, -x]), "signal": torch.stack([y, y])}
    products = Products(entries, dict.fromkeys(entries, np.ones(2)))
    counts = np.ones((1, 2))
    assert products.inner("noise", "noise", counts) == pytest.approx(-0.0025)
    assert products.inner("signal", "signal", counts) == pytest.approx(4)
    assert products.inner("noise", "signal", counts) == pytest.approx(0, abs=1e-6)
    assert np.isnan(products.cosine("noise", "signal", counts)).all()
    assert products.cosine("signal", "signal", counts) == pytest.approx(1)
    parts = {"noise": np.array([[2.0, 1.0]]), "signal": np.array([[1.0, 0.5]])}  # 2x − x + y + y/2
    assert products.norm(parts) == pytest.approx(float((x + 1.5 * y).norm()))
    zero = Products({"none": torch.zeros(2, 3)}, {"none": np.ones(2)})
    assert zero.inner("none", "none", counts) == 0 and np.isnan(zero.cosine("none", "none", counts)).all()


def test_each_method_says_its_name() -> None:
    """It stands in the tables, beside every value."""
    matrix = torch.randn(40, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few_small, many_small = torch.ones(2, 30, dtype=torch.float64)
    few_small[-5:], many_small[-12:] = 1e-9, 1e-9
    assert (by_svd(matrix, 2).method, by_svd(matrix, 0).method) == ("svd", "svdvals")
    for scales, method in ((1.0, "gram"), (few_small, "gram, inverse iteration"), (many_small, "gram, svdvals")):
        found = by_gram(matrix * scales, 2)
        assert found is not None and found.method == method
    few = LowRankMatrix(matrix[:, :3], matrix[:30, :3]).structured_svd(2)
    assert few.method == "factors" and few.sigma.shape == (3,) and few.left.shape == (40, 2)


@pytest.mark.parametrize("count", [3, 4, 9])
def test_a_factor_stands_for_a_gaussian_matrix(count: int) -> None:
    """Every entry of FᵀF has the mean and the variance of a Wishart matrix's."""
    rng, k, draws = torch.Generator().manual_seed(0), 3, 2000
    found = torch.stack([f.T @ f for f in (factor(count, k, rng) for _ in range(draws))])
    mean = count * torch.eye(k, dtype=torch.float64)
    variance = count * (1 + torch.eye(k, dtype=torch.float64))
    assert float((found.mean(dim=0) - mean).abs().max()) < 5 * math.sqrt(2 * count / draws)
    assert float((found.var(dim=0) / variance - 1).abs().max()) < 0.25


def test_the_share_outside_a_subspace_does_not_depend_on_the_size_of_the_update() -> None:
    basis = torch.eye(3, 2, dtype=torch.float64)
    for scale in (1e-3, 1.0, 1e3):
        delta = DenseMatrix(scale * torch.diag(torch.tensor([2.0, 1.0, 2.0], dtype=torch.float64)))
        assert share_outside(delta, basis, "right") == pytest.approx(4 / 9) == share_outside(delta, basis, "left")

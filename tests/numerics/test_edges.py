"""Where a method begins and ends: directions to start from, and what lies on an edge."""

from __future__ import annotations

import pytest
import torch

from opdgeo.numerics.krylov import Goal, block_krylov
from opdgeo.numerics.operators import DenseMatrix


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

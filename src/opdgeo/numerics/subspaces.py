"""Subspaces: the angles between two, and the projection of a matrix on one.

A basis has orthonormal columns: (cols, K) for the side `right`, where it acts on a (rows, cols) matrix as M V Vᵀ, and
(rows, K) for `left`, as U Uᵀ M. K may be 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from opdgeo.numerics.devices import solved
from opdgeo.numerics.lapack import gram_matrix
from opdgeo.numerics.operators import MatrixOperator

Side = Literal["right", "left"]


def largest_rank(rows: int, cols: int) -> int:
    """The largest rank whose leading subspaces are compared: half the smaller side, at least 1.

    Beyond half, two subspaces of an n-dimensional space meet whatever they are, and angles say little.

    >>> largest_rank(10, 7), largest_rank(1, 5)
    (3, 1)
    """
    return max(1, min(rows, cols) // 2)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles in radians, ascending, between the column spaces of two orthonormal (n, k) matrices: (k,), on
    the host.

    From cosines σ(AᵀB) where the angle is large and from sines σ(B − A(AᵀB)) where it is small, so that nearly
    identical subspaces keep full relative accuracy (Björck and Golub, 1973). The sines come from the Gram matrix of
    B − A(AᵀB) where all are within five digits of the largest, else from its triangular factor.

    Laws: symmetric in its arguments; unchanged by a rotation of both, and by another basis of either.

    >>> a = torch.eye(3, 1, dtype=torch.float64); b = torch.tensor([[1.0], [1e-9], [0.0]], dtype=torch.float64)
    >>> round(float(principal_angles(a, b)[0]) * 1e9, 6)
    1.0
    """
    inner = first.T @ second
    apart = torch.addmm(second, first, inner, alpha=-1)
    squares = solved(torch.linalg.eigvalsh, gram_matrix(apart), UPLO="U").cpu()
    if float(squares[0]) > 1e-10 * float(squares[-1]):
        sines = squares.sqrt().clamp(max=1.0)
    else:  # angles of very different size: the squares of the small ones are lost
        if apart.shape[0] > apart.shape[1]:
            apart = torch.linalg.qr(apart, mode="r").R
        sines = solved(torch.linalg.svdvals, apart).cpu().clamp(max=1.0).flip(0)
    if float(sines[-1]) ** 2 <= 0.5:  # all small
        return torch.asin(sines)
    cosines = solved(torch.linalg.svdvals, inner).cpu().clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def project(matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
    """M V Vᵀ (right) or U Uᵀ M (left) of a (rows, cols) matrix, in its dtype.

    Law: projecting twice equals once.

    >>> project(torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), "right")
    tensor([[1., 0.]])
    """
    return (matrix @ basis) @ basis.T if side == "right" else basis @ (basis.T @ matrix)


def orthonormal(basis: Tensor) -> Tensor:
    """The same subspace with columns orthonormal in float64: a stored basis is so only to float32."""
    return torch.linalg.qr(basis.double()).Q


def share_outside(delta: MatrixOperator, basis: Tensor, side: Side) -> float:
    """‖ΔW − projection‖²_F / ‖ΔW‖²_F in float64, from the part outside itself, so that tiny shares keep their digits.

    A block of rows at a time.

    Args:
        delta: (rows, cols), not zero, and not sharded.
        basis: orthonormal in float64.
    """
    inside = None if side == "right" else delta.T @ basis  # (cols, K)
    outside, start = [], 0
    for block in delta.row_blocks():
        if inside is None:
            block = block - (block @ basis) @ basis.T
        else:
            block = block - basis[start : start + len(block)] @ inside.T
        start += len(block)
        outside.append(float(torch.linalg.vector_norm(block / delta.norm)))
    return math.hypot(*outside) ** 2

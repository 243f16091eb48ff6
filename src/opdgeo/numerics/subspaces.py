"""Projection of a matrix on a subspace of its rows' or columns' space, and how much of it lies outside.

A basis has orthonormal columns: (cols, K) for the side `right`, where it acts on a (rows, cols) matrix as M V Vᵀ, and
(rows, K) for `left`, as U Uᵀ M. K may be 0.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from opdgeo.numerics.spectra import Difference, Factors

Side = Literal["right", "left"]


def project(matrix: Tensor, basis: Tensor, side: Side) -> Tensor:
    """M V Vᵀ (right) or U Uᵀ M (left), in the dtype of `matrix`.

    Law: projecting twice equals once.

    >>> project(torch.ones(1, 2), torch.tensor([[1.0], [0.0]]), "right")
    tensor([[1., 0.]])
    """
    return (matrix @ basis) @ basis.T if side == "right" else basis @ (basis.T @ matrix)


def orthonormal(basis: Tensor) -> Tensor:
    """The same subspace with columns orthonormal in float64: a stored basis is so only to float32."""
    return torch.linalg.qr(basis.double()).Q


def share_outside(delta: Difference | Factors, basis: Tensor, side: Side) -> float:
    """‖ΔW − projection‖²_F / ‖ΔW‖²_F in float64, from the part outside itself, so that tiny shares keep their digits.

    `basis` is orthonormal in float64, and `delta` moved and not transposed. A block of rows at a time.
    """
    inside = None if side == "right" else delta.T @ basis  # (cols, K)
    outside, start = [], 0
    for block in delta.blocks():
        if inside is None:
            block = block - (block @ basis) @ basis.T
        else:
            block = block - basis[start : start + len(block)] @ inside.T
        start += len(block)
        outside.append(float(torch.linalg.vector_norm(block / delta.norm)))
    return math.hypot(*outside) ** 2

"""Singular values, leading singular subspaces and the angles between them, each with an error bound: the door to the spectral numerics.

`spectrum` gives all singular values, `truncated_svd` the top k triplets. This file holds the choice between the methods; each
method is a file of its own, and `certificates.py` says what each guarantees:

    smaller side    `spectrum`                          `truncated_svd`
    below SMALL     dense                               as `spectrum`
    below KRYLOV    gram, or dense where it gives up    as `spectrum`
    from KRYLOV on  gram, or dense where it gives up    krylov, or as `spectrum` where it does not converge

A low-rank matrix of any size has its own: the SVD of its r × r core (`LowRankMatrix.structured_svd`).
What other packages use of the spectral numerics is imported from here.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from opdgeo.numerics.certificates import EPS, Spectrum, angle_error, truncation_error
from opdgeo.numerics.dense import by_svd
from opdgeo.numerics.gram import by_gram
from opdgeo.numerics.krylov import OVERSAMPLING, Goal, block_krylov
from opdgeo.numerics.operators import DenseMatrix, Difference, LowRankMatrix, MatrixOperator
from opdgeo.numerics.subspaces import principal_angles

__all__ = [
    "EPS",
    "KRYLOV",
    "DenseMatrix",
    "Difference",
    "LowRankMatrix",
    "MatrixOperator",
    "Spectrum",
    "angle_error",
    "principal_angles",
    "spectrum",
    "truncated_svd",
    "truncation_error",
]

SMALL = 150  # below this smaller side an SVD costs little
KRYLOV = 1200  # below this one, all of a spectrum costs as little as its top


def spectrum(matrix: Tensor, rank: int) -> Spectrum:
    """All singular values of a float64 (rows, cols) matrix and its leading `rank` singular vectors (0: none).

    >>> found = spectrum(torch.tensor([[0.0, 2.0], [1.0, 0.0]], dtype=torch.float64), rank=1)
    >>> found.sigma.tolist(), found.right.abs().flatten().tolist()
    ([2.0, 1.0], [0.0, 1.0])
    """
    if min(matrix.shape) < SMALL:
        return by_svd(matrix, rank)
    scaled, exponent = _in_range(matrix)
    found = by_gram(scaled, rank) if exponent is not None else None
    return by_svd(matrix, rank) if found is None else found.times_power_of_two(exponent or 0)


def truncated_svd(
    matrix: MatrixOperator,
    k: int,
    *,
    tolerance: float = 3e-10,
    angle: float = 1e-5,
    start: Tensor | None = None,
    rank: int | None = None,
) -> Spectrum:
    """The top k singular triplets of a (rows, cols) matrix; of a small one, all singular values.

    A Krylov iteration runs until the values are known to `tolerance`·σ₁ and the subspaces of rank `rank` to `angle`, both measured
    from the residual of the triplets themselves. Where it does not get there within a basis that costs as much as the dense
    methods, they answer, and `method` says so.

    Args:
        angle: as sin Θ, as far as the caller needs the vectors; `math.inf`: not at all, and a dense method returns none.
        start: (cols, any) directions expected near the leading right ones, such as those of an earlier checkpoint.
        rank: the rank, at most k (the default), whose subspaces are to be that well known.
    """
    known = matrix.structured_svd(k)
    if known is not None:
        return known
    size = min(matrix.shape)
    vectors = min(k, size) if angle < math.inf else 0
    basis = min(size // 3, 64 * (k + OVERSAMPLING))
    if size < KRYLOV or basis < 4 * (k + OVERSAMPLING):
        return spectrum(matrix.dense(), vectors)
    scaled, exponent = _operator_in_range(matrix)
    goal = Goal(k, rank or k, tolerance, angle, basis)
    found = block_krylov(scaled, goal, start) if exponent is not None else None
    if found is not None:
        return found.times_power_of_two(exponent or 0)
    dense = spectrum(matrix.dense(), vectors)
    return replace(dense, method=f"{dense.method} (krylov did not converge)")


def _operator_in_range(matrix: MatrixOperator) -> tuple[MatrixOperator, int | None]:
    if 1e-100 < matrix.norm < 1e100:
        return matrix, 0
    scaled, exponent = _in_range(matrix.dense())
    return DenseMatrix(scaled), exponent


def _in_range(matrix: Tensor) -> tuple[Tensor, int | None]:
    """The matrix times 2^−exponent where its squares could over- or underflow, else itself, and the exponent; None for a zero matrix."""
    largest = float(torch.linalg.vector_norm(matrix, ord=math.inf))
    if not largest > 0:
        return matrix, None
    if 1e-100 < largest < 1e100:
        return matrix, 0
    exponent = math.frexp(largest)[1]
    half = -exponent // 2  # 2^−exponent itself may not be a float
    return matrix * math.ldexp(1.0, half) * math.ldexp(1.0, -exponent - half), exponent

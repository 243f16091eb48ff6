"""Singular values, leading singular subspaces and the angles between them, each with an error bound.

Everything is float64. A computed factorisation is exact for a matrix within ‖E‖₂ ≤ ε of the given one (backward
stability); every bound below follows from that ε by a perturbation theorem:

    singular values   |σ̂ᵢ − σᵢ| ≤ ε                                     (Weyl)
    subspace of rank k   sin Θ ≤ ε / (σₖ − σₖ₊₁ − ε), at most 1            (Wedin)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of a (rows, cols) matrix.

    Attributes:
        sigma: all min(rows, cols) singular values, descending.
        left: (rows, k) leading left singular vectors; k may be 0.
        right: (cols, k) leading right singular vectors.
        error: ε, a bound on the error of every singular value.
        method: how it was computed.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    error: float
    method: str

    def subspace_error(self, k: int, side: str) -> float:
        """A bound on sin Θ between the computed and the exact leading subspace of rank k; 1 when it is not determined."""
        size = (self.left if side == "left" else self.right).shape[0]
        if k >= size:  # the whole space
            return 0.0
        below = float(self.sigma[k]) if k < len(self.sigma) else 0.0
        gap = float(self.sigma[k - 1]) - below - self.error
        return 1.0 if gap <= self.error else min(1.0, self.error / gap)


def svd_error(rows: int, cols: int, sigma_max: float) -> float:
    """ε of a float64 LAPACK factorisation: a small multiple of the unit roundoff times the largest dimension and σ₁."""
    return EPS * (8 + max(rows, cols)) * sigma_max


def spectrum(matrix: Tensor, rank: int) -> Spectrum:
    """All singular values of a float64 (rows, cols) matrix and its leading `rank` singular vectors (0: none)."""
    rows, cols = matrix.shape
    if rank:
        left, sigma, right_t = torch.linalg.svd(matrix, full_matrices=False)
        left, right, method = left[:, :rank].contiguous(), right_t[:rank].T.contiguous(), "svd"
    else:
        sigma = torch.linalg.svdvals(matrix)
        left, right, method = matrix.new_empty(rows, 0), matrix.new_empty(cols, 0), "svdvals"
    return Spectrum(sigma, left, right, svd_error(rows, cols, float(sigma[0])), method)


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles in radians, ascending, between the column spaces of two orthonormal (n, k) matrices.

    From cosines σ(AᵀB) where the angle is large and from sines σ(B − A(AᵀB)) where it is small, so that nearly
    identical subspaces keep full relative accuracy (Björck and Golub, 1973).

    >>> a = torch.eye(3, 1, dtype=torch.float64); b = torch.tensor([[1.0], [1e-9], [0.0]], dtype=torch.float64)
    >>> round(float(principal_angles(a, b)[0]) * 1e9, 6)
    1.0
    """
    inner = first.T @ second
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    sines = torch.linalg.svdvals(second - first @ inner).clamp(max=1.0)
    sines = sines.flip(0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def angle_error(first: Spectrum, second: Spectrum, k: int, side: str) -> float:
    """A bound in radians on the error of every principal angle between two computed subspaces (triangle inequality).

    π/2 where either subspace is not determined.
    """
    total = sum(math.asin(s.subspace_error(k, side)) for s in (first, second)) + 4 * EPS * k
    return min(total, math.pi / 2)


def truncation_error(spectrum: Spectrum, k: int) -> float:
    """A bound on ‖Ŵₖ − Wₖ‖₂ between the computed and the exact best rank-k approximation; inf if not determined."""
    below = float(spectrum.sigma[k]) if k < len(spectrum.sigma) else 0.0
    gap = float(spectrum.sigma[k - 1]) - below - spectrum.error
    if gap <= spectrum.error:
        return math.inf
    return spectrum.error * (2 + 8 * float(spectrum.sigma[k - 1]) / gap)

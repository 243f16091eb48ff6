"""`Spectrum`: singular values and vectors with what is known of their error, and the perturbation theorems that say so.

A method returns the exact decomposition of a matrix close to the given one. How close, and what follows from it:

    dense    exact for a matrix within ‖E‖₂ ≤ ε of the given one, so |σ̂ᵢ − σᵢ| ≤ ε                                (Weyl, 1912)
    gram     exact for a Gram matrix within δ = γσ₁² of the given one, so |σ̂ᵢ − σᵢ| ≤ δ/(σ̂ᵢ + √(σ̂ᵢ² − δ))      (Weyl, 1912)
    krylov   from the residual R of its triplets: |σ̂ᵢ − σᵢ| ≤ 2ρ²/(η + √(η² + 4ρ²)), ρ = ‖R‖₂, η the gap below   (Li and Li, 2005)
    vectors  the subspace of rank k: sin Θ ≤ ν/(σₖ − σₖ₊₁ − ν), at most 1, with the noise ν = ε, δ/σₖ or ρ        (Davis and Kahan,
             1970; Wedin, 1972)

ε and γ are small multiples of the unit roundoff that cover rounding with a margin; tests hold them against planted truth.
Everything is float64. Sizes of matrices are in entries, angles in radians.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Spectrum:
    """Singular values of a (rows, cols) matrix and its leading singular vectors, in float64.

    Law: |sigma − exact| ≤ errors ≤ error for every value, and sin Θ between the computed and the exact leading subspace of rank
    k is at most `subspace_error(k, side)`.

    Attributes:
        sigma: singular values, descending, on the host: all min(rows, cols), or the top ones alone (`spectra.truncated_svd`).
        left: (rows, k) leading left singular vectors; k may be 0.
        right: (cols, k) leading right singular vectors.
        error: a bound on the error of every singular value in `sigma`.
        method: how it was computed.
        errors: a bound for each singular value, on the host; the smallest of a Gram matrix are the least certain.
        residual: absolute part of the noise in the vectors.
        gram: γ, noise in the vectors relative to σ₁² of the squared matrix.
        tail_bound: a bound on every singular value that `sigma` does not list.
        floor: what the rounding of the stored weights alone gives; the vectors of values up to here are of that rounding.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor
    error: float
    method: str
    errors: Tensor
    residual: float
    gram: float = 0.0
    tail_bound: float = 0.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        # Few numbers, each of which is looked at: on a GPU every look would wait for all work before it.
        object.__setattr__(self, "sigma", self.sigma.cpu())
        object.__setattr__(self, "errors", self.errors.cpu())

    def below(self, k: int) -> float:
        """σₖ₊₁, or a bound on it where it is not listed."""
        return float(self.sigma[k]) if k < len(self.sigma) else self.tail_bound

    def noise(self, k: int) -> float:
        """The spectral norm of a perturbation of the matrix that explains what rounding did to the top-k vectors."""
        if self.gram == 0:
            return self.residual
        largest, smallest = float(self.sigma[0]), float(self.sigma[k - 1])
        return self.residual + self.gram * largest * (largest / smallest) if smallest > 0 else math.inf

    def subspace_error(self, k: int, side: str) -> float:
        """A bound on sin Θ between the computed and the exact leading subspace of rank k; 1 when it is not determined.

        Args:
            k: the rank, at most the number of listed values.
            side: "left" or "right".
        """
        size = (self.left if side == "left" else self.right).shape[0]
        if k >= size:  # the whole space
            return 0.0
        noise = self.noise(k)
        gap = float(self.sigma[k - 1]) - self.below(k) - noise
        return 1.0 if gap <= noise else min(1.0, noise / gap)

    def swapped(self) -> Spectrum:
        """The spectrum of the transposed matrix: left and right exchanged."""
        return replace(self, left=self.right, right=self.left)

    def times_power_of_two(self, exponent: int) -> Spectrum:
        """The spectrum of the matrix times 2^exponent. Exact; the power itself need not be a float."""
        if exponent == 0:
            return self
        first, second = math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)
        return replace(
            self,
            sigma=self.sigma * first * second,
            errors=self.errors * first * second,
            error=self.error * first * second,
            residual=self.residual * first * second,
            tail_bound=self.tail_bound * first * second,
        )


def svd_error(rows: int, cols: int, sigma_max: float) -> float:
    """ε of a float64 LAPACK factorisation: a small multiple of the unit roundoff times the largest dimension and σ₁."""
    return EPS * (32 + max(rows, cols)) * sigma_max


def gram_error(rows: int, cols: int) -> float:
    """γ: rounding of a float64 Gram matrix and of its eigenproblem, relative to σ₁². Errors of sums add up like √n."""
    return EPS * (16 + 2 * math.sqrt(rows + cols))


def residual_error(rho: float, gap: float) -> float:
    """A bound on the error of singular values whose triplets have the residual norm ρ and lie η = `gap` from all others:
    2ρ²/(η + √(η² + 4ρ²)) (Li and Li, 2005)."""
    return 2 * rho**2 / (gap + math.hypot(gap, 2 * rho))


def angle_error(first: Spectrum, second: Spectrum, k: int, side: str) -> float:
    """A bound in radians on the error of every principal angle between two computed subspaces of rank k (triangle inequality).

    π/2 where either subspace is not determined. `side`: "left" or "right".
    """
    total = sum(math.asin(s.subspace_error(k, side)) for s in (first, second)) + 4 * EPS * k
    return min(total, math.pi / 2)


def truncation_error(spectrum: Spectrum, k: int) -> float:
    """A bound on ‖Ŵₖ − Wₖ‖₂ between the computed and the exact best rank-k approximation; inf if not determined."""
    noise = spectrum.noise(k)
    gap = float(spectrum.sigma[k - 1]) - spectrum.below(k) - noise
    if gap <= noise:
        return math.inf
    return noise * (2 + 8 * float(spectrum.sigma[k - 1]) / gap)

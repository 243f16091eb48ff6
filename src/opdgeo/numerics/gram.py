"""The Gram method: eigenvalues λ = σ² and top eigenvectors V of the smaller WᵀW, the other side as W V Σ⁻¹.

Exact for a Gram matrix within δ = γσ₁² of the given one (`certificates.gram_error`): large singular values and their vectors are as good
as an SVD's, at a fraction of its cost. Values so small that δ would drown them come from an inverse iteration on W itself, with the
residual of their triplets. Where that ends too, from `svdvals`; where the vectors would be noise, the method gives up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdgeo.numerics.certificates import EPS, Spectrum, gram_error, residual_error, svd_error
from opdgeo.numerics.devices import solve, solved
from opdgeo.numerics.lapack import EigenError, eigen, gram_matrix

CONDITION = 1e6  # beyond it the Gram matrix does not hold the small singular values
SMALLEST = 64  # so many small values are worth an inverse iteration


def by_gram(matrix: Tensor, rank: int) -> Spectrum | None:
    """All singular values and the vectors of the leading `rank` (0: none); None where the method cannot bear this matrix.

    Args:
        matrix: (rows, cols) float64, not zero, with entries whose squares neither over- nor underflow.
    """
    rows, cols = matrix.shape
    tall = matrix if rows >= cols else matrix.T
    found = _eigen(tall, rank)
    if found is None:
        return None
    squares, inner, where = found
    relative, on_device, squares = gram_error(rows, cols), squares[:rank], squares.cpu()
    largest = float(squares[0])
    sigma, method = squares.clamp(min=0).sqrt(), "gram" + where
    outer, lost = tall.new_empty(tall.shape[0], 0), 0.0
    if rank:
        if float(squares[rank - 1]) * CONDITION**2 < largest:  # W V would hold nothing but noise
            return None
        images = tall @ inner
        # The residual ‖WᵀW V − VΛ‖_F of the eigenpairs, from four random combinations of them.
        mix = torch.randn(rank, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(matrix.device)
        missed = tall.T @ (images @ mix) - inner @ (on_device[:, None] * mix)
        lost = float(torch.linalg.vector_norm(missed)) / 2 / largest
        if not lost <= 4 * relative * math.sqrt(rank):
            return None
        outer = images.div_(on_device.sqrt())
        if 4 * EPS * largest > 1e-12 * float(squares[rank - 1]):  # else orthonormal enough as they are
            outer = _orthonormalised(outer)
    noise = relative * largest
    errors = noise / (sigma + (squares - noise).clamp(min=0).sqrt()) + 4 * EPS * sigma
    if float(squares[-1]) * CONDITION**2 < largest:
        smallest = _smallest(tall, sigma, errors)
        if smallest is None:
            sigma, last = solve(torch.linalg.svdvals, matrix)
            sigma = sigma.cpu()
            method = f"gram{where}, svdvals{last}"
            errors = torch.full_like(sigma, svd_error(rows, cols, float(sigma[0])))
        else:
            count = len(smallest[0])
            sigma, errors = torch.cat([sigma[:-count], smallest[0]]), torch.cat([errors[:-count], smallest[1]])
            method = f"gram{where}, inverse iteration"
    left, right = (outer, inner) if rows >= cols else (inner, outer)
    return Spectrum(sigma, left, right, float(errors.max()), method, errors, 0.0, relative + lost)


def _eigen(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, str] | None:
    """`eigen` of AᵀA and where it was found: a GPU whose solver fails leaves it to the CPU. None where that fails too."""
    try:
        return *eigen(gram_matrix(tall), rank), ""
    except EigenError:
        if tall.device.type == "cpu":
            return None
    try:
        values, vectors = eigen(gram_matrix(tall.cpu()), rank)
    except EigenError:
        return None
    return values.to(tall.device), vectors.to(tall.device), " on the CPU"


def _smallest(tall: Tensor, sigma: Tensor, errors: Tensor) -> tuple[Tensor, Tensor] | None:
    """The smallest singular values, which the Gram matrix does not hold, and their errors; None where they are not found.

    An inverse iteration with a block of vectors. The values lie below all that the Gram matrix vouches for, with a gap η; the
    residual R of their triplets bounds their error (`certificates.residual_error`).

    Args:
        tall: (rows, n) with rows ≥ n.
        sigma: (n,) singular values from the Gram matrix, descending.
        errors: (n,) their bounds.
    """
    n, largest = len(sigma), float(sigma[0])
    count = int((sigma * CONDITION < largest).sum())
    if count > min(SMALLEST, n // 4):
        return None
    # Cut at the widest gap nearby.
    lower = (sigma - errors).clamp(min=0)
    count = max(range(count, min(count + 9, n)), key=lambda c: float(lower[n - c - 1] / (sigma[n - c] + EPS * largest)))
    square = tall if tall.shape[0] == n else torch.linalg.qr(tall, mode="r").R
    factors, pivots, info = torch.linalg.lu_factor_ex(square)
    if int(info) != 0:
        return None
    rounding = gram_error(tall.shape[0], n) * largest
    if square is not tall:
        rounding += svd_error(tall.shape[0], n, largest)
    block = torch.randn(n, min(count + 16, n), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = block.to(tall.device)
    for _ in range(12):
        halfway = torch.linalg.lu_solve(factors, pivots, block, adjoint=True)
        block = torch.linalg.lu_solve(factors, pivots, torch.linalg.qr(halfway).Q)
        if not bool(torch.isfinite(block).all()):
            return None
        block = torch.linalg.qr(block).Q
        outer, triangle = torch.linalg.qr(square @ block)
        turn, small, back = solved(torch.linalg.svd, triangle)
        left, right = (outer @ turn)[:, -count:], (block @ back.T)[:, -count:]
        residual = square.T @ left - right * small[-count:]
        small = small.cpu()
        rho = float(torch.linalg.vector_norm(residual))
        gap = float(lower[n - count - 1] - small[-count])
        error = residual_error(rho, gap) + rounding
        if rho < gap and error <= rounding + 1e-12 * largest:
            return small[-count:], torch.full_like(small[-count:], error)
    return None


def _orthonormalised(nearly: Tensor) -> Tensor:
    """An orthonormal basis of the span of nearly orthonormal columns, each close to its own."""
    overlap = nearly.T @ nearly
    if float(torch.linalg.matrix_norm(overlap - torch.eye(len(overlap)).to(overlap))) > 1e-8:
        basis, triangle = torch.linalg.qr(nearly)
        return basis * torch.sign(triangle.diagonal())
    return torch.addmm(nearly, nearly, overlap, beta=1.5, alpha=-0.5)  # a Newton step towards the nearest one

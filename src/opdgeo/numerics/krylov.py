"""The Krylov method: the top k singular triplets alone, by a block Krylov iteration on MᵀM.

Float32 finds the subspace; float64 goes on from there only as far as needed. What is returned is measured at the end: the residual
R = MᵀU − VΣ of the triplets, in float64, bounds the error of the values and of the subspaces (`certificates`).

Blocks of k + 8 random vectors, so that values repeated up to k + 8 times are all found; every new block is orthogonalised twice
against all earlier ones (Golub and Underwood, 1977; block Lanczos with full reorthogonalisation).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from opdgeo.numerics.certificates import Spectrum, gram_error, svd_error
from opdgeo.numerics.devices import float32_products, solved
from opdgeo.numerics.operators import MatrixOperator

OVERSAMPLING = 8  # vectors of a block beyond k


@dataclass(frozen=True)
class Goal:
    """What an iteration is asked for.

    Attributes:
        k: triplets.
        rank: the rank, at most k, whose subspaces are to be known to `angle`.
        tolerance: of the values, relative to σ₁.
        angle: of the subspaces, as sin Θ; inf: any.
        basis: columns that the basis may grow to.
    """

    k: int
    rank: int
    tolerance: float
    angle: float
    basis: int

    @property
    def width(self) -> int:
        """Vectors of a block."""
        return self.k + OVERSAMPLING


def block_krylov(matrix: MatrixOperator, goal: Goal, start: Tensor | None = None) -> Spectrum | None:
    """The top k triplets of a (rows, cols) matrix; None where the basis that `goal` allows does not get there.

    Args:
        matrix: not zero, with entries whose squares neither over- nor underflow.
        start: (cols, any) directions expected near the leading right ones.
    """
    rows, cols = matrix.shape
    tall = matrix if rows >= cols else matrix.T  # the basis lives on the smaller side
    n, width = tall.shape[1], goal.width
    block = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(matrix.device)
    if start is not None:
        near = start if rows >= cols else matrix @ start
        near = near[:, :width] / torch.linalg.vector_norm(near[:, :width], dim=0).clamp(min=1e-300)
        block[:, : near.shape[1]] = near + 1e-3 * block[:, : near.shape[1]] / math.sqrt(n)
    norm = tall.norm
    single = tall.normalised()
    with float32_products(matrix.device):
        for work, scale in ((single, norm), (tall, 1.0)):
            for directions, next_value in _ritz(work, goal, block.float() if work is single else block):
                found = _measured(tall, directions.double(), next_value * scale, goal.k)
                largest = float(found.sigma[0])
                known = found.error <= 2 * goal.tolerance * largest + svd_error(rows, cols, largest)
                if known and (goal.angle == math.inf or found.subspace_error(goal.rank, "right") <= 2 * goal.angle):
                    return found if rows >= cols else found.swapped()
                block = directions.double()
    return None


def _ritz(tall: MatrixOperator, goal: Goal, start: Tensor) -> Iterator[tuple[Tensor, float]]:
    """Leading right Ritz directions of `tall`, and the next Ritz value, whenever they look good enough to be measured.

    Args:
        tall: (rows, n) with rows ≥ n, in the type to work in.
        start: (n, width), in the same type.
    """
    k, width, limit = goal.k, goal.width, goal.basis
    n, quick = tall.shape[1], start.dtype == torch.float32
    exhausted = 5e-7 if quick else 0.0  # a residual below this, relative to σ₁, is rounding
    basis = start.new_empty(n, limit)
    inner = torch.zeros(limit, limit, dtype=torch.float64, device=start.device)  # Qᵀ MᵀM Q
    block, _ = torch.linalg.qr(start)
    used, check = 0, 4 * width if quick else width
    while used + width <= limit:
        basis[:, used : used + width] = block
        used += width
        known = basis[:, :used]
        image = tall.gram_product(block)
        inside = known.T @ image
        inner[:used, used - width : used], inner[used - width : used, :used] = inside.double(), inside.T.double()
        image = image - known @ inside
        image = image - known @ (known.T @ image)
        block, beyond = torch.linalg.qr(image)
        # Where the space is exhausted, `qr` returns directions of its own choice.
        block = block - known @ (known.T @ block)
        block, again = torch.linalg.qr(block)
        if used < check and used + width <= limit:
            continue
        check = max(used + width, int(1.12 * used))
        squares, mixing = solved(torch.linalg.eigh, (inner[:used, :used] + inner[:used, :used].T) / 2)
        squares, mixing = squares.flip(0)[: width + 1].clamp(min=0), mixing.flip(1)[:, :width]
        on_device = squares.sqrt()
        sigma = on_device.cpu()
        floor = max(1e-8 * float(sigma[0]), 1e-300)
        missed = (again @ beyond).double() @ mixing[-width:] / on_device[:width].clamp(min=floor)
        if len(sigma) <= width:
            sigma = torch.cat([sigma, sigma[-1:]])
        values, subspace = _ritz_errors(sigma, missed, k, goal.rank)
        done = float(values.max()) <= goal.tolerance * float(sigma[0]) and subspace <= goal.angle
        spent = float(torch.linalg.vector_norm(missed[:, :k])) <= exhausted * float(sigma[0])
        # Cheap estimates first; only triplets that look done are measured.
        if done or spent or (exhausted and used + width > limit):
            yield known @ mixing.to(known.dtype), float(sigma[width])
            if exhausted:
                return


def _ritz_errors(sigma: Tensor, residual: Tensor, k: int, rank: int) -> tuple[Tensor, float]:
    """Bounds on the top k Ritz values and on sin Θ of the subspace of rank `rank`, from all (≥ k + 1) Ritz values and residuals.

    The values' bound is quadratic in the residual of the leading ℓ ≥ k triplets over the gap below them; the best ℓ counts.
    """
    sizes, sigma = torch.linalg.vector_norm(residual, dim=0).cpu(), sigma.cpu()  # few numbers, looked at one by one
    count = min(residual.shape[1], len(sigma) - 1)
    best = sigma.new_full((k,), math.inf)
    subspace = 1.0
    for ell in (e for e in sorted({rank, *range(k, count)}) if e < count):
        rho = float(torch.linalg.vector_norm(sizes[:ell]))
        following = float(sigma[ell]) + float(sizes[ell])
        gap = (sigma[:k] - following).clamp(min=0)
        if ell == rank:
            room = float(sigma[rank - 1]) - following - rho
            subspace = 1.0 if room <= rho else rho / room
        if ell < k:
            continue
        if rho == 0:
            best = torch.zeros_like(best)
        else:
            best = torch.minimum(best, 2 * rho**2 / (gap + (gap**2 + 4 * rho**2).sqrt()))
    return best, subspace


def _measured(tall: MatrixOperator, directions: Tensor, next_value: float, k: int) -> Spectrum:
    """The triplets in the span of the (n, width) `directions`, their residual measured in full; `next_value`: the next Ritz value."""
    rows, cols = tall.shape
    directions, _ = torch.linalg.qr(directions)
    outer, triangle = torch.linalg.qr(tall @ directions)
    turn, sigma, back = solved(torch.linalg.svd, triangle)
    left, right = outer @ turn, directions @ back.T
    residual = tall.T @ left - right * sigma
    known = torch.cat([sigma, sigma.new_tensor([next_value])])
    errors, _ = _ritz_errors(known, residual, k, k)
    rounding = gram_error(rows, cols) * float(sigma[0])
    errors, sigma = errors + rounding, sigma.cpu()
    noise = float(torch.linalg.vector_norm(residual[:, :k])) + rounding
    following = float(sigma[k]) + float(torch.linalg.vector_norm(residual[:, k]))
    return Spectrum(
        sigma[:k],
        left[:, :k].contiguous(),
        right[:, :k].contiguous(),
        float(errors.max()),
        "krylov",
        errors,
        noise,
        tail_bound=following,
    )

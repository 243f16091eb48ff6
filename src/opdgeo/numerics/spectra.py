"""Singular values, leading singular subspaces and the angles between them, each with an error bound.

Everything is float64. Three roads to a `Spectrum`:

    svd      small or ill-conditioned matrices. Exact for a matrix within ‖E‖₂ ≤ ε of the given one.
    gram     eigenvalues λ = σ² and top eigenvectors of the smaller WᵀW, the other side as W V. Exact for a Gram matrix
             within δ = γσ₁² of the given one. Values so small that δ would drown them come from an inverse iteration on
             W itself, with the residual R = WᵀU − VΣ of their triplets (`gram, inverse iteration`).
    factors  a product of two thin matrices (`Factors`): the SVD of its core. Exact for a core within ‖E‖₂ ≤ ε of the given one.
    krylov   the top k alone (`leading`), found in float32, finished in float64, with R measured at the end.

What follows from them, by perturbation theorems:

    values       svd  |σ̂ᵢ − σᵢ| ≤ ε;    gram  |σ̂ᵢ − σᵢ| ≤ δ/(σ̂ᵢ + √(σ̂ᵢ² − δ))                     (Weyl)
                 krylov  2ρ²/(η + √(η² + 4ρ²)), ρ = ‖R‖₂ and η the gap below                     (Li and Li, 2005)
    subspace of rank k   sin Θ ≤ ν/(σₖ − σₖ₊₁ − ν), at most 1, with the noise ν = ε, δ/σₖ or ρ     (Davis–Kahan, Wedin)

ε and γ are small multiples of the unit roundoff that cover rounding with a margin (tests hold them against planted truth).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opdgeo.numerics.lapack import EigenError, eigen, gram

EPS = torch.finfo(torch.float64).eps
SMALL = 150  # below this smaller side an SVD costs little
KRYLOV = 1200  # below this one, all of a spectrum costs as little as its top
CONDITION = 1e6  # beyond it the Gram matrix does not hold the small singular values
SMALLEST = 64  # so many small values are worth an inverse iteration


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of a (rows, cols) matrix.

    Attributes:
        sigma: singular values, descending: all min(rows, cols), or the top ones alone (`leading`).
        left: (rows, k) leading left singular vectors; k may be 0.
        right: (cols, k) leading right singular vectors.
        error: a bound on the error of every singular value in `sigma`.
        method: how it was computed.
        errors: a bound for each singular value; the smallest of a Gram matrix are the least certain.
        residual: absolute part of the noise in the vectors.
        gram: γ, noise in the vectors relative to σ₁² of the squared matrix.
        rest: a bound on every singular value that `sigma` does not list.
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
    rest: float = 0.0
    floor: float = 0.0

    def below(self, k: int) -> float:
        """σₖ₊₁, or a bound on it where it is not listed."""
        return float(self.sigma[k]) if k < len(self.sigma) else self.rest

    def noise(self, k: int) -> float:
        """The size of a perturbation of the matrix that explains what rounding did to the top-k vectors."""
        if self.gram == 0:
            return self.residual
        largest, smallest = float(self.sigma[0]), float(self.sigma[k - 1])
        return self.residual + self.gram * largest * (largest / smallest) if smallest > 0 else math.inf

    def subspace_error(self, k: int, side: str) -> float:
        """A bound on sin Θ between the computed and the exact leading subspace of rank k; 1 when it is not determined."""
        size = (self.left if side == "left" else self.right).shape[0]
        if k >= size:  # the whole space
            return 0.0
        noise = self.noise(k)
        gap = float(self.sigma[k - 1]) - self.below(k) - noise
        return 1.0 if gap <= noise else min(1.0, noise / gap)


def svd_error(rows: int, cols: int, sigma_max: float) -> float:
    """ε of a float64 LAPACK factorisation: a small multiple of the unit roundoff times the largest dimension and σ₁."""
    return EPS * (32 + max(rows, cols)) * sigma_max


def gram_error(rows: int, cols: int) -> float:
    """γ: rounding of a float64 Gram matrix and of its eigenproblem, relative to σ₁². Errors of sums add up like √n."""
    return EPS * (16 + 2 * math.sqrt(rows + cols))


def spectrum(matrix: Tensor, rank: int) -> Spectrum:
    """All singular values of a float64 (rows, cols) matrix and its leading `rank` singular vectors (0: none)."""
    if min(matrix.shape) < SMALL:
        return _by_svd(matrix, rank)
    scaled, exponent, largest = _scaled(matrix)
    found = _by_gram(scaled, rank) if largest > 0 else None
    return _unscaled(found, exponent) if found is not None else _by_svd(matrix, rank)


def _by_svd(matrix: Tensor, rank: int) -> Spectrum:
    rows, cols = matrix.shape
    if rank:
        left, sigma, right_t = torch.linalg.svd(matrix, full_matrices=False)
        left, right, method = left[:, :rank].contiguous(), right_t[:rank].T.contiguous(), "svd"
    else:
        sigma = torch.linalg.svdvals(matrix)
        left, right, method = matrix.new_empty(rows, 0), matrix.new_empty(cols, 0), "svdvals"
    error = svd_error(rows, cols, float(sigma[0]))
    return Spectrum(sigma, left, right, error, method, torch.full_like(sigma, error), error)


def _by_gram(matrix: Tensor, rank: int) -> Spectrum | None:
    """The Gram road, or None where it cannot bear this matrix."""
    rows, cols = matrix.shape
    tall = matrix if rows >= cols else matrix.T
    try:
        squares, inner = eigen(gram(tall), rank)
    except EigenError:
        return None
    relative = gram_error(rows, cols)
    largest = float(squares[0])
    sigma, method = squares.clamp(min=0).sqrt(), "gram"
    outer, lost = tall.new_empty(tall.shape[0], 0), 0.0
    if rank:
        if float(squares[rank - 1]) * CONDITION**2 < largest:  # W V would hold nothing but noise
            return None
        images = tall @ inner
        # The residual ‖WᵀW V − VΛ‖_F of the eigenpairs, from four random combinations of them.
        mix = torch.randn(rank, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(matrix.device)
        missed = tall.T @ (images @ mix) - inner @ (squares[:rank, None] * mix)
        lost = float(torch.linalg.vector_norm(missed)) / 2 / largest
        if not lost <= 4 * relative * math.sqrt(rank):
            return None
        outer = images.div_(squares[:rank].sqrt())
        if 4 * EPS * largest > 1e-12 * float(squares[rank - 1]):  # else orthonormal enough as they are
            outer = _orthonormal(outer)
    noise = relative * largest
    errors = noise / (sigma + (squares - noise).clamp(min=0).sqrt()) + 4 * EPS * sigma
    if float(squares[-1]) * CONDITION**2 < largest:
        smallest = _smallest(tall, sigma, errors)
        if smallest is None:
            sigma, method = torch.linalg.svdvals(matrix), "gram, svdvals"
            errors = torch.full_like(sigma, svd_error(rows, cols, float(sigma[0])))
        else:
            count = len(smallest[0])
            sigma, errors = torch.cat([sigma[:-count], smallest[0]]), torch.cat([errors[:-count], smallest[1]])
            method = "gram, inverse iteration"
    left, right = (outer, inner) if rows >= cols else (inner, outer)
    return Spectrum(sigma, left, right, float(errors.max()), method, errors, 0.0, relative + lost)


def _smallest(tall: Tensor, sigma: Tensor, errors: Tensor) -> tuple[Tensor, Tensor] | None:
    """The smallest singular values, which the Gram matrix does not hold, and their errors; None where this road ends.

    They lie below all that the Gram matrix vouches for, with a gap η; the residual R of their triplets bounds their error by
    2ρ²/(η + √(η² + 4ρ²)) (Li and Li).
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
    rounding = gram_error(tall.shape[0], n) * largest + (
        svd_error(tall.shape[0], n, largest) if square is not tall else 0.0
    )
    block = torch.randn(n, min(count + 16, n), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    block = block.to(tall.device)
    for _ in range(12):
        halfway = torch.linalg.lu_solve(factors, pivots, block, adjoint=True)
        block = torch.linalg.lu_solve(factors, pivots, torch.linalg.qr(halfway).Q)
        if not bool(torch.isfinite(block).all()):
            return None
        block = torch.linalg.qr(block).Q
        outer, triangle = torch.linalg.qr(square @ block)
        turn, small, back = torch.linalg.svd(triangle)
        left, right = (outer @ turn)[:, -count:], (block @ back.T)[:, -count:]
        residual = square.T @ left - right * small[-count:]
        rho = float(torch.linalg.vector_norm(residual))
        gap = float(lower[n - count - 1] - small[-count])
        error = 2 * rho**2 / (gap + math.hypot(gap, 2 * rho)) + rounding
        if rho < gap and error <= rounding + 1e-12 * largest:
            return small[-count:], torch.full_like(small[-count:], error)
    return None


def _orthonormal(nearly: Tensor) -> Tensor:
    """An orthonormal basis of the span of nearly orthonormal columns, each close to its own."""
    overlap = nearly.T @ nearly
    if float(torch.linalg.matrix_norm(overlap - torch.eye(len(overlap)).to(overlap))) > 1e-8:
        basis, triangle = torch.linalg.qr(nearly)
        return basis * torch.sign(triangle.diagonal())
    return torch.addmm(nearly, nearly, overlap, beta=1.5, alpha=-0.5)  # a Newton step towards the nearest one


class Difference:
    """after − before of two stored (rows, cols) matrices in float64, made a block of rows at a time and never held whole.

    `norm` is its Frobenius norm.
    """

    def __init__(self, before: Tensor, after: Tensor, norm: float, *, transposed: bool = False):
        self.before, self.after, self.norm, self.transposed = before, after, norm, transposed
        rows, cols = before.shape
        self.shape = (cols, rows) if transposed else (rows, cols)

    @property
    def T(self) -> Difference:
        return Difference(self.before, self.after, self.norm, transposed=not self.transposed)

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of rows of the matrix that is not transposed."""
        step = max(1, (1 << 17) // self.before.shape[1])
        for before, after in zip(self.before.split(step), self.after.split(step), strict=True):
            yield after.double() - before.double()

    def __matmul__(self, other: Tensor) -> Tensor:
        if not self.transposed:
            return torch.cat([block @ other for block in self.blocks()])
        product = other.new_zeros(self.shape[0], other.shape[1])
        start = 0
        for block in self.blocks():
            product.addmm_(block.T, other[start : start + len(block)])
            start += len(block)
        return product

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """leftᵀ·self and self·right, (rows, k)ᵀ and (cols, l), in one pass; of the matrix that is not transposed."""
        above = left.new_zeros(left.shape[1], self.before.shape[1])
        beside, start = [], 0
        for block in self.blocks():
            above.addmm_(left[start : start + len(block)].T, block)
            beside.append(block @ right)
            start += len(block)
        return above, torch.cat(beside)

    def single(self) -> Tensor:
        """The matrix over its norm, in float32, contiguous."""
        whole = torch.empty(self.shape, dtype=torch.float32, device=self.before.device)
        target, start = whole.T if self.transposed else whole, 0
        for block in self.blocks():
            target[start : start + len(block)] = block / self.norm
            start += len(block)
        return whole

    def whole(self) -> Tensor:
        """The matrix in float64."""
        found = self.after.double() - self.before
        return found.T if self.transposed else found


class Factors:
    """left rightᵀ in float64, of (rows, r) and (cols, r) factors: a (rows, cols) matrix of rank r that is never formed.

    Both factors are split into an orthonormal basis and a triangle; everything spectral is in the r × r core of the
    triangles. `error` bounds what rounding does to the core, and so to the norm and to every singular value.
    """

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[0])
        outer, inner = (torch.linalg.qr(factor, mode="r").R for factor in (left, right))
        self.norm = float(torch.linalg.vector_norm(outer @ inner.T))
        self.error = svd_error(*self.shape, float(torch.linalg.vector_norm(outer) * torch.linalg.vector_norm(inner)))

    @property
    def T(self) -> Factors:
        return Factors(self.right, self.left)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.left @ (self.right.T @ other)

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """leftᵀ M and M right."""
        return (left.T @ self.left) @ self.right.T, self @ right

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of rows."""
        return (part @ self.right.T for part in self.left.split(max(1, (1 << 20) // self.shape[1])))

    def whole(self) -> Tensor:
        """The matrix itself."""
        return self.left @ self.right.T

    def spectrum(self, k: int) -> Spectrum:
        """The top max(k, r) singular values, zero beyond the rank, and the vectors of the top k."""
        more = (0, max(0, k - self.left.shape[1]))  # zero columns; `qr` completes the bases
        outer, first = torch.linalg.qr(torch.nn.functional.pad(self.left, more))
        inner, second = torch.linalg.qr(torch.nn.functional.pad(self.right, more))
        turn, sigma, back = torch.linalg.svd(first @ second.T, full_matrices=False)
        left, right = (outer @ turn)[:, :k].contiguous(), (inner @ back.T)[:, :k].contiguous()
        return Spectrum(sigma, left, right, self.error, "factors", torch.full_like(sigma, self.error), self.error)


def leading(
    matrix: Tensor | Difference | Factors,
    k: int,
    *,
    tolerance: float = 3e-10,
    angle: float = 1e-5,
    start: Tensor | None = None,
    cut: int | None = None,
) -> Spectrum:
    """The top k singular triplets of a (rows, cols) matrix by a block Krylov iteration; small matrices in full.

    Blocks of k + 8 random vectors, so that values repeated up to k + 8 times are all found; every new block is
    orthogonalised twice against all earlier ones. Float32 finds the subspace; float64 goes on from there only as far as
    needed, until the values are known to `tolerance`·σ₁ and the subspaces of rank `cut` to `angle`, both measured from the
    residual of the triplets themselves. Where it does not get there within a basis that costs as much as the dense
    method, that one answers, and `method` says so.

    Args:
        angle: as far as the caller needs the vectors; `math.inf`: not at all, and a dense method returns none.
        start: (cols, any) directions expected near the leading right ones, such as those of an earlier checkpoint.
        cut: the rank, at most k (the default), whose subspaces are to be that well known.
    """
    if isinstance(matrix, Factors):
        return matrix.spectrum(k)
    size = min(matrix.shape)
    limit = min(size // 3, 64 * (k + 8))
    vectors = min(k, size) if angle < math.inf else 0
    few = size < KRYLOV or limit < 4 * (k + 8)
    if isinstance(matrix, Difference) and (few or not 1e-100 < matrix.norm < 1e100):
        matrix = matrix.whole()
    if few:
        assert isinstance(matrix, Tensor)
        return spectrum(matrix, vectors)
    scaled, exponent, largest = (matrix, 0, 1.0) if isinstance(matrix, Difference) else _scaled(matrix)
    found = _krylov(scaled, k, limit, tolerance, angle, start, cut or k) if largest > 0 else None
    if found is not None:
        return _unscaled(found, exponent)
    dense = spectrum(matrix.whole() if isinstance(matrix, Difference) else matrix, vectors)
    return replace(dense, method=f"{dense.method} (krylov did not converge)")


def _krylov(
    matrix: Tensor | Difference, k: int, limit: int, tolerance: float, angle: float, start: Tensor | None, cut: int
) -> Spectrum | None:
    rows, cols = matrix.shape
    device = matrix.before.device if isinstance(matrix, Difference) else matrix.device
    tall = matrix if rows >= cols else matrix.T  # the basis lives on the smaller side
    n, width = tall.shape[1], k + 8
    block = torch.randn(n, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(device)
    if start is not None:
        near = start if rows >= cols else matrix @ start
        near = near[:, :width] / torch.linalg.vector_norm(near[:, :width], dim=0).clamp(min=1e-300)
        block[:, : near.shape[1]] = near + 1e-3 * block[:, : near.shape[1]] / math.sqrt(n)
    norm = tall.norm if isinstance(tall, Difference) else float(torch.linalg.vector_norm(tall))
    single = tall.single() if isinstance(tall, Difference) else (tall / norm).float()
    for work, scale in ((single, norm), (tall, 1.0)):
        for directions, rest in _ritz(
            work, k, width, limit, tolerance, angle, block.float() if work is single else block, cut
        ):
            found = _measured(tall, directions.double(), rest * scale, k)
            known = found.error <= 2 * tolerance * float(found.sigma[0]) + svd_error(rows, cols, float(found.sigma[0]))
            if known and (angle == math.inf or found.subspace_error(cut, "right") <= 2 * angle):
                return found if rows >= cols else replace(found, left=found.right, right=found.left)
            block = directions.double()
    return None


def _ritz(
    tall: Tensor | Difference, k: int, width: int, limit: int, tolerance: float, angle: float, start: Tensor, cut: int
) -> Iterator[tuple[Tensor, float]]:
    """Leading right Ritz directions of `tall`, and the next Ritz value, whenever they look good enough to be measured.

    `start` has the type to work in.
    """
    n, quick = tall.shape[1], start.dtype == torch.float32
    exhausted = 5e-7 if quick else 0.0  # a residual below this, relative to σ₁, is rounding
    basis = start.new_empty(n, limit)
    inner = torch.zeros(limit, limit, dtype=torch.float64, device=start.device)  # Qᵀ WᵀW Q
    block, _ = torch.linalg.qr(start)
    used, check = 0, 4 * width if quick else width
    while used + width <= limit:
        basis[:, used : used + width] = block
        used += width
        known = basis[:, :used]
        image = _squared(tall, block)
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
        squares, mixing = torch.linalg.eigh((inner[:used, :used] + inner[:used, :used].T) / 2)
        squares, mixing = squares.flip(0)[: width + 1].clamp(min=0), mixing.flip(1)[:, :width]
        sigma = squares.sqrt()
        floor = max(1e-8 * float(sigma[0]), 1e-300)
        missed = (again @ beyond).double() @ mixing[-width:] / sigma[:width].clamp(min=floor)
        if len(sigma) <= width:
            sigma = torch.cat([sigma, sigma[-1:]])
        values, subspace = _ritz_errors(sigma, missed, k, cut)
        done = float(values.max()) <= tolerance * float(sigma[0]) and subspace <= angle
        spent = float(torch.linalg.vector_norm(missed[:, :k])) <= exhausted * float(sigma[0])
        # Cheap estimates first; only triplets that look done are measured.
        if done or spent or (exhausted and used + width > limit):
            yield known @ mixing.to(known.dtype), float(sigma[width])
            if exhausted:
                return


def _squared(tall: Tensor | Difference, block: Tensor) -> Tensor:
    """tallᵀ(tall block), reading a tensor once: both products of a few rows at a time, while they are in the cache."""
    if isinstance(tall, Difference):
        return tall.T @ (tall @ block)
    product = block.new_zeros(block.shape[1], block.shape[0])
    for rows in tall.split(64 if tall.device.type == "cpu" else len(tall)):
        product.addmm_((rows @ block).T, rows)
    return product.T


def _ritz_errors(sigma: Tensor, residual: Tensor, k: int, cut: int) -> tuple[Tensor, float]:
    """Bounds on the top k Ritz values and on sin Θ of the subspace of rank `cut`, from all (≥ k + 1) Ritz values and residuals.

    The values' bound is quadratic in the residual of the leading ℓ ≥ k triplets over the gap below them; the best ℓ counts.
    """
    sizes = torch.linalg.vector_norm(residual, dim=0)
    count = min(residual.shape[1], len(sigma) - 1)
    best = sigma.new_full((k,), math.inf)
    subspace = 1.0
    for ell in (e for e in sorted({cut, *range(k, count)}) if e < count):
        rho = float(torch.linalg.vector_norm(sizes[:ell]))
        rest = float(sigma[ell]) + float(sizes[ell])
        gap = (sigma[:k] - rest).clamp(min=0)
        if ell == cut:
            room = float(sigma[cut - 1]) - rest - rho
            subspace = 1.0 if room <= rho else rho / room
        if ell < k:
            continue
        if rho == 0:
            best = torch.zeros_like(best)
        else:
            best = torch.minimum(best, 2 * rho**2 / (gap + (gap**2 + 4 * rho**2).sqrt()))
    return best, subspace


def _measured(tall: Tensor | Difference, directions: Tensor, rest: float, k: int) -> Spectrum:
    """The triplets in the span of `directions`, their residual measured in full; `rest`: the next Ritz value."""
    rows, cols = tall.shape
    directions, _ = torch.linalg.qr(directions)
    outer, triangle = torch.linalg.qr(tall @ directions)
    turn, sigma, back = torch.linalg.svd(triangle)
    left, right = outer @ turn, directions @ back.T
    residual = tall.T @ left - right * sigma
    known = torch.cat([sigma, sigma.new_tensor([rest])])
    errors, _ = _ritz_errors(known, residual, k, k)
    rounding = EPS * (16 + 2 * math.sqrt(rows + cols)) * float(sigma[0])
    errors = errors + rounding
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
        rest=following,
    )


def _scaled(matrix: Tensor) -> tuple[Tensor, int, float]:
    """The matrix times 2^−exponent where its squares could over- or underflow, else itself; the exponent; max |entry| before."""
    largest = float(torch.linalg.vector_norm(matrix, ord=math.inf))
    exponent = math.frexp(largest)[1] if largest > 0 and not 1e-100 < largest < 1e100 else 0
    if exponent == 0:
        return matrix, 0, largest
    half = -exponent // 2  # 2^−exponent itself may not be a float
    return matrix * math.ldexp(1.0, half) * math.ldexp(1.0, -exponent - half), exponent, largest


def _unscaled(found: Spectrum, exponent: int) -> Spectrum:
    if exponent == 0:
        return found
    first, second = math.ldexp(1.0, exponent // 2), math.ldexp(1.0, exponent - exponent // 2)
    return replace(
        found,
        sigma=found.sigma * first * second,
        errors=found.errors * first * second,
        error=found.error * first * second,
        residual=found.residual * first * second,
        rest=found.rest * first * second,
    )


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Principal angles in radians, ascending, between the column spaces of two orthonormal (n, k) matrices.

    From cosines σ(AᵀB) where the angle is large and from sines σ(B − A(AᵀB)) where it is small, so that nearly
    identical subspaces keep full relative accuracy (Björck and Golub, 1973). The sines come from the Gram matrix of
    B − A(AᵀB) where all are within five digits of the largest, else from its triangular factor.

    >>> a = torch.eye(3, 1, dtype=torch.float64); b = torch.tensor([[1.0], [1e-9], [0.0]], dtype=torch.float64)
    >>> round(float(principal_angles(a, b)[0]) * 1e9, 6)
    1.0
    """
    inner = first.T @ second
    apart = torch.addmm(second, first, inner, alpha=-1)
    squares = torch.linalg.eigvalsh(gram(apart), UPLO="U")
    if float(squares[0]) > 1e-10 * float(squares[-1]):
        sines = squares.sqrt().clamp(max=1.0)
    else:  # angles of very different size: the squares of the small ones are lost
        if apart.shape[0] > apart.shape[1]:
            apart = torch.linalg.qr(apart, mode="r").R
        sines = torch.linalg.svdvals(apart).clamp(max=1.0).flip(0)
    if float(sines[-1]) ** 2 <= 0.5:  # all small
        return torch.asin(sines)
    cosines = torch.linalg.svdvals(inner).clamp(max=1.0)
    return torch.where(cosines**2 > 0.5, torch.asin(sines), torch.acos(cosines))


def angle_error(first: Spectrum, second: Spectrum, k: int, side: str) -> float:
    """A bound in radians on the error of every principal angle between two computed subspaces (triangle inequality).

    π/2 where either subspace is not determined.
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

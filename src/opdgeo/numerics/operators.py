"""`MatrixOperator`: what the numerics ask of a matrix that may never be formed, and the matrices that answer.

    DenseMatrix     a tensor
    Difference      W₊ − W₀ of two stored tensors, made a block of rows at a time
    LowRankMatrix   a product of two thin factors, such as a LoRA's s·B·A
    ShardedDifference (`sharded.py`)   a difference whose rows lie on several processes

A new kind of matrix is a class with these members; no algorithm and no caller asks which kind it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from opdgeo.numerics import devices
from opdgeo.numerics.certificates import Spectrum, svd_error

CACHED = 1 << 17  # entries of a block of a difference: both its float64 and its stored values stay in cache


class MatrixOperator(Protocol):
    """A (rows, cols) matrix in float64, known by what it does.

    Laws, for a `dense()` matrix M and any X of fitting shape, within rounding:
        `op @ X` is M X; `op.T.dense()` is Mᵀ; `torch.cat(list(op.row_blocks()))` is M; `op.norm` is ‖M‖_F;
        `op.onto(U, V)` is (Uᵀ M, M V); `op.gram_product(X)` is Mᵀ M X; `op.normalised().dense()` is M / ‖M‖_F in float32;
        `op.structured_svd(k)` is None or the leading triplets of M; `op.structured_inner(N)` is None or ⟨M, N⟩.
    """

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def norm(self) -> float:
        """‖M‖_F."""
        ...

    @property
    def T(self) -> MatrixOperator:
        """The transposed matrix. Nothing is copied."""
        ...

    def __matmul__(self, other: Tensor, /) -> Tensor:
        """M X of a (cols, k) block X: (rows, k)."""
        ...

    def gram_product(self, block: Tensor) -> Tensor:
        """Mᵀ M X of a (cols, k) block X: (cols, k). The work of one step of a Krylov iteration."""
        ...

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        """Uᵀ M and M V of (rows, k) U and (cols, l) V, in one pass: (k, cols) and (rows, l)."""
        ...

    def row_blocks(self) -> Iterator[Tensor]:
        """The matrix as float64 blocks of rows, in order; of a sharded matrix, the rows of this process."""
        ...

    def dense(self) -> Tensor:
        """The matrix itself, float64."""
        ...

    def normalised(self) -> MatrixOperator:
        """M / ‖M‖_F in float32, made for many products."""
        ...

    def structured_svd(self, k: int) -> Spectrum | None:
        """At least the top k triplets where the structure of the matrix gives them at once; else None."""
        ...

    def structured_inner(self, other: MatrixOperator) -> float | None:
        """⟨M, N⟩ = Σ M_ij N_ij with a matrix of the same shape, where the structure of this one spares its entries; else None."""
        ...


class DenseMatrix:
    """A tensor as an operator.

    Args:
        matrix: (rows, cols), float64; float32 where it stands for a normalised matrix.
        norm: its Frobenius norm, where it is known.

    >>> both = DenseMatrix(torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64))
    >>> both.norm, (both @ torch.ones(2, 1, dtype=torch.float64)).flatten().tolist()
    (5.0, [3.0, 4.0])
    """

    def __init__(self, matrix: Tensor, norm: float | None = None):
        self.matrix, self._norm = matrix, norm

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.matrix.shape
        return rows, cols

    @property
    def device(self) -> torch.device:
        return self.matrix.device

    @property
    def norm(self) -> float:
        if self._norm is None:
            self._norm = float(torch.linalg.vector_norm(self.matrix))
        return self._norm

    @property
    def T(self) -> DenseMatrix:
        return DenseMatrix(self.matrix.T, self._norm)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.matrix @ other

    def gram_product(self, block: Tensor) -> Tensor:
        """Mᵀ M X, reading the tensor once: both products of a few rows at a time, while they are in the cache."""
        product = block.new_zeros(block.shape[1], block.shape[0])
        for rows in self.matrix.split(64 if self.matrix.device.type == "cpu" else len(self.matrix)):
            product.addmm_((rows @ block).T, rows)
        return product.T

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left.T @ self.matrix, self.matrix @ right

    def row_blocks(self) -> Iterator[Tensor]:
        return iter(self.matrix.split(_rows_of_block(self.matrix)))

    def dense(self) -> Tensor:
        return self.matrix

    def normalised(self) -> DenseMatrix:
        return DenseMatrix((self.matrix / self.norm).float())

    def structured_svd(self, k: int) -> Spectrum | None:
        return None

    def structured_inner(self, other: MatrixOperator) -> float | None:
        return None


class Difference:
    """after − before of two stored matrices in float64, made a block of rows at a time and never held whole.

    Args:
        before, after: (rows, cols) of any float dtype; they may differ in dtype.
        norm: the Frobenius norm of the difference.
        transposed: the operator is the transposed difference.

    >>> one = torch.ones(2, 1, dtype=torch.float64)
    >>> Difference(torch.zeros(3, 2), torch.ones(3, 2).bfloat16(), norm=6**0.5) @ one
    tensor([[2.],
            [2.],
            [2.]], dtype=torch.float64)
    """

    def __init__(self, before: Tensor, after: Tensor, norm: float, *, transposed: bool = False):
        self.before, self.after, self.norm, self.transposed = before, after, norm, transposed
        rows, cols = before.shape
        self.shape = (cols, rows) if transposed else (rows, cols)

    @property
    def device(self) -> torch.device:
        return self.before.device

    @property
    def T(self) -> Difference:
        return Difference(self.before, self.after, self.norm, transposed=not self.transposed)

    def _stored_blocks(self) -> Iterator[Tensor]:
        """Blocks of rows of the matrix that is not transposed."""
        step = _rows_of_block(self.before)
        for before, after in zip(self.before.split(step), self.after.split(step), strict=True):
            yield after.double() - before.double()

    def __matmul__(self, other: Tensor) -> Tensor:
        if not self.transposed:
            return torch.cat([block @ other for block in self._stored_blocks()])
        product = other.new_zeros(self.shape[0], other.shape[1])
        start = 0
        for block in self._stored_blocks():
            product.addmm_(block.T, other[start : start + len(block)])
            start += len(block)
        return product

    def gram_product(self, block: Tensor) -> Tensor:
        return self.T @ (self @ block)

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if self.transposed:
            above, beside = self.T.onto(right, left)
            return beside.T, above.T
        above = left.new_zeros(left.shape[1], self.before.shape[1])
        products, start = [], 0
        for block in self._stored_blocks():
            above.addmm_(left[start : start + len(block)].T, block)
            products.append(block @ right)
            start += len(block)
        return above, torch.cat(products)

    def row_blocks(self) -> Iterator[Tensor]:
        stored = Difference(self.before.T, self.after.T, self.norm) if self.transposed else self
        return stored._stored_blocks()

    def dense(self) -> Tensor:
        difference = self.after.double() - self.before
        return difference.T if self.transposed else difference

    def normalised(self) -> MatrixOperator:
        """The matrix over its norm, held whole in float32: half the memory, and many products read it."""
        whole = torch.empty(self.shape, dtype=torch.float32, device=self.device)
        target, start = whole.T if self.transposed else whole, 0
        for block in self._stored_blocks():
            target[start : start + len(block)] = block / self.norm
            start += len(block)
        return DenseMatrix(whole)

    def structured_svd(self, k: int) -> Spectrum | None:
        return None

    def structured_inner(self, other: MatrixOperator) -> float | None:
        return None


class LowRankMatrix:
    """left rightᵀ, a (rows, cols) matrix of rank r that is never formed.

    Both factors are split into an orthonormal basis and a triangle (QR); everything spectral is in the r × r core of the
    triangles. `error` bounds what rounding does to the core, and so to the norm and to every singular value.

    Args:
        left: (rows, r) float64.
        right: (cols, r) float64.

    >>> product = LowRankMatrix(torch.tensor([[3.0], [4.0]]).double(), torch.tensor([[1.0], [0.0], [0.0]]).double())
    >>> product.shape, round(product.norm, 12), [round(s, 12) for s in product.structured_svd(1).sigma.tolist()]
    ((2, 3), 5.0, [5.0])
    """

    def __init__(self, left: Tensor, right: Tensor):
        self.left, self.right = left, right
        self.shape = (left.shape[0], right.shape[0])
        outer, inner = (torch.linalg.qr(factor, mode="r").R for factor in (left, right))
        self.norm = float(torch.linalg.vector_norm(outer @ inner.T))
        self.error = svd_error(*self.shape, float(torch.linalg.vector_norm(outer) * torch.linalg.vector_norm(inner)))

    @property
    def device(self) -> torch.device:
        return self.left.device

    @property
    def T(self) -> LowRankMatrix:
        return LowRankMatrix(self.right, self.left)

    def __matmul__(self, other: Tensor) -> Tensor:
        return self.left @ (self.right.T @ other)

    def gram_product(self, block: Tensor) -> Tensor:
        return self.right @ (self.left.T @ (self @ block))

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return (left.T @ self.left) @ self.right.T, self @ right

    def row_blocks(self) -> Iterator[Tensor]:
        return (
            part @ self.right.T for part in self.left.split(devices.rows_of_block(self.shape[1], self.device, 1 << 20))
        )

    def dense(self) -> Tensor:
        return self.left @ self.right.T

    def normalised(self) -> MatrixOperator:
        return DenseMatrix((self.dense() / self.norm).float())

    def structured_svd(self, k: int) -> Spectrum:
        """The top max(k, r) singular values, zero beyond the rank, and the vectors of the top k, from the core."""
        more = (0, max(0, k - self.left.shape[1]))  # zero columns; `qr` completes the bases
        outer, first = torch.linalg.qr(torch.nn.functional.pad(self.left, more))
        inner, second = torch.linalg.qr(torch.nn.functional.pad(self.right, more))
        turn, sigma, back = devices.solved(torch.linalg.svd, first @ second.T, full_matrices=False)
        left, right = (outer @ turn)[:, :k].contiguous(), (inner @ back.T)[:, :k].contiguous()
        return Spectrum(sigma, left, right, self.error, "factors", torch.full_like(sigma, self.error), self.error)

    def structured_inner(self, other: MatrixOperator) -> float:
        """⟨L Rᵀ, N⟩ = ⟨L, N R⟩."""
        return float((self.left * (other @ self.right)).sum())


def inner_products(first: MatrixOperator, second: MatrixOperator) -> tuple[float, float, float]:
    """⟨A, B⟩, ⟨A, A⟩ and ⟨B, B⟩ of A/‖A‖_F and B/‖B‖_F, two (rows, cols) matrices that are not zero and not sharded.

    The three are the same sums of the same products, so that they are equal to the last bit where A and B are. A factor is never
    multiplied out; two matrices of entries are read a block of rows at a time.

    >>> a = DenseMatrix(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    >>> [round(x, 12) for x in inner_products(a, DenseMatrix(torch.tensor([[0.0, 2.0]], dtype=torch.float64)))]
    [0.8, 1.0, 1.0]
    """
    inner = first.structured_inner(second)
    if inner is None:
        inner = second.structured_inner(first)
    if inner is not None:
        squares = [(one.structured_inner(one), one.norm) for one in (first, second)]
        own = [1.0 if square is None else square / norm / norm for square, norm in squares]
        return inner / first.norm / second.norm, own[0], own[1]
    sums = [0.0, 0.0, 0.0]
    for a, b in zip(first.row_blocks(), second.row_blocks(), strict=True):
        a, b = a / first.norm, b / second.norm
        for place, (x, y) in enumerate(((a, b), (a, a), (b, b))):
            sums[place] += float((x * y).sum())
    return sums[0], sums[1], sums[2]


def _rows_of_block(matrix: Tensor) -> int:
    return devices.rows_of_block(matrix.shape[1], matrix.device, CACHED)

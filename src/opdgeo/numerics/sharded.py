"""`ShardedDifference`: ΔW of a matrix whose rows lie on several processes, as FSDP2 shards it.

Every process holds its rows of ΔW. The blocks that it is multiplied with are narrow, whole, and the same on every process. A
product with ΔW or ΔWᵀ is local work and one all-reduce of such a block, so the matrix is never gathered, unless its smaller side
is below `spectra.KRYLOV`, where a dense method is quicker. All processes see the same sums, so they take the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opdgeo.errors import NumericsError
from opdgeo.numerics.operators import Difference, MatrixOperator


def all_reduce(part: Tensor, group: Any = None) -> Tensor:
    """The sum of `part` over the processes, in place where the group can reach it: NCCL reaches no host memory."""
    reached = dist.get_backend_config(group)
    if f"{part.device.type}:" in reached:
        dist.all_reduce(part, group=group)
        return part
    moved = part.to("cuda" if "cuda:" in reached else "cpu")
    dist.all_reduce(moved, group=group)
    return part.copy_(moved)


@dataclass(frozen=True)
class Rows:
    """Which rows of a matrix this process holds, and the processes that hold the others.

    Attributes:
        total: rows of the whole matrix.
        start: the first row of this process.
        group: the process group of `torch.distributed`; None is the default group.
    """

    total: int
    start: int
    group: Any = None

    def all_reduce(self, part: Tensor) -> Tensor:
        """The sum of `part` over the processes, in place."""
        return all_reduce(part, self.group)

    def total_of(self, *numbers: float) -> list[float]:
        """Sums of numbers over the processes."""
        sums: list[float] = self.all_reduce(torch.tensor(numbers, dtype=torch.float64)).tolist()
        return sums

    def all_gather(self, local: Tensor) -> Tensor:
        """The (local rows, k) blocks of all processes as one (total, k) block on every process."""
        spread = local.new_zeros(self.total, local.shape[1])
        spread[self.start : self.start + len(local)] = local
        return self.all_reduce(spread)


class ShardedDifference(Difference):
    """after − before, of which this process holds some rows; both factors of a product are whole on every process.

    Args:
        before, after: (local rows, cols), the rows of this process.
        norm: the Frobenius norm of the whole difference.
        rows: which rows these are.
        transposed: the operator is the transposed difference.
        divisor: the operator is the difference over this number, in float32 (`normalised`); None: as it is, in float64.
    """

    def __init__(
        self,
        before: Tensor,
        after: Tensor,
        norm: float,
        rows: Rows,
        *,
        transposed: bool = False,
        divisor: float | None = None,
    ):
        super().__init__(before, after, norm, transposed=transposed)
        self.rows, self.divisor = rows, divisor
        self.shape = (before.shape[1], rows.total) if transposed else (rows.total, before.shape[1])

    @property
    def T(self) -> ShardedDifference:
        transposed = not self.transposed
        return ShardedDifference(
            self.before, self.after, self.norm, self.rows, transposed=transposed, divisor=self.divisor
        )

    def _stored_blocks(self) -> Iterator[Tensor]:
        for block in super()._stored_blocks():
            yield block if self.divisor is None else (block / self.divisor).float()

    def _mine(self, block: Tensor) -> Tensor:
        return block[self.rows.start : self.rows.start + len(self.before)]

    def __matmul__(self, other: Tensor) -> Tensor:
        if not self.transposed:
            return self.rows.all_gather(super().__matmul__(other))
        product = other.new_zeros(self.shape[0], other.shape[1])
        mine, start = self._mine(other), 0
        for block in self._stored_blocks():
            product.addmm_(block.T, mine[start : start + len(block)])
            start += len(block)
        return self.rows.all_reduce(product)

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        if self.transposed:
            return super().onto(left, right)
        above, beside = super().onto(self._mine(left), right)
        return self.rows.all_reduce(above), self.rows.all_gather(beside)

    def row_blocks(self) -> Iterator[Tensor]:
        """Blocks of this process's rows.

        Raises:
            NumericsError: the matrix is transposed: then no process holds a row.
        """
        if self.transposed:
            raise NumericsError(
                "rows were asked of a transposed sharded matrix, of which each process holds columns; expected the matrix "
                "itself. Take the blocks of its T."
            )
        return self._stored_blocks()

    def dense(self) -> Tensor:
        whole = self.rows.all_gather(self.after.double() - self.before)
        return whole.T if self.transposed else whole

    def normalised(self) -> MatrixOperator:
        """The matrix over its norm, in float32; it stays sharded."""
        return ShardedDifference(self.before, self.after, 1.0, self.rows, transposed=self.transposed, divisor=self.norm)

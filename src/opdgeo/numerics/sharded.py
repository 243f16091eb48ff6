"""ΔW of a matrix whose rows lie on several processes, as FSDP2 shards it, for the block Krylov iteration of `spectra.leading`.

Every process holds its rows of ΔW; what the iteration multiplies are narrow blocks, whole and the same on every process. A
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

from opdgeo.numerics.spectra import Difference


@dataclass(frozen=True)
class Rows:
    """Which of `total` rows this process holds, from `start` on, and the processes that hold the rest (`torch.distributed`)."""

    total: int
    start: int
    group: Any = None

    def sum(self, part: Tensor) -> Tensor:
        """The sum over the processes, in place."""
        dist.all_reduce(part, group=self.group)
        return part

    def total_of(self, *numbers: float) -> list[float]:
        """Sums of numbers over the processes."""
        device = "cuda" if "nccl" in dist.get_backend(self.group) else "cpu"
        found: list[float] = self.sum(torch.tensor(numbers, dtype=torch.float64, device=device)).tolist()
        return found

    def whole(self, local: Tensor) -> Tensor:
        """(local rows, k) blocks as one (total, k) block on every process."""
        spread = local.new_zeros(self.total, local.shape[1])
        spread[self.start : self.start + len(local)] = local
        return self.sum(spread)


class ShardedDifference(Difference):
    """after − before, of which this process holds the rows `rows`; both factors of a product are whole on every process.

    `norm` is that of the whole matrix. With `dtype` float32 the matrix is taken over its norm.
    """

    def __init__(
        self, before: Tensor, after: Tensor, norm: float, rows: Rows, *, transposed: bool = False,
        dtype: torch.dtype = torch.float64,
    ):  # fmt: skip
        super().__init__(before, after, norm, transposed=transposed)
        self.rows, self.dtype = rows, dtype
        self.shape = (before.shape[1], rows.total) if transposed else (rows.total, before.shape[1])

    def _like(self, transposed: bool, dtype: torch.dtype) -> ShardedDifference:
        return ShardedDifference(self.before, self.after, self.norm, self.rows, transposed=transposed, dtype=dtype)

    @property
    def T(self) -> ShardedDifference:
        return self._like(not self.transposed, self.dtype)

    def blocks(self) -> Iterator[Tensor]:
        """Blocks of this process's rows."""
        for block in super().blocks():
            yield block if self.dtype == torch.float64 else (block / self.norm).float()

    def _mine(self, block: Tensor) -> Tensor:
        return block[self.rows.start : self.rows.start + len(self.before)]

    def __matmul__(self, other: Tensor) -> Tensor:
        if not self.transposed:
            return self.rows.whole(super().__matmul__(other))
        product = other.new_zeros(self.shape[0], other.shape[1])
        mine, start = self._mine(other), 0
        for block in self.blocks():
            product.addmm_(block.T, mine[start : start + len(block)])
            start += len(block)
        return self.rows.sum(product)

    def onto(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        above, beside = super().onto(self._mine(left), right)
        return self.rows.sum(above), self.rows.whole(beside)

    def single(self) -> ShardedDifference:  # type: ignore[override]
        return self._like(self.transposed, torch.float32)

    def whole(self) -> Tensor:
        found = self.rows.whole(self.after.double() - self.before)
        return found.T if self.transposed else found

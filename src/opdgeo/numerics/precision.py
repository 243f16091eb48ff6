"""What survives the cast to bf16, and what the rounding of stored weights adds to an update."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opdgeo.numerics.masks import rows_of_block

FINEST = 2.0**-8  # neighbouring bf16 numbers differ by at least this, relative to the larger


def to_bf16(weights: Tensor) -> Tensor:
    """The values after a round-to-nearest-even cast to bf16. Stored bf16, fp16 and fp32 cast in one rounding; float64 in two.

    >>> to_bf16(torch.tensor([1.0 + 2**-9, 1.0 + 3 * 2**-9])).tolist()
    [1.0, 1.0078125]
    """
    return weights.to(torch.float32).to(torch.bfloat16)


def unchanged(base: Tensor, tuned: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Boolean masks of the entries that a bf16 reader sees unchanged: under the η rule, and to the bit.

    η rule (PAPER §2): |ŵ − w| ≤ η·max(|w|, |ŵ|) after the bf16 cast. For η below 2⁻⁸, the finest relative spacing of
    bf16, that is equality, and the two masks are the same up to the sign of zero.

    Args:
        base, tuned: (rows, cols) as stored, of any float dtypes.
        eta: the relative tolerance, at least 0.

    Returns:
        Two (rows, cols) bool masks.
    """
    within = torch.empty(base.shape, dtype=torch.bool, device=base.device)
    same_bits = torch.empty_like(within)
    step = rows_of_block(base)
    for start in range(0, base.shape[0], step):
        block = slice(start, start + step)
        w, w_hat = to_bf16(base[block]), to_bf16(tuned[block])
        torch.eq(w.view(torch.int16), w_hat.view(torch.int16), out=same_bits[block])
        if eta < FINEST:
            torch.eq(w, w_hat, out=within[block])
        else:
            w, w_hat = w.double(), w_hat.double()
            torch.le((w_hat - w).abs(), eta * torch.maximum(w.abs(), w_hat.abs()), out=within[block])
            within[block] |= same_bits[block]
    return within, same_bits


def squares(weights: Tensor) -> tuple[Tensor, Tensor]:
    """The squared norms of the rows, (rows,), and of the columns, (cols,), in float64, a block at a time."""
    of_rows, of_cols = [], torch.zeros(weights.shape[1], dtype=torch.float64, device=weights.device)
    for block in weights.split(rows_of_block(weights)):
        block = block.double().square()  # a new tensor: float64 weights are not copied by double()
        of_rows.append(block.sum(1))
        of_cols += block.sum(0)
    return torch.cat(of_rows) if of_rows else of_cols[:0], of_cols


def rounding(of_rows: Tensor, of_cols: Tensor, dtype: torch.dtype) -> float:
    """How large the singular values of the rounding errors of weights are that were stored as `dtype`.

    An entry w is off by at most half a spacing, ε|w|/2, which has the variance (ε|w|)²/12 where it falls anywhere within; the
    errors of different entries are independent. The norm of such a random matrix is about its largest row's norm plus its
    largest column's (Bandeira and van Handel, Ann. Probab. 44, 2016). Takes the squared norms of W's rows and columns.
    """
    info = torch.finfo(dtype)
    spacing = info.eps * (math.sqrt(float(of_rows.max())) + math.sqrt(float(of_cols.max())))
    least = (
        info.smallest_normal * info.eps * (math.sqrt(len(of_rows)) + math.sqrt(len(of_cols)))
    )  # among subnormal numbers
    return (spacing + least) / math.sqrt(12)

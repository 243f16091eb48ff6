"""What survives the cast to bf16."""

from __future__ import annotations

import torch
from torch import Tensor


def to_bf16(weights: Tensor) -> Tensor:
    """The values after a round-to-nearest-even cast to bf16, as float64. Stored bf16, fp16 and fp32 cast in one rounding."""
    return weights.to(torch.float32).to(torch.bfloat16).to(torch.float64)


def unchanged(base: Tensor, tuned: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Boolean masks of the entries that a bf16 reader sees unchanged: under the η rule, and to the bit.

    η rule (PAPER §2): |ŵ − w| ≤ η·max(|w|, |ŵ|) after the bf16 cast. Neighbouring bf16 numbers differ by at least
    2⁻⁸ relative, so for η below that the two masks are the same up to the sign of zero.
    """
    w, w_hat = to_bf16(base), to_bf16(tuned)
    same_bits = w.to(torch.bfloat16).view(torch.int16) == w_hat.to(torch.bfloat16).view(torch.int16)
    within = (w_hat - w).abs() <= eta * torch.maximum(w.abs(), w_hat.abs())
    return within | same_bits, same_bits

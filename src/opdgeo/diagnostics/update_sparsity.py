"""bf16-aware update sparsity (PAPER §2): the share of entries that a bf16 reader sees unchanged.

`bf16_eta`: |ŵ − w| ≤ η·max(|w|, |ŵ|) after the cast. `bf16_exact`: the same bits after the cast. For η below 2⁻⁸, the
finest relative spacing of bf16, the two agree up to the sign of zero.
"""

from __future__ import annotations

import torch

from opdgeo.diagnostics.update import Settings, Update, Value

READS = ("eta",)


def variants(settings: Settings) -> list[str]:
    return ["bf16_eta", "bf16_exact"]


def measure(update: Update) -> dict[str, Value]:
    shares = (int(torch.count_nonzero(mask)) / mask.numel() for mask in update.unchanged)
    return {name: Value(share, 0.0, "count") for name, share in zip(variants(update.settings), shares, strict=True)}

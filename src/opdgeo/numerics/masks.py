"""Masks "the top (or bottom) share of the entries by a score", with fractional membership at the threshold.

A mask holds exactly share × N entries' worth of weight: entries beyond the threshold count 1, entries tied at it share
what is left equally. So a mask depends on no sort order or device, and a random mask is met with `share` exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Threshold:
    """Where a mask ends: entries scoring above `value` are in, those equal to it count `tied_weight`."""

    value: float
    tied_weight: float


def top_threshold(score: Tensor, share: float) -> Threshold:
    """The threshold above which the top `share` of the entries lie."""
    flat = score.flatten()
    wanted = share * flat.numel()
    rank = min(max(int(-(-wanted // 1)), 1), flat.numel())  # the wanted-th largest, rounded up
    value = float(torch.kthvalue(flat, flat.numel() - rank + 1).values)
    above, tied = int((flat > value).sum()), int((flat == value).sum())
    return Threshold(value, (wanted - above) / tied)


def overlap(score: Tensor, threshold: Threshold, visible: Tensor, slack: float = 0.0) -> tuple[float, float]:
    """Share of the visible entries inside the mask, and how much of it hangs on scores within `slack` of the threshold.

    A lone entry within the slack is the threshold itself: its order among the others is certain.
    """
    count = int(visible.sum())
    chosen = score[visible]
    inside = float((chosen > threshold.value).sum()) + threshold.tied_weight * float((chosen == threshold.value).sum())
    near = (score - threshold.value).abs() <= 2 * slack
    loose = float((near & visible).sum()) if slack > 0 and int(near.sum()) > 1 else 0.0
    return inside / count, loose / count

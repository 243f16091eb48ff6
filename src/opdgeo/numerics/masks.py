"""Masks "the top (or bottom) share of the entries by magnitude", with fractional membership at the threshold.

A mask holds exactly share × N entries' worth of weight: entries beyond the threshold count 1, entries tied at it share
what is left equally. So a mask depends on no sort order or device, and a random mask is met with `share` exactly.

Scores come as a function that yields them in blocks of rows, so that none is ever held whole. The magnitude of a float
grows with its bits: counting the leading 16 of them finds the bin of a threshold, and only that bin is searched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Blocks = Callable[[], Iterator[Tensor]]  # float64 scores ≥ 0 in blocks of rows, the same on every call
BLOCK = 1 << 20  # entries of a block: it stays in cache
BINS = 1 << 15


@dataclass(frozen=True)
class Threshold:
    """Where a mask ends: scores beyond `value` are in, those equal to it count `tied_weight`."""

    value: float
    tied_weight: float
    top: bool = True  # the largest scores are in; else the smallest


def rows_of_block(cols: int) -> int:
    return max(1, BLOCK // cols)


def magnitudes(matrix: Tensor) -> Blocks:
    """|matrix| in blocks of rows."""
    return lambda: (part.abs() for part in matrix.split(rows_of_block(matrix.shape[1])))


def thresholds(blocks: Blocks, entries: int, shares: Sequence[float], *, top: bool) -> dict[float, Threshold]:
    """For every share, the threshold beyond which that share of the scores lies."""
    counts = sum(torch.bincount(_bin(block), minlength=BINS) for block in blocks())
    assert isinstance(counts, Tensor)
    upto = counts.cumsum(0).cpu()
    found: dict[float, Threshold] = {}
    ranks = {share: min(max(math.ceil(share * entries), 1), entries) for share in shares}
    ascending = {share: entries - rank + 1 if top else rank for share, rank in ranks.items()}
    bins = {share: int(torch.searchsorted(upto, place)) for share, place in ascending.items()}
    held: dict[int, list[Tensor]] = {b: [] for b in bins.values()}
    for block in blocks():
        which = _bin(block)
        for b, parts in held.items():
            parts.append(block.flatten()[which == b])
    for share, b in bins.items():
        inside = torch.cat(held[b])
        before = int(upto[b]) - inside.numel()
        value = torch.kthvalue(inside, ascending[share] - before).values
        tied, smaller = int((inside == value).sum()), int((inside < value).sum())
        beyond = entries - before - smaller - tied if top else before + smaller
        found[share] = Threshold(float(value), (share * entries - beyond) / tied, top)
    return found


def overlap(blocks: Blocks, threshold: Threshold, visible: Tensor, slack: float = 0.0) -> tuple[float, float]:
    """Share of the visible entries inside the mask, and how much of it hangs on scores within `slack` of the threshold.

    A lone entry within the slack is the threshold itself: its order among the others is certain.
    """
    inside = tied = loose = near = start = 0
    for score in blocks():
        seen = visible[start : start + len(score)]
        start += len(score)
        beyond = score > threshold.value if threshold.top else score < threshold.value
        inside += _count(beyond & seen)
        tied += _count((score == threshold.value) & seen)
        if slack > 0:
            close = (score - threshold.value).abs_() <= 2 * slack
            near += _count(close)
            loose += _count(close & seen)
    count = _count(visible)
    return (inside + threshold.tied_weight * tied) / count, (loose if near > 1 else 0) / count


def _count(mask: Tensor) -> int:
    return int(torch.count_nonzero(mask))


def _bin(scores: Tensor) -> Tensor:
    """The leading 16 bits of each non-negative float64: its exponent and the first four bits behind it."""
    return scores.flatten().view(torch.int64) >> 48

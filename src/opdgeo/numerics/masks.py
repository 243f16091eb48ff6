"""Masks "the top (or bottom) share of the entries by magnitude", with fractional membership at the threshold.

A mask holds exactly share × N entries' worth of weight: entries beyond the threshold count 1, entries tied at it share
what is left equally. So a mask depends on no sort order or device, and a random mask is met with `share` exactly.

Scores come as a function that yields them in blocks of rows, so that none is ever held whole. The magnitude of a float
grows with its bits: counting the leading 16 of them finds the bin of a threshold, and only that bin is searched. A mask is
kept as one byte an entry, so that every update that is held against it costs one pass over bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from opdgeo.numerics import devices

Blocks = Callable[[], Iterator[Tensor]]  # scores ≥ 0 in blocks of rows, of any float dtype, the same on every call
BLOCK = 1 << 18  # entries of a block on the CPU: it stays in cache
KEPT = 1 << 22  # so many scores are kept rather than computed again
BINS = 1 << 15
IN, TIED, NEAR = 1, 2, 4


@dataclass(frozen=True)
class Threshold:
    """Where a mask ends.

    Attributes:
        value: the threshold; scores beyond it are in.
        tied_weight: what each score equal to it counts, in (0, 1].
        near: whether other scores than one lie within the slack of it.
    """

    value: float
    tied_weight: float
    near: bool


def rows_of_block(matrix: Tensor) -> int:
    """Rows of a block of a (rows, cols) matrix on its device, at least one; on the CPU of `BLOCK` entries.

    >>> rows_of_block(torch.empty(0, 1 << 16)), rows_of_block(torch.empty(0, 1 << 30))
    (4, 1)
    """
    return devices.rows_of_block(matrix.shape[1], matrix.device, BLOCK)


def magnitudes(matrix: Tensor) -> Blocks:
    """|matrix| in blocks of rows."""
    return lambda: (part.abs() for part in matrix.split(rows_of_block(matrix)))


def thresholds(
    blocks: Blocks, entries: int, shares: Sequence[float], *, top: bool, slack: float = 0.0
) -> dict[float, Threshold]:
    """For every share, the threshold beyond which that share of the scores lies.

    Law: entries beyond the threshold and `tied_weight` of those equal to it make `share` × `entries` exactly.

    Args:
        blocks: gives the scores anew on every call; it is called twice.
        entries: how many scores there are.
        shares: between 0 and 1.
        top: the mask holds the largest scores, else the smallest.
        slack: a bound on the error of every score.
    """
    counts = reduce(torch.add, (torch.bincount(_bin(block), minlength=BINS) for block in blocks())).cpu()
    upto = counts.cumsum(0)
    ranks = {share: min(max(math.ceil(share * entries), 1), entries) for share in shares}
    ascending = {share: entries - rank + 1 if top else rank for share, rank in ranks.items()}
    bins = {share: int(torch.searchsorted(upto, place)) for share, place in ascending.items()}
    held: dict[int, list[Tensor]] = {b: [] for b in bins.values()}
    for block in blocks():
        bins_of = _bin(block)
        for b, parts in held.items():
            inside = block.flatten()[bins_of == b]
            # A 16-bit float is its bin: one of the entries stands for all.
            parts.append(inside if block.element_size() > 2 else inside[:1])
        if block.element_size() == 2 and all(any(len(p) for p in parts) for parts in held.values()):
            break
    found: dict[float, Threshold] = {}
    for share, b in bins.items():
        inside, size = torch.cat(held[b]), int(counts[b])
        before = int(upto[b]) - size
        if inside.element_size() == 2:
            value, tied, smaller = float(inside[0]), size, 0
        else:
            value = float(torch.kthvalue(inside, ascending[share] - before).values)
            tied, smaller = int((inside == value).sum()), int((inside < value).sum())
        beyond = entries - before - smaller - tied if top else before + smaller
        # A lone entry near the threshold is the threshold itself: its order among the others is certain.
        near = slack > 0 and int(((inside.double() - value).abs() <= 2 * slack).sum()) > 1
        edges = torch.tensor([b, b + 1]).to(_BITS[inside.element_size()]) << 8 * inside.element_size() - 16
        low, high = edges.view(inside.dtype).tolist()
        near = near or (slack > 0 and not (low < value - 2 * slack and value + 2 * slack < high))
        found[share] = Threshold(value, (share * entries - beyond) / tied, near)
    return found


@dataclass(frozen=True)
class Mask:
    """One mask over a (rows, cols) matrix.

    Attributes:
        codes: (rows, cols) uint8: IN beyond the threshold, TIED at it, plus NEAR where the score lies within the slack.
        threshold: where it ends.
    """

    codes: Tensor
    threshold: Threshold

    def overlap(self, visible: Tensor) -> tuple[float, float]:
        """The share of the visible entries inside, and how much of it hangs on scores within the slack of the threshold.

        Args:
            visible: (rows, cols) bool, with at least one entry set.
        """
        size = rows_of_block(visible)  # what a block needs stays in cache
        inside = tied = near = total = 0
        for codes, seen in zip(self.codes.split(size), visible.view(torch.uint8).split(size), strict=True):
            inside += _count(codes & seen)
            tied += _count(codes & seen * TIED)
            near += _count(codes & seen * NEAR) if self.threshold.near else 0
            total += _count(seen)
        return (inside + self.threshold.tied_weight * tied) / total, near / total

    def size(self) -> float:
        """The entries inside, tied ones by their weight."""
        return _count(self.codes & IN) + self.threshold.tied_weight * _count(self.codes & TIED)

    def weight(self) -> Tensor:
        """What an entry of each code counts: a table of 8, float64."""
        tied = self.threshold.tied_weight
        return torch.tensor([float(code & IN) + tied * bool(code & TIED) for code in range(8)], dtype=torch.float64)


def masks(
    blocks: Blocks,
    shape: tuple[int, int],
    shares: Sequence[float],
    *,
    top: bool,
    slack: float = 0.0,
    known: Mapping[float, Threshold] | None = None,
) -> dict[float, Mask]:
    """The mask of every share.

    >>> scores = torch.tensor([[3.0, 1.0], [1.0, 0.0]])
    >>> half = masks(magnitudes(scores), (2, 2), [0.5], top=True)[0.5]
    >>> half.threshold.value, half.threshold.tied_weight, half.size()  # 3 is in, each 1 counts a half
    (1.0, 0.5, 2.0)

    Args:
        shape: (rows, cols) of all scores together.
        known: thresholds found earlier, which are most of the work. They are found anew where they do not cut exactly: scores from
            another device or number of threads differ in their last bits.

    The other arguments are those of `thresholds`.
    """
    if not known and shape[0] * shape[1] <= KEPT:
        kept = list(blocks())
        blocks = lambda: iter(kept)  # noqa: E731
    found = known or thresholds(blocks, shape[0] * shape[1], shares, top=top, slack=slack)
    codes: dict[float, Tensor] = {}
    start = 0
    for score in blocks():
        for share, threshold in found.items():
            if share not in codes:
                codes[share] = torch.empty(shape, dtype=torch.uint8, device=score.device)
            part = codes[share][start : start + len(score)]
            beyond = score > threshold.value if top else score < threshold.value
            torch.add(beyond.view(torch.uint8), (score == threshold.value).view(torch.uint8), alpha=TIED, out=part)
            if threshold.near:
                close = (score - threshold.value).abs_() <= 2 * slack
                part.add_(close.view(torch.uint8), alpha=NEAR)
        start += len(score)
    made = {share: Mask(codes[share], threshold) for share, threshold in found.items()}
    if known and not all(abs(mask.size() - share * mask.codes.numel()) < 1e-6 for share, mask in made.items()):
        return masks(blocks, shape, shares, top=top, slack=slack)
    return made


def _count(entries: Tensor) -> int:
    return int(torch.count_nonzero(entries))


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bin(scores: Tensor) -> Tensor:
    """The leading 16 bits of each non-negative float: its exponent and the first bits behind it; of 16-bit floats, all."""
    bits = scores.flatten().view(_BITS[scores.element_size()])
    return bits >> 8 * scores.element_size() - 16

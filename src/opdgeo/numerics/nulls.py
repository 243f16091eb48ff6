"""Null models: updates that share only the size of the measured one.

An isotropic Gaussian update G looks the same in every basis, which spares most of the work of drawing it: its visible
entries and its energy inside a subspace have closed forms, its singular values are those of a bidiagonal matrix of
independent χ variables, and where it is small against the spacing of W₀'s singular values, what it does to them follows from
perturbation theory in W₀'s own bases, where G is Gaussian again. Beyond that, and for subspaces: `perturbed.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from threading import Lock
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from opdgeo.numerics.masks import rows_of_block
from opdgeo.numerics.precision import to_bf16
from opdgeo.numerics.spectra import spectrum

Sampled = TypeVar("Sampled", float, Tensor)


def seed(*key: object) -> int:
    """A seed from `key`, a whole number below 2⁶³: the same on every device, worker and run.

    >>> seed("turns", 3) == seed("turns", 3) != seed("turns", 4)
    True
    """
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded by `key`."""
    return torch.Generator().manual_seed(seed(*key))


def gaussian(rows: int, cols: int, norm: float, rng: torch.Generator) -> Tensor:
    """An isotropic Gaussian (rows, cols) matrix scaled to the Frobenius norm `norm`, float64, on the CPU.

    >>> round(float(torch.linalg.vector_norm(gaussian(4, 3, 2.5, generator("example")))), 12)
    2.5
    """
    draw = torch.randn(rows, cols, dtype=torch.float64, generator=rng)
    return draw * (norm / torch.linalg.vector_norm(draw))


def shuffled(delta: Tensor, rng: torch.Generator) -> Tensor:
    """The entries of `delta` in random places: the same histogram of changes, no structure."""
    flat = delta.flatten()
    return flat[torch.randperm(flat.numel(), generator=rng).to(delta.device)].reshape(delta.shape)


def visible_probability(weights: Tensor, scale: float) -> Tensor:
    """P[bf16(w + g) ≠ bf16(w)] for g ~ N(0, scale²), of every entry, float64; the arguments are those of `leaving`."""
    outward, inward = _leaves(weights.double().abs(), to_bf16(weights).abs(), scale)
    return outward + inward


def leaving(weights: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P[bf16(w + g) is larger than bf16(w)] and P[it is smaller] for g ~ N(0, scale²) and |w| in place of w, of every entry, float64.

    w + g stays in w's bf16 cell when it lies between the midpoints to the two neighbouring bf16 numbers.

    Args:
        weights: of any shape and float dtype.
        scale: the standard deviation of an entry of the update, above 0.
    """
    if weights.dtype == torch.bfloat16:  # one value for each of 2¹⁵ magnitudes
        every = torch.arange(1 << 15, dtype=torch.int32, device=weights.device).to(torch.int16).view(torch.bfloat16)
        place = (weights.contiguous().view(torch.int16) & 0x7FFF).long()
        outward, inward = _leaves(every.double(), every, scale)
        return outward[place], inward[place]
    return _leaves(weights.double().abs(), to_bf16(weights).abs(), scale)


class Magnitudes:
    """The magnitudes of bf16 weights, which are few: what depends on an entry's size alone is computed once for each.

    Attributes:
        values: (n,) bf16, zero and all between the smallest and the largest that occur.
    """

    def __init__(self, weights: Tensor):
        bits = weights.contiguous().view(torch.int16)
        self._parts = bits.split(rows_of_block(weights))
        sizes = [part.bitwise_and(0x7FFF) for part in self._parts]
        high = max(1, *(int(size.max()) for size in sizes))
        self._low = min(high, *(int(size.masked_fill_(size == 0, 0x7FFF).min()) for size in sizes))
        listed = torch.arange(self._low, high + 1, dtype=torch.int16, device=weights.device)
        self.values = torch.cat([listed.new_zeros(1), listed]).view(torch.bfloat16)

    def places(self) -> Iterator[Tensor]:
        """Where in `values` every entry stands, a block of rows at a time."""
        return (part.bitwise_and(0x7FFF).sub_(self._low - 1).clamp_(min=0).int() for part in self._parts)

    def count(self, codes: Tensor | None = None) -> Tensor:
        """(8, n) how often each occurs, by a code below 8 of every entry; without codes (1, n).

        >>> magnitudes = Magnitudes(torch.tensor([[1.0, -1.0, 1.0078125]], dtype=torch.bfloat16))
        >>> magnitudes.values.tolist(), magnitudes.count().tolist()
        ([0.0, 1.0, 1.0078125], [[0.0, 2.0, 1.0]])
        """
        n, kinds = len(self.values), 1 if codes is None else 8
        counts = torch.zeros(kinds * n, dtype=torch.int64, device=self.values.device)
        start = 0
        for place in self.places():
            if codes is not None:
                place += codes[start : start + len(place)].int() * n
            start += len(place)
            counts += torch.bincount(place.flatten(), minlength=kinds * n)
        return counts.view(kinds, n).double()

    def codes(self, codes: Tensor) -> Tensor:
        """(n,) the code of each, where entries of one magnitude share it."""
        found = torch.zeros(len(self.values), dtype=torch.uint8, device=self.values.device)
        start = 0
        for place in self.places():
            found[place.long()] = codes[start : start + len(place)]
            start += len(place)
        return found


def _leaves(magnitude: Tensor, cell: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """P[|w| + g rounds to a larger bf16 number than `cell`, which |w| rounds to] and P[to a smaller one], elementwise."""
    bits = cell.contiguous().view(torch.int16)
    above = (bits + 1).view(torch.bfloat16).double()
    below = torch.where(bits > 0, (bits - 1).clamp(min=0).view(torch.bfloat16).double(), -above)
    here, root = cell.double(), math.sqrt(2) * scale
    up, down = (here + above) / 2 - magnitude, magnitude - (here + below) / 2
    return torch.erfc(up / root) / 2, torch.erfc(down / root) / 2


def top_singular_values(rows: int, cols: int, norm: float, k: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """(draws, k) largest singular values of Gaussian (rows, cols) matrices of the Frobenius norm `norm`, without the matrices.

    Householder's reduction of a Gaussian matrix leaves a bidiagonal one with independent χ entries (Silverstein, 1985;
    Dumitriu and Edelman, 2002): the distribution is exact.
    """
    from scipy.linalg import eigh_tridiagonal

    large, small = max(rows, cols), min(rows, cols)
    # The vectors of the top k lie in the first rows, and fall off beyond as Airy functions do (Edelman and Persson, 2005).
    airy = (3 * math.pi * (4 * k + 3) / 8) ** (2 / 3) + 12
    first = min(small, math.ceil(airy * (large**-0.5 + small**-0.5) ** (-2 / 3)) + 8)
    values = np.empty((draws, k))
    for draw in range(draws):
        squares = rng.chisquare(np.arange(large, large - small, -1))
        beside = rng.chisquare(np.arange(small - 1, 0, -1)) if small > 1 else np.empty(0)
        diagonal = squares.copy()
        diagonal[:-1] += beside  # BᵀB of the lower bidiagonal B
        off = np.sqrt(squares[1:] * beside)
        if 4 * k > first:
            top = eigh_tridiagonal(diagonal, off, eigvals_only=True, lapack_driver="sterf")[small - k :]
        else:
            chosen = {"select": "i", "select_range": (first - k, first - 1)}
            top = eigh_tridiagonal(diagonal[:first], off[: first - 1], eigvals_only=True, **chosen)
        values[draw] = np.sqrt(np.maximum(top[::-1], 0) / (squares.sum() + beside.sum())) * norm
    return values


SPECTRA = 64


@lru_cache(maxsize=256)
def own_singular_values(rows: int, cols: int, k: int) -> np.ndarray:
    """(draws, k) largest singular values of Gaussian matrices of norm 1: one set serves all matrices of a shape."""
    return top_singular_values(rows, cols, 1.0, k, SPECTRA, np.random.default_rng(seed("spectrum", rows, cols, k)))


def energy_share(inside: float, total: float) -> tuple[float, float]:
    """Mean and standard deviation of the share of a Gaussian's energy in `inside` of its `total` dimensions.

    The share follows Beta(inside/2, (total − inside)/2).

    >>> energy_share(2, 4)[0]
    0.5
    """
    share = inside / total
    return share, math.sqrt(share * (1 - share) / (total / 2 + 1))


def independent_similarity(dimension: int, k: int) -> tuple[float, float]:
    """Mean and standard deviation of ‖VᵀW‖_F² / k for two independent, uniformly random k-dimensional subspaces.

    The first two moments of tr(PQ) of a fixed and a random projection.

    >>> independent_similarity(4, 4), independent_similarity(4, 1)[0]
    ((1.0, 0.0), 0.25)
    """
    if k >= dimension:
        return 1.0, 0.0
    n = dimension
    return k / n, (n - k) / n * math.sqrt(2 / ((n - 1) * (n + 2)))


@lru_cache(maxsize=256)
def own_energy(rows: int, cols: int, k: int) -> tuple[float, float]:
    """Mean and standard deviation of the share of a Gaussian matrix's energy in its own top k singular directions."""
    rng = np.random.default_rng(seed("own", rows, cols, k))
    shares = (top_singular_values(rows, cols, 1.0, k, 16, rng) ** 2).sum(axis=1)
    return float(shares.mean()), float(shares.std(ddof=1))


def spacing(sigma: Tensor, scale: float) -> float:
    """`scale` relative to the median spacing of the singular values `sigma`, (n,) descending; inf where that vanishes.

    First-order perturbation theory needs it well below 1.
    """
    gaps = sigma[:-1] - sigma[1:]
    middle = float(gaps.median()) if len(gaps) else math.inf
    return scale / middle if middle > 0 else math.inf


def shifts(sigma: Tensor, rows: int, cols: int, scale: float, draws: int, rng: torch.Generator) -> Tensor:
    """(draws, n) changes of the singular values `sigma` under Gaussian perturbations with entries N(0, scale²).

    First order: independent N(0, scale²), the diagonal of UᵀGV. Second order: its mean, repulsion between the values and
    the push of the dimensions beyond the smaller side (Stewart, Perturbation theory for the singular value decomposition, 1990).

    Args:
        sigma: (n,) descending, n = min(rows, cols).
        scale: the standard deviation of an entry.
    """
    squares = sigma**2
    outside = abs(rows - cols)
    push = torch.empty_like(sigma)
    for start in range(0, len(sigma), 256):
        part = squares[start : start + 256, None]
        apart = part - squares
        push[start : start + 256] = (apart / (apart**2 + 4 * scale**2 * (part + squares))).nan_to_num().sum(dim=1)
    floor = scale * math.sqrt(max(rows, cols))
    mean = scale**2 * sigma * push + scale**2 * outside / (2 * torch.maximum(sigma, torch.full_like(sigma, floor)))
    first = torch.randn(draws, len(sigma), dtype=torch.float64, generator=rng).to(sigma.device)
    return first * scale + mean


def factor(count: int, k: int, rng: torch.Generator) -> Tensor:
    """F with FᵀF distributed as that of a Gaussian (count, k) matrix: its triangular factor (Bartlett) where that is smaller."""
    if count <= k:
        return torch.randn(count, k, dtype=torch.float64, generator=rng)
    freedom = torch.arange(count, count - k, -1, dtype=torch.float64)
    diagonal = (2 * torch._standard_gamma(freedom / 2, generator=rng)).sqrt()
    return torch.randn(k, k, dtype=torch.float64, generator=rng).triu(1) + torch.diag(diagonal)


SIZE = 1200  # a larger smaller side is scaled down to this one
FINE = 3  # nodes of the table of similarities for every halving of the angle
NODES = 10 * FINE


class PairSimilarity:
    """Sim_K between S and S + R, independent Gaussian (rows, cols) matrices S and R: two points of a random walk.

    It depends on their shape and on the angle θ with cos θ = ‖S‖ / √(‖S‖² + ‖R‖²) alone, for both sides and every K at once. So one
    table over θ serves all matrices of a shape, at every pair of checkpoints: its nodes halve θ in `FINE` steps, are
    computed when they are first asked for, from the same draws, and in between the similarity is linear in log θ.

    A smaller side above `size` is replaced by `size` at the same aspect: near the edge of the spectrum the singular vectors
    depend on tan θ in units of the spacing there, 2 tan θ (rows^−½ + cols^−½)^−⅓ (Johnstone's scaling). At K = 32 that is
    right to about 0.02 with `SIZE`, at smaller K to less.
    """

    def __init__(self, rows: int, cols: int, ranks: tuple[int, ...], size: int = SIZE):
        self.asked, self.ranks, self.lock = (rows, cols), ranks, Lock()
        shrink = min(1.0, size / min(rows, cols))
        self.shape = round(rows * shrink), round(cols * shrink)
        self.draws = 16 if min(self.shape) <= SIZE // 2 else 8
        self.nodes: dict[int, Tensor] = {}
        self.origins: list[dict[str, Tensor]] = []

    def __call__(self, theta: float, device: str | torch.device = "cpu") -> dict[tuple[str, int], tuple[float, float]]:
        """(side, K) → mean and standard deviation of the similarity at an angle in [0, π/2]; `device` computes what is not known yet."""
        if theta <= 0:
            return {(side, k): (1.0, 0.0) for side in ("left", "right") for k in self.ranks}
        scaled = math.atan(math.tan(min(theta, math.pi / 2)) * _edge(*self.asked) / _edge(*self.shape))
        with self.lock:
            drawn = over_nodes(scaled, lambda index: self._node(index, device))
        found = {}
        for i, side in enumerate(("left", "right")):
            for j, k in enumerate(self.ranks):
                chance, there = k / self.asked[i], k / self.shape[i]
                # Of a side with no more than k dimensions, the top k are the whole space and always alike.
                values = (
                    drawn[:, i, j] if there == 1 else chance + (drawn[:, i, j] - there) * (1 - chance) / (1 - there)
                )
                found[side, k] = float(values.mean()), float(values.std())
        return found

    def _node(self, index: int, device: str | torch.device) -> Tensor:
        """(draws, sides, ranks) similarities at one angle."""
        if index not in self.nodes:
            theta = node_angle(index)
            values = torch.empty(self.draws, 2, len(self.ranks), dtype=torch.float64)
            for draw in range(self.draws):
                rng = generator("walk", *self.shape, draw)
                start, step = (torch.randn(*self.shape, dtype=torch.float64, generator=rng) for _ in range(2))
                if len(self.origins) <= draw:
                    self.origins.append(self._leading(start.to(device)))
                there = self._leading((start * math.cos(theta) + step * math.sin(theta)).to(device))
                for i, side in enumerate(("left", "right")):
                    squares = (self.origins[draw][side].to(device).T @ there[side]).square().cpu()
                    values[draw, i] = torch.stack([squares[:k, :k].sum() / k for k in self.ranks])
            self.nodes[index] = values
        return self.nodes[index]

    def _leading(self, matrix: Tensor) -> dict[str, Tensor]:
        found = spectrum(matrix, max(self.ranks))
        return {"left": found.left, "right": found.right}


@lru_cache(maxsize=64)
def pair_similarity(rows: int, cols: int, ranks: tuple[int, ...]) -> PairSimilarity:
    """The table of a shape and of these K, ascending; one in a process."""
    return PairSimilarity(rows, cols, ranks)


def node_angle(index: int) -> float:
    """The angle of a node of a table over θ, in radians: from π/2 down."""
    return math.pi / 2 * 2 ** (-index / FINE)


def over_nodes(theta: float, node: Callable[[int], Sampled]) -> Sampled:
    """A similarity at an angle in (0, π/2], linear in log θ between the two nodes beside it."""
    place = min(FINE * math.log2(math.pi / 2 / theta), NODES)
    below = min(int(place), NODES - 1)
    low, high = node(below), node(below + 1)
    found = low + (high - low) * (place - below)
    if theta < node_angle(NODES):  # as small perturbations act, in proportion to the square
        found = 1 - (1 - found) * (theta / node_angle(NODES)) ** 2
    return found


def _edge(rows: int, cols: int) -> float:
    return 2 / (rows**-0.5 + cols**-0.5) ** (1 / 3)

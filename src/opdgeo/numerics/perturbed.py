"""What an isotropic Gaussian G of any size does to the singular values of a known W₀ and to its leading subspaces.

The law of W₀ + G depends on W₀'s singular values s alone. Take W₀ = diag(s), m × n with m ≥ n, and entries of G from N(0, τ²).

**Where the singular values go.** Let S(P) = Σ 1/(P − sᵢ²), b = 1 + τ²S and c = τ²(m − n). The resolvent of W₀ + G at λ = σ² is, up to
O(1/n), W₀'s at a complex P, with

    λ = b²P + cb,       Σ 1/(λ − σᵢ²) = S/b,       πN(λ) = −Im [Σ log(P − sᵢ²) + ((b − 1)²P + c(b − log b))/τ²]

(Dozier and Silverstein, 2007, solved for λ; the last is the integral of the second). N counts the singular values above √λ. Points
P with Im λ = 0 and N between 0 and n trace the spectrum, and σᵢ lies at N = i − ½: `drift`. It holds for isolated values too, where it is
the formula of Benaych-Georges and Nadakuditi (2012).

**How they fluctuate about that.** σᵢ moves as τ times white noise, but where the noise exceeds the spacing δ the values keep each other
in place: Dyson's motion, linearised about equal spacing, gives wave number q the share (1 − e^{−a})/a of its variance, with
a = (τ/δ)²(πq − q²/2), times 1 + `CLOSE`/(1 + (τ/2δ)²) for the pairs that lie closer: `fluctuations`.

**How far the leading subspaces turn.** The angles at the cut are drawn, as eigenvectors of a problem of the levels nearest to it. Where
many levels mix, f neighbours count as one with noise of variance fτ², which keeps the width of a level; the cosine of the largest
angle is then 1/f of the drawn one. The rest of the mean comes from first-order couplings (Stewart, 1990), whose tangents are the singular
values of a Gaussian matrix with a variance profile v. The trace of a function of its Gram matrix has a deterministic equivalent
(Hachem, Loubaton and Najim, 2007):

    aᵢ = 1/(1 + Σⱼ vⱼᵢ ãⱼ/x),     ãⱼ = 1/(1 + Σᵢ vⱼᵢ aᵢ/x),     E tr[RᵀR(RᵀR + x)⁻¹] ≈ Σᵢ (1 − aᵢ),

and arctan √λ = (1/π) ∫ λ/(λ + x) artanh(e^{−|log x|/2}) d log x. Levels far from the cut enter in groups, with their number.

**How much of the leading subspaces stays.** In W₀'s singular vectors the resolvent of W₀ + G has the diagonal 1/(b(P − sᵢ²)) on the
smaller side and 1/((b + c/P)(P − sᵢ²)) on the larger. Its imaginary part tells where the energy of the i-th direction goes (Bun, Allez,
Bouchaud and Potters, 2018). What stays above the cut λₖ, where N = k, is

    Sim_k = −(1/πk) Im ∫ Σ_{i ≤ k} 1/(b(P − sᵢ²)) dλ   from λₖ to ∞

The integrand is analytic above the curve of P. So P may go straight up from the cut, where nothing is sharp: `similarity`. The
integrand tends to k/λ, and the arc that is left adds the argument of λ where the straight path ends, over π.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

import numpy as np
import scipy.fft
import torch
from numpy.typing import NDArray

from opdgeo.numerics.nulls import factor, node_angle, over_nodes

Vector = NDArray[np.float64]

FIRST_ORDER = 0.05  # noise over the gaps at the cut, up to which eigenvectors need no eigenproblem
CLOSE = 0.45  # how much closer pairs push each other more, where few levels mix: fitted to draws
POINTS, GAPS, ROOTS = 48, 6, 6  # of the spectrum's curve; gaps looked at more closely; steps to a root
BESIDE = np.array([0.0, 0.05, 0.2, 0.8, 0.95, 1.0])  # places in a gap
SMOOTH = 12  # levels on either side, at most, over which uneven spacing is evened out
WINDOW = 32, 64  # levels on each side of the cut that are drawn, of a small and of a large matrix
NODES, SWEEPS = 56, 20
SEARCH, ROUNDS, PATH = 12, 3, 256  # points of a round, and rounds, towards the cut; points of the path from there


@dataclass(frozen=True)
class Turn:
    """Draws of the angles in radians between W₀'s top-k subspace and that of W₀ + G.

    Attributes:
        largest, mean: (draws,) of the k angles.
    """

    largest: Vector
    mean: Vector


@dataclass(frozen=True)
class Levels:
    """Levels at a cut.

    Attributes:
        value: descending, each of `merged` neighbours.
        above: how many of them are above the cut.
        start, stop: the singular values that they stand for.
    """

    value: Vector
    above: int
    merged: int
    start: int
    stop: int


class Noise:
    """G against W₀. s: (n,) W₀'s singular values, descending; `large`: the larger side; `scale`: τ."""

    def __init__(self, s: Vector, large: int, scale: float):
        self.s, self.squares, self.large, self.scale = s, s * s, large, scale
        self.beyond = large - len(s)

    # Singular values ---------------------------------------------------------------------------------------------

    def _image(self, p: Vector, q: Vector) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
        """b and λ at P = p + iq."""
        apart = p[:, None] - self.squares
        inverse = 1 / (apart * apart + (q * q)[:, None])
        real, weight = np.einsum("ij,ij->i", apart, inverse), inverse.sum(axis=1)
        b = 1 + self.scale**2 * (real - 1j * q * weight)
        return b, b * b * (p + 1j * q) + self.scale**2 * self.beyond * b

    def _above(self, p: Vector, q: Vector, b: NDArray[np.complex128]) -> Vector:
        """N at P = p + iq inside the spectrum."""
        angles = np.arctan2(q[:, None], p[:, None] - self.squares).sum(axis=1)
        rest = (b - 1) ** 2 * (p + 1j * q) + self.scale**2 * self.beyond * (b - np.log(b))
        return np.asarray((angles + rest.imag / self.scale**2) / math.pi)

    def widths(self, p: Vector) -> Vector:
        """q > 0 with Im λ(p + iq) = 0: half the width, in squared singular values, over which levels at p mix; 0 outside the spectrum."""
        size = self.scale * math.sqrt(self.large + len(self.s))
        most = 4 * size * (float(self.s[0]) + size)
        least = 1e-3 * self.scale * max(float(self.s[-1]), self.scale)
        steps = max(8, math.ceil(math.log(most / least) / math.log(3)))
        high = np.full(len(p), most)
        low, found = np.zeros(len(p)), np.zeros(len(p), dtype=bool)
        for q in np.geomspace(most, least, steps)[1:]:
            todo = np.flatnonzero(~found)
            if not len(todo):
                break
            inside = self._image(p[todo], np.full(len(todo), q))[1].imag < 0
            low[todo[inside]], found[todo[inside]] = q, True
            high[todo[~inside]] = q
        at = np.flatnonzero(found)
        p, low, high = p[at], np.log(low[at]), np.log(high[at])
        below, over = (self._image(p, np.exp(q))[1].imag / np.exp(q) for q in (low, high))
        middle = (low + high) / 2
        for _ in range(ROOTS):  # the Illinois method
            middle = low + (high - low) * below / (below - over)
            value = self._image(p, np.exp(middle))[1].imag / np.exp(middle)
            inside = value < 0
            below, over = np.where(inside, value, below / 2), np.where(inside, over / 2, value)
            low, high = np.where(inside, middle, low), np.where(inside, high, middle)
        out = np.zeros(len(found))
        out[at] = np.exp(middle)
        return out

    @cached_property
    def drift(self) -> Vector:
        """(n,) the mean changes of the singular values."""
        n, squares = len(self.s), self.squares
        chosen = np.unique(np.linspace(0, n - 1, min(n, POINTS)).astype(int))
        size = self.scale * math.sqrt(self.large + n)
        out = size * np.geomspace(0.01, 2, 16)
        points = [squares[chosen], squares[0] + out * (self.s[0] + out), squares[-1] - out * (self.s[-1] + out)]
        if n > 1:  # beside the widest gaps, where isolated values and the edge of the others lie
            gaps = squares[:-1] - squares[1:]
            at = np.argsort(gaps)[-GAPS:]
            points.append((squares[at + 1, None] + gaps[at, None] * BESIDE).ravel())
        p = np.unique(np.concatenate(points))
        q = self.widths(p)
        for _ in range(3):  # towards the ends of what lies inside
            inside = q > 0
            ends = np.flatnonzero(inside[1:] != inside[:-1])
            widest = ends[np.argsort(p[ends + 1] - p[ends])][-4:]
            ends = np.unique(np.concatenate([ends[:2], widest, ends[-2:]]))
            more = (p[ends, None] + (p[ends + 1] - p[ends])[:, None] * np.array([0.25, 0.5, 0.75])).ravel()
            p, q = np.append(p, more), np.append(q, self.widths(more))
            order = np.argsort(p)
            p, q = p[order], q[order]
        widest = np.argsort(squares[:-1] - squares[1:])[-GAPS:]
        wide = [int(i) + 1 for i in widest if bool(((q == 0) & (p < squares[i]) & (p > squares[i + 1])).any())]
        p, q = p[q > 0], q[q > 0]
        b, image = self._image(p, q)
        above = np.clip(self._above(p, q, b), 0, n)
        values = np.sqrt(np.maximum(image.real, 0))
        order = np.argsort(above)
        above, values = above[order], values[order]
        if not self.beyond and len(above) > 1:  # the lowest of a square matrix may lie next to 0
            slope = (values[-2] - values[-1]) / max(above[-1] - above[-2], 1e-9)
            with np.errstate(divide="ignore"):
                closed = float(((self.scale / self.s) ** 2).sum()) > 1
            lowest = 0.0 if closed else max(0.0, float(values[-1] - (n - above[-1]) * slope))
            above, values = np.append(above, n), np.append(values, lowest)
        places, found = np.arange(n) + 0.5, np.zeros(n)
        mixed = np.minimum(1.5 * (self.scale / np.maximum(_local(self.s), 1e-300)) ** 2, SMOOTH).astype(int)
        for start, stop in pairwise([0, *sorted(wide), n]):  # what lies between two open gaps, on its own
            own = (above > start + 1e-4) & (above < stop - (1e-4 if stop < n else -1))
            if own.any():
                here, place = slice(start, stop), np.arange(stop - start)
                # Levels that mix forget how unevenly they were spaced.
                reach = np.minimum(mixed[here], np.minimum(place, place[::-1]))
                sums = np.append(0.0, np.cumsum(self.s[here]))
                even = (sums[place + reach + 1] - sums[place - reach]) / (2 * reach + 1)
                moved = values[own] - np.interp(above[own], places[here], even)
                found[here] = np.interp(places[here], above[own], moved) + even - self.s[here]
        return found

    def fluctuations(self, draws: int, rng: np.random.Generator) -> Vector:
        """(draws, n) changes of the singular values about `drift`."""
        n = len(self.s)
        noise = rng.standard_normal((draws, n))
        noise *= self.scale / math.sqrt(float((noise**2).mean()))  # their size does not vary from set to set
        if n < 2:
            return noise
        at = self.s + self.drift
        spacing = sum((_local(values) for values in (self.s, at)), np.zeros(n)) / 2
        ratio = np.clip(self.scale / np.maximum(spacing, 1e-300), 1e-3, 1e3)
        levels = np.geomspace(max(ratio.min(), 1e-2), max(ratio.max(), 2e-2), 5)
        # A real wave of period 2n mirrors the ends.
        transformed = scipy.fft.dct(noise, norm="ortho", axis=1)
        q = math.pi * np.arange(n) / n
        share = []
        for x in levels:
            a = x * x * (1 + CLOSE / (1 + x * x / 4)) * (math.pi * q - q * q / 2)
            with np.errstate(divide="ignore", invalid="ignore"):
                share.append(np.sqrt(np.where(a > 1e-12, -np.expm1(-a) / a, 1.0)))
        filtered = np.stack([scipy.fft.idct(transformed * part, norm="ortho", axis=1) for part in share])
        place = np.clip(np.interp(np.log(ratio), np.log(levels), np.arange(len(levels))), 0, len(levels) - 1)
        low = np.minimum(place.astype(int), len(levels) - 2)
        part, columns = place - low, np.arange(n)
        return np.asarray(filtered[low, :, columns].T * (1 - part) + filtered[low + 1, :, columns].T * part)

    # Subspaces ---------------------------------------------------------------------------------------------------

    def similarity(self, k: int) -> tuple[float, float]:
        """The mean of ‖VᵀV₊‖_F²/k for the top-k subspaces V of W₀ and V₊ of W₀ + G, 0 < k < n: of the smaller side and of the larger.

        In closed form, with W₀'s levels as they are.
        """
        p, q = self._cut(k)
        size = self.scale * math.sqrt(self.large + len(self.s))
        nearest = q + float(np.abs(self.squares - p).min())
        farthest = max(1e5 * (float(self.s[0]) + size) ** 2, 10 * nearest)
        path = p + 1j * (q + np.append(0.0, np.geomspace(1e-3 * nearest, farthest, PATH)))
        inverse = 1 / (path[:, None] - self.squares)
        c = self.scale**2 * self.beyond
        b = 1 + self.scale**2 * inverse.sum(axis=1)
        image, inside = b * b * path + c * b, inverse[:, :k].sum(axis=1)
        found = []
        for by in (b, b + c / path):
            integral = np.trapezoid(inside / by, image).imag
            found.append(min(1.0, max(0.0, float(np.angle(image[-1]) - integral / k) / math.pi)))
        return found[0], found[1]

    def _cut(self, k: int) -> tuple[float, float]:
        """P = p + iq between the k-th level of W₀ + G and the next."""
        out = 4 * self.scale * math.sqrt(self.large + len(self.s))
        low, high = -out * (self.s[0] + out), self.s[0] ** 2 + out * (self.s[0] + out)
        part = 0.5
        for _ in range(ROUNDS):
            p = np.linspace(low, high, SEARCH)
            q = self.widths(p)
            above = (self.squares > p[:, None]).sum(axis=1).astype(float)
            inside = np.flatnonzero(q)
            above[inside] = self._above(p[inside], q[inside], self._image(p[inside], q[inside])[0])
            if (gap := p[(q == 0) & (above == k)]).size:
                return float(gap[0] + gap[-1]) / 2, 0.0
            i = int((above > k).sum()) - 1
            low, high, part = float(p[i]), float(p[i + 1]), (above[i] - k) / (above[i] - above[i + 1])
        middle = low + (high - low) * part
        return middle, float(self.widths(np.array([middle]))[0])

    def turns(self, k: int, draws: int, rng: torch.Generator, half: int | None = None) -> tuple[Turn, Turn]:
        """The turn of the top-k subspaces, 0 < k < n: that of the smaller side, and that of the larger.

        `half`: about so many levels are drawn on each side of the cut.
        """
        half = half or min(max(len(self.s) // 12, WINDOW[0]), WINDOW[1])
        cut = (self.squares[k - 1] + self.squares[k]) / 2
        width = float(self.widths(np.array([cut]))[0])
        levels = _window(self.squares, k, int((np.abs(self.squares - cut) < width).sum()), half)
        rest = _rest(self, levels, width)
        drawn = [self._draw(levels, width, rng) for _ in range(draws)]
        found = []
        for far, side in zip(rest, zip(*drawn, strict=True), strict=True):
            sums = np.array([total for _, total in side])
            # f times as many angles; but a sum over a spectrum varies by as much at any size.
            mean = (levels.merged * sums.mean() + far + sums - sums.mean()) / k
            found.append(Turn(np.array([largest for largest, _ in side]), mean))
        return found[0], found[1]

    def _draw(self, levels: Levels, width: float, rng: torch.Generator) -> list[tuple[float, float]]:
        """For both sides the largest angle and the sum of all, of the levels at the cut."""
        level, above, f = levels.value, levels.above, levels.merged
        size, scale = len(level), self.scale * math.sqrt(f)
        entries = torch.randn(size, size, dtype=torch.float64, generator=rng) * scale
        beyond = factor(self.beyond // f, size, rng) * scale
        if self.scale * math.sqrt(2) < FIRST_ORDER * (level[above - 1] - level[above]):
            top, rest = torch.from_numpy(level[:above]), torch.from_numpy(level[above:, None])
            near, back = entries[above:, :above], entries[:above, above:].T
            between = top**2 - rest**2
            inner, outer = (top * near + rest * back) / between, (rest * near + top * back) / between
            outer = torch.cat([outer, beyond[:, :above] / top])
            tangents = [torch.linalg.eigvalsh(t.T @ t).clamp(min=0).sqrt() for t in (inner, outer)]
            angles = [torch.atan(2 * t) / 2 for t in tangents]
            return [(float(a[-1]), float(a.sum())) for a in angles]
        others = np.concatenate([self.squares[: levels.start], self.squares[levels.stop :]])
        apart = level[:, None] ** 2 - others  # those that are not drawn hold the drawn ones together, to second order
        held = level + self.scale**2 * level * (apart / (apart**2 + width**2)).sum(axis=1)
        entries.diagonal().add_(torch.from_numpy(held))
        squares, right = torch.linalg.eigh(entries.T @ entries + beyond.T @ beyond)
        right = right[:, size - above :]
        left = (entries @ right) / squares[size - above :].clamp(min=0).sqrt()
        found = []
        for inside in (right[:above], left[:above]):
            cosines = torch.linalg.eigvalsh(inside.T @ inside).clamp(0, 1).sqrt()
            found.append((math.acos(float(cosines[0]) / f), float(torch.acos(cosines).sum())))
        return found


def _local(values: Vector) -> Vector:
    """Mean spacing of descending values around each of them: on the side where they lie closer."""
    n = len(values)
    reach, here = min(4, n - 1), np.arange(n)
    low, high = np.maximum(here - reach, 0), np.minimum(here + reach, n - 1)
    above = np.divide(values[low] - values, here - low, out=np.full(n, np.inf), where=here > low)
    below = np.divide(values - values[high], high - here, out=np.full(n, np.inf), where=high > here)
    near = np.minimum(above, below)
    return np.asarray(np.where(np.maximum(above, below) > 3 * near, near, (values[low] - values[high]) / (high - low)))


def _window(squares: Vector, k: int, mixed: int, half: int) -> Levels:
    """The levels at the cut below the k-th where `mixed` of them lie within the width of one."""
    n = len(squares)
    f = max(1, min(math.ceil(2 * mixed / half), n // (2 * half), 2 * min(k, n - k) // half))
    reach = min(2 * half, max(half, 4 * mixed // f))
    above, below = min(reach, k // f), min(reach, (n - k) // f)
    start, stop = k - above * f, k + below * f
    return Levels(np.sqrt(squares[start:stop].reshape(-1, f).mean(axis=1)), above, f, start, stop)


def _rest(noise: Noise, levels: Levels, width: float) -> tuple[float, float]:
    """To first order, the sum of all angles less that of the levels that are drawn, for both sides."""
    if levels.stop - levels.start == len(noise.s):
        return 0.0, 0.0
    own = np.full(len(levels.value), float(levels.merged))
    upper, lower = noise.squares[: levels.start][::-1], noise.squares[levels.stop :]
    first, many = _groups(upper, levels.above * levels.merged)
    last, more = _groups(lower, (len(own) - levels.above) * levels.merged)
    every = np.concatenate([first[::-1], levels.value, last])
    found = [0.0, 0.0]
    for sign, value, count, top in (
        (1, every, np.concatenate([many[::-1], own, more]), len(first) + levels.above),
        (-1, levels.value, own, levels.above),
    ):
        high, low, noise2 = value[:top] ** 2, value[top:, None] ** 2, noise.scale**2
        # The square of G couples too: over as many rows and columns as there are.
        columns = float(count.sum())
        rows = columns + noise.beyond
        # Levels that mix couple as broad ones do (Bun, Allez, Bouchaud and Potters, 2018).
        broad = noise2 / ((high - low) ** 2 + width**2)
        sums = [_sum(broad * (high + low + noise2 * rows), count[:top], count[top:])] * 2
        if noise.beyond:  # (Benaych-Georges and Nadakuditi, 2012)
            apart = np.maximum(high**2 - rows * columns * noise2**2, high**2 / 4)
            outer = np.vstack([broad * (high + low + noise2 * columns), noise2 * (high + noise2 * columns) / apart])
            sums[1] = _sum(outer, count[:top], np.append(count[top:], noise.beyond))
        found = [f + sign * s for f, s in zip(found, sums, strict=True)]
    return found[0], found[1]


def _groups(squares: Vector, apart: int) -> tuple[Vector, Vector]:
    """Levels, from the cut outwards, in groups that grow with the distance from it, the first of which is `apart`: the groups' level and size."""
    bounds = [0]
    while bounds[-1] < len(squares):
        bounds.append(min(len(squares), bounds[-1] + max(1, (apart + bounds[-1]) // 8)))
    sizes = np.diff(bounds).astype(float)
    if not len(sizes):
        return sizes, sizes
    return np.sqrt(np.add.reduceat(squares, bounds[:-1]) / sizes), sizes


def _sum(variance: Vector, counts: Vector, others: Vector) -> float:
    """Σ arctan tᵢ over the singular values t of a Gaussian matrix; `counts` of its columns, `others` of its rows are alike."""
    energy = variance * others[:, None]
    low, high = math.log(float(variance.min())) - 4, math.log(float(energy.sum(axis=0).max())) + 6
    step = (high - low) / NODES
    # The weight has a logarithmic pole at 0: half a step from its neighbours, whose weights make up for it.
    u = step * (np.arange(math.floor(low / step), math.ceil(high / step)) + 0.5)
    x = np.exp(u)
    a, b = np.full((len(u), len(counts)), 0.5), np.full((len(u), len(others)), 0.5)
    for _ in range(SWEEPS):
        b = np.sqrt(b / (1 + (a * counts) @ variance.T / x[:, None]))
        a = np.sqrt(a / (1 + (b * others) @ variance / x[:, None]))
    weight = np.arctanh(np.exp(-np.abs(u) / 2)) + np.where(np.abs(u) < step, math.log(2) / 4, 0.0)
    return float(((1 - a) @ counts) @ weight * step / math.pi)


@lru_cache(maxsize=64)
def _gaussian_levels(large: int, small: int) -> Vector:
    """(small,) singular values of a matrix with entries N(0, 1), descending, where the law of Marchenko and Pastur expects them."""
    phi = np.linspace(0, math.pi, 4 * small + 1024)
    middle, reach = large + small, 2 * math.sqrt(large * small)
    squares = middle + reach * np.cos(phi)
    density = np.sin(phi) ** 2 / np.maximum(squares, 1e-12 * middle)
    above = np.append(0.0, np.cumsum(density[1:] + density[:-1]))
    places = np.interp((np.arange(small) + 0.5) / small, above / above[-1], phi)
    return np.sqrt(middle + reach * np.cos(places))


@lru_cache(maxsize=1024)
def walk_node(rows: int, cols: int, k: int, index: int) -> float:
    """The similarity at a node of the table over the angle."""
    if index == 0:  # independent
        return k / cols
    large, small = max(rows, cols), min(rows, cols)
    sides = Noise(_gaussian_levels(large, small), large, math.tan(node_angle(index))).similarity(k)
    return sides[0] if cols == small else sides[1]


def walk_similarity(rows: int, cols: int, k: int, theta: float) -> float:
    """What `nulls.PairSimilarity` draws, in closed form: the mean right Sim_k, 0 < k < min(rows, cols), of S and S + R.

    S lies at the levels that are expected of a Gaussian matrix, and R is noise on it. The values at the nodes of the table are kept.
    """
    return over_nodes(theta, lambda index: walk_node(rows, cols, k, index))

"""Two updates of one matrix, with what the diagnostics that compare them share computed at most once.

The null of a pair is two independent isotropic Gaussian updates of the same Frobenius norms. Their directions are independent and
uniform, so most nulls have closed forms. Whether an entry moves visibly in bf16 hangs on its |w| and on the update's size: two
independent updates then meet on small weights. The chances of that are sums over W₀'s entries.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from opdgeo.diagnostics.diagnostic import Settings
from opdgeo.diagnostics.update import Base, Update, cached
from opdgeo.numerics import nulls
from opdgeo.numerics.masks import rows_of_block
from opdgeo.numerics.operators import inner_products
from opdgeo.numerics.precision import FINEST


@dataclass(frozen=True)
class Counts:
    """Entries that moved visibly in bf16: in each update, in both, in both to the same side, in either."""

    first: int
    second: int
    both: int
    same: int

    @property
    def either(self) -> int:
        return self.first + self.second - self.both


@dataclass(frozen=True)
class Chances:
    """The sums of `Counts` that are expected of independent isotropic updates, and the sums of the products of the entries'
    probabilities, which their variances need. `FIRST` … `EITHER` are the places in both."""

    sums: Tensor  # (5,)
    products: Tensor  # (5, 5)

    def share(self, part: int, whole: int) -> tuple[float, float] | None:
        """Mean and standard deviation of the ratio of two counts, of which one is a part of the other; to first order."""
        p, q = float(self.sums[part]), float(self.sums[whole])
        if not q > 0:
            return None
        r = p / q
        squares = float(
            self.products[part, part] - 2 * r * self.products[part, whole] + r * r * self.products[whole, whole]
        )
        return r, math.sqrt(max(0.0, p * (1 - 2 * r) + r * r * q - squares)) / q

    def lift(self, entries: int) -> tuple[float, float] | None:
        """Mean and standard deviation of both · entries / (first · second); to first order."""
        a, b, both = (float(self.sums[i]) for i in (FIRST, SECOND, BOTH))
        if not both > 0:
            return None
        # of x/I − a/A − b/B with x = ab, whose squares are those of indicators
        weights = self.sums.new_zeros(5)
        weights[FIRST], weights[SECOND], weights[BOTH] = -1 / a, -1 / b, 1 / both
        second = 1 / both + 1 / a + 1 / b - 2 / a - 2 / b + 2 * both / (a * b)
        variance = second - float(weights @ self.products @ weights)
        mean = both * entries / (a * b)
        return mean, mean * math.sqrt(max(0.0, variance))


FIRST, SECOND, BOTH, SAME, EITHER = range(5)


class Pair:
    """Two updates of the same W₀, `first` seen against `second`."""

    def __init__(self, first: Update, second: Update):
        self.first, self.second = first, second

    @property
    def base(self) -> Base:
        return self.first.base

    @property
    def settings(self) -> Settings:
        return self.first.settings

    @property
    def shape(self) -> tuple[int, int]:
        return self.first.shape

    @property
    def moved(self) -> bool:
        return self.first.moved and self.second.moved

    def swapped(self) -> Pair:
        """The second seen against the first."""
        pair = Pair(self.second, self.first)
        if "inner" in self.__dict__:
            inner, own, other = self.inner
            pair.inner = inner, other, own
        return pair

    @cached
    def inner(self) -> tuple[float, float, float]:
        """⟨A, B⟩, ⟨A, A⟩ and ⟨B, B⟩ of the two updates over their norms. Both moved."""
        return inner_products(self.first.delta, self.second.delta)

    @property
    def norm_error(self) -> float:
        """A bound on the rounding error of an inner product of the two, relative to the product of their norms."""
        return self.first.norm_error + self.second.norm_error

    @cached
    def counts(self) -> Counts:
        first, second = self.first.visible, self.second.visible
        same = both = 0
        size = rows_of_block(self.base.weights)
        for start in range(0, self.shape[0], size):
            part = slice(start, start + size)
            shared = first[part] & second[part]
            both += int(shared.count_nonzero())
            before = self.base.weights[part]
            up, down = self.first.weights[part] > before, self.second.weights[part] > before
            same += int((shared & (up == down)).count_nonzero())
        return Counts(int(first.count_nonzero()), int(second.count_nonzero()), both, same)

    @cached
    def chances(self) -> Chances | None:
        """What is expected given W₀'s magnitudes; None where η counts more than a step of bf16."""
        if self.settings.eta >= FINEST:
            return None
        entries = math.sqrt(math.prod(self.shape))
        device = self.base.weights.device
        sums = torch.zeros(5, dtype=torch.float64, device=device)
        products = torch.zeros(5, 5, dtype=torch.float64, device=device)
        for part in self.base.weights.split(rows_of_block(self.base.weights)):
            (up, down), (up_, down_) = (nulls.leaving(part, u.norm / entries) for u in (self.first, self.second))
            first, second = (up + down).flatten(), (up_ + down_).flatten()
            both = first * second
            of = torch.stack([first, second, both, (up * up_ + down * down_).flatten(), first + second - both])
            sums += of.sum(1)
            products += of @ of.T
        return Chances(sums.cpu(), products.cpu())

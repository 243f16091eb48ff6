"""One matrix before and after training, with what the diagnostics share computed at most once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from opdgeo.diagnostics.diagnostic import Settings, cut
from opdgeo.numerics import precision
from opdgeo.numerics.masks import Blocks, Mask, Threshold, magnitudes, masks, rows_of_block
from opdgeo.numerics.nulls import Magnitudes
from opdgeo.numerics.spectra import (
    EPS,
    Difference,
    LowRankMatrix,
    MatrixOperator,
    Spectrum,
    principal_angles,
    spectrum,
    truncated_svd,
    truncation_error,
)
from opdgeo.numerics.subspaces import largest_rank

T = TypeVar("T")


class cached(Generic[T]):
    """`functools.cached_property` without its lock. Up to Python 3.11 that lock makes all threads wait for each other."""

    def __init__(self, work: Callable[[Any], T]):
        self.work, self.name, self.__doc__ = work, work.__name__, work.__doc__

    @overload
    def __get__(self, instance: None, owner: type) -> cached[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: object | None, owner: type) -> cached[T] | T:
        if instance is None:
            return self
        value = instance.__dict__[self.name] = self.work(instance)
        return value


class Base:
    """W₀ of one (rows, cols) matrix as it is stored, and what every checkpoint and null draw shares of it.

    Float64 copies are made when asked for and not kept: a large model's memory goes to the matrix at hand.
    """

    def __init__(self, weights: Tensor, settings: Settings):
        self.weights, self.settings = weights, settings
        self.thresholds: dict[str, Threshold] = {}  # of the masks, by name and share: found here or by an earlier run

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.weights.shape
        return rows, cols

    @property
    def matrix(self) -> Tensor:
        return self.weights.double()

    def cut(self, rank: int) -> tuple[int, str | None]:
        """The rank that the matrix allows, and what the row says where that is less than the rank asked for."""
        return cut(rank, self.shape)

    @cached
    def factored_rank(self) -> int:
        return max(self.cut(self.settings.rank)[0], self.cut(self.settings.mask_rank)[0])

    @cached
    def spectrum(self) -> Spectrum:
        return spectrum(self.matrix, self.factored_rank)

    @cached
    def norm(self) -> float:
        """‖W₀‖_F."""
        return _norm(part.double() for part in self.weights.split(rows_of_block(self.weights)))

    @cached
    def counted(self) -> tuple[Tensor, Tensor] | None:
        """(n,) the bf16 magnitudes of W₀ and (n,) how many entries have each; None where an entry is no bf16 number."""
        rounded = precision.to_bf16(self.weights)
        if not torch.equal(rounded.to(self.weights.dtype), self.weights):
            return None
        found = Magnitudes(rounded)
        return found.values, found.count()[0]

    @cached
    def low_magnitude(self) -> dict[float, Mask]:
        """For every share, the mask of the smallest |W₀|."""
        return self._masks("low_magnitude", magnitudes(self.weights), top=False)

    @cached
    def principal(self) -> dict[float, Mask] | None:
        """For every share, the mask of the largest |rank-`mask_rank` reconstruction of W₀|; None where that is not determined."""
        k, _ = self.cut(self.settings.mask_rank)
        of = self.spectrum
        slack = truncation_error(of, k)
        if math.isinf(slack):
            return None
        left, right_t = of.left[:, :k] * of.sigma[:k].to(of.left.device), of.right[:, :k].T.contiguous()

        def score() -> Iterator[Tensor]:
            for part in left.split(rows_of_block(right_t)):
                yield (part @ right_t).abs_()

        return self._masks(f"principal.{k}", score, top=True, slack=slack)

    def _masks(self, name: str, scores: Blocks, *, top: bool, slack: float = 0.0) -> dict[float, Mask]:
        names = {share: f"{name}.{share!r}" for share in self.settings.mask_share}
        known = {share: self.thresholds[n] for share, n in names.items() if n in self.thresholds}
        known = known if len(known) == len(names) else {}
        found = masks(scores, self.shape, list(names), top=top, slack=slack, known=known)
        self.thresholds |= {names[share]: mask.threshold for share, mask in found.items()}
        return found


class Update:
    """ΔW = W₊ − W₀ of one (rows, cols) matrix, with its shared quantities computed at most once, in float64.

    Args:
        tuned: W₊ as it is stored. A ΔW that is known in factors is a `LowRankUpdate`.
        directions: how many singular triplets of ΔW a trajectory compares; their vectors are computed to full accuracy. With 0
            only the leading `top_k` singular values are.
        sampled: marks a draw of a null model. Its spread is far above rounding, so it is measured to three digits.
        start: (cols, any) directions that are expected near ΔW's leading right ones.
    """

    def __init__(
        self,
        base: Base,
        tuned: Tensor,
        *,
        directions: int = 0,
        sampled: bool = False,
        start: Tensor | None = None,
    ):
        self.base, self.settings = base, base.settings
        self.weights = tuned
        self.directions, self.sampled, self.start = directions, sampled, start

    @property
    def shape(self) -> tuple[int, int]:
        return self.base.shape

    @property
    def delta(self) -> MatrixOperator:
        return Difference(self.base.weights, self.weights, self.norm)

    @cached
    def moved(self) -> bool:
        if self.weights.dtype == self.base.weights.dtype:
            return not torch.equal(self.weights, self.base.weights)
        return any(bool((after.double() != before.double()).any()) for before, after in self.blocks())

    @cached
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return _norm(after.double() - before for before, after in self.blocks())

    @property
    def norm_method(self) -> str:
        return "sum"

    @property
    def norm_error(self) -> float:
        """A bound on the rounding error of `norm`, relative to it: of a pairwise sum of exact differences."""
        return EPS * (8 + math.sqrt(self.weights.numel()))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """W₀ and W₊ in blocks of rows."""
        size = rows_of_block(self.weights)
        return zip(self.base.weights.split(size), self.weights.split(size), strict=True)

    @cached
    def tuned_spectrum(self) -> Spectrum:
        return spectrum(self.weights.double(), self.base.factored_rank) if self.moved else self.base.spectrum

    @cached
    def delta_spectrum(self) -> Spectrum:
        """The leading `top_k` singular triplets of ΔW, or `directions` of them. Of a small matrix, all singular values."""
        largest = largest_rank(*self.shape)
        k = min(self.settings.top_k, largest)
        if self.sampled:
            return truncated_svd(self.delta, k, tolerance=1e-4, angle=math.inf)
        if not self.directions:
            return truncated_svd(self.delta, k, angle=math.inf, start=self.start)
        most = min(max(self.directions, k), largest)
        found = truncated_svd(self.delta, most, angle=1e-5, start=self.start, rank=k)
        return replace(found, floor=self.rounding)

    @cached
    def rounding(self) -> float:
        """How large the singular values are that the rounding of W₊ as it is stored gives to ΔW."""
        return precision.rounding(*precision.squares(self.weights), self.weights.dtype)

    @cached
    def angles(self) -> dict[str, Tensor]:
        """Principal angles in radians, ascending, between the top-`rank` subspaces of W₀ and W₊, left and right."""
        k, _ = self.base.cut(self.settings.rank)
        before, after = self.base.spectrum, self.tuned_spectrum
        return {
            "left": principal_angles(before.left[:, :k], after.left[:, :k]),
            "right": principal_angles(before.right[:, :k], after.right[:, :k]),
        }

    @cached
    def unchanged(self) -> tuple[Tensor, Tensor]:
        """Entries a bf16 reader sees unchanged: under the η rule, and to the bit."""
        return precision.unchanged(self.base.weights, self.weights, self.settings.eta)

    @cached
    def visible(self) -> Tensor:
        """The mask M of visible updates: entries changed under the η rule."""
        return ~self.unchanged[0]


class LowRankUpdate(Update):
    """An update whose ΔW is known in factors: what is spectral comes from them, and W₊ is W₀ + ΔW in float64, formed only where its
    entries are asked for."""

    def __init__(
        self,
        base: Base,
        delta: LowRankMatrix,
        *,
        directions: int = 0,
        sampled: bool = False,
        start: Tensor | None = None,
    ):
        self.base, self.settings, self.low_rank = base, base.settings, delta
        self.directions, self.sampled, self.start = directions, sampled, start

    @cached
    def weights(self) -> Tensor:
        """W₊."""
        return torch.addmm(self.base.matrix, self.low_rank.left, self.low_rank.right.T)

    @property
    def delta(self) -> MatrixOperator:
        return self.low_rank

    @cached
    def moved(self) -> bool:
        return self.norm > 0

    @cached
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return self.low_rank.norm

    @property
    def norm_method(self) -> str:
        return "factors"

    @property
    def norm_error(self) -> float:
        """A bound on the rounding error of `norm`, relative to it: of the core of the factors."""
        return self.low_rank.error / self.norm if self.moved else 0.0

    @property
    def rounding(self) -> float:
        """Factors are not rounded to the weights that they are added to."""
        return 0.0


def _norm(blocks: Iterator[Tensor]) -> float:
    """Frobenius norm of float64 blocks, scaled so that no square over- or underflows."""
    norms = []
    for block in blocks:
        norm = float(torch.linalg.vector_norm(block))
        if not 1e-100 < norm < 1e100 and (scale := float(block.abs().max())) > 0:
            norm = scale * float(torch.linalg.vector_norm(block / scale))
        norms.append(norm)
    return math.hypot(*norms)

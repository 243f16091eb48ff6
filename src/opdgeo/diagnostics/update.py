"""One matrix before and after training, with everything the diagnostics share computed at most once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opdgeo.errors import ConfigError
from opdgeo.numerics import precision
from opdgeo.numerics.masks import Blocks, Threshold, magnitudes, rows_of_block, thresholds
from opdgeo.numerics.spectra import EPS, Spectrum, leading, principal_angles, spectrum


@dataclass(frozen=True)
class Settings:
    """What the diagnostics are asked for; saved beside the results.

    Raises:
        ConfigError: a value outside its range.
    """

    rank: int = 512  # principal angles, PAPER §2
    top_k: int = 16  # singular triplets of ΔW: Hill exponent, subspace similarity
    mask_rank: int = 64  # rank of W₀'s reconstruction behind the principal mask; principal energy
    mask_share: tuple[float, ...] = (0.5, 0.3)
    eta: float = 1e-3
    nulls: int = 4  # draws per matrix
    null: str = "gaussian"  # or "shuffled"

    def __post_init__(self) -> None:
        for name in ("rank", "top_k", "mask_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a whole number of at least 1.")
        if self.nulls < 0:
            raise ConfigError(f"nulls is {self.nulls}; expected 0 (none) or more draws.")
        if self.null not in ("gaussian", "shuffled"):
            raise ConfigError(f"null is {self.null!r}; expected 'gaussian' or 'shuffled'.")
        if not 0 <= self.eta < 1:
            raise ConfigError(f"eta is {self.eta}; expected a relative tolerance in [0, 1), such as 1e-3.")
        if not self.mask_share or not all(0 < share < 1 for share in self.mask_share):
            raise ConfigError(f"mask_share is {self.mask_share}; expected shares between 0 and 1, such as 0.5,0.3.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Value:
    """A number that knows what it is. `error` bounds |value − exact|; `reason` says why a row is not plain."""

    value: float | None
    error: float | None = None
    method: str = ""
    status: str = "computed"
    reason: str | None = None


def undefined(reason: str) -> Value:
    """A quantity that has no value for this matrix."""
    return Value(None, status="undefined", reason=reason)


UNMOVED = "the matrix did not move"
NO_VISIBLE = "no entry moved visibly in bf16"


def undetermined(k: int) -> str:
    return f"the gap between singular values {k} and {k + 1} vanishes, so the subspace is not determined"


class Base:
    """W₀ of one (rows, cols) matrix in float64, and what every checkpoint and null draw shares of it."""

    def __init__(self, matrix: Tensor, settings: Settings):
        self.matrix, self.settings = matrix, settings

    def cut(self, rank: int) -> tuple[int, str | None]:
        """A rank that the matrix allows, and what the row says if it is smaller than the one asked for."""
        allowed = max(1, min(self.matrix.shape) // 2)
        return (rank, None) if rank <= allowed else (allowed, f"rank {rank} cut to {allowed}: half the smaller side")

    @cached_property
    def factored_rank(self) -> int:
        return max(self.cut(self.settings.rank)[0], self.cut(self.settings.mask_rank)[0])

    @cached_property
    def spectrum(self) -> Spectrum:
        return spectrum(self.matrix, self.factored_rank)

    @cached_property
    def norm(self) -> float:
        """‖W₀‖_F."""
        return _norm(self.matrix)

    @cached_property
    def low_magnitude(self) -> tuple[Blocks, dict[float, Threshold]]:
        """|W₀| in blocks of rows and, for every share, the threshold below which that share of the entries lies."""
        score = magnitudes(self.matrix)
        return score, thresholds(score, self.matrix.numel(), self.settings.mask_share, top=False)

    @cached_property
    def principal(self) -> tuple[Blocks, dict[float, Threshold]]:
        """|rank-`mask_rank` reconstruction of W₀| in blocks of rows and, for every share, the threshold of its top share."""
        k, _ = self.cut(self.settings.mask_rank)
        of = self.spectrum
        left, right_t = of.left[:, :k] * of.sigma[:k], of.right[:, :k].T.contiguous()

        def score() -> Iterator[Tensor]:
            for part in left.split(rows_of_block(right_t.shape[1])):
                yield (part @ right_t).abs_()

        return score, thresholds(score, self.matrix.numel(), self.settings.mask_share, top=True)


class Update:
    """ΔW = W₊ − W₀ of one (rows, cols) matrix in float64, with its shared quantities computed at most once.

    `directions` asks for the singular vectors of ΔW to full accuracy, which a trajectory compares; `sampled` marks a draw
    whose spread is far above rounding, and which is therefore measured to three digits.
    """

    def __init__(self, base: Base, tuned: Tensor, *, directions: bool = False, sampled: bool = False):
        self.base, self.tuned, self.settings = base, tuned, base.settings
        self.directions, self.sampled = directions, sampled
        self.delta = tuned - base.matrix

    @cached_property
    def moved(self) -> bool:
        return bool(torch.count_nonzero(self.delta))

    @cached_property
    def norm(self) -> float:
        """‖ΔW‖_F."""
        return _norm(self.delta)

    @cached_property
    def tuned_spectrum(self) -> Spectrum:
        return spectrum(self.tuned, self.base.factored_rank) if self.moved else self.base.spectrum

    @cached_property
    def delta_spectrum(self) -> Spectrum:
        """The leading `top_k` singular triplets of ΔW; of a small matrix, all singular values."""
        k = min(self.settings.top_k, max(1, min(self.delta.shape) // 2))
        if self.sampled:
            return leading(self.delta, k, tolerance=1e-4, angle=math.inf)
        return leading(self.delta, k, angle=1e-5 if self.directions else math.inf)

    @cached_property
    def angles(self) -> dict[str, Tensor]:
        """Principal angles in radians, ascending, between the top-`rank` subspaces of W₀ and W₊, left and right."""
        k, _ = self.base.cut(self.settings.rank)
        before, after = self.base.spectrum, self.tuned_spectrum
        return {
            "left": principal_angles(before.left[:, :k], after.left[:, :k]),
            "right": principal_angles(before.right[:, :k], after.right[:, :k]),
        }

    @cached_property
    def unchanged(self) -> tuple[Tensor, Tensor]:
        """Entries a bf16 reader sees unchanged: under the η rule, and to the bit."""
        return precision.unchanged(self.base.matrix, self.tuned, self.settings.eta)

    @cached_property
    def visible(self) -> Tensor:
        """The mask M of visible updates: entries changed under the η rule."""
        return ~self.unchanged[0]


def norm_error(norm: float, entries: int) -> float:
    """A bound on the rounding error of a pairwise-summed Frobenius norm of exact differences."""
    return EPS * (8 + math.sqrt(entries)) * norm


def _norm(matrix: Tensor) -> float:
    """Frobenius norm, scaled so that no square over- or underflows."""
    scale = float(matrix.abs().max())
    return scale * float(torch.linalg.vector_norm(matrix / scale)) if scale > 0 else 0.0

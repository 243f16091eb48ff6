"""An isotropic Gaussian ΔW of the measured Frobenius norm: what the nulls of several diagnostics share, computed at most once.

Each diagnostic's `null` asks this for what it needs, in closed form or from draws that need no large matrix (`numerics.nulls`,
`numerics.perturbed`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from opdgeo.diagnostics.diagnostic import Diagnostic, Null
from opdgeo.diagnostics.update import Update, cached
from opdgeo.numerics import nulls
from opdgeo.numerics.masks import Mask, rows_of_block
from opdgeo.numerics.perturbed import Noise, Turn
from opdgeo.numerics.precision import FINEST, to_bf16

MOST = 1e60  # a norm beyond which, or its inverse, the formulas' fourth powers are no numbers: there nulls are drawn in full
SHIFTS, TURNS = 64, 8  # draws of what costs little
SMALLEST = 64  # smaller sides are drawn in full where no first-order formula holds: it costs little, and the formulas are for large ones
SPACING = 0.1  # beyond it, relative to the spacing of W₀'s singular values, an update is not a small perturbation


def gaussian_null(
    update: Update, wanted: Collection[Diagnostic], *key: object
) -> tuple[dict[tuple[str, str], tuple[float, float]], dict[str, str]]:
    """The null of the wanted diagnostics, by name and variant, where they have one without a drawn matrix, and by name how it
    was found where that is neither a closed form nor a first-order formula.

    Each is made from no more settings than the diagnostic reads. `key` seeds the draws. A mean that is not a number says that the
    variant has no value under the null.
    """
    if any(norm and not 1 / MOST < norm < MOST for norm in (update.norm, update.base.norm)):
        return {}, {}
    isotropic = Isotropic(update, {setting for d in wanted for setting in d.reads}, *key)
    found: dict[tuple[str, str], tuple[float, float]] = {}
    routes: dict[str, str] = {}
    for d in wanted:
        isotropic.routes.clear()
        try:
            found |= {(d.name, variant): null for variant, null in d.null(isotropic).items()}
        except _TooSmall:
            continue
        if isotropic.routes:
            routes[d.name] = " and ".join(sorted(isotropic.routes))
    return found, routes


class _TooSmall(Exception):
    """The matrix is too small for what was asked, and its nulls are drawn in full."""


class Isotropic:
    """Gaussian updates of `norm`, the size of `update`. `reads`: the settings that the nulls asked for may depend on."""

    def __init__(self, update: Update, reads: Iterable[str], *key: object):
        self.base, self.settings, self.norm = update.base, update.settings, update.norm
        self.reads, self.key = frozenset(reads), key
        self.scale = update.norm / math.sqrt(math.prod(self.base.shape))  # of an entry
        self.routes: set[str] = set()  # how what was asked for since it was cleared was found

    @cached
    def spectra(self) -> np.ndarray:
        """(draws, k) largest singular values, k = `top_k` or the smaller side."""
        rows, cols = self.base.shape
        return self.norm * nulls.own_singular_values(rows, cols, min(self.settings.top_k, rows, cols))

    @cached
    def _noise(self) -> Noise:
        return Noise(self.base.spectrum.sigma.cpu().numpy(), max(self.base.shape), self.scale)

    @cached
    def _small(self) -> bool:
        """Whether the singular values move as perturbation theory says."""
        return nulls.spacing(self.base.spectrum.sigma, self.scale) < SPACING

    def _check_size(self) -> None:
        if min(self.base.shape) < SMALLEST and not self._small:
            raise _TooSmall

    @property
    def shifts(self) -> Tensor:
        """(draws, n) changes of W₀'s singular values."""
        self._check_size()
        if not self._small:
            self.routes.add("the deformed spectrum")
        return self._shifts

    @cached
    def _shifts(self) -> Tensor:
        sigma = self.base.spectrum.sigma
        if self._small:
            rows, cols = self.base.weights.shape
            sigma = sigma.to(self.base.weights.device)  # every value meets every other
            return nulls.shifts(sigma, rows, cols, self.scale, SHIFTS, nulls.generator("shifts", *self.key)).cpu()
        draws = self._noise.fluctuations(SHIFTS, np.random.default_rng(nulls.seed("shifts", *self.key)))
        return torch.from_numpy(self._noise.drift + draws)

    @property
    def shift_norms(self) -> Tensor:
        """The norm of each draw of `shifts`."""
        return torch.linalg.vector_norm(self.shifts, dim=1)

    @property
    def turns(self) -> dict[str, Turn] | None:
        """By side, draws of the angles by which W₀'s top-`rank` subspaces turn; None where the subspaces are not determined."""
        self._check_size()
        if self._turns is not None:
            self.routes.add("levels drawn at the cut")
        return self._turns

    @cached
    def _turns(self) -> dict[str, Turn] | None:
        before, (k, _) = self.base.spectrum, self.base.cut(self.settings.rank)
        if k >= len(before.sigma) or max(before.subspace_error(k, side) for side in ("left", "right")) >= 1:
            return None
        found = self._noise.turns(k, max(TURNS, self.settings.nulls), nulls.generator("turns", *self.key))
        rows, cols = self.base.weights.shape
        return dict(zip(("right", "left") if rows >= cols else ("left", "right"), found, strict=True))

    @property
    def unchanged(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the share of entries that stay in their bf16 cells; None where η counts more."""
        return self._visibility[0]

    @property
    def inside_masks(self) -> Null:
        """The expected share of the visible entries inside each of W₀'s masks, and its standard deviation."""
        return self._visibility[1]

    @cached
    def _visibility(self) -> tuple[tuple[float, float] | None, Null]:
        """One pass over W₀ for both; the masks, which cost several, only where a null may depend on them."""
        base, entries = self.base, self.base.weights.numel()
        if self.settings.eta >= FINEST:
            return None, {}
        low: dict[str, Mask] = {}
        masks: dict[str, Mask] = {}
        if "mask_share" in self.reads:
            low = {f"low_magnitude.{share:g}": m for share, m in base.low_magnitude.items()}
            masks = {f"principal.{share:g}": m for share, m in (base.principal or {}).items()}
        everywhere = torch.zeros(2, dtype=torch.float64, device=base.weights.device)
        masks |= low
        sums = {name: torch.zeros(2, 8, dtype=torch.float64, device=base.weights.device) for name in masks}
        if base.counted:  # as many probabilities as magnitudes, whatever the dtype that holds them
            sizes, every = base.counted
            moves = nulls.visible_probability(sizes, self.scale)
            values = torch.stack([moves, moves * (1 - moves)])
            everywhere += values @ every
            if masks:
                magnitudes = nulls.Magnitudes(to_bf16(base.weights))
            for name, mask in masks.items():
                if name not in low:
                    sums[name] += values @ magnitudes.count(mask.codes).T
                    continue
                code = magnitudes.codes(mask.codes)
                for row, weights in zip(sums[name], values * every, strict=True):
                    row += torch.bincount(code, weights=weights, minlength=8)
        size = rows_of_block(base.weights)
        for start in range(0, 0 if base.counted else len(base.weights), size):
            part = slice(start, start + size)
            moves = nulls.visible_probability(base.weights[part], self.scale).flatten()
            spread = moves * (1 - moves)
            everywhere += torch.stack([moves.sum(), spread.sum()])
            for name, mask in masks.items():
                codes = mask.codes[part].flatten()
                for row, values in zip(sums[name], (moves, spread), strict=True):
                    row += torch.bincount(codes, weights=values, minlength=8)
        found: Null = {}
        for name, (moved, spread) in sums.items():
            total = float(moved.sum())
            if total == 0:
                continue
            inside = masks[name].weight().to(moved.device)
            share = float((moved * inside).sum()) / total
            deviation = math.sqrt(float((spread * (inside - share) ** 2).sum())) / total
            found[name] = (share, deviation)
        return (1 - float(everywhere[0]) / entries, math.sqrt(float(everywhere[1])) / entries), found

"""An isotropic Gaussian ΔW of the measured Frobenius norm: what the nulls of several diagnostics share, computed at most once.

Each diagnostic's `null` asks this for what it needs, in closed form or from draws that need no large matrix (`numerics.nulls`).
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
from opdgeo.numerics.precision import FINEST

SPECTRA, SHIFTS = 16, 64  # draws of what costs little
SPACING = 0.1  # beyond it, relative to the spacing of W₀'s singular values, an update is not a small perturbation


def gaussian_null(
    update: Update, wanted: Collection[Diagnostic], *key: object
) -> dict[tuple[str, str], tuple[float, float]]:
    """The null of the wanted diagnostics, by name and variant, where they have one without a drawn matrix.

    Each is made from no more settings than the diagnostic reads. `key` seeds the draws.
    """
    isotropic = Isotropic(update, {setting for d in wanted for setting in d.reads}, *key)
    return {(d.name, variant): null for d in wanted for variant, null in d.null(isotropic).items()}


class Isotropic:
    """Gaussian updates of `norm`, the size of `update`. `reads`: the settings that the nulls asked for may depend on."""

    def __init__(self, update: Update, reads: Iterable[str], *key: object):
        self.base, self.settings, self.norm = update.base, update.settings, update.norm
        self.reads, self.key = frozenset(reads), key
        self.scale = update.norm / math.sqrt(math.prod(self.base.shape))  # of an entry

    @cached
    def spectra(self) -> np.ndarray:
        """(draws, k) largest singular values, k = `top_k` or the smaller side."""
        rows, cols = self.base.weights.shape
        top, rng = min(self.settings.top_k, rows, cols), np.random.default_rng(nulls.seed("spectrum", *self.key))
        return nulls.top_singular_values(rows, cols, self.norm, top, SPECTRA, rng)

    @cached
    def shifts(self) -> Tensor | None:
        """(draws, n) changes of W₀'s singular values; None where the update is too large for perturbation theory."""
        sigma = self.base.spectrum.sigma
        if nulls.spacing(sigma, self.scale) >= SPACING:
            return None
        rows, cols = self.base.weights.shape
        sigma = sigma.to(self.base.weights.device)  # every value meets every other
        return nulls.shifts(sigma, rows, cols, self.scale, SHIFTS, nulls.generator("shifts", *self.key)).cpu()

    @cached
    def shift_norms(self) -> Tensor | None:
        """The norm of each draw of `shifts`."""
        return None if self.shifts is None else torch.linalg.vector_norm(self.shifts, dim=1)

    @cached
    def turns(self) -> list[dict[str, Tensor]]:
        """Draws of the principal angles in radians by which W₀'s top-`rank` subspaces turn, by side.

        None of them where the update is too large for perturbation theory, or the subspaces are not determined.
        """
        before, (k, _) = self.base.spectrum, self.base.cut(self.settings.rank)
        if self.shifts is None or k >= len(before.sigma):
            return []
        if max(before.subspace_error(k, side) for side in ("left", "right")) >= 1:
            return []
        rows, cols = self.base.weights.shape
        sigma = before.sigma.to(self.base.weights.device)
        return [
            nulls.turns(sigma, rows, cols, k, self.scale, nulls.generator("turns", *self.key, draw))
            for draw in range(max(2, self.settings.nulls))
        ]

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
        masks: dict[str, Mask] = {}
        if "mask_share" in self.reads:
            masks |= {f"low_magnitude.{share:g}": m for share, m in base.low_magnitude.items()}
            masks |= {f"principal.{share:g}": m for share, m in (base.principal or {}).items()}
        everywhere = torch.zeros(2, dtype=torch.float64, device=base.weights.device)
        sums = {name: torch.zeros(2, 8, dtype=torch.float64, device=base.weights.device) for name in masks}
        size = rows_of_block(base.weights)
        for start in range(0, len(base.weights), size):
            part = slice(start, start + size)
            moves = nulls.visible_probability(base.weights[part], self.scale).flatten()
            spread = moves * (1 - moves)
            everywhere += torch.stack([moves.sum(), spread.sum()])
            for name, mask in masks.items():
                codes = mask.codes[part].flatten()
                for row, weights in zip(sums[name], (moves, spread), strict=True):
                    row += torch.bincount(codes, weights=weights, minlength=8)
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

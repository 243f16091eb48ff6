"""Share of an update's energy inside an earlier checkpoint's channel: ‖ΔW_t V_K V_Kᵀ‖_F² / ‖ΔW_t‖_F², with V_K the top-K right
singular vectors of the earlier ΔW (K = `top_k`). `previous.K` takes the channel of the checkpoint before, `first.K` that of
the first one; `previous.left.K` and `first.left.K` the left vectors, ‖U_K U_Kᵀ ΔW_t‖_F².

Unlike the similarity it weighs the directions: it asks how much of the update a training held in that channel would keep.
Its null is that of the similarity, a walk S + R of independent increments. The energy of S + R in S's own top K is, on
average, that of a Gaussian in its own top K, and chance for R: a closed form.
"""

from __future__ import annotations

import math

import torch

from opdgeo.diagnostics.subspace_similarity import SIDES, name
from opdgeo.diagnostics.update import UNMOVED, Settings, Update, Value, undefined, unresolved
from opdgeo.numerics.spectra import Spectrum

READS = ("top_k",)


def variants(settings: Settings) -> list[str]:
    return [name(other, side, settings.top_k) for other in ("first", "previous") for side in SIDES]


def share(update: Update, channel: Spectrum | None, k: int, side: str, reason: str | None = None) -> Value:
    """The share of `update` inside the top-k vectors of `channel`, an earlier update; None: that one did not move."""
    if not update.moved:
        return undefined(UNMOVED)
    if channel is None:
        return undefined("the earlier update did not move")
    if problem := unresolved(channel, k, side):
        return undefined(problem)
    lost = channel.subspace_error(k, side)
    delta = update.delta
    inside = delta @ channel.right[:, :k] if side == "right" else delta.T @ channel.left[:, :k]
    found = min(1.0, float(torch.linalg.vector_norm(inside / update.norm)) ** 2)
    error = lost * (2 * found**0.5 + lost) + 4 * update.norm_error
    return Value(found, min(1.0, error), channel.method, reason=reason)


def null(own: tuple[float, float], chance: float, angle: float) -> tuple[float, float]:
    """Mean and standard deviation under the walk: `own` is a Gaussian's energy in its own top K, `chance` is K/dimension."""
    kept = math.cos(angle) ** 2
    return kept * own[0] + (1 - kept) * chance, kept * own[1]

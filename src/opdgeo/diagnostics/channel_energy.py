"""Share of an update's energy inside an earlier checkpoint's channel: ‖ΔW_t V_K V_Kᵀ‖_F² / ‖ΔW_t‖_F², with V_K the top-K right
singular vectors of the earlier ΔW (K = `top_k`). `previous.K` takes the channel of the checkpoint before, `first.K` that of
the first one; `previous.left.K` and `first.left.K` the left vectors, ‖U_K U_Kᵀ ΔW_t‖_F².

Unlike the similarity it weighs the directions: it asks how much of the update a training held in that channel would keep.
Its null is that of the similarity, a walk S + R of independent increments. The energy of S + R in S's own top K is, on
average, that of a Gaussian in its own top K, and chance for R. That is a closed form.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    PAPER,
    UNMOVED,
    Diagnostic,
    Null,
    Settings,
    Value,
    cut,
    skipped,
    undefined,
    unresolved,
)
from opdgeo.diagnostics.subspace_similarity import SIDES, name

if TYPE_CHECKING:
    from opdgeo.diagnostics.kinds import OfTrajectory
    from opdgeo.diagnostics.trajectory import Trajectory
    from opdgeo.diagnostics.update import Update
    from opdgeo.numerics.spectra import Spectrum


def variants(settings: Settings) -> list[str]:
    return [name(other, side, settings.top_k) for other in ("first", "previous") for side in SIDES]


def label(variant: str) -> str:
    other, _, rest = variant.partition(".")
    side, _, k = rest.rpartition(".")
    return f"{other} checkpoint's{' ' + side if side else ''} top {k}"


def share(update: Update, channel: Spectrum | None, k: int, side: str, reason: str | None = None) -> Value:
    """The share of `update` inside the top-k vectors of `channel`, an earlier update. None: that one did not move."""
    import torch

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


def earlier(trajectory: Trajectory) -> tuple[tuple[str, int], ...]:
    """The channels that an update is measured against, and their places. The first checkpoint has none."""
    return (("first", 0), ("previous", trajectory.index - 1)) if trajectory.index else ()


def measure(trajectory: Trajectory) -> dict[str, Value]:
    assert trajectory.update is not None
    k, reason = cut(trajectory.settings.top_k, trajectory.shape)
    values = dict.fromkeys(variants(trajectory.settings), undefined("there is no earlier checkpoint"))
    for other, index in earlier(trajectory):
        point = trajectory.points[index]
        for side in SIDES:
            values[name(other, side, trajectory.settings.top_k)] = (
                share(trajectory.update, point.spectrum, k, side, reason)
                if point.finite
                else skipped("non-finite entries in the earlier checkpoint")
            )
    return values


def null(trajectory: Trajectory) -> Null:
    """Under the walk the update keeps cos²θ of its energy from the earlier point, and gains chance, K/dimension, elsewhere."""
    from opdgeo.numerics.nulls import own_energy

    rows, cols = trajectory.shape
    k, _ = cut(trajectory.settings.top_k, trajectory.shape)
    found = {}
    for other, index in earlier(trajectory):
        angle = trajectory.angle(index)
        if angle is None:
            continue
        kept, own = math.cos(angle) ** 2, own_energy(rows, cols, k)
        for side, size in (("right", cols), ("left", rows)):
            found[name(other, side, trajectory.settings.top_k)] = kept * own[0] + (1 - kept) * (k / size), kept * own[1]
    return found


DIAGNOSTIC: OfTrajectory = Diagnostic(
    name="channel_energy",
    scope="trajectory",
    unit="share",
    reads=("top_k",),
    variants=variants,
    measure=measure,
    null=null,
    title="Energy in the earlier channel",
    formula="‖ΔW_t V_K(s)‖_F² / ‖ΔW_t‖_F², s the first checkpoint or the one before t",
    meaning="The share of the update that lies in the top-K right subspace of an earlier checkpoint's update.",
    caveat="This is what training held in that channel would have kept. The null is a walk of independent increments with the "
    "observed norms. It keeps what it had, and gains chance, K/cols, in every new increment.",
    example="ΔW_t = [[3, 0], [0, 4]] and the earlier channel (0, 1): 16 / 25 = 64 %.",
    source=f"this program; the subspaces are those of {PAPER}, §2, subspace similarity",
    label=label,
    listed=lambda variant: ".left." not in variant,
    charted=("previous",),
    directions=lambda settings: settings.top_k,
)

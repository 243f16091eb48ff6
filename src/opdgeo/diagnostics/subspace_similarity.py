"""Subspace similarity of a trajectory (PAPER §2): Sim_K(s, t) = ‖V_K(s)ᵀ V_K(t)‖_F² / K, with V_K the top-K right singular
vectors of ΔW. `final.K` compares with the last checkpoint, `previous.K` with the one before. `final.left.K` and
`previous.left.K` do the same for the left singular vectors. One top-32 decomposition of ΔW serves every K.

Of an update of lower rank than K, the K-th direction is one of rounding, and Sim_K is undefined.

Its null is a walk of independent Gaussian increments with the observed norms. Checkpoints of one run share a prefix, and look
alike for that reason alone.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING

from opdgeo.diagnostics.diagnostic import (
    ONE_UNMOVED,
    PAPER,
    Diagnostic,
    Live,
    Null,
    Panel,
    Settings,
    Value,
    cut,
    skipped,
    undefined,
    undetermined,
    unresolved,
)

if TYPE_CHECKING:
    from opdgeo.diagnostics.kinds import OfTrajectory
    from opdgeo.diagnostics.trajectory import Trajectory
    from opdgeo.numerics.spectra import Spectrum

RANKS = (1, 2, 4, 8, 16, 32)
SHOWN = 16  # the paper's K, in tables and verdicts
SIDES = ("right", "left")


def ranks(settings: Settings) -> list[int]:
    """Every K that is measured: `RANKS` and the settings' `top_k`."""
    return sorted({*RANKS, settings.top_k})


def name(other: str, side: str, k: int) -> str:
    """The name of a variant. The left side is named, the right one is not.

    >>> name("previous", "left", 8), name("final", "right", 16)
    ('previous.left.8', 'final.16')
    """
    return f"{other}.{k}" if side == "right" else f"{other}.{side}.{k}"


def parts(variant: str) -> tuple[str, str, int]:
    """What `name` made the variant of.

    >>> parts("previous.left.8")
    ('previous', 'left', 8)
    """
    other, *side, k = variant.split(".")
    return other, side[0] if side else "right", int(k)


def variants(settings: Settings) -> list[str]:
    return [name(other, side, k) for other in ("final", "previous") for side in SIDES for k in ranks(settings)]


def label(variant: str) -> str:
    other, _, rest = variant.partition(".")
    side, _, k = rest.rpartition(".")
    return f"to {other}, {side + ', ' if side else ''}K = {k}"


def similarity(
    first: Spectrum | None, second: Spectrum | None, k: int, side: str = "right", reason: str | None = None
) -> Value:
    """Sim_K of two updates from their leading singular vectors. None stands for an update that did not move."""
    import torch

    if first is None or second is None:
        return undefined(ONE_UNMOVED)
    for of in (first, second):
        if problem := unresolved(of, k, side):
            return undefined(problem)
    lost = first.subspace_error(k, side) + second.subspace_error(k, side)
    if lost >= 1:
        return undefined(undetermined(k))
    one, other = ((s.left if side == "left" else s.right)[:, :k] for s in (first, second))
    value = float(torch.linalg.matrix_norm(one.T @ other)) ** 2 / k
    return Value(min(1.0, value), min(1.0, 2 * lost + 8 * sys.float_info.epsilon * k), first.method, reason=reason)


def compared(trajectory: Trajectory) -> tuple[tuple[str, int], tuple[str, int]]:
    """What a checkpoint is compared with, and its place; the place is −1 where there is none."""
    return ("final", len(trajectory.points) - 1), ("previous", trajectory.index - 1)


def measure(trajectory: Trajectory) -> dict[str, Value]:
    here = trajectory.points[trajectory.index]
    values = {}
    for kind, index in compared(trajectory):
        for side in SIDES:
            for asked in ranks(trajectory.settings):
                k, reason = cut(asked, trajectory.shape)
                if index < 0:
                    value = undefined("there is no earlier checkpoint")
                elif not (here.finite and trajectory.points[index].finite):
                    value = skipped("non-finite entries in one of the two checkpoints")
                else:
                    value = similarity(here.spectrum, trajectory.points[index].spectrum, k, side, reason)
                values[name(kind, side, asked)] = value
    return values


def null(trajectory: Trajectory) -> Null:
    """Two points of a walk: a table over the angle between them that one draw a shape gives for every K and side."""
    from opdgeo.numerics.nulls import pair_similarity

    asked = ranks(trajectory.settings)
    table = pair_similarity(*trajectory.shape, tuple(sorted({cut(k, trajectory.shape)[0] for k in asked})))
    here = trajectory.points[trajectory.index].spectrum
    found = {}
    for kind, index in compared(trajectory):
        angle = trajectory.angle(index) if index >= 0 else None
        if angle is not None:
            chances = table(angle, here.right.device if here else "cpu")
            for side in SIDES:
                for k in asked:
                    found[name(kind, side, k)] = chances[side, cut(k, trajectory.shape)[0]]
    return found


def pair_null(shape: tuple[int, int], angle: float, k: int) -> float:
    """The mean right similarity of two points of a walk, in closed form. `null` has the same from draws."""
    from opdgeo.numerics.nulls import pair_similarity
    from opdgeo.numerics.perturbed import walk_similarity

    if angle <= 0:
        return 1.0
    if k < min(shape):
        return walk_similarity(*shape, k, angle)
    return pair_similarity(*shape, (k,))(angle)["right", k][0]  # of a vector, which costs nothing to draw


def panel(other: str, side: str, text: str) -> Panel:
    def rank(variant: str) -> int | None:
        found = re.fullmatch(re.escape(name(other, side, 0)[:-1]) + r"(\d+)", variant)
        return int(found[1]) if found else None

    return Panel(f"similarity-{other}-{side}", f"Sim_K {text}, %", rank)


DIAGNOSTIC: OfTrajectory = Diagnostic(
    name="subspace_similarity",
    scope="trajectory",
    unit="share",
    reads=("top_k",),
    variants=variants,
    measure=measure,
    null=null,
    title="Subspace similarity",
    formula="Sim_K(t, end) = ‖V_K(t)ᵀ V_K(end)‖_F² / K",
    meaning="How much of the final update's top-K right subspace is there at step t already. The variant “previous” asks the same "
    "of the checkpoint before.",
    caveat="Two checkpoints of a run share a prefix, and look alike for that reason alone. The null is a walk of independent "
    "increments with the observed norms. Only a similarity above it says that the channel was found early. Tables show "
    f"K = {SHOWN}, right; the data files hold every K and both sides.",
    example="K = 2, V(t) = e₁, e₂ and V(end) = e₁, e₃: one direction of two, 50 %.",
    source=f"{PAPER}, §2, subspace similarity",
    label=label,
    listed=lambda variant: ".left." not in variant and variant.endswith(f".{SHOWN}"),
    charted=("final",),
    itself="final",
    live=(Live("similarity_previous", "previous"), Live("similarity_first", "first")),
    panels=(
        panel("final", "right", "to the final update, right"),
        panel("final", "left", "to the final update, left"),
        panel("previous", "right", "to the checkpoint before, right"),
    ),
    directions=lambda settings: max(ranks(settings)),
    at_the_end=True,
    pair=similarity,
    pair_null=pair_null,
)

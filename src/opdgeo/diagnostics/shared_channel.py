"""How much of one update lies in the other's channel: ‖ΔW_A V Vᵀ‖_F² / ‖ΔW_A‖_F², V the top-K right singular vectors of ΔW_B
(K = `top_k`), and the same with the left ones. Measured both ways.

Unlike the similarity it weighs the directions: training held in the other's channel would keep so much of the update.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from opdgeo.diagnostics.channel_energy import share
from opdgeo.diagnostics.diagnostic import (
    ONE_UNMOVED,
    Diagnostic,
    Matrices,
    Null,
    Settings,
    Value,
    cut,
    share_of,
    undefined,
)
from opdgeo.diagnostics.subspace_similarity import SIDES

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.diagnostics.kinds import OfPair
    from opdgeo.diagnostics.pair import Pair


def variants(settings: Settings) -> list[str]:
    return [f"{side}.{settings.top_k}" for side in SIDES]


def label(variant: str) -> str:
    side, _, k = variant.partition(".")
    return f"{side}, top {k}"


def measure(pair: Pair) -> dict[str, Value]:
    if not pair.moved:
        return dict.fromkeys(variants(pair.settings), undefined(ONE_UNMOVED))
    k, reason = cut(pair.settings.top_k, pair.shape)
    return {
        f"{side}.{pair.settings.top_k}": share(pair.first, pair.second.delta_spectrum, k, side, reason)
        for side in SIDES
    }


def null(pair: Pair) -> Null:
    from opdgeo.numerics.nulls import energy_share

    if not pair.moved:
        return {}
    k, _ = cut(pair.settings.top_k, pair.shape)
    rows, cols = pair.shape
    inside = {"right": rows * k, "left": cols * k}
    return {f"{side}.{pair.settings.top_k}": energy_share(inside[side], math.prod(pair.shape)) for side in SIDES}


def weights(of: Matrices) -> np.ndarray:
    """Every matrix counts by its energy."""
    energy = of.known * of.norm**2
    return share_of(energy, float(energy.sum()))


DIAGNOSTIC: OfPair = Diagnostic(
    name="shared_channel",
    scope="pair",
    unit="share",
    reads=("top_k",),
    variants=variants,
    measure=measure,
    null=null,
    title="Energy in the other's channel",
    formula="‖ΔW_A V_K(B)‖_F² / ‖ΔW_A‖_F²; left: ‖U_K(B)ᵀ ΔW_A‖_F² / ‖ΔW_A‖_F²",
    meaning="The share of this update that lies in the top-K subspace of the other one's ΔW. Training held in the other's channel "
    "would keep so much of it.",
    caveat="Chance is K over the dimension, for any update of which the channel is independent. The spread of the null is that of "
    "isotropic updates: an update of few directions scatters more around the same chance.",
    example="ΔW_A = [[3, 0], [0, 4]] and the channel (0, 1) of B: 16 / 25 = 64 %.",
    source="this program; the channel is that of opdgeo channel, PAPER §2: the top-K singular vectors of an update",
    label=label,
    charted=("right",),
    directions=lambda settings: settings.top_k,
    directed="{} in the channel of {}",
    weights=weights,
)

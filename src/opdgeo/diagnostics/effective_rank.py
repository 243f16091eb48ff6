"""Effective rank of ΔW: exp(H) with the entropy H = −Σ pᵢ log pᵢ of the energy shares pᵢ = σᵢ²/Σσ².

Roy and Vetterli ("The effective rank", EUSIPCO 2007) take pᵢ = σᵢ/Σσ. Shares of the energy need no more than the leading
singular values and ‖ΔW‖_F, and go with the stable rank, which is 1/p₁.

Where every singular value is known, so is H. Of a larger matrix only the top k are known, and with ‖ΔW‖_F the energy share q of
the m others, none of which is above t (a bound on σₖ₊₁²/‖ΔW‖_F²). The entropy is Schur-concave. So that of the others is largest,
q log(m/q), where they are equal. It is smallest where they are as unequal as t allows: ⌊q/t⌋ of them t, and one the remainder.
The value is the middle between the two, and `error` is half of their distance.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from opdgeo.diagnostics.diagnostic import PAPER, UNMOVED, Diagnostic, Null, Value, cut, mean_std, undefined

if TYPE_CHECKING:
    from opdgeo.diagnostics.gaussian_null import Isotropic
    from opdgeo.diagnostics.kinds import OfUpdate
    from opdgeo.diagnostics.update import Update

DRAWS = 8
ROUNDING = 16 * float(np.finfo(np.float64).eps)
TOP = math.exp(-1)  # where −p log p has its maximum, which is the same number


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": undefined(UNMOVED)}
    spectrum, size = update.delta_spectrum, min(update.shape)
    sigma, errors = spectrum.sigma.cpu().numpy(), spectrum.errors.cpu().numpy()
    if len(sigma) == size or spectrum.below(len(sigma)) == 0:  # all of them, or all that are not zero
        value, low, high = of_all(sigma, errors)
        return {"": Value(value, max(value - low, high - value), spectrum.method)}
    k = min(update.settings.top_k, len(sigma))
    low, high = between(sigma[:k], errors[:k], size - k, spectrum.below(k), update.norm, update.norm_error)
    reason = f"between bounds from the top {k} singular values and the norm"
    return {"": Value((low + high) / 2, (high - low) / 2, spectrum.method, reason=reason)}


def of_all(sigma: np.ndarray, errors: np.ndarray) -> tuple[float, float, float]:
    """The effective rank of these singular values, (n,) with a bound on the error of each, and bounds on it."""
    scale = 2.0 ** math.frexp(float(sigma.max()))[1]  # squares overflow nowhere
    sigma, errors = sigma / scale, errors / scale
    norm = float(np.linalg.norm(sigma))
    low, high = _head(sigma, errors, norm, float(np.linalg.norm(errors)) / norm)[:2]
    shares = (sigma / norm) ** 2
    return _exponential(float(_entropy(shares).sum()), low, high, len(sigma))


def between(
    sigma: np.ndarray, errors: np.ndarray, others: int, below: float, norm: float, norm_error: float
) -> tuple[float, float]:
    """Bounds on the effective rank of a matrix of Frobenius norm `norm`.

    Args:
        sigma, errors: (k,) its leading singular values, and a bound on the error of each.
        others: how many singular values it has besides; each is at most `below`.
        norm_error: a bound on the error of `norm`, relative to it.
    """
    low, high, least, most = _head(sigma, errors, norm, norm_error)
    largest = min(1.0, (below / (norm * (1 - norm_error))) ** 2)
    equal = max(_equal(q, others) for q in (least, most, min(max(others * TOP, least), most)))
    # Between two multiples of `largest` the least entropy is concave in q, so it is smallest at an end or at a multiple.
    ends = [least, most]
    if largest > 0 and (multiple := math.ceil(least / largest) * largest) < most:
        ends.append(multiple)
    unequal = min(_unequal(q, others, largest) for q in ends)
    _, low, high = _exponential(low + unequal, low + unequal, high + equal, len(sigma) + others)
    return low, high


def _head(sigma: np.ndarray, errors: np.ndarray, norm: float, norm_error: float) -> tuple[float, float, float, float]:
    """Bounds on −Σ pᵢ log pᵢ over the listed values, and bounds on the energy share of the others."""
    lower = np.minimum(1.0, (np.maximum(sigma - errors, 0) / (norm * (1 + norm_error))) ** 2)
    upper = np.minimum(1.0, ((sigma + errors) / (norm * (1 - norm_error))) ** 2)
    ends = _entropy(lower), _entropy(upper)
    most = np.where((lower < TOP) & (upper > TOP), TOP, np.maximum(*ends))
    rest = max(0.0, 1 - float(upper.sum())), max(0.0, 1 - float(lower.sum()))
    return float(np.minimum(*ends).sum()), float(most.sum()), *rest


def _entropy(shares: np.ndarray) -> np.ndarray:
    """−p log p, 0 at 0."""
    return np.asarray(-shares * np.log(np.where(shares > 0, shares, 1.0)))


def _equal(q: float, count: int) -> float:
    """The entropy of `count` equal shares that sum to `q`."""
    return q * math.log(count / q) if q > 0 else 0.0


def _unequal(q: float, count: int, largest: float) -> float:
    """The least entropy of `count` shares that sum to `q`, none above `largest`."""
    if q >= count * largest:  # there is no other way
        return _equal(q, count)
    whole = math.floor(q / largest)
    return float(_entropy(np.array([largest, max(0.0, q - whole * largest)])) @ np.array([whole, 1.0]))


def _exponential(entropy: float, low: float, high: float, count: int) -> tuple[float, float, float]:
    """exp of an entropy and of bounds on it, widened by the rounding of a sum of `count` terms."""
    slack = ROUNDING * math.sqrt(count) * (1 + high)
    return math.exp(entropy), math.exp(low - slack), math.exp(high + slack)


def null(isotropic: Isotropic) -> Null:
    rows, cols = isotropic.base.shape
    return {"": of_gaussian(rows, cols, isotropic.settings.top_k)}


@lru_cache(maxsize=256)
def of_gaussian(rows: int, cols: int, top_k: int) -> tuple[float, float]:
    """Mean and standard deviation for a Gaussian matrix, from as many of its singular values as `measure` has of an update.

    Draws of the singular values alone, which are those of a bidiagonal matrix. They do not depend on the size of the update, so one
    set serves all matrices of a shape.
    """
    from opdgeo.numerics import nulls
    from opdgeo.numerics.spectra import KRYLOV

    size = min(rows, cols)
    k = size if size < KRYLOV else cut(top_k, (rows, cols))[0]
    rng = np.random.default_rng(nulls.seed("effective rank", rows, cols, top_k))
    found = []
    for sigma in nulls.top_singular_values(rows, cols, 1.0, min(k + 1, size), DRAWS, rng):
        exact = np.zeros(k)
        if k == size:
            found.append(of_all(sigma, exact)[0])
        else:
            found.append(sum(between(sigma[:k], exact, size - k, float(sigma[k]), 1.0, 0.0)) / 2)
    return mean_std(found)


DIAGNOSTIC: OfUpdate = Diagnostic(
    name="effective_rank",
    scope="update",
    counts="directions",
    reads=("top_k",),
    measure=measure,
    null=null,
    title="Effective rank",
    formula="exp(−Σ_i p_i log p_i), p_i = σ_i(ΔW)² / ‖ΔW‖_F²",
    meaning="How many directions the energy of the update is spread over. It is k when k directions share the energy equally. It is "
    "never below the stable rank and never above the rank.",
    caveat="Unlike the stable rank it sees the whole spectrum, not the largest singular value alone. Of a large matrix only the top "
    "singular values are known. The value is then the middle between two certified bounds, and the column “error” of the data "
    "file is half their distance. The null is read off in the same way.",
    example="Singular values 2, 1, 1: shares 2/3, 1/6, 1/6 of the energy, exp(0.868) = 2.38.",
    source=f"Roy and Vetterli, The effective rank, EUSIPCO 2007, with shares of the energy for their shares of Σσ; the stable "
    f"rank is that of {PAPER}, §2",
    charted=("",),
)

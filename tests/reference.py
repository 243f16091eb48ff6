"""The diagnostics a second time: plain float64 numpy and scipy, written from the formulas alone.

Nothing of opdgeo is imported here, and nothing is shared with it but the definitions. Every singular value
decomposition is the complete LAPACK one, every mask is a sort, every sum is over the dense matrix: slow, short
and easy to check by hand. `test_reference.py` checks this file against matrices whose answer is planted;
the other tests check opdgeo against this file.

Values are keyed by (diagnostic, variant); None means undefined. Angles are in degrees.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Values = dict[tuple[str, str], float | None]

EPS = float(np.finfo(np.float64).eps)


# Precision ------------------------------------------------------------------------------------------------------


def bf16_bits(values: Matrix) -> NDArray[np.uint16]:
    """The bfloat16 encoding of finite values that float32 holds exactly: round to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def bf16_values(bits: NDArray[np.uint16]) -> Matrix:
    """The values that bfloat16 bits stand for."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def unchanged(base: Matrix, tuned: Matrix, eta: float = 1e-3) -> NDArray[np.bool_]:
    """Entries that the η rule calls unchanged: |ŵ − w| ≤ η·max(|w|, |ŵ|) after the bf16 cast (PAPER.md §2)."""
    w, v = bf16_values(bf16_bits(base)), bf16_values(bf16_bits(tuned))
    return np.asarray(np.abs(v - w) <= eta * np.maximum(np.abs(w), np.abs(v)))


# Spectra --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decomposition:
    """The thin decomposition A = U diag(s) Vᵀ; `u` (rows, n), `s` (n,) descending, `v` (cols, n), n = min(rows, cols)."""

    u: Matrix
    s: Matrix
    v: Matrix

    def sigma(self, i: int) -> float:
        """σᵢ counted from 1, and 0 past the end."""
        return float(self.s[i - 1]) if i <= len(self.s) else 0.0

    def determined(self, k: int, dimension: int) -> bool:
        """Whether the top-k subspace of a space of that dimension is unique: all of it, or a gap at k above rounding."""
        gap = self.sigma(k) - self.sigma(k + 1)
        return k == dimension or gap > 8 * max(len(self.u), len(self.v)) * EPS * self.sigma(1)


def svd(matrix: Matrix) -> Decomposition:
    """Once for the last few matrices: one that is asked about at several K is decomposed once."""
    return _svd(matrix.tobytes(), matrix.shape, matrix.dtype)


@lru_cache(16)
def _svd(content: bytes, shape: tuple[int, ...], kind: np.dtype) -> Decomposition:
    u, s, vt = scipy.linalg.svd(np.frombuffer(content, kind).reshape(shape), full_matrices=False)
    for part in (u, s, vt):
        part.flags.writeable = False
    return Decomposition(u, s, vt.T)


def cut(rank: int, rows: int, cols: int) -> int:
    """The rank a matrix allows: the one asked for, or half of its smaller side."""
    return min(rank, max(1, min(rows, cols) // 2))


def sines_and_angles(a: Matrix, b: Matrix) -> tuple[Matrix, Matrix]:
    """Sines and principal angles (degrees, ascending) between the spans of two (n, k) matrices with orthonormal columns.

    The sines are the singular values of the part of b outside span(a). An angle is taken from its sine below 45°
    and from its cosine above: each where it is well conditioned.
    """
    inside = a.T @ b
    cosines = np.clip(scipy.linalg.svdvals(inside), 0, 1)
    sines = np.clip(scipy.linalg.svdvals(b - a @ inside)[::-1], 0, 1)
    return sines, np.degrees(np.where(sines < np.sqrt(0.5), np.arcsin(sines), np.arccos(cosines)))


# Masks ----------------------------------------------------------------------------------------------------------


def membership(score: Matrix, share: float) -> Matrix:
    """Weight of each entry in the top `share` of the entries by score: 1 above the threshold, 0 below it.

    Entries that tie at the threshold share equally what is left, so the weights sum to share·entries exactly.
    """
    count = share * score.size
    ordered = np.sort(score, axis=None)[::-1]
    threshold = ordered[min(max(int(np.ceil(count)) - 1, 0), score.size - 1)]
    above, tied = score > threshold, score == threshold
    return np.where(above, 1.0, np.where(tied, (count - above.sum()) / tied.sum(), 0.0))


def overlap(mask: Matrix, visible: NDArray[np.bool_]) -> float | None:
    """|mask ∩ visible| / |visible|; None where nothing is visible."""
    return float(mask[visible].sum() / visible.sum()) if visible.any() else None


# The table ------------------------------------------------------------------------------------------------------


def hill_exponent(spectrum: Matrix, top_k: int) -> float | None:
    """[1/(k−1) Σ_{i<k} log(σᵢ/σₖ)]⁻¹; None with fewer than two values, σₖ at rounding level, or k equal values."""
    top = spectrum[:top_k]
    if len(top) < 2 or top[-1] <= 8 * len(spectrum) * EPS * top[0]:
        return None
    total = float(np.log(top[:-1] / top[-1]).sum())
    return (len(top) - 1) / total if total > 1e-12 else None


def effective_rank(spectrum: Matrix) -> float:
    """exp(−Σ p log p) with the energy shares p = σ²/Σσ²."""
    energy = (spectrum / spectrum.max()) ** 2
    shares = energy[energy > 0] / energy.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def subspace_similarity(delta: Matrix, other: Matrix, top_k: int = 16) -> float | None:
    """‖V_K(Δ)ᵀ V_K(Δ′)‖²_F / K for the top-K right singular vectors of two updates; for the left ones, of the transposes."""
    k = cut(top_k, *delta.shape)
    one, two = svd(delta), svd(other)
    if not (one.determined(k, delta.shape[1]) and two.determined(k, delta.shape[1])):
        return None
    return float(((one.v[:, :k].T @ two.v[:, :k]) ** 2).sum() / k)


def channel_energy(delta: Matrix, earlier: Matrix, top_k: int = 16) -> float | None:
    """‖ΔV Vᵀ‖²_F / ‖Δ‖²_F with V the top-K right singular vectors of an earlier update; for the left ones, of the transposes."""
    k = cut(top_k, *delta.shape)
    channel = svd(earlier)
    if not channel.determined(k, delta.shape[1]):
        return None
    v = channel.v[:, :k]
    return float(((delta @ v @ v.T) ** 2).sum() / (delta**2).sum())


def related(
    base: Matrix, tuned: Matrix, other: Matrix, *, top_k: int = 16, ranks: tuple[int, ...] = (), eta: float = 1e-3
) -> Values:
    """Every number of a pair of updates of `base`, as the first is seen against the other."""
    a, b = tuned - base, other - base
    seen, seen_other = ~unchanged(base, tuned, eta), ~unchanged(base, other, eta)
    both, either = seen & seen_other, seen | seen_other
    moved = bool(np.any(a)) and bool(np.any(b))
    inner = float((a * b).sum())
    values: Values = {}
    values["update_cosine", ""] = inner / float(np.sqrt((a**2).sum() * (b**2).sum())) if moved else None
    values["update_multiple", ""] = inner / float((b**2).sum()) if moved else None
    values["sign_agreement", ""] = float((np.sign(a) == np.sign(b))[both].mean()) if both.any() else None
    values["visible_jaccard", ""] = float(both.sum() / either.sum()) if moved and either.any() else None
    values["visible_lift", ""] = (
        float(both.mean() / (seen.mean() * seen_other.mean())) if seen.any() and seen_other.any() else None
    )
    for k in sorted({*ranks, top_k}):
        values["shared_subspace", f"right.{k}"] = subspace_similarity(a, b, k) if moved else None
        values["shared_subspace", f"left.{k}"] = subspace_similarity(a.T, b.T, k) if moved else None
    values["shared_channel", f"right.{top_k}"] = channel_energy(a, b, top_k) if moved else None
    values["shared_channel", f"left.{top_k}"] = channel_energy(a.T, b.T, top_k) if moved else None
    return values


@dataclass(frozen=True)
class Reference:
    """All values of one pair of matrices, the curves beside them, and the ranks after the cut."""

    values: Values
    curves: dict[str, Matrix]
    ranks: dict[str, int] = field(default_factory=dict)


def measure(
    base: Matrix,
    tuned: Matrix,
    *,
    rank: int = 512,
    top_k: int = 16,
    mask_rank: int = 64,
    mask_shares: tuple[float, ...] = (0.5, 0.3),
    eta: float = 1e-3,
) -> Reference:
    """Every diagnostic of one pair; both (rows, cols) float64, finite, the stored entries of each checkpoint."""
    rows, cols = base.shape
    delta = tuned - base
    moved = bool(np.any(delta))
    before, after, update = svd(base), svd(tuned), svd(delta)
    values: Values = {}

    same = unchanged(base, tuned, eta)
    values["update_sparsity", "bf16_eta"] = float(same.mean())
    values["update_sparsity", "bf16_exact"] = float((bf16_bits(base) == bf16_bits(tuned)).mean())

    frobenius, size = float(np.sqrt((delta**2).sum())), float(np.sqrt((base**2).sum()))
    operator = float(update.s[0])
    values["frobenius_norm", ""] = frobenius
    values["relative_norm", ""] = (frobenius / size if size > 0 else None) if moved else 0.0
    values["operator_norm", ""] = operator
    values["stable_rank", ""] = (frobenius / operator) ** 2 if moved else None
    values["effective_rank", ""] = effective_rank(update.s) if moved else None
    values["hill_exponent", str(top_k)] = hill_exponent(update.s, top_k) if moved else None

    k = cut(rank, rows, cols)
    sines: dict[str, Matrix] = {}
    angles: dict[str, Matrix] = {}
    sides = (("left", before.u, after.u, rows), ("right", before.v, after.v, cols))
    for side, a, b, dimension in sides:
        if before.determined(k, dimension) and after.determined(k, dimension):
            sines[side], angles[side] = sines_and_angles(a[:, :k], b[:, :k])
        if not moved:
            sines[side] = angles[side] = np.zeros(k)
        values["principal_angles", f"{side}.max"] = float(angles[side].max()) if side in angles else None
        values["principal_angles", f"{side}.mean"] = float(angles[side].mean()) if side in angles else None

    drift = after.s - before.s
    shift = float(np.sqrt((drift**2).sum()))
    values["spectral_shift", ""] = (shift / size if size > 0 else None) if moved else 0.0

    r = cut(mask_rank, rows, cols)
    left, right = before.determined(r, rows), before.determined(r, cols)
    principal = np.abs((before.u[:, :r] * before.s[:r]) @ before.v[:, :r].T)
    for share in mask_shares:
        low = membership(-np.abs(base), share)
        values["mask_overlap", f"low_magnitude.{share:g}"] = overlap(low, ~same)
        values["mask_overlap", f"principal.{share:g}"] = (
            overlap(membership(principal, share), ~same) if left and right else None
        )

    u, v = before.u[:, :r], before.v[:, :r]
    energy = frobenius**2
    values["principal_energy", f"left.{mask_rank}"] = (
        float(((u.T @ delta) ** 2).sum()) / energy if moved and left else None
    )
    values["principal_energy", f"right.{mask_rank}"] = (
        float(((delta @ v) ** 2).sum()) / energy if moved and right else None
    )
    values["principal_energy", f"both.{mask_rank}"] = (
        float(((u.T @ delta @ v) ** 2).sum()) / energy if moved and left and right else None
    )

    gap = after.sigma(k) - before.sigma(k + 1)
    values["bound_ratio", "mirsky"] = shift / frobenius if moved else None
    values["bound_ratio", "weyl"] = float(np.abs(drift).max()) / operator if moved else None
    values["bound_ratio", "wedin"] = (
        max(float(sines[side].max()) for side in sines) * gap / operator
        if moved and len(sines) == 2 and gap > 0
        else None
    )

    curves = {"sigma_base": before.s, "sigma_tuned": after.s, "sigma_update": update.s}
    curves |= {f"angle_{side}": angles[side] for side in angles}
    return Reference(values, curves, {"rank": k, "mask_rank": r, "top_k": min(top_k, len(update.s))})


# Comparing ------------------------------------------------------------------------------------------------------


def disagreement(key: tuple[str, str], value: float | None, error: float | None, expected: float | None) -> str | None:
    """Why a computed value does not agree with the reference, or None where it does.

    Agreement is 1e-6 relative, or 1e-6 degrees for angles, or the stated `error`: a spectral shift of 1e-12 lies near
    the rounding of any float64 decomposition, and so do the bound ratios of an update that small. The stated error
    must cover the difference too, up to the reference's own rounding. How large it may be is checked elsewhere.
    """
    if value is None or expected is None:
        return None if value is expected else f"{key}: {value} instead of {expected}"
    difference = abs(value - expected)
    angle = key[0] == "principal_angles"
    allowed = 1e-6 if angle else 1e-6 * abs(expected)
    if error is None or not error >= 0:
        return f"{key}: no error bound ({error})"
    if not difference <= max(allowed, error):
        return f"{key}: {value} differs from {expected} by {difference:.3g}"
    if not difference <= error + 1e-10 * (1 if angle else abs(expected)):
        return f"{key}: {value} differs from {expected} by {difference:.3g}, more than its stated error {error:.3g}"
    return None


# The isotropic null ---------------------------------------------------------------------------------------------


def gaussian_null(
    base: Matrix, tuned: Matrix, draws: int, seed: int, **settings: int
) -> dict[tuple[str, str], tuple[float, float]]:
    """Mean and standard deviation, over draws, of each value for a Gaussian update of the same Frobenius norm."""
    rng = np.random.default_rng(seed)
    norm = np.sqrt(((tuned - base) ** 2).sum())
    samples: dict[tuple[str, str], list[float]] = {}
    for _ in range(draws):
        noise = rng.standard_normal(base.shape)
        noise *= norm / np.sqrt((noise**2).sum())
        for key, value in measure(base, base + noise, **settings).values.items():  # type: ignore[arg-type]
            if value is not None:
                samples.setdefault(key, []).append(value)
    return {key: (float(np.mean(found)), float(np.std(found, ddof=1))) for key, found in samples.items()}

"""Every diagnostic of an isotropic Gaussian ΔW of the measured Frobenius norm: mean and standard deviation.

In closed form, or from draws that need no large matrix, wherever that exists (`numerics.nulls`); what is left out here is
drawn and measured like a real update.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from opdgeo.diagnostics.update import Update
from opdgeo.numerics import nulls
from opdgeo.numerics.masks import Mask, rows_of_block
from opdgeo.numerics.precision import FINEST

Null = dict[tuple[str, str], tuple[float, float]]
SPECTRA, SHIFTS = 16, 64  # draws of what costs little
SPACING = 0.1  # beyond it, relative to the spacing of W₀'s singular values, an update is not a small perturbation


def gaussian_null(update: Update, wanted: Collection[str], *key: object) -> Null:
    """The null of every wanted diagnostic that has a cheap one, each from no more settings than the diagnostic reads; `key`
    seeds the draws."""
    rows, cols = update.base.weights.shape
    scale = update.norm / math.sqrt(rows * cols)
    found: Null = {("frobenius_norm", ""): (update.norm, 0.0)}
    if update.base.norm > 0:
        found["relative_norm", ""] = (update.norm / update.base.norm, 0.0)
    if not {"update_sparsity", "mask_overlap"}.isdisjoint(wanted) and update.settings.eta < FINEST:
        found |= _visibility(update, scale, overlap="mask_overlap" in wanted)
    if "principal_energy" in wanted:
        found |= _energy(update)
    largest = None  # E‖G‖₂
    if not {"operator_norm", "stable_rank", "hill_exponent", "bound_ratio"}.isdisjoint(wanted):
        spectra = nulls.top_singular_values(
            rows, cols, update.norm, _top(update), SPECTRA, np.random.default_rng(nulls.seed("spectrum", *key))
        )
        found |= _spectrum(update, spectra)
        largest = float(spectra[:, 0].mean())
    moving = not {"principal_angles", "spectral_shift", "bound_ratio"}.isdisjoint(wanted)
    if moving and nulls.spacing(update.base.spectrum.sigma, scale) < SPACING:
        found |= _perturbation(update, scale, largest, *key)
    return {(name, variant): null for (name, variant), null in found.items() if name in wanted}


def _top(update: Update) -> int:
    return min(update.settings.top_k, *update.base.weights.shape)


def _visibility(update: Update, scale: float, *, overlap: bool) -> Null:
    base = update.base
    masks: dict[str, Mask] = {}
    if overlap:
        masks |= {f"low_magnitude.{share:g}": m for share, m in base.low_magnitude.items()}
        masks |= {f"principal.{share:g}": m for share, m in (base.principal or {}).items()}
    everywhere = torch.zeros(2, dtype=torch.float64, device=base.weights.device)
    sums = {name: torch.zeros(2, 8, dtype=torch.float64, device=base.weights.device) for name in masks}
    size = rows_of_block(base.weights.shape[1])
    for start in range(0, len(base.weights), size):
        part = slice(start, start + size)
        moves = nulls.visible_probability(base.weights[part], scale).flatten()
        spread = moves * (1 - moves)
        everywhere += torch.stack([moves.sum(), spread.sum()])
        for name, mask in masks.items():
            codes = mask.codes[part].flatten()
            for row, weights in zip(sums[name], (moves, spread), strict=True):
                row += torch.bincount(codes, weights=weights, minlength=8)
    entries = base.weights.numel()
    found: Null = {}
    for name, (moved, spread) in sums.items():
        total = float(moved.sum())
        if total == 0:
            continue
        inside = masks[name].weight().to(moved.device)
        share = float((moved * inside).sum()) / total
        deviation = math.sqrt(float((spread * (inside - share) ** 2).sum())) / total
        found["mask_overlap", name] = (share, deviation)
    sparsity = (1 - float(everywhere[0]) / entries, math.sqrt(float(everywhere[1])) / entries)
    return found | {("update_sparsity", "bf16_eta"): sparsity, ("update_sparsity", "bf16_exact"): sparsity}


def _energy(update: Update) -> Null:
    rows, cols = update.base.weights.shape
    k, _ = update.base.cut(update.settings.mask_rank)
    inside = {"left": k * cols, "right": k * rows, "both": k * k}
    return {
        ("principal_energy", f"{side}.{update.settings.mask_rank}"): nulls.energy_share(part, rows * cols)
        for side, part in inside.items()
        if side == "both" or update.base.spectrum.subspace_error(k, side) < 1
    }


def _spectrum(update: Update, draws: np.ndarray) -> Null:
    found = {
        ("operator_norm", ""): mean_std(draws[:, 0]),
        ("stable_rank", ""): mean_std((update.norm / draws[:, 0]) ** 2),
    }
    k = draws.shape[1]
    if k >= 2:
        logs = np.log(draws[:, :-1] / draws[:, -1:]).sum(axis=1)
        found["hill_exponent", str(update.settings.top_k)] = mean_std((k - 1) / logs)
    return found


def _perturbation(update: Update, scale: float, largest: float | None, *key: object) -> Null:
    """What a small Gaussian update does to W₀'s singular values and subspaces; what is relative to its ‖·‖₂, `largest`, only
    where that is given."""
    rows, cols = update.base.weights.shape
    before = update.base.spectrum
    sigma = before.sigma
    moved = nulls.shifts(sigma, rows, cols, scale, SHIFTS, nulls.generator("shifts", *key))
    norms = torch.linalg.vector_norm(moved, dim=1)
    found: Null = {
        ("spectral_shift", ""): mean_std(norms / update.base.norm),
        ("bound_ratio", "mirsky"): mean_std(norms / update.norm),
    }
    if largest:
        found["bound_ratio", "weyl"] = mean_std(moved.abs().amax(dim=1) / largest)
    k, _ = update.base.cut(update.settings.rank)
    if k >= len(sigma) or max(before.subspace_error(k, side) for side in ("left", "right")) >= 1:
        return found
    angles: dict[str, list[float]] = {}
    wedin = []
    for draw in range(max(2, update.settings.nulls)):
        turned = nulls.turns(sigma, rows, cols, k, scale, nulls.generator("turns", *key, draw))
        for side, theta in turned.items():
            angles.setdefault(f"{side}.max", []).append(math.degrees(float(theta.max())))
            angles.setdefault(f"{side}.mean", []).append(math.degrees(float(theta.mean())))
        gap = float(sigma[k - 1] + moved[draw % SHIFTS, k - 1] - sigma[k])
        if gap > 0 and largest:
            wedin.append(math.sin(max(float(theta.max()) for theta in turned.values())) * gap / largest)
    found |= {("principal_angles", name): mean_std(values) for name, values in angles.items()}
    return found | ({("bound_ratio", "wedin"): mean_std(wedin)} if wedin else {})


def mean_std(values: Iterable[float] | np.ndarray | Tensor) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    known = [float(v) for v in values]
    mean = math.fsum(known) / len(known)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in known) / max(1, len(known) - 1))

"""Normalised spectral shift (PAPER §2): NSS = ‖σ(W₊) − σ(W₀)‖₂ / ‖σ(W₀)‖₂."""

from __future__ import annotations

import torch

from opdgeo.diagnostics.update import Settings, Update, Value, undefined

READS = ("rank", "mask_rank")


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    if update.base.norm == 0:
        return {"": undefined("the base matrix is zero")}
    before, after = update.base.spectrum, update.tuned_spectrum
    shift = float(torch.linalg.vector_norm(after.sigma - before.sigma)) / update.base.norm
    error = float(torch.linalg.vector_norm(before.errors + after.errors)) / update.base.norm
    return {"": Value(shift, error, after.method)}

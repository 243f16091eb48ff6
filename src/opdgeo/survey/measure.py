"""One matrix through all checkpoints: diagnostics, nulls, trajectory similarity, curves. No formulas, no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Base, Settings, Update, Value, diagnostics, subspace_similarity
from opdgeo.diagnostics.gaussian_null import Null, gaussian_null, mean_std
from opdgeo.numerics import nulls
from opdgeo.numerics.spectra import Factors, Spectrum, leading
from opdgeo.survey.cache import SpectrumCache


@dataclass
class Measured:
    """The rows of one matrix for `measurements.parquet` and `curves.parquet`, and where the seconds went."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "factor": 0.0, "measure": 0.0, "nulls": 0.0}
    )


def measure(
    matrix: Matrix,
    base: Checkpoint,
    checkpoints: list[Checkpoint],
    settings: Settings,
    *,
    trajectory: bool,
    device: str = "cpu",
    cache: SpectrumCache | None = None,
    done: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure `matrix` at every checkpoint against `base`; calls `done` after each checkpoint.

    A matrix with a non-finite entry at some checkpoint is skipped there, and its rows say so.
    """
    out = Measured()
    clock = _Clock(out.seconds)
    with clock("read"):
        before = Base(base.read(matrix).to(device), settings)
    blocked = _non_finite(before.weights, base)
    if cache and not blocked:
        with clock("factor"):
            _factor(before, cache, device)
    spectra: dict[int, Spectrum | None] = {}
    increments: dict[int, float] = {}
    last = before.weights
    for index, checkpoint in enumerate(checkpoints):
        with clock("read"):
            near = next((s.right for s in reversed(spectra.values()) if s), None)
            factors = checkpoint.factors(matrix)
            tuned = Factors(*(f.to(device) for f in factors)) if factors else checkpoint.read(matrix).to(device)
            update = Update(before, tuned, directions=trajectory, start=near)
        reason = blocked or _non_finite(update.weights, checkpoint)
        if reason:
            values = {(d, v): Value(None, status="skipped", reason=reason) for d, v in _row_names(settings)}
            null: Null = {}
        else:
            with clock("measure"):
                values = _values(update)
                out.curves += [
                    {
                        "checkpoint": checkpoint.name,
                        "step": checkpoint.step,
                        "matrix": matrix.name,
                        "curve": c,
                        "values": v,
                    }
                    for c, v in _curves(update)
                ]
                if trajectory:
                    spectra[index] = update.delta_spectrum if update.moved else None
                    increments[index] = Update(Base(last, settings), update.weights).norm
                    last = update.weights
            with clock("nulls"):
                null = _null(update, matrix, checkpoint)
        out.rows += [_row(checkpoint, matrix, d, v, value, null.get((d, v))) for (d, v), value in values.items()]
        done()
    if trajectory:
        with clock("nulls"):
            walks = _walks(matrix, settings, spectra, increments, device)
        out.rows += _similarities(matrix, checkpoints, settings, spectra, walks)
    return out


def _factor(before: Base, cache: SpectrumCache, device: str) -> None:
    """Take W₀'s spectrum from the cache, or compute and keep it."""
    path = cache.path(before.weights, before.factored_rank)
    known = cache.load(path, device)
    if known is not None:
        before.spectrum = known
    else:
        cache.save(path, before.spectrum)


def _row_names(settings: Settings) -> list[tuple[str, str]]:
    return [(name, variant) for name, d in diagnostics().items() for variant in d.variants(settings)]


def _values(update: Update) -> dict[tuple[str, str], Value]:
    return {(name, v): value for name, d in diagnostics().items() for v, value in d.measure(update).items()}


def _null(update: Update, matrix: Matrix, checkpoint: Checkpoint) -> Null:
    """Mean and standard deviation of every diagnostic over null updates of the same Frobenius norm."""
    settings = update.settings
    if not update.moved or settings.nulls == 0:
        return {}
    found = gaussian_null(update, matrix.name, checkpoint.name) if settings.null == "gaussian" else {}
    missing = {
        name: d for name, d in diagnostics().items() if any((name, v) not in found for v in d.variants(settings))
    }
    draws: dict[tuple[str, str], list[float]] = {}
    for draw in range(settings.nulls if missing else 0):
        rng = nulls.generator(settings.null, matrix.name, checkpoint.name, draw)
        if settings.null == "gaussian":
            delta = nulls.gaussian(matrix.rows, matrix.cols, update.norm, rng).to(update.weights.device)
        else:
            delta = nulls.shuffled(update.delta.whole(), rng)
        sampled = Update(update.base, delta.add_(update.base.weights), sampled=True)
        for name, diagnostic in missing.items():
            for variant, value in diagnostic.measure(sampled).items():
                if value.value is not None:
                    draws.setdefault((name, variant), []).append(value.value)
    return {key: mean_std(values) for key, values in draws.items()} | found


def _similarity_rank(matrix: Matrix, settings: Settings) -> int:
    return min(settings.top_k, max(1, min(matrix.rows, matrix.cols) // 2))


def _walks(
    matrix: Matrix, settings: Settings, spectra: dict[int, Spectrum | None], increments: dict[int, float], device: str
) -> list[dict[int, Spectrum | None]]:
    """Draws of the walk null: spectra of running sums of independent Gaussian increments with the observed norms."""
    if not any(spectra.values()):
        return []
    k = _similarity_rank(matrix, settings)
    walks = []
    for draw in range(settings.nulls):
        rng = nulls.generator("walk", matrix.name, draw)
        position = torch.zeros(matrix.rows, matrix.cols, dtype=torch.float64)
        walk: dict[int, Spectrum | None] = {}
        for index, norm in increments.items():
            position = position + nulls.gaussian(matrix.rows, matrix.cols, norm, rng)
            walk[index] = leading(position.to(device), k, tolerance=1e-4, angle=1e-3) if spectra[index] else None
        walks.append(walk)
    return walks


def _similarities(
    matrix: Matrix,
    checkpoints: list[Checkpoint],
    settings: Settings,
    spectra: dict[int, Spectrum | None],
    walks: list[dict[int, Spectrum | None]],
) -> Iterator[dict[str, Any]]:
    k = _similarity_rank(matrix, settings)
    reason = None if k == settings.top_k else f"rank {settings.top_k} cut to {k}: half the smaller side"
    names = dict(zip(("final", "previous"), subspace_similarity.variants(settings), strict=True))
    for index, checkpoint in enumerate(checkpoints):
        for kind, other in (("final", len(checkpoints) - 1), ("previous", index - 1)):
            null = None
            if other < 0:
                value = Value(None, status="undefined", reason="there is no earlier checkpoint")
            elif index not in spectra or other not in spectra:
                value = Value(None, status="skipped", reason="non-finite entries in one of the two checkpoints")
            else:
                value = subspace_similarity.similarity(spectra[index], spectra[other], reason)
                drawn = [subspace_similarity.similarity(w[index], w[other]).value for w in walks]
                if value.value is not None and (known := [x for x in drawn if x is not None]):
                    null = mean_std(known)
            yield _row(checkpoint, matrix, "subspace_similarity", names[kind], value, null)


def _curves(update: Update) -> Iterator[tuple[str, list[float]]]:
    yield "sigma_base", update.base.spectrum.sigma.tolist()
    yield "sigma_tuned", update.tuned_spectrum.sigma.tolist()
    if update.moved:
        yield "sigma_update", update.delta_spectrum.sigma.tolist()
        for side, angles in update.angles.items():
            yield f"angle_{side}", torch.rad2deg(angles).tolist()


def _row(
    checkpoint: Checkpoint,
    matrix: Matrix,
    diagnostic: str,
    variant: str,
    value: Value,
    null: tuple[float, float] | None,
) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "matrix": matrix.name,
        "layer": matrix.layer,
        "role": matrix.role,
        "rows": matrix.rows,
        "cols": matrix.cols,
        "diagnostic": diagnostic,
        "variant": variant,
        "value": value.value,
        "error": value.error,
        "method": value.method,
        "null_mean": null[0] if null else None,
        "null_std": null[1] if null else None,
        "status": value.status,
        "reason": value.reason,
    }


def _non_finite(weights: Tensor, checkpoint: Checkpoint) -> str | None:
    bad = int((~torch.isfinite(weights)).sum())
    return f"{bad} non-finite entries in {checkpoint.name}" if bad else None


class _Clock:
    """``with clock("read"): …`` adds the seconds spent to `seconds["read"]`."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = seconds

    def __call__(self, part: str) -> _Clock:
        self.part = part
        return self

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *exception: object) -> None:
        self.seconds[self.part] += time.perf_counter() - self.started

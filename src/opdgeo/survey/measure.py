"""One matrix through all checkpoints: diagnostics, nulls, trajectory similarity, curves. No formulas, no files."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import MODULES, Base, Settings, Update, Value, diagnostics, subspace_similarity
from opdgeo.diagnostics.gaussian_null import Null, gaussian_null, mean_std
from opdgeo.diagnostics.update import undefined
from opdgeo.numerics import nulls
from opdgeo.numerics.spectra import Factors, Spectrum, leading
from opdgeo.survey.cache import SpectrumCache

# Which diagnostic a curve is computed with.
CURVES = {
    "sigma_base": "spectral_shift",
    "sigma_tuned": "spectral_shift",
    "sigma_update": "operator_norm",
    "angle_left": "principal_angles",
    "angle_right": "principal_angles",
}


@dataclass
class Measured:
    """The rows of one matrix for `measurements.parquet` and `curves.parquet`, the settings they were made with, and where
    the seconds went."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "factor": 0.0, "measure": 0.0, "nulls": 0.0}
    )


@dataclass(frozen=True)
class Job:
    """What is measured of every matrix: plain data, so that it can be sent to another machine.

    `trajectory` compares the checkpoints' update subspaces with each other; `cache` None keeps no factors.
    """

    base: Checkpoint
    checkpoints: list[Checkpoint]
    settings: Settings
    trajectory: bool
    device: str = "cpu"
    cache: SpectrumCache | None = None


def outdated(known: dict[str, Any] | None, settings: Settings, trajectory: bool) -> tuple[set[str], set[str]]:
    """The diagnostics whose values, and those whose nulls, differ between what was measured with the settings `known` and
    what `settings` ask for: those that read a setting which changed. A null reads what its diagnostic reads, and how
    nulls are drawn."""
    now = json.loads(json.dumps(settings.to_json()))
    changed = {name for name, value in now.items() if not known or known.get(name) != value}
    reads = {name: set(d.READS) for name, d in diagnostics().items()}
    if trajectory:
        reads["subspace_similarity"] = set(subspace_similarity.READS)
    values = set(reads) if not known else {name for name, names in reads.items() if names & changed}
    return values, set(reads) if changed & {"nulls", "null"} else values


def measure(job: Job, matrix: Matrix, known: Measured | None = None) -> Measured:
    """Measure `matrix` at every checkpoint against the base; what still holds of `known`, from an earlier run, is taken over.

    A matrix with a non-finite entry at some checkpoint is skipped there, and its rows say so.
    """
    settings, base, known = job.settings, job.base, known or Measured()
    values_of, nulls_of = outdated(known.settings, settings, job.trajectory)
    reading = nulls_of & set(MODULES)
    directions = job.trajectory and any("top_k" in _reads(name) for name in values_of)
    old = _Old(known)
    out = Measured(settings=settings.to_json(), seconds=dict(known.seconds))
    clock = _Clock(out.seconds)
    with clock("read"):
        before = Base(base.read(matrix).to(job.device), settings)
    blocked = _non_finite(before.weights, base)
    if job.cache and not blocked and any("rank" in _reads(name) for name in reading):
        with clock("factor"):
            _factor(before, job.cache, job.device)
    spectra: dict[int, Spectrum | None] = {}
    moved: dict[int, bool] = {}
    increments: dict[int, float] = {}
    last = before.weights
    for index, checkpoint in enumerate(job.checkpoints):
        with clock("read"):
            factors = checkpoint.factors(matrix)
            tuned = Factors(*(f.to(job.device) for f in factors)) if factors else checkpoint.read(matrix).to(job.device)
            near = next((s.right for s in reversed(spectra.values()) if s), None)
            update = Update(before, tuned, directions=job.trajectory, start=near)
        reason = blocked or _non_finite(update.weights, checkpoint)
        values: dict[str, dict[str, Value]] = {}
        curves: dict[str, list[float]] = {}
        null: Null = {}
        if reason:
            skipped = Value(None, status="skipped", reason=reason)
            values = {n: dict.fromkeys(d.variants(settings), skipped) for n, d in diagnostics().items()}
        else:
            with clock("measure"):
                values = {n: d.measure(update) for n, d in diagnostics().items() if n in values_of}
                curves = dict(_curves(update, values_of))
                if directions:
                    spectra[index] = update.delta_spectrum if update.moved else None
            if job.trajectory and "subspace_similarity" in nulls_of:
                moved[index] = update.moved
                increments[index] = Update(Base(last, settings), update.weights).norm
                last = update.weights
            with clock("nulls"):
                null = _null(update, matrix, checkpoint, reading)
        for name in MODULES:
            found = values[name] if name in values_of else old.values(checkpoint, name)
            for variant, value in found.items():
                beside = null.get((name, variant)) if name in nulls_of else old.null(checkpoint, name, variant)
                out.rows.append(_row(checkpoint, matrix, name, variant, value, beside))
        for curve, diagnostic in CURVES.items():
            points = curves.get(curve) if diagnostic in values_of else old.curves.get((checkpoint.name, curve))
            if points is not None:
                place = {"checkpoint": checkpoint.name, "step": checkpoint.step, "matrix": matrix.name}
                out.curves.append(place | {"curve": curve, "values": points})
    if job.trajectory:
        with clock("nulls"):
            walks = _walks(matrix, settings, moved, increments, job.device)
        for index, checkpoint in enumerate(job.checkpoints):
            found = (
                dict(_similarities(matrix, index, len(job.checkpoints), settings, spectra))
                if "subspace_similarity" in values_of
                else old.values(checkpoint, "subspace_similarity")
            )
            for variant, value in found.items():
                other = len(job.checkpoints) - 1 if variant.startswith("final") else index - 1
                if "subspace_similarity" not in nulls_of:
                    beside = old.null(checkpoint, "subspace_similarity", variant)
                else:
                    beside = _walked(walks, index, other) if value.value is not None else None
                out.rows.append(_row(checkpoint, matrix, "subspace_similarity", variant, value, beside))
    return out


class _Old:
    """What an earlier run measured, by place."""

    def __init__(self, known: Measured):
        self.curves = {(c["checkpoint"], c["curve"]): c["values"] for c in known.curves}
        self.rows: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in known.rows:
            self.rows.setdefault((row["checkpoint"], row["diagnostic"]), {})[row["variant"]] = row

    def values(self, checkpoint: Checkpoint, diagnostic: str) -> dict[str, Value]:
        fields = ("value", "error", "method", "status", "reason")
        rows = self.rows.get((checkpoint.name, diagnostic), {})
        return {variant: Value(*(row[f] for f in fields)) for variant, row in rows.items()}

    def null(self, checkpoint: Checkpoint, diagnostic: str, variant: str) -> tuple[float, float] | None:
        row = self.rows[checkpoint.name, diagnostic][variant]
        return None if row["null_mean"] is None else (row["null_mean"], row["null_std"])


def _reads(name: str) -> tuple[str, ...]:
    return subspace_similarity.READS if name == "subspace_similarity" else diagnostics()[name].READS


def _factor(before: Base, cache: SpectrumCache, device: str) -> None:
    """Take W₀'s spectrum from the cache, or compute and keep it."""
    path = cache.path(before.weights, before.factored_rank)
    known = cache.load(path, device)
    if known is not None:
        before.spectrum = known
    else:
        cache.save(path, before.spectrum)


def _null(update: Update, matrix: Matrix, checkpoint: Checkpoint, wanted: Collection[str] = MODULES) -> Null:
    """Mean and standard deviation of the wanted diagnostics over null updates of the same Frobenius norm."""
    settings = update.settings
    if not update.moved or settings.nulls == 0 or not wanted:
        return {}
    found = gaussian_null(update, wanted, matrix.name, checkpoint.name) if settings.null == "gaussian" else {}
    missing = {
        name: d
        for name, d in diagnostics().items()
        if name in wanted and any((name, v) not in found for v in d.variants(settings))
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
    matrix: Matrix, settings: Settings, moved: dict[int, bool], increments: dict[int, float], device: str
) -> list[dict[int, Spectrum | None]]:
    """Draws of the walk null: spectra of running sums of independent Gaussian increments with the observed norms."""
    if not any(moved.values()):
        return []
    k = _similarity_rank(matrix, settings)
    walks = []
    for draw in range(settings.nulls):
        rng = nulls.generator("walk", matrix.name, draw)
        position = torch.zeros(matrix.rows, matrix.cols, dtype=torch.float64)
        walk: dict[int, Spectrum | None] = {}
        for index, norm in increments.items():
            position = position + nulls.gaussian(matrix.rows, matrix.cols, norm, rng)
            walk[index] = leading(position.to(device), k, tolerance=1e-4, angle=1e-3) if moved[index] else None
        walks.append(walk)
    return walks


def _similarities(
    matrix: Matrix, index: int, count: int, settings: Settings, spectra: dict[int, Spectrum | None]
) -> Iterator[tuple[str, Value]]:
    """Similarity of checkpoint `index` of `count` with the last and with the one before."""
    k = _similarity_rank(matrix, settings)
    reason = None if k == settings.top_k else f"rank {settings.top_k} cut to {k}: half the smaller side"
    for variant, other in zip(subspace_similarity.variants(settings), (count - 1, index - 1), strict=True):
        if other < 0:
            yield variant, undefined("there is no earlier checkpoint")
        elif index not in spectra or other not in spectra:
            reason_skipped = "non-finite entries in one of the two checkpoints"
            yield variant, Value(None, status="skipped", reason=reason_skipped)
        else:
            yield variant, subspace_similarity.similarity(spectra[index], spectra[other], reason)


def _walked(walks: list[dict[int, Spectrum | None]], index: int, other: int) -> tuple[float, float] | None:
    """The similarity of two checkpoints over the walks."""
    drawn = [subspace_similarity.similarity(w[index], w[other]).value for w in walks]
    known = [x for x in drawn if x is not None]
    return mean_std(known) if known else None


def _curves(update: Update, wanted: Collection[str]) -> Iterator[tuple[str, list[float]]]:
    """The curves that are computed with the wanted diagnostics."""
    if CURVES["sigma_base"] in wanted:
        yield "sigma_base", update.base.spectrum.sigma.tolist()
        yield "sigma_tuned", update.tuned_spectrum.sigma.tolist()
    if update.moved and CURVES["sigma_update"] in wanted:
        yield "sigma_update", update.delta_spectrum.sigma.tolist()
    if update.moved and CURVES["angle_left"] in wanted:
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

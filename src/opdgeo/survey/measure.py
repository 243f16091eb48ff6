"""One matrix through all checkpoints: diagnostics, nulls, trajectory similarity, curves. No formulas, no files."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import MODULES, Base, Settings, Update, Value, channel_energy, diagnostics, subspace_similarity
from opdgeo.diagnostics.gaussian_null import Null, gaussian_null, mean_std
from opdgeo.diagnostics.update import LowRankUpdate, undefined
from opdgeo.errors import CheckpointError
from opdgeo.numerics import nulls
from opdgeo.numerics.spectra import LowRankMatrix, Spectrum
from opdgeo.numerics.subspaces import largest_rank
from opdgeo.survey.cache import SpectrumCache

if TYPE_CHECKING:
    from opdgeo.survey.trail import Trail

# Diagnostics that compare the checkpoints of a trajectory with each other.
TRAJECTORY = {"subspace_similarity": subspace_similarity, "channel_energy": channel_energy}

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

    `trajectory` compares the checkpoints' update subspaces with each other; `cache` None keeps no factors; `trail` holds
    what was measured of earlier checkpoints of a run that is still growing.
    """

    base: Checkpoint
    checkpoints: list[Checkpoint]
    settings: Settings
    trajectory: bool
    device: str = "cpu"
    cache: SpectrumCache | None = None
    trail: Trail | None = None


def outdated(known: dict[str, Any] | None, settings: Settings, trajectory: bool) -> tuple[set[str], set[str]]:
    """The diagnostics whose values, and those whose nulls, differ between what was measured with the settings `known` and
    what `settings` ask for: those that read a setting which changed. A null reads what its diagnostic reads, and how
    nulls are drawn."""
    now = json.loads(json.dumps(settings.to_json()))
    changed = {name for name, value in now.items() if not known or known.get(name) != value}
    reads = {name: set(d.READS) for name, d in diagnostics().items()}
    if trajectory:
        reads |= {name: set(_reads(name)) for name in TRAJECTORY}
    values = set(reads) if not known else {name for name, names in reads.items() if names & changed}
    return values, set(reads) if changed & {"nulls", "null"} else values


@dataclass
class Step:
    """What a trajectory keeps of one checkpoint: its rows, and the factors that later checkpoints are compared with.

    `spectrum` holds ΔW's leading triplets, None where the matrix did not move, was skipped (`finite` tells which) or its
    values are taken over; `increment` is ‖W_t − W_{t−1}‖_F, None where the checkpoint before is not there to read.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    spectrum: Spectrum | None = None
    increment: float | None = None
    finite: bool = True


def measure(job: Job, matrix: Matrix, known: Measured | None = None) -> Measured:
    """Measure `matrix` at every checkpoint against the base; what still holds of `known`, from an earlier run, is taken over.

    A matrix with a non-finite entry at some checkpoint is skipped there, and its rows say so.
    """
    settings, base, known = job.settings, job.base, known or Measured()
    values_of, nulls_of = outdated(known.settings, settings, job.trajectory)
    reading = nulls_of & set(MODULES)
    compared = job.trajectory and any("top_k" in _reads(name) for name in values_of)
    directions = max(subspace_similarity.ranks(settings)) if job.trajectory else 0
    old = _Old(known)
    out = Measured(settings=settings.to_json(), seconds=dict(known.seconds))
    clock = _Clock(out.seconds)
    with clock("read"):
        before = Base(base.read(matrix).to(job.device), settings)
    blocked = _non_finite(before.weights, base)
    if job.cache and not blocked and any("rank" in _reads(name) for name in reading):
        with clock("factor"):
            _factor(before, job.cache, job.device, with_masks="mask_overlap" in reading)
    steps: list[Step] = []
    last: Tensor | None = before.weights  # the newest finite weights; None: not read yet
    for index, checkpoint in enumerate(job.checkpoints):
        if job.trail and (kept := job.trail.load(matrix, index, job.device)):
            steps.append(kept)
            last = None if kept.finite else last
            continue
        step = Step()
        steps.append(step)
        with clock("read"):
            near = next((s.spectrum.right for s in reversed(steps) if s.spectrum), None)
            update = _update(before, checkpoint, matrix, job.device, directions=directions, start=near)
        reason = blocked or _non_finite(update.weights, checkpoint)
        values: dict[str, dict[str, Value]] = {}
        curves: dict[str, list[float]] = {}
        null: Null = {}
        if reason:
            step.finite = False
            skipped = Value(None, status="skipped", reason=reason)
            values = {n: dict.fromkeys(d.variants(settings), skipped) for n, d in diagnostics().items()}
            if job.trajectory:
                values["channel_energy"] = dict.fromkeys(channel_energy.variants(settings), skipped)
        else:
            with clock("measure"):
                values = {n: d.measure(update) for n, d in diagnostics().items() if n in values_of}
                curves = dict(_curves(update, values_of))
                if compared:
                    step.spectrum = update.delta_spectrum if update.moved else None
                    values["channel_energy"] = dict(_energies(update, steps))
            if job.trajectory and nulls_of.intersection(TRAJECTORY):
                with clock("read"):
                    last = _before(job, matrix, steps, before.weights) if last is None else last
                step.increment = None if last is None else Update(Base(last, settings), update.weights).norm
                last = update.weights
            with clock("nulls"):
                null = _null(update, matrix, checkpoint, reading)
                if job.trajectory and settings.nulls:
                    null |= _energy_nulls(matrix, settings, steps)
        for name in (*MODULES, *(["channel_energy"] if job.trajectory else [])):
            found = values[name] if name in values_of else old.values(checkpoint, name)
            for variant, value in found.items():
                beside = null.get((name, variant)) if name in nulls_of else old.null(checkpoint, name, variant)
                beside = beside if value.value is not None or name in MODULES else None
                step.rows.append(_row(checkpoint, matrix, name, variant, value, beside))
        for curve, diagnostic in CURVES.items():
            points = curves.get(curve) if diagnostic in values_of else old.curves.get((checkpoint.name, curve))
            if points is not None:
                place = {"checkpoint": checkpoint.name, "step": checkpoint.step, "matrix": matrix.name}
                step.curves.append(place | {"curve": curve, "values": points})
        if job.trail:
            job.trail.save(matrix, index, step)
    out.rows = [row for step in steps for row in step.rows]
    out.curves = [curve for step in steps for curve in step.curves]
    if job.trajectory:
        with clock("nulls"):
            walk = _walk(matrix, settings, steps) if settings.nulls and "subspace_similarity" in nulls_of else {}
        for index, checkpoint in enumerate(job.checkpoints):
            found = (
                dict(_similarities(matrix, index, settings, steps))
                if "subspace_similarity" in values_of
                else old.values(checkpoint, "subspace_similarity")
            )
            for variant, value in found.items():
                if "subspace_similarity" not in nulls_of:
                    beside = old.null(checkpoint, "subspace_similarity", variant)
                else:
                    beside = walk.get((index, variant)) if value.value is not None else None
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
    return TRAJECTORY[name].READS if name in TRAJECTORY else diagnostics()[name].READS


def _factor(before: Base, cache: SpectrumCache, device: str, *, with_masks: bool) -> None:
    """Take W₀'s spectrum and the thresholds of its masks from the cache, or compute and keep them."""
    path = cache.path(before.weights, before.factored_rank)
    known = cache.load(path, device)
    if known is not None:
        before.spectrum, before.thresholds = known
    elif path is not None:
        if with_masks:
            _ = before.low_magnitude, before.principal
        cache.save(path, before.spectrum, before.thresholds)


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
            delta = nulls.shuffled(update.delta.dense(), rng)
        sampled = Update(update.base, delta.add_(update.base.weights), sampled=True)
        for name, diagnostic in missing.items():
            for variant, value in diagnostic.measure(sampled).items():
                if value.value is not None:
                    draws.setdefault((name, variant), []).append(value.value)
    return {key: mean_std(values) for key, values in draws.items()} | found


def _update(base: Base, checkpoint: Checkpoint, matrix: Matrix, device: str, **how: Any) -> Update:
    """The matrix in a checkpoint as an update of the base: in its factors where the checkpoint is an adapter."""
    factors = checkpoint.factors(matrix)
    if factors:
        return LowRankUpdate(base, LowRankMatrix(*(f.to(device) for f in factors)), **how)
    return Update(base, checkpoint.read(matrix).to(device), **how)


def _before(job: Job, matrix: Matrix, steps: list[Step], base: Tensor) -> Tensor | None:
    """The finite weights before the newest step, W₀ where there are none; None where they are gone: a run may keep its last
    checkpoints only."""
    index = max((i for i, s in enumerate(steps[:-1]) if s.finite), default=None)
    if index is None:
        return base
    try:
        return _update(Base(base, job.settings), job.checkpoints[index], matrix, job.device).weights
    except CheckpointError:
        return None


def _lengths(steps: list[Step]) -> list[float | None]:
    """The squared length of the walk at every step, the sum of the squared increments; None where one is unknown."""
    lengths: list[float | None] = []
    total: float | None = 0.0
    for step in steps:
        if step.finite:
            total = None if total is None or step.increment is None else total + step.increment**2
        lengths.append(total if step.finite else None)
    return lengths


def _walk_angle(lengths: list[float | None], index: int, other: int) -> float | None:
    """The angle between two points of the walk, the earlier and the later of two steps."""
    earlier, later = lengths[min(index, other)], lengths[max(index, other)]
    return None if earlier is None or later is None else subspace_similarity.walk_angle(earlier, later)


def _energies(update: Update, steps: list[Step]) -> Iterator[tuple[str, Value]]:
    """The energy of the newest step's update inside the channels of the first step and of the one before."""
    k, reason = update.base.cut(update.settings.top_k)
    for other, index in (("first", 0), ("previous", len(steps) - 2)):
        for side in subspace_similarity.SIDES:
            name = subspace_similarity.name(other, side, update.settings.top_k)
            if len(steps) < 2:
                yield name, undefined("there is no earlier checkpoint")
            elif not steps[index].finite:
                yield name, Value(None, status="skipped", reason="non-finite entries in the earlier checkpoint")
            else:
                yield name, channel_energy.share(update, steps[index].spectrum, k, side, reason)


def _energy_nulls(matrix: Matrix, settings: Settings, steps: list[Step]) -> Null:
    """The walk null of `_energies`, in closed form."""
    found: Null = {}
    k, lengths = min(settings.top_k, largest_rank(matrix.rows, matrix.cols)), _lengths(steps)
    for other, index in (("first", 0), ("previous", len(steps) - 2)):
        angle = _walk_angle(lengths, index, len(steps) - 1) if len(steps) > 1 else None
        for side, size in (("right", matrix.cols), ("left", matrix.rows)):
            if angle is not None:
                own = nulls.own_energy(matrix.rows, matrix.cols, k)
                name = subspace_similarity.name(other, side, settings.top_k)
                found["channel_energy", name] = channel_energy.null(own, k / size, angle)
    return found


def _others(index: int, count: int) -> tuple[tuple[str, int], tuple[str, int]]:
    """What checkpoint `index` of `count` is compared with."""
    return ("final", count - 1), ("previous", index - 1)


def _similarities(matrix: Matrix, index: int, settings: Settings, steps: list[Step]) -> Iterator[tuple[str, Value]]:
    """Similarity of the step `index` with the last and with the one before, for every K and both sides."""
    largest = largest_rank(matrix.rows, matrix.cols)
    for kind, other in _others(index, len(steps)):
        for side in subspace_similarity.SIDES:
            for asked in subspace_similarity.ranks(settings):
                k = min(asked, largest)
                name = subspace_similarity.name(kind, side, asked)
                reason = None if k == asked else f"rank {asked} cut to {k}: half the smaller side"
                if other < 0:
                    yield name, undefined("there is no earlier checkpoint")
                elif not (steps[index].finite and steps[other].finite):
                    problem = "non-finite entries in one of the two checkpoints"
                    yield name, Value(None, status="skipped", reason=problem)
                else:
                    pair = steps[index].spectrum, steps[other].spectrum
                    yield name, subspace_similarity.similarity(*pair, k, side, reason)


def _walk(matrix: Matrix, settings: Settings, steps: list[Step]) -> dict[tuple[int, str], tuple[float, float]]:
    """The walk null of `_similarities`, by (index, variant)."""
    ranks, lengths = subspace_similarity.ranks(settings), _lengths(steps)
    largest = largest_rank(matrix.rows, matrix.cols)
    table = nulls.pair_similarity(matrix.rows, matrix.cols, tuple(sorted({min(k, largest) for k in ranks})))
    found = {}
    for index in range(len(steps)):
        for kind, other in _others(index, len(steps)):
            angle = _walk_angle(lengths, index, other) if other >= 0 else None
            if angle is not None:
                chances = table(angle)
                for side in subspace_similarity.SIDES:
                    for k in ranks:
                        found[index, subspace_similarity.name(kind, side, k)] = chances[side, min(k, largest)]
    return found


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

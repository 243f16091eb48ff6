"""One matrix through all checkpoints: diagnostics, nulls, trajectory similarity, curves. No formulas, no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Base, Settings, Update, Value, channel_energy, diagnostics, subspace_similarity
from opdgeo.diagnostics.gaussian_null import SPECTRA, Null, gaussian_null, mean_std
from opdgeo.diagnostics.update import cached, undefined
from opdgeo.errors import CheckpointError
from opdgeo.numerics import nulls
from opdgeo.numerics.spectra import Spectrum
from opdgeo.survey.cache import SpectrumCache


@dataclass
class Measured:
    """The rows of one matrix for `measurements.parquet` and `curves.parquet`, and where the seconds went."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"read": 0.0, "factor": 0.0, "measure": 0.0, "nulls": 0.0}
    )


@dataclass
class Step:
    """What a trajectory keeps of one checkpoint: its rows, and the factors that later checkpoints are compared with.

    `spectrum` holds ΔW's leading triplets, None where the matrix did not move or was skipped (`finite` tells which);
    `increment` is ‖W_t − W_{t−1}‖_F, None where the checkpoint before is not there to read.
    """

    rows: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    spectrum: Spectrum | None = None
    increment: float | None = None
    finite: bool = True


class Kept(Protocol):
    """Steps measured by an earlier run (`survey.trail`)."""

    def load(self, matrix: Matrix, index: int) -> Step | None: ...

    def save(self, matrix: Matrix, index: int, step: Step) -> None: ...


def measure(
    matrix: Matrix,
    base: Checkpoint,
    checkpoints: list[Checkpoint],
    settings: Settings,
    *,
    trajectory: bool,
    device: str = "cpu",
    cache: SpectrumCache | None = None,
    kept: Kept | None = None,
    done: Callable[[], None] = lambda: None,
) -> Measured:
    """Measure `matrix` at every checkpoint against `base`; calls `done` after each checkpoint.

    A matrix with a non-finite entry at some checkpoint is skipped there, and its rows say so.
    """
    out = Measured()
    subject = _Subject(matrix, base, settings, trajectory, device, cache, _Clock(out.seconds))
    steps: list[Step] = []
    for index in range(len(checkpoints)):
        step = kept.load(matrix, index) if kept else None
        if step is None:
            step = subject.step(checkpoints, steps)
            if kept:
                kept.save(matrix, index, step)
        steps.append(step)
        out.rows += step.rows
        out.curves += step.curves
        done()
    if trajectory:
        with subject.clock("nulls"):
            out.rows += _similarities(matrix, checkpoints, settings, steps)
    return out


class _Subject:
    """One matrix, opened where it is first needed: a step that is kept costs no reading."""

    def __init__(
        self, matrix: Matrix, base: Checkpoint, settings: Settings, trajectory: bool, device: str,
        cache: SpectrumCache | None, clock: _Clock,
    ):  # fmt: skip
        self.matrix, self.base, self.settings, self.trajectory = matrix, base, settings, trajectory
        self.device, self.cache, self.clock = device, cache, clock
        self.last: tuple[int, Tensor] | None = None  # the newest finite weights, and whose they are

    @cached
    def before(self) -> Base:
        with self.clock("read"):
            return Base(self.base.read(self.matrix).to(self.device), self.settings)

    @cached
    def blocked(self) -> str | None:
        """Why nothing can be measured; W₀'s spectrum comes from the cache where it is there."""
        reason = _non_finite(self.before.weights, self.base)
        if self.cache and not reason:
            with self.clock("factor"):
                _factor(self.before, self.cache, self.device)
        return reason

    def step(self, checkpoints: list[Checkpoint], earlier: list[Step]) -> Step:
        """Measure the checkpoint that comes after `earlier`."""
        index, matrix, settings, clock = len(earlier), self.matrix, self.settings, self.clock
        checkpoint = checkpoints[index]
        reason = self.blocked
        with clock("read"):
            tuned = checkpoint.read(matrix).to(self.device)
        reason = reason or _non_finite(tuned, checkpoint)
        if reason:
            skipped = Value(None, status="skipped", reason=reason)
            return Step([_row(checkpoint, matrix, d, v, skipped, None) for d, v in self._names()], [], finite=False)
        with clock("measure"):
            near = next((s.spectrum.right for s in reversed(earlier) if s.spectrum), None)
            directions = max(subspace_similarity.ranks(settings)) if self.trajectory else 0
            update = Update(self.before, tuned, directions=directions, start=near)
            values = _values(update)
            curves = [
                {"checkpoint": checkpoint.name, "step": checkpoint.step, "matrix": matrix.name, "curve": c, "values": v}
                for c, v in _curves(update)
            ]
        with clock("nulls"):
            null = _null(update, matrix, checkpoint)
        found = Step([], curves)
        if self.trajectory:
            found.spectrum = update.delta_spectrum if update.moved else None
            with clock("read"):
                found.increment = self._increment(tuned, checkpoints, earlier)
            self.last = index, tuned
            with clock("measure"):
                for name, value, chance in self._energies(update, [*earlier, found]):
                    values["channel_energy", name] = value
                    null |= {("channel_energy", name): chance} if chance else {}
        found.rows = [_row(checkpoint, matrix, d, v, value, null.get((d, v))) for (d, v), value in values.items()]
        return found

    def _names(self) -> list[tuple[str, str]]:
        names = [(name, variant) for name, d in diagnostics().items() for variant in d.variants(self.settings)]
        if self.trajectory:
            names += [("channel_energy", variant) for variant in channel_energy.variants(self.settings)]
        return names

    def _increment(self, tuned: Tensor, checkpoints: list[Checkpoint], earlier: list[Step]) -> float | None:
        """‖W_t − W_s‖_F from the finite checkpoint before, or from W₀."""
        before = max((i for i, s in enumerate(earlier) if s.finite), default=None)
        if before is None:
            last = self.before.weights
        elif self.last and self.last[0] == before:
            last = self.last[1]
        else:
            try:
                last = checkpoints[before].read(self.matrix).to(self.device)
            except CheckpointError:  # gone since it was measured: a run may keep its last checkpoints only
                return None
        return Update(Base(last, self.settings), tuned).norm

    def _energies(self, update: Update, steps: list[Step]) -> Iterator[tuple[str, Value, tuple[float, float] | None]]:
        """Variant, value and null of the energy inside the channels of earlier steps; the last of `steps` is the update's."""
        k, reason = self.before.cut(self.settings.top_k)
        lengths = _lengths(steps)
        for other, index in (("first", 0), ("previous", len(steps) - 2)):
            for side in subspace_similarity.SIDES:
                name = subspace_similarity.name(other, side, self.settings.top_k)
                if len(steps) < 2:
                    yield name, undefined("there is no earlier checkpoint"), None
                    continue
                if not steps[index].finite:
                    yield (
                        name,
                        Value(None, status="skipped", reason="non-finite entries in the earlier checkpoint"),
                        None,
                    )
                    continue
                value, chance = channel_energy.share(update, steps[index].spectrum, k, side, reason), None
                earlier, now = lengths[index], lengths[-1]
                if self.settings.nulls and value.value is not None and earlier is not None and now is not None:
                    angle = subspace_similarity.walk_angle(earlier, now)
                    rows, cols = self.before.shape
                    own = _own_energy(rows, cols, k)
                    chance = channel_energy.null(own, k / (cols if side == "right" else rows), angle)
                yield name, value, chance


@lru_cache(maxsize=256)
def _own_energy(rows: int, cols: int, k: int) -> tuple[float, float]:
    """Share of a Gaussian matrix's energy in its own top k."""
    rng = np.random.default_rng(nulls.seed("own", rows, cols, k))
    return mean_std((nulls.top_singular_values(rows, cols, 1.0, k, SPECTRA, rng) ** 2).sum(axis=1))


def _lengths(steps: list[Step]) -> list[float | None]:
    """The squared length of the walk at every step: the sum of the increments' squares; None from where one is unknown."""
    lengths: list[float | None] = []
    total: float | None = 0.0
    for step in steps:
        if step.finite:
            total = None if total is None or step.increment is None else total + step.increment**2
        lengths.append(total if step.finite else None)
    return lengths


def _factor(before: Base, cache: SpectrumCache, device: str) -> None:
    """Take W₀'s spectrum from the cache, or compute and keep it."""
    path = cache.path(before.weights, before.factored_rank)
    known = cache.load(path, device)
    if known is not None:
        before.spectrum = known
    else:
        cache.save(path, before.spectrum)


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


def _similarities(
    matrix: Matrix, checkpoints: list[Checkpoint], settings: Settings, steps: list[Step]
) -> Iterator[dict[str, Any]]:
    ranks, lengths = subspace_similarity.ranks(settings), _lengths(steps)
    largest = max(1, min(matrix.rows, matrix.cols) // 2)
    table = nulls.pair_similarity(matrix.rows, matrix.cols, tuple(sorted({min(k, largest) for k in ranks})))
    for index, checkpoint in enumerate(checkpoints):
        for kind, other in (("final", len(checkpoints) - 1), ("previous", index - 1)):
            chances: dict[tuple[str, int], tuple[float, float]] = {}
            problem = None
            if other < 0:
                problem = undefined("there is no earlier checkpoint")
            elif not (steps[index].finite and steps[other].finite):
                problem = Value(None, status="skipped", reason="non-finite entries in one of the two checkpoints")
            elif settings.nulls and steps[index].spectrum and steps[other].spectrum:
                ends = lengths[min(index, other)], lengths[max(index, other)]
                if ends[0] is not None and ends[1] is not None:
                    chances = table(subspace_similarity.walk_angle(ends[0], ends[1]))
            for side in subspace_similarity.SIDES:
                for asked in ranks:
                    k = min(asked, largest)
                    reason = None if k == asked else f"rank {asked} cut to {k}: half the smaller side"
                    value = problem or subspace_similarity.similarity(
                        steps[index].spectrum, steps[other].spectrum, k, side, reason
                    )
                    null = chances.get((side, k)) if value.value is not None else None
                    name = subspace_similarity.name(kind, side, asked)
                    yield _row(checkpoint, matrix, "subspace_similarity", name, value, null)


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

"""`compare` and `track`: pair, have an engine measure what is not known yet, collect the tables."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from operator import methodcaller
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints import Checkpoint, Matrix, Pairing, open_checkpoint, pair, run_checkpoints
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from opdgeo.survey import engines
from opdgeo.survey.cache import SpectrumCache
from opdgeo.survey.kinship import remarks
from opdgeo.survey.measure import Job, Measured, outdated
from opdgeo.survey.memory import peak_memory
from opdgeo.survey.output import check_earlier, check_folder
from opdgeo.survey.parts import Parts
from opdgeo.survey.plan import describe, plan, refuse_what_cannot_fit
from opdgeo.survey.results import Result, frames, summarise

if TYPE_CHECKING:
    from opdgeo.survey.follow import Seen


def compare(
    base: str | Path, tuned: str | Path, *, roles: str = "all", settings: Settings | None = None,
    engine: str = "local", ray_address: str | None = None, workers: int | None = None, device: str = "cpu",
    cache: bool = True, progress: bool = False, out: Path | None = None, overwrite: bool = True,
) -> Result:  # fmt: skip
    """Measure one update.

    Args:
        base, tuned: checkpoints before and after training, in any format of docs/formats.md; `tuned` may be a PEFT adapter of
            `base`, and is then measured from its factors.
        roles: which matrices: "all", "attention", "mlp" or role names, comma-separated.
        settings: ranks, masks, tolerance and nulls; the defaults are the paper's.
        engine: "local", threads of this process, or "ray", tasks of a Ray cluster, whose nodes see the same paths.
        ray_address: the cluster; default `$RAY_ADDRESS`, else one on this machine.
        workers: matrices measured at a time; default one per CPU core.
        device: "cpu" or "cuda".
        cache: read and keep the base's factors on disk (`SpectrumCache`).
        progress: show a progress bar on standard error.
        out: a results folder whose earlier work is gone on from: finished matrices are kept there until `Result.save`
            completes it, and of a complete one only what reads a changed setting is measured again.
        overwrite: whether `out` may hold the result of another update, which `Result.save` then replaces.

    Raises:
        CheckpointError, PairingError, ConfigError: the request cannot be met.
    """
    before = open_checkpoint(base)
    return _survey(
        before, [open_checkpoint(tuned, before)], roles, settings, engine, ray_address, workers, device, cache, progress, out,
        overwrite, trajectory=False,
    )  # fmt: skip


def track(
    base: str | Path, checkpoints: str | Path | Sequence[str | Path], *, roles: str = "all", settings: Settings | None = None,
    engine: str = "local", ray_address: str | None = None, workers: int | None = None, device: str = "cpu",
    cache: bool = True, progress: bool = False, out: Path | None = None, overwrite: bool = True,
) -> Result:  # fmt: skip
    """Measure a trajectory: every checkpoint against `base`, and the similarity of their update subspaces.

    `checkpoints` is a run folder with step-* or checkpoint-* folders, or a list of checkpoints in step order. The other
    arguments and errors are those of `compare`.
    """
    before = open_checkpoint(base)
    opened = run_checkpoints([checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints), before)
    return _survey(
        before, opened, roles, settings, engine, ray_address, workers, device, cache, progress, out, overwrite,
        trajectory=True,
    )  # fmt: skip


def _survey(
    base: Checkpoint, checkpoints: list[Checkpoint], roles: str, settings: Settings | None, engine: str,
    ray_address: str | None, workers: int | None, device: str, cache: bool, progress: bool, out: Path | None,
    overwrite: bool = True, *, trajectory: bool, seen: Seen | None = None,
) -> Result:  # fmt: skip
    """`seen`: a run that is still growing, whose steps are kept one by one instead of matrices."""
    started, clock = datetime.now(UTC), time.perf_counter()
    job = Job(base, checkpoints, settings or Settings(), trajectory, device, SpectrumCache() if cache else None)
    if seen:
        job = replace(job, trail=seen.trail(job))
    _check(engine, ray_address, workers, device)
    pairings = [pair(base, c, roles) for c in checkpoints]
    work = _in_all(pairings)
    if engine == "local":
        refuse_what_cannot_fit(work, [base, *checkpoints], job.settings)
    if out:
        check_folder(out, work, len(checkpoints))
        if not seen:
            check_earlier(out, base, checkpoints, overwrite=overwrite)

    parts = Parts(
        None if seen else out,
        [base, *checkpoints],
        trajectory=trajectory,
        device=device,
        stamps=seen.stamps(job) if seen else None,
    )
    measured: dict[Matrix, Measured] = {}
    reused: Counter[str] = Counter()
    rest: list[tuple[Matrix, Measured | None]] = []
    for m in sorted(work, key=_cost, reverse=True):  # the largest first, so that the workers end together
        known = parts.load(m)
        values, nulls = outdated(known.settings if known else None, job.settings, trajectory)
        if known is not None:
            reused.update(n for n in dict.fromkeys(row["diagnostic"] for row in known.rows) if n not in values)
        if known is None or nulls:
            rest.append((m, known))
        else:
            measured[m] = known
            if m.name in parts.finished:  # its tables go while the new ones are written
                parts.save(m, known)

    runs = engines.ray(job, rest, workers, ray_address) if engine == "ray" else engines.local(job, rest, workers)
    beside = ThreadPoolExecutor(1)
    try:
        manifests = beside.map(seen.manifest if seen else methodcaller("manifest"), [base, *checkpoints])
        with _Bar(progress, sum(_cost(m) for m, _ in rest)) as bar, closing(runs):
            for m, found in runs:
                parts.save(m, found)
                measured[m] = found
                bar.advance(_cost(m))
        of_base, *of_checkpoints = manifests
    finally:
        beside.shutdown(cancel_futures=True)

    order = {c.name: i for i, c in enumerate(checkpoints)}
    rows = sorted((r for m in work for r in measured[m].rows), key=lambda r: order[r["checkpoint"]])
    curves = sorted((r for m in work for r in measured[m].curves), key=lambda r: order[r["checkpoint"]])
    timings: Counter[str] = Counter()
    by_shape: defaultdict[str, float] = defaultdict(float)
    for m in work:
        timings.update(measured[m].seconds)
        by_shape[f"{m.rows}x{m.cols}"] += sum(measured[m].seconds.values())
    tables = frames(rows, curves)
    cores = engines.cpu_cores()
    run = provenance(started, time.perf_counter() - clock, device, cores) | {
        "settings": job.settings.to_json() | {"roles": roles, "engine": engine, "workers": workers or cores},
        "base": of_base,
        "checkpoints": [
            m | {"checkpoint": c.name, "step": c.step} for m, c in zip(of_checkpoints, checkpoints, strict=True)
        ],
        "pairing": _account(pairings) | {"measured": len(work)},
        "timings": dict(timings),
        "seconds_by_shape": dict(by_shape),
        "reused": dict(reused),
        "inputs": parts.inputs,
        "remarks": remarks(base, checkpoints),
    }
    return Result(*tables, summarise(tables[0], job.settings.null), run)


def _check(engine: str, ray_address: str | None, workers: int | None, device: str) -> None:
    """Raises ConfigError for a combination that no machine can serve, or not this one."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"engine is {engine!r}; expected 'local' or 'ray'.")
    if ray_address and engine != "ray":
        raise ConfigError(f"a Ray address, {ray_address!r}, was given without --engine ray. Add it, or leave it out.")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1.")
    if engine == "local" and device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(f"device {device!r} was asked for and torch sees no CUDA GPU. Use --device cpu.")


def plan_text(
    base: str | Path, checkpoints: Sequence[str | Path], *, trajectory: bool, roles: str = "all",
    settings: Settings | None = None, workers: int | None = None,
) -> str:  # fmt: skip
    """What `compare` or `track` would measure, in how much time and memory on this machine: from headers, nothing is read.

    Raises:
        CheckpointError, PairingError, ConfigError: the request cannot be met.
    """
    settings, workers = settings or Settings(), workers or engines.cpu_cores()
    before = open_checkpoint(base)
    after = (
        run_checkpoints(list(checkpoints), before) if trajectory else [open_checkpoint(c, before) for c in checkpoints]
    )
    pairings = [pair(before, c, roles) for c in after]
    work = _in_all(pairings)
    refuse_what_cannot_fit(work, [before, *after], settings)
    text = describe(plan(work, [before, *after], settings, workers), pairings[0], len(after), workers)
    notes = [*remarks(before, after), *(note for c in (before, *after) for note in c.notes)]
    return "\n".join([text, *dict.fromkeys(f"note: {note}" for note in notes)])


def provenance(started: datetime, seconds: float, device: str, cores: int) -> dict[str, Any]:
    """What `run.json` says of the program, the machine and the run as a whole."""
    packages = ("torch", "numpy", "polars", "safetensors")
    return {
        "opdgeo": version("opdgeo"),
        "command": ["opdgeo" if sys.argv[0].endswith("__main__.py") else Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": started.isoformat(timespec="seconds"),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "platform": f"{platform.platform()}, {cores} cores",
        "device": device,
    }


def _in_all(pairings: list[Pairing]) -> list[Matrix]:
    """The matrices that every checkpoint of a trajectory has."""
    common = set.intersection(*(set(p.matrices) for p in pairings))
    return [m for m in pairings[0].matrices if m in common]


def _account(pairings: list[Pairing]) -> dict[str, Any]:
    """What was not measured, over all checkpoints of a trajectory."""
    accounts = [p.to_json() for p in pairings]
    lists = ("base_only", "tuned_only", "tied", "unrecognised")
    return accounts[0] | {key: sorted({name for a in accounts for name in a[key]}) for key in lists}


def _cost(matrix: Matrix) -> float:
    """Proportional to the flops of a factorisation."""
    return float(matrix.rows * matrix.cols * min(matrix.rows, matrix.cols))


class _Bar:
    """A progress bar with the time left, or nothing."""

    def __init__(self, shown: bool, total: float):
        self.shown, self.total = shown, total

    def __enter__(self) -> _Bar:
        if self.shown:
            from rich import progress
            from rich.console import Console

            columns = (
                progress.TextColumn("measuring"), progress.BarColumn(), progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
            )  # fmt: skip
            self.bar = progress.Progress(*columns, console=Console(stderr=True))
            self.bar.start()
            self.task = self.bar.add_task("measuring", total=self.total)
        return self

    def advance(self, cost: float) -> None:
        if self.shown:
            self.bar.advance(self.task, cost)

    def __exit__(self, *exception: object) -> None:
        if self.shown:
            self.bar.stop()

"""`compare` and `track`: pair, loop over the matrices on a pool of threads, collect the tables."""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints import Checkpoint, Matrix, Pairing, open_checkpoint, pair, run_checkpoints
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from opdgeo.survey.memory import Memory, available_memory, working_set
from opdgeo.survey.results import Result, frames, summarise

if TYPE_CHECKING:
    from opdgeo.survey.measure import Measured


def compare(
    base: str | Path, tuned: str | Path, *, roles: str = "all", settings: Settings | None = None,
    workers: int | None = None, device: str = "cpu", cache: bool = True, progress: bool = False,
    out: Path | None = None,
) -> Result:  # fmt: skip
    """Measure one update.

    Args:
        base, tuned: Hugging Face folders or safetensors files, before and after training; `tuned` may be a PEFT adapter
            of `base`, and is then measured from its factors.
        roles: which matrices: "all", "attention", "mlp" or role names, comma-separated.
        settings: ranks, masks, tolerance and nulls; the defaults are the paper's.
        workers: matrices measured at a time; default one per CPU core.
        device: "cpu" or "cuda".
        cache: read and keep the base's factors on disk (`SpectrumCache`).
        progress: show a progress bar on standard error.
        out: a folder where finished matrices are kept until `Result.save` completes it: a killed run goes on from them.

    Raises:
        CheckpointError, PairingError, ConfigError: the request cannot be met.
    """
    before = open_checkpoint(base)
    return _survey(
        before,
        [open_checkpoint(tuned, before)],
        roles,
        settings,
        workers,
        device,
        cache,
        progress,
        out,
        trajectory=False,
    )


def track(
    base: str | Path, checkpoints: str | Path | Sequence[str | Path], *, roles: str = "all", settings: Settings | None = None,
    workers: int | None = None, device: str = "cpu", cache: bool = True, progress: bool = False,
    out: Path | None = None,
) -> Result:  # fmt: skip
    """Measure a trajectory: every checkpoint against `base`, and the similarity of their update subspaces.

    `checkpoints` is a run folder with step-* or checkpoint-* folders, or a list of checkpoints in step order. The other
    arguments and errors are those of `compare`.
    """
    before = open_checkpoint(base)
    opened = run_checkpoints([checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints), before)
    return _survey(before, opened, roles, settings, workers, device, cache, progress, out, trajectory=True)


def _survey(
    base: Checkpoint, checkpoints: list[Checkpoint], roles: str, settings: Settings | None,
    workers: int | None, device: str, cache: bool, progress: bool, out: Path | None,
    *, trajectory: bool,
) -> Result:  # fmt: skip
    import torch

    from opdgeo.numerics import lapack
    from opdgeo.survey.cache import SpectrumCache
    from opdgeo.survey.measure import measure
    from opdgeo.survey.parts import Parts
    from opdgeo.survey.plan import refuse_what_cannot_fit

    started, clock = datetime.now(UTC), time.perf_counter()
    settings = settings or Settings()
    cores = cpu_cores()
    workers = workers or cores
    if workers < 1:
        raise ConfigError(f"workers is {workers}; expected at least 1.")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device {device!r} was asked for and torch sees no CUDA GPU. Use --device cpu.")
    pairings = [pair(base, c, roles) for c in checkpoints]
    work = _in_all(pairings)
    refuse_what_cannot_fit(work, [base, *checkpoints], settings)

    with _Bar(progress, sum(_cost(m) for m in work) * len(checkpoints)) as bar:
        # One BLAS thread a worker: LAPACK runs outside the interpreter lock, threads that wait for a busy core cost more
        # than they bring, and the result does not depend on the number of workers.
        before = torch.get_num_threads()
        workers = min(workers, len(work))
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(workers)
        limits = lapack.threads(1)
        memory, kept = Memory(available_memory() * 8 // 10), SpectrumCache() if cache else None

        parts = Parts(out, [base, *checkpoints], settings, trajectory=trajectory, device=device)

        def task(m: Matrix) -> Measured:
            if (finished := parts.load(m)) is not None:
                bar.advance(_cost(m) * len(checkpoints))
                return finished
            with memory.room_for(working_set(m, [base, *checkpoints], settings)):
                measured = measure(
                    m, base, checkpoints, settings,
                    trajectory=trajectory, device=device, cache=kept, done=partial(bar.advance, _cost(m)),
                )  # fmt: skip
            parts.save(m, measured)
            return measured

        try:
            # The largest first, so that the workers end together.
            jobs = {m.name: pool.submit(task, m) for m in sorted(work, key=_cost, reverse=True)}
            manifests = list(pool.map(lambda c: c.manifest(), [base, *checkpoints]))
            measured = [jobs[m.name].result() for m in work]
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)
            limits.restore_original_limits()

    order = {c.name: i for i, c in enumerate(checkpoints)}
    rows = sorted((r for m in measured for r in m.rows), key=lambda r: order[r["checkpoint"]])
    curves = sorted((r for m in measured for r in m.curves), key=lambda r: order[r["checkpoint"]])
    timings: Counter[str] = Counter()
    for m in measured:
        timings.update(m.seconds)
    tables = frames(rows, curves)
    run = provenance(started, time.perf_counter() - clock, device, cores) | {
        "settings": settings.to_json() | {"roles": roles, "workers": workers},
        "base": manifests[0],
        "checkpoints": [
            m | {"checkpoint": c.name, "step": c.step} for m, c in zip(manifests[1:], checkpoints, strict=True)
        ],
        "pairing": _account(pairings) | {"measured": len(work)},
        "timings": dict(timings),
    }
    return Result(*tables, summarise(tables[0], settings.null), run)


def plan_text(
    base: str | Path, checkpoints: Sequence[str | Path], *, trajectory: bool, roles: str = "all",
    settings: Settings | None = None, workers: int | None = None,
) -> str:  # fmt: skip
    """What `compare` or `track` would measure, in how much time and memory on this machine: from headers, nothing is read.

    Raises:
        CheckpointError, PairingError, ConfigError: the request cannot be met.
    """
    from opdgeo.survey.plan import describe, plan, refuse_what_cannot_fit

    settings, workers = settings or Settings(), workers or cpu_cores()
    before = open_checkpoint(base)
    after = (
        run_checkpoints(list(checkpoints), before) if trajectory else [open_checkpoint(c, before) for c in checkpoints]
    )
    pairings = [pair(before, c, roles) for c in after]
    work = _in_all(pairings)
    refuse_what_cannot_fit(work, [before, *after], settings)
    text = describe(plan(work, [before, *after], settings, workers), pairings[0], len(after), workers)
    return "\n".join([text, *dict.fromkeys(f"note: {note}" for c in after for note in c.notes)])


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def peak_memory() -> int:
    """Peak resident set of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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

"""`compare`, `track` and `relate`: pair, have an engine measure what is not known yet, collect the tables."""

from __future__ import annotations

import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Settings
from opdgeo.errors import CheckpointError
from opdgeo.machine import version
from opdgeo.survey import engines, fetching, kinship
from opdgeo.survey.cache import SpectrumCache
from opdgeo.survey.measure import Job, Measured, outdated
from opdgeo.survey.memory import peak_memory
from opdgeo.survey.output import check_earlier, check_folder
from opdgeo.survey.parts import Parts, require_unchanged
from opdgeo.survey.plan import describe, plan, refuse_what_cannot_fit
from opdgeo.survey.progress import Measuring, cost
from opdgeo.survey.request import Execution, Request
from opdgeo.survey.results import Result
from opdgeo.survey.tables import Tables
from opdgeo.survey.trail import Trail


def compare(
    base: str | Path,
    tuned: str | Path,
    *,
    roles: str = "all",
    settings: Settings | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    cache: bool = True,
    progress: bool = False,
    out: Path | None = None,
    overwrite: bool = True,
) -> Result:
    """Measure one update.

    Args:
        base: the checkpoint before training, in any format of docs/formats.md.
        tuned: the checkpoint after it, or a PEFT adapter of `base`, which is then measured from its factors.
        roles: which matrices: "all", "attention", "mlp" or role names, comma-separated.
        settings: ranks, masks, tolerance and nulls; the defaults are the paper's.
        engine: "local", threads of this process, or "ray", tasks of a Ray cluster, whose nodes see the same paths.
        ray_address: the cluster; default `$RAY_ADDRESS`, else one on this machine.
        workers: matrices measured at a time; default one per CPU core, or one per GPU.
        device: "cpu", "cuda" for every visible GPU, or one of them, such as "cuda:1".
        cache: read and keep the base's factors on disk (`SpectrumCache`).
        progress: show a progress bar on standard error.
        out: a results folder whose earlier work is gone on from: finished matrices are kept there until `Result.save`
            completes it, and of a complete one only what reads a changed setting is measured again.
        overwrite: whether `out` may hold the result of another update, which `Result.save` then replaces.

    Raises:
        CheckpointError, PairingError, ConfigError: the request cannot be met.
    """
    request = Request.of_update(base, tuned, roles=roles, settings=settings)
    return survey(request, Execution(engine, ray_address, workers, device, cache, progress, out, overwrite))


def track(
    base: str | Path,
    checkpoints: str | Path | Sequence[str | Path],
    *,
    roles: str = "all",
    settings: Settings | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    cache: bool = True,
    progress: bool = False,
    out: Path | None = None,
    overwrite: bool = True,
) -> Result:
    """Measure a trajectory: every checkpoint against `base`, and the similarity of their update subspaces.

    `checkpoints` is a run folder with step-* or checkpoint-* folders, or a list of checkpoints in step order. The other
    arguments and errors are those of `compare`.
    """
    request = Request.of_run(base, checkpoints, roles=roles, settings=settings)
    return survey(request, Execution(engine, ray_address, workers, device, cache, progress, out, overwrite))


def relate(
    base: str | Path,
    *updates: str | Path,
    roles: str = "all",
    settings: Settings | None = None,
    engine: str = "local",
    ray_address: str | None = None,
    workers: int | None = None,
    device: str = "cpu",
    cache: bool = True,
    progress: bool = False,
    out: Path | None = None,
    overwrite: bool = True,
) -> Result:
    """Measure how alike two or more updates of one base are: every pair of them, matrix by matrix.

    `updates` are checkpoints after training, or PEFT adapters of `base`, which are then compared in their factors. The other
    arguments and errors are those of `compare`; `settings` count by `top_k`, `eta` and `nulls` (0: no nulls).
    """
    request = Request.of_pairs(base, updates, roles=roles, settings=settings)
    return survey(request, Execution(engine, ray_address, workers, device, cache, progress, out, overwrite))


class Source(Protocol):
    """What a survey remembers of its checkpoints between two runs. A run that is still growing is another source (`follow`)."""

    @property
    def deletes(self) -> bool:
        """Whether a checkpoint may be gone once it was measured."""

    def check_earlier(self, request: Request, execution: Execution) -> None:
        """Raises ConfigError where the results folder holds what may not be replaced."""

    def parts(self, request: Request, execution: Execution) -> Parts:
        """The finished matrices of earlier runs."""

    def trail(self, request: Request, execution: Execution) -> Trail | None:
        """The finished checkpoints of a run that is growing."""

    def manifest(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """What run.json says of a checkpoint."""


@dataclass(frozen=True)
class Finished:
    """Checkpoints that lie there whole."""

    deletes: bool = False

    def check_earlier(self, request: Request, execution: Execution) -> None:
        if execution.out:
            check_earlier(
                execution.out,
                request.base,
                request.checkpoints,
                overwrite=execution.overwrite,
                pairs=request.pairs,
            )

    def parts(self, request: Request, execution: Execution) -> Parts:
        return Parts(
            execution.out,
            request.every,
            trajectory=request.trajectory,
            device=execution.device,
            pairs=request.pairs,
        )

    def trail(self, request: Request, execution: Execution) -> Trail | None:
        return None

    def manifest(self, checkpoint: Checkpoint) -> dict[str, Any]:
        return checkpoint.manifest()


def survey(request: Request, execution: Execution, source: Source | None = None) -> Result:
    """Measure `request`: what an earlier run knows is taken over, the rest goes to the engine.

    Raises:
        PairingError, ConfigError: the request cannot be met. CheckpointError: a file changed or went while it was read.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    source = source or Finished()
    execution.check()
    work, settings = request.work, request.settings
    if execution.engine == "local":
        refuse_what_cannot_fit(work, request.every, settings, device=execution.device, pairs=request.pairs)
    if execution.out:
        check_folder(execution.out, work, request.subjects)
    source.check_earlier(request, execution)
    job = Job(
        request.base,
        list(request.checkpoints),
        settings,
        request.trajectory,
        execution.device,
        SpectrumCache() if execution.cache else None,
        source.trail(request, execution),
        request.pairs,
    )
    parts = source.parts(request, execution)
    reused: Counter[str] = Counter()
    rest: list[tuple[Matrix, Measured | None]] = []
    for m in sorted(work, key=cost, reverse=True):  # the largest first, so that the workers end together
        known = parts.load(m)
        values, nulls = outdated(known.settings if known else None, settings, job.rows)
        if known is not None:
            reused.update(n for n in dict.fromkeys(row["diagnostic"] for row in known.rows) if n not in values)
        if known is None or nulls:
            rest.append((m, known))
        elif m.name in parts.finished:  # its tables go while the new ones are written
            parts.save(m, known)

    fetching.fetch(request.every, [m for m, _ in rest], progress=execution.progress, before=execution.before_fetching)
    runs = engines.ENGINES[execution.engine](job, rest, execution)
    beside = ThreadPoolExecutor(1)
    try:
        manifests = parts.manifests or beside.map(source.manifest, request.every)
        at_a_time = engines.workers(execution)
        with Measuring(execution.progress, [m for m, _ in rest], at_a_time) as bar, closing(runs):
            for m, found in runs:
                parts.save(m, found)
                bar.advance(m)
        of_base, *of_checkpoints = manifests
    finally:
        beside.shutdown(cancel_futures=True)
    require_unchanged(request.every, parts.stamps, gone=source.deletes)

    tables = Tables([c.name for c in request.checkpoints], parts.folder, len(work), pairs=request.pairs)
    timings: Counter[str] = Counter()
    by_shape: defaultdict[str, float] = defaultdict(float)
    for m in work:
        one = parts.load(m)
        if one is None:
            raise CheckpointError(f"what was measured of {m.name} is gone from {parts.folder}. Give the command again.")
        tables.add(one.rows, one.curves)
        timings.update(one.seconds)
        by_shape[f"{m.rows}x{m.cols}"] += sum(one.seconds.values())
    cores = engines.cpu_cores()
    asked = {"roles": request.roles, "engine": execution.engine, "workers": engines.workers(execution)}
    run = provenance(started, time.perf_counter() - clock, execution.device, cores) | {
        "settings": settings.to_json() | asked,
        "base": of_base,
        "checkpoints": [
            m | {"checkpoint": c.name, "step": c.step} for m, c in zip(of_checkpoints, request.checkpoints, strict=True)
        ],
        "pairing": request.account(),
        "timings": dict(timings),
        "seconds_by_shape": dict(by_shape),
        "reused": dict(reused),
        "earlier": parts.earlier if reused else [],
        "inputs": parts.inputs,
        "remarks": kinship.known(request),
    }
    if request.pairs:
        run["pairs"] = len(request.checkpoints) * (len(request.checkpoints) - 1) // 2
    result = tables.result(settings.null, run)
    result.run["remarks"][:0] = kinship.measured(result.summary)
    return result


def plan_text(request: Request, workers: int | None = None) -> str:
    """What a survey would measure, in how much time and memory on this machine: from headers, no weight is read.

    Raises:
        PairingError, ConfigError: the request cannot be met.
    """
    workers = workers or engines.cpu_cores()
    refuse_what_cannot_fit(request.work, request.every, request.settings, pairs=request.pairs)
    planned = plan(request.work, request.every, request.settings, workers, pairs=request.pairs)
    text = describe(planned, request.pairings[0], len(request.checkpoints), workers)
    for line in fetching.account(request.every, request.work):
        text += f"\nto fetch: {line}"
    notes = [*kinship.known(request), *(note for c in request.every for note in c.notes)]
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

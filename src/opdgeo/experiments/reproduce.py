"""The study: models and anchors → arms → trajectories and pairs of updates → claims → page, for every seed.

A seed is an independent repetition from the shared base: its own anchor, prompts and sampling. The SFT arm is the anchor's own
training, base → anchor, as in the paper. Runs go one to a process, each as soon as what it starts from is there, the longest way
to the end first, as many at a time as there are cores (at most two by default): with a third on two cores the whole takes longer.
Arms share the anchor and what was measured of it; every finished model, arm and measurement is kept, so the same command goes on
after an interruption.
"""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import connection
from pathlib import Path
from typing import Any

import polars as pl

from opdgeo.errors import ConfigError
from opdgeo.experiments import noise, regime, related
from opdgeo.experiments import study as arms_of
from opdgeo.experiments.claims import judge, missing, outcomes
from opdgeo.experiments.distances import at_the_end, from_null
from opdgeo.experiments.presets import make_teacher
from opdgeo.experiments.reduced import reduced
from opdgeo.experiments.rules import EXPLORATORY, OPD, SFT, VERSION
from opdgeo.experiments.study import BY_NAME, Arm
from opdgeo.files import write_atomically
from opdgeo.machine import keep_freed_memory
from opdgeo.survey.engines import cpu_cores
from opdgeo.survey.memory import peak_memory
from opdgeo.survey.results import Result, load_result, summarise, write_json
from opdgeo.survey.run import provenance
from opdgeo.training.config import TrainConfig

GEOMETRY = "geometry"  # ARM/geometry/: the arm's own data files


@dataclass(frozen=True)
class Job:
    """One run of an arm, what is measured of it (`measures`), how alike the updates of several are (`relates`), or the making of a
    model (no `config`)."""

    name: str
    """The folder below arms/, models/, or of pairs in the study's own."""
    arm: Arm | None = None
    seed: int = 0
    config: TrainConfig | None = None
    needs: tuple[str, ...] = ()
    measures: bool = False
    relates: tuple[str, ...] = ()
    """Checkpoints below arms/, all from the origin of `config`."""
    cost: int = 5000
    """Sequences that it trains on; a rollout costs twice a demonstration."""


def reproduce(
    preset: str,
    out: Path,
    *,
    seeds: int = 1,
    first_seed: int = 0,
    workers: int | None = None,
    study: str = "small",
    rehearse: bool = False,
) -> dict[str, Any]:
    """Run (or finish) the study in the folder `out` and return the content of `claims.json`.

    `rehearse` gives every arm a few steps and prompts: whether the whole study runs, not what it finds.

    Raises:
        ConfigError: unknown preset or study, a preset without all four arms, a folder made with other settings, or one that
            another process works in.
    """
    if seeds < 1 or first_seed < 0:
        raise ConfigError(f"seeds is {seeds} and the first one {first_seed}; expected at least 1 of them, from 0 on.")
    arms = arms_of.chosen(study, preset)
    all_seeds = range(first_seed, first_seed + seeds)
    jobs = plan(arms, all_seeds, preset, out, rehearse=rehearse)
    from opdgeo.report import write_report
    from opdgeo.training.callbacks import read_log

    started, clock = datetime.now(UTC), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    workers = workers or min(2, cpu_cores())
    for teacher in {job.config.teacher: job.config for job in jobs if job.config}.values():
        make_teacher(teacher, progress=sys.stderr.isatty())
    with _alone(out):
        peak = _run_all(out, jobs, workers, preset, rehearse)
        names = [arms_of.folder(arm.name, seed) for arm in arms for seed in all_seeds[: arm.seeds]]
        tracked = [n for n in names if BY_NAME[n.partition("-seed")[0]].tracked]
        results = {name: load_result(out / "arms" / name / GEOMETRY) for name in tracked}
        measurements = pl.concat([_named(r.measurements, name) for name, r in results.items()])
        curves = pl.concat([_named(r.curves, name) for name, r in results.items()])
        first = next(iter(results.values())).run["settings"]
        run = provenance(started, time.perf_counter() - clock, "cpu", cpu_cores()) | {
            "peak_memory_bytes": peak_memory() + peak * workers,
            "settings": {
                "preset": preset,
                "study": study,
                "seeds": seeds,
                "first_seed": first_seed,
                "rehearsal": rehearse,
            }
            | first,
            "arms": {
                n: {k: r.run[k] for k in ("base", "checkpoints", "pairing", "timings")} for n, r in results.items()
            },
            "timings": {
                part: sum(r.run["timings"].get(part, 0.0) for r in results.values())
                for part in ("read", "factor", "measure", "nulls")
            },
        }
        result = Result(measurements, curves, summarise(measurements, first["null"]), run)
        pairs = pl.concat(
            [pl.DataFrame(schema=related.COLUMNS)]
            + [related.rows(load_result(out / job.name), job.needs) for job in jobs if job.relates]
        )
        # An earlier study's verdicts must not stand beside this one's data.
        (out / "claims.json").unlink(missing_ok=True)
        result.save(out)
        write_atomically(out / related.TABLE, lambda path: pairs.write_parquet(path))
        logs = {name: read_log(out / "arms" / name) for name in names}
        claims = {
            "preset": preset,
            "study": study,
            "rehearsal": rehearse,
            "seeds": list(all_seeds),
            "protocol": {
                "version": VERSION,
                "rules": regime.rules_hash(),
                "exploratory": [seed for seed in all_seeds if seed in EXPLORATORY],
            },
            "outcomes": outcomes(logs),
            "claims": judge(measurements, logs),
            "from_null": at_the_end(from_null(reduced(measurements)).to_dicts()),
            "left_out": missing(measurements, logs),
            "related": related.over_seeds(pairs),
            "noise": noise.beside(
                measurements, {j.arm.name: j.config for j in jobs if j.arm and j.config}, names, preset
            ),
        }
        write_json(out / "claims.json", claims)
        write_report(out)
        return claims


def plan(arms: list[Arm], seeds: range, preset: str, out: Path, *, rehearse: bool = False) -> list[Job]:
    """Every run, and every model that one of them needs. Nothing is written."""
    jobs, models = [], set()
    for arm in arms:
        needs = arms_of.needs(arm)
        models |= {name for name in needs if name not in BY_NAME}
        for seed in seeds[: arm.seeds]:
            before = [arms_of.folder(n, seed) if n in BY_NAME else n for n in sorted(needs)]
            if arm.where is not None:  # the channel's K comes from OPD's stable rank
                before.append(f"{arms_of.folder(OPD, seed)}/{GEOMETRY}")
            name = arms_of.folder(arm.name, seed)
            config = arms_of.configure(arm, seed, preset, out, rehearse=rehearse)
            cost = config.steps * config.sequences_per_step * (1 if config.rollouts == "demonstrations" else 2)
            jobs.append(Job(name, arm, seed, config, tuple(before), cost=cost))
            if arm.tracked:
                jobs.append(Job(f"{name}/{GEOMETRY}", arm, seed, config, (name,), measures=True, cost=cost // 5))
    return [*(Job(name) for name in sorted(models)), *jobs, *_pairs({job.name: job for job in jobs}, seeds)]


def _pairs(runs: dict[str, Job], seeds: range) -> Iterator[Job]:
    """Whose last updates are related: of each seed the arms from its anchor, and over the seeds SFT, whose base they share."""
    groups = {f"related/seed{seed}": [arms_of.folder(arm, seed) for arm in related.ARMS] for seed in seeds}
    groups[f"related/{SFT}"] = [arms_of.folder(SFT, seed) for seed in seeds]
    for name, folders in groups.items():
        known = {f: config for f in folders if f in runs and (config := runs[f].config)}
        if len(known) > 1:
            last = tuple(f"{f}/step-{config.steps:06d}" for f, config in known.items())
            yield Job(name, config=next(iter(known.values())), needs=tuple(known), relates=last, cost=1000)


def _named(table: pl.DataFrame, arm: str) -> pl.DataFrame:
    return table.with_columns(pl.lit(arm).add("/").add(pl.col("checkpoint")).alias("checkpoint"))


def _run_all(out: Path, jobs: list[Job], workers: int, preset: str, rehearse: bool) -> int:
    """Do every job as soon as what it needs is there, those with the longest way to the end first.

    Returns the peak memory of the largest worker in bytes, 0 where nothing was left to do.
    """
    after: dict[str, list[Job]] = {job.name: [] for job in jobs}
    for job in jobs:
        for name in job.needs:
            after[name].append(job)

    @functools.cache
    def way(name: str) -> int:
        return costs[name] + max((way(job.name) for job in after[name]), default=0)

    costs = {job.name: job.cost for job in jobs}
    finished = {job.name for job in jobs if _done(job, out)}
    waiting = sorted((job for job in jobs if job.name not in finished), key=lambda job: -way(job.name))
    peak = 0
    if not waiting:
        return peak
    # By what a run needs and not by what else runs, so that a study that is killed goes on to the same weights.
    each, first = (max(1, cpu_cores() // n) for n in (workers, sum(not job.needs for job in jobs)))
    with _pool(workers) as pool:
        running: dict[Future[int], Job] = {}
        with _progress(out, jobs) as show:
            while waiting or running:
                for job in [j for j in waiting if finished.issuperset(j.needs)][: workers - len(running)]:
                    threads = each if job.needs else max(each, first)  # an anchor alone has all cores
                    running[pool.submit(_do, job, preset, out, rehearse, threads)] = job
                    waiting.remove(job)
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    job = running.pop(future)
                    try:
                        peak = max(peak, future.result())
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    finished.add(job.name)
                show(list(running.values()), finished)
    return peak


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the folder: two processes that train the same arm would mix their files. The lock goes with its process."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(out / ".lock", timeout=0):
            yield
    except Timeout:
        raise ConfigError(
            f"another opdgeo reproduce works in {out}; expected one at a time. Wait, or use another -o."
        ) from None


# What every run imports, in seconds of processor time: where a process can be forked, once for all workers.
PRELOADED = ["opdgeo.survey", "opdgeo.training.train", "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer"]


def _pool(workers: int) -> ProcessPoolExecutor:
    """Processes that end when this one does."""
    context: Any
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
    else:  # elsewhere a process that has loaded torch may not be forked
        context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker(threads: int | None = None) -> None:
    import torch

    gc.freeze()  # every run collects garbage: 0.2 s over the objects of the libraries
    if threads:
        torch.set_num_threads(threads)
    keep_freed_memory()
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A worker whose study was killed would train on, beside the study that takes its arm up again."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _done(job: Job, out: Path) -> bool:
    from opdgeo.training.train import finished

    if job.relates:
        return related.holds(out / job.name, [out / "arms" / name for name in job.relates])
    if job.arm is None or job.config is None:
        return (out / "models" / job.name).is_dir()
    folder = out / "arms" / job.name
    return (folder / "run.json").is_file() if job.measures else finished(job.config, folder)


def _do(job: Job, preset: str, out: Path, rehearse: bool, threads: int) -> int:
    """Make a model, train an arm, measure its trajectory or relate its update to others, on `threads` of BLAS; whatever is there already is kept.

    Returns the peak memory of this process in bytes.
    """
    import torch

    from opdgeo.diagnostics import Settings
    from opdgeo.experiments import derived
    from opdgeo.survey import track
    from opdgeo.training import models
    from opdgeo.training.train import quiet, train

    torch.set_num_threads(threads)
    if job.relates and job.config:
        updates = [out / "arms" / name for name in job.relates]
        related.relate_arms(models.resolve(job.config.origin), updates, out / job.name, rehearse=rehearse)
        return peak_memory()
    if job.arm is None or job.config is None:
        with quiet():
            derived.build(job.name, out / "models" / job.name, scale=0.001 if rehearse else 1.0)
        return peak_memory()
    folder = out / "arms" / job.name
    if job.measures:
        start = models.resolve(job.config.origin)
        few = {"roles": "k_proj", "settings": Settings(nulls=1)} if rehearse else {}
        track(start, folder.parent, workers=1, out=folder, **few).save(folder)  # type: ignore[arg-type]
        return peak_memory()
    if job.arm.where is not None:
        arms_of.make_channel(job.arm, job.seed, preset, out, rehearse=rehearse)
    train(job.config, folder, resume=True, progress=False)
    return peak_memory()


@contextmanager
def _progress(out: Path, jobs: list[Job]) -> Iterator[Any]:
    """Yields ``show(running, finished)``: bars on a terminal, otherwise one line for each finished job."""
    from rich import progress
    from rich.console import Console

    from opdgeo.training.callbacks import read_log

    console = Console(stderr=True)
    bars = progress.Progress(
        progress.TextColumn("{task.description:<24}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
    whole = bars.add_task("runs", total=len(jobs))
    tasks: dict[str, progress.TaskID] = {}
    told: set[str] = set()

    def show(running: list[Job], finished: set[str]) -> None:
        for job in running:
            folder = out / "arms" / job.name
            if job.config is None or not (folder / "log.jsonl").is_file():
                continue
            if job.name not in tasks:
                tasks[job.name] = bars.add_task(job.name, total=job.config.steps)
            steps = [row["step"] for row in read_log(folder) if row["event"] == "step"]
            bars.update(tasks[job.name], completed=max(steps, default=0))
        for name in sorted(finished - told):
            told.add(name)
            if name in tasks:
                bars.remove_task(tasks.pop(name))
            bars.update(whole, completed=len(told))
            if not console.is_terminal:
                print(f"{name}: done ({len(told)} of {len(jobs)})", file=sys.stderr, flush=True)

    with bars:
        yield show

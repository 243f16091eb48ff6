"""The study: anchor → {SFT, matched SFT, OPD, RLVR} → trajectories → claims → page, for every seed.

A seed is an independent repetition from the shared base: its own anchor, prompts and sampling. The SFT arm is the anchor's own
training, base → anchor, as in the paper. Arms are trained one to a process, as many at a time as there are cores (at most
two by default); every finished arm and measurement is kept, so the same command goes on after an interruption.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from opdgeo.errors import ConfigError
from opdgeo.experiments.claims import MATCHED, OPD, PARADIGMS, RLVR, SFT, judge, outcomes
from opdgeo.experiments.presets import make_teacher, train_config
from opdgeo.survey.engines import cpu_cores
from opdgeo.survey.memory import peak_memory
from opdgeo.survey.results import Result, load_result, summarise, write_json
from opdgeo.survey.run import provenance
from opdgeo.training.config import TrainConfig

GEOMETRY = "geometry"  # ARM/geometry/: the arm's own data files
LEFT_OUT = (
    "R2 (scale, code data, MoE teacher)",
    "S1 (training held in the channel)",
    "C1–C3 (token sparsification, teacher rollouts, objective mixing)",
)


def reproduce(preset: str, out: Path, *, seeds: int = 1, workers: int | None = None) -> dict[str, Any]:
    """Run (or finish) the study in the folder `out` and return the content of `claims.json`.

    Raises:
        ConfigError: unknown preset, a preset without all four arms, or a folder made with other settings.
    """
    if seeds < 1:
        raise ConfigError(f"seeds is {seeds}; expected at least 1.")
    anchors = {seed: train_config(SFT, preset, seed=seed) for seed in range(seeds)}
    arms = {
        _folder(arm, seed): train_config(arm, preset, seed=seed, origin=str(_last(out, SFT, seed, anchors[seed])))
        for arm in (RLVR, OPD, MATCHED)  # the longest first
        for seed in range(seeds)
    } | {_folder(SFT, seed): config for seed, config in anchors.items()}
    from opdgeo.report import write_report
    from opdgeo.training.callbacks import read_log

    started, clock = datetime.now(UTC), time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    for config in arms.values():
        make_teacher(config)
    _train_all(out, arms, workers or min(2, cpu_cores()))

    results = {name: load_result(out / "arms" / name / GEOMETRY) for name in sorted(arms, key=_order)}
    measurements = pl.concat([_named(r.measurements, name) for name, r in results.items()])
    curves = pl.concat([_named(r.curves, name) for name, r in results.items()])
    null = next(iter(results.values())).run["settings"]["null"]
    run = provenance(started, time.perf_counter() - clock, "cpu", cpu_cores()) | {
        "peak_memory_bytes": peak_memory() + _children_peak() * (workers or min(2, cpu_cores())),
        "settings": {"preset": preset, "seeds": seeds} | next(iter(results.values())).run["settings"],
        "arms": {n: {k: r.run[k] for k in ("base", "checkpoints", "pairing", "timings")} for n, r in results.items()},
        "timings": {
            part: sum(r.run["timings"].get(part, 0.0) for r in results.values())
            for part in ("read", "factor", "measure", "nulls")
        },
    }
    result = Result(measurements, curves, summarise(measurements, null), run)
    (out / "claims.json").unlink(missing_ok=True)  # an earlier study's verdicts must not stand beside this one's data
    result.save(out)
    claims = {
        "preset": preset,
        "seeds": list(range(seeds)),
        "outcomes": outcomes({name: read_log(out / "arms" / name) for name in results}),
        "claims": judge(measurements),
        "left_out": list(LEFT_OUT),
    }
    write_json(out / "claims.json", claims)
    write_report(out)
    return claims


def _folder(arm: str, seed: int) -> str:
    return arm if seed == 0 else f"{arm}-seed{seed}"


def _order(name: str) -> tuple[int, str]:
    arm, _, seed = name.partition("-seed")
    return PARADIGMS.index(arm), seed


def _last(out: Path, arm: str, seed: int, config: TrainConfig) -> Path:
    return (out / "arms" / _folder(arm, seed) / f"step-{config.steps:06d}").resolve()


def _named(table: pl.DataFrame, arm: str) -> pl.DataFrame:
    return table.with_columns(pl.lit(arm).add("/").add(pl.col("checkpoint")).alias("checkpoint"))


def _children_peak() -> int:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _train_all(out: Path, arms: dict[str, TrainConfig], workers: int) -> None:
    """Train and measure every arm; an arm starts as soon as its seed's anchor is there."""
    waiting = dict(arms)
    threads = max(1, cpu_cores() // workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(threads,)) as pool:
        running: dict[Future[str], str] = {}
        finished: set[str] = set()
        with _progress(out, arms) as show:
            while waiting or running:
                for name, config in list(waiting.items()):
                    anchor = Path(config.origin).parent.name
                    if anchor in finished or anchor not in arms:
                        running[pool.submit(_train_one, config, out / "arms" / name)] = name
                        del waiting[name]
                done, _ = wait(running, timeout=1.0, return_when=FIRST_COMPLETED)
                show(finished)
                for future in done:
                    name = running.pop(future)
                    try:
                        future.result()
                    except BaseException:
                        pool.shutdown(wait=False, cancel_futures=True)
                        raise
                    finished.add(name)
                    show(finished)


def _start_worker(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _train_one(config: TrainConfig, folder: Path) -> str:
    """Train one arm and measure its trajectory; both are kept when they are there already."""
    from opdgeo.survey import track
    from opdgeo.training import models
    from opdgeo.training.run import train

    last = train(config, folder, resume=True, progress=False)
    if not (folder / GEOMETRY / "run.json").is_file():
        track(models.resolve(config.origin), folder, workers=1).save(folder / GEOMETRY)
    return str(last)


@contextmanager
def _progress(out: Path, arms: dict[str, TrainConfig]) -> Iterator[Any]:
    """Yields ``show(finished)``: bars on a terminal, otherwise one line for each finished arm."""
    from rich import progress
    from rich.console import Console

    from opdgeo.training.callbacks import read_log

    console = Console(stderr=True)
    names = sorted(arms, key=_order)
    bars = progress.Progress(
        progress.TextColumn("{task.description:<18}"), progress.BarColumn(), progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(), progress.TimeRemainingColumn(), console=console, disable=not console.is_terminal,
    )  # fmt: skip
    tasks = {name: bars.add_task(name, total=arms[name].steps, start=False) for name in names}
    started: set[str] = set()
    told: set[str] = set()

    def show(finished: set[str]) -> None:
        for name in names:
            log = out / "arms" / name / "log.jsonl"
            if log.is_file():
                if name not in started:
                    bars.start_task(tasks[name])
                    started.add(name)
                steps = [row["step"] for row in read_log(log.parent) if row["event"] == "step"]
                bars.update(tasks[name], completed=max(steps, default=0))
            if name in finished and name not in told:
                told.add(name)
                bars.stop_task(tasks[name])
                if not console.is_terminal:
                    print(f"{name}: trained and measured ({len(told)} of {len(names)})", file=sys.stderr, flush=True)

    with bars:
        yield show

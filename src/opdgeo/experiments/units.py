"""The confirmatory study, unit by unit: all arms of one point of the regime (`regime.py`) and one seed, reduced to one small file.

    python -m opdgeo.experiments.units -o WORK --keep docs/results/units [--workers 2] [--points main,hot] [--first-seed 101] [--seeds 7]
    python -m opdgeo.experiments.units --preset smollm2 -o WORK --keep docs/results/smollm2

Units come in order of worth, one a process and core; what is kept already is not run again, and a killed unit goes on from its
finished arms and the trainer states in WORK. When a unit is finished its numbers (`reduced.py`) stand in KEEP/POINT-seedN.parquet,
with the version and hash of the rules, dates, minutes, machine and the hash of every arm's settings in the file's metadata;
its weights are then deleted. The same file holds, in columns of their own, how alike the arms' last updates are (`related.py`); no verdict
reads that, and the first units were kept without it. Nothing else has to be kept: verdicts come from these files alone
(`python -m opdgeo.experiments.confirmatory docs/results`).

An arm's settings are its `config.json`; their hash leaves out folders, which differ from machine to machine. A seed's anchor is
trained once and shared by the points that run in the same WORK; it is the same computation everywhere.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import platform
import shutil
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
from filelock import FileLock

from opdgeo.errors import ConfigError
from opdgeo.experiments import regime, related, study
from opdgeo.experiments.presets import make_teacher, train_config
from opdgeo.experiments.reduced import reduced, walk
from opdgeo.experiments.regime import EARLY_ANCHOR, LEG_FROM, TINY, Point, Regime
from opdgeo.experiments.reproduce import _start_worker
from opdgeo.experiments.rules import COIN, MATCHED, OPD, SFT
from opdgeo.files import write_atomically
from opdgeo.machine import version
from opdgeo.training.config import TrainConfig

SHORT: dict[str, Any] = {
    "sequences_per_step": 8,
    "micro_batch": 0,
    "eval_prompts": 8,
    "eval_prompts_between": 0,
    "max_tokens": 3,
    "resume_every": 1000,
}
"""What a rehearsal changes, beside the steps: whether a unit runs, not what it finds."""
SHORT_STEPS, SHORT_CHECKPOINTS = 4, (0.5, 1.0)
YOUNGER: dict[str, Any] = {"autocast": False}


def file_of(keep: Path, point: str, seed: int) -> Path:
    return keep / f"{point}-seed{seed}.parquet"


def settings(point: Point, arm: str, seed: int, out: Path, *, of: Regime = TINY, short: bool = False) -> TrainConfig:
    """The training of one arm of a point; `out` is the folder that holds anchors/ and the point's own runs.

    Of S1, the arms `opd`, `sft-matched` and `coin` are the early updates that the channels are taken from.
    """
    steps = SHORT_STEPS if short else point.steps
    shared = dict(of.evaluated) | (SHORT | {"checkpoints": SHORT_CHECKPOINTS} if short else {})
    anchors = out / "anchors"
    if arm == SFT:
        plain = study.configure(study.BY_NAME[SFT], seed, of.preset, anchors)
        return replace(plain, **shared | {"eval_kl_origin": False} | ({"steps": SHORT_STEPS} if short else {}))
    here = out / f"{point.name}-seed{seed}"
    anchor = anchors / "arms" / study.folder(SFT, seed)
    full = train_config(SFT, of.preset).steps
    whole = SHORT_STEPS if short else full
    start = anchor / f"step-{(whole if point.name != regime.S1 else round(EARLY_ANCHOR * whole / full)):06d}"
    changes: dict[str, Any] = {"learning_rate": point.learning_rate, "sequences_per_step": point.sequences} | shared
    if point.name != regime.S1:
        like = study.BY_NAME[arm]
        plain = study.configure(like, seed, of.preset, here)
        if arm not in regime.PLAIN:
            changes["eval_prompts"] = 0
        return replace(plain, origin=str(start.resolve()), **changes | {"steps": round(like.part * steps)})
    taken = max(1, round(LEG_FROM * steps / point.steps))
    changes |= regime.S1_EVALUATED | (SHORT if short else {})
    if not arm.startswith("s1-"):
        plain = study.configure(study.BY_NAME[arm], seed, of.preset, here)
        return replace(plain, origin=str(start.resolve()), **changes | {"steps": taken, "eval_prompts": 0})
    paradigm, what = _s1_parts(arm)
    plain = study.configure(study.BY_NAME[paradigm], seed, of.preset, here)
    early = here / "arms" / study.folder(paradigm, seed) / f"step-{taken:06d}"
    held = (
        {}
        if what == "free"
        else {"channel": str((here / "channels" / f"{arm}.safetensors").resolve()), "constrain": "update"}
    )
    return replace(
        plain, arm=arm, origin=str(early.resolve()), data_seed=1000 + seed, **changes | held | {"steps": steps - taken}
    )


def _s1_parts(arm: str) -> tuple[str, str]:
    paradigm, _, what = arm.removeprefix("s1-").rpartition("-")
    return paradigm, what


def arms_of(point: Point) -> tuple[str, ...]:
    """The arms in the order of training: what others start from comes first."""
    return (SFT, OPD, MATCHED, COIN, *point.arms) if point.name == regime.S1 else point.arms


def settings_hash(config: TrainConfig) -> str:
    """A run's settings without the folders that it reads from: "POINT/ARM/step-N" stands for an origin.

    A setting that is younger than the protocol is part of the hash where it is not as every run was before.
    """
    values = dataclasses.asdict(config)
    for name, before in YOUNGER.items():
        if values[name] == before:
            del values[name]
    for name in ("origin", "channel"):
        if values[name]:
            values[name] = "/".join(Path(values[name]).parts[-2:])
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def run_unit(point: Point, seed: int, out: Path, keep: Path, *, of: Regime = TINY, short: bool = False) -> Path:
    """Train and measure every arm, keep the reduced numbers, delete the weights, and return the kept file.

    Raises:
        ConfigError: the unit was begun under other rules.
    """
    kept = file_of(keep, point.name, seed)
    if kept.is_file():
        return kept
    rules = regime.rules_hash(of)
    here = out / f"{point.name}-seed{seed}"
    here.mkdir(parents=True, exist_ok=True)
    begun = here / "begun.json"
    if not begun.is_file():
        begun.write_text(json.dumps({"date": datetime.now(UTC).isoformat(timespec="seconds"), "rules": rules}))
    if (old := json.loads(begun.read_text())["rules"]) != rules:
        raise ConfigError(
            f"{here} was begun under rules {old}; expected {rules}. Delete the folder: such a unit never counts."
        )
    from opdgeo.survey import track
    from opdgeo.survey.results import load_result
    from opdgeo.training import models
    from opdgeo.training.callbacks import read_log
    from opdgeo.training.train import train

    tables, hashes = [], dict[str, str]()
    spent = here / "minutes.json"  # a unit that is killed goes on with what its finished arms took
    minutes: dict[str, float] = json.loads(spent.read_text()) if spent.is_file() else {}
    last: dict[str, tuple[Path, Path]] = {}  # arm → what it starts from, and its last checkpoint
    relations: pl.DataFrame | None = None
    for arm in arms_of(point):
        config = settings(point, arm, seed, out, of=of, short=short)
        where = out / "anchors" if arm == SFT else here
        folder = where / "arms" / study.folder(arm, seed)
        if config.channel and not Path(config.channel).is_file():
            _make_channel(point, arm, seed, out, Path(config.channel), short=short)
        clock = time.process_time()
        with FileLock(where / f".{folder.name}.lock"):  # the points of a seed share its anchor
            train(config, folder, resume=True, progress=False)
            geometry = folder / "geometry"
            base = models.resolve(config.origin)
            if _tracked(point, arm) and not (geometry / "run.json").is_file():
                few: dict[str, Any] = _few() if short else {}
                track(base, folder, workers=1, out=geometry, **few).save(geometry)
        hashes[arm] = settings_hash(config)
        last[arm] = base, folder / f"step-{config.steps:06d}"
        log = read_log(folder)
        if arm == SFT and point.name == regime.S1:
            continue  # measured from the base in the other points
        if _tracked(point, arm):
            measured = load_result(geometry).measurements
            name = study.folder(arm, seed)
            table = measured.with_columns((pl.lit(f"{name}/") + pl.col("checkpoint")).alias("checkpoint"))
            tables += [reduced(table, {name: log}), walk(folder, base, config, arm, seed)]
        else:
            tables.append(reduced(_no_measurements(), {study.folder(arm, seed): log}))
        minutes[arm] = round(minutes.get(arm, 0.0) + (time.process_time() - clock) / 60, 2)
        write_atomically(spent, lambda path: path.write_text(json.dumps(minutes)))
        print(
            f"{point.name} seed {seed}: {arm} done, {minutes[arm]:.1f} minutes of processor time",
            file=sys.stderr,
            flush=True,
        )
    alike = [last[arm] for arm in related.ARMS if arm in point.arms]
    if len(alike) > 1:
        clock = time.process_time()
        updates = [checkpoint for _, checkpoint in alike]
        found = related.relate_arms(alike[0][0], updates, here / "related", rehearse=short)
        relations = related.rows(found, [update.parent.name for update in updates])
        minutes["related"] = round((time.process_time() - clock) / 60, 2)
    metadata = {
        "point": point.name,
        "seed": str(seed),
        "protocol": str(of.version),
        "frozen": of.frozen,
        "rules": rules,
        "begun": begun.read_text(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "settings": json.dumps(hashes),
        "minutes": json.dumps(minutes),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "versions": json.dumps({p: version(p) for p in ("opdgeo", "torch", "transformers", "trl")}),
        "rehearsal": str(short),
    }
    table = pl.concat(tables).with_columns(pl.col("value", "null", "excess").cast(pl.Float64))
    if relations is not None:  # of other columns too
        table = pl.concat([table, relations], how="diagonal")
    keep.mkdir(parents=True, exist_ok=True)
    write_atomically(
        kept, lambda path: table.write_parquet(path, compression="zstd", compression_level=19, metadata=metadata)
    )
    shutil.rmtree(here)
    return kept


def _tracked(point: Point, arm: str) -> bool:
    """S1 needs the stable rank that gives K, and accuracies alone beside it."""
    return point.name != regime.S1 or arm == OPD


def _few() -> dict[str, Any]:
    from opdgeo.diagnostics import Settings

    return {"roles": "k_proj", "settings": Settings(nulls=1)}


def _no_measurements() -> pl.DataFrame:
    from opdgeo.survey.results import MEASUREMENTS

    return pl.DataFrame(schema=MEASUREMENTS)


def _make_channel(point: Point, arm: str, seed: int, out: Path, path: Path, *, short: bool) -> None:
    """The channel that an arm of S1 is held in. K is the whole number just below the mean stable rank of OPD's early update."""
    from opdgeo.experiments.claims import Data, early_rank
    from opdgeo.survey.results import load_result
    from opdgeo.training import models
    from opdgeo.training.channel import Channel

    here = out / f"{point.name}-seed{seed}"
    paradigm, what = _s1_parts(arm)
    other = MATCHED if paradigm == OPD else OPD
    source = {"other": other, "coin": COIN}.get(what, paradigm)
    config = settings(point, source, seed, out, short=short)
    early = here / "arms" / study.folder(source, seed) / f"step-{config.steps:06d}"
    geometry = load_result(here / "arms" / study.folder(OPD, seed) / "geometry").measurements
    k = early_rank(
        Data(reduced(geometry.with_columns((pl.lit(f"{OPD}-seed{seed}/") + pl.col("checkpoint")).alias("checkpoint")))),
        seed,
    )
    channel = Channel.extract(models.resolve(config.origin), early, max(1, round(k / 2)) if what == "half" else k)
    if what == "frozen":
        channel = channel.cut(0)
    if what == "random":
        channel = Channel.random(channel, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    channel.save(path)


def run_all(
    units: list[tuple[Point, int]],
    out: Path,
    keep: Path,
    workers: int,
    *,
    of: Regime = TINY,
    short: bool = False,
) -> list[Path]:
    """Run units in their order, `workers` at a time, each on one thread of a process of its own.

    A process serves several units, so libraries are loaded once. A teacher that the preset makes is trained before.

    Raises:
        Exception: what the first unit that failed raised; with several workers when all others are finished.
    """
    waiting = [unit for unit in units if not file_of(keep, unit[0].name, unit[1]).is_file()]
    done = [file_of(keep, point.name, seed) for point, seed in units if (point, seed) not in waiting]
    print(f"{len(done)} of {len(units)} units are kept already", file=sys.stderr, flush=True)
    if waiting:
        make_teacher(settings(waiting[0][0], OPD, waiting[0][1], out, of=of), progress=sys.stderr.isatty())
    if workers == 1:
        import torch

        torch.set_num_threads(1)
        return done + [run_unit(point, seed, out, keep, of=of, short=short) for point, seed in waiting]
    context = multiprocessing.get_context("spawn")
    failed: list[BaseException] = []
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(1,)) as pool:
        running: dict[Future[Path], str] = {}
        while waiting or running:
            while waiting and len(running) < workers:
                point, seed = waiting.pop(0)
                running[pool.submit(run_unit, point, seed, out, keep, of=of, short=short)] = f"{point.name} seed {seed}"
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                name = running.pop(future)
                if error := future.exception():  # told at once: the others may take hours
                    failed.append(error)
                    print(f"{name}: failed, the other units go on: {error}", file=sys.stderr, flush=True)
                    continue
                done.append(future.result())
                print(f"{name}: kept ({len(done)} of {len(units)})", file=sys.stderr, flush=True)
    if failed:
        raise failed[0]
    return done


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opdgeo.experiments.units", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--preset", default="tiny", choices=regime.REGIMES, help="the study (default: %(default)s)")
    parser.add_argument("-o", type=Path, required=True, help="folder of the runs; it may be lost between sittings")
    parser.add_argument("--keep", type=Path, required=True, help="folder of the finished units' files")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="units at a time")
    known = "; ".join(f"{of.preset}: {', '.join(of.by_name)}" for of in regime.REGIMES.values())
    parser.add_argument("--points", help=f"some of the study's points ({known}; default: all, in order of worth)")
    parser.add_argument("--first-seed", type=int, default=regime.FIRST, help="the first seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, help="seeds of each point (default: as planned)")
    parser.add_argument(
        "--rehearse", action="store_true", help="a few steps an arm: whether the units run, not what they find"
    )
    options = parser.parse_args(arguments)
    of = regime.REGIMES[options.preset]
    wanted = options.points.split(",") if options.points else list(of.by_name)
    if unknown := [name for name in wanted if name not in of.by_name]:
        parser.error(f"no point {unknown[0]!r}; expected some of {', '.join(of.by_name)}")
    chosen = [
        (point, seed - regime.FIRST + options.first_seed)
        for point, seed in regime.units(of)
        if point.name in wanted and (options.seeds is None or seed - regime.FIRST < options.seeds)
    ]
    try:
        run_all(chosen, options.o.resolve(), options.keep, options.workers, of=of, short=options.rehearse)
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

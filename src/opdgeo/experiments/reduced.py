"""A study's numbers reduced to what a verdict needs: one row a quantity, checkpoint, arm and seed. No weights, no matrices.

The unit of replication is the seed, and the matrices of a model are all there are. So each quantity is averaged over matrices
first (over entries where the diagnostic is), and everything that judges reads these rows alone (`claims.py`). A few thousand rows
hold a seed of the study; they are kept under docs/results/ (`units.py`).

Columns: `arm`, `seed`, `step`, `name` (`Quantity.name`, or a number of an evaluation), `value`, `null` and `excess` (over the null: the
ratio of the two for ratios, else their difference, matrix by matrix, then averaged), `right` (bits, see `unpacked`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS
from opdgeo.experiments.rules import COHERENCE, NORM, PERSISTENCE, QUANTITIES, Quantity
from opdgeo.training.config import TrainConfig

SCHEMA = {
    "arm": pl.String,
    "seed": pl.Int32,
    "step": pl.Int32,
    "name": pl.String,
    "value": pl.Float64,
    "null": pl.Float64,
    "excess": pl.Float64,
    "right": pl.Binary,
}
EVALUATED = ("accuracy_greedy", "accuracy_sampled", "kl_teacher", "kl_origin", "completion_length", "prompts")
RIGHT = {"accuracy_greedy": "right_greedy", "accuracy_sampled": "right_sampled"}
OUTSIDE = "channel_outside"
Logs = Mapping[str, list[dict[str, Any]]]


def arm_and_seed(folder: str) -> tuple[str, int]:
    """("opd", 3) of "opd-seed3", ("opd", 0) of "opd"."""
    arm, _, seed = folder.partition("-seed")
    return arm, int(seed or 0)


def reduced(measurements: pl.DataFrame, logs: Logs | None = None) -> pl.DataFrame:
    """The rows of a study.

    Args:
        measurements: rows as in `measurements.parquet`; `checkpoint` is "ARM/step-N" or "ARM-seedM/step-N".
        logs: an arm's folder ("opd", "opd-seed1", …) → the rows of its log.jsonl.
    """
    table = measurements.with_columns(
        pl.col("checkpoint").str.extract(r"^(.+?)(?:-seed\d+)?/").alias("arm"),
        pl.col("checkpoint").str.extract(r"-seed(\d+)/").cast(pl.Int32).fill_null(0).alias("seed"),
    )
    parts = [_means(table, quantity) for quantity in QUANTITIES]
    return pl.concat([*parts, evaluated(logs or {})]).sort("arm", "seed", "name", "step")


def _means(table: pl.DataFrame, q: Quantity) -> pl.DataFrame:
    """Means over matrices. Value, null and excess are over the same rows: one without a null, as that of a matrix that did not
    move, counts only where the arm has no null at all. A norm has none to be compared with."""
    rows = table.filter(pl.col("diagnostic") == q.diagnostic, pl.col("variant").is_in(q.variants))
    value, null = pl.col("value"), pl.col("null_mean")
    alone = null.is_null().all().over("arm")
    compared = value if q is NORM else pl.when(null.is_not_null() | alone).then(value)
    weight = pl.col("entries") if DIAGNOSTICS[q.diagnostic].weighting == "entries" else pl.lit(1.0)  # as the paper does

    def mean(name: str) -> pl.Expr:
        known = pl.col(name).is_not_null()
        return ((pl.col(name) * weight).sum() / pl.when(known).then(weight).sum()).fill_nan(None).alias(name)

    found = (
        rows.with_columns(value=compared, null=pl.when(value.is_not_null()).then(null))
        .group_by("arm", "seed", "step", "matrix", maintain_order=True)
        .agg(
            value.mean(),
            pl.col("null").mean(),
            (pl.col("rows") * pl.col("cols")).first().cast(pl.Float64).alias("entries"),
        )
        .with_columns(excess=pl.col("value") / pl.col("null") if q.ratio else pl.col("value") - pl.col("null"))
        .with_columns(pl.col("excess").replace([math.inf, -math.inf], None).fill_nan(None))
        .group_by("arm", "seed", "step", maintain_order=True)
        .agg(mean("value"), mean("null"), mean("excess"))
    )
    return _rows(found.with_columns(name=pl.lit(q.name)))


def _rows(table: pl.DataFrame | list[dict[str, Any]]) -> pl.DataFrame:
    if isinstance(table, list):
        return pl.DataFrame([dict.fromkeys(SCHEMA) | row for row in table], schema=SCHEMA, orient="row")
    for name in SCHEMA.keys() - set(table.columns):
        table = table.with_columns(pl.lit(None).alias(name))
    return table.select(pl.col(name).cast(kind) for name, kind in SCHEMA.items())


def evaluated(logs: Logs) -> pl.DataFrame:
    """Accuracies, KLs and lengths, with the outcome of every prompt where the log has it; the share outside a channel at the end."""
    rows: list[dict[str, Any]] = []
    for folder, log in logs.items():
        arm, seed = arm_and_seed(folder)
        for row in log:
            known = {"arm": arm, "seed": seed, "step": row["step"]}
            if row["event"] == "eval":
                for name in EVALUATED:
                    right = row.get(RIGHT.get(name, ""))
                    if isinstance(row.get(name), int | float):
                        bits = bytes.fromhex(right) if right else None
                        rows.append(known | {"name": name, "value": float(row[name]), "right": bits})
        leaks = [row for row in log if row["event"] == "step" and row.get("channel/outside") is not None]
        if leaks:
            last = leaks[-1]
            found = {"arm": arm, "seed": seed, "step": last["step"], "name": OUTSIDE}
            rows.append(found | {"value": float(last["channel/outside"])})
    return _rows(rows)


def unpacked(bits: bytes, count: int) -> np.ndarray:
    """The first `count` outcomes (count,) of a `right` cell: those of a prompt side by side, prompt after prompt."""
    return np.unpackbits(np.frombuffer(bits, dtype=np.uint8))[:count].astype(bool)


def walk(folder: Path, base: Path, config: TrainConfig, arm: str, seed: int) -> pl.DataFrame:
    """What kind of walk a run was, from its checkpoints: means over the matrices of attention and MLP.

    `persistence` is ‖ΔW_t‖_F / (lr · √t · √entries): about 1 for a walk whose steps, of Adam's size lr in every entry, do not follow each
    other, √t for one that goes straight. With a schedule, lr · √t is the root of the sum of the squared rates. `coherence` is
    the cosine of W_t − W_{t−1} and W_{t−1} − W_{t−2}, t counting checkpoints; 0 for steps that do not follow each other.
    """
    from opdgeo.checkpoints import open_checkpoint, pair
    from opdgeo.training.callbacks import read_log

    rates = {row["step"]: row["learning_rate"] for row in read_log(folder) if row["event"] == "step"}
    before, steps = open_checkpoint(base), config.checkpoint_steps
    places = [open_checkpoint(folder / f"step-{step:06d}") for step in steps]
    persistence, coherence = ({step: list[float]() for step in steps} for _ in range(2))
    for matrix in pair(before, places[-1]).matrices:
        start = before.read(matrix).double()
        last, moved = start, None
        for step, place in zip(steps, places, strict=True):
            here = place.read(matrix).double()
            walk = math.sqrt(sum(rates[s] ** 2 for s in range(1, step + 1)))
            persistence[step].append(float((here - start).norm()) / (walk * math.sqrt(here.numel())))
            move = here - last
            if moved is not None and float(move.norm() * moved.norm()) > 0:
                coherence[step].append(float((move * moved).sum() / (move.norm() * moved.norm())))
            last, moved = here, move
    return _rows(
        [
            {"arm": arm, "seed": seed, "step": step, "name": q.name, "value": sum(found) / len(found)}
            for q, by_step in ((PERSISTENCE, persistence), (COHERENCE, coherence))
            for step, found in by_step.items()
            if found
        ]
    )

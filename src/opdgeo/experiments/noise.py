"""The noise control beside the arms, on one exploratory seed: what an update looks like that has learned nothing.

    python -m opdgeo.experiments.noise -o DIR [--save FILE.parquet] [--table FILE.json]

trains, at each of `RUNS`, one arm of the tiny study from an anchor of its own (seed `SEED`) and measures its update. `FILE.parquet`
holds every number a matrix; `FILE.json` the table made from it, whose copy in the package (`opdgeo/assets/noise.json`) stands
beside every study that trains no noise arm itself. Both are written after every run; a killed call goes on from its finished runs.
About half an hour on one core.

The seed is exploratory (`rules.EXPLORATORY`): it shows what the study has to reckon with, and no verdict counts it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from opdgeo.experiments.claims import Data
from opdgeo.experiments.reduced import reduced
from opdgeo.experiments.rules import (
    ANGLES,
    COIN,
    LOW,
    MATCHED,
    NOISE,
    NORM,
    OPD,
    RANDOM_SIGN,
    RLVR,
    SHIFT,
    SIMILARITY,
    SPARSITY,
    STABLE_RANK,
)
from opdgeo.training.config import TrainConfig

SEED = 900
COMMAND = (
    "python -m opdgeo.experiments.noise -o DIR --save docs/results/noise.parquet --table src/opdgeo/assets/noise.json"
)


def name_of(arm: str, rate: float, sequences: int) -> str:
    return f"{arm}-lr{rate:g}" + (f"-batch{sequences}" if sequences else "")


RUNS = (
    *((arm, 1e-4, 0) for arm in (COIN, OPD, RLVR, MATCHED)),
    *((arm, 1e-5, 0) for arm in (COIN, OPD, RLVR, MATCHED)),
    *((RANDOM_SIGN, rate, 0) for rate in (1e-4, 1e-5)),
    *((arm, 1e-5, 16) for arm in (COIN, RLVR)),
)
"""Arm, learning rate, sequences a step (0: the arm's own)."""
COLUMNS = {
    "norm": NORM,
    "unchanged": SPARSITY,
    "stable_rank": STABLE_RANK,
    "angle": ANGLES,
    "shift": SHIFT,
    "low_magnitude": LOW,
    "similarity": SIMILARITY,
}
"""Read at the last checkpoint; similarity at the first, which is compared with the last."""
SMALL: dict[str, Any] = {
    "eval_prompts": 256,
    "eval_prompts_between": 0,
    "eval_kl_origin": False,
    "monitor": 0,
    "checkpoints": (0.2, 1.0),
}
SOURCE = "an early check on the finished study's anchor, runs not kept; its coin was a fixed function of prompt and completion"
EARLY = tuple(
    {"name": name_of(arm, rate, 0 if sequences in (None, 64, 128) else sequences), "arm": arm, "seeds": [], "learning_rate": rate,
     "steps": 100, "sequences": sequences, "source": SOURCE}
    | dict.fromkeys([key for name in COLUMNS for key in (name, f"{name}_null")])
    | dict(zip(COLUMNS, numbers, strict=False))
    for arm, rate, sequences, numbers in (
        (COIN, 1e-4, None, (0.246, 0.080, 5.8, 0.835, 0.0022, 0.528, 0.71)),
        (OPD, 1e-4, 64, (0.250, 0.079, 4.9, 0.850, 0.0023, 0.527, 0.73)),
        (RLVR, 1e-4, 128, (0.260, 0.077, 4.9, 0.858, 0.0026, 0.527, 0.73)),
        (COIN, 1e-5, None, (0.0225, 0.501, 6.5, 0.077, 0.00021, 0.726)),
        (RLVR, 1e-5, 16, (0.0269, 0.460, 4.7, 0.091, 0.00028, 0.702)),
        (RLVR, 1e-5, 128, (0.0402, 0.370, 3.6, 0.120, 0.00043, 0.656)),
        (OPD, 1e-5, 64, (0.0402, 0.366, 3.6, 0.120, 0.00043, 0.654)),
        (MATCHED, 1e-5, 64, (0.0693, 0.249, 3.1, 0.207, 0.00065, 0.595)),
    )
)  # fmt: skip
"""What the early check found, in the rounding in which it was written down. A run of `RUNS` takes its row's place."""
KEPT = ["checkpoint", "step", "matrix", "rows", "cols", "diagnostic", "variant", "value", "null_mean"]


def table(measurements: pl.DataFrame, runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run the means over matrices (sparsity over entries) and of their nulls, and the update's persistence.

    Persistence is the mean over matrices of ‖ΔW‖_F / (lr · √steps · √entries): about 1 for a walk whose steps, of Adam's size lr
    in every entry, do not follow each other. Without learning rate it is None.

    Args:
        measurements: rows as in `measurements.parquet`.
        runs: name (the arm in `checkpoint`), seeds, learning_rate, steps and whatever else the row should say.
    """
    data = Data(reduced(measurements))
    rows = []
    for run in runs:
        row = dict(run)
        for name, quantity in COLUMNS.items():
            at = 0 if quantity is SIMILARITY else -1
            for key, column in (("", "value"), ("_null", "null")):
                values = data.values(run["name"], quantity, column, run["seeds"])[:, at]
                got = values[np.isfinite(values)]
                row[name + key] = float(got.mean()) if len(got) else None
        del row["norm_null"]  # the null has the same norm
        row["persistence"] = _persistence(measurements, run)
        rows.append(row)
    return rows


def _persistence(measurements: pl.DataFrame, run: dict[str, Any]) -> float | None:
    if not run.get("learning_rate"):
        return None
    from opdgeo.experiments.study import folder

    folders = [folder(run["name"], seed) for seed in run["seeds"]]
    rows = measurements.filter(
        pl.col("checkpoint").str.split("/").list.first().is_in(folders), pl.col("diagnostic") == "frobenius_norm"
    )
    last = rows.filter(pl.col("step") == rows["step"].max())
    walk = run["learning_rate"] * math.sqrt(run["steps"])
    ratios = last["value"] / (walk * (last["rows"] * last["cols"]).cast(pl.Float64).sqrt())
    return float(ratios.mean())


def beside(
    measurements: pl.DataFrame, configs: Mapping[str, TrainConfig], folders: Iterable[str], preset: str
) -> dict[str, list[dict[str, Any]]]:
    """The rows that stand above a study's verdicts: its paradigms and noise arms, and the package's where it has no noise arm.

    Args:
        configs: arm → the settings of one of its runs.
        folders: the runs, "opd", "opd-seed1", …
    """
    seeds: dict[str, list[int]] = {}
    for name, _, seed in (folder.partition("-seed") for folder in folders):
        seeds.setdefault(name, []).append(int(seed or 0))
    runs = [
        {
            "name": arm,
            "arm": arm,
            "seeds": seeds[arm],
            "learning_rate": configs[arm].learning_rate,
            "steps": configs[arm].steps,
            "sequences": configs[arm].sequences_per_step,
        }
        for arm in (*NOISE, OPD, RLVR, MATCHED)
        if arm in seeds
    ]
    lent = preset == "tiny" and not set(NOISE) & seeds.keys()
    return {"rows": table(measurements, runs), "exploratory": packaged()["rows"] if lent else []}


def packaged() -> dict[str, Any]:
    """The table that the package carries."""
    found: dict[str, Any] = json.loads(resources.files("opdgeo").joinpath("assets/noise.json").read_text("utf-8"))
    return found


def train_all(out: Path) -> Iterator[tuple[pl.DataFrame, list[dict[str, Any]]]]:
    """Train and measure run after run in the folder `out`; after each, the rows that the table reads and what the runs are."""
    from opdgeo.experiments.study import BY_NAME, configure
    from opdgeo.survey import track
    from opdgeo.survey.results import load_result
    from opdgeo.training import models
    from opdgeo.training.callbacks import read_log
    from opdgeo.training.train import train

    anchor = replace(configure(BY_NAME["sft"], SEED, "tiny", out), **SMALL | {"checkpoints": (1.0,)})
    train(anchor, out / "arms" / f"sft-seed{SEED}", resume=True, progress=False)
    tables, runs = [], []
    for arm, rate, sequences in RUNS:
        name, config = name_of(arm, rate, sequences), configure(BY_NAME[arm], SEED, "tiny", out)
        changes: dict[str, Any] = {"learning_rate": rate, "sequences_per_step": sequences or config.sequences_per_step}
        config = replace(config, **SMALL, **changes)
        folder = out / "arms" / f"{name}-seed{SEED}"
        train(config, folder, resume=True, progress=False)
        geometry = folder / "geometry"
        if not (geometry / "run.json").is_file():
            track(models.resolve(config.origin), folder, workers=1, out=geometry).save(geometry)
        found = load_result(geometry).measurements
        tables.append(found.with_columns((pl.lit(f"{name}-seed{SEED}/") + pl.col("checkpoint")).alias("checkpoint")))
        evals = [row["accuracy_sampled"] for row in read_log(folder) if row["event"] == "eval"]
        runs.append(
            {
                "name": name,
                "arm": arm,
                "seeds": [SEED],
                "learning_rate": rate,
                "steps": config.steps,
                "sequences": config.sequences_per_step,
                "accuracy": [evals[0], evals[-1]],
                "prompts": config.eval_prompts,
            }
        )
        print(f"{name}: done", flush=True)
        wanted = pl.any_horizontal(
            (pl.col("diagnostic") == q.diagnostic) & pl.col("variant").is_in(q.variants) for q in COLUMNS.values()
        )
        yield pl.concat(tables).filter(wanted).select(KEPT), runs


def content(rows: list[dict[str, Any]]) -> str:
    """The table's file: the runs' rows, and the early check's of runs that are not done."""
    done = {row["name"] for row in rows}
    whole = [*rows, *(row for row in EARLY if row["name"] not in done)]
    return json.dumps({"command": COMMAND, "exploratory": True, "preset": "tiny", "rows": whole}, indent=1) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opdgeo.experiments.noise", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("-o", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--save", type=Path, help="where the numbers a matrix go (parquet)")
    parser.add_argument("--table", type=Path, help="where the table goes (JSON)")
    options = parser.parse_args(arguments)
    for measurements, runs in train_all(options.o):
        if options.save:
            options.save.parent.mkdir(parents=True, exist_ok=True)
            measurements.write_parquet(options.save, compression="zstd")
        if options.table:
            options.table.parent.mkdir(parents=True, exist_ok=True)
            options.table.write_text(content(table(measurements, runs)), encoding="utf-8")


if __name__ == "__main__":
    main()

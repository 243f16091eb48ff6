"""How alike the last updates of a study's arms are (`opdgeo relate`). An open question of the paper's: reported, without a verdict.

Two updates are related where they have one base: of a seed the arms that start from its anchor (`ARMS`), and over the seeds SFT,
whose runs all start from the shared base. The other arms of two seeds start from two anchors. What moves visibly in bf16, and
by chance, hangs on the weights one starts from, so these have no W₀ to be compared on, and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics import Settings, of_pairs
from opdgeo.experiments.reduced import arm_and_seed
from opdgeo.experiments.rules import COIN, MATCHED, OPD, RANDOM_SIGN, RLVR
from opdgeo.experiments.statistics import t_interval
from opdgeo.survey.results import Result, load_result

ARMS = (MATCHED, OPD, RLVR, COIN, RANDOM_SIGN)
"""As long as each other, and from the seed's anchor: where a study lacks one, those that it has."""
TABLE = "relations.parquet"
MATRICES, ENTRIES = "matrices", "entries"
COLUMNS: dict[str, Any] = {
    "arm": pl.String,
    "seed": pl.Int32,
    "other": pl.String,
    "other_seed": pl.Int32,
    "step": pl.Int32,
    "name": pl.String,
    "over": pl.String,
    "value": pl.Float64,
    "error": pl.Float64,
    "null": pl.Float64,
    "null_std": pl.Float64,
    "reason": pl.String,
}
"""One row a number of a pair. `name` is the diagnostic and its variant; a number that differs both ways is that of `arm` against
`other`. `over`: "matrices", the mean over them, with the largest `error` and the spread of one; "entries", all as one long vector."""


def relate_arms(base: Path, updates: Sequence[Path], out: Path, *, rehearse: bool = False) -> Result:
    """Relate the checkpoints ARM/step-N that `updates` names, of one base, unless `out` holds them; what it holds."""
    from opdgeo.survey import relate

    if not holds(out, updates):
        few: dict[str, Any] = {"roles": "k_proj", "settings": Settings(nulls=1)} if rehearse else {}
        relate(base, *updates, workers=1, out=out, **few).save(out)
    return load_result(out)


def holds(out: Path, updates: Iterable[Path]) -> bool:
    """Whether the folder `out` is a finished result with all of these checkpoints."""
    if not (out / "run.json").is_file():
        return False
    there = (Path(one["path"]) for one in json.loads((out / "run.json").read_text("utf-8"))["checkpoints"])
    return {(path.parent.name, path.name) for path in updates} <= {(path.parent.name, path.name) for path in there}


def rows(result: Result, folders: Iterable[str]) -> pl.DataFrame:
    """The numbers of every pair of a result whose two arms are among `folders` ("opd-seed1", …), as `COLUMNS`."""
    wanted = set(folders)
    names = {one["checkpoint"]: Path(one["path"]).parent.name for one in result.run["checkpoints"]}
    pair = ["checkpoint", "other", "diagnostic", "variant"]
    errors = {tuple(key): error for *key, error in result.measurements.group_by(pair).agg(pl.col("error").max()).rows()}
    found: list[dict[str, Any]] = []
    for one in result.summary["pairs"]:
        first, second = names[one["checkpoint"]], names[one["other"]]
        if not {first, second} <= wanted:
            continue
        (arm, seed), (other, other_seed) = arm_and_seed(first), arm_and_seed(second)
        known = {"arm": arm, "seed": seed, "other": other, "other_seed": other_seed, "step": one["step"]}
        for entry in one["diagnostics"]:
            which = entry["diagnostic"], entry["variant"]
            null, together = entry["null"] or {}, entry["together"]
            mean = {"value": entry["mean"], "null": null.get("mean"), "null_std": null.get("std")}
            mean |= {"error": errors[one["checkpoint"], one["other"], *which], "reason": entry["reason"]}
            named = known | {"name": name_of(*which)}
            found.append(named | mean | {"over": MATRICES})
            if together:
                whole = {"null": together["null_mean"]} | {k: together[k] for k in ("value", "error", "null_std")}
                found.append(named | whole | {"over": ENTRIES, "reason": None})
    return pl.DataFrame([dict.fromkeys(COLUMNS) | row for row in found], schema=COLUMNS, orient="row")


def name_of(diagnostic: str, variant: str) -> str:
    """How reduced data call it: as `Quantity.name`."""
    return f"{diagnostic}.{variant}".rstrip(".")


def over_seeds(table: pl.DataFrame) -> list[dict[str, Any]]:
    """The numbers that are shown of every pair of arms: of all matrices as one vector where there is such a number, else the mean.

    Each is the mean over the seeds in which it is defined, with Student's 95 % interval where there are two or more, beside the
    means of the null and of its spread in one seed. A pair of one arm in two seeds stands alone, by the names of its runs.
    """
    from opdgeo.experiments.study import folder

    shown = {name_of(d.name, d.headline.variant): (d, d.headline.variant) for d in of_pairs().values() if d.headline}
    pairs: dict[tuple[str, str], dict[tuple[str, str], list[dict[str, Any]]]] = {}
    for row in table.sort("seed", "other_seed", maintain_order=True).iter_rows(named=True):
        together = row["seed"] == row["other_seed"]
        pair = (
            (row["arm"], row["other"])
            if together
            else (folder(row["arm"], row["seed"]), folder(row["other"], row["other_seed"]))
        )
        pairs.setdefault(pair, {}).setdefault((row["name"], row["over"]), []).append(row)
    found = []
    for (arm, other), by_name in pairs.items():
        for name, (diagnostic, variant) in shown.items():
            over = ENTRIES if (name, ENTRIES) in by_name else MATRICES
            each = by_name.get((name, over), [])
            known = [row for row in each if row["value"] is not None]
            if each:
                found.append(
                    {"arm": arm, "other": other, "diagnostic": diagnostic.name, "variant": variant, "over": over}
                    | _mean(known)
                    | {
                        "seeds": sorted({row[s] for row in known for s in ("seed", "other_seed")}),
                        "reason": None if known else each[0]["reason"],
                    }
                )
    return found


def _mean(known: list[dict[str, Any]]) -> dict[str, Any]:
    numbers = {
        column: [row[column] for row in known if row[column] is not None] for column in ("value", "null", "null_std")
    }
    low, high = (float(end) for end in t_interval(numbers["value"])) if len(known) > 1 else (None, None)
    return {column: float(np.mean(each)) if each else None for column, each in numbers.items()} | {
        "low": low,
        "high": high,
    }

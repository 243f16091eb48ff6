"""The data files of a run: their columns, the summary over matrices, atomic writing and loading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics.locking import THRESHOLDS, locking_step
from opdgeo.diagnostics.update import UNMOVED
from opdgeo.errors import ConfigError
from opdgeo.files import remove_orphans, write_atomically

MEASUREMENTS: dict[str, Any] = {
    "checkpoint": pl.String, "step": pl.Int64, "matrix": pl.String, "layer": pl.Int32, "role": pl.String,
    "rows": pl.Int64, "cols": pl.Int64, "diagnostic": pl.String, "variant": pl.String, "value": pl.Float64,
    "error": pl.Float64, "method": pl.String, "null_mean": pl.Float64, "null_std": pl.Float64, "status": pl.String,
    "reason": pl.String,
}  # fmt: skip
CURVES: dict[str, Any] = {
    "checkpoint": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "curve": pl.String,
    "values": pl.List(pl.Float64),
}

# Diagnostics that are shares of something: their difference from a null is read in absolute terms.
SHARES = ("update_sparsity", "mask_overlap", "principal_energy", "subspace_similarity", "channel_energy")
TRAJECTORY = ("subspace_similarity", "channel_energy")  # their null is the walk
SIZES = ("frobenius_norm", "relative_norm")  # the null has the same value by definition
SHARE_MARGIN, RELATIVE_MARGIN = 0.02, 0.10
BOOTSTRAP = 2000
_PANDAS = {"String": "string", "Int64": "Int64", "Int32": "Int32", "Float64": "float64"}  # an absent step stays absent
PARTS = ".parts"  # finished matrices of a run that is not complete yet


@dataclass(frozen=True)
class Result:
    """What `compare` and `track` return, and what the data files hold."""

    measurements: pl.DataFrame
    curves: pl.DataFrame
    summary: dict[str, Any]
    run: dict[str, Any]

    @property
    def skipped(self) -> list[str]:
        """Matrices that could not be computed at some checkpoint."""
        return sorted(set(self.measurements.filter(pl.col("status") == "skipped")["matrix"]))

    def to_pandas(self) -> Any:
        """`measurements` as a pandas table.

        Raises:
            ConfigError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ConfigError(
                "to_pandas needs the package pandas, which is not installed; `pip install pandas`, or use `.measurements`, a "
                "polars table, or pandas.read_parquet on measurements.parquet elsewhere."
            ) from error
        columns = {c.name: pandas.Series(c.to_list(), dtype=_PANDAS[str(c.dtype)]) for c in self.measurements}
        return pandas.DataFrame(columns)

    def save(self, out: str | Path, *, growing: bool = False) -> None:
        """Write the four data files, each in one atomic step; `run.json`, written last, marks a complete folder.

        A page that was made from other data goes first; the finished parts go last, unless the run is still growing.
        """
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        remove_orphans(out)
        for stale in ("run.json", "report.html"):
            (out / stale).unlink(missing_ok=True)
        write_atomically(out / "measurements.parquet", lambda p: self.measurements.write_parquet(p))
        write_atomically(out / "curves.parquet", lambda p: self.curves.write_parquet(p))
        write_json(out / "summary.json", self.summary)
        write_json(out / "run.json", self.run)
        if not growing:
            shutil.rmtree(out / PARTS, ignore_errors=True)

    def report(self, path: str | Path) -> Path:
        """Write the data files and `report.html` into the folder `path`; returns the page's path."""
        from opdgeo.report import write_report

        self.save(Path(path))
        return write_report(Path(path))


def load_result(out: str | Path) -> Result:
    """The result in a folder: what `opdgeo compare -o`, `track -o` or `Result.save` wrote.

    Raises:
        ConfigError: a file is missing or unreadable.
    """
    out = Path(out)
    try:
        return Result(
            pl.read_parquet(out / "measurements.parquet"),
            pl.read_parquet(out / "curves.parquet"),
            json.loads((out / "summary.json").read_text()),
            json.loads((out / "run.json").read_text()),
        )
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        raise ConfigError(
            f"{out} is not a complete results folder ({error}); expected measurements.parquet, curves.parquet, "
            "summary.json and run.json. Run compare, track or reproduce with -o first."
        ) from error


def frames(rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows as typed tables."""
    return pl.DataFrame(rows, schema=MEASUREMENTS, orient="row"), pl.DataFrame(curves, schema=CURVES, orient="row")


def summarise(measurements: pl.DataFrame, null: str) -> dict[str, Any]:
    """The content of `summary.json`: each diagnostic over the matrices of each checkpoint, beside its null.

    `mean`, `median`, `p10`, `p90`, the null and the excess are over the same `matrices` of the `total` (see `compared`), so that
    mean − null = excess; `mean_computed` is over all that have a value (`computed`), those that did not move among them.
    `unmoved` counts these; `reason` is the most frequent one of moved matrices without a value.
    A null's `reading` compares the mean excess over the null, with its 95 % bootstrap interval over matrices, with a
    margin (0.02 for shares, 10 % of the null otherwise): "size" when the interval lies within the margin, "geometry" when
    it lies outside, "unclear" when it does neither, "by construction" for the norms. Its `std` is that of one matrix.
    A trajectory adds `locking`.
    """
    checkpoints = []
    for (checkpoint,), rows in measurements.group_by("checkpoint", maintain_order=True):
        unmoved = rows.filter(pl.col("reason") == UNMOVED)["matrix"].unique()
        rows = rows.with_columns(moved=~pl.col("matrix").is_in(unmoved.to_list()))
        entries = []
        for (diagnostic, variant), group in rows.group_by("diagnostic", "variant", maintain_order=True):
            entry = {"diagnostic": diagnostic, "variant": variant, **_statistics(group, str(diagnostic))}
            entry["null"] = _against_null(group, str(diagnostic), "walk" if diagnostic in TRAJECTORY else null)
            entry["reason"] = _why(group)
            entry["roles"] = {
                str(role): _statistics(part, str(diagnostic))
                | {"null_mean": _mean(compared(part), "null_mean", str(diagnostic))}
                for (role,), part in group.group_by("role", maintain_order=True)
            }
            entries.append(entry)
        one = {"checkpoint": checkpoint, "step": rows["step"][0], "unmoved": len(unmoved), "diagnostics": entries}
        checkpoints.append(one)
    locked = locking(measurements)
    return {"checkpoints": checkpoints} | ({"locking": locked} if locked else {})


def compared(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of one diagnostic behind a mean, its null and its excess: those with a value and a null, and where no row has a
    null, those with a value, of matrices that moved if the column `moved` tells and any did."""
    known = rows.filter(pl.col("value").is_not_null())
    beside = known.filter(pl.col("null_mean").is_not_null())
    if len(beside) or "moved" not in known.columns or not known["moved"].any():
        return beside if len(beside) else known
    return known.filter("moved")


def locking(measurements: pl.DataFrame) -> list[dict[str, Any]]:
    """Where every run's Sim_K to its final checkpoint locks, for every K and side, over a range of thresholds.

    `step`: of the mean over matrices; `null_step`: of the mean of their walk nulls; `median_step`: the step by which half of
    the matrices have locked, one by one; None: not before the last checkpoint. A checkpoint without a step counts as its place.
    """
    final = measurements.filter(
        (pl.col("diagnostic") == "subspace_similarity") & pl.col("variant").str.starts_with("final.")
    ).with_columns(run=pl.col("checkpoint").str.extract(r"^(.+)/", 1).fill_null(""))
    found = []
    for (run, variant), rows in final.group_by("run", "variant", maintain_order=True):
        names = rows["checkpoint"].unique(maintain_order=True).to_list()
        steps = [rows.filter(checkpoint=n)["step"][0] for n in names]
        if None in steps:
            steps = list(range(1, len(names) + 1))
        order = sorted(range(len(names)), key=lambda i: steps[i])[:-1]  # the last one equals itself
        if not order:
            continue
        tables = [rows.filter(checkpoint=names[i]) for i in order]
        steps = [steps[i] for i in order]
        curve, chance = ([_mean(compared(t), column, "") for t in tables] for column in ("value", "null_mean"))
        alone = [[t.get(m) for t in (dict(zip(t["matrix"], t["value"], strict=True)) for t in tables)]
                 for m in tables[-1]["matrix"]]  # fmt: skip
        side, k = ("left", str(variant)[11:]) if ".left." in str(variant) else ("right", str(variant)[6:])
        found.append(
            {
                "run": run,
                "side": side,
                "rank": int(k),
                "steps": steps,
                "thresholds": list(THRESHOLDS),
                "step": [locking_step(steps, curve, t) for t in THRESHOLDS],
                "null_step": [locking_step(steps, chance, t) for t in THRESHOLDS],
                "median_step": [_median_step([locking_step(steps, a, t) for a in alone]) for t in THRESHOLDS],
            }
        )
    return found


def _median_step(steps: list[int | None]) -> int | None:
    """The step by which at least half have locked."""
    known = sorted(s for s in steps if s is not None)
    half = (len(steps) + 1) // 2
    return known[half - 1] if 0 < half <= len(known) else None


def _why(group: pl.DataFrame) -> str | None:
    lacking = group.filter(pl.col("value").is_null() & pl.col("reason").is_not_null())
    moved = lacking.filter("moved") if group["moved"].any() else lacking
    reasons: list[str] = moved["reason"].to_list()
    return max(dict.fromkeys(reasons), key=reasons.count, default=None)


def _weights(group: pl.DataFrame, diagnostic: str) -> np.ndarray:
    return (
        (group["rows"] * group["cols"]).to_numpy().astype(float)
        if diagnostic == "update_sparsity"
        else np.ones(len(group))
    )


def _mean(group: pl.DataFrame, column: str, diagnostic: str) -> float | None:
    known = group.filter(pl.col(column).is_not_null())
    return float(np.average(known[column].to_numpy(), weights=_weights(known, diagnostic))) if len(known) else None


def _statistics(group: pl.DataFrame, diagnostic: str) -> dict[str, Any]:
    shown = compared(group)
    quantiles = np.quantile(shown["value"].to_numpy(), [0.5, 0.1, 0.9]).tolist() if len(shown) else [None] * 3
    return {
        "mean": _mean(shown, "value", diagnostic),
        **dict(zip(("median", "p10", "p90"), quantiles, strict=True)),
        "weighting": "entries" if diagnostic == "update_sparsity" else "matrices",
        "matrices": len(shown),
        "mean_computed": _mean(group, "value", diagnostic),
        "computed": group["value"].count(),
        "total": len(group),
    }


def _against_null(group: pl.DataFrame, diagnostic: str, kind: str) -> dict[str, Any] | None:
    known = compared(group)
    if not len(known) or known["null_mean"].null_count():
        return None
    weights = _weights(known, diagnostic)
    mean = float(np.average(known["null_mean"].to_numpy(), weights=weights))
    spread = known["null_std"].mean()
    differences = (known["value"] - known["null_mean"]).to_numpy()
    excess = float(np.average(differences, weights=weights))
    rng = np.random.default_rng(0)
    picks = rng.integers(len(known), size=(BOOTSTRAP, len(known)))
    resampled = (differences[picks] * weights[picks]).sum(axis=1) / weights[picks].sum(axis=1)
    low, high = np.quantile(resampled, [0.025, 0.975]).tolist()
    margin = SHARE_MARGIN if diagnostic in SHARES else RELATIVE_MARGIN * abs(mean)
    if diagnostic in SIZES:
        reading = "by construction"
    elif -margin <= low and high <= margin:
        reading = "size"
    elif low > margin or high < -margin:
        reading = "geometry"
    else:
        reading = "unclear"
    return {
        "kind": kind,
        "mean": mean,
        "std": spread,
        "excess": excess,
        "low": low,
        "high": high,
        "margin": margin,
        "reading": reading,
    }


def write_json(path: Path, content: Any) -> None:
    """JSON without NaN, written atomically."""
    write_atomically(
        path, lambda p: p.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    )

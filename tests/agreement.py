"""A planted pair of checkpoints, the program on it, and its rows against the reference."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import polars as pl

import planted
from program import run_opdgeo
from reference import Matrix, Values, disagreement

SCHEMA = {
    "checkpoint": pl.String, "step": pl.Int64, "matrix": pl.String, "layer": pl.Int32, "role": pl.String,
    "rows": pl.Int64, "cols": pl.Int64, "diagnostic": pl.String, "variant": pl.String, "value": pl.Float64,
    "error": pl.Float64, "method": pl.String, "null_mean": pl.Float64, "null_std": pl.Float64,
    "status": pl.String, "reason": pl.String,
}  # fmt: skip
BASE, TUNED = planted.tiny_pair()
NAMES = planted.linear(BASE)

Pair = tuple[dict[str, Matrix], dict[str, Matrix]]
Rows = dict[tuple[str, str, str], dict[str, Any]]


def compared(base: Path, tuned: Path, out: Path, *options: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_opdgeo("compare", base, tuned, "-o", out, "--no-report", *options)
    assert done.returncode == status, done.stderr[-3000:]
    return done


def write_pair(folder: Path, pair: Pair, dtype: str = "bfloat16", shards: int = 1) -> tuple[Path, Path]:
    return (
        planted.write_checkpoint(folder / "base", pair[0], dtype, shards=shards),
        planted.write_checkpoint(folder / "tuned", pair[1], dtype, shards=shards),
    )


def rows_of(table: Path | pl.DataFrame) -> Rows:
    """The rows by (matrix, diagnostic, variant); no row may appear twice."""
    frame = pl.read_parquet(table / "measurements.parquet") if isinstance(table, Path) else table
    rows = {(row["matrix"], row["diagnostic"], row["variant"]): row for row in frame.iter_rows(named=True)}
    assert len(rows) == frame.height
    return rows


def check_rows(rows: Rows, name: str, expected: Values) -> None:
    """Every row of one matrix agrees with the reference, and there is a row for every value."""
    found = {(diagnostic, variant): row for (matrix, diagnostic, variant), row in rows.items() if matrix == name}
    assert set(found) == set(expected), name
    wrong = [disagreement(key, row["value"], row["error"], expected[key]) for key, row in found.items()]
    assert not [text for text in wrong if text], name
    for key, row in found.items():
        assert row["status"] == ("undefined" if expected[key] is None else "computed"), (name, key)
        assert expected[key] is not None or row["reason"], (name, key)
        assert expected[key] is None or row["method"], (name, key)

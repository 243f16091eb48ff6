"""The data files of a run: their columns, the summary over matrices, atomic writing and loading."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
from safetensors import SafetensorError

from opdgeo.checkpoints.huggingface import read_json
from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic, of_runs
from opdgeo.diagnostics.diagnostic import ONE_UNMOVED, UNMOVED
from opdgeo.diagnostics.rows import compared
from opdgeo.diagnostics.whole import Together
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.files import remove_orphans, write_atomically

MEASUREMENTS: dict[str, Any] = {
    "checkpoint": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "layer": pl.Int32,
    "role": pl.String,
    "rows": pl.Int64,
    "cols": pl.Int64,
    "diagnostic": pl.String,
    "variant": pl.String,
    "value": pl.Float64,
    "error": pl.Float64,
    "method": pl.String,
    "null_mean": pl.Float64,
    "null_std": pl.Float64,
    "status": pl.String,
    "reason": pl.String,
}
OTHER = {"other": pl.String}
"""A column of `relate` alone, behind `checkpoint`: what it is compared with; null for an update alone."""
CURVES: dict[str, Any] = {
    "checkpoint": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "curve": pl.String,
    "values": pl.List(pl.Float64),
}

SHARE_MARGIN, RELATIVE_MARGIN = 0.02, 0.10
BOOTSTRAP, PICKED = 2000, 1 << 20  # draws, and matrices drawn at a time
_PANDAS = {"String": "string", "Int64": "Int64", "Int32": "Int32", "Float64": "float64"}  # an absent step stays absent
GROUP = 1 << 18  # rows of a group in a file of polars; tables of more are not held in memory (`OnDisk`)
LONGEST = 1 << 29  # bytes of a JSON file that is read
PARTS = ".parts"  # finished matrices of a run that is not complete yet


@dataclass(frozen=True, repr=False)
class Result:
    """What `compare`, `track` and `relate` return, and what the data files hold."""

    measurements: pl.DataFrame
    curves: pl.DataFrame
    summary: dict[str, Any]
    run: dict[str, Any]

    @property
    def skipped(self) -> list[str]:
        """Matrices that could not be computed at some checkpoint."""
        found = self._table("measurements").filter(pl.col("status") == "skipped").select("matrix").collect()
        return sorted(set(found["matrix"]))

    def _table(self, name: str) -> pl.LazyFrame:
        return cast(pl.DataFrame, getattr(self, name)).lazy()

    def _write(self, path: Path) -> None:
        """Write one of the tables."""
        frame: pl.DataFrame = getattr(self, path.stem)
        with writing(path):
            write_atomically(path, lambda p: frame.write_parquet(p))

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
        for name in OnDisk.NAMES:
            self._write(out / name)
        write_json(out / "summary.json", self.summary)
        write_json(out / "run.json", self.run)
        if not growing:
            shutil.rmtree(out / PARTS, ignore_errors=True)


class OnDisk(Result):
    """A result whose tables lie in `folder`, in files, and are read when they are asked for: of many thousands of matrices."""

    NAMES = "measurements.parquet", "curves.parquet"
    folder: Path

    def __init__(self, folder: Path, summary: dict[str, Any], run: dict[str, Any]):
        for name, value in {"folder": folder, "summary": summary, "run": run}.items():
            object.__setattr__(self, name, value)

    @cached_property
    def measurements(self) -> pl.DataFrame:
        return self._table("measurements").collect()

    @cached_property
    def curves(self) -> pl.DataFrame:
        return self._table("curves").collect()

    def _table(self, name: str) -> pl.LazyFrame:
        return pl.scan_parquet(self.folder / f"{name}.parquet")

    def _write(self, path: Path) -> None:
        write_atomically(path, lambda p: shutil.copyfile(self.folder / path.name, p))

    def save(self, out: str | Path, *, growing: bool = False) -> None:
        super().save(out, growing=growing)
        object.__setattr__(self, "folder", Path(out))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Libraries that write have errors of their own for a disk that is full or fails, which do not say so.

    Raises:
        ConfigError: one of these.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be written ({error}); expected room for it on its disk. Make room, and give the command again: finished "
            "matrices are kept."
        ) from error


def load_result(out: str | Path) -> Result:
    """The result in a folder: what `opdgeo compare -o`, `track -o`, `relate -o` or `Result.save` wrote.

    Raises:
        ConfigError: a file is missing or unreadable.
    """
    out = Path(out)
    if not out.exists():
        raise ConfigError(
            f"{out} does not exist; expected the results folder of an earlier run. Check the path, or run compare, track or relate with "
            "-o first."
        )
    names = (*OnDisk.NAMES, "summary.json", "run.json")
    try:
        if missing := [name for name in names if not (out / name).is_file()]:
            raise FileNotFoundError(
                "none of them is there" if len(missing) == len(names) else f"without {', '.join(missing)}"
            )
        tables = [pl.read_parquet(out / name) for name in OnDisk.NAMES]
        for table, columns in zip(tables, (MEASUREMENTS, CURVES), strict=True):
            if odd := [name for name, kind in columns.items() if table.schema.get(name) != kind]:
                raise ValueError(f"a table with another {', '.join(odd)}")
        return Result(
            tables[0],
            tables[1],
            read_json(out / "summary.json", LONGEST),
            read_json(out / "run.json", LONGEST),
        )
    except (OSError, ValueError, CheckpointError, pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        raise ConfigError(
            f"{out} is not a complete results folder ({error}); expected measurements.parquet, curves.parquet, "
            "summary.json and run.json. Run compare, track or reproduce with -o first."
        ) from error


def frames(
    rows: Sequence[dict[str, Any]], curves: Sequence[dict[str, Any]], *, pairs: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Rows as typed tables; those of `pairs` have a column more."""
    measurements, points = (
        {"checkpoint": pl.String, **(OTHER if pairs else {}), **columns} for columns in (MEASUREMENTS, CURVES)
    )
    return pl.DataFrame(rows, schema=measurements, orient="row"), pl.DataFrame(curves, schema=points, orient="row")


def summarise(measurements: pl.DataFrame | pl.LazyFrame, null: str) -> dict[str, Any]:
    """The content of `summary.json`: each diagnostic over the matrices of each checkpoint, beside its null.

    The table is in memory or, without pairs, in a file.
    `mean`, `median`, `p10`, `p90`, the null and the excess are over the same `matrices` of the `total` (see `compared`), so that
    mean − null = excess; `mean_computed` is over all that have a value (`computed`), those that did not move among them.
    `unmoved` counts these; `reason` is the most frequent one of moved matrices without a value, `notes` counts those of matrices with one.
    A null's `reading` compares the mean excess over the null, with its 95 % bootstrap interval over matrices, with a
    margin (0.02 for shares, 10 % of the null otherwise): "size" when the interval lies within the margin, "geometry" when
    it lies outside, "unclear" when it does neither, "by construction" for the norms. Its `std` is that of one matrix.
    A trajectory adds a list for every diagnostic of whole runs, under its name; `relate` one of pairs.
    """
    checkpoints, pairs = [], None
    if isinstance(measurements, pl.LazyFrame):
        for checkpoint, step in _keys(measurements, "checkpoint", "step"):
            of = measurements.filter(pl.col("checkpoint") == checkpoint)
            checkpoints.append({"checkpoint": checkpoint, "step": step, **_entries(of, UNMOVED, null)})
        measured = [
            (n, d.measure(measurements.filter(pl.col("diagnostic") == d.of).collect())) for n, d in of_runs().items()
        ]
        return {"checkpoints": checkpoints} | {name: found for name, found in measured if found}
    if "other" in measurements.columns:
        pairs = measurements.filter(pl.col("other").is_not_null())
        measurements = measurements.filter(pl.col("other").is_null()).drop("other")
    for (checkpoint,), rows in measurements.group_by("checkpoint", maintain_order=True):
        checkpoints.append({"checkpoint": checkpoint, "step": rows["step"][0], **_entries(rows, UNMOVED, null)})
    whole = {name: d.measure(measurements) for name, d in of_runs().items()}
    found: dict[str, Any] = {"checkpoints": checkpoints} | {name: rows for name, rows in whole.items() if rows}
    return found if pairs is None else found | {"pairs": _pairs(pairs, measurements)}


def _pairs(pairs: pl.DataFrame, alone: pl.DataFrame) -> list[dict[str, Any]]:
    """Each pair over its matrices, and all its matrices together; `alone` holds the rows of the updates alone."""
    found = []
    for (checkpoint, other), rows in pairs.group_by("checkpoint", "other", maintain_order=True):
        one = {"checkpoint": checkpoint, "other": other, "step": rows["step"][0], **_entries(rows, ONE_UNMOVED, "")}
        together = Together(rows, alone)
        for entry in one["diagnostics"]:
            group = rows.filter(diagnostic=entry["diagnostic"], variant=entry["variant"])
            entry["together"] = together.value(DIAGNOSTICS[entry["diagnostic"]], group)
        found.append(one)
    return found


def _keys(table: pl.LazyFrame, *columns: str) -> Iterator[tuple[Any, ...]]:
    """What stands in some columns, once each and in order."""
    return table.select(columns).unique(maintain_order=True).collect().iter_rows()


def _groups(table: pl.DataFrame | pl.LazyFrame, unmoved: set[str]) -> Iterator[tuple[tuple[Any, ...], _Rows]]:
    """The rows of each diagnostic and variant; of a table in a file, one group after the other is in memory."""
    if isinstance(table, pl.DataFrame):
        yield from _Rows.of(table, unmoved).by("diagnostic", "variant")
        return
    for name, variant in _keys(table, "diagnostic", "variant"):
        group = table.filter(pl.col("diagnostic") == name, pl.col("variant") == variant).collect()
        yield (name, variant), _Rows.of(group, unmoved)


def _entries(table: pl.DataFrame | pl.LazyFrame, still: str, null: str) -> dict[str, Any]:
    """`unmoved`, the matrices with the reason `still`, and `diagnostics`: an entry for each and variant."""
    unmoved = set(table.lazy().filter(pl.col("reason") == still).select("matrix").collect()["matrix"])
    entries = []
    for (name, variant), group in _groups(table, unmoved):
        diagnostic = DIAGNOSTICS[str(name)]
        entry = {"diagnostic": name, "variant": variant, **_statistics(group, diagnostic)}
        kind = {"trajectory": "walk", "pair": "independent"}.get(diagnostic.scope, null)
        entry["null"] = _against_null(group, diagnostic, kind)
        entry["reason"] = _why(group)
        entry["notes"] = _notes(group)
        entry["roles"] = {
            str(role): _statistics(part, diagnostic) | {"null_mean": _mean(part.compared, "null_mean", diagnostic)}
            for (role,), part in group.by("role")
        }
        entries.append(entry)
    return {"unmoved": len(unmoved), "diagnostics": entries}


class _Rows:
    """Columns as arrays. A table has many small groups: to cut them out of a data frame takes longer than to measure the matrices."""

    NUMBERS = ("value", "null_mean", "null_std")  # NaN where there is none
    WORDS = ("matrix", "role", "diagnostic", "variant", "reason")

    def __init__(self, columns: dict[str, np.ndarray], places: np.ndarray | None = None):
        self.columns, self.places = columns, places  # of a whole table, and which of its rows these are
        self._taken: dict[str, np.ndarray] = columns if places is None else {}

    @classmethod
    def of(cls, table: pl.DataFrame, unmoved: set[str]) -> _Rows:
        """The rows of a table, and whether their matrices moved."""
        columns = {name: table[name].to_numpy() for name in (*cls.NUMBERS, "rows", "cols")}
        columns |= {f"has {name}": table[name].is_not_null().to_numpy() for name in cls.NUMBERS}
        columns |= {name: np.array(table[name].to_list(), dtype=object) for name in cls.WORDS}
        columns["moved"] = np.array([name not in unmoved for name in columns["matrix"]], dtype=bool)
        return cls(columns)

    def __getitem__(self, column: str) -> np.ndarray:
        if column not in self._taken:
            self._taken[column] = self.columns[column][self.places]
        return self._taken[column]

    def __len__(self) -> int:
        return len(self.columns["value"]) if self.places is None else len(self.places)

    def take(self, which: np.ndarray | list[int]) -> _Rows:
        """The rows of a mask or of these places."""
        return _Rows(self.columns, (np.arange(len(self)) if self.places is None else self.places)[which])

    def by(self, *names: str) -> Iterator[tuple[tuple[Any, ...], _Rows]]:
        """The groups of equal words, in the order in which they first appear."""
        places: dict[tuple[Any, ...], list[int]] = {}
        for place, key in enumerate(zip(*(self[name] for name in names), strict=True)):
            places.setdefault(key, []).append(place)
        return ((key, self.take(here)) for key, here in places.items())

    @cached_property
    def compared(self) -> _Rows:
        return self.take(compared(self["has value"], self["has null_mean"], self["moved"]))


def _weights(group: _Rows, diagnostic: Diagnostic) -> np.ndarray:
    if diagnostic.weighting == "entries":
        return (group["rows"] * group["cols"]).astype(float)
    return np.ones(len(group))


def _why(group: _Rows) -> str | None:
    """The most frequent reason of matrices without a value, of those that moved if any did."""
    lacking = ~group["has value"] & np.array([reason is not None for reason in group["reason"]], dtype=bool)
    if group["moved"].any():
        lacking &= group["moved"]
    reasons: list[str] = group["reason"][lacking].tolist()
    return max(dict.fromkeys(reasons), key=reasons.count, default=None)


def _notes(group: _Rows) -> dict[str, int]:
    """What rows with a value say of it, such as a rank that was cut, and how many matrices say so."""
    reasons = group["reason"][group["has value"]].tolist()
    return dict(Counter(reason for reason in reasons if reason is not None))


def _average(values: np.ndarray, weights: np.ndarray) -> float:
    return float((values * weights).sum() / weights.sum())


def _mean(group: _Rows, column: str, diagnostic: Diagnostic) -> float | None:
    known = group[f"has {column}"]
    return _average(group[column][known], _weights(group, diagnostic)[known]) if known.any() else None


def _quantiles(values: np.ndarray, *shares: float) -> list[float]:
    """What `np.quantile` says of numbers, to the bit, in a fraction of the time that it takes for a few."""
    ordered, found = np.sort(values), []
    for share in shares:
        place = (len(ordered) - 1) * share
        low = ordered[int(place)]
        high = ordered[min(int(place) + 1, len(ordered) - 1)]
        part = place - int(place)
        found.append(float(high - (high - low) * (1 - part) if part >= 0.5 else low + (high - low) * part))
    return found


def _statistics(group: _Rows, diagnostic: Diagnostic) -> dict[str, Any]:
    shown = group.compared
    quantiles = _quantiles(shown["value"], 0.5, 0.1, 0.9) if len(shown) else [None] * 3
    return {
        "mean": _mean(shown, "value", diagnostic),
        **dict(zip(("median", "p10", "p90"), quantiles, strict=True)),
        "weighting": diagnostic.weighting,
        "matrices": len(shown),
        "mean_computed": _mean(group, "value", diagnostic),
        "computed": int(group["has value"].sum()),
        "total": len(group),
    }


def _against_null(group: _Rows, diagnostic: Diagnostic, kind: str) -> dict[str, Any] | None:
    known = group.compared
    if not len(known) or not known["has null_mean"].all():
        return None
    weights = _weights(known, diagnostic)
    mean = _average(known["null_mean"], weights)
    spread = pl.Series(known["null_std"][known["has null_std"]]).mean()
    differences = known["value"] - known["null_mean"]
    excess = _average(differences, weights)
    rng, size = np.random.default_rng(0), len(known)
    resampled = np.empty(BOOTSTRAP)
    step = max(1, PICKED // size)
    for start in range(0, BOOTSTRAP, step):
        picks = rng.integers(size, size=(min(step, BOOTSTRAP - start), size))
        weighed = weights[picks]
        resampled[start : start + step] = (differences[picks] * weighed).sum(axis=1) / weighed.sum(axis=1)
    low, high = _quantiles(resampled, 0.025, 0.975)
    margin = RELATIVE_MARGIN * abs(mean) if diagnostic.ratio else SHARE_MARGIN
    if diagnostic.size:
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

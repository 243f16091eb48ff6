"""The data files of one output folder, checked as they are read. The report knows nothing else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from opdgeo.diagnostics import of_runs
from opdgeo.errors import ConfigError
from opdgeo.report.glossary import arm_of, arm_order

MEASUREMENTS = (
    *("checkpoint", "step", "matrix", "layer", "role", "rows", "cols"),
    *("diagnostic", "variant", "value", "error", "method", "null_mean", "null_std", "status", "reason"),
)
CURVES = ("checkpoint", "step", "matrix", "curve", "values")
_TYPES = {
    **dict.fromkeys(
        ("checkpoint", "matrix", "role", "diagnostic", "variant", "method", "status", "curve", "other"), pl.String
    ),
    **dict.fromkeys(("value", "error", "null_mean", "null_std"), pl.Float64),
    **dict.fromkeys(("step", "rows", "cols"), pl.Int64),
    **{"layer": pl.Int32, "reason": pl.String, "values": pl.List(pl.Float64)},
}

AT_ONCE = 2**18  # rows of measurements: above, a section reads the part that it shows
LONGEST = 1 << 29  # bytes of a file of text

# polars raises several families for a broken file, and one that is no Exception.
_BROKEN = (Exception, pl.exceptions.PanicException)

_NUMBER, _COUNT, _TEXT = (int, float), int, str
_STATISTICS = {"mean": (_NUMBER, None), "median?": (_NUMBER, None), "p10?": (_NUMBER, None), "p90?": (_NUMBER, None)}
_BESIDE = dict.fromkeys(("mean", "excess"), (_NUMBER, None)) | dict.fromkeys(
    ("std?", "low?", "high?", "margin?"), (_NUMBER, None)
)
_ROW = {
    "diagnostic": _TEXT,
    "variant": _TEXT,
    **_STATISTICS,
    "computed": _COUNT,
    "total": _COUNT,
    "matrices?": _COUNT,
    "weighting?": _TEXT,
    "reason?": (_TEXT, None),
    "notes?": {"*": _COUNT},
    "null": ({**_BESIDE, "kind?": _TEXT, "reading?": (_TEXT, None)}, None),
    "roles?": {"*": {**_STATISTICS, "null_mean?": (_NUMBER, None), "computed?": _COUNT, "total?": _COUNT}},
}
_TOGETHER = {"value": _NUMBER, "error": _NUMBER, "null_mean?": (_NUMBER, None), "null_std?": (_NUMBER, None)}
_CHECKPOINT = {"checkpoint": _TEXT, "step?": (_COUNT, None), "unmoved?": _COUNT, "diagnostics": [_ROW]}
_PAIR = {**_CHECKPOINT, "other": _TEXT, "diagnostics": [{**_ROW, "together": (_TOGETHER, None)}]}
_RELATED = {
    **dict.fromkeys(("arm", "other", "diagnostic", "variant"), _TEXT),
    **dict.fromkeys(("value", "low", "high", "null", "null_std"), (_NUMBER, None)),
    "seeds": [_COUNT],
    "reason?": (_TEXT, None),
}
_LOCKING = {
    "run": _TEXT,
    "side": _TEXT,
    "rank": _COUNT,
    "thresholds": [_NUMBER],
    "step": [(_NUMBER, None)],
    "null_step": [(_NUMBER, None)],
    "median_step": [(_NUMBER, None)],
}
_FILE = {"name": _TEXT, "bytes": _COUNT, "sha256": _TEXT}
_MANIFEST = {
    "path?": _TEXT,
    "checkpoint?": _TEXT,
    "format?": _TEXT,
    "dtypes?": {"*": _COUNT},
    "files?": [_FILE],
    "notes?": [_TEXT],
    "quantised?": {"*": _COUNT},
}
_PAIRING = {
    "measured?": _COUNT,
    "not_selected?": {"*": _COUNT},
    "unreadable?": {"*": _TEXT},
    **{key: [_TEXT] for key in ("base_only?", "tuned_only?", "tied?", "unrecognised?")},
}
_PARTS = {"base?": _MANIFEST, "checkpoints?": [_MANIFEST], "pairing?": _PAIRING, "timings?": dict}
_MEASURED = {
    "*": (
        {
            **dict.fromkeys(("mean?", "low?", "high?", "null?", "excess?", "outside?"), (_NUMBER, None)),
            "seeds?": [(_NUMBER, None)],
        },
        None,
    )
}
_CONTROL = {"control?": _TEXT, "verdict": _TEXT, "explanation?": (_TEXT, None), "measured?": (_MEASURED, None)}
_CLAIM = {
    **dict.fromkeys(("id", "claim", "verdict", "rule"), _TEXT),
    "measured": (_MEASURED, None),
    "controls?": ([_CONTROL], None),
}
_FROM_NULL = {
    **dict.fromkeys(("arm", "name"), _TEXT),
    **dict.fromkeys(("step", "seeds"), _COUNT),
    "ratio": bool,
    **dict.fromkeys(("excess", "low", "high"), (_NUMBER, None)),
}
_RUN = {
    "opdgeo?": _TEXT,
    "command?": [_TEXT],
    "started?": _TEXT,
    "seconds?": (_NUMBER, None),
    "peak_memory_bytes?": (_NUMBER, None),
    "device?": _TEXT,
    "platform?": _TEXT,
    "versions?": {"*": _TEXT},
    "settings?": dict,
    "remarks?": [_TEXT],
    "arms?": {"*": _PARTS},
    **_PARTS,
}


@dataclass(frozen=True)
class Results:
    """Everything the page may show. Curves, and measurements of very many matrices, are read when they are asked for (`rows`).

    `summary` is the list under `checkpoints` of summary.json; `claims` is None except for `reproduce`;
    `logs` maps a folder under arms/ to its rows, in file order; `whole` maps a diagnostic of whole runs to its list in summary.json;
    `pairs` is the list of pairs of updates there, empty where none were compared.
    """

    measurements: pl.LazyFrame
    curves: pl.LazyFrame
    summary: list[dict[str, Any]]
    run: dict[str, Any]
    claims: dict[str, Any] | None = None
    logs: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    whole: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    pairs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """relate (pairs of updates), reproduce (several arms), track (several checkpoints of one run) or compare (one update)."""
        if self.pairs:
            return "relate"
        if self.claims is not None:
            return "reproduce"
        return "track" if len(self.summary) > 1 else "compare"

    def rows(self, *which: pl.Expr) -> pl.DataFrame:
        """The measurements for which all of `which` hold, in the order of the file.

        Raises:
            ConfigError: the file is damaged.
        """
        return collected(self.measurements.filter(*which), "measurements.parquet")

    def runs(self) -> dict[tuple[str, int], list[dict[str, Any]]]:
        """Checkpoints of the summary by (arm, seed), each in order of training; one run under ("", 0) without arms."""
        return runs(self.summary)


def runs(summary: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """Group the summary's checkpoints by (arm, seed), arms in their fixed order, checkpoints by step."""
    grouped: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for one in summary:
        grouped.setdefault(arm_of(one["checkpoint"]), []).append(one)
    for checkpoints in grouped.values():
        if all(c.get("step") is not None for c in checkpoints):
            checkpoints.sort(key=lambda c: c["step"])
    order = {arm: i for i, arm in enumerate(arm_order({arm for arm, _ in grouped}))}
    return dict(sorted(grouped.items(), key=lambda item: (order[item[0][0]], item[0][1])))


def load(out: Path) -> Results:
    """Read and check the data files in `out`.

    Raises ConfigError when a file is missing, unreadable or not of the expected shape.
    """
    out = Path(out)
    if not out.is_dir():
        raise ConfigError(
            f"{out} is not a folder; expected the output folder of a run. "
            "Try `opdgeo compare BASE TUNED -o OUT` first, then `opdgeo report OUT`."
        )
    measurements = _scan(out / "measurements.parquet", MEASUREMENTS)
    if collected(measurements.select(pl.len()), out / "measurements.parquet").item() <= AT_ONCE:
        measurements = collected(measurements, out / "measurements.parquet").lazy()
    curves = _scan(out / "curves.parquet", CURVES)
    stored = _json(out / "summary.json")
    summary, whole = summary_of(stored, out / "summary.json"), whole_runs(stored, out / "summary.json")
    run = _json(out / "run.json")
    _check(run, _RUN, out / "run.json", "it")
    claims, logs = None, {}
    if (out / "claims.json").exists():
        claims = claims_of(_json(out / "claims.json"), out / "claims.json")
        for arm in sorted(p for p in (out / "arms").glob("*") if p.is_dir() and not p.name.startswith(".")):
            logs[arm.name] = _lines(arm / "log.jsonl")
    return Results(measurements, curves, summary, run, claims, logs, whole, pairs_of(stored, out / "summary.json"))


def summary_and_run(out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of summary.json and run.json; ConfigError where one is missing or of another shape."""
    summary, run = _json(out / "summary.json"), _json(out / "run.json")
    summary_of(summary, out / "summary.json")
    pairs_of(summary, out / "summary.json")
    whole_runs(summary, out / "summary.json")
    _check(run, _RUN, out / "run.json", "it")
    return summary, run


def load_summary(source: Path | str | dict[str, Any]) -> list[dict[str, Any]]:
    """The checkpoints of a summary given as the object itself or as the folder that holds summary.json."""
    if isinstance(source, dict):
        return summary_of(source, Path("summary"))
    path = Path(source) / "summary.json"
    return summary_of(_json(path), path)


def load_whole_runs(source: Path | str | dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What a summary tells of whole runs; it is given as the object itself or as the folder that holds summary.json."""
    if isinstance(source, dict):
        return whole_runs(source, Path("summary"))
    path = Path(source) / "summary.json"
    return whole_runs(_json(path), path)


def load_claims(source: Path | str | dict[str, Any]) -> dict[str, Any]:
    """The claims given as the object itself or as the folder that holds claims.json."""
    if isinstance(source, dict):
        return claims_of(source, Path("claims"))
    path = Path(source) / "claims.json"
    return claims_of(_json(path), path)


def summary_of(data: Any, path: Path) -> list[dict[str, Any]]:
    """Check the shape that the readers rely on; ConfigError otherwise."""
    checkpoints = data.get("checkpoints") if isinstance(data, dict) else None
    if not isinstance(checkpoints, list) or not checkpoints:
        raise _broken(path, "no list of checkpoints", '{"checkpoints": [...]} with at least one')
    _check(checkpoints, [_CHECKPOINT], path, "checkpoints")
    return checkpoints


def pairs_of(data: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The pairs of updates in a summary, none where there are none; ConfigError for another shape."""
    pairs: list[dict[str, Any]] = data.get("pairs", [])
    _check(pairs, [_PAIR], path, "pairs")
    return pairs


def whole_runs(data: Any, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of a summary that tell of whole runs, by diagnostic; ConfigError for another shape."""
    found = {name: data.get(name, []) for name in of_runs()}
    for name, rows in found.items():
        _check(rows, [_LOCKING], path, name)
        if any(len({len(row[key]) for key in ("thresholds", "step", "null_step", "median_step")}) > 1 for row in rows):
            raise _broken(path, f"lists of different lengths under {name}", "as many steps as thresholds")
    return found


def _check(found: Any, shape: Any, path: Path, where: str) -> None:
    """Hold `found` against a shape: a type, several of them, a list of one shape, or a dictionary of shapes. There "*" stands for any
    key, and "key?" for one that may be missing. A number is finite."""
    if isinstance(shape, tuple) and shape != _NUMBER:
        if found is None and None in shape:
            return
        shape = shape[0]
    if isinstance(shape, list):
        if not isinstance(found, list):
            raise _broken(path, f"{where} is {_kind(found)}", "a list")
        for index, one in enumerate(found):
            _check(one, shape[0], path, f"{where}[{index}]")
    elif isinstance(shape, dict):
        if not isinstance(found, dict):
            raise _broken(path, f"{where} is {_kind(found)}", "an object")
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if key == "*":
                for each, one in found.items():
                    _check(one, inner, path, f"{where}.{each}")
            elif name in found:
                _check(found[name], inner, path, f"{where}.{name}")
            elif name == key:
                raise _broken(path, f"{where} without {name}", f"{name} in it")
    elif not isinstance(found, shape) or (isinstance(found, bool) and shape in (_NUMBER, _COUNT)):
        raise _broken(path, f"{where} is {_kind(found)}", _WORDS.get(shape, "another type"))
    elif isinstance(found, int) and abs(found) >= 1 << 63:
        raise _broken(path, f"{where} is a whole number of {found.bit_length()} bits", "a number of at most 63")
    elif isinstance(found, float) and not math.isfinite(found):
        raise _broken(path, f"{where} is {found}", "a finite number")
    elif isinstance(found, str) and not found.isascii() and found.encode(errors="ignore").decode() != found:
        raise _broken(path, f"{where} holds half of a surrogate pair", "text")


_WORDS: dict[Any, str] = {_NUMBER: "a number", _COUNT: "a whole number", _TEXT: "a text", dict: "an object"}


def _kind(found: Any) -> str:
    return "null" if found is None else f"a {type(found).__name__}"


def claims_of(data: Any, path: Path) -> dict[str, Any]:
    """Check the shape that the readers rely on; ConfigError otherwise."""
    if not isinstance(data, dict) or not isinstance(data.get("claims"), list):
        raise _broken(path, "no list of claims", '{"claims": [...]}')
    _check(data["claims"], [_CLAIM], path, "claims")
    _check(data.get("from_null", []), [_FROM_NULL], path, "from_null")
    _check(data.get("related", []), [_RELATED], path, "related")
    return dict(data)


def _broken(path: Path | str, arrived: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{path}: {arrived}; expected {expected}. The file is not one that this version of opdgeo wrote: run the command again that made it."
    )


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is missing; expected the data files of a finished run. "
        "Check the folder, or run `opdgeo compare`, `track`, `relate` or `reproduce` again with the same -o."
    )


def _table(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    return collected(_scan(path, columns), path)


def collected(table: pl.LazyFrame, path: Path | str) -> pl.DataFrame:
    """The rows of a table of the file `path`; ConfigError where it is damaged."""
    try:
        return table.collect()
    except _BROKEN as problem:
        raise _unreadable(path, problem) from problem


def _scan(path: Path, columns: tuple[str, ...]) -> pl.LazyFrame:
    """A table whose columns are known and whose rows are not read yet."""
    if not path.is_file():
        raise _missing(path)
    try:
        table = pl.scan_parquet(path)
        there = table.collect_schema()
    except _BROKEN as problem:
        raise _unreadable(path, problem) from problem
    lacking = [c for c in columns if c not in there]
    if lacking:
        raise _broken(path, f"no column {', '.join(lacking)}", "the columns " + ", ".join(columns))
    for column, dtype in there.items():
        if column in _TYPES and dtype != _TYPES[column]:
            raise _broken(path, f"the column {column} is {dtype}", str(_TYPES[column]))
    return table


def _unreadable(path: Path | str, problem: Exception) -> ConfigError:
    return _broken(path, f"unreadable ({str(problem).splitlines()[0]})", "a parquet table")


def _json(path: Path) -> Any:
    if not path.is_file():
        raise _missing(path)
    _check_size(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise _broken(path, f"unreadable ({problem})", "JSON") from problem


def _check_size(path: Path) -> None:
    if (size := path.stat().st_size) > LONGEST:
        raise _broken(path, f"{size} bytes", f"at most {LONGEST}")


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _missing(path)
    rows = []
    _check_size(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as problem:
        raise _broken(path, f"unreadable ({problem})", "UTF-8 text, one JSON object a line") from problem
    for index, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as problem:
            raise _broken(path, f"line {index} is unreadable ({problem})", "one JSON object a line") from problem
        if not isinstance(row, dict):
            raise _broken(path, f"line {index} is a {type(row).__name__}", "one JSON object a line")
        rows.append(row)
    return rows

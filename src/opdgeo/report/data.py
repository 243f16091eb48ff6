"""The data files of one output folder, checked as they are read. The report knows nothing else."""

from __future__ import annotations

import json
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


@dataclass(frozen=True)
class Results:
    """Everything the page may show.

    `summary` is the list under `checkpoints` of summary.json; `claims` is None except for `reproduce`;
    `logs` maps a folder under arms/ to its rows, in file order; `whole` maps a diagnostic of whole runs to its list in summary.json;
    `pairs` is the list of pairs of updates there, empty where none were compared.
    """

    measurements: pl.DataFrame
    curves: pl.DataFrame
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
    measurements = _table(out / "measurements.parquet", MEASUREMENTS)
    curves = _table(out / "curves.parquet", CURVES)
    stored = _json(out / "summary.json")
    summary, whole = summary_of(stored, out / "summary.json"), whole_runs(stored, out / "summary.json")
    run = _json(out / "run.json")
    if not isinstance(run, dict):
        raise _broken(out / "run.json", f"a {type(run).__name__}", "a JSON object")
    claims, logs = None, {}
    if (out / "claims.json").exists():
        claims = claims_of(_json(out / "claims.json"), out / "claims.json")
        for arm in sorted(p for p in (out / "arms").glob("*") if p.is_dir() and not p.name.startswith(".")):
            logs[arm.name] = _lines(arm / "log.jsonl")
    return Results(measurements, curves, summary, run, claims, logs, whole, pairs_of(stored, out / "summary.json"))


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
    for one in checkpoints:
        _check_diagnostics(one, path)
    return checkpoints


def pairs_of(data: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The pairs of updates in a summary, none where there are none; ConfigError for another shape."""
    pairs = data.get("pairs", [])
    if not isinstance(pairs, list):
        raise _broken(path, f"{type(pairs).__name__} under pairs", "a list")
    for one in pairs:
        _check_diagnostics(one, path, "together")
        if not isinstance(one.get("other"), str):
            raise _broken(path, "a pair without the name of the other", 'a string under "other"')
    return pairs


def _check_diagnostics(one: Any, path: Path, *more: str) -> None:
    if not isinstance(one, dict) or not isinstance(one.get("checkpoint"), str):
        raise _broken(path, "a checkpoint without a name", 'a string under "checkpoint"')
    rows = one.get("diagnostics")
    needed = ("diagnostic", "variant", "mean", "computed", "total", "null", *more)
    if not isinstance(rows, list) or any(not isinstance(r, dict) or any(k not in r for k in needed) for r in rows):
        raise _broken(path, f"{one['checkpoint']!r} without its diagnostics", "rows with " + ", ".join(needed))


def whole_runs(data: Any, path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lists of a summary that tell of whole runs, by diagnostic; ConfigError for another shape."""
    lists = ("thresholds", "step", "null_step", "median_step")

    def sound(row: Any) -> bool:
        if not isinstance(row, dict) or not {"run", "side", "rank", *lists} <= set(row):
            return False
        return all(isinstance(row[k], list) and len(row[k]) == len(row["thresholds"]) for k in lists)

    found = {name: data.get(name, []) for name in of_runs()}
    for name, rows in found.items():
        if not isinstance(rows, list) or not all(map(sound, rows)):
            raise _broken(path, f"{name!r} of another shape", "rows with run, side, rank, " + ", ".join(lists))
    return found


def claims_of(data: Any, path: Path) -> dict[str, Any]:
    """Check the shape that the readers rely on; ConfigError otherwise."""
    claims = data.get("claims") if isinstance(data, dict) else None
    needed = ("id", "claim", "verdict", "rule", "measured")
    if not isinstance(claims, list) or any(not isinstance(c, dict) or any(k not in c for k in needed) for c in claims):
        raise _broken(path, "no list of claims", '{"claims": [...]}, each with ' + ", ".join(needed))
    return dict(data)


def _broken(path: Path, arrived: str, expected: str) -> ConfigError:
    return ConfigError(
        f"{path}: {arrived}; expected {expected}. The file is not one that this version of opdgeo wrote: run the command again that made it."
    )


def _missing(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is missing; expected the data files of a finished run. "
        "Check the folder, or run `opdgeo compare`, `track`, `relate` or `reproduce` again with the same -o."
    )


def _table(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    if not path.is_file():
        raise _missing(path)
    try:
        table = pl.read_parquet(path)
    except Exception as problem:  # polars raises several families for a broken file
        raise _broken(path, f"unreadable ({str(problem).splitlines()[0]})", "a parquet table") from problem
    lacking = [c for c in columns if c not in table.columns]
    if lacking:
        raise _broken(path, f"no column {', '.join(lacking)}", "the columns " + ", ".join(columns))
    return table


def _json(path: Path) -> Any:
    if not path.is_file():
        raise _missing(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise _broken(path, f"unreadable ({problem})", "JSON") from problem


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise _missing(path)
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except ValueError as problem:
        raise _broken(path, f"unreadable ({problem})", "UTF-8 text, one JSON object a line") from problem
    for index, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise _broken(path, f"line {index} is unreadable ({problem})", "one JSON object a line") from problem
        if not isinstance(row, dict):
            raise _broken(path, f"line {index} is a {type(row).__name__}", "one JSON object a line")
        rows.append(row)
    return rows

"""What earlier runs of a folder measured: a killed run goes on from its finished matrices, a finished one from its tables.

An unfinished run keeps one file a matrix in OUT/.parts, named by a digest of everything but the settings that its rows
depend on: the files it was read from (path, size, time of change), the program and the libraries that compute. What no
longer matches is simply not found. A finished run has the same digest in `run.json` and its rows in the tables. The settings
stand beside the rows, so that only what reads a changed one is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.errors import ConfigError
from opdgeo.survey.measure import Measured
from opdgeo.survey.results import PARTS, load_result, write_json

COMPUTING = ("checkpoints", "numerics", "diagnostics", "survey")
LIBRARIES = ("torch", "numpy", "scipy")


Stamp = list[tuple[str, int, int]]


def stamp(checkpoint: Checkpoint) -> Stamp:
    """Path, size and time of change of every file of a checkpoint."""
    return [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.files]


def inputs(stamps: Sequence[Stamp], checkpoints: Sequence[Checkpoint], trajectory: bool, device: str) -> str:
    """A digest of everything but the settings that a run's rows depend on."""
    names = [(c.name, c.step, c.config) for c in checkpoints]  # a config says how fused tensors are divided
    run = [_program(), [version(library) for library in LIBRARIES], trajectory, device, names, list(stamps)]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()


class Parts:
    """The earlier work of the folder `out`; with None nothing is found and nothing kept.

    `inputs` is the digest of what this run measures, whatever its settings.
    """

    def __init__(
        self, out: Path | None, checkpoints: Sequence[Checkpoint], *, trajectory: bool, device: str,
        stamps: Sequence[Stamp] | None = None,
    ):  # fmt: skip
        self.inputs = inputs(stamps or [stamp(c) for c in checkpoints], checkpoints, trajectory, device)
        self.folder = out / PARTS if out else None
        self.finished = _finished(out, self.inputs) if out else {}

    def _path(self, matrix: Matrix) -> Path | None:
        key = hashlib.sha256(f"{self.inputs} {json.dumps(asdict(matrix))}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.json" if self.folder else None

    def load(self, matrix: Matrix) -> Measured | None:
        """What an earlier run measured of `matrix`, or None."""
        path = self._path(matrix)
        with suppress(OSError, ValueError, TypeError):
            if path and path.exists():
                return Measured(**json.loads(path.read_text()))
        return self.finished.get(matrix.name)

    def save(self, matrix: Matrix, measured: Measured) -> None:
        path = self._path(matrix)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, vars(measured))


def _finished(out: Path, inputs: str) -> dict[str, Measured]:
    """The matrices of a finished run of the same inputs in `out`."""
    with suppress(ConfigError):
        result = load_result(out)
        if result.run.get("inputs") == inputs:
            rows, curves = (_by_matrix(table) for table in (result.measurements, result.curves))
            return {m: Measured(found, curves.get(m, []), result.run["settings"]) for m, found in rows.items()}
    return {}


def _by_matrix(table: Any) -> dict[str, list[dict[str, Any]]]:
    return {name: part.to_dicts() for (name,), part in table.partition_by("matrix", as_dict=True).items()}


@cache
def _program() -> str:
    """A digest of the source files that numbers depend on."""
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(f for part in COMPUTING for f in (package / part).rglob("*.py")):
        digest.update(f"{file.relative_to(package)} ".encode() + file.read_bytes())
    return digest.hexdigest()

"""What earlier runs of a folder measured: a killed run goes on from its finished matrices, a finished one from its tables.

An unfinished run keeps a journal in OUT/.parts, a line a matrix, named by a digest of everything but the settings that its rows
depend on: the files it was read from (path, size, inode, times of change), the program and the libraries that compute. What no
longer matches is simply not found. The lines are where a run's rows wait for the tables, so that thousands of matrices take no memory.
A finished run has the same digest in `run.json` and its rows in the tables, and the hashes of the files that it measured, which
are compared before a row is taken over. The settings stand beside the rows, so that only what reads a changed one is measured again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import DIAGNOSTICS, Settings
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.files import Journal, remove_orphans
from opdgeo.machine import version
from opdgeo.survey.measure import Measured, outdated
from opdgeo.survey.results import PARTS, frames, load_result

PROVENANCE = (
    *("opdgeo", "command", "started", "seconds", "peak_memory_bytes", "versions", "platform", "device"),
    *("timings", "seconds_by_shape"),
)
"""The keys of run.json that are kept of a run whose numbers another one takes over."""
COMPUTING = ("checkpoints", "numerics", "diagnostics", "survey")
LIBRARIES = ("torch", "numpy", "scipy")


Stamp = list[tuple[str, int, int, int, int]]


def stamp(checkpoint: Checkpoint) -> Stamp:
    """Path, size, inode and times of change of every file of a checkpoint.

    A file's owner can set the time of its content's change (mtime), as copying does; that of its inode's (ctime) nobody sets.

    Raises:
        CheckpointError: a file has gone.
    """
    found = []
    for file in checkpoint.files:
        try:
            status = file.stat()
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read any more ({error.strerror}). Copy it again.") from error
        found.append((str(file.resolve()), status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns))
    return found


def require_unchanged(checkpoints: Sequence[Checkpoint], stamps: Sequence[Stamp], *, gone: bool = False) -> None:
    """Check that the files are those of `stamps`, so that what was measured and what was hashed are the same bytes.

    `gone`: they may have been deleted since, as a run that is followed does.

    Raises:
        CheckpointError: a file was changed or replaced, or deleted.
    """
    for checkpoint, known in zip(checkpoints, stamps, strict=True):
        for before in known:
            file = Path(before[0])
            with suppress(OSError):
                now = file.stat()
                if before[1:] == (now.st_size, now.st_ino, now.st_mtime_ns, now.st_ctime_ns):
                    continue
            if gone and not file.exists():
                continue
            raise CheckpointError(
                f"{file} of {checkpoint.path} was changed or replaced while it was measured; expected the same file from the beginning "
                "to the end. Give the command again when nothing writes there."
            )


def inputs(
    stamps: Sequence[Stamp], checkpoints: Sequence[Checkpoint], trajectory: bool, device: str, *, pairs: bool = False
) -> str:
    """A digest of everything but the settings that a run's rows depend on."""
    names = [(c.name, c.step, c.config) for c in checkpoints]  # a config says how fused tensors are divided
    run = [_program(), [version(library) for library in LIBRARIES], trajectory, device, names, list(stamps), pairs]
    return hashlib.sha256(json.dumps(run).encode()).hexdigest()


class Parts:
    """The earlier work of the folder `out`; with None nothing is found and nothing kept.

    `inputs` is the digest of what this run measures, whatever its settings.
    """

    def __init__(
        self, out: Path | None, checkpoints: Sequence[Checkpoint], *, trajectory: bool, device: str,
        stamps: Sequence[Stamp] | None = None, pairs: bool = False,
    ):  # fmt: skip
        self.stamps = list(stamps or [stamp(c) for c in checkpoints])
        self.inputs = inputs(self.stamps, checkpoints, trajectory, device, pairs=pairs)
        self.folder = out / PARTS if out else None
        self.finished, self.manifests, self.earlier = (
            _finished(out, self.inputs, checkpoints) if out else ({}, None, [])
        )
        self._kept: dict[Matrix, Measured | tuple[int, int]] = {}  # or its place in the journal
        self._journal: Journal | None = None
        self._names, self._pairs, self._found = (
            {c.name for c in checkpoints[1:]},
            pairs,
            0,
        )  # bytes of an earlier run's journal
        if self.folder and self.folder.is_dir():
            remove_orphans(self.folder)
            if self._path(self.folder).is_file():
                self._journal = Journal(self._path(self.folder))
                with suppress(OSError):  # a disk that fails keeps nothing
                    for start, line in self._journal.lines():
                        with suppress(ValueError, TypeError, KeyError, RecursionError):  # cut short, or damaged
                            self._kept[Matrix(**json.loads(line)["matrix"])] = start, len(line)
                        self._found = start + len(line)

    def _path(self, folder: Path) -> Path:
        return folder / f"{self.inputs[:32]}.jsonl"

    def load(self, matrix: Matrix) -> Measured | None:
        """What this or an earlier run measured of `matrix`, or None."""
        kept = self._kept.get(matrix)
        if isinstance(kept, tuple) and self._journal:
            with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
                fields = json.loads(self._journal.read(*kept))["measured"]
                found = Measured(**fields | {"rows": _unpacked(fields["rows"]), "curves": _unpacked(fields["curves"])})
                if kept[0] >= self._found or self._is_whole(found):
                    return found
            return None
        return kept if isinstance(kept, Measured) else self.finished.get(matrix.name)

    def _is_whole(self, measured: Measured) -> bool:
        """Whether an earlier run's journal holds rows that the tables take."""
        with suppress(TypeError, ValueError, OverflowError, AttributeError, pl.exceptions.PolarsError):
            outdated(measured.settings, Settings(), ())
            _ = sum(measured.seconds.values())
            return _are_rows(*frames(measured.rows, measured.curves, pairs=self._pairs), self._names)
        return False

    def save(self, matrix: Matrix, measured: Measured) -> None:
        if not self.folder:
            self._kept[matrix] = measured
            return
        if not self._journal:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._journal = Journal(self._path(self.folder))
        fields = vars(measured) | {"rows": _packed(measured.rows), "curves": _packed(measured.curves)}
        line = {"matrix": asdict(matrix), "measured": fields}
        text = json.dumps(line, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
        self._kept[matrix] = self._journal.add(text.encode())


def _packed(rows: list[dict[str, Any]]) -> list[list[Any]]:
    """The names of the columns, then each row as a list."""
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def _unpacked(packed: list[list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(packed[0], row, strict=True)) for row in packed[1:]]


def _are_rows(measurements: pl.DataFrame, curves: pl.DataFrame, checkpoints: set[str]) -> bool:
    """Whether tables hold what a run of these checkpoints, the base not among them, writes, so far as the summary relies on it."""
    keys = measurements.select("checkpoint", "matrix", "role", "rows", "cols", "diagnostic", "variant", "status")
    names = {*measurements["checkpoint"], *curves["checkpoint"]}
    names |= {*measurements["other"].drop_nulls()} if "other" in measurements.columns else set()
    known = set(keys["diagnostic"]) <= DIAGNOSTICS.keys() and names <= checkpoints
    return bool(known and not any(keys.null_count().row(0)) and not curves["matrix"].null_count())


def hashes(manifests: Sequence[Any]) -> list[list[str]]:
    """The SHA-256 of every file of every checkpoint."""
    return [[file["sha256"] for file in manifest["files"]] for manifest in manifests]


def _finished(
    out: Path, inputs: str, checkpoints: Sequence[Checkpoint]
) -> tuple[dict[str, Measured], list[dict[str, Any]] | None, list[dict[str, Any]]]:
    """The matrices of a finished run of the same inputs in `out`, the manifests, which were compared with that run's, and how that
    run and those before it measured them."""
    # No results, or not of the form that we write.
    with suppress(ConfigError, AttributeError, KeyError, TypeError, ValueError):
        result = load_result(out)
        if result.run.get("inputs") == inputs:
            measured = hashes([result.run["base"], *result.run["checkpoints"]])
            manifests = [c.manifest() for c in checkpoints]
            if measured != hashes(manifests):  # other bytes, of which the file system says nothing
                return {}, manifests, []
            if not _are_rows(result.measurements, result.curves, {c.name for c in checkpoints[1:]}):
                return {}, manifests, []
            rows, curves = (_by_matrix(table) for table in (result.measurements, result.curves))
            found = {m: Measured(of, curves.get(m, []), result.run["settings"]) for m, of in rows.items()}
            return found, manifests, _earlier(result.run)
    return {}, None, []


def _earlier(run: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs that measured what `run` holds, the oldest first. One that took over every number measured nothing."""
    before = list(run.get("earlier", []))
    runs = [*before, {key: run[key] for key in PROVENANCE}] if any(run["timings"].values()) else before
    json.dumps(runs, allow_nan=False, ensure_ascii=False).encode()  # as it is written again
    return runs


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

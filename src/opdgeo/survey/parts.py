"""Finished matrices of an unfinished run, so that a killed run goes on where it was.

One file a matrix in OUT/.parts, named by a digest of everything that its rows depend on: the files it was read from (path,
size, time of change), the settings, the program's version. What no longer matches is simply not found.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.diagnostics import Settings
from opdgeo.survey.cache import NUMERICS
from opdgeo.survey.measure import Measured
from opdgeo.survey.results import PARTS, write_json


class Parts:
    """The finished matrices of one run in the folder `out`; with None nothing is kept."""

    def __init__(
        self, out: Path | None, checkpoints: Sequence[Checkpoint], settings: Settings, *, trajectory: bool, device: str
    ):
        self.folder = out / PARTS if out else None
        files = [[(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in c.files] for c in checkpoints]
        names = [(c.name, c.step) for c in checkpoints]
        run = [version("opdgeo"), NUMERICS, settings.to_json(), trajectory, device, names, files]
        self.run = hashlib.sha256(json.dumps(run).encode()).hexdigest()

    def _path(self, matrix: Matrix) -> Path | None:
        key = hashlib.sha256(f"{self.run} {json.dumps(asdict(matrix))}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.json" if self.folder else None

    def load(self, matrix: Matrix) -> Measured | None:
        """What an earlier run measured of `matrix`, or None."""
        path = self._path(matrix)
        with suppress(OSError, ValueError, TypeError):
            if path and path.exists():
                return Measured(**json.loads(path.read_text()))
        return None

    def save(self, matrix: Matrix, measured: Measured) -> None:
        path = self._path(matrix)
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, asdict(measured))

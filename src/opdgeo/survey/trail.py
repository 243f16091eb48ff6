"""What was measured of each checkpoint of a run that is still growing: its rows, and the top-32 factors of ΔW.

One file a matrix and checkpoint in OUT/.parts, named by a digest of what it depends on: the program, the settings, the files of
the base and of the run's checkpoints up to this one, as they were when first seen. A new checkpoint is measured alone; the
similarities of all of them follow from the factors. A checkpoint that the run has deleted since keeps its place.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from opdgeo.checkpoints import Matrix
from opdgeo.files import write_atomically
from opdgeo.numerics.spectra import Spectrum
from opdgeo.survey.cache import NUMBERS, TENSORS
from opdgeo.survey.measure import Step
from opdgeo.survey.results import writing

FIELDS = ("rows", "curves", "increment", "finite")
SPECTRUM = (*NUMBERS, "floor")


@dataclass(frozen=True)
class Trail:
    """The steps in `folder`; `keys` holds one digest a checkpoint."""

    folder: Path
    keys: tuple[str, ...]

    def _path(self, matrix: Matrix, index: int) -> Path:
        key = hashlib.sha256(f"{self.keys[index]} {json.dumps(asdict(matrix))}".encode()).hexdigest()
        return self.folder / f"{key[:32]}.safetensors"

    def load(self, matrix: Matrix, index: int, device: str = "cpu") -> Step | None:
        """What was measured of checkpoint `index`, or None; an unreadable file counts as none."""
        from safetensors import SafetensorError, safe_open

        with suppress(OSError, ValueError, TypeError, KeyError, RecursionError, SafetensorError):
            with safe_open(self._path(matrix, index), framework="pt") as file:
                about = json.loads(file.metadata()["step"])
                spectrum = None
                if about["spectrum"]:
                    found = {t: file.get_tensor(t) for t in TENSORS}
                    found |= {side: found[side].to(device) for side in ("left", "right")}
                    spectrum = Spectrum(**found, **about["spectrum"])
            return Step(**{f: about[f] for f in FIELDS}, spectrum=spectrum)
        return None

    def save(self, matrix: Matrix, index: int, step: Step) -> None:
        import torch
        from safetensors.torch import save_file

        of = step.spectrum
        tensors = {t: getattr(of, t).cpu().contiguous() for t in TENSORS} if of else {"empty": torch.empty(0)}
        about = {f: getattr(step, f) for f in FIELDS}
        about["spectrum"] = {n: getattr(of, n) for n in SPECTRUM} if of else None
        path = self._path(matrix, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        with writing(path):
            write_atomically(path, lambda p: save_file(tensors, p, metadata={"step": json.dumps(about)}))

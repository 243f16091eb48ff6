"""The factorisation of W₀ on disk, by content: another checkpoint of the same base reads what the first one computed.

One file an entry, named by a digest of the stored weights, the rank and the version of the numerics; with the spectrum it holds
the thresholds of the masks that were made, which cost several passes to find and one to use. Files appear whole
(written aside, then renamed) and may vanish at any time, so that several processes can share the folder; the least
recently used go first once it holds more than the limit.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from opdgeo.errors import ConfigError
from opdgeo.numerics.masks import Threshold
from opdgeo.numerics.spectra import Spectrum
from opdgeo.survey.results import write_atomically

NUMERICS = "3"  # raise it when the same weights would give another spectrum, or the file another form
TENSORS, NUMBERS = ("sigma", "errors", "left", "right"), ("error", "method", "residual", "gram", "tail_bound")
SMALLEST = 1 << 16  # entries; a smaller matrix is factored sooner than it is found


class SpectrumCache:
    """A folder of spectra of at most `limit` bytes.

    Defaults: `$OPDGEO_CACHE`, else `opdgeo/spectra` in the user's cache folder; `$OPDGEO_CACHE_GB`, else 20 GB.

    Raises:
        ConfigError: `$OPDGEO_CACHE_GB` is not a number.
    """

    def __init__(self, folder: Path | None = None, limit: int | None = None):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self.folder = folder or Path(os.environ.get("OPDGEO_CACHE") or home / "opdgeo" / "spectra")
        asked = os.environ.get("OPDGEO_CACHE_GB", "20")
        try:
            self.limit = limit if limit is not None else int(float(asked) * 1e9)
        except ValueError:
            raise ConfigError(f"OPDGEO_CACHE_GB is {asked!r}; expected a number of gigabytes such as 20.") from None

    def path(self, weights: Tensor, rank: int) -> Path | None:
        """Where the spectrum of these stored weights is kept; None for a matrix too small to keep."""
        if weights.numel() < SMALLEST:
            return None
        digest = hashlib.sha256(f"{NUMERICS} {rank} {weights.dtype} {tuple(weights.shape)} ".encode())
        digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def load(self, path: Path | None, device: str = "cpu") -> tuple[Spectrum, dict[str, Threshold]] | None:
        """The spectrum and the masks' thresholds, or None where there is none; an unreadable file is removed."""
        from safetensors import SafetensorError, safe_open

        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, framework="pt", device=device) as file:
                numbers, limits = (json.loads(file.metadata()[key]) for key in ("spectrum", "thresholds"))
                found = Spectrum(**{t: file.get_tensor(t) for t in TENSORS}, **{n: numbers[n] for n in NUMBERS})
            thresholds = {name: Threshold(**limit) for name, limit in limits.items()}
            os.utime(path)
        except FileNotFoundError:
            return None
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError):
            path.unlink(missing_ok=True)
            return None
        return found, thresholds

    def save(self, path: Path | None, spectrum: Spectrum, thresholds: dict[str, Threshold]) -> None:
        """Keep a spectrum and the masks' thresholds, and drop the least recently used beyond the limit. A folder that cannot be written is no error."""
        from safetensors.torch import save_file

        if path is None:
            return
        tensors = {t: getattr(spectrum, t).cpu().contiguous() for t in TENSORS}
        if sum(t.numel() * t.element_size() for t in tensors.values()) > self.limit:
            return
        metadata = {
            "spectrum": json.dumps({n: getattr(spectrum, n) for n in NUMBERS}),
            "thresholds": json.dumps({name: asdict(threshold) for name, threshold in thresholds.items()}),
        }
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
            self._trim(self.limit)

    def entries(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of every entry, oldest first."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(FileNotFoundError):
                status = path.stat()
                found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def clear(self) -> int:
        """Remove every entry; returns the bytes freed."""
        return self._trim(0)

    def _trim(self, limit: int) -> int:
        entries, freed = self.entries(), 0
        total = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if total - freed <= limit:
                break
            path.unlink(missing_ok=True)
            freed += size
        return freed

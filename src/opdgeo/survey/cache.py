"""The factorisation of W₀ on disk, by content: another checkpoint of the same base reads what the first one computed.

One file an entry, named by a digest of the stored weights, the rank and the version of the numerics; with the spectrum it holds
the thresholds of the masks that were made, which cost several passes to find and one to use. Files appear whole
(`files.atomic_path`) and may vanish at any time, so that several processes can share the folder; the least recently used go
first once it holds more than the limit.

An entry carries a mark, in its name and its header, and nothing without it is ever removed: the folder may be one that holds
other files, such as a model. A folder that is made here gets a CACHEDIR.TAG (bford.info/cachedir), so that backups leave it
out. An entry carries a checksum too; one that does not match counts as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from opdgeo.errors import ConfigError
from opdgeo.files import remove_orphans, write_atomically
from opdgeo.numerics.masks import Threshold
from opdgeo.numerics.spectra import Spectrum

NUMERICS = "3"  # raise it when the same weights would give another spectrum, or the file another form
TENSORS, NUMBERS = ("sigma", "errors", "left", "right"), ("error", "method", "residual", "gram", "tail_bound")
MARK = "opdgeo", "spectrum"  # key and value in the header of every entry
ENTRY = re.compile(r"[0-9a-f]{64}\.safetensors")
TAG = "Signature: 8a477f597d28d172789f06886806bc55\n# Factors of base checkpoints, kept by opdgeo; `opdgeo cache clear` removes them.\n"
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

    def path(self, weights: Tensor, rank: int, device: str = "cpu") -> Path | None:
        """Where the spectrum of these stored weights is kept, as `device` computes it; None for a matrix too small to keep.

        A GPU's differs from a CPU's within the errors: each reads its own, or a result would hang on what ran before it.
        """
        if weights.numel() < SMALLEST:
            return None
        kind = "" if device == "cpu" else f"{device.partition(':')[0]} "
        digest = hashlib.sha256(f"{NUMERICS} {rank} {weights.dtype} {tuple(weights.shape)} {kind}".encode())
        digest.update(weights.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return self.folder / f"{digest.hexdigest()}.safetensors"

    def load(self, path: Path | None, device: str = "cpu") -> tuple[Spectrum, dict[str, Threshold]] | None:
        """The spectrum and the masks' thresholds, or None where there is none or its checksum does not match."""
        from safetensors import SafetensorError, safe_open

        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {t: file.get_tensor(t) for t in TENSORS}
            if metadata.get("checksum") != _checksum(path, tensors, metadata):
                return None
            numbers, limits = (json.loads(metadata[key]) for key in ("spectrum", "thresholds"))
            found = Spectrum(
                **{t: tensor.to(device) for t, tensor in tensors.items()}, **{n: numbers[n] for n in NUMBERS}
            )
            thresholds = {name: Threshold(**limit) for name, limit in limits.items()}
            os.utime(path)
        except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError, RuntimeError):
            return None  # what is computed instead takes its place
        return found, thresholds

    def save(self, path: Path | None, spectrum: Spectrum, thresholds: dict[str, Threshold]) -> None:
        """Keep a spectrum and the masks' thresholds, and drop the least recently used beyond the limit. A folder that cannot be written is no error."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        if path is None:
            return
        tensors = {t: getattr(spectrum, t).cpu().contiguous() for t in TENSORS}
        if sum(t.numel() * t.element_size() for t in tensors.values()) > self.limit:
            return
        metadata = {
            MARK[0]: MARK[1],
            "spectrum": json.dumps({n: getattr(spectrum, n) for n in NUMBERS}),
            "thresholds": json.dumps({name: asdict(threshold) for name, threshold in thresholds.items()}),
        }
        metadata["checksum"] = _checksum(path, tensors, metadata)
        with suppress(OSError, SafetensorError):  # a full disk too: what is not kept is computed again
            if not self.folder.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                write_atomically(self.folder / "CACHEDIR.TAG", lambda p: p.write_text(TAG))
            write_atomically(path, lambda p: save_file(tensors, p, metadata=metadata))
            self._trim(self.limit)

    def entries(self) -> list[tuple[Path, int, float]]:
        """Path, bytes and time of last use of every entry, oldest first."""
        return [entry for entry in self._named() if _is_marked(entry[0])]

    def clear(self) -> int:
        """Remove every entry, and what killed writers left; returns the bytes freed. Nothing else in the folder is touched."""
        return self._trim(-1)

    def _named(self) -> list[tuple[Path, int, float]]:
        """As `entries`, by their names alone."""
        found = []
        for path in self.folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.lstat()
                if ENTRY.fullmatch(path.name) and stat.S_ISREG(status.st_mode):
                    found.append((path, status.st_size, status.st_mtime))
        return sorted(found, key=lambda entry: entry[2])

    def _trim(self, limit: int) -> int:
        freed = remove_orphans(self.folder)
        if sum(size for _, size, _ in self._named()) <= limit:
            return freed
        entries = self.entries()
        total = sum(size for _, size, _ in entries)
        for path, size, _ in entries:
            if total <= limit:
                break
            path.unlink(missing_ok=True)
            total, freed = total - size, freed + size
        return freed


def _checksum(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Of all that an entry says, and of its name: an entry under another's name is none."""
    digest = hashlib.blake2b(path.stem.encode(), digest_size=16)
    for name in TENSORS:
        digest.update(f" {name} {tensors[name].dtype} {tuple(tensors[name].shape)} ".encode())
        digest.update(tensors[name].contiguous().view(torch.uint8).numpy().data)
    for key in ("spectrum", "thresholds"):
        digest.update(f" {key} {metadata[key]}".encode())
    return digest.hexdigest()


def _is_marked(path: Path) -> bool:
    """Whether the header of a safetensors file has the mark of an entry."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= 1 << 20 else {}
        return bool(header["__metadata__"][MARK[0]] == MARK[1])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False

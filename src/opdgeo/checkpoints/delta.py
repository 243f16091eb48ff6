"""Chains of weight deltas, as slime and miles publish them and SGLang's `/pull_weights` applies them.

A run is a folder of `weight_vNNNNNN`, each in the shape of a Hugging Face folder whose index says that it is a delta: its
`metadata` has `version`, the `base_version` it builds on (0 is the checkpoint that training started from), `delta_encoding`,
`compression_format` (zstd) and `checksum_format`. A shard holds a zstd frame for every tensor with changed bytes, and in its
metadata the checksum of each tensor's new bytes:

    xor        new bytes ⊕ old bytes, as long as the tensor
    overwrite  how many bytes changed (u4), where (u4 each), and the new bytes

Bytes are put in place, nothing is added: a version is rebuilt to the bit, and its checksum says so. A folder without
`delta_encoding` is a whole checkpoint, from which the chain goes on.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from opdgeo.checkpoints.checkpoint import Checkpoint, open_weights
from opdgeo.checkpoints.huggingface import INDEX, is_plain, read_header, read_json
from opdgeo.checkpoints.names import plain
from opdgeo.checkpoints.stored import SIZES, Raw, Stored, opened
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

_held = threading.local()  # the tensor that a thread rebuilt last: the next version goes on from there


@dataclass(frozen=True, eq=False)
class Delta:
    """One version's changes: for every changed tensor where its frame lies and the checksum of its new bytes."""

    folder: Path
    base_version: int
    encoding: str
    checksum: str
    frames: dict[str, Raw]
    sums: dict[str, str]

    def apply(self, name: str, state: np.ndarray) -> None:
        """Turn the bytes of a tensor into those of this version, in place.

        Raises:
            CheckpointError: a damaged file, or bytes that are not those the delta was made from.
        """
        import numpy as np

        if name not in self.frames:
            return
        found = np.frombuffer(self._frame(name, 4 + 5 * state.size), np.uint8)
        if self.encoding == "xor":
            if found.size != state.size:
                self._other_base(name, f"it is for {found.size} bytes, and the tensor before it has {state.size}")
            state ^= found
        else:
            count = int(found[:4].view("<u4")[0]) if found.size >= 4 else -1
            if found.size != 4 + 5 * count:
                raise CheckpointError(f"{self.frames[name].file} has a damaged {name}. Copy it again.")
            where = found[4 : 4 + 4 * count].view("<u4")
            if count and int(where.max()) >= state.size:
                self._other_base(name, f"it changes byte {int(where.max())}, and the tensor before it has {state.size}")
            state[where] = found[4 + 4 * count :]
        if CHECKSUMS[self.checksum](state) != self.sums.get(name):
            self._other_base(name, f"the new bytes have another {self.checksum} checksum than it states")

    def _frame(self, name: str, limit: int) -> bytes:
        import pyarrow

        stored = self.frames[name]
        if len(stored.shape) != 1 or stored.dtype != "U8":
            raise CheckpointError(
                f"cannot read the delta of {name} from {stored.file}: it is {stored.dtype} {list(stored.shape)}; "
                "expected a frame of bytes."
            )
        try:
            with opened(stored.file) as file:
                frame = pyarrow.py_buffer(file.read(stored.offset, stored.shape[0]))
            with pyarrow.CompressedInputStream(pyarrow.BufferReader(frame), "zstd") as stream:
                found = stream.read(limit + 1)  # never more than the tensor can need
        except (OSError, pyarrow.ArrowException) as error:
            raise CheckpointError(f"cannot read the delta of {name} from {stored.file}: {error}") from error
        if len(found) > limit:
            self._other_base(name, f"it is longer than a change of {limit} bytes")
        return found

    def _other_base(self, name: str, why: str) -> NoReturn:
        raise CheckpointError(
            f"the delta of {name} in {self.folder} does not fit what it should change: {why}. Is BASE the checkpoint, "
            "in the same dtype, that the run started from, and is every version of the run as it was written?"
        )


@dataclass(frozen=True)
class Patched:
    """A tensor after a chain of deltas."""

    name: str
    source: Stored
    chain: tuple[Delta, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def quantised(self) -> str | None:
        return self.source.quantised

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(d.frames[self.name].file for d in self.chain if self.name in d.frames)

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        if self.dtype not in SIZES:
            raise CheckpointError(f"{self.name} is stored as {self.dtype}; expected one of {', '.join(SIZES)}.")
        name, source, chain, state = getattr(_held, "last", (None, None, (), None))
        if state is None or (name, source) != (self.name, self.source) or self.chain[: len(chain)] != chain:
            whole = self.source[(slice(None),) * len(self.shape)].contiguous()
            chain, state = (), whole.view(torch.uint8).flatten().numpy().copy()
        _held.last = (None, None, (), None)  # what fails half-way is not gone on from
        for delta in self.chain[len(chain) :]:
            delta.apply(self.name, state)
        _held.last = (self.name, self.source, self.chain, state)
        return torch.from_numpy(state).view(getattr(torch, self.dtype)).reshape(self.shape)[index].clone()


@dataclass(frozen=True, kw_only=True)
class Version(Checkpoint):
    """A version of a run that is stored as a chain of deltas.

    Attributes:
        chain: the deltas from the last whole checkpoint on.
    """

    chain: tuple[Delta, ...]

    @property
    def files(self) -> list[Path]:
        return sorted({f for d in self.chain for f in (d.folder / INDEX, *{frame.file for frame in d.frames.values()})})

    def manifest(self) -> dict[str, Any]:
        """The files of this version; their checksums hold for all that the earlier ones changed in the same tensors."""
        last = Checkpoint(self.path, {}, self.config, self.notes, self.format)
        own = [f for f in self.files if f.parent == self.path]
        return last.manifest() | {"files": last.manifest_of(own), "base_version": self.chain[-1].base_version}


def is_delta(path: Path) -> bool:
    """Whether a folder holds a delta to another version."""
    index = path / INDEX
    return index.is_file() and "delta_encoding" in _metadata(index, index.stat().st_mtime_ns)


def open_version(path: Path, base: Checkpoint) -> Version:
    """Open one version on what the run started from, reading indices and headers only.

    Raises:
        CheckpointError: a damaged index, an encoding that is not known, or a version before it that is missing.
    """
    chain: list[Delta] = []
    passed: set[Path] = set()
    folder, source = path, base
    while True:
        chain.append(_read(folder, (folder / INDEX).stat().st_mtime_ns))
        passed.add(folder)
        version = chain[-1].base_version
        if version == 0:
            break
        earlier = folder.with_name(f"weight_v{version:06d}")
        if earlier in passed or not earlier.is_dir():
            raise CheckpointError(
                f"{folder} builds on version {version}, and {earlier} is missing. A version can be rebuilt from all before it."
            )
        if not is_delta(earlier):
            source = open_weights(earlier)
            break
        folder = earlier
    deltas = tuple(reversed(chain))
    tensors, lacking = dict(source.tensors), []
    for name in dict.fromkeys(n for d in deltas for n in d.frames):
        own = next((n for n in (name, plain(name)) if n in tensors), None)
        if own is None:
            lacking.append(name)
        else:
            tensors[own] = Patched(name, source.tensors[own], deltas)
    notes = (
        (f"{path} changes {len(lacking)} tensors that {source.path} lacks, such as {lacking[0]}",) if lacking else ()
    )
    return Version(path, tensors, source.config, notes, "weight delta", chain=deltas)


@lru_cache(maxsize=4096)
def _read(folder: Path, when: int) -> Delta:
    """The index of a delta; the time of change is part of the key."""
    place = folder / INDEX
    facts, listed = _metadata(place, when), read_json(place).get("weight_map")
    compression = facts.get("compression_format")
    for key, value, known in (
        ("delta_encoding", facts.get("delta_encoding"), ("xor", "overwrite")),
        ("compression_format", compression, ("zstd",)),
        ("checksum_format", facts.get("checksum_format"), tuple(CHECKSUMS)),
    ):
        if value not in known:
            raise CheckpointError(f"{place} has the {key} {value!r}; opdgeo reads {', '.join(known)}.")
    if not isinstance(listed, dict) or not all(
        isinstance(s, str) and is_plain(s) and s.endswith(".safetensors") for s in listed.values()
    ):
        raise CheckpointError(f"{place} has no weight_map of tensors to .safetensors files in its folder.")
    frames: dict[str, Raw] = {}
    sums: dict[str, str] = {}
    for shard in sorted(set(listed.values())):
        held, metadata = read_header(folder / shard)
        sums |= metadata
        for name in (n for n, of in listed.items() if of == shard):
            if name not in held:
                raise CheckpointError(f"{place} places {name} in {shard}, which does not hold it.")
            frames[name] = held[name]
    try:
        base_version = int(facts["base_version"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{place} does not say which base_version it builds on: {error}.") from error
    return Delta(folder, base_version, str(facts["delta_encoding"]), str(facts["checksum_format"]), frames, sums)


@lru_cache(maxsize=4096)
def _metadata(index: Path, _: int) -> dict[str, Any]:
    found = read_json(index).get("metadata")
    return found if isinstance(found, dict) else {}


def _xxh3(state: np.ndarray) -> str:
    import xxhash

    return xxhash.xxh3_128(state.data).hexdigest()


def _adler32(state: np.ndarray) -> str:
    return f"{zlib.adler32(state.data):08x}"


def _blake3(state: np.ndarray) -> str:
    try:
        import blake3
    except ImportError as error:
        raise CheckpointError("these weight deltas have blake3 checksums: pip install blake3 to check them.") from error
    return str(blake3.blake3(state.data).hexdigest())


CHECKSUMS: dict[str, Callable[[np.ndarray], str]] = {"xxh3-128": _xxh3, "adler32": _adler32, "blake3": _blake3}

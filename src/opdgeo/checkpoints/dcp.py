"""PyTorch distributed checkpoints: a `.metadata` file and `*.distcp`, as torch DCP and accelerate's FSDP write them.

`.metadata` is a pickle: it is read with records in place of the few classes that DCP writes, and nothing else. A chunk
is a torch file inside of a `.distcp`, whose header says where its bytes lie. Source: torch/distributed/checkpoint,
`metadata.py` and `filesystem.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.huggingface import is_plain
from opdgeo.checkpoints.pickled import Named, Record, load
from opdgeo.checkpoints.stored import LONGEST_NAME, SIZES, Pieces, Stored, opened
from opdgeo.checkpoints.torchfile import KNOWN, PLAIN, ints, is_stored, unpickle
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

METADATA = ".metadata"
LONGEST = 1 << 30  # bytes of an index
# First words of names that are not a model's weights, in the layouts of accelerate, torchtitan and torch's own examples.
NOT_WEIGHTS = (
    "optimizer", "optim", "optimizers", "lr_scheduler", "lr_schedulers", "scheduler", "dataloader", "train_state",
    "rng", "rng_state", "extra_state", "trainer", "step",
)  # fmt: skip

_CLASSES = (
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(
        f"torch.distributed.checkpoint.planner.{name}"
        for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData")
    ),
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.serialization._get_layout",
    "torch.device",
    *(f"pathlib.{name}" for name in ("PosixPath", "WindowsPath", "PurePosixPath", "_local.PosixPath")),
)  # fmt: skip


def find(folder: Path) -> Path | None:
    return folder if (folder / METADATA).is_file() and not (folder / "metadata.json").is_file() else None


def read(folder: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """The model's tensors by their stored names; optimizer and trainer entries are left out.

    Raises:
        CheckpointError: `.metadata` names code, points out of its folder or is damaged, or a file is missing.
    """
    return {
        name: stored
        for name, stored in chunks(folder).items()
        if name.removeprefix("app.").partition(".")[0] not in NOT_WEIGHTS
    }


def chunks(folder: Path) -> dict[str, Stored]:
    """Every tensor of a distributed checkpoint, an optimizer's too."""
    file = folder / METADATA
    metadata = _metadata(file)
    try:
        where = {
            (_text(index.fqn), ints(index.get("offset") or ())): info for index, info in metadata.storage_data.items()
        }
        tensors: dict[str, Stored] = {}
        places: list[Chunk] = []
        sizes: dict[str, int] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, Record) or entry.name != "TensorStorageMetadata":
                continue
            dtype, shape = _dtype(entry.properties.state[0]), ints(entry.size)
            pieces: dict[tuple[int, ...], Stored] = {}
            for chunk in entry.chunks:
                offsets, lengths = ints(chunk.offsets), ints(chunk.sizes)
                if not len(offsets) == len(lengths) == len(shape):
                    raise ValueError(f"a chunk of {len(lengths)} axes at {len(offsets)} of {len(shape)}")
                # Without deduplication every rank that holds a chunk lists it, and one of them is kept.
                if 0 not in lengths and offsets not in pieces:
                    pieces[offsets] = stored = _chunk(folder, where[_text(name), offsets], lengths, dtype, sizes)
                    places.append(stored)
            if pieces:
                tensors[name] = Pieces(name, shape, tuple(pieces.items()))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not the index of a torch distributed checkpoint as opdgeo knows it ({error!r}). "
            "Was it written by a much older or newer torch?"
        ) from error
    places.sort(key=lambda p: (p.file, p.start))
    for one, other in pairwise(places):
        if one.file == other.file and one.start + one.length > other.start:
            raise CheckpointError(f"{file} places two chunks on the same bytes of {one.file.name}. Copy it again.")
    return tensors


@dataclass(frozen=True)
class Chunk:
    """One tensor saved by torch at `start` in a `.distcp` file, `length` bytes with its header."""

    file: Path
    start: int
    length: int
    shape: tuple[int, ...]
    dtype: str
    index: Path
    quantised: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.index, self.file)

    def __getitem__(self, index: Index) -> Tensor:
        content = unpickle(self.file, start=self.start, length=self.length)
        if not is_stored(content) or content.shape != self.shape or content.dtype != self.dtype:
            found = f"{content.dtype} {content.shape}" if is_stored(content) else "no tensor"
            raise CheckpointError(
                f"{self.file} holds {found} at byte {self.start}; its index promises {self.dtype} {self.shape}. Do the two files "
                "belong together?"
            )
        return content[index]


def _chunk(folder: Path, info: Any, shape: tuple[int, ...], dtype: str, sizes: dict[str, int]) -> Chunk:
    name = info.relative_path
    if not isinstance(name, str) or not is_plain(name):
        shown = repr(name) if isinstance(name, str) else type(name).__name__
        raise CheckpointError(f"{folder / METADATA} names the file {shown}; expected a file in the folder.")
    if name not in sizes:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / METADATA} names {name}, which is missing from {folder}. Copy it again.")
        sizes[name] = (folder / name).stat().st_size
    if info.get("transform_descriptors"):
        raise CheckpointError(
            f"{folder / name} is compressed; opdgeo reads distributed checkpoints as torch writes them."
        )
    start, length = ints((info.offset, info.length))
    if start + length > sizes[name] or prod(shape) * SIZES.get(dtype, 0) > length:
        raise CheckpointError(
            f"{folder / name} is too short for a chunk that {METADATA} places in it: {shape} of {dtype} in {length} bytes from "
            f"byte {start} of {sizes[name]}. Copy it again."
        )
    return Chunk(folder / name, start, length, shape, dtype, folder / METADATA)


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > LONGEST_NAME:
        raise TypeError("a name that is no text, or a very long one")
    return value


def _dtype(value: Any) -> str:
    if not isinstance(value, Named) or not value.name.startswith("torch."):
        raise TypeError("a dtype that is none")
    return value.name.removeprefix("torch.")


def _metadata(file: Path) -> Any:
    try:
        with opened(file) as source:
            if source.size > LONGEST:
                raise CheckpointError(f"has {source.size} bytes; expected at most {LONGEST}")
            data = source.read(0, source.size)
        holds = sum(f.stat().st_size for f in file.parent.glob("*.distcp"))
        found = load(data, KNOWN | set(_CLASSES), PLAIN, holds=holds)
    except CheckpointError as error:
        if (text := str(error)).startswith("asks for"):
            raise CheckpointError(f"{file} {text}.") from error
        raise CheckpointError(f"{file} is not a readable index: {text}.") from error
    if not isinstance(found, Record):
        raise CheckpointError(
            f"{file} holds a {type(found).__name__}; expected a torch distributed checkpoint's index."
        )
    return found

"""PyTorch distributed checkpoints: a `.metadata` file and `*.distcp`, as torch DCP and accelerate's FSDP write them.

`.metadata` is a pickle: it is read with records in place of the few classes that DCP writes, and nothing else. A chunk
is a torch file inside of a `.distcp`, whose header says where its bytes lie. Source: torch/distributed/checkpoint,
`metadata.py` and `filesystem.py`.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, cast

import torch

from opdgeo.checkpoints.huggingface import is_plain
from opdgeo.checkpoints.stored import Pieces, Stored
from opdgeo.checkpoints.torchfile import Record, dtype_name, raw, records, unpickle
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

METADATA = ".metadata"
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
            (index.fqn, tuple(getattr(index, "offset", None) or ())): info
            for index, info in metadata.storage_data.items()
        }
        tensors: dict[str, Stored] = {}
        for name, entry in metadata.state_dict_metadata.items():
            if type(entry).__name__ != "TensorStorageMetadata":
                continue
            dtype = dtype_name(entry.properties.state[0])
            pieces = []
            for chunk in entry.chunks:
                offsets, sizes = _ints(chunk.offsets), _ints(chunk.sizes)
                if 0 not in sizes:
                    pieces.append((offsets, _chunk(folder, where[name, offsets], sizes, dtype)))
            if pieces:
                tensors[str(name)] = Pieces(str(name), _ints(entry.size), tuple(pieces))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} is not the index of a torch distributed checkpoint as opdgeo knows it ({error!r}). "
            "Was it written by a much older or newer torch?"
        ) from error
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
        from torch.distributed.checkpoint.utils import _create_file_view

        try:
            with self.file.open("rb") as file:
                view = cast("IO[bytes]", _create_file_view(file, self.start, self.length))
                content = unpickle(view, where=self.file)
        except OSError as error:
            raise CheckpointError(f"cannot read {self.file}: {error}") from error
        if not isinstance(content, torch.Tensor) or tuple(content.shape) != self.shape:
            raise CheckpointError(f"{self.file} at byte {self.start} does not hold the tensor that its index promises.")
        return raw(content, self.file, self.start)[index]


def _chunk(folder: Path, info: Any, shape: tuple[int, ...], dtype: str) -> Chunk:
    name = info.relative_path
    if not isinstance(name, str) or not is_plain(name):
        raise CheckpointError(f"{folder / METADATA} names the file {name!r}; expected a file in the folder.")
    if not (folder / name).is_file():
        raise CheckpointError(f"{folder / METADATA} names {name}, which is missing from {folder}. Copy it again.")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{folder / name} is compressed; opdgeo reads distributed checkpoints as torch writes them."
        )
    return Chunk(folder / name, int(info.offset), int(info.length), shape, dtype, folder / METADATA)


def _ints(values: Any) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


class _Metadata(pickle.Unpickler):
    """Reads `.metadata`: DCP's classes as records, sizes as tuples, dtypes; every other name is refused unseen."""

    known: ClassVar[dict[str, Any]] = {name: made for made, name in records(_CLASSES)} | {
        "torch.Size": tuple,
        "collections.OrderedDict": dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self.known:
            return self.known[full]
        if module == "torch" and isinstance(dtype := vars(torch).get(name), torch.dtype):
            return dtype
        raise CheckpointError(
            f"the .metadata asks for {full} to be run or built; opdgeo reads DCP's own records only and ran nothing."
        )


def _metadata(file: Path) -> Any:
    try:
        with file.open("rb") as stream:
            found = _Metadata(stream).load()
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"{file} is not a readable index ({error!r}). Copy it again.") from error
    if not isinstance(found, Record):
        raise CheckpointError(
            f"{file} holds a {type(found).__name__}; expected a torch distributed checkpoint's index."
        )
    return found

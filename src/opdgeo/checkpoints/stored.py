"""A tensor on disk: what it is, from headers alone, and any part of it, read when it is asked for.

Everything that reads weights asks a `Stored` for a box of it, as one slices a tensor. The formats build theirs from the
few kinds below, which keep paths and numbers only: they can be copied to another process.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    Index = tuple[int | slice, ...]

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # the dtypes that hold plain weights, bytes an entry


class Stored(Protocol):
    """A tensor of `shape` and `dtype` (torch's name of it) in `files`.

    `stored[index]` is the tensor's ``[index]`` in memory: an integer or a slice without a step for every axis.
    `quantised` names the type that was de-quantised to `dtype`, None for weights stored as they are.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def files(self) -> tuple[Path, ...]: ...
    @property
    def quantised(self) -> str | None: ...
    def __getitem__(self, index: Index) -> Tensor: ...


@dataclass(frozen=True)
class Safetensor:
    """A tensor of a safetensors file, by its name there."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    quantised: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def __getitem__(self, index: Index) -> Tensor:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as file:
                return cast("Tensor", file.get_slice(self.name)[index])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {self.name} from {self.file}: {error}") from error


@dataclass(frozen=True)
class Raw:
    """The bytes of a tensor from `offset` on in a file, with the strides (in entries) it was written with."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    quantised: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def __getitem__(self, index: Index) -> Tensor:
        import mmap

        import torch

        dtype = getattr(torch, self.dtype)
        count = 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))
        if not math.prod(self.shape):
            return torch.empty(self.shape, dtype=dtype)[index]
        try:
            with self.file.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {self.file}: {error}") from error
        if self.offset < 0 or self.offset + count * dtype.itemsize > len(mapped):
            raise CheckpointError(
                f"{self.file} ends before a tensor that it should hold ({len(mapped)} bytes). Copy or download it again."
            )
        whole = torch.frombuffer(mapped, dtype=dtype, count=count, offset=self.offset).as_strided(
            self.shape, self.stride
        )
        return whole[index].clone()


@dataclass(frozen=True)
class Pieces:
    """A tensor cut into boxes that lie in several places: each with the position of its first entry.

    Pieces may overlap only as copies of one another (replicas). What they do not cover is an error when it is read.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[tuple[tuple[int, ...], Stored], ...]
    quantised: str | None = None

    @property
    def dtype(self) -> str:
        return self.pieces[0][1].dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(f for _, piece in self.pieces for f in piece.files))

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        box = [bounds(i, n) for i, n in zip(index, self.shape, strict=True)]
        out = torch.empty([stop - start for start, stop in box], dtype=getattr(torch, self.dtype))
        covered = torch.zeros(out.shape, dtype=torch.bool) if len(self.pieces) > 1 else None
        filled = 0
        for offsets, piece in self.pieces:
            ends = [o + n for o, n in zip(offsets, piece.shape, strict=True)]
            common = [(max(a, o), min(b, e)) for (a, b), o, e in zip(box, offsets, ends, strict=True)]
            if any(start >= stop for start, stop in common):
                continue
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            inside = tuple(slice(a - o, b - o) for (a, b), o in zip(common, offsets, strict=True))
            if covered is not None:
                if bool(covered[here].all()):
                    continue
                covered[here] = True
            out[here] = piece[inside]
            filled += out[here].numel()
        if not (bool(covered.all()) if covered is not None else filled == out.numel()):
            raise CheckpointError(f"the parts of {self.name} do not cover it: a shard is missing. Copy it again.")
        return out[tuple(0 if isinstance(i, int) else slice(None) for i in index)]


@dataclass(frozen=True)
class Rows:
    """Some rows of another tensor, one below the other: (rows, cols) from a tensor (…, rows, cols).

    `ranges` are (first, end) of rows, in the order wanted; `within` is an index into the leading axes.
    """

    source: Stored
    ranges: tuple[tuple[int, int], ...]
    within: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(end - first for first, end in self.ranges)
        return (rows, *self.source.shape[len(self.within) + 1 :])

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    @property
    def quantised(self) -> str | None:
        return self.source.quantised

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        rest = tuple(slice(0, n) for n in self.shape[1:])
        first, end = min(a for a, _ in self.ranges), max(b for _, b in self.ranges)
        block = self.source[(*self.within, slice(first, end), *rest)]
        return torch.cat([block[a - first : b - first] for a, b in self.ranges])[index]


def bounds(index: int | slice, size: int) -> tuple[int, int]:
    """First and end of an index or a slice without a step along an axis of `size`."""
    if isinstance(index, int):
        return index, index + 1
    start, stop, _ = index.indices(size)
    return start, max(start, stop)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor in row-major order.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

"""A tensor on disk: what it is, from headers alone, and any part of it, read when it is asked for.

Everything that reads weights asks a `Stored` for a box of it, as one slices a tensor. The formats build theirs from the
few kinds below, which keep paths and numbers only: they can be copied to another process.
"""

from __future__ import annotations

import math
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    Index = tuple[int | slice, ...]

LONGEST_NAME = 1 << 16  # characters of a tensor's name: rules for names take time and memory for each
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
class Opened:
    """A file that is open: a regular one, read by position, so that a file cut short meanwhile is an error and no fault."""

    file: Path
    descriptor: int
    size: int

    def read_into(self, start: int, target: memoryview) -> None:
        """Fill `target` with the bytes from `start` on.

        Raises:
            CheckpointError: the file ends before.
        """
        done, length = 0, len(target)
        while done < length:
            got = os.preadv(self.descriptor, [target[done : done + (1 << 30)]], start + done)
            if got == 0:
                raise CheckpointError(
                    f"{self.file} ends before a tensor that it should hold ({start + done} bytes). Copy or download it again."
                )
            done += got

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on; never more than the file has.

        Raises:
            CheckpointError: the file ends before.
        """
        if start < 0 or length < 0 or start + length > self.size:
            raise CheckpointError(f"{self.file} ends early. Copy or download it again.")
        found = bytearray(length)
        self.read_into(start, memoryview(found))
        return bytes(found)


@contextmanager
def opened(file: Path) -> Iterator[Opened]:
    """A regular file, opened; a pipe or device, which may never answer or never end, is not waited for.

    Raises:
        CheckpointError: anything else, or it cannot be read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is no regular file; expected one of a checkpoint. Check the path.")
        yield Opened(file, descriptor, status.st_size)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error}") from error
    finally:
        os.close(descriptor)


class _Buffers(threading.local):
    """Memory of a thread that is read into again when no tensor lies in it any more. A fresh page costs four times what the copy into it does."""

    LEAST, KEPT = 1 << 20, 2  # bytes of a buffer; W₀ and W₊ are in memory together

    def __init__(self) -> None:
        # beside a buffer what was handed out of it, while that lives
        self.kept: list[tuple[np.ndarray, weakref.ref[np.ndarray]]] = []

    def take(self, length: int) -> np.ndarray:
        """(length,) bytes that nothing else looks at."""
        import numpy as np

        free = [i for i, (whole, used) in enumerate(self.kept) if used() is None and length <= len(whole) <= 2 * length]
        whole = self.kept.pop(free[0])[0] if free else np.empty(length, dtype=np.uint8)
        part = whole[:length]
        if length >= self.LEAST:
            self.kept = [*self.kept, (whole, weakref.ref(part))][-self.KEPT :]
        return part


_buffers = _Buffers()


@dataclass(frozen=True, slots=True)
class Raw:
    """The bytes of a tensor from `offset` on in a file, with the strides (in entries) it was written with.

    `swapped`: the bytes of an entry stand the other way round, as on a big-endian machine.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    quantised: str | None = None
    swapped: bool = False

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        dtype = getattr(torch, self.dtype)
        box = [bounds(i, n) for i, n in zip(index, self.shape, strict=True)]
        shape = [end - start for start, end in box]
        kept = tuple(0 if isinstance(i, int) else slice(None) for i in index)
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)[kept]
        # What lies between the first and the last entry asked for.
        first = sum(start * step for (start, _), step in zip(box, self.stride, strict=True))
        count = 1 + sum((n - 1) * step for n, step in zip(shape, self.stride, strict=True))
        start, length = self.offset + first * dtype.itemsize, count * dtype.itemsize
        with opened(self.file) as source:
            if start < 0 or start + length > source.size:
                raise CheckpointError(
                    f"{self.file} ends before a tensor that it should hold ({source.size} bytes). Copy or download it again."
                )
            memory = _buffers.take(length)
            source.read_into(start, memoryview(memory.data))
        data = torch.from_numpy(memory)
        if self.swapped:
            data = data.view(-1, dtype.itemsize // (2 if dtype.is_complex else 1)).flip(1).flatten()
        return data.view(dtype).as_strided(shape, self.stride)[kept].contiguous()


@dataclass(frozen=True)
class Unreadable:
    """A tensor that is not stored as plain numbers; `dtype` says in words what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    quantised: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.file,)

    def __getitem__(self, index: Index) -> Tensor:
        raise CheckpointError(f"{self.file} holds {self.dtype}, which does not lie in it as plain numbers.")


@dataclass(frozen=True)
class Pieces:
    """A tensor cut into boxes that lie in several places: each with the position of its first entry.

    What they do not cover, and where two of them disagree, is an error when it is read.
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
        inside = []
        for offsets, piece in self.pieces:
            ends = [o + n for o, n in zip(offsets, piece.shape, strict=True)]
            common = [(max(a, o), min(b, e)) for (a, b), o, e in zip(box, offsets, ends, strict=True)]
            if all(start < stop for start, stop in common):
                inside.append((offsets, piece, common))
        shape = [stop - start for start, stop in box]
        missing = CheckpointError(f"the parts of {self.name} do not cover it: a shard is missing. Copy it again.")
        if sum(math.prod(b - a for a, b in common) for *_, common in inside) < math.prod(shape):
            raise missing  # before memory is asked for
        out = torch.empty(shape, dtype=getattr(torch, self.dtype))
        covered = torch.zeros(shape, dtype=torch.bool) if len(inside) > 1 else None
        for offsets, piece, common in inside:
            here = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True))
            part = piece[tuple(slice(a - o, b - o) for (a, b), o in zip(common, offsets, strict=True))]
            if part.dtype != out.dtype:
                raise CheckpointError(
                    f"{self.name} is {self.dtype} in one place and {str(part.dtype).removeprefix('torch.')} in another "
                    f"({piece.files[-1]}); expected one dtype. Save it again."
                )
            if covered is not None:
                known = covered[here]
                if bool(known.any()) and not bool(_same_bits(out[here], part)[known].all()):
                    raise CheckpointError(
                        f"two parts of {self.name} cover the same entries with different values ({piece.files[-1]}): "
                        "shards of two checkpoints? Copy it again."
                    )
                covered[here] = True
            out[here] = part
        if covered is not None and not bool(covered.all()):
            raise missing
        return out[tuple(0 if isinstance(i, int) else slice(None) for i in index)]


def _same_bits(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors of one dtype hold the same bits: NaN equals itself."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.view(bits) == b.view(bits)


@dataclass(frozen=True)
class Derived:
    """Another tensor's numbers in another order or shape: how they are stored is that one's matter."""

    source: Stored

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        return self.source.files

    @property
    def quantised(self) -> str | None:
        return self.source.quantised


@dataclass(frozen=True)
class Rows(Derived):
    """Some rows of another tensor, one below the other: (rows, cols) from a tensor (…, rows, cols).

    `ranges` are (first, end) of rows, in the order wanted; `within` is an index into the leading axes.
    """

    ranges: tuple[tuple[int, int], ...]
    within: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        rows = sum(end - first for first, end in self.ranges)
        return (rows, *self.source.shape[len(self.within) + 1 :])

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


@lru_cache(maxsize=1 << 10)  # thousands of experts share a few
def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor in row-major order.

    >>> contiguous((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()

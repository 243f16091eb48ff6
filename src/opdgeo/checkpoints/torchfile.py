"""Files of `torch.save`, opened without reading weights and without running what they name.

`torch.load(weights_only=True, map_location="meta")` unpickles tensors of no memory that remember where their bytes lie.
A class of a library (a DTensor's mesh, a run's settings) becomes a record without behaviour; every other name in the pickle
is refused by torch before it is looked up.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import IO, Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals, clear_safe_globals, get_safe_globals

from opdgeo.checkpoints.stored import Raw
from opdgeo.errors import CheckpointError

_lock = Lock()  # torch's list of allowed names is one for the whole process


class Record:
    """What a pickled object of an allowed class holds: the arguments and attributes, none of its code."""

    def __new__(cls, *arguments: Any, **_: Any) -> Record:
        made = super().__new__(cls)
        made.__dict__["arguments"] = arguments
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


def records(names: Sequence[str]) -> list[tuple[type, str]]:
    """A class of its own, named like the original, for every allowed name."""
    return [(type(name.rpartition(".")[2], (Record,), {}), name) for name in names]


@contextmanager
def _allow_only(allowed: Sequence[tuple[Any, str]]) -> Iterator[None]:
    """torch's list of allowed names is `allowed` alone: libraries add their own classes to it, which would run here."""
    with _lock:
        before = get_safe_globals()
        clear_safe_globals()
        add_safe_globals(list(allowed))
        try:
            yield
        finally:
            clear_safe_globals()
            add_safe_globals(before)


def unpickle(file: Path | IO[bytes], allowed: Sequence[tuple[Any, str]] = (), *, where: Path | None = None) -> Any:
    """The content of a torch file, its tensors without memory.

    Args:
        allowed: (stand-in, full name) of what else than tensors and containers it may name.
        where: the file, for messages, when `file` is a part of it.

    Raises:
        CheckpointError: it names anything else, was written by a torch before 1.6, or is damaged.
    """
    name = where or file
    try:
        with _allow_only(allowed):
            return torch.load(file, map_location="meta", weights_only=True)
    except Exception as error:  # a damaged zip or pickle raises almost anything
        text = str(error)
        if refused := re.search(r"GLOBAL (\S+)", text):
            raise CheckpointError(
                f"{name} asks for {refused[1]} to be run or built; opdgeo reads tensors only and ran nothing. Save the "
                "weights as a state dict or as safetensors."
            ) from error
        why = next(iter(text.splitlines()), type(error).__name__)
        raise CheckpointError(f"{name} is not a readable torch file ({why[:200]}). Copy it again.") from error


def raw(tensor: Tensor, file: Path, start: int = 0) -> Raw:
    """Where the bytes of an unpickled tensor lie in its file; `start` is where the torch file begins in it.

    Raises:
        CheckpointError: a sparse, quantised, negated or conjugated tensor; written by a torch before 1.6: the bytes stand in
            the pickle; or packed again by another program, where the bytes are not where torch looks for them.
    """
    plain = not (tensor.layout != torch.strided or tensor.is_quantized or tensor.is_neg() or tensor.is_conj())
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if plain else None
    if offset is None:
        raise CheckpointError(
            f"{file} holds a {tensor.layout} {dtype_name(tensor.dtype)} tensor that does not lie in it as plain numbers: a sparse or "
            f"quantised one, or torch's format before 1.6 (or torch {torch.__version__} is too old to say where). Load it and "
            "save it again as safetensors."
        )
    if start == 0 and tensor.numel() and offset not in _storages(file, file.stat().st_mtime_ns):
        raise CheckpointError(
            f"{file} was packed or compressed again by another program than torch, and its tensors are not where torch puts "
            "them. Load it with torch and save it again."
        )
    offset += start + tensor.storage_offset() * tensor.element_size()
    return Raw(file, offset, tuple(tensor.shape), tuple(tensor.stride()), dtype_name(tensor.dtype))


@lru_cache(maxsize=256)
def _storages(file: Path, when: int) -> frozenset[int]:
    """Where the storages of a torch file begin, from the headers of its zip: those that are not compressed.

    Empty where they are not in order: from 2.7 on torch counts their places from that of the first (`_get_offset` in
    torch/serialization.py) and does not look. The time of change is part of the key.
    """
    found, numbers = set(), []
    try:
        with zipfile.ZipFile(file) as packed, file.open("rb") as stream:
            entries = sorted(packed.infolist(), key=lambda entry: entry.header_offset)
            for entry in entries:
                _, inside, number = entry.filename.rpartition("/data/")
                if inside and entry.compress_type == zipfile.ZIP_STORED:
                    stream.seek(entry.header_offset + 26)
                    found.add(entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4))))
                    numbers.append(int(number) if number.isdecimal() else -1)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile, struct.error):
        return frozenset()
    counted = any(entry.filename.endswith("/.format_version") for entry in entries)
    return frozenset() if counted and numbers != list(range(len(numbers))) else frozenset(found)


def tensors_of(content: Any, file: Path) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a state dict.

    Raises:
        CheckpointError: it is not one.
    """
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected a state dict of named tensors.")
    yield from ((name, value) for name, value in content.items() if isinstance(value, Tensor))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""Files of `torch.save`, opened without torch: where the tensors lie in them, and nothing that they name is run.

A file is a zip of uncompressed entries, a pickle (`data.pkl`) and the bytes of each storage (`data/KEY`). Entries are found by
the zip's own directory, so a file that another program packed again is read too. Source: torch/serialization.py.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from opdgeo.checkpoints.pickled import Named, Record, load
from opdgeo.checkpoints.stored import Opened, Raw, Stored, Unreadable, opened
from opdgeo.errors import CheckpointError

_DAMAGED = "its zip is damaged; copy it again"
_LONGEST = 1 << 27  # bytes of a pickle or of a zip's directory
_SPAN = 1 << 29  # bytes from the first to the last entry of a view, beyond four times its own
# dtype -> bytes of an entry
SIZES_OF = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"), 1),
    **dict.fromkeys(("float8_e8m0fnu", "quint8", "qint8"), 1),
    **dict.fromkeys(("float16", "bfloat16", "int16", "uint16"), 2),
    **dict.fromkeys(("float32", "int32", "uint32", "complex32", "qint32"), 4),
    **dict.fromkeys(("float64", "int64", "uint64", "complex64"), 8),
    "complex128": 16,
}
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool", "ComplexDouble": "complex128", "ComplexFloat": "complex64",
    "QInt8": "qint8", "QUInt8": "quint8", "QInt32": "qint32",
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()} | {
    "torch.storage.UntypedStorage": "uint8",
    "torch.UntypedStorage": "uint8",
}
# What torch writes of its own accord. Names without a builder become records.
KNOWN = frozenset(
    (
        "collections.OrderedDict", "collections.Counter", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer",
        "torch.serialization._get_layout", "torch.Size", "torch.Tensor", "torch.device", "_codecs.encode",
        "builtins.bytearray", "builtins.set", "builtins.complex", "torch._tensor._rebuild_from_type_v2",
        *(f"torch.{name}" for name in SIZES_OF), *STORAGES,
        *(f"torch.per_{name}" for name in ("tensor_affine", "tensor_symmetric", "channel_affine", "channel_symmetric")),
        "torch.per_channel_affine_float_qparams",
        *(f"torch._utils._rebuild_{name}" for name in (
            "tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state", "sparse_tensor", "sparse_csr_tensor",
            "nested_tensor", "qtensor", "meta_tensor_no_storage", "wrapper_subclass", "device_tensor_from_cpu_tensor",
            "device_tensor_from_numpy",
        )),
    )
)  # fmt: skip


def unpickle(file: Path, allowed: Collection[str] = (), *, start: int = 0, length: int | None = None) -> Any:
    """The content of a torch file, its tensors as `Stored`, its objects as `Record`s.

    Args:
        allowed: full names of the classes that it may name besides torch's own.
        start, length: where the torch file lies in `file`, if that holds more.

    Raises:
        CheckpointError: it names anything else, was written by a torch before 1.6, or is damaged.
    """
    try:
        packed = _open(file, start, length)
        builders = packed.builders()
        return load(packed.pickle, KNOWN | set(allowed), builders, packed.storage, holds=packed.end - packed.start)
    except CheckpointError as error:
        if (text := str(error)).startswith("asks for"):
            raise CheckpointError(f"{file} {text}. Save the weights as a state dict or as safetensors.") from error
        raise CheckpointError(f"{file} is not a readable torch file: {text}.") from error


def tensors_of(content: Any, file: Path) -> Iterator[tuple[str, Any]]:
    """The named tensors of a state dict, and the records in it.

    Raises:
        CheckpointError: it is not one.
    """
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected a state dict of named tensors.")
    yield from content.items()


def is_stored(value: Any) -> bool:
    """Whether a value of a torch file is a tensor."""
    return isinstance(value, (Raw, Unreadable))


def ints(values: Any, most: int = 64) -> tuple[int, ...]:
    """A shape, strides or the like: not negative, below 2⁶³.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(values, (tuple, list)) or len(values) > most:
        raise TypeError("a shape that is none")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in values):
        raise TypeError("a shape that is none")
    return tuple(values)


PLAIN: dict[str, Any] = {"collections.OrderedDict": lambda: {}, "torch.Size": ints}


class _Storage(NamedTuple):
    dtype: str
    key: str


def _is_storage(value: Any) -> _Storage:
    """What a pickle gives for a storage may be anything: tuples of tuples, say, whose text has 2⁶⁰ characters."""
    if not isinstance(value, _Storage):
        raise TypeError("a storage that is none")
    return value


@dataclass(frozen=True)
class _Packed:
    """A torch file from byte `start` to `end` of a file."""

    file: Path
    start: int
    end: int
    pickle: bytes
    entries: dict[str, tuple[int, int]]  # name below the zip's folder -> first byte in the file and length
    swapped: bool

    def storage(self, identity: Any) -> _Storage:
        word, kind, key, *_ = identity
        if word != "storage" or not isinstance(kind, Named) or not isinstance(key, str):
            raise TypeError("a storage that is none")
        return _Storage(STORAGES[kind.name], key)

    def builders(self) -> dict[str, Any]:
        # The arguments of torch's `_rebuild_tensor`, `_rebuild_tensor_v2` (with gradient, hooks, metadata) and `_v3` (dtype too).
        def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Stored:
            _grad, _hooks, meta = (*more, *(None,) * 3)[: max(3, len(more))]
            return self.tensor(storage, None, offset, shape, stride, meta)

        def tensor_v3(storage: Any, offset: Any, shape: Any, stride: Any, *more: Any) -> Stored:
            _grad, _hooks, dtype, meta = more if len(more) == 4 else (*more, None)
            return self.tensor(storage, dtype.name.removeprefix("torch."), offset, shape, stride, meta)

        def sparse(_: Any, data: Any) -> Stored:
            return Unreadable(self.file, ints(data[2]), "a sparse tensor")

        def quantised(storage: Any, _offset: Any, shape: Any, *_: Any) -> Stored:
            return Unreadable(self.file, ints(shape), f"a quantised tensor ({_is_storage(storage).dtype})")

        def meta_only(_: Any, shape: Any, *__: Any) -> Stored:
            return Unreadable(self.file, ints(shape), "a tensor without values")

        def unknown(*_: Any) -> Stored:
            return Unreadable(self.file, (), "a tensor of no plain numbers")

        def of_type(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
            made = builders[function.name](*arguments)
            if not is_stored(made):
                made.kind, made.state = kind.name, state
            return made

        builders: dict[str, Any] = {**PLAIN, "torch._tensor._rebuild_from_type_v2": of_type}
        builders |= {
            f"torch._utils._rebuild_{name}": made
            for name, made in {
                "tensor": tensor, "tensor_v2": tensor, "tensor_v3": tensor_v3, "parameter": lambda data, *_: data,
                "parameter_with_state": lambda data, *_: data, "sparse_tensor": sparse, "sparse_csr_tensor": sparse,
                "nested_tensor": unknown, "qtensor": quantised, "meta_tensor_no_storage": meta_only,
                "device_tensor_from_cpu_tensor": lambda data, *_: data, "device_tensor_from_numpy": unknown,
                # A class of tensors around others: what it holds is in its state.
                "wrapper_subclass": lambda kind, dtype, shape, *_: Record(kind.name, (dtype, ints(shape))),
            }.items()
        }  # fmt: skip
        return builders

    def tensor(self, storage: Any, dtype: str | None, offset: Any, shape: Any, stride: Any, meta: Any) -> Stored:
        of, shape, stride, (offset,) = _is_storage(storage), ints(shape), ints(stride), ints((offset,))
        first, size = self.entries[f"data/{of.key}"]
        dtype = dtype or of.dtype
        item = SIZES_OF[dtype]
        if len(shape) != len(stride):
            raise ValueError("a shape and strides of different lengths")
        if meta:  # negated or conjugated when it is read
            return Unreadable(self.file, shape, f"a lazily negated or conjugated {dtype} tensor")
        if not prod(shape):
            return Raw(self.file, self.start, shape, stride, dtype)
        span = item * (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)))
        if offset * item + span > size:
            raise ValueError("a tensor that is larger than its storage")
        if span > _SPAN + prod(shape) * item * 4:  # it is read with all that lies between
            return Unreadable(self.file, shape, f"a {dtype} view that is scattered over {span} bytes")
        if prod(shape) * item > size:  # one number in many places, by a stride of 0
            return Unreadable(self.file, shape, f"an expanded {dtype} tensor")
        return Raw(self.file, first + offset * item, shape, stride, dtype, swapped=self.swapped)


def _open(file: Path, start: int, length: int | None) -> _Packed:
    with opened(file) as source:
        end = source.size if length is None else start + length
        if not 0 <= start <= end <= source.size:
            raise CheckpointError("it ends early; copy it again")
        listed = _directory(source, start, end)
        homes = [name.removesuffix("/data.pkl") for name in listed if name.endswith("/data.pkl")]
        if len(homes) != 1:
            raise CheckpointError("its zip holds no data.pkl")
        entries: dict[str, tuple[int, int]] = {}
        for name, (header, size, plain) in listed.items():
            inside = name.removeprefix(f"{homes[0]}/")
            if not inside.startswith("data/") and inside not in ("data.pkl", "byteorder"):
                continue
            if not plain:
                raise CheckpointError(
                    "it was packed or compressed again by another program than torch. Load it with torch and save it again"
                )
            head = source.read(header, 30)
            first = header + 30 + sum(struct.unpack_from("<HH", head, 26))
            if head[:4] != b"PK\3\4" or first + size > end:
                raise CheckpointError(_DAMAGED)
            entries[inside] = (first, size)
        first, size = entries["data.pkl"]
        if size > _LONGEST:
            raise CheckpointError(f"its pickle has {size} bytes; expected the headers of tensors")
        pickle = source.read(first, size)
        first, size = entries.get("byteorder", (0, 0))
        order = source.read(first, min(size, 8)) or b"little"
    if order not in (b"little", b"big"):
        raise CheckpointError("it does not say the order of its bytes")
    return _Packed(file, start, end, pickle, entries, order == b"big")


def _directory(source: Opened, start: int, end: int) -> dict[str, tuple[int, int, bool]]:
    """Of every entry of a zip: the place of its header, its length, and whether it lies there as it is."""
    tail = source.read(max(start, end - 65_557), min(65_557, end - start))
    at = tail.rfind(b"PK\5\6")
    if at < 0 or at + 22 > len(tail):
        if end - start > 16 and source.read(start, 1) == b"\x80":
            raise CheckpointError("it has torch's format before 1.6. Load it and save it again as safetensors")
        raise CheckpointError("it is no zip, or ends early; copy it again")
    count, size, offset = struct.unpack_from("<HII", tail, at + 10)
    if count == 0xFFFF or 0xFFFFFFFF in (size, offset):  # a locator before the end says where the long form is
        where = struct.unpack_from("<Q", tail, at - 12)[0] if at >= 20 and tail[at - 20 : at - 16] == b"PK\6\7" else end
        long = source.read(start + where, 56) if start + where + 56 <= end else b""
        if long[:4] != b"PK\6\6":
            raise CheckpointError(_DAMAGED)
        count, size, offset = struct.unpack_from("<QQQ", long, 32)
    if start + offset + size > end:
        raise CheckpointError(_DAMAGED)
    if size > _LONGEST // 2:
        raise CheckpointError(f"its zip has a directory of {size} bytes; expected a few for every tensor")
    listed: dict[str, tuple[int, int, bool]] = {}
    data, at = source.read(start + offset, size), 0
    while at < len(data):
        if data[at : at + 4] != b"PK\1\2" or at + 46 > len(data):
            raise CheckpointError(_DAMAGED)
        flags, method = struct.unpack_from("<HH", data, at + 8)
        packed, whole, names, extra, comment = struct.unpack_from("<IIHHH", data, at + 20)
        (header,) = struct.unpack_from("<I", data, at + 42)
        name = data[at + 46 : at + 46 + names].decode("utf-8", "replace")
        packed, whole, header = _long(data[at + 46 + names : at + 46 + names + extra], packed, whole, header)
        if name in listed or start + header + 30 > end:
            raise CheckpointError(_DAMAGED)
        listed[name] = (start + header, whole, method == 0 and not flags & 1 and packed == whole)
        at += 46 + names + extra + comment
    if len(listed) != count:
        raise CheckpointError(_DAMAGED)
    return listed


def _long(extra: bytes, packed: int, whole: int, header: int) -> tuple[int, int, int]:
    """The sizes and the place of an entry, whose long forms stand in its extra field where they do not fit."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            longs = iter(struct.unpack_from(f"<{min(size, len(extra) - at - 4) // 8}Q", extra, at + 4))
            whole = next(longs, whole) if whole == 0xFFFFFFFF else whole
            packed = next(longs, packed) if packed == 0xFFFFFFFF else packed
            header = next(longs, header) if header == 0xFFFFFFFF else header
        at += 4 + size
    return packed, whole, header

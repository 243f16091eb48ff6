"""Hugging Face folders: `model.safetensors` or `pytorch_model.bin`, or shards of either listed by an index.

Other files in the folder (adapters, consolidated copies, optimizer states) are not weights and are left alone.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from opdgeo.checkpoints.stored import LONGEST_NAME, Raw, Stored, contiguous, opened
from opdgeo.checkpoints.torchfile import is_stored, tensors_of, unpickle
from opdgeo.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SAFETENSORS = (INDEX, "model.safetensors")
BIN = ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model_fsdp.bin")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
# Bits an entry, of all that safetensors knows.
BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
LONGEST_HEADER = 1 << 25  # bytes: room for 200,000 tensors
MOST_AXES = 64  # torch's own limit


def find_safetensors(folder: Path) -> Path | None:
    """The index or the single file of a folder; a safetensors file stands for itself."""
    return _find(folder, SAFETENSORS, ".safetensors")


def find_bin(folder: Path) -> Path | None:
    return _find(folder, BIN, ".bin")


def read_safetensors(place: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """Names and headers.

    Raises:
        CheckpointError: a damaged file or index, a shard that is missing or outside of the folder.
    """
    return _read(place, ".safetensors", headers)


def read_bin(place: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """Names and headers of files of `torch.save`; errors as above, and code in the pickle."""
    return _read(place, ".bin", bin_headers)


def _find(path: Path, names: tuple[str, ...], suffix: str) -> Path | None:
    if path.is_file():
        return path if path.suffix == suffix else None
    return next((path / name for name in names if (path / name).is_file()), None)


def _read(place: Path, suffix: str, each: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    if place.suffix != ".json":
        return each(place)
    folder = place.parent
    tensors: dict[str, Stored] = {}
    for shard, names in shards(place, suffix).items():
        if not (folder / shard).is_file():
            raise CheckpointError(f"{place} names {shard}, which is missing from {folder}. Download it again.")
        tensors |= in_shard(place, shard, names, each(folder / shard))
    return tensors


def shards(place: Path, suffix: str) -> dict[str, list[str]]:
    """The names of the tensors in every shard that an index lists.

    Raises:
        CheckpointError: damaged, or a shard that is no plain file name.
    """
    listed = read_json(place).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{place} has no weight_map; expected tensor names mapped to shard files.")
    names: dict[str, list[str]] = {}
    for name, shard in listed.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{place} places {name} in a {type(shard).__name__}; expected the name of a file.")
        names.setdefault(shard, []).append(name)
    for shard in names:
        # An index is untrusted input: a shard is a plain file name in this folder.
        if not is_plain(shard) or not shard.endswith(suffix):
            raise CheckpointError(f"{place} names the shard {shard!r}; expected a {suffix} file in the folder.")
    return {shard: names[shard] for shard in sorted(names)}


def in_shard(place: Path, shard: str, names: Sequence[str], found: Mapping[str, Stored]) -> dict[str, Stored]:
    """Those of a shard's tensors that the index `place` lists.

    Raises:
        CheckpointError: one of them is not there.
    """
    for name in names:
        if name not in found:
            raise CheckpointError(f"{place} places {name} in {shard}, which does not hold it.")
    return {name: found[name] for name in names}


def headers(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    return dict(read_header(file)[0])


def read_header(file: Path) -> tuple[dict[str, Raw], dict[str, str]]:
    """The tensors of one safetensors file and its metadata: read once and checked as the library `safetensors` checks it.

    The library maps the file into memory. A file cut short later would then end the process, and every tensor would read the whole
    header again.

    Raises:
        CheckpointError: the header is damaged, or does not say where each byte of the file belongs.
    """
    try:
        with opened(file) as source:
            length = header_length(source.read(0, min(8, source.size)), source.size)
            text, size = source.read(8, length), source.size
    except ValueError as error:
        raise _damaged(file, error) from error
    return parse_header(file, text, size)


def header_length(start: bytes, size: int) -> int:
    """The bytes of a header, from the first eight of a file of `size` bytes.

    Raises:
        ValueError: no safetensors file begins so.
    """
    if len(start) < 8:
        raise ValueError("it ends early")
    (length,) = struct.unpack("<Q", start)
    if length > LONGEST_HEADER:
        raise ValueError(f"a header of {length} bytes; expected at most {LONGEST_HEADER}")
    if 8 + length > size:
        raise ValueError("it ends early")
    return length


def parse_header(file: Path, text: bytes, size: int) -> tuple[dict[str, Raw], dict[str, str]]:
    """The tensors of a file of `size` bytes with the header `text`, and its metadata. Errors are those of `read_header`."""
    begin = 8 + len(text)
    try:
        if not text.startswith(b"{"):
            raise ValueError("its header is no JSON object")
        listed = json.loads(text, object_pairs_hook=_once)
        metadata = listed.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is no text")
        found = {name: _header(file, name, entry, begin) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(file, error) from error
    end = begin
    for raw, after in sorted(found.values(), key=lambda item: (item[0].offset, item[1])):
        if raw.offset != end:
            raise CheckpointError(
                f"{file} is damaged: its tensors overlap or leave bytes between. Copy or download it again."
            )
        end = after
    if end != size:
        raise CheckpointError(f"{file} has {size} bytes; its header promises {end}. Copy or download it again.")
    return {name: raw for name, (raw, _) in found.items()}, metadata


def _damaged(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is not a readable safetensors file ({error}). Copy or download it again.")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("two entries of one name")
    return found


def _header(file: Path, name: str, entry: dict[str, Any], begin: int) -> tuple[Raw, int]:
    """One entry of a header: where it lies, and the end of its bytes."""
    if len(name) > LONGEST_NAME:
        raise ValueError(f"a tensor whose name has {len(name)} characters")
    shape, (first, after) = tuple(entry["shape"]), entry["data_offsets"]
    if entry["dtype"] not in BITS:
        raise ValueError(f"{name} has an unknown dtype")
    if len(shape) > MOST_AXES:  # the product of many would take hours
        raise ValueError(f"{name} has {len(shape)} axes; expected at most {MOST_AXES}")
    if not all(type(n) is int and 0 <= n < 1 << 63 for n in (*shape, first, after)):
        raise ValueError(f"{name} has no shape or no place")
    bits = math.prod(shape) * BITS[entry["dtype"]]
    if bits % 8 or after - first != bits // 8:
        raise ValueError(f"{name} takes {after - first} bytes; its shape and dtype take {bits} bits")
    dtype = DTYPES.get(entry["dtype"], entry["dtype"])
    return Raw(file, begin + first, shape, contiguous(shape), dtype), begin + after


def stored_bytes(raw: Raw) -> int:
    """The bytes of a tensor of a safetensors file, in the file."""
    kind = next((known for known, name in DTYPES.items() if name == raw.dtype), raw.dtype)
    return math.prod(raw.shape) * BITS[kind] // 8


def bin_headers(file: Path) -> dict[str, Stored]:
    """The tensors of one file of `torch.save`."""
    return {name: value for name, value in tensors_of(unpickle(file), file) if is_stored(value)}


def is_plain(name: str) -> bool:
    """Whether a name from a checkpoint is that of a file in its folder, not a path."""
    plain = PurePath(name).name == name and not set(name) & {"\\", "\0"} and name not in ("", ".", "..")
    return plain and len(os.fsencode(name.encode(errors="surrogatepass"))) <= 255  # what file systems take


def read_json(file: Path, limit: int = 1 << 25) -> dict[str, Any]:
    """A JSON object of at most `limit` bytes, nested at most a hundred deep.

    Raises:
        CheckpointError: anything else, or no regular file.
    """
    with opened(file) as source:
        if source.size > limit:
            raise CheckpointError(
                f"{file} has {source.size} bytes; expected JSON of at most {limit}. Is it another file?"
            )
        data = source.read(0, source.size)
    try:
        loaded = json.loads(data)
        _refuse_what_is_deep(loaded)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a JSON object.")
    return loaded


def _refuse_what_is_deep(loaded: Any) -> None:
    level = [loaded]
    for _ in range(100):
        level = (
            [
                inner
                for value in level
                for inner in (value.values() if isinstance(value, dict) else value)
                if isinstance(inner, (dict, list))
            ]
            if isinstance(loaded, (dict, list))
            else []
        )
        if not level:
            return
    raise ValueError("nested more than a hundred deep")

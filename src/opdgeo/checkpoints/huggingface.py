"""Hugging Face folders: `model.safetensors` or `pytorch_model.bin`, or shards of either listed by an index.

Other files in the folder (adapters, consolidated copies, optimizer states) are not weights and are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from opdgeo.checkpoints.stored import Safetensor, Stored, opened
from opdgeo.checkpoints.torchfile import is_stored, tensors_of, unpickle
from opdgeo.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SAFETENSORS = (INDEX, "model.safetensors")
BIN = ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model_fsdp.bin")
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


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
    listed, folder = read_json(place).get("weight_map"), place.parent
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{place} has no weight_map; expected tensor names mapped to shard files.")
    tensors: dict[str, Stored] = {}
    names: dict[str, list[str]] = {}
    for name, shard in listed.items():
        if not isinstance(shard, str):
            raise CheckpointError(f"{place} places {name} in a {type(shard).__name__}; expected the name of a file.")
        names.setdefault(shard, []).append(name)
    for shard in sorted(names):
        # An index is untrusted input: a shard is a plain file name in this folder.
        if not is_plain(shard) or not shard.endswith(suffix):
            raise CheckpointError(f"{place} names the shard {shard!r}; expected a {suffix} file in the folder.")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{place} names {shard}, which is missing from {folder}. Download it again.")
        found = each(folder / shard)
        for name in names[shard]:
            if name not in found:
                raise CheckpointError(f"{place} places {name} in {shard}, which does not hold it.")
            tensors[name] = found[name]
    return tensors


def headers(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file."""
    from safetensors import SafetensorError, safe_open

    def stored() -> Iterator[tuple[str, Stored]]:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                dtype = part.get_dtype()
                yield name, Safetensor(file, name, tuple(part.get_shape()), DTYPES.get(dtype, dtype))

    try:
        return dict(stored())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}). Copy or download it again."
        ) from error


def bin_headers(file: Path) -> dict[str, Stored]:
    """The tensors of one file of `torch.save`."""
    return {name: value for name, value in tensors_of(unpickle(file), file) if is_stored(value)}


def is_plain(name: str) -> bool:
    """Whether a name from a checkpoint is that of a file in its folder, not a path."""
    return PurePath(name).name == name and "\\" not in name and name not in ("", ".", "..")


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

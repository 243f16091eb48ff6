"""Hugging Face folders: `model.safetensors` or `pytorch_model.bin`, or shards of either listed by an index.

Other files in the folder (adapters, consolidated copies, optimizer states) are not weights and are left alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

from opdgeo.checkpoints.stored import Safetensor, Stored
from opdgeo.checkpoints.torchfile import raw, tensors_of, unpickle
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
    for shard in sorted(set(map(str, listed.values()))):
        # An index is untrusted input: a shard is a plain file name in this folder.
        if not is_plain(shard) or not shard.endswith(suffix):
            raise CheckpointError(f"{place} names the shard {shard!r}; expected a {suffix} file in the folder.")
        if not (folder / shard).is_file():
            raise CheckpointError(f"{place} names {shard}, which is missing from {folder}. Download it again.")
        found = each(folder / shard)
        for name in (n for n, where in listed.items() if where == shard):
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
    return {name: raw(tensor, file) for name, tensor in tensors_of(unpickle(file), file)}


def is_plain(name: str) -> bool:
    """Whether a name from a checkpoint is that of a file in its folder, not a path."""
    return PurePath(name).name == name and "\\" not in name and name not in ("", ".", "..")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        CheckpointError: anything else.
    """
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a JSON object.")
    return loaded

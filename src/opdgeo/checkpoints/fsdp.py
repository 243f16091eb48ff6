"""One file of `torch.save` a rank: `model_world_size_W_rank_R.pt`, as verl and SkyRL write them.

Every tensor is a DTensor: the local shard, the whole shape, and how each dimension of the mesh of ranks places it. The
classes are read as records, so that no process group and no code of theirs is needed. Source:
torch/distributed/tensor/placement_types.py (`Shard` splits as `torch.chunk` does); verl, `model_merger/fsdp_model_merger.py`.
"""

from __future__ import annotations

import re
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

from opdgeo.checkpoints.pickled import Record
from opdgeo.checkpoints.stored import Pieces, Raw, Rows, Stored
from opdgeo.checkpoints.torchfile import ints, is_stored, tensors_of, unpickle
from opdgeo.errors import CheckpointError

_RANK = re.compile(r"model_world_size_(\d+)_rank_(\d+)\.pt")


_RECORDS = (
    *(
        home + name
        for home in ("torch.distributed.tensor.placement_types.", "torch.distributed._tensor.placement_types.")
        for name in ("Shard", "Replicate", "Partial", "_StridedShard", "_Partial", "DTensorSpec", "TensorMeta")
    ),
    *(
        home + name
        for home in ("torch.distributed.tensor._dtensor_spec.", "torch.distributed._tensor._dtensor_spec.")
        for name in ("DTensorSpec", "TensorMeta", "ShardOrderEntry")
    ),
    "torch.distributed.device_mesh.DeviceMesh",
    "torch.distributed._mesh_layout._MeshLayout",
    "torch.distributed._mesh_layout._FlatLayout",
)
_DTENSOR = (
    *("torch.distributed.tensor.DTensor", "torch.distributed.tensor._api.DTensor"),
    *("torch.distributed._tensor.DTensor", "torch.distributed._tensor.api.DTensor"),
)


def find(folder: Path) -> Path | None:
    return folder if folder.is_dir() and any(_RANK.fullmatch(p.name) for p in folder.iterdir()) else None


def read(folder: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """Every tensor, put together from the ranks' shards.

    Raises:
        CheckpointError: ranks missing, a placement that is not Shard or Replicate, or shards that do not fit together.
    """
    ranks = _ranks(folder)
    parts: dict[str, list[tuple[int, Any]]] = {}
    for rank, file in enumerate(ranks):
        for name, tensor in tensors_of(unpickle(file, _RECORDS + _DTENSOR), file):
            if is_stored(tensor) or (isinstance(tensor, Record) and tensor.kind in _DTENSOR):
                parts.setdefault(name, []).append((rank, tensor))
    return {name: _assemble(name, found, ranks) for name, found in parts.items()}


def _ranks(folder: Path) -> list[Path]:
    """The files of all ranks in order."""
    found = {(int(m[1]), int(m[2])): p for p in folder.iterdir() if (m := _RANK.fullmatch(p.name))}
    worlds = {world for world, _ in found}
    if len(worlds) > 1:
        raise CheckpointError(
            f"{folder} holds shards of runs with {' and '.join(map(str, sorted(worlds)))} ranks; expected one."
        )
    (world,) = worlds
    # A name may promise any number of ranks.
    if missing := list(islice((r for r in range(world) if (world, r) not in found), 8)):
        raise CheckpointError(
            f"{folder} lacks the shards of rank {', '.join(map(str, missing))} of {world}. Copy them too."
        )
    return [found[world, r] for r in range(world)]


def _assemble(name: str, parts: list[tuple[int, Any]], ranks: list[Path]) -> Stored:
    rank, first = parts[0]
    folder = ranks[rank].parent
    if is_stored(first):
        # A plain tensor is the same on every rank.
        if any(not is_stored(t) or t.shape != first.shape for _, t in parts):
            raise CheckpointError(f"{name} differs in shape from rank to rank in {folder} and is no DTensor.")
        return first
    pieces: dict[tuple[int, ...], Stored] = {}
    shape: tuple[int, ...] | None = None
    for rank, tensor in parts:
        file = ranks[rank]
        try:
            whole = ints(tensor.arguments[1])
            spec, local = tensor.get("_spec"), tensor.get("_local_tensor")
            if not is_stored(local):
                raise TypeError("a shard that is no tensor")
            sizes, position = _mesh(spec.mesh, rank, file, len(ranks))
            box = _box(whole, spec.placements, sizes, position, f"{name} in {file.name}")
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(f"{file} holds {name} as a DTensor of an unknown torch version ({error}).") from error
        shape = shape or whole
        if whole != shape:
            raise CheckpointError(f"{name} is {shape} on one rank and another on {file.name}.")
        lengths = tuple(end - start for start, end in box)
        if 0 in lengths:
            continue
        stored: Stored = local
        if stored.shape != lengths:
            padded = stored.shape[1:] == lengths[1:] and stored.shape[:1] > lengths[:1]
            if not padded:
                raise CheckpointError(f"{name} in {file.name} is {stored.shape}; expected {lengths} by its placement.")
            stored = Rows(stored, ((0, lengths[0]),))
        pieces.setdefault(tuple(start for start, _ in box), stored)
    if not pieces or shape is None:
        raise CheckpointError(f"{name} in {folder} has no entries on any rank.")
    return Pieces(name, shape, tuple(pieces.items()))


def _box(
    shape: tuple[int, ...], placements: Any, sizes: tuple[int, ...], position: tuple[int, ...], what: str
) -> list[tuple[int, int]]:
    """(start, end) on every axis of a rank's shard: each dimension of the mesh splits what the one before left."""
    box = [(0, n) for n in shape]
    for placement, ranks, rank in zip(placements, sizes, position, strict=True):
        kind = placement.name
        if kind == "Shard":
            (axis,) = ints((placement.get("dim"),))
            start, end = box[axis]
            each = -(-(end - start) // ranks)
            box[axis] = (min(end, start + rank * each), min(end, start + (rank + 1) * each))
        elif kind != "Replicate":
            raise CheckpointError(
                f"{what} is placed by {kind} on the mesh of ranks; opdgeo reads Shard and Replicate. Merge the "
                "checkpoint with its trainer's own tool first."
            )
    return box


def _mesh(mesh: Any, rank: int, file: Path, world: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes of a mesh of ranks and the position of a rank on it, in the forms that torch 2.5 to 2.13 pickle."""
    plain = mesh.get("mesh", mesh.get("_mesh"))
    ranks = plain if isinstance(plain, Raw) else mesh.get("_rank_map")
    sizes, strides = (ranks.shape, ranks.stride) if ranks is plain else _layout(mesh.get("_layout"))
    if not isinstance(ranks, Raw) or prod(ranks.shape) > world or not 0 < prod(sizes) <= world:
        raise CheckpointError(
            f"{file.name} holds a tensor on a mesh of {' × '.join(map(str, sizes))} ranks; expected at most {world}."
        )
    if ranks.dtype not in ("int64", "int32"):
        raise TypeError("a mesh whose ranks are no whole numbers")
    members = ranks[(slice(None),) * len(ranks.shape)].flatten().tolist()
    if ranks is not plain:
        members = [members[sum(i * s for i, s in zip(at, strides, strict=True))] for at in product(*map(range, sizes))]
    if rank not in members:
        raise CheckpointError(f"{file.name} holds a tensor of a mesh of ranks that rank {rank} is not part of.")
    at = members.index(rank)
    position = []
    for size in reversed(sizes):
        at, here = divmod(at, size)
        position.append(here)
    return sizes, tuple(reversed(position))


def _layout(layout: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sizes and strides of a mesh's layout of ranks, one dimension each."""
    if axes := layout.get("axes"):
        shapes = [(axis.shape, axis.stride) for axis in axes[:64]]
        if any(len(shape) != 1 for shape, _ in shapes):
            raise CheckpointError("a mesh of ranks with flattened dimensions; opdgeo reads plain ones.")
        return ints([s[0] for s, _ in shapes]), ints([t[0] for _, t in shapes])
    shape, stride = layout.shape, layout.stride
    return ints((shape,) if isinstance(shape, int) else shape), ints((stride,) if isinstance(stride, int) else stride)

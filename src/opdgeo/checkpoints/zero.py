"""DeepSpeed ZeRO checkpoints (`global_step*`): the float32 masters, cut out of the ranks' flat vectors where they lie.

Every rank keeps its part of the masters in `*_optim_states.pt`; the names and shapes of the parameters, in the order of
the vectors, stand in `*_model_states.pt`. In stages 1 and 2 a group's vector is cut into equal parts, one a rank: a
parameter is a stretch of the whole. In stage 3 every parameter is cut into one part a rank, the last one padded. Files are read
as all of torch's are, and DeepSpeed itself is not needed. Source: DeepSpeed 0.19, `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.huggingface import is_plain
from opdgeo.checkpoints.stored import Raw, Stored, bounds, opened
from opdgeo.checkpoints.torchfile import ints, is_stored, unpickle
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

_ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
OPTIMIZER, MODEL = "*_optim_states.pt", "*_model_states.pt"
_RANK = re.compile(r"(?:bf16_)?zero_pp_rank_([0-9]{1,9})_mp_rank_([0-9]{1,9})_(?:optim|model)_states\.pt")


def find(folder: Path) -> Path | None:
    """The folder of one step: `folder` itself, or the one that its file `latest` names."""
    if not folder.is_dir():
        return None
    if any(folder.glob(OPTIMIZER)):
        return folder
    if not (folder / "latest").is_file():
        return None
    with opened(folder / "latest") as source:
        tag = source.read(0, min(source.size, 4096)).decode(errors="replace").strip()
    return folder / tag if is_plain(tag) and any((folder / tag).glob(OPTIMIZER)) else None


@dataclass(frozen=True)
class Stretches:
    """A tensor that lies flat in row-major order, cut into stretches: the vectors (count,) and the places where they begin."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Raw, ...]
    starts: tuple[int, ...]  # of each part in the flat tensor, from 0 on without gaps
    dtype: str = "float32"
    quantised: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(part.file for part in self.parts))

    def __getitem__(self, index: Index) -> Tensor:
        """Whole rows are read: those from the first to the last that the index asks for."""
        import torch

        first, end = bounds(index[0], self.shape[0]) if index else (0, 1)
        row = prod(self.shape[1:])
        found, at, stop = [], first * row, end * row
        while at < stop:
            which = bisect_right(self.starts, at) - 1
            part, start = self.parts[which], self.starts[which]
            until = min(stop, start + part.shape[0])
            found.append(part[slice(at - start, until - start),])
            at = until
        rows = torch.cat(found) if found else torch.empty(0, dtype=getattr(torch, self.dtype))
        if not index:
            return rows[0]
        inner = rows.view(end - first, *self.shape[1:])
        return inner[(0 if isinstance(index[0], int) else slice(None), *index[1:])]


def read(folder: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """The model's tensors in float32.

    Raises:
        CheckpointError: a file names code or is damaged, a rank's is missing, or the vectors are not as long as the parameters.
    """
    optimizers, models = _files(folder, OPTIMIZER), _files(folder, MODEL)
    states = [_dict(_dict(unpickle(f, _ALLOWED), f).get("optimizer_state_dict"), f) for f in optimizers]
    try:
        stage, counts = _number(states[0]["zero_stage"]), states[0]["partition_count"]
        ranks = max(map(_number, counts)) if isinstance(counts, list) else _number(counts)
        if stage not in (1, 2, 3) or ranks != len(optimizers):
            raise CheckpointError(
                f"{folder} is of ZeRO stage {stage} with {ranks} ranks, and {len(optimizers)} of their files {OPTIMIZER} are here; "
                "expected stage 1, 2 or 3 with a file for each. Copy all of them."
            )
        vectors = [_vectors(s["single_partition_of_fp32_groups" if stage < 3 else "fp32_flat_groups"]) for s in states]
        contents = [_dict(unpickle(f, _ALLOWED), f) for f in (models if stage == 3 else models[:1])]
        found: dict[str, Stored] = dict(_buffers(contents[0]))
        groups = contents[0]["param_shapes"]
        groups = groups if isinstance(groups, list) else [groups]
        frozen = {str(name): ints(shape) for name, shape in (contents[0].get("frozen_param_shapes") or {}).items()}
        for name, shape in frozen.items():
            parts = [c["frozen_param_fragments"][name] for c in contents]
            found[name] = _stretches(name, shape, [(part, 0, part.shape[0]) for part in map(_flat, parts)])
        if stage < 3:
            found |= _joined(groups, vectors, states[0].get("param_alignment_paddings"))
        else:
            found |= _gathered({n: s for group in groups for n, s in group.items()}, vectors)
        for name, own in contents[0].get("shared_params", {}).items():
            if isinstance(own, str) and own in found:
                found[name] = found[own]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is not a DeepSpeed ZeRO checkpoint as opdgeo knows it ({error!r}). Convert it where DeepSpeed is: "
            f"python zero_to_fp32.py {folder.parent} OUT --safe_serialization."
        ) from error
    return found


def _joined(
    groups: list[Any], vectors: list[list[Raw]], paddings: list[list[int]] | None
) -> Iterator[tuple[str, Stored]]:
    """Stages 1 and 2: the ranks' parts of a group end to end are its parameters end to end."""
    for number, shapes in enumerate(groups):
        parts = [of_rank[number] for of_rank in vectors]
        starts = list(accumulate((p.shape[0] for p in parts), initial=0))
        at, skipped = 0, paddings[number] if paddings else [0] * len(shapes)
        for (name, shape), skip in zip(shapes.items(), skipped, strict=True):
            size = prod(ints(shape))
            cuts = _cuts(parts, starts, at, at + size)
            yield str(name), _stretches(name, ints(shape), cuts)
            at += size + _number(skip)
        if not 0 <= starts[-1] - at <= 2 * len(parts):  # the end is padded to a multiple of twice the ranks
            raise ValueError(f"vectors of {starts[-1]} entries for parameters of {at}")


def _gathered(shapes: dict[Any, Any], vectors: list[list[Raw]]) -> Iterator[tuple[str, Stored]]:
    """Stage 3: every rank has its part of every parameter, in vectors that may break anywhere."""
    ranks, at = len(vectors), 0
    starts = list(accumulate((part.shape[0] for part in vectors[0]), initial=0))
    if any([p.shape for p in of_rank] != [p.shape for p in vectors[0]] for of_rank in vectors):
        raise ValueError("ranks with vectors of different lengths")
    for name, shape in shapes.items():
        each = -(-prod(ints(shape)) // ranks)
        cuts = [cut for of_rank in vectors for cut in _cuts(of_rank, starts, at, at + each)]
        yield str(name), _stretches(name, ints(shape), cuts)
        at += each
    if at != starts[-1]:
        raise ValueError(f"vectors of {starts[-1]} entries for parameters of {at}")


def _cuts(parts: list[Raw], starts: list[int], at: int, end: int) -> list[tuple[Raw, int, int]]:
    """Entries `at` to `end` of vectors that follow one another: (vector, first, end) for each stretch."""
    if end > starts[-1]:
        raise ValueError(f"vectors of {starts[-1]} entries for parameters of {end}")
    found = []
    while at < end:
        which = bisect_right(starts, at) - 1
        until = min(end, starts[which + 1])
        found.append((parts[which], at - starts[which], until - starts[which]))
        at = until
    return found


def _stretches(name: Any, shape: tuple[int, ...], cuts: list[tuple[Raw, int, int]]) -> Stretches:
    from dataclasses import replace

    from opdgeo.checkpoints.torchfile import SIZES_OF

    if not isinstance(name, str):
        raise TypeError("a name that is no text")
    if sum(end - first for _, first, end in cuts) < prod(shape):
        raise ValueError(f"{name} is longer than its parts")
    parts = tuple(
        replace(part, offset=part.offset + first * SIZES_OF[part.dtype], shape=(end - first,))
        for part, first, end in cuts
    )
    dtypes = {part.dtype for part in parts} or {"float32"}
    if len(dtypes) > 1:
        raise ValueError(f"{name} has parts of {' and '.join(sorted(dtypes))}")
    return Stretches(name, shape, parts, tuple(accumulate((p.shape[0] for p in parts[:-1]), initial=0)), dtypes.pop())


def _vectors(value: Any) -> list[Raw]:
    return [_flat(v) for v in value] if isinstance(value, list) else [_flat(value)]


def _flat(value: Any) -> Raw:
    """A tensor that lies in row-major order, as a vector."""
    from dataclasses import replace

    from opdgeo.checkpoints.stored import contiguous

    shape: tuple[int, ...] = value.shape if isinstance(value, Raw) else ()
    count = prod(shape)
    if not isinstance(value, Raw) or (count and value.stride != contiguous(shape)):
        raise TypeError("a part that is no vector of numbers")
    return replace(value, shape=(count,), stride=(1,))


def _buffers(content: dict[Any, Any]) -> Iterator[tuple[str, Stored]]:
    names, module = content["buffer_names"], content["module"]
    for name in names if isinstance(names, list) else []:
        if isinstance(name, str) and is_stored(value := module.get(name)):
            yield name, value


def _number(value: Any) -> int:
    """A number, or the one that an enumeration's member stands for."""
    value = value.arguments[0] if hasattr(value, "arguments") else value
    if not isinstance(value, int) or not 0 <= value < 1 << 60:
        raise TypeError("a number that is none")
    return value


def _dict(content: Any, file: Path) -> dict[Any, Any]:
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}; expected a part of a DeepSpeed checkpoint.")
    return content


def _files(folder: Path, pattern: str) -> list[Path]:
    """The ranks' files in order."""
    found = [f for f in folder.glob(pattern) if f.is_file()]
    if not found:
        raise CheckpointError(f"{folder} holds no {pattern}; expected a DeepSpeed ZeRO checkpoint. Copy it too.")
    named = {f: m for f in found if (m := _RANK.fullmatch(f.name))}
    others = {m[2] for m in named.values()}
    if len(others) > 1:
        raise CheckpointError(
            f"{folder} is of a model that was split over {len(others)} ranks besides ZeRO; opdgeo reads ZeRO alone. Convert it "
            "with DeepSpeed's ds_to_universal.py, or save the whole model."
        )
    return sorted(found, key=lambda f: (int(named[f][1]) if f in named else -1, f.name))

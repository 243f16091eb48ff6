"""A checkpoint of whole weights: which format it is, its tensors by Hugging Face names, its files.

Headers are read when a checkpoint is opened; a tensor's bytes only when it is asked for. Each format is a `Format`: a
`find` that says where in a folder such weights lie, and a `read` that gives their tensors.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints import dcp, fsdp, ggufs, huggingface, megatron, zero
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.checkpoints.low_precision import dequantised
from opdgeo.checkpoints.names import Matrix, matrices, other_kind, plain, unwrapped
from opdgeo.checkpoints.stored import SIZES, Stored
from opdgeo.errors import CheckpointError, printable

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Format:
    """One way to store weights.

    Attributes:
        expected: the files it is known by, for messages.
        find: the index, file or folder of such weights, given a file or a folder; None where there are none.
        read: its tensors by their stored names, from what `find` gave and the model's `config.json`.
    """

    name: str
    expected: str
    find: Callable[[Path], Path | None]
    read: Callable[[Path, dict[str, Any]], Mapping[str, Stored]]


# In the order in which they are taken when a folder holds several: what training goes on from before what was exported
# from it, since the former has full precision.
FORMATS = (
    Format("FSDP shards", "model_world_size_W_rank_R.pt", fsdp.find, fsdp.read),
    Format("Megatron", "iter_N with metadata.json", megatron.find, megatron.read),
    Format("torch distributed", ".metadata with *.distcp", dcp.find, dcp.read),
    Format("safetensors", "model.safetensors", huggingface.find_safetensors, huggingface.read_safetensors),
    Format("torch", "pytorch_model.bin", huggingface.find_bin, huggingface.read_bin),
    Format("DeepSpeed ZeRO", "global_step*/*_optim_states.pt", zero.find, zero.read),
    Format("GGUF", "*.gguf", ggufs.find, ggufs.read),
)
# Where trainers put the weights inside of a checkpoint's folder: verl and SkyRL, both with Megatron, accelerate.
PLACES = ("actor", "policy", "dist_ckpt", "actor/dist_ckpt", "policy/dist_ckpt", "pytorch_model_fsdp_0")
_STEP = re.compile(r"(?:step|checkpoint|global_step|iter)[-_]([0-9]+)|(?:global_step|weight_v)([0-9]+)")
ADAPTER = "adapter_config.json"
_CONFIGS = ("config.json", "huggingface/config.json")


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: tensor headers by name, nothing of the weights in memory.

    `notes` say what a reader of the results should know: what was left aside, what was de-quantised.
    """

    path: Path
    tensors: dict[str, Stored] = field(repr=False)
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    format: str = "safetensors"
    repository: str = ""  # the name by which it was fetched from the hub
    alias: str = ""  # its name beside another checkpoint whose folder has the same

    @property
    def name(self) -> str:
        """The folder's name, as it stands in the `checkpoint` column; of `global_step_10/actor`, `global_step_10`."""
        return self.alias or self.names[-1]

    @cached_property
    def names(self) -> list[str]:
        """Those of the folders above, from the top, and its own."""
        if self.repository:
            return self.repository.split("/", 1)
        path = self.path.resolve()
        if path.is_file():
            return [printable(part) for part in (*path.parts[1:-1], path.stem)]
        while path.name in PLACES and any(step_of(p.name) is not None for p in path.parents[:2]):
            path = path.parent
        return [printable(part) for part in path.parts[1:]] or [""]

    @cached_property
    def step(self) -> int | None:
        """The training step in a folder name such as ``step-000100`` or ``checkpoint-100``, else None."""
        return step_of(self.names[-1].rpartition("@")[2])

    @property
    def place(self) -> str:
        """Its path, or its name on the hub with the commit, as it stands in run.json."""
        # The hub's cache names a folder by the commit.
        return printable(f"{self.repository.partition('@')[0]}@{self.path.name}" if self.repository else str(self.path))

    @property
    def files(self) -> list[Path]:
        return sorted({file for stored in self.tensors.values() for file in stored.files})

    def read(self, matrix: Matrix) -> torch.Tensor:
        """The matrix as (out, in), in its stored dtype.

        Raises:
            CheckpointError: the file became unreadable, or its dtype holds no plain weights.
        """
        if reason := self.unreadable(matrix.tensor):
            raise CheckpointError(reason)
        return matrix.cut(self.tensors[matrix.tensor])

    def unreadable(self, tensor: str) -> str | None:
        """Why a tensor's weights cannot be read, as its header says; None where they can."""
        stored = self.tensors[tensor]
        if stored.dtype in SIZES:
            return None
        return (
            f"{tensor} in {stored.files[0]} is stored as {stored.dtype}; expected one of {', '.join(SIZES)}. Convert the "
            "checkpoint to bf16, fp16 or fp32, or load it and save it again as safetensors."
        )

    def factors(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(rows, r) and (cols, r) float64 factors of ΔW, where the checkpoint is an update that is stored as such."""
        return None

    def itemsize(self, tensor: str) -> int:
        """Bytes of an entry of a tensor in memory."""
        return SIZES.get(self.tensors[tensor].dtype, 1)

    def manifest(self) -> dict[str, Any]:
        """Path, format, dtypes and every file with its size and SHA-256: what the results were computed from."""
        dtypes = Counter(stored.dtype for stored in self.tensors.values())
        quantised = Counter(stored.quantised for stored in self.tensors.values() if stored.quantised)
        files = self.manifest_of(self.files)
        manifest = {"path": self.place, "format": self.format, "dtypes": dict(dtypes), "files": files}
        manifest |= {"quantised": dict(quantised)} if quantised else {}
        return manifest | ({"notes": list(self.notes)} if self.notes else {})

    def manifest_of(self, files: Sequence[Path]) -> list[dict[str, Any]]:
        """Each file's name, seen from the checkpoint, its size and SHA-256.

        Raises:
            CheckpointError: one has gone, or its disk fails.
        """
        folder = self.path if self.path.is_dir() else self.path.parent
        try:
            return [
                {
                    "name": printable(f.relative_to(folder).as_posix() if f.is_relative_to(folder) else f.name),
                    "bytes": f.stat().st_size,
                    "sha256": _sha256(f),
                }
                for f in files
            ]
        except OSError as error:
            raise CheckpointError(f"cannot read {error.filename or folder}: {error}. Copy it again.") from error


def open_weights(path: Path) -> Checkpoint:
    """Open a folder or file of whole weights, reading headers only.

    A folder that holds weights in several formats is opened in the first of `FORMATS`; `notes` name the others.

    Raises:
        CheckpointError: nothing there, no weights there, or a damaged file or index; the message names it.
    """
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {path} does not exist; expected a folder or file of weights ({expected()}). {_beside(path)}"
        )
    if not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is no regular file and no folder; expected {expected()}. Check the path.")
    found = find_weights(path)
    if not found:
        if path.is_file():
            raise CheckpointError(f"{path} is not a file of weights that opdgeo knows; expected {expected()}.")
        steps = {step: at for step, at in step_folders(path).items() if find_weights(at) or (at / ADAPTER).is_file()}
        if steps:
            some = ", ".join(steps[step].name for step in sorted(steps)[-2:])
            raise CheckpointError(
                f"{path} is a run and not one checkpoint: it holds {len(steps)}, such as {some}. Use opdgeo track BASE {path} for "
                "all of one run, or give one of them."
            )
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: expected {expected()}, found {inside}.")
    (chosen, place), *others = found
    folder = place if place.is_dir() else place.parent
    homes = (folder, folder.parent, path) if folder.name in PLACES else (folder, path)
    configs = (at / name for at in dict.fromkeys(homes) if at.is_dir() for name in _CONFIGS)
    config = next((read_json(c) for c in configs if c.is_file()), {}) if path.is_dir() else {}
    notes = tuple(
        f"{path} also holds {other.name} weights ({where.relative_to(path).as_posix()}), which were not read; give "
        "them as the checkpoint to measure those"
        for other, where in others
    )
    tensors, more = understood(chosen.read(place, config), config, place, path)
    return Checkpoint(path, tensors, config, notes + more, chosen.name)


def understood(
    stored: Mapping[str, Stored], config: dict[str, Any], place: Path, path: Path
) -> tuple[dict[str, Stored], tuple[str, ...]]:
    """The tensors of `place` in the checkpoint `path`, as numbers and by their canonical names, and what is to be noted of them.

    Raises:
        CheckpointError: none is stored as plain numbers.
    """
    tensors = dequantised(stored, config)
    if not tensors:
        raise CheckpointError(f"{place} holds no tensors; expected a model's weights.")
    if not any(stored.dtype in SIZES for stored in tensors.values()):
        first = next(iter(tensors))
        raise CheckpointError(
            f"{place} holds no plain weights: {first} is stored as {tensors[first].dtype}; expected some of {', '.join(SIZES)}. "
            "Convert it, or load it and save it again as safetensors."
        )
    kinds = sorted({stored.quantised for stored in tensors.values() if stored.quantised})
    notes = (f"{path} is quantised ({', '.join(kinds)}): what is measured includes its rounding",) if kinds else ()
    return canonical(tensors), notes


def step_folders(run: Path) -> dict[int, Path]:
    """The folders in `run` that are named like steps, by step.

    Raises:
        CheckpointError: two folders of the same step.
    """
    found: dict[int, Path] = {}
    for path in sorted(run.iterdir()):
        if path.is_dir() and (step := step_of(path.name)) is not None:
            if step in found:
                raise CheckpointError(
                    f"{run} holds {found[step].name} and {path.name}, both of step {step}; expected one folder a step. Move "
                    "one away, or give the checkpoints one by one."
                )
            found[step] = path
    return found


def canonical(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """Tensors by the names of a Hugging Face language model: without what trainers and multimodal models wrap around them.

    Where two tensors would share a name, all keep their own.
    """
    for rename in (unwrapped, _without_prefix(tensors), plain):
        names = Counter(map(rename, tensors))
        tensors = {rename(n) if names[rename(n)] == 1 else n: stored for n, stored in tensors.items()}
    return dict(tensors)


# What a whole state dict may stand under, when no name is known with it and some are without it.
_PREFIXES = ("model.", "app.model.", "app.", "state_dict.", "policy.", "actor.")


def _without_prefix(tensors: Mapping[str, Stored]) -> Callable[[str], str]:
    def known(name: str, stored: Stored) -> bool:
        name = plain(name)
        return other_kind(name) is not None or matrices(name, stored.shape) is not None

    def stripped(prefix: str) -> bool:
        return any(known(unwrapped(n).removeprefix(prefix), s) for n, s in tensors.items() if n.startswith(prefix))

    if any(known(unwrapped(name), stored) for name, stored in tensors.items()):
        return lambda name: name
    prefix = next((p for p in _PREFIXES if stripped(p)), "")
    return lambda name: name.removeprefix(prefix)


def find_weights(path: Path) -> list[tuple[Format, Path]]:
    """Every format of which there are weights at `path` or in a place inside, in the order of preference."""
    places = [path, *(path / inner for inner in PLACES if (path / inner).is_dir())]
    return [(f, place) for f in FORMATS for at in places if (place := f.find(at))]


def expected() -> str:
    """The files that are known as weights, for messages: what most people have comes first."""
    common = ["model.safetensors", ADAPTER]
    return ", ".join(dict.fromkeys([*common, *(f.expected for f in FORMATS)]))


def _beside(path: Path) -> str:
    """What to try where `path` is not there: the checkpoints beside it, else what has a name like it."""
    with suppress(OSError, CheckpointError):
        steps = step_folders(path.parent)
        names = [steps[step].name for step in sorted(steps)]
        names = names or difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()])
        if names:
            some = ", ".join(printable(name) for name in names[-8:])
            return f"{path.parent} holds {some}{' and earlier ones' if len(names) > 8 else ''}."
    return "Check the path."


def step_of(name: str) -> int | None:
    """The step in a name.

    Raises:
        CheckpointError: one of 10¹⁸ or more, which the tables cannot hold.
    """
    found = _STEP.fullmatch(name)
    digits = (found[1] or found[2]) if found else ""
    if len(digits) > 18:
        raise CheckpointError(f"{name} is named like a step of {len(digits)} digits; expected at most 18. Rename it.")
    return int(digits) if digits else None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""Hugging Face folders: `model.safetensors`, or shards listed by `model.safetensors.index.json`.

Headers are read when a checkpoint is opened; a tensor's bytes only when it is asked for, memory-mapped. Other
safetensors files in the folder (adapters, consolidated copies, optimizer states) are not weights and are left alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.names import Matrix, plain
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SIZES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
_STEP = re.compile(r"(?:step|checkpoint|global_step)[-_](\d+)")


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies, under which name, and what it is, from the file's header."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return SIZES.get(self.dtype, 1)


@dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint: tensor headers by name, nothing of the weights in memory."""

    path: Path
    tensors: dict[str, Stored]
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a reader of the results should know

    @property
    def name(self) -> str:
        """The folder's name, as it stands in the `checkpoint` column."""
        return self.path.resolve().name if self.path.is_dir() else self.path.stem

    @property
    def step(self) -> int | None:
        """The training step in a folder name such as ``step-000100`` or ``checkpoint-100``, else None."""
        found = _STEP.fullmatch(self.name)
        return int(found[1]) if found else None

    @property
    def files(self) -> list[Path]:
        return sorted({stored.file for stored in self.tensors.values()})

    def read(self, matrix: Matrix) -> Tensor:
        """The matrix as (out, in), in its stored dtype.

        Raises:
            CheckpointError: the file became unreadable, or its dtype holds no plain weights.
        """
        from safetensors import SafetensorError, safe_open

        stored = self.tensors[matrix.tensor]
        if stored.dtype not in DTYPES:
            raise CheckpointError(
                f"{matrix.tensor} in {stored.file} is stored as {stored.dtype}; expected one of {', '.join(DTYPES)}. "
                "Convert the checkpoint to bf16, fp16 or fp32 first."
            )
        try:
            with safe_open(stored.file, framework="pt") as file:
                return matrix.cut(file.get_slice(stored.name))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {matrix.tensor} from {stored.file}: {error}") from error

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        """(rows, r) and (cols, r) float64 factors of ΔW, where the checkpoint is an update that is stored as such."""
        return None

    def manifest(self) -> dict[str, Any]:
        """Path, dtypes and every file with its size and SHA-256: what the results were computed from."""
        dtypes: dict[str, int] = {}
        for stored in self.tensors.values():
            name = DTYPES.get(stored.dtype, stored.dtype)
            dtypes[name] = dtypes.get(name, 0) + 1
        files = [{"name": f.name, "bytes": f.stat().st_size, "sha256": _sha256(f)} for f in self.files]
        known = {"path": str(self.path), "format": "safetensors", "dtypes": dtypes, "files": files}
        return known | ({"notes": list(self.notes)} if self.notes else {})


def open_checkpoint(path: str | Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a Hugging Face folder, one safetensors file, or a PEFT adapter on `base`, reading headers only.

    Raises:
        CheckpointError: nothing there, no weights there, or a damaged file or index; the message names it.
    """
    path = Path(path)
    if path.is_file() and path.suffix == ".safetensors":
        return Checkpoint(path, _plain(_headers(path)))
    if not path.exists():
        raise CheckpointError(
            f"checkpoint {path} does not exist; expected a Hugging Face folder with {SINGLE} or {INDEX}, or one "
            ".safetensors file. Check the path."
        )
    if not path.is_dir():
        raise CheckpointError(
            f"checkpoint {path} is not a folder or a .safetensors file. Convert it to safetensors first."
        )
    if is_adapter(path):
        if base is None:
            raise CheckpointError(
                f"{path} is a PEFT adapter, which has no weights without its base. Give the base first and the adapter "
                "as what was tuned: opdgeo compare BASE ADAPTER, or open_checkpoint(ADAPTER, base=…)."
            )
        from opdgeo.checkpoints.adapter import open_adapter

        return open_adapter(path, base)
    tensors: dict[str, Stored] = {}
    if (path / INDEX).exists():
        listed = _json(path / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{path / INDEX} has no weight_map; expected tensor names mapped to shard files.")
        for shard in sorted(set(map(str, listed.values()))):
            # An index is untrusted input: a shard is a plain file name in this folder.
            if PurePath(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path / INDEX} names the shard {shard!r}; expected a .safetensors file in the folder."
                )
            if not (path / shard).is_file():
                raise CheckpointError(f"{path / INDEX} names {shard}, which is missing from {path}. Download it again.")
            headers = _headers(path / shard)
            for name in (n for n, where in listed.items() if where == shard):
                if name not in headers:
                    raise CheckpointError(f"{path / INDEX} places {name} in {shard}, which does not hold it.")
                tensors[name] = headers[name]
    elif (path / SINGLE).is_file():
        tensors = _headers(path / SINGLE)
    if not tensors:
        inside = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{path} holds no weights: expected {SINGLE} or {INDEX}, found {inside}.")
    config = _json(path / "config.json") if (path / "config.json").is_file() else {}
    return Checkpoint(path, _plain(tensors), config)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no whole model."""
    return (path / "adapter_config.json").is_file() and not (path / INDEX).exists() and not (path / SINGLE).exists()


def run_checkpoints(paths: list[str | Path], base: Checkpoint | None = None) -> list[Checkpoint]:
    """The checkpoints of a trajectory: several checkpoints as given, or the step folders of one run in step order.

    `base` is what adapters among them are added to.

    Raises:
        CheckpointError: a run folder without `step-*` or `checkpoint-*` folders, or one of them unreadable.
    """
    run = Path(paths[0])
    if len(paths) == 1 and run.is_dir() and not (run / INDEX).exists() and not (run / SINGLE).exists():
        steps = {int(m[1]): p for p in run.iterdir() if p.is_dir() and (m := _STEP.fullmatch(p.name))}
        if not steps and not is_adapter(run):
            raise CheckpointError(f"{run} has no checkpoints: expected folders such as step-000100 or checkpoint-100.")
        # A trainer leaves its last adapter beside the folders of the steps.
        return [open_checkpoint(steps[step], base) for step in sorted(steps)] or [open_checkpoint(run, base)]
    opened = [open_checkpoint(p, base) for p in paths]
    names = [c.name for c in opened]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise CheckpointError(
            f"two checkpoints are both named {twice[0]}; rename a folder so that each has its own name."
        )
    return opened


def _plain(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Tensors by their names without a multimodal wrapper; where two would share one, both keep their own."""
    names = Counter(map(plain, tensors))
    return {plain(n) if names[plain(n)] == 1 else n: stored for n, stored in tensors.items()}


def _headers(file: Path) -> dict[str, Stored]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {n: Stored(file, n, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is not a readable safetensors file ({error}). Copy or download it again."
        ) from error


def _json(file: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file} holds a {type(loaded).__name__}; expected a JSON object.")
    return loaded


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

"""DeepSpeed ZeRO checkpoints (`global_step*`): the float32 masters, put together by DeepSpeed's own consolidator.

The consolidator unpickles its files freely, so each is read first with nothing but DeepSpeed's few state classes allowed; what
names anything else never reaches it. It is lazy for ZeRO-3 (shards stay memory-mapped); for ZeRO-1 and ZeRO-2 it joins
the ranks' masters in memory, all of the model in float32. Source: DeepSpeed, `utils/zero_to_fp32.py`.
"""

from __future__ import annotations

import glob
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.huggingface import is_plain
from opdgeo.checkpoints.stored import Stored
from opdgeo.checkpoints.torchfile import dtype_name, records, unpickle
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

_ALLOWED = records(
    (
        "deepspeed.runtime.fp16.loss_scaler.LossScaler",
        "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
        "deepspeed.runtime.zero.config.ZeroStageEnum",
        "deepspeed.utils.tensor_fragment.fragment_address",
    )
)


def find(folder: Path) -> Path | None:
    """The folder of one step: `folder` itself, or the one that its file `latest` names."""
    if not folder.is_dir():
        return None
    if any(folder.glob("*_optim_states.pt")):
        return folder
    tag = (folder / "latest").read_text(errors="replace").strip() if (folder / "latest").is_file() else ""
    return folder / tag if is_plain(tag) and any((folder / tag).glob("*_optim_states.pt")) else None


def read(folder: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """The model's tensors in float32.

    Raises:
        CheckpointError: a path that the consolidator would read as a pattern, DeepSpeed is missing, a file names code or is
            damaged, or the consolidator refuses.
    """
    if glob.escape(str(folder)) != str(folder):  # else it would match, and unpickle, files of other folders
        raise CheckpointError(
            f"{folder} has one of the characters *, ? and [ in its path, which DeepSpeed's consolidator takes for a pattern. "
            "Rename the folder."
        )
    if find_spec("deepspeed") is None:
        raise CheckpointError(
            f"{folder} is a DeepSpeed ZeRO checkpoint, which needs DeepSpeed's consolidator: pip install 'opdgeo[deepspeed]'. Or "
            f"convert it where DeepSpeed is: python zero_to_fp32.py {folder.parent} OUT --safe_serialization."
        )
    files = tuple(sorted({*folder.glob("*_optim_states.pt"), *folder.glob("*_model_states.pt")}))
    return {
        name: Gathered(folder, name, tuple(tensor.shape), dtype_name(tensor.dtype), files)
        for name, tensor in _consolidated(folder, _stamps(files)).items()
    }


@dataclass(frozen=True)
class Gathered:
    """A tensor of the consolidator's, gathered from the ranks' shards when it is read."""

    folder: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    files: tuple[Path, ...]
    quantised: str | None = None

    def __getitem__(self, index: Index) -> Tensor:
        gathered: Tensor = _consolidated(self.folder, _stamps(self.files))[self.name].contiguous().detach()
        return gathered[index].clone()


def _stamps(files: tuple[Path, ...]) -> tuple[tuple[Path, int, int], ...]:
    return tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in files)


@cache
def _consolidated(folder: Path, stamps: tuple[tuple[Path, int, int], ...]) -> dict[str, Any]:
    """Name -> tensor or DeepSpeed's lazy one, for as long as the files are those of `stamps`."""
    for file, *_ in stamps:
        unpickle(file, _ALLOWED)
    try:
        with redirect_stdout(sys.stderr):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            found = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name, lazy_mode=True)
    except Exception as error:  # the consolidator raises what it meets
        raise CheckpointError(f"DeepSpeed's consolidator refuses {folder}: {error}") from error
    return dict(found)

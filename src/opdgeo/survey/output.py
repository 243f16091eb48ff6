"""Whether a results folder can take a run's files: asked before anything is measured, not after hours of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import Checkpoint, Matrix
from opdgeo.checkpoints.checkpoint import find_weights, step_folders
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.survey.results import LONGEST, OnDisk

ROW, ROWS = 120, 80  # bytes of a row of the tables at most, and rows of a matrix at a checkpoint


def check_folder(out: Path, work: Sequence[Matrix], checkpoints: int) -> None:
    """Whether the data files of `work` at so many checkpoints can be written into `out`, which may not exist yet.

    Raises:
        ConfigError: `out` is a file, holds a folder where a file belongs, cannot be written, or its disk is full.
    """
    there = next(p for p in (out, *out.absolute().parents) if p.exists() or p.is_symlink())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; expected a folder for the results. Give -o another name.")
    for name in (*OnDisk.NAMES, "summary.json", "run.json", "report.html"):
        if (out / name).is_dir():
            raise ConfigError(
                f"{out / name} is a folder; expected a file of a result, or nothing. Give -o another folder."
            )
    needed = checkpoints * sum(ROWS * ROW + 5 * 8 * min(m.rows, m.cols) for m in work)
    try:
        free = shutil.disk_usage(there).free
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(bytes(4096))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise ConfigError(
            f"{out} cannot be written ({error.strerror or error}); expected a folder for the results. Give -o another one."
        ) from error
    if free < needed:
        raise ConfigError(
            f"the disk of {out} has {free / 1e6:.1f} MB free; expected {needed / 1e6:.1f} MB for the results. Make room, or give "
            "-o a folder on another disk."
        )


def check_earlier(
    out: Path,
    base: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    *,
    overwrite: bool,
    growing: Path | None = None,
    pairs: bool = False,
) -> None:
    """Whether what lies in `out` may be replaced: nothing, or a result of this base whose checkpoints are all measured again.

    Another result needs `overwrite`; a study and signals are never replaced, and nothing is written among the files of a
    training run or a checkpoint. `growing` is the folder of a run that goes on, whose checkpoints are not known yet: then those
    of the result have to lie in it. The result of `pairs` of updates is another one than that of the same checkpoints one by one.

    Raises:
        ConfigError: it may not; the message says what lies there.
    """
    check_study(out)
    path = out / "run.json"
    if not path.is_file():
        _check_training(out)
    if overwrite or not path.is_file():
        return
    try:
        run = read_json(path, LONGEST)
        before, after = run["base"], list(run["checkpoints"])
        names = [str(Path(one["path"])) for one in (before, *after)]
        if growing is not None:
            same = all(Path(name).resolve().parent == growing.resolve() for name in names[1:])
        else:
            same = all(any(_is(one, c) for c in checkpoints) for one in after)
        same = same and _is(before, base) and pairs == ("pairs" in run)
        more = f" and {len(after) - 1} more" if len(after) > 1 else ""
        what = f"the result of {'relate' if 'pairs' in run else 'another update'}, {names[0]} → {names[-1]}{more}, of {run.get('started')}"
    except (CheckpointError, OSError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        same, what = False, "a run.json that is not of compare, track or relate, or damaged"
    if not same:
        raise ConfigError(f"{out} holds {what}. Give -o another folder, or add --overwrite to replace it.")


def check_study(out: Path) -> None:
    """Raises:
    ConfigError: `out` holds a study or signals.
    """
    for name, what in (("claims.json", "a study"), ("arms", "a study"), ("signals.json", "signals")):
        if (out / name).exists():
            raise ConfigError(f"{out} holds {what}, which nothing replaces. Give -o another folder.")


def _check_training(out: Path) -> None:
    """Raises:
    ConfigError: `out` holds a training run or a checkpoint.
    """
    if not out.is_dir():
        return
    try:
        if (out / "log.jsonl").exists() or any(map(find_weights, step_folders(out).values())):
            what = "a training run"
        elif find_weights(out):
            what = "the weights of a checkpoint"
        else:
            return
    except CheckpointError:  # two folders of one step, an unreadable checkpoint
        what = "a training run or a checkpoint"
    raise ConfigError(f"{out} holds {what}. Give -o another folder, such as {out / 'geometry'}.")


def _is(recorded: dict[str, Any], checkpoint: Checkpoint) -> bool:
    """Whether run.json's entry of a checkpoint means this one: by its place, and where that differs by its files' content."""
    if recorded["path"] == checkpoint.place or Path(recorded["path"]).resolve() == checkpoint.path.resolve():
        return True
    if sorted(f["bytes"] for f in recorded["files"]) != sorted(f.stat().st_size for f in checkpoint.files):
        return False
    return sorted(f["sha256"] for f in recorded["files"]) == sorted(f["sha256"] for f in checkpoint.manifest()["files"])

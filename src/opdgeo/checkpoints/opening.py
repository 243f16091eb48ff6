"""Opening what a path or a name means: whole weights, an adapter or a delta on a base, a repository of the hub, a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from opdgeo.assets import PACKAGED, packaged
from opdgeo.checkpoints import hub, huggingface
from opdgeo.checkpoints.adapter import open_adapter
from opdgeo.checkpoints.checkpoint import ADAPTER, Checkpoint, find_weights, open_weights, step_folders, step_of
from opdgeo.checkpoints.delta import is_delta, open_version
from opdgeo.errors import CheckpointError, ConfigError, printable


def open_checkpoint(path: str | Path, base: Checkpoint | None = None) -> Checkpoint:
    """Open a checkpoint of any known format, or a PEFT adapter or weight delta on `base`, reading headers only.

    `path` is a folder or a file; else the name of a packaged model (`assets.PACKAGED`), or of a repository on the Hugging Face hub,
    ``org/name@revision``.

    A folder that holds weights in several formats is opened in the first of `FORMATS`; `notes` name the others.

    Raises:
        CheckpointError: nothing there, no weights there, or a damaged file or index; the message names it.
    """
    with _readable(path):
        opened = _open(path, base)
    for name in opened.tensors:  # what the tables could not hold is found now, not when they are written
        if not _is_text(name):
            raise CheckpointError(f"{path} holds a tensor named {printable(name)}, which is no text. Save it again.")
    _ = opened.step
    return opened


def _open(path: str | Path, base: Checkpoint | None) -> Checkpoint:
    name, path = str(path), Path(path)
    if not path.exists() and name in PACKAGED:
        path = packaged(name)
    if not path.exists() and hub.is_name(name):
        found = hub.open_or_fetch(name)
        return replace(found if isinstance(found, Checkpoint) else open_checkpoint(found, base), repository=name)
    if is_adapter(path):
        if base is None:
            raise CheckpointError(
                f"{path} is a PEFT adapter, which has no weights without its base. Give the base first and the adapter "
                "as what was tuned: opdgeo compare BASE ADAPTER, or open_checkpoint(ADAPTER, base=…)."
            )
        return open_adapter(path, base)
    if is_delta(path):
        if base is None:
            raise CheckpointError(
                f"{path} is a weight delta, which says what changed and not the weights themselves. Give the checkpoint "
                "that the run started from as BASE: opdgeo track BASE RUN_DIR, or open_checkpoint(DELTA, base=…)."
            )
        return open_version(path, base)
    return open_weights(path)


def is_adapter(path: Path) -> bool:
    """Whether a folder holds a PEFT adapter and no exported whole model; a trainer's own state beside it is the adapter's too."""
    whole = huggingface.find_safetensors(path) or huggingface.find_bin(path)
    return (path / ADAPTER).is_file() and whole is None


def run_checkpoints(paths: list[str | Path], base: Checkpoint | None = None) -> list[Checkpoint]:
    """The checkpoints of a trajectory: several checkpoints as given, or the step folders of one run in step order.

    A run may hold its last weights beside the folders of its steps; a folder that is named like a step is one checkpoint.
    `base` is what adapters and weight deltas among them are added to.

    Raises:
        CheckpointError: a run folder without `step-*` or `checkpoint-*` folders, or one of them unreadable.
    """
    run = Path(paths[0])
    if len(paths) == 1 and run.is_dir():
        with _readable(run):
            steps = step_folders(run)
            weights = find_weights(run) or is_adapter(run)
        if steps and step_of(run.name) is None:
            return [open_checkpoint(steps[step], base) for step in sorted(steps)]
        if not weights:
            raise CheckpointError(f"{run} has no checkpoints: expected folders such as step-000100 or checkpoint-100.")
    opened = [open_checkpoint(p, base) for p in paths]
    names = [c.name for c in opened]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise CheckpointError(
            f"two checkpoints are both named {twice[0]}; rename a folder so that each has its own name."
        )
    return opened


def tell_apart(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """The checkpoints with names that differ: a folder's own, and where two have the same, with those above as far as they are needed.

    Raises:
        ConfigError: one is there twice.
    """
    for length in range(1, max(len(c.names) for c in checkpoints) + 1):
        named = ["/".join(c.names[-length:]) for c in checkpoints]
        if len(set(named)) == len(named):
            return [replace(c, alias="" if length == 1 else name) for c, name in zip(checkpoints, named, strict=True)]
    twice = next(name for name in named if named.count(name) > 1)
    raise ConfigError(f"{twice} is given twice; expected different updates. Leave one out.")


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Files that cannot be looked at (links in a circle, names too long, a disk that fails) make an unreadable checkpoint."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}. Copy or download it again.") from error


def _is_text(name: str) -> bool:
    """Whether a name can be written: without halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True

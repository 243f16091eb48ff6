"""What the checkpoints' own metadata says against the order they were given in: two siblings, a swapped pair."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from opdgeo.checkpoints import Checkpoint
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.errors import CheckpointError


def remarks(base: Checkpoint, checkpoints: Sequence[Checkpoint]) -> list[str]:
    """What a reader should know before the numbers; nothing where the metadata is silent. One remark of a kind."""
    found: dict[str, str] = {}
    start = _origin(base)
    for tuned in checkpoints:
        origin = _origin(tuned)
        if start is not None and _is(start, tuned):
            found.setdefault("order", f"{base.name} was trained from {tuned.name}: BASE and TUNED look swapped.")
        elif base.step is not None and tuned.step is not None and _run(base) == _run(tuned):
            if base.step > tuned.step:
                text = (
                    f"BASE is step {base.step} and {tuned.name} step {tuned.step} of the same run: they look swapped."
                )
                found.setdefault("order", text)
        elif origin is not None and _is(origin, base):
            continue
        elif origin is not None and origin == start:
            found.setdefault(
                "siblings",
                f"{base.name} and {tuned.name} were both trained from {origin}: what is measured is the difference between the "
                f"two, not the update of either. For that: opdgeo compare {origin} {_given(tuned)}; for how alike the two are: "
                f"opdgeo relate {origin} {_given(base)} {_given(tuned)}",
            )
        elif base.step is not None and tuned.step is not None:
            found.setdefault(
                "siblings",
                f"{base.name} and {tuned.name} are checkpoints of two runs, {_run(base)} and {_run(tuned)}: what is measured is "
                "the difference between the two, not the update of either. For that, give the checkpoint that a run started from; "
                "opdgeo relate compares the updates of several.",
            )
    return list(found.values())


def _run(checkpoint: Checkpoint) -> Path:
    return checkpoint.path.resolve().parent


def _given(checkpoint: Checkpoint) -> str:
    """As it can be given on a command line."""
    return checkpoint.repository or str(checkpoint.path)


def _is(origin: str, checkpoint: Checkpoint) -> bool:
    """Whether an origin names this checkpoint; a relative one may be from another folder, and is known by its end."""
    if origin == checkpoint.repository.partition("@")[0]:
        return True
    there = checkpoint.path.resolve()
    return origin == str(there) or (not Path(origin).exists() and Path(origin).parts[-2:] == there.parts[-2:])


def _place(name: str | Path) -> str:
    """A path as one text however it was written; the name of a model on the hub as it is."""
    path = Path(name)
    return str(path.resolve()) if path.exists() else str(name)


def _origin(checkpoint: Checkpoint) -> str | None:
    """Where the training of a checkpoint started, as its run's config, its adapter's or its own says."""
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    for file, key, sign in (
        (_run(checkpoint) / "config.json", "origin", "arm"),
        (folder / "adapter_config.json", "base_model_name_or_path", "peft_type"),
        (folder / "config.json", "_name_or_path", ""),
    ):
        with suppress(OSError, CheckpointError):
            if file.is_file() and isinstance(config := read_json(file), dict) and (not sign or sign in config):
                name = config.get(key)
                own = (_place(checkpoint.path), checkpoint.repository.partition("@")[0])
                if isinstance(name, str) and name and _place(name) not in own:
                    return _place(name)
    return None

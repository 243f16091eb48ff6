"""What speaks against the checkpoints as they were given: their own metadata (two siblings, a swapped pair), tensors without a
partner, and what was measured of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import Checkpoint
from opdgeo.checkpoints.adapter import Adapter
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.checkpoints.names import matrices
from opdgeo.checkpoints.pairing import select_roles
from opdgeo.diagnostics import diagnostics
from opdgeo.errors import CheckpointError
from opdgeo.survey.request import Request


def known(request: Request) -> list[str]:
    """What a reader should know before the numbers, from headers and metadata: matrices that are not measured come first."""
    found = [*_alone(request), *remarks(request.base, request.checkpoints)]
    if request.trajectory and len(request.checkpoints) == 1:
        (only,) = request.checkpoints
        found.append(
            f"{only.name} is the only checkpoint, so there is no trajectory. For one update: opdgeo compare {_given(request.base)} "
            f"{_given(only)}"
        )
    return found


def measured(summary: dict[str, Any]) -> list[str]:
    """What the numbers say against the pair: the first checkpoint with such a one, and how many more there are."""
    found = []
    for name, diagnostic in diagnostics().items():
        doubts = []
        for one in summary["checkpoints"]:
            means = [d["mean_computed"] for d in one["diagnostics"] if d["diagnostic"] == name]
            doubts += [
                (one["checkpoint"], why) for mean in means if mean is not None and (why := diagnostic.doubt(mean))
            ]
        if doubts:
            more = f" (and {len(doubts) - 1} more checkpoints)" if len(doubts) > 1 else ""
            found.append(f"BASE and {doubts[0][0]}: {doubts[0][1]}{more}.")
    return found


def _alone(request: Request) -> list[str]:
    """Matrices of the wanted roles that only one of two checkpoints has, one remark for BASE and one for the others."""
    found: dict[str, str] = {}
    roles = select_roles(request.roles)
    for tuned, pairing in zip(request.checkpoints, request.pairings, strict=True):
        sides = [("BASE", request.base, tuned, pairing.base_only), ("TUNED", tuned, request.base, pairing.tuned_only)]
        for side, one, other, names in sides:
            shapes = {name: one.tensors[name].shape for name in names}
            lone = [
                m for name, shape in shapes.items() for m in matrices(name, shape, one.config) or [] if m.role in roles
            ]
            if lone:
                text = (
                    f"{len(lone)} of {len(lone) + len(pairing.matrices)} matrices of {one.name} have no partner in {other.name} and are "
                    f"not measured, such as {lone[0].name}."
                )
                found.setdefault(side, text)
    return list(found.values())


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
        elif base.step is not None and _run(base) != tuned.path.resolve() and not isinstance(tuned, Adapter):
            found.setdefault(
                "order",
                f"BASE, {base.name}, is named like a step of a training run and {tuned.name} is not. If training started from "
                f"{tuned.name}, the two are swapped.",
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

"""`track --follow`: a run folder that is still growing, measured checkpoint by checkpoint.

When a checkpoint may be read:

* step-* of `opdgeo train` appears whole, renamed into place;
* checkpoint-* of transformers once its trainer_state.json parses: `Trainer._save_checkpoint` writes it last, after weights,
  optimizer and random states;
* any other once its weights open (a safetensors header fixes the file's length, an index names every shard) and none of its
  files changed for `SETTLE` seconds.

When the run is over: `opdgeo train` wrote the last step of its config.json; transformers' trainer_state.json says that
global_step reached max_steps; else nothing new came for `idle` minutes, or Ctrl-C. Until then "final" is the last checkpoint
seen, and the files say `growing`. A checkpoint that the run deletes (`save_total_limit`) keeps its place once measured; as
the walk's increments need the checkpoint before, a run should keep two.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import Checkpoint, open_checkpoint, pair
from opdgeo.checkpoints.checkpoint import step_folders
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.diagnostics import Settings
from opdgeo.errors import CheckpointError, ConfigError, PairingError
from opdgeo.survey.output import check_earlier, check_folder
from opdgeo.survey.parts import Parts, Stamp, inputs, stamp
from opdgeo.survey.request import Execution, Request
from opdgeo.survey.results import PARTS, Result
from opdgeo.survey.run import survey
from opdgeo.survey.trail import Trail

SETTLE, POLL = 60.0, 2.0  # seconds
LONGEST = 1 << 28  # bytes of a trainer's state


class Growing:
    """A survey's source (`run.Source`): a run's checkpoints as they were when first seen. Some may be gone since."""

    deletes = True

    def __init__(self, run: Path, base: Checkpoint, out: Path, roles: str):
        self.run, self.base, self.out, self.roles = run, base, out, roles
        self.checkpoints: dict[int, Checkpoint] = {}
        self._stamps: dict[Path, Stamp] = {base.path: stamp(base)}
        self._manifests: dict[Path, dict[str, Any]] = {}
        self.measured: set[Path] = set()
        self._states: dict[Path, tuple[Any, float]] = {}  # files of a folder, and since when they are these
        self.unreadable: dict[Path, str] = {}  # complete, and why they do not open or do not fit the base

    def look(self) -> list[str]:
        """Take in the checkpoints that are complete and new; returns their names."""
        new = []
        for step, folder in sorted(step_folders(self.run).items() if self.run.is_dir() else ()):
            if step not in self.checkpoints and self._complete(folder):
                try:
                    opened = open_checkpoint(folder, self.base)
                    pair(self.base, opened, self.roles)
                    self._stamps[opened.path] = stamp(opened)
                except (CheckpointError, PairingError, FileNotFoundError) as error:  # not readable yet, or gone already
                    self.unreadable[folder] = str(error)
                    continue
                self.unreadable.pop(folder, None)
                self.checkpoints[step] = opened
                new.append(opened.name)
        return new

    def forget_the_gone(self) -> None:
        """Leave out what the run deleted before it was measured."""
        self.checkpoints = {s: c for s, c in self.checkpoints.items() if c.path.exists() or c.path in self.measured}

    def ordered(self) -> list[Checkpoint]:
        return [self.checkpoints[step] for step in sorted(self.checkpoints)]

    def over(self) -> bool:
        """Whether the run says that it is finished."""
        if not self.checkpoints:
            return False
        last = max(self.checkpoints)
        config, state = _json(self.run / "config.json"), _json(self.checkpoints[last].path / "trainer_state.json")
        if "arm" in config and isinstance(config.get("steps"), int):
            return last >= config["steps"]
        at, end = state.get("global_step"), state.get("max_steps")
        return isinstance(at, int) and isinstance(end, int) and 0 < end <= at

    def check_earlier(self, request: Request, execution: Execution) -> None:
        """`follow` has asked before it began to wait: what lies there now is its own provisional result."""

    def parts(self, request: Request, execution: Execution) -> Parts:
        """Nothing by matrix: the steps are kept one by one."""
        return Parts(
            None,
            request.every,
            trajectory=request.trajectory,
            device=execution.device,
            stamps=self._stamps_of(request.every),
        )

    def _stamps_of(self, checkpoints: Sequence[Checkpoint]) -> list[Stamp]:
        return [self._stamps[c.path] for c in checkpoints]

    def manifest(self, checkpoint: Checkpoint) -> dict[str, Any]:
        if checkpoint.path not in self._manifests:
            self._manifests[checkpoint.path] = checkpoint.manifest()
        return self._manifests[checkpoint.path]

    def trail(self, request: Request, execution: Execution) -> Trail:
        """A digest for each checkpoint of what its rows depend on: the checkpoints up to this one."""
        stamps, keys = self._stamps_of(request.every), []
        for count in range(2, len(request.every) + 1):
            until = inputs(stamps[:count], request.every[:count], True, execution.device)
            keys.append(hashlib.sha256(f"{until} {json.dumps(request.settings.to_json())}".encode()).hexdigest())
        return Trail(self.out / PARTS, tuple(keys))

    def _complete(self, folder: Path) -> bool:
        if _json(folder / "trainer_state.json") or "arm" in _json(self.run / "config.json"):
            return True
        files = []
        with suppress(OSError):
            files = sorted((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file())
        known = self._states.get(folder)
        if known is None or known[0] != files:
            self._states[folder] = files, time.monotonic()
            return False
        return bool(files) and time.monotonic() - known[1] >= SETTLE


def follow(
    base: str | Path,
    run: str | Path,
    execution: Execution,
    *,
    roles: str = "all",
    settings: Settings | None = None,
    idle: float = 30.0,
    tell: Callable[[str], None] = lambda text: None,
    each: Callable[[Result], None] = lambda result: None,
) -> Result:
    """`track` of a run that is still going on; the data files in `execution.out` are those of the checkpoints so far.

    Args:
        execution: with a folder `out`, and the local engine.
        idle: minutes without a new checkpoint after which the run counts as over.
        tell: hears what happens, a line at a time.
        each: is given every provisional result after it was saved.

    Raises:
        CheckpointError: the run ended, or waiting did, without a checkpoint. PairingError, ConfigError: as `track`.
    """
    out = execution.out
    if out is None or execution.engine != "local":
        raise ConfigError(
            "a growing run is measured on this machine, into a folder. Give `out`, and leave the engine out."
        )
    before, run = open_checkpoint(base), Path(run)
    check_folder(out, [], 0)
    check_earlier(out, before, [], overwrite=execution.overwrite, growing=run)
    seen, result, since, due = Growing(run, before, out, roles), None, time.monotonic(), False
    told: set[str] = set()
    try:
        while True:
            new = seen.look()
            for folder, why in seen.unreadable.items():
                if folder.exists() and why not in told:
                    tell(f"{folder.name} cannot be read yet: {why}")
                    told.add(why)
            if new:
                tell(f"{', '.join(new)}: measuring")
            if new or due:
                try:
                    request = Request(before, seen.ordered(), roles, settings or Settings(), trajectory=True)
                    result = survey(request, execution, seen)
                except (CheckpointError, FileNotFoundError):
                    if all(c.path.exists() for c in seen.ordered()):
                        raise
                    tell("a checkpoint was deleted before it was measured; going on without it")
                    seen.forget_the_gone()
                    due = bool(seen.checkpoints)
                    continue
                due, seen.measured = False, {c.path for c in seen.ordered()}
                result.run["growing"] = not seen.over()
                result.save(out, growing=True)
                each(result)
                tell(
                    f"{len(seen.checkpoints)} checkpoints measured{'; waiting for the next' if result.run['growing'] else ''}"
                )
                since = time.monotonic()
            if seen.over():
                break
            if time.monotonic() - since > 60 * idle:
                tell(f"no new checkpoint for {idle:g} minutes")
                break
            time.sleep(POLL)
    except KeyboardInterrupt:
        if result is None:
            raise
        tell("stopped; these are the checkpoints so far")
    if result is None:
        raise CheckpointError(
            f"no complete checkpoint appeared in {run} within {idle:g} minutes; expected folders such as step-000100 or "
            "checkpoint-100. Check the path, or wait longer with --idle."
            + "".join(f" {why}" for why in list(seen.unreadable.values())[:1])
        )
    result.run["growing"] = False
    return result


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none, or none that can be read, or it is not whole yet."""
    with suppress(CheckpointError):
        return read_json(path, LONGEST)
    return {}

"""A survey's two halves: what is measured (`Request`) and how (`Execution`). Built once, handed down whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import Checkpoint, Matrix, Pairing, open_checkpoint, pair, run_checkpoints, tell_apart
from opdgeo.checkpoints.ranges import Range
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError


@dataclass(frozen=True)
class Request:
    """What is measured: checkpoints of one base, which of their matrices, and with which settings.

    Attributes:
        base: the checkpoint before training.
        checkpoints: those after training, in step order.
        roles: "all", "attention", "mlp" or role names, comma-separated.
        settings: ranks, masks, tolerance and nulls.
        trajectory: whether the checkpoints' update subspaces are compared with each other.
        pairs: whether every two updates are compared, in place of each with the base's factors.

    Raises:
        PairingError: when `pairings` or `work` is asked for and two checkpoints do not fit together.
    """

    base: Checkpoint
    checkpoints: Sequence[Checkpoint]
    roles: str = "all"
    settings: Settings = field(default_factory=Settings)
    trajectory: bool = False
    pairs: bool = False

    @classmethod
    def of_update(
        cls, base: str | Path, tuned: str | Path, *, roles: str = "all", settings: Settings | None = None
    ) -> Request:
        """One update, from the checkpoint `base` to `tuned`.

        Raises:
            CheckpointError: one of the two cannot be opened.
        """
        before = open_checkpoint(base)
        return cls(before, [open_checkpoint(tuned, before)], roles, settings or Settings())

    @classmethod
    def of_run(
        cls,
        base: str | Path,
        checkpoints: str | Path | Sequence[str | Path],
        *,
        roles: str = "all",
        settings: Settings | None = None,
    ) -> Request:
        """A trajectory: a run folder with step-* or checkpoint-* folders, or checkpoints in step order.

        Raises:
            CheckpointError: one of them cannot be opened.
        """
        before = open_checkpoint(base)
        given = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
        return cls(before, run_checkpoints(given, before), roles, settings or Settings(), trajectory=True)

    @classmethod
    def of_pairs(
        cls,
        base: str | Path,
        updates: Sequence[str | Path],
        *,
        roles: str = "all",
        settings: Settings | None = None,
    ) -> Request:
        """Every pair of updates of one base. Checkpoints whose folders have the same name are told apart by those above.

        Raises:
            CheckpointError: one of them cannot be opened.
            ConfigError: fewer than two, or one given twice.
        """
        given = [updates] if isinstance(updates, str | Path) else list(updates)
        if len(given) < 2:
            raise ConfigError(
                f"{len(given)} update was given; expected two or more of one base. For one: opdgeo compare BASE TUNED."
            )
        before = open_checkpoint(base)
        opened = tell_apart([open_checkpoint(update, before) for update in given])
        return cls(before, opened, roles, settings or Settings(), pairs=True)

    @property
    def every(self) -> list[Checkpoint]:
        """The base and the checkpoints."""
        return [self.base, *self.checkpoints]

    @property
    def subjects(self) -> int:
        """How many updates and pairs of them have rows of their own."""
        count = len(self.checkpoints)
        return count * count if self.pairs else count

    @cached_property
    def pairings(self) -> list[Pairing]:
        """The base paired with every checkpoint."""
        return [pair(self.base, checkpoint, self.roles) for checkpoint in self.checkpoints]

    @cached_property
    def work(self) -> list[Matrix]:
        """The matrices that the base and every checkpoint have."""
        common = set.intersection(*(set(p.matrices) for p in self.pairings))
        return [m for m in self.pairings[0].matrices if m in common]

    def account(self) -> dict[str, Any]:
        """What is measured and what is not, over all checkpoints: `pairing` of run.json."""
        accounts = [p.to_json() for p in self.pairings]
        lists = ("base_only", "tuned_only", "tied", "unrecognised")
        found = accounts[0] | {key: sorted({name for a in accounts for name in a[key]}) for key in lists}
        return found | {"measured": len(self.work)}


@dataclass(frozen=True)
class Execution:
    """How a request is carried out: nothing here changes a number.

    Attributes:
        engine: "local", threads of this process, or "ray", tasks of a Ray cluster, whose nodes see the same paths.
        address: the Ray cluster; default `$RAY_ADDRESS`, else one on this machine.
        workers: matrices measured at a time; default one per CPU core, or one per GPU.
        device: "cpu", "cuda" for every visible GPU, or one of them, such as "cuda:1".
        cache: read and keep the base's factors on disk.
        progress: show a progress bar on standard error.
        out: a results folder whose earlier work is gone on from.
        overwrite: whether `out` may hold the result of another update, which is then replaced.
        before_fetching: called with the tensors on the hub that are needed; it may refuse them with an `OpdgeoError`.
    """

    engine: str = "local"
    address: str | None = None
    workers: int | None = None
    device: str = "cpu"
    cache: bool = True
    progress: bool = False
    out: Path | None = None
    overwrite: bool = True
    before_fetching: Callable[[Sequence[Range]], None] | None = None

    def check(self) -> None:
        """Raises:
        ConfigError: a combination that no machine can serve, or not this one.
        """
        if self.engine not in ("local", "ray"):
            raise ConfigError(f"engine is {self.engine!r}; expected 'local' or 'ray'.")
        if self.address and self.engine != "ray":
            raise ConfigError(
                f"a Ray address, {self.address!r}, was given without --engine ray. Add it, or leave it out."
            )
        if self.workers is not None and self.workers < 1:
            raise ConfigError(f"workers is {self.workers}; expected at least 1.")
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"device is {self.device!r}; expected cpu, cuda, or one GPU of several such as cuda:1.")
        if self.engine == "local" and self.device != "cpu":
            import torch

            if not torch.cuda.is_available():
                raise ConfigError(f"device {self.device!r} was asked for and torch sees no CUDA GPU. Use --device cpu.")
            count = torch.cuda.device_count()
            if int(self.device.partition(":")[2] or 0) >= count:
                raise ConfigError(
                    f"device {self.device!r} was asked for and torch sees {count} GPUs; expected cuda:0 to cuda:{count - 1}."
                )

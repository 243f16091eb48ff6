"""What is shown on standard error while a survey runs: how far it is, the time left, the matrix at hand."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from opdgeo.checkpoints import Matrix
from opdgeo.machine import duration

EVERY = 30.0  # seconds between two lines where there is no terminal


def cost(matrix: Matrix) -> float:
    """Proportional to the flops of a factorisation."""
    return float(matrix.rows * matrix.cols * min(matrix.rows, matrix.cols))


class Measuring:
    """A progress bar over matrices, or nothing. `work` is in the order in which it is begun, `workers` at a time."""

    def __init__(self, shown: bool, work: Sequence[Matrix], workers: int):
        self.shown, self.work, self.workers = shown, work, workers
        self.done = 0

    def __enter__(self) -> Measuring:
        if self.shown:
            from rich import progress

            self.bar = _bar(
                progress.BarColumn(bar_width=24),
                progress.TaskProgressColumn(),
                progress.TextColumn("{task.description}", markup=False),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(self.at_hand(), total=sum(map(cost, self.work)))
        return self

    def at_hand(self) -> str:
        """How many matrices are finished, and the one that was begun last."""
        if self.done == len(self.work):
            return f"{self.done} of {self.done} matrices"
        at = self.work[min(self.done + self.workers, len(self.work)) - 1]
        expert = "" if at.expert is None else f".{at.expert}"
        return f"{self.done} of {len(self.work)} matrices, at layer {at.layer} {at.role}{expert}"

    def advance(self, matrix: Matrix) -> None:
        self.done += 1
        if self.shown:
            self.bar.update(self.task, advance=cost(matrix), description=self.at_hand())

    def __exit__(self, *exception: object) -> None:
        if self.shown:
            self.bar.stop()


class Fetching:
    """A progress bar over bytes; where there is no terminal, a line every half minute."""

    def __init__(self, shown: bool, total: int):
        self.shown, self.total, self.done = shown, total, 0
        self.begun = self.said = time.monotonic()

    def __enter__(self) -> Fetching:
        if self.shown:
            from rich import progress

            self.bar = _bar(
                progress.TextColumn("fetching"),
                progress.BarColumn(bar_width=24),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(elapsed_when_finished=True),
            )
            self.bar.start()
            self.task = self.bar.add_task("fetching", total=self.total)
        return self

    def advance(self, count: int) -> None:
        self.done += count
        if self.shown:
            self.bar.advance(self.task, count)
        elif (now := time.monotonic()) - self.said >= EVERY:
            self.said = now
            left = (now - self.begun) * max(0, self.total - self.done) / self.done
            print(
                f"opdgeo: fetched {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, about {duration(left)} left",
                file=sys.stderr,
                flush=True,
            )

    def __exit__(self, *exception: object) -> None:
        if self.shown:
            self.bar.stop()


def _bar(*columns: Any) -> Any:
    from rich.console import Console
    from rich.progress import Progress

    return Progress(*columns, console=Console(stderr=True))

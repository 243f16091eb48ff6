"""The locking step of a trajectory: the first step from which Sim_K stays at or above a threshold.

The paper reads locking off a curve by eye (PAPER §1, L4); the step depends on the threshold, so it is given over
`THRESHOLDS`, and again for the curve of the walk null, which locks too: later points of a walk look alike.
"""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def locking_step(steps: Sequence[int], similarities: Sequence[float | None], threshold: float) -> int | None:
    """The earliest of `steps`, in order of training, from which no similarity is below `threshold`; None if there is none.

    Of the similarity to the last point itself, which is 1, the caller leaves the last point out: it says nothing. An unknown
    similarity counts as below.

    >>> locking_step([10, 20, 30, 40], [0.9, 0.6, 0.8, 0.95], 0.7)
    30
    """
    locked = None
    for step, value in zip(reversed(steps), reversed(similarities), strict=True):
        if value is None or value < threshold:
            break
        locked = step
    return locked

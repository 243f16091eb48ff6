"""Which rows of the table of measurements a mean is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def compared(valued: np.ndarray, nulled: np.ndarray, moved: np.ndarray | None = None) -> np.ndarray:
    """The rows of one diagnostic that a mean, its null and its excess are over, as a mask.

    They are the rows with a value and a null. Where no row has a null, they are the rows with a value; if `moved`
    tells which matrices moved and any did, only those of matrices that moved.

    Args:
        valued, nulled, moved: for every row whether it has a value, whether it has a null, whether its matrix moved.
    """
    beside = valued & nulled
    if beside.any():
        return beside
    if moved is not None and (valued & moved).any():
        return valued & moved
    return valued

"""Which rows of the table of measurements a mean is over."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


def compared(rows: pl.DataFrame) -> pl.DataFrame:
    """The rows of one diagnostic that a mean, its null and its excess are over.

    They are the rows with a value and a null. Where no row has a null, they are the rows with a value; if the column `moved`
    tells which matrices moved and any did, only those of matrices that moved.
    """
    known = rows.filter(rows["value"].is_not_null())
    beside = known.filter(known["null_mean"].is_not_null())
    if len(beside) or "moved" not in known.columns or not known["moved"].any():
        return beside if len(beside) else known
    return known.filter(known["moved"])

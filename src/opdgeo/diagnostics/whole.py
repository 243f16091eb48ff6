"""From a pair's values, matrix by matrix, to the value of all matrices together: a weighted sum.

The cosine of two updates of a model is not the mean of its matrices' cosines: a matrix counts by the norms of both. What a matrix
counts follows from what the table holds of each update alone, its norm and its share of visible entries, and from how many visible
entries the two share.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from opdgeo.diagnostics.diagnostic import Diagnostic, Matrices
from opdgeo.diagnostics.frobenius_norm import DIAGNOSTIC as NORM
from opdgeo.diagnostics.update_sparsity import DIAGNOSTIC as SPARSITY

if TYPE_CHECKING:
    import numpy as np
    import polars as pl

LIFT = "visible_lift"  # visible entries of both · entries / (visible entries of one · those of the other)


class Together:
    """The matrices of one pair.

    Args:
        rows: all rows of the pair.
        alone: the rows of the updates alone.
    """

    def __init__(self, rows: pl.DataFrame, alone: pl.DataFrame):
        import numpy as np

        self.matrices = rows["matrix"].unique(maintain_order=True).to_list()
        sizes = {row["matrix"]: row["rows"] * row["cols"] for row in rows.iter_rows(named=True)}
        first, second = (alone.filter(checkpoint=rows[column][0]) for column in ("checkpoint", "other"))
        norms = [self._column(of, NORM.name, "", "value") for of in (first, second)]
        loose = [self._column(of, NORM.name, "", "error") for of in (first, second)]
        sound = np.isfinite(norms[0] + norms[1])
        entries = np.where(sound, [float(sizes[m]) for m in self.matrices], 0.0)
        norm, other = (np.where(sound, n, 0.0) for n in norms)
        self.loose = sys.float_info.epsilon + max(
            float(np.max(np.where(n > 0, e, 0.0) / np.where(n > 0, n, 1.0)))
            for e, n in zip(loose, (norm, other), strict=True)
        )
        # in units of their own, so that squares overflow nowhere
        norm, other = (n / 2.0 ** math.frexp(float(n.max(initial=0)))[1] for n in (norm, other))
        self.found: dict[str, Matrices] = {}
        for column, beside in (("value", "value"), ("null_mean", "null_mean")):
            seen = [
                np.nan_to_num((1 - self._column(of, SPARSITY.name, "bf16_eta", beside)) * entries)
                for of in (first, second)
            ]
            lift = np.nan_to_num(self._column(rows, LIFT, "", column))
            both = lift * seen[0] * seen[1] / np.where(entries > 0, entries, 1.0)
            nothing = np.zeros(len(entries))
            self.found[column] = Matrices(nothing, nothing, norm, other, seen[0], seen[1], both, entries)

    def _column(self, rows: pl.DataFrame, name: str, variant: str, column: str) -> np.ndarray:
        import numpy as np

        found = rows.filter(diagnostic=name, variant=variant)
        known = dict(zip(found["matrix"], found[column], strict=True))
        return np.array([known.get(m) for m in self.matrices], dtype=float)

    def value(self, diagnostic: Diagnostic, rows: pl.DataFrame) -> dict[str, Any] | None:
        """`value`, `error`, `null_mean` and `null_std` of all matrices together, from the rows of one variant; None where there is no
        such value."""
        import numpy as np

        if diagnostic.weights is None or not rows["value"].is_not_null().any():
            return None
        columns = {
            c: self._column(rows, diagnostic.name, rows["variant"][0], c)
            for c in ("value", "error", "null_mean", "null_std")
        }

        def weighed(column: str) -> tuple[np.ndarray, float]:
            assert diagnostic.weights is not None
            known = np.isfinite(columns[column])
            value = np.nan_to_num(columns[column])
            weights = diagnostic.weights(replace(self.found[column], value=value, known=known.astype(float)))
            return weights, float(weights @ value)

        weights, value = weighed("value")
        error = float(np.abs(weights) @ np.nan_to_num(columns["error"]))
        error += 8 * self.loose * float(np.abs(weights) @ np.abs(np.nan_to_num(columns["value"])))
        found: dict[str, Any] = {"value": value, "error": error, "null_mean": None, "null_std": None}
        if np.isfinite(columns["null_mean"][np.isfinite(columns["value"])]).all():
            weights, mean = weighed("null_mean")
            spread = float(np.linalg.norm(weights * np.nan_to_num(columns["null_std"])))
            found |= {"null_mean": mean, "null_std": spread}
        return found

"""The data files of a made-up mixture of experts, written without measuring anything: for benchmarks/report.py and the tests.

python benchmarks/mixture.py OUT MATRICES
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS, Settings, diagnostics
from opdgeo.survey.results import CURVES, MEASUREMENTS, Result, summarise
from opdgeo.survey.tables import CHUNK

ROLES = ("gate_proj", "up_proj", "down_proj")
LAYERS = 16
SHAPE = (96, 64)


def write_mixture(out: Path, matrices: int) -> None:
    """Write the four data files of an update of `matrices` experts' matrices, with every diagnostic and its null."""
    rng = np.random.default_rng(0)
    at = np.arange(matrices)
    layer, role, expert = at % LAYERS, (at // LAYERS) % len(ROLES), at // (LAYERS * len(ROLES))
    size = 1e-3 * np.exp(rng.normal(0, 0.4, matrices))
    start = {
        "checkpoint": "tuned",
        "step": None,
        "matrix": [
            f"model.layers.{a}.mlp.experts.{e}.{ROLES[r]}.weight" for a, r, e in zip(layer, role, expert, strict=True)
        ],
        "layer": layer,
        "role": [ROLES[r] for r in role],
        "rows": SHAPE[0],
        "cols": SHAPE[1],
    }
    frames = []
    for name in diagnostics():
        for variant in DIAGNOSTICS[name].variants(Settings()):
            null = (
                size if DIAGNOSTICS[name].size else 0.5 * (size / 1e-3) ** 0.3 * np.exp(rng.normal(0, 0.02, matrices))
            )
            value = null if DIAGNOSTICS[name].size else null * np.exp(rng.normal(0.1, 0.1, matrices))
            columns = {"diagnostic": name, "variant": variant, "value": value, "error": 0.0, "method": "made up"}
            columns |= {"null_mean": null, "null_std": 0.02 * null, "status": "computed", "reason": None}
            frames.append(pl.DataFrame({**start, **columns}, schema=MEASUREMENTS))
    measurements = pl.concat(frames)
    sigma = np.sort(rng.exponential(1e-3, (matrices, min(SHAPE))))[:, ::-1]
    curves = pl.concat(
        pl.DataFrame(
            {"checkpoint": "tuned", "step": None, "matrix": start["matrix"], "curve": curve, "values": scale * sigma},
            schema_overrides={"step": pl.Int64},
        )
        .with_columns(pl.col("values").arr.to_list())
        .cast(CURVES)
        for curve, scale in (("sigma_base", 100), ("sigma_tuned", 100.1), ("sigma_update", 1))
    )
    run = {"command": ["made", "up"], "settings": {}, "base": {"path": "base"}, "checkpoints": []}
    some = measurements.filter(
        pl.col("matrix").is_in(start["matrix"][:1000])
    )  # its bootstrap is not what is measured here
    Result(measurements, curves, summarise(some, "gaussian"), run).save(out)
    # As a survey of so many writes them: by matrix, in small groups.
    curves.sort("matrix", maintain_order=True).write_parquet(out / "curves.parquet", row_group_size=CHUNK)


if __name__ == "__main__":
    write_mixture(Path(sys.argv[1]), int(sys.argv[2]))

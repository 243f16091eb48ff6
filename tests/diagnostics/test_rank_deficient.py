"""Directions beyond the rank of an update are those of rounding: no similarity and no channel is read from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

import opdgeo
import planted
from opdgeo import GeometryMonitor
from opdgeo.numerics import precision

NAME = planted.tensor_name(0, "mlp.up_proj")
SHAPE, RANK = (160, 120), 5


def held(dtype: str, dense: float = 0.0) -> list[planted.Matrix]:
    """W₀ and three points of a training that is held in five right directions; `dense` adds an update of full rank."""
    rng = np.random.default_rng(0)
    base = planted.stored(planted.weights(rng, *SHAPE), dtype)
    channel = planted.orthonormal(rng, SHAPE[1], RANK)
    size = (0.5 if dtype == "bfloat16" else 0.02) * float(np.linalg.norm(base)) / np.sqrt(SHAPE[0] * RANK)
    points, update = [base], np.zeros(SHAPE)
    for _ in range(3):
        update = update + size * rng.standard_normal((SHAPE[0], RANK)) @ channel.T
        update = update + dense * size * rng.standard_normal(SHAPE)
        points.append(planted.stored(base + update, dtype))
    return points


def tracked(points: list[planted.Matrix], dtype: str, folder: Path) -> dict[tuple[int, str, str], dict[str, Any]]:
    base, *steps = points
    planted.write_checkpoint(folder / "base", {NAME: base}, dtype)
    for step, weights in enumerate(steps, 1):
        planted.write_checkpoint(folder / "run" / f"step-{step:06d}", {NAME: weights}, dtype)
    result = opdgeo.track(folder / "base", folder / "run", settings=opdgeo.Settings(nulls=1), cache=False)
    return {(r["step"], r["diagnostic"], r["variant"]): r for r in result.measurements.to_dicts()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_track(dtype: str, tmp_path: Path) -> None:
    rows = tracked(held(dtype), dtype, tmp_path)
    checked = 0
    for (step, diagnostic, variant), row in rows.items():
        if (
            diagnostic not in ("subspace_similarity", "channel_energy")
            or row["reason"] == "there is no earlier checkpoint"
        ):
            continue
        checked += 1
        if int(variant.rpartition(".")[2]) > RANK:
            assert (row["status"], row["value"], row["null_mean"]) == ("undefined", None, None), (step, row)
            assert "rounding of the stored weights" in row["reason"] and "rank 5 only" in row["reason"], row
        else:
            assert row["status"] == "computed" and row["null_mean"] is not None, (step, variant, row)
    assert checked > 40
    dense = tracked(held(dtype, dense=0.5), dtype, tmp_path / "dense")
    assert all(r["status"] == "computed" for (s, d, _), r in dense.items() if s == 3 and d == "subspace_similarity")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compare_reads_no_tail_of_rounding(dtype: str, tmp_path: Path) -> None:
    """A merged LoRA: the top 16 singular values are five of the update and eleven of the rounding."""
    found = {}
    for dense in (0.0, 0.5):
        base, tuned = (
            planted.write_checkpoint(tmp_path / f"{i}-{dense}", {NAME: weights}, dtype)
            for i, weights in enumerate(held(dtype, dense)[::3])
        )
        result = opdgeo.compare(base, tuned, settings=opdgeo.Settings(nulls=1), cache=False)
        (found[dense],) = result.measurements.filter(diagnostic="hill_exponent").to_dicts()
        (entry,) = (d for d in result.summary["checkpoints"][0]["diagnostics"] if d["diagnostic"] == "hill_exponent")
        assert (entry["mean"] is None) == (entry["null"] is None) == (dense == 0), "nothing to read"
    assert (found[0.0]["status"], found[0.0]["value"]) == ("undefined", None)
    assert "rounding of the stored weights" in found[0.0]["reason"] and "rank 5 only" in found[0.0]["reason"]
    assert found[0.5]["status"] == "computed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_monitor(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    points = [torch.from_numpy(p).to(dtype) for p in held(str(dtype).removeprefix("torch."))]
    model = torch.nn.Module()
    holder = model
    for part in NAME.split(".")[:-1]:
        holder.add_module(part, torch.nn.Module())
        holder = holder.get_submodule(part)
    holder.register_parameter("weight", torch.nn.Parameter(points[0].clone()))
    monitor, state, control = GeometryMonitor(every=1, watch=[NAME]), TrainerState(), TrainerControl()
    monitor.on_train_begin(None, state, control, model=model)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        for step, weights in enumerate(points[1:], 1):
            holder.weight.data.copy_(weights)
            logged = monitor.measure(step)
    assert "geometry/similarity_previous" not in logged and "geometry/locked_since" not in logged
    assert logged["geometry/stable_rank"] < 5.5
    similar = [r for r in monitor.rows if r["diagnostic"] == "subspace_similarity"]
    assert len(similar) == 4 and all(r["value"] is None and "rank 5 only" in r["reason"] for r in similar)
    warned = [m for m in caplog.messages if "no subspace similarity is logged" in m]
    assert len(warned) == 1 and "rounding of the stored weights" in warned[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_the_bound_on_rounding_is_above_the_rounding_and_near_it(dtype: torch.dtype, scale: float) -> None:
    rng = np.random.default_rng(1)
    for weights in (planted.weights(rng, 300, 200, scale), rng.standard_normal((64, 500)) * np.geomspace(1, 30, 500)):
        exact = torch.from_numpy(weights * scale)
        kept = exact.to(dtype)
        found = float(torch.linalg.matrix_norm(kept.double() - exact, ord=2))
        bound = precision.rounding(*precision.squares(kept), dtype)
        assert found < bound < 3 * found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_measuring_leaves_the_weights_as_they_are(dtype: torch.dtype) -> None:
    weights = torch.randn(20, 12, dtype=torch.float64).to(dtype)
    before = weights.clone()
    rows, cols = precision.squares(weights)
    assert torch.equal(weights, before)
    torch.testing.assert_close(rows, before.double().square().sum(1))
    torch.testing.assert_close(cols, before.double().square().sum(0))

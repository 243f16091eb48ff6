"""The Gaussian null in closed form, against sampling by the independent reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import planted
from opdgeo.diagnostics import Base, Settings, Update, diagnostics
from opdgeo.diagnostics.gaussian_null import gaussian_null
from opdgeo.numerics import nulls
from reference import gaussian_null as sampled


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(96, 96), (192, 64), (64, 160)])
def test_small_updates_need_no_draw_of_a_matrix(shape: tuple[int, int], dtype: str) -> None:
    rng = np.random.default_rng(sum(shape))
    base = planted.stored(planted.weights(rng, *shape), dtype)
    tuned = base + 1e-3 * np.linalg.norm(base) / math.sqrt(base.size) * rng.standard_normal(shape)
    weights = torch.from_numpy(base).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    settings = Settings(rank=12, mask_rank=8, top_k=4, nulls=40)
    found, _ = gaussian_null(Update(Base(weights, settings), torch.from_numpy(tuned)), diagnostics().values(), "seed")
    expected = sampled(base, tuned, 60, 5, rank=12, mask_rank=8, top_k=4)
    assert set(found) == set(expected)
    for key, (mean, deviation) in expected.items():
        closed, spread = found[key]
        standard_error = math.hypot(deviation / math.sqrt(60), spread / math.sqrt(16))
        assert abs(closed - mean) <= 4 * standard_error + 1e-9 * abs(mean), (key, closed, mean, deviation)
        if deviation > 1e-9 * abs(mean):
            assert 0.4 < spread / deviation < 2.5, (key, spread, deviation)


def test_large_updates_are_left_to_sampling() -> None:
    rng = np.random.default_rng(0)
    base = planted.weights(rng, 96, 96)
    weights = torch.from_numpy(base)
    found, _ = gaussian_null(
        Update(Base(weights, Settings()), weights + 0.02 * torch.randn(96, 96)), diagnostics().values(), "seed"
    )
    assert ("spectral_shift", "") not in found
    assert ("principal_angles", "left.max") not in found
    assert ("stable_rank", "") in found


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30), (7, 1), (1, 7)])
def test_the_bidiagonal_model_has_the_singular_values_of_gaussian_matrices(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    k = min(4, *shape)
    ours = nulls.top_singular_values(*shape, 3.0, k, 400, rng)
    draws = rng.standard_normal((400, *shape))
    draws *= 3 / np.sqrt((draws**2).sum(axis=(1, 2), keepdims=True))
    exact = np.linalg.svd(draws, compute_uv=False)[:, :k]
    error = np.sqrt((ours.var(axis=0) + exact.var(axis=0)) / 400) + 1e-12
    assert (np.abs(ours.mean(axis=0) - exact.mean(axis=0)) < 4.5 * error).all()
    if min(shape) > 1:
        assert (np.abs(np.log(ours.std(axis=0) / exact.std(axis=0))) < 0.25).all()


def test_visible_probability_of_single_values() -> None:
    values = torch.tensor([0.0, 1.0, -1.0, 1.00390625, 0.5, 3e-5, 1.001], dtype=torch.float32)
    scale = 2e-3
    probability = nulls.visible_probability(values, scale)
    noise = scale * torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for value, expected in zip(values, probability, strict=True):
        moved = (float(value) + noise).float().bfloat16() != value.bfloat16()
        assert float(moved.double().mean()) == pytest.approx(float(expected), abs=0.006)
    as_bf16 = nulls.visible_probability(values[:5].bfloat16(), scale)
    assert torch.allclose(as_bf16, nulls.visible_probability(values[:5].bfloat16().float(), scale), atol=1e-12)


def test_a_scaled_down_walk_is_that_of_the_large_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    # Near the edge of the spectrum the similarity depends on the angle in units of the spacing there.
    ranks = (1, 4, 8)
    whole = nulls.PairSimilarity(320, 200, ranks)
    monkeypatch.setattr(nulls, "SIZE", 100)
    scaled = nulls.PairSimilarity(320, 200, ranks)
    assert (whole.shape, scaled.shape) == ((320, 200), (160, 100))
    for theta in (0.05, 0.2, 0.5, 1.0, math.pi / 2):
        ours, theirs = scaled(theta), whole(theta)
        for key, (mean, deviation) in theirs.items():
            spread = math.hypot(deviation, ours[key][1]) / 4
            assert abs(ours[key][0] - mean) <= 0.04 + 3 * spread, (theta, key)
    exact = whole(0.0)
    assert set(exact.values()) == {(1.0, 0.0)}
    chance = whole(math.pi / 2)["right", 8][0]
    assert abs(chance - 8 / 200) < 0.02


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (1, 1)])
def test_a_walk_of_vectors_keeps_its_only_direction(shape: tuple[int, int]) -> None:
    found = nulls.PairSimilarity(*shape, (1,))(0.4)
    assert all(math.isfinite(mean) and math.isfinite(deviation) for mean, deviation in found.values())
    for side, size in zip(("left", "right"), shape, strict=True):
        assert (found[side, 1] == (1.0, 0.0)) == (size == 1)

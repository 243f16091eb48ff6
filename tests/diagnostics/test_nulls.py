"""The Gaussian null in closed form, against sampling by the independent reference."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import planted
from opdgeo.checkpoints.names import Matrix
from opdgeo.diagnostics import Base, Settings, Update, diagnostics
from opdgeo.diagnostics.gaussian_null import gaussian_null
from opdgeo.diagnostics.subspace_similarity import pair_null
from opdgeo.numerics import nulls, perturbed
from opdgeo.survey.measure import _null
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


def spectrum(kind: str, n: int) -> planted.Matrix:
    if kind == "flat":
        return np.linspace(1.0, 0.9, n)
    if kind == "power":
        return np.asarray(np.arange(1, n + 1) ** -0.7)
    band = np.linspace(1.5, 0.1, n)
    band[:5] = 20, 14, 10, 7, 5
    return band


def agree(base: planted.Matrix, relative: float, draws: int, **ranks: int) -> None:
    """The nulls of an update of any size against matrices drawn and measured by the reference: within 5 % of the value or three
    standard errors, of 64 draws of ours and 8 of the angles'. `benchmarks/nulls.py` has the whole grid at larger sizes."""
    tuned = torch.from_numpy(base) + nulls.gaussian(
        *base.shape, relative * float(np.linalg.norm(base)), nulls.generator(1)
    )
    settings = Settings(**ranks)
    found, _ = gaussian_null(Update(Base(torch.from_numpy(base), settings), tuned), diagnostics().values(), "seed")
    expected = sampled(base, tuned.numpy(), draws, 5, **ranks)
    for key in (k for k in expected if k[0] in ("spectral_shift", "principal_angles", "bound_ratio")):
        (mean, spread), (drawn, deviation) = found[key], expected[key]
        count = 8 if key[0] == "principal_angles" or key[1] == "wedin" else 64
        error = math.hypot(deviation / math.sqrt(draws), spread / math.sqrt(count))
        assert abs(mean - drawn) <= max(0.05 * drawn, 3 * error), (key, mean, drawn, error)
        error = math.hypot(deviation / math.sqrt(2 * draws), spread / math.sqrt(2 * count))
        assert abs(spread - deviation) <= max(0.05 * drawn, 3 * error), (key, spread, deviation)


@pytest.mark.parametrize(
    ("kind", "shape", "relative"),
    [
        ("flat", (80, 80), 1e-2),
        ("flat", (64, 160), 0.3),
        ("power", (160, 64), 1e-4),
        ("power", (80, 80), 0.1),
        ("spiked", (64, 160), 0.1),
        ("spiked", (160, 64), 0.3),
    ],
)
def test_nulls_of_any_size_agree_with_drawn_ones(kind: str, shape: tuple[int, int], relative: float) -> None:
    base = planted.with_spectrum(np.random.default_rng(0), *shape, spectrum(kind, min(shape)).tolist())
    agree(base, relative, 40, mask_rank=8, top_k=4)


@pytest.mark.needs("smollm2")
def test_nulls_of_real_weights_agree_with_drawn_ones() -> None:
    from opdgeo.training.models import smollm2

    name = "model.layers.12.self_attn.k_proj.weight"
    base = planted.read_safetensors(smollm2() / "model.safetensors", lambda n: n == name)[name]
    agree(base, 3e-2, 12, mask_rank=8, top_k=4)


def test_no_matrix_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(planted.weights(rng, 96, 96))
    monkeypatch.setattr(nulls, "gaussian", lambda *_: pytest.fail("a matrix was drawn"))
    for scale in (1e-6, 1e-3, 2e-2):
        update = Update(Base(weights, Settings()), weights + scale * torch.from_numpy(rng.standard_normal((96, 96))))
        place = Matrix("name", "name", 0, "q_proj", 96, 96)
        found = _null(update, place, SimpleNamespace(name="tuned"))  # type: ignore[arg-type]
        assert set(found) == {(d.name, v) for d in diagnostics().values() for v in d.variants(Settings())}
        assert found["principal_angles", "left.max"].route == "levels drawn at the cut"
        assert (found["spectral_shift", ""].route == "the deformed spectrum") == (scale > 1e-6)
        assert found["stable_rank", ""].route == ""


def test_small_sides_are_drawn_in_full_where_no_first_order_formula_holds() -> None:
    rng = np.random.default_rng(0)
    weights = torch.from_numpy(planted.weights(rng, 96, 48))
    for scale, drawn in ((1e-9, False), (2e-2, True)):
        update = Update(Base(weights, Settings()), weights + scale * torch.from_numpy(rng.standard_normal((96, 48))))
        found = _null(update, Matrix("name", "name", 0, "q_proj", 96, 48), SimpleNamespace(name="tuned"))  # type: ignore[arg-type]
        for key in (("principal_angles", "left.max"), ("spectral_shift", "")):
            assert (found[key].route == "4 drawn matrices") == drawn


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


def test_a_scaled_down_walk_is_that_of_the_large_shape() -> None:
    # Near the edge of the spectrum the similarity depends on the angle in units of the spacing there.
    ranks = (1, 4, 8)
    whole = nulls.PairSimilarity(320, 200, ranks)
    scaled = nulls.PairSimilarity(320, 200, ranks, size=100)
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


@pytest.mark.parametrize("shape", [(64, 64), (160, 48), (48, 160)])
def test_the_closed_form_of_the_walk_agrees_with_draws(shape: tuple[int, int]) -> None:
    ranks = (1, 4, 16)
    drawn = nulls.PairSimilarity(*shape, ranks)
    for theta in (1e-4, 0.1, 0.4, 1.0):
        for k in ranks:
            mean, deviation = drawn(theta)["right", k]
            assert abs(pair_null(shape, theta, k) - mean) <= 0.015 + 3 * deviation / 4, (theta, k)
    assert pair_null(shape, 0.0, 4) == 1.0 and pair_null(shape, math.pi / 2, 4) == pytest.approx(4 / shape[1])


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (1, 1)])
def test_the_monitor_draws_the_walk_of_a_vector(shape: tuple[int, int]) -> None:
    assert pair_null(shape, 0.4, 1) == nulls.PairSimilarity(*shape, (1,))(0.4)["right", 1][0]


@pytest.mark.parametrize(
    ("kind", "shape", "relative"), [("spiked", (96, 60), 0.2), ("power", (60, 60), 0.05), ("flat", (70, 50), 0.5)]
)
def test_how_much_of_the_leading_subspaces_stays_under_noise(
    kind: str, shape: tuple[int, int], relative: float
) -> None:
    rng, k, (rows, cols) = np.random.default_rng(3), 8, shape
    levels = np.asarray(spectrum(kind, cols))
    scale = relative * float(np.linalg.norm(levels)) / math.sqrt(rows * cols)
    base = np.zeros(shape)
    base[range(cols), range(cols)] = levels
    left, _, right = np.linalg.svd(base + scale * rng.standard_normal((40, *shape)))
    found = perturbed.Noise(levels, rows, scale).similarity(k)
    for ours, drawn in zip(found, (right[:, :k, :k], left[:, :k, :k]), strict=True):
        shares = (drawn**2).sum(axis=(1, 2)) / k
        assert abs(ours - shares.mean()) <= 0.01 + 3 * shares.std() / math.sqrt(40)


@pytest.mark.parametrize("shape", [(7, 1), (1, 7), (1, 1)])
def test_a_walk_of_vectors_keeps_its_only_direction(shape: tuple[int, int]) -> None:
    found = nulls.PairSimilarity(*shape, (1,))(0.4)
    assert all(math.isfinite(mean) and math.isfinite(deviation) for mean, deviation in found.values())
    for side, size in zip(("left", "right"), shape, strict=True):
        assert (found[side, 1] == (1.0, 0.0)) == (size == 1)

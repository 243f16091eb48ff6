"""The closed nulls of a pair against draws of two independent isotropic updates, measured by the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import planted
from opdgeo.diagnostics import Base, Pair, Settings, Update, of_pairs
from reference import Matrix, related

ROWS, COLS, DRAWS = 48, 36, 600
SETTINGS = Settings(top_k=4)


def updates(dtype: str, sizes: tuple[float, float]) -> tuple[Matrix, Pair, list[tuple[Matrix, Matrix]]]:
    """W₀, two updates of these sizes relative to it, and draws of two others with the same norms."""
    rng = np.random.default_rng(0)
    weights = planted.stored(planted.weights(rng, ROWS, COLS), dtype)
    base = Base(torch.from_numpy(weights).to(getattr(torch, dtype)), SETTINGS)

    def draw() -> tuple[Matrix, Matrix]:
        made = []
        for size in sizes:
            noise = rng.standard_normal(weights.shape)
            made.append(weights + noise * (size * np.linalg.norm(weights) / np.linalg.norm(noise)))
        return made[0], made[1]

    first, second = (Update(base, torch.from_numpy(w), directions=32) for w in draw())
    return weights, Pair(first, second), [draw() for _ in range(DRAWS)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [(0.002, 0.02), (0.001, 0.0015)])
def test_nulls_agree_with_draws(dtype: str, sizes: tuple[float, float]) -> None:
    weights, pair, draws = updates(dtype, sizes)
    closed = {(name, v): null for name, d in of_pairs().items() for v, null in d.null(pair).items()}
    samples: dict[tuple[str, str], list[float]] = {key: [] for key in closed}
    for tuned, other in draws:
        for key, value in related(weights, tuned, other, top_k=4, ranks=(1, 2)).items():
            if value is not None:
                samples[key].append(value)
    for key, drawn in samples.items():
        if not drawn:
            continue  # K that the reference was not asked for
        mean, spread = closed[key]
        error = float(np.std(drawn, ddof=1)) / math.sqrt(len(drawn))
        assert mean == pytest.approx(np.mean(drawn), abs=4.5 * error + 1e-3 * abs(mean)), key
        assert spread == pytest.approx(np.std(drawn, ddof=1), rel=0.2), key
    lift = closed["visible_lift", ""][0]
    assert lift > 1.02, "small weights bring two unrelated updates together"


def test_where_the_closed_nulls_end() -> None:
    """A coarse η knows no cells of bf16; an unmoved update has no size. What is left stands."""
    weights = torch.from_numpy(planted.weights(np.random.default_rng(1), 20, 16)).float()
    moved = weights + 1e-3 * torch.from_numpy(np.random.default_rng(2).standard_normal((20, 16)))
    coarse = Base(weights, Settings(eta=0.1))
    pair = Pair(*(Update(coarse, w, directions=8) for w in (moved, weights - 1e-3)))
    found = {name for name, d in of_pairs().items() if d.null(pair)}
    assert found == {"update_cosine", "update_multiple", "shared_subspace", "shared_channel"}
    still = Pair(Update(coarse, moved, directions=8), Update(coarse, weights.clone(), directions=8))
    assert not {name for name, d in of_pairs().items() if name != "update_cosine" and d.null(still)}


def test_random_subspaces_of_one_space() -> None:
    from opdgeo.numerics.nulls import independent_similarity

    rng = np.random.default_rng(3)
    for n, k in ((5, 2), (12, 1), (9, 8), (2, 1)):
        drawn = []
        for _ in range(3000):
            a, b = planted.orthonormal(rng, n, k), planted.orthonormal(rng, n, k)
            drawn.append(((a.T @ b) ** 2).sum() / k)
        mean, spread = independent_similarity(n, k)
        assert mean == pytest.approx(np.mean(drawn), abs=4 * spread / math.sqrt(3000))
        assert spread == pytest.approx(np.std(drawn), rel=0.1)

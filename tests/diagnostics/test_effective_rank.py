"""The effective rank: exact from all singular values, between bounds that hold from the leading ones."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import planted
from examples import examples
from opdgeo.diagnostics import DIAGNOSTICS, Base, Settings, Update
from opdgeo.diagnostics.effective_rank import between, of_gaussian
from opdgeo.diagnostics.gaussian_null import gaussian_null
from reference import effective_rank


def measured(base: np.ndarray, delta: np.ndarray, **settings: int):  # type: ignore[no-untyped-def]
    update = Update(Base(torch.from_numpy(base), Settings(**settings)), torch.from_numpy(base + delta))
    return DIAGNOSTICS["effective_rank"].measure(update)[""]


@pytest.mark.parametrize("k", [1, 3, 24])
def test_k_equal_singular_values_have_the_effective_rank_k(k: int) -> None:
    rng = np.random.default_rng(k)
    found = measured(np.zeros((30, 24)), planted.with_spectrum(rng, 30, 24, [0.5] * k))
    assert found.value == pytest.approx(k, rel=1e-9)
    assert abs(found.value - k) <= found.error <= 1e-6


@st.composite
def spectra(draw: st.DrawFn) -> np.ndarray:
    """Descending singular values of any shape: flat, falling, with a bulk, with zeros."""
    size = draw(st.integers(2, 60))
    kind = draw(st.sampled_from(["flat", "power", "random", "spikes"]))
    values = {
        "flat": np.ones(size),
        "power": np.arange(1, size + 1) ** -draw(st.floats(0.1, 4)),
        "random": np.random.default_rng(draw(st.integers(0, 2**31))).random(size),
        "spikes": np.where(np.arange(size) < draw(st.integers(1, size)), 1.0, draw(st.floats(0, 1e-3))),
    }[kind]
    return np.sort(values * draw(st.sampled_from([1e-30, 1.0, 1e30])))[::-1]


@given(spectra(), st.data())
@examples(50)
def test_the_bounds_hold_whatever_is_not_listed(sigma: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(sigma) - 1))
    below = data.draw(st.sampled_from([sigma[k], sigma[k - 1]]))
    low, high = between(sigma[:k], np.zeros(k), len(sigma) - k, float(below), float(np.linalg.norm(sigma)), 1e-15)
    assert low <= effective_rank(sigma) <= high
    wrong = sigma[:k] * (1 + 1e-6 * data.draw(st.sampled_from([-1, 1])))
    loose = between(wrong, 1.1e-6 * sigma[:k], len(sigma) - k, 1.1 * float(below), float(np.linalg.norm(sigma)), 1e-6)
    assert loose[0] <= effective_rank(sigma) <= loose[1]


@pytest.mark.parametrize("tail", [[0.5] * 20, [0.5] * 5 + [0.0] * 15])
def test_both_bounds_are_reached(tail: list[float]) -> None:
    """The largest where what is not listed is equal; the smallest where it is as unequal as its largest allows."""
    sigma = np.array([2.0, 1.0, *tail])
    low, high = between(sigma[:2], np.zeros(2), 20, 0.5, float(np.linalg.norm(sigma)), 0.0)
    assert (low, high)[int(0.0 not in tail)] == pytest.approx(effective_rank(sigma), rel=1e-9)
    assert low == pytest.approx(high) or 0.0 in tail


def test_a_large_matrix_is_measured_from_its_leading_values() -> None:
    rng = np.random.default_rng(0)
    base = np.zeros((1208, 1200), dtype=np.float32)
    delta = rng.standard_normal(base.shape) + 40 * planted.with_spectrum(rng, *base.shape, [5, 4, 3, 2, 2, 2])
    delta = delta.astype(np.float32)
    found = measured(base, delta)
    truth = effective_rank(np.linalg.svd(delta.astype(float), compute_uv=False))
    assert found.method == "krylov"
    assert "top 16" in found.reason
    assert abs(found.value - truth) <= found.error < found.value


def test_the_null_is_read_off_as_the_value_is() -> None:
    """A Gaussian update has the value of its null, of a small matrix and of a large one."""
    for rows, cols in ((150, 200), (1200, 1300)):
        rng = np.random.default_rng(1)
        base = torch.zeros(rows, cols, dtype=torch.float64)
        update = Update(Base(base, Settings()), torch.from_numpy(rng.standard_normal((rows, cols))))
        d = DIAGNOSTICS["effective_rank"]
        mean, deviation = gaussian_null(update, [d], "seed")[0]["effective_rank", ""]
        assert (mean, deviation) == of_gaussian(rows, cols, 16)
        assert abs(d.measure(update)[""].value - mean) <= 6 * deviation
        assert mean == pytest.approx(min(rows, cols) * math.exp(-min(rows, cols) / max(rows, cols) / 2), rel=0.25)

"""The reference itself, against answers that are planted or worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

import planted
from reference import (
    bf16_bits,
    bf16_values,
    gaussian_null,
    hill_exponent,
    measure,
    membership,
    subspace_similarity,
    svd,
    unchanged,
)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_bf16_rounds_to_nearest_with_ties_to_even() -> None:
    # bf16 has 8 significant bits: near 1 the step is 2⁻⁷, and halfway cases go to the even last bit.
    given = [1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, -1 - 2**-8, 0.0, 2.0**-133]
    wanted = [1.0, 1.0, 1 + 2**-6, 1 + 2**-7, 1.0, -1.0, 0.0, 2.0**-133]
    assert bf16_values(bf16_bits(np.array(given))).tolist() == wanted


def test_bf16_agrees_with_torch_on_random_floats() -> None:
    import torch

    x = rng().standard_normal(20000).astype(np.float32) * np.float32(10.0) ** rng(1).integers(-35, 35, 20000)
    by_torch = torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16).double().numpy()
    assert np.array_equal(bf16_values(bf16_bits(x.astype(np.float64))), by_torch)


def test_sparsity_by_hand() -> None:
    # 1.002 rounds to 1 (unchanged); 1.01 to 1 + 2⁻⁷ (changed); 0 → 1e-30 is visible; −0 equals 0 by value, not by bits.
    base = np.array([[1.0, 1.0], [0.0, 0.0]])
    tuned = np.array([[1.002, 1.01], [1e-30, -0.0]])
    assert unchanged(base, tuned).tolist() == [[True, False], [False, True]]
    values = measure(base, tuned).values
    assert values["update_sparsity", "bf16_eta"] == 0.5
    assert values["update_sparsity", "bf16_exact"] == 0.25
    assert unchanged(np.ones((1, 1)), np.full((1, 1), 1.01), eta=0.01).all()


def test_norms_by_hand() -> None:
    base, tuned = np.diag([3.0, 4.0]), np.diag([3.0, 4.0]) + np.array([[0.0, 2.0], [1.0, 0.0]])
    values = measure(base, tuned).values
    assert values["frobenius_norm", ""] == pytest.approx(math.sqrt(5))
    assert values["relative_norm", ""] == pytest.approx(math.sqrt(5) / 5)
    assert values["operator_norm", ""] == pytest.approx(2)
    assert values["stable_rank", ""] == pytest.approx(5 / 4)


def test_hill_by_hand_and_undefined() -> None:
    # σ = e³, e², e, 1: the mean of log(σᵢ/σ₄) over i < 4 is (3+2+1)/3 = 2.
    assert hill_exponent(np.exp([3.0, 2.0, 1.0, 0.0]), 4) == pytest.approx(0.5)
    assert hill_exponent(np.exp([3.0, 2.0, 1.0, 0.0]), 2) == pytest.approx(1.0)
    assert hill_exponent(np.array([2.0, 2.0, 2.0]), 3) is None
    assert hill_exponent(np.array([2.0, 1.0, 0.0]), 3) is None
    assert hill_exponent(np.array([2.0]), 16) is None


def test_a_planted_update_spectrum_comes_back() -> None:
    base = planted.weights(rng(), 40, 30)
    spectrum = [math.exp(-i / 2) for i in range(30)]
    found = measure(base, base + planted.with_spectrum(rng(1), 40, 30, spectrum)).values
    assert found["operator_norm", ""] == pytest.approx(1, rel=1e-12)
    assert found["stable_rank", ""] == pytest.approx(sum(s * s for s in spectrum), rel=1e-12)
    assert found["hill_exponent", "16"] == pytest.approx(1 / (sum((15 - i) / 2 for i in range(15)) / 15), rel=1e-9)


@pytest.mark.parametrize(("rows", "cols"), [(40, 30), (30, 40), (30, 30)])
def test_planted_angles_come_back_from_a_millionth_of_a_degree_to_ninety(rows: int, cols: int) -> None:
    left, right = [90.0, 50.0, 1.0, 1e-3, 1e-6], [60.0, 10.0, 1e-5]
    spectrum = [2.0 * 0.9**i for i in range(30)]
    base, tuned = planted.rotated_pair(rng(), rows, cols, spectrum, 15, left, right)
    found = measure(base, tuned)
    for side, planned in (("left", left), ("right", right)):
        assert found.values["principal_angles", f"{side}.max"] == pytest.approx(max(planned), abs=1e-9)
        assert found.values["principal_angles", f"{side}.mean"] == pytest.approx(sum(planned) / 15, abs=1e-9)
        assert found.curves[f"angle_{side}"] == pytest.approx(sorted([0.0] * (15 - len(planned)) + planned), abs=1e-9)
    assert found.values["spectral_shift", ""] == pytest.approx(0, abs=1e-14)
    assert found.ranks["rank"] == 15


def test_shift_of_a_planted_drift() -> None:
    u, v = planted.orthonormal(rng(), 20, 12), planted.orthonormal(rng(1), 16, 12)
    before = np.arange(12.0, 0, -1)
    after = before + np.linspace(0.4, 0.1, 12)
    values = measure((u * before) @ v.T, (u * after) @ v.T).values
    drift = after - before
    assert values["spectral_shift", ""] == pytest.approx(np.linalg.norm(drift) / np.linalg.norm(before))
    # Same singular vectors: ΔW has the drifts as its spectrum, so Mirsky and Weyl hold with equality.
    assert values["bound_ratio", "mirsky"] == pytest.approx(1)
    assert values["bound_ratio", "weyl"] == pytest.approx(1)
    assert values["bound_ratio", "wedin"] == pytest.approx(0, abs=1e-12)


def test_wedin_of_a_rotation_by_hand() -> None:
    # diag(2, 1) with its left basis turned by θ, at k = 1: ΔW = (R − I) diag(2, 1), of norm 2·2 sin(θ/2); the gap is 1.
    theta = math.radians(10)
    turn = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    values = measure(np.diag([2.0, 1.0]), turn @ np.diag([2.0, 1.0])).values
    assert values["bound_ratio", "wedin"] == pytest.approx(math.sin(theta) / (4 * math.sin(theta / 2)))
    assert values["principal_angles", "left.max"] == pytest.approx(10)
    assert values["principal_angles", "right.max"] == pytest.approx(0, abs=1e-12)


def test_wedin_is_undefined_where_the_gap_is_not_positive() -> None:
    values = measure(np.diag([4.0, 3.0]), np.diag([2.0, 1.0])).values
    assert values["bound_ratio", "wedin"] is None
    assert values["bound_ratio", "weyl"] == pytest.approx(1)


def test_membership_is_fractional_at_the_threshold() -> None:
    score = np.array([[4.0, 3.0], [3.0, 3.0]])
    assert membership(score, 0.5).tolist() == [[1.0, 1 / 3], [1 / 3, 1 / 3]]
    assert membership(score, 0.25).tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert membership(score, 0.3).sum() == pytest.approx(1.2)
    assert membership(np.zeros((3, 7)), 0.3) == pytest.approx(np.full((3, 7), 0.3))


def test_overlap_by_hand() -> None:
    # The mask rank 64 is cut to 2: the reconstruction of diag(8, 4, 2, 1) is diag(8, 4, 0, 0).
    base = np.diag([8.0, 4.0, 2.0, 1.0])
    tuned = base + np.diag([1.0, 0.0, 1.0, 0.0])
    values = measure(base, tuned).values
    # |W₀|: 12 zeros, then 1, 2, 4, 8. The lower half (8 of 16) lies among the zeros; both changed entries are above.
    assert values["mask_overlap", "low_magnitude.0.5"] == 0
    # |reconstruction|: 8, 4 and 14 zeros. Top half: 8, 4, then 6/14 of each zero. Changed: 8 (in) and 2 (a zero there).
    assert values["mask_overlap", "principal.0.5"] == pytest.approx((1 + 6 / 14) / 2)
    assert values["mask_overlap", "principal.0.3"] == pytest.approx((1 + 2.8 / 14) / 2)
    # Of the update's energy (two entries of 1), the one at (0, 0) lies in the top-2 subspaces.
    for variant in ("left.64", "right.64", "both.64"):
        assert values["principal_energy", variant] == pytest.approx(0.5)


def test_energy_of_an_update_planted_in_one_side_only() -> None:
    u, v = planted.orthonormal(rng(), 20, 20), planted.orthonormal(rng(1), 16, 16)
    base = (u[:, :16] * np.arange(16.0, 0, -1)) @ v.T
    update = 0.01 * (np.outer(u[:, 0], v[:, 15]) + 2 * np.outer(u[:, 19], v[:, 1]))
    values = measure(base, base + update, mask_rank=4).values
    assert values["principal_energy", "left.4"] == pytest.approx(1 / 5)
    assert values["principal_energy", "right.4"] == pytest.approx(4 / 5)
    assert values["principal_energy", "both.4"] == pytest.approx(0, abs=1e-20)


def test_similarity_of_planted_subspaces() -> None:
    v = planted.orthonormal(rng(), 40, 40)
    spectrum = 0.9 ** np.arange(32)
    one = (planted.orthonormal(rng(1), 32, 32) * spectrum) @ v[:, :32].T
    # The first four of sixteen directions turned by 60°: Sim = (12 + 4·cos² 60°)/16.
    turned = planted.turned(v, 16, [60.0] * 4)
    two = (planted.orthonormal(rng(2), 32, 32) * spectrum) @ turned[:, :32].T
    assert subspace_similarity(one, two) == pytest.approx(13 / 16)
    assert subspace_similarity(one, -3 * one) == pytest.approx(1)
    assert subspace_similarity(one, np.zeros_like(one)) is None


def test_a_matrix_that_did_not_move() -> None:
    base = planted.weights(rng(), 20, 12)
    values = measure(base, base).values
    for key, value in values.items():
        diagnostic = key[0]
        if diagnostic == "update_sparsity":
            assert value == 1
        elif diagnostic in ("frobenius_norm", "relative_norm", "operator_norm", "principal_angles", "spectral_shift"):
            assert value == 0, key
        else:
            assert value is None, key


def test_a_repeated_singular_value_at_the_cut_leaves_the_subspace_undetermined() -> None:
    base = planted.with_spectrum(rng(), 20, 16, [4.0] * 4 + [2.0] * 10 + [1.0] * 2)
    values = measure(base, base + 1e-3 * rng(1).standard_normal(base.shape)).values
    assert values["principal_angles", "left.max"] is None
    assert values["principal_energy", "both.64"] is None
    assert values["mask_overlap", "principal.0.5"] is None
    assert values["mask_overlap", "low_magnitude.0.5"] is not None
    assert values["spectral_shift", ""] is not None


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize(("rows", "cols"), [(40, 30), (30, 40), (1, 24), (24, 1), (1, 1), (2, 2)])
def test_ratios_do_not_depend_on_scale_and_the_bounds_hold(rows: int, cols: int, scale: float) -> None:
    base = planted.weights(rng(), rows, cols)
    tuned = base + 1e-2 * base.std() * rng(1).standard_normal(base.shape) + 1e-2 * base
    plain, scaled = measure(base, tuned), measure(base * scale, tuned * scale)
    for key, value in plain.values.items():
        if value is None:
            assert scaled.values[key] is None, key
        elif key[0] in ("frobenius_norm", "operator_norm"):
            assert scaled.values[key] == pytest.approx(value * scale, rel=1e-9), key
        elif key[0] != "update_sparsity" and key[0] != "mask_overlap":  # rounding to bf16 is not scale-free
            assert scaled.values[key] == pytest.approx(value, rel=1e-8, abs=1e-12), key
        if key[0] == "bound_ratio" and value is not None:
            assert value <= 1 + 1e-9, key


def test_chance_levels_of_the_gaussian_null() -> None:
    base = planted.weights(rng(), 48, 32)
    null = gaussian_null(base, base + 1e-3 * rng(1).standard_normal(base.shape), draws=20, seed=2)
    k = 16
    for variant, chance in (("left.64", k / 48), ("right.64", k / 32), ("both.64", k / 48 * k / 32)):
        mean, deviation = null["principal_energy", variant]
        assert abs(mean - chance) < 5 * deviation / math.sqrt(20)
    mean, deviation = null["frobenius_norm", ""]
    assert deviation < 1e-12 * mean


def test_singular_vectors_are_the_matrix() -> None:
    matrix = planted.weights(rng(), 9, 5)
    found = svd(matrix)
    assert (found.u * found.s) @ found.v.T == pytest.approx(matrix)

"""Laws that hold for every pair of matrices: swapping, rotating, transposing, scaling, projecting, and the bounds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import planted
from examples import examples
from opdgeo.diagnostics import Base, Settings, Update, Value, diagnostics
from reference import Matrix, bf16_bits

Found = dict[tuple[str, str], Value]

few = examples(8)


def computed(base: Matrix, tuned: Matrix, settings: Settings | None = None) -> Found:
    """Every value that opdgeo gives for one pair."""
    before = Base(torch.from_numpy(np.ascontiguousarray(base)), settings or Settings())
    update = Update(before, torch.from_numpy(np.ascontiguousarray(tuned)))
    return {(name, v): value for name, d in diagnostics().items() for v, value in d.measure(update).items()}


@st.composite
def pairs(draw: st.DrawFn, smallest: int = 1) -> tuple[Matrix, Matrix]:
    """Weights of any shape up to 20 × 20 in any stored dtype, moved densely, sparsely, in low rank, or not at all."""
    rows, cols = draw(st.integers(smallest, 20)), draw(st.integers(smallest, 20))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from(planted.DTYPES))
    base = planted.weights(rng, rows, cols)
    relative = 10 ** draw(st.floats(-5, 0))
    kind = draw(st.sampled_from(["dense", "sparse", "low rank", "none"]))
    if kind == "low rank":
        update = planted.low_rank_update(rng, base, 3, relative)
    else:
        update = relative * base.std() * rng.standard_normal(base.shape) * (kind != "none")
        if kind == "sparse":
            update = update * (rng.random(base.shape) < 0.2)
    return planted.stored(base, dtype), planted.stored(base + update, dtype)


def same(one: Value, other: Value, factor: float = 1.0) -> bool:
    """Both undefined, or both numbers (the second times `factor`) no further apart than their stated errors."""
    if one.value is None or other.value is None:
        return one.status == other.status
    assert one.error is not None
    assert other.error is not None
    difference = abs(one.value - factor * other.value)
    return difference <= one.error + factor * other.error + 1e-12 * abs(one.value)


def all_same(one: Found, other: Found, *diagnostics_: str) -> None:
    for key, value in one.items():
        if not diagnostics_ or key[0] in diagnostics_:
            assert same(value, other[key]), (key, value, other[key])


@few
@given(pairs())
def test_swapping_the_checkpoints_negates_the_update(pair: tuple[Matrix, Matrix]) -> None:
    base, tuned = pair
    forth, back = computed(base, tuned), computed(tuned, base)
    alike = ("update_sparsity", "frobenius_norm", "operator_norm", "stable_rank", "hill_exponent", "principal_angles")
    all_same(forth, back, *alike)
    for variant in ("mirsky", "weyl"):
        assert same(forth["bound_ratio", variant], back["bound_ratio", variant])


@few
@given(pairs(smallest=2), st.integers(0, 2**32 - 1))
def test_rotating_both_checkpoints_leaves_the_geometry_alone(pair: tuple[Matrix, Matrix], seed: int) -> None:
    base, tuned = pair
    rng = np.random.default_rng(seed)
    left, right = (planted.orthonormal(rng, n, n) for n in base.shape)
    plain, turned = computed(base, tuned), computed(left @ base @ right, left @ tuned @ right)
    assume(np.linalg.norm(tuned - base) == 0 or np.linalg.norm(tuned - base) > 1e-4 * np.linalg.norm(base))
    for key, value in plain.items():
        if key[0] in ("update_sparsity", "mask_overlap") or not np.any(tuned - base):
            continue  # entries and rounding to bf16 are not rotation-invariant
        other = turned[key]
        if value.value is None or other.value is None:
            # Rounding in the rotation may lift an exact zero over the line between "zero" and "tiny".
            assert value.status == other.status or key[0] == "hill_exponent", key
            continue
        assert value.error is not None
        assert other.error is not None
        # The rotation itself rounds every entry: as large an uncertainty as the decompositions have, and a floor below.
        floor = 1e-6 if key[0] == "principal_angles" else 1e-8 * max(1.0, abs(value.value))
        assert abs(value.value - other.value) <= 10 * (value.error + other.error) + floor, key


@few
@given(pairs())
def test_transposing_exchanges_left_and_right(pair: tuple[Matrix, Matrix]) -> None:
    base, tuned = pair
    plain, flipped = computed(base, tuned), computed(base.T, tuned.T)
    for (diagnostic, variant), value in plain.items():
        other = variant
        if variant.startswith(("left.", "right.")):
            side, rest = variant.split(".")
            other = f"{'right' if side == 'left' else 'left'}.{rest}"
        assert same(value, flipped[diagnostic, other]), (diagnostic, variant)


@few
@given(pairs(), st.integers(-60, 60))
def test_a_power_of_two_changes_the_norms_only(pair: tuple[Matrix, Matrix], power: int) -> None:
    base, tuned = pair
    factor = 2.0**power
    plain, scaled = computed(base, tuned), computed(base * factor, tuned * factor)
    for key, value in plain.items():
        assert same(scaled[key], value, factor if key[0] in ("frobenius_norm", "operator_norm") else 1.0), key


@few
@given(pairs())
def test_the_bounds_of_mirsky_weyl_and_wedin_hold(pair: tuple[Matrix, Matrix]) -> None:
    for key, value in computed(*pair).items():
        if key[0] == "bound_ratio" and value.value is not None:
            assert value.error is not None
            assert 0 <= value.value <= 1 + value.error + 1e-12, key


@few
@given(pairs())
def test_every_value_lies_in_its_range(pair: tuple[Matrix, Matrix]) -> None:
    base, _ = pair
    for (diagnostic, variant), value in computed(*pair).items():
        if value.value is None:
            assert value.reason, (diagnostic, variant)
            continue
        assert value.error is not None
        low, high = value.value - value.error, value.value + value.error
        assert high >= 0, (diagnostic, variant)
        if diagnostic in ("update_sparsity", "mask_overlap", "principal_energy"):
            assert low <= 1 + 1e-12, (diagnostic, variant)
        if diagnostic == "stable_rank":
            assert high >= 1
            assert low <= min(base.shape)
        if diagnostic == "principal_angles":
            assert low <= 90


@few
@given(pairs())
def test_energy_inside_both_sides_is_at_most_the_energy_inside_one(pair: tuple[Matrix, Matrix]) -> None:
    found = computed(*pair)
    both, left, right = (found["principal_energy", f"{side}.64"] for side in ("both", "left", "right"))
    if both.value is not None and left.value is not None and right.value is not None:
        assert both.value <= min(left.value, right.value) + 1e-9


@few
@given(pairs(smallest=4))
def test_a_projected_update_lies_in_the_subspace_and_projecting_twice_is_projecting_once(
    pair: tuple[Matrix, Matrix],
) -> None:
    base, tuned = pair
    delta = tuned - base
    assume(np.linalg.norm(delta) > 1e-4 * np.linalg.norm(base))
    k = min(base.shape) // 2
    _, s, vt = np.linalg.svd(base)
    assume(s[k - 1] - s[k] > 1e-3 * s[0])
    projector = vt[:k].T @ vt[:k]
    inside, outside = delta @ projector, delta - delta @ projector
    key = ("principal_energy", "right.64")
    if np.linalg.norm(inside) > 1e-6 * np.linalg.norm(base):
        once = computed(base, base + inside)
        assert abs((once[key].value or 0) - 1) <= 1e-8
        twice = computed(base, base + inside @ projector)
        for name in ("frobenius_norm", "operator_norm", "stable_rank"):
            assert abs((once[name, ""].value or 0) / (twice[name, ""].value or 1) - 1) <= 1e-8
    if np.linalg.norm(outside) > 1e-6 * np.linalg.norm(base):
        assert (computed(base, base + outside)[key].value or 0) <= 1e-8


@few
@given(pairs(), st.sampled_from([0.1, 0.3, 0.5, 0.7]))
def test_the_top_share_and_the_rest_sum_to_one(pair: tuple[Matrix, Matrix], share: float) -> None:
    # A base of rank k is its own rank-k reconstruction, so both masks rank the entries by the same score, from two ends.
    base, tuned = pair
    delta = tuned - base
    k = max(1, min(base.shape) // 2)
    u, s, vt = np.linalg.svd(base, full_matrices=False)
    base = (u[:, :k] * s[:k]) @ vt[:k]
    found = computed(base, base + delta, Settings(mask_share=(share, round(1 - share, 1))))
    top = found["mask_overlap", f"principal.{share:g}"]
    rest = found["mask_overlap", f"low_magnitude.{round(1 - share, 1):g}"]
    if top.value is None or rest.value is None:
        assert top.status == rest.status
        return
    assert top.error is not None
    assert rest.error is not None
    assert abs(top.value + rest.value - 1) <= top.error + rest.error + 1e-9


@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.sampled_from([0.1, 0.3, 0.5, 0.9]))
def test_ties_do_not_depend_on_the_order_of_the_entries(seed: int, levels: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = rng.integers(1, 20, 2)
    base = rng.integers(-levels, levels + 1, (rows, cols)) / 8.0
    tuned = base + (rng.random((rows, cols)) < 0.3) / 16.0
    order = rng.permutation(rows * cols)
    key, settings = ("mask_overlap", f"low_magnitude.{share:g}"), Settings(mask_share=(share,))
    plain = computed(base, tuned, settings)[key]
    moved = computed(base.ravel()[order].reshape(rows, cols), tuned.ravel()[order].reshape(rows, cols), settings)[key]
    assert plain.status == moved.status
    if plain.value is not None and moved.value is not None:
        assert abs(plain.value - moved.value) <= 1e-12


@few
@given(pairs(), st.integers(0, 2**32 - 1))
def test_permuting_rows_and_columns_changes_nothing(pair: tuple[Matrix, Matrix], seed: int) -> None:
    base, tuned = pair
    rng = np.random.default_rng(seed)
    rows, cols = rng.permutation(base.shape[0]), rng.permutation(base.shape[1])
    all_same(computed(base, tuned), computed(base[rows][:, cols], tuned[rows][:, cols]))


@few
@given(pairs())
def test_for_bf16_values_the_tolerance_rule_is_bit_inequality(pair: tuple[Matrix, Matrix]) -> None:
    base, tuned = (planted.stored(m, "bfloat16") for m in pair)
    found = computed(base, tuned)
    equal = float((bf16_bits(base) == bf16_bits(tuned)).mean())
    assert found["update_sparsity", "bf16_exact"].value == equal
    signed_zeros = float(((base == tuned) & (bf16_bits(base) != bf16_bits(tuned))).mean())
    assert abs((found["update_sparsity", "bf16_eta"].value or 0) - equal - signed_zeros) <= 1e-12


@few
@given(pairs())
def test_measuring_changes_neither_matrix_and_twice_is_once(pair: tuple[Matrix, Matrix]) -> None:
    base, tuned = pair[0].copy(), pair[1].copy()
    first, second = computed(base, tuned), computed(base, tuned)
    assert first == second
    assert np.array_equal(base, pair[0])
    assert np.array_equal(tuned, pair[1])

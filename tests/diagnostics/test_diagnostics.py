"""Every diagnostic against the float64 reference, matrix by matrix, and against answers known exactly."""

from __future__ import annotations

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import torch

import planted
from opdgeo.diagnostics import Base, Settings, Update, Value, diagnostics
from reference import Matrix, disagreement, measure

Found = dict[tuple[str, str], Value]

SPECTRAL = ("principal_angles", "spectral_shift", "principal_energy", "bound_ratio")


def computed(base: Matrix, tuned: Matrix, settings: Settings | None = None) -> Found:
    """Every value that opdgeo gives for one pair, keyed as in the reference."""
    before = Base(torch.from_numpy(base.copy()), settings or Settings())
    update = Update(before, torch.from_numpy(tuned.copy()))
    return {(name, v): value for name, found in diagnostics().items() for v, value in found.measure(update).items()}


def check(base: Matrix, tuned: Matrix, settings: Settings | None = None) -> Found:
    """Compute, compare with the reference, and return what opdgeo found."""
    asked = settings or Settings()
    found = computed(base, tuned, asked)
    expected = measure(
        base,
        tuned,
        rank=asked.rank,
        top_k=asked.top_k,
        mask_rank=asked.mask_rank,
        mask_shares=asked.mask_share,
        eta=asked.eta,
    ).values
    assert set(found) == set(expected)
    wrong = [disagreement(key, value.value, value.error, expected[key]) for key, value in found.items()]
    assert not [text for text in wrong if text]
    for key, value in found.items():
        assert value.status == ("computed" if value.value is not None else "undefined"), key
        assert value.value is not None or value.reason, f"{key} is undefined without a reason"
        if value.value is not None and value.error is not None and not key[1].startswith("principal."):
            assert math.isfinite(value.value), key
            assert value.error <= max(1e-3 * abs(value.value), 1e-5 * max(1.0, abs(value.value))), (
                f"{key}: a vacuous error"
            )
    return found


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def nudged(base: Matrix, relative: float = 1e-2, seed: int = 9) -> tuple[Matrix, Matrix]:
    """The pair of a base and the base with a Gaussian update of that relative size."""
    noise = rng(seed).standard_normal(base.shape)
    return base, base + noise * (relative * np.linalg.norm(base) / np.linalg.norm(noise))


CASES: dict[str, Callable[[], tuple[Matrix, Matrix]]] = {
    "dense": lambda: nudged(planted.weights(rng(), 30, 24)),
    "tall": lambda: nudged(planted.weights(rng(), 90, 7)),
    "wide": lambda: nudged(planted.weights(rng(), 7, 90)),
    "large update": lambda: nudged(planted.weights(rng(), 30, 24), relative=3.0),
    "near-identical": lambda: nudged(planted.weights(rng(), 30, 24), relative=1e-9),
    "rotated": lambda: planted.rotated_pair(
        rng(), 30, 24, [0.8**i for i in range(24)], 12, [90.0, 50.0, 1.0, 1e-3, 1e-6], [60.0, 1e-5]
    ),
    "rotation of a millionth of a degree": lambda: planted.rotated_pair(
        rng(), 30, 24, [0.8**i for i in range(24)], 12, [1e-6], [2e-6]
    ),
    "condition number 1e6": lambda: nudged(
        planted.with_spectrum(rng(), 30, 24, list(np.logspace(0, -6, 24))), relative=1e-4
    ),
    "base of rank 12, cut at 12": lambda: nudged(planted.with_spectrum(rng(), 30, 24, [1.0] * 12)),
    "base repeats away from the cut": lambda: nudged(
        planted.with_spectrum(rng(), 30, 24, [2.0] * 12 + [1.0] * 12), 1e-3
    ),
    "update of rank 1": lambda: (lambda w: (w, w + planted.low_rank_update(rng(1), w, 1, 0.1)))(
        planted.weights(rng(), 30, 24)
    ),
    "one entry": lambda: (
        np.eye(6) * 6 + np.tri(6),
        np.eye(6) * 6 + np.tri(6) + 0.5 * np.outer(np.eye(6)[1], np.eye(6)[4]),
    ),
    "negative of the base": lambda: (lambda w: (w, -w))(planted.weights(rng(), 12, 10)),
    "to zero": lambda: (lambda w: (w, 0 * w))(planted.weights(rng(), 12, 10)),
    "from zero": lambda: (lambda w: (0 * w, w))(planted.weights(rng(), 12, 10)),
    "zero to zero": lambda: (np.zeros((12, 10)), np.zeros((12, 10))),
    "unmoved": lambda: (lambda w: (w, w))(planted.weights(rng(), 12, 10)),
    "one row": lambda: nudged(planted.weights(rng(), 1, 24)),
    "one column": lambda: nudged(planted.weights(rng(), 24, 1)),
    "one entry in all": lambda: (np.array([[2.0]]), np.array([[2.5]])),
    "two by two": lambda: nudged(planted.weights(rng(), 2, 2)),
    "three by two": lambda: nudged(planted.weights(rng(), 3, 2)),
    "huge": lambda: nudged(planted.weights(rng(), 30, 24, scale=1e30)),
    "small": lambda: nudged(planted.weights(rng(), 30, 24, scale=1e-30)),
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(case: str) -> None:
    check(*CASES[case]())


BASE, TUNED = planted.tiny_pair()


@pytest.mark.parametrize("dtype", planted.DTYPES)
@pytest.mark.parametrize("name", planted.linear(BASE))
def test_agrees_on_stored_weights_with_tight_bounds(name: str, dtype: str) -> None:
    found = check(planted.stored(BASE[name], dtype), planted.stored(TUNED[name], dtype))
    visible = round((1 - (found["update_sparsity", "bf16_eta"].value or 0)) * BASE[name].size)
    for (diagnostic, variant), value in found.items():
        if value.value is None:
            continue
        assert value.error is not None
        if variant.startswith("principal."):  # a float64 threshold decides at most one entry or two
            assert value.error <= 2 / visible + 1e-12
        else:
            assert value.error <= max(1e-6 * abs(value.value), 1e-6 if diagnostic == "principal_angles" else 1e-9), (
                diagnostic
            )


@pytest.mark.parametrize(
    "asked", [{"rank": 3}, {"top_k": 4}, {"mask_rank": 5, "mask_share": (0.25, 0.9)}, {"eta": 0.05}]
)
def test_agrees_under_other_settings(asked: dict[str, object]) -> None:
    base, tuned = nudged(planted.weights(rng(), 30, 24), relative=0.05)
    found = check(base, tuned, Settings(**asked))  # type: ignore[arg-type]
    for key, value in found.items():
        if key[0] == "principal_angles" and "rank" in asked:
            assert value.reason is None


def test_planted_angles_exactly() -> None:
    left, right = [90.0, 50.0, 1.0, 1e-3, 1e-6], [60.0, 10.0, 1e-5]
    spectrum = [2.0 * 0.9**i for i in range(30)]
    found = computed(*planted.rotated_pair(rng(), 40, 30, spectrum, 15, left, right))
    for side, angles in (("left", left), ("right", right)):
        assert found["principal_angles", f"{side}.max"].value == pytest.approx(max(angles), abs=1e-9)
        assert found["principal_angles", f"{side}.mean"].value == pytest.approx(sum(angles) / 15, abs=1e-9)


def test_ranks_that_a_matrix_does_not_allow_are_cut_and_say_so() -> None:
    found = computed(*nudged(planted.weights(rng(), 30, 10)))
    for diagnostic, variant in (
        ("principal_angles", "left.max"),
        ("principal_energy", "both.64"),
        ("mask_overlap", "principal.0.5"),
        ("bound_ratio", "wedin"),
    ):
        assert "5" in (found[diagnostic, variant].reason or ""), diagnostic
    assert "10" in (found["hill_exponent", "16"].reason or "")  # to all singular values, not to half of them
    assert found["mask_overlap", "low_magnitude.0.5"].reason is None
    assert found["stable_rank", ""].reason is None


def test_a_matrix_that_did_not_move() -> None:
    w = planted.stored(planted.weights(rng(), 30, 24), "bfloat16")
    found = computed(w, w)
    for key, value in found.items():
        if key[0] == "update_sparsity":
            assert value.value == 1
        elif key[0] in ("frobenius_norm", "relative_norm", "operator_norm", "principal_angles", "spectral_shift"):
            assert value.value == 0
            assert value.error == 0
        else:
            assert (value.value, value.status) == (None, "undefined")
            assert value.reason


def test_an_invisible_update_has_norms_but_no_overlap() -> None:
    w = planted.stored(planted.weights(rng(), 30, 24), "bfloat16")
    found = check(w, w * (1 + 2.0**-20))
    assert found["update_sparsity", "bf16_exact"].value == 1
    assert found["relative_norm", ""].value == pytest.approx(2.0**-20)
    assert found["mask_overlap", "low_magnitude.0.5"].status == "undefined"


def test_signed_zero_is_a_change_of_bits_only() -> None:
    base = np.array([[1.0, 0.0], [0.0, 2.0]])
    tuned = np.array([[1.5, -0.0], [0.0, 2.0]])
    found = check(base, tuned)
    assert found["update_sparsity", "bf16_eta"].value == 0.75
    assert found["update_sparsity", "bf16_exact"].value == 0.5


@pytest.mark.parametrize(
    "spectrum",
    [[4.0] * 4 + [2.0] * 12 + [1.0] * 8, [3.0, 2.0, 1.0], [1.0] * 24],
    ids=["repeated at the cut", "rank below the cut", "all equal"],
)
def test_subspaces_without_a_gap_at_the_cut_are_not_reported_as_numbers(spectrum: list[float]) -> None:
    found = check(*nudged(planted.with_spectrum(rng(), 30, 24, spectrum), 1e-3))
    for key, value in found.items():
        if key[0] in ("principal_angles", "principal_energy") or key[1].startswith("principal.") or key[1] == "wedin":
            assert value.status == "undefined", key
            assert key[1] == "wedin" or "gap" in (value.reason or ""), key
        elif key[0] in ("spectral_shift", "stable_rank", "update_sparsity"):
            assert value.status == "computed", key


def test_hill_exponent_at_the_edges() -> None:
    base = planted.weights(rng(), 30, 24)
    spectrum = [math.exp(-i / 2) for i in range(24)]
    found = computed(base, base + planted.with_spectrum(rng(1), 30, 24, spectrum))["hill_exponent", "16"]
    assert found.value == pytest.approx(1 / (sum((15 - i) / 2 for i in range(15)) / 15), rel=1e-9)
    equal = computed(np.zeros((30, 24)), planted.with_spectrum(rng(1), 30, 24, [1.0] * 24))["hill_exponent", "16"]
    assert equal.status == "undefined" or (equal.error or 0) > 1e3
    low = computed(base, base + planted.with_spectrum(rng(1), 30, 24, [1.0, 0.5]))["hill_exponent", "16"]
    assert low.status == "undefined"


@pytest.mark.parametrize("share", [0.5, 0.3])
def test_ties_do_not_depend_on_where_the_entries_stand(share: float) -> None:
    # Magnitudes take five values only; moving the entries about moves every sort, and must move nothing else.
    order = rng(5).permutation(30 * 24)
    base = rng().integers(-4, 5, (30, 24)) / 64.0
    tuned = base + (rng(1).random((30, 24)) < 0.2) / 128.0
    settings = Settings(mask_share=(share,))
    key = ("mask_overlap", f"low_magnitude.{share:g}")
    plain = computed(base, tuned, settings)[key].value
    moved = computed(base.ravel()[order].reshape(30, 24), tuned.ravel()[order].reshape(30, 24), settings)[key].value
    assert plain == pytest.approx(moved, rel=1e-12)
    assert plain == pytest.approx(measure(base, tuned).values[key], rel=1e-12)


# Against fifty digits -------------------------------------------------------------------------------------------


def exact_angles(base: Matrix, tuned: Matrix, k: int) -> dict[str, float]:
    """The largest principal angles in degrees, computed with 50 digits from the same float64 entries."""

    def bases(matrix: Matrix) -> tuple[mpmath.matrix, mpmath.matrix]:
        u, _, vt = mpmath.svd_r(mpmath.matrix(matrix.tolist()))
        return u[:, :k], vt.T[:, :k]

    with mpmath.workdps(50):
        found = {}
        for side, a, b in zip(("left", "right"), bases(base), bases(tuned), strict=True):
            sines = mpmath.svd_r(b - a * (a.T * b), compute_uv=False)
            found[side] = float(mpmath.degrees(mpmath.asin(max(sines))))
        return found


@pytest.mark.parametrize("gap", [1e-3, 1e-6, 1e-9, 1e-12, 1e-14])
@pytest.mark.parametrize("relative", [1e-4, 1e-10])
def test_the_stated_error_covers_the_truth_as_the_gap_closes(gap: float, relative: float) -> None:
    base = planted.with_spectrum(rng(), 9, 8, [3.0, 2.5, 2.0, 1.5, 1.5 * (1 - gap), 1.0, 0.5, 0.2])
    base, tuned = nudged(base, relative)
    truth = exact_angles(base, tuned, 4)
    found = computed(base, tuned)
    for side, angle in truth.items():
        value = found["principal_angles", f"{side}.max"]
        if value.value is None:
            assert gap < 1e-12
            assert value.reason
            continue
        assert value.error is not None
        assert abs(value.value - angle) <= value.error, f"{value.value} ± {value.error} does not hold {angle}"
        assert value.error <= 5e-12 / gap + 1e-9  # some 200 roundings of σ₁ over the gap, in degrees


@pytest.mark.parametrize("degrees", [1e-9, 1e-6, 1e-3, 1.0, 44.9, 45.1, 89.999])
def test_angles_of_every_size_against_fifty_digits(degrees: float) -> None:
    pair = planted.rotated_pair(rng(), 9, 8, [3.0, 2.5, 2.0, 1.5, 1.0, 0.6, 0.4, 0.2], 4, [degrees], [degrees / 3])
    truth, found = exact_angles(*pair, 4), computed(*pair)
    for side, angle in truth.items():
        value = found["principal_angles", f"{side}.max"]
        assert value.value is not None
        assert value.error is not None
        assert abs(value.value - angle) <= min(1e-6, value.error)


def test_small_spectral_shifts_against_fifty_digits() -> None:
    base, tuned = nudged(planted.weights(rng(), 9, 8), 1e-10)
    with mpmath.workdps(50):
        before, after = (mpmath.svd_r(mpmath.matrix(m.tolist()), compute_uv=False) for m in (base, tuned))
        truth = float(mpmath.norm(after - before) / mpmath.norm(before))
    value = computed(base, tuned)["spectral_shift", ""]
    assert value.value is not None
    assert value.error is not None
    assert abs(value.value - truth) <= value.error

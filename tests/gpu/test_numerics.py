"""What numerics does on a GPU: its solvers and who stands in for them, its precision, and which device a thing lies on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

import planted
from cuda_double import Counted
from opdgeo.numerics import devices, nulls
from opdgeo.numerics.operators import DenseMatrix, Difference, LowRankMatrix, MatrixOperator
from opdgeo.numerics.spectra import Spectrum, principal_angles, spectrum, truncated_svd

Solver = Callable[[Tensor], Spectrum]


def matrix(rows: int, cols: int, condition: float = 1e3) -> Tensor:
    values = np.geomspace(1, 1 / condition, min(rows, cols))
    return torch.from_numpy(planted.with_spectrum(np.random.default_rng(0), rows, cols, values.tolist()))


def close(found: Spectrum, exact: Spectrum, k: int) -> None:
    """Values within the stated errors, subspaces within the stated angles; values on the host."""
    assert found.sigma.device.type == found.errors.device.type == "cpu"
    apart = (found.sigma - exact.sigma[: len(found.sigma)]).abs()
    assert bool((apart <= found.errors[: len(apart)] + exact.errors[: len(apart)]).all())
    for side in ("left", "right"):
        angles = principal_angles(getattr(found, side)[:, :k].cpu(), getattr(exact, side)[:, :k].cpu())
        allowed = found.subspace_error(k, side) + exact.subspace_error(k, side)
        assert float(angles.max()) <= allowed + 1e-12, side


@pytest.mark.parametrize("shape", [(40, 30), (400, 300), (300, 420)], ids=str)
@pytest.mark.parametrize("condition", [1e2, 1e9], ids=["gram", "small values too"])
def test_spectra_are_those_of_the_cpu(gpu: Counted | None, shape: tuple[int, int], condition: float) -> None:
    stored = matrix(*shape, condition)
    close(spectrum(stored.to("cuda"), 8), spectrum(stored, 8), 8)


def test_krylov_is_that_of_the_cpu(gpu: Counted | None) -> None:
    before = matrix(1300, 1210).float()
    after = before + 1e-3 * matrix(1300, 1210, 1e6).float()
    norm = float(torch.linalg.vector_norm(after.double() - before.double()))
    found = truncated_svd(Difference(before.to("cuda"), after.to("cuda"), norm), 8)
    exact = truncated_svd(Difference(before, after, norm), 8)
    assert found.method == exact.method == "krylov"
    close(found, exact, 8)


def test_factors_are_those_of_the_cpu(gpu: Counted | None) -> None:
    left, right = matrix(300, 4), matrix(200, 4)
    of: list[MatrixOperator] = [LowRankMatrix(left, right), LowRankMatrix(left.to("cuda"), right.to("cuda"))]
    close(truncated_svd(of[1], 4), truncated_svd(of[0], 4), 4)


def test_where_a_gpu_does_not_converge_the_cpu_does(doubles: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SMALL_SVD", 256)
    stored = matrix(400, 300)
    exact = spectrum(stored, 8)
    doubles.failing.update({"eigh", "eigvalsh"})
    found = spectrum(stored.to("cuda"), 8)
    assert found.method == "gram on the CPU" and found.right.device.type == "cuda"
    assert spectrum(stored.to("cuda"), 0).method == "gram on the CPU"
    close(found, exact, 8)
    doubles.failing.update({"svd", "svdvals"})
    found = devices.solve(torch.linalg.svd, stored.to("cuda"), full_matrices=False)
    assert found[1] == " on the CPU" and found[0][0].device.type == "cuda"
    tiny = 1e-170 * matrix(400, 300, 1e30)  # vectors that a Gram matrix does not hold
    assert spectrum(tiny.to("cuda"), 200).method == "svd on the CPU"


def test_svds_of_a_gpu_ask_for_the_backward_stable_driver(doubles: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "SMALL_SVD", 256)
    asked: list[object] = []
    for name in ("svd", "svdvals"):
        plain = getattr(torch.linalg, name)

        def noted(given: Tensor, *, plain: Callable[..., object] = plain, **options: object) -> object:
            asked.append(options.get("driver"))
            return plain(given, **options)

        monkeypatch.setattr(torch.linalg, name, noted)
        devices.solve(getattr(torch.linalg, name), matrix(300, 300).to("cuda"))
        devices.solve(getattr(torch.linalg, name), matrix(300, 300))
    assert asked == ["gesvd", None, "gesvd", None]


FLAG = torch.backends.cuda.matmul


def test_tf32_is_off_while_float32_must_be_float32_and_back_after(
    doubles: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[str] = []
    real = DenseMatrix.gram_product

    def noted(self: DenseMatrix, block: Tensor) -> Tensor:
        inside.append(FLAG.fp32_precision)
        return real(self, block)

    monkeypatch.setattr(DenseMatrix, "gram_product", noted)
    before, stored = FLAG.fp32_precision, matrix(1300, 1210)
    try:
        FLAG.fp32_precision = "tf32"
        truncated_svd(DenseMatrix(stored.to("cuda")), 8)
        assert set(inside) == {"ieee"} and FLAG.fp32_precision == "tf32"
        with devices.float32_products(torch.device("cuda")), pytest.raises(ZeroDivisionError):
            with devices.float32_products(torch.device("cuda")):
                raise ZeroDivisionError
            assert FLAG.fp32_precision == "ieee", "another thread still multiplies"
        assert FLAG.fp32_precision == "tf32"
    finally:
        FLAG.fp32_precision = before


def test_a_block_of_a_gpu_is_the_whole_matrix(doubles: Counted) -> None:
    before, after = (torch.randn(2048, 1024, generator=torch.Generator().manual_seed(i)) for i in range(2))
    there = Difference(before.to("cuda"), after.to("cuda"), 1.0)
    assert len(list(there.row_blocks())) == 1 and len(list(Difference(before, after, 1.0).row_blocks())) == 16
    doubles.calls.clear()
    _ = there @ torch.randn(1024, 8, dtype=torch.float64).to("cuda")
    assert doubles.launches <= 6


def test_nulls_are_the_same_numbers_on_every_device(gpu: Counted | None) -> None:
    sigma = torch.linspace(2, 1, 300, dtype=torch.float64)
    drawn = [nulls.shifts(s, 400, 300, 1e-6, 4, nulls.generator("here")) for s in (sigma, sigma.to("cuda"))]
    torch.testing.assert_close(drawn[1].cpu(), drawn[0], rtol=1e-9, atol=1e-18)

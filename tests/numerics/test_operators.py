"""Every `MatrixOperator` obeys the laws of the protocol, whichever way it holds its matrix, and so does its transpose."""

from __future__ import annotations

import doctest
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opdgeo.numerics
from opdgeo.errors import NumericsError
from opdgeo.numerics import spectra
from opdgeo.numerics.operators import DenseMatrix, Difference, LowRankMatrix, MatrixOperator, inner_products
from opdgeo.numerics.sharded import Rows, ShardedDifference
from opdgeo.numerics.spectra import spectrum, truncated_svd
from opdgeo.numerics.subspaces import largest_rank, principal_angles

ROWS, COLS = 23, 17


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone; `tests/test_monitor.py` runs the same on two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def stored_pair() -> tuple[Tensor, Tensor, float]:
    before, after = random(ROWS, COLS, seed=1).bfloat16(), random(ROWS, COLS, seed=2).float()
    return before, after, float(torch.linalg.vector_norm(after.double() - before.double()))


def difference() -> tuple[MatrixOperator, Tensor]:
    before, after, norm = stored_pair()
    return Difference(before, after, norm), after.double() - before.double()


def sharded() -> tuple[MatrixOperator, Tensor]:
    before, after, norm = stored_pair()
    return ShardedDifference(before, after, norm, Rows(ROWS, 0)), after.double() - before.double()


def low_rank() -> tuple[MatrixOperator, Tensor]:
    left, right = random(ROWS, 4, seed=3), random(COLS, 4, seed=4)
    return LowRankMatrix(left, right), left @ right.T


def dense() -> tuple[MatrixOperator, Tensor]:
    matrix = random(ROWS, COLS, seed=5)
    return DenseMatrix(matrix), matrix


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("make", [dense, difference, low_rank, sharded])
def test_every_operator_is_its_matrix(
    make: Callable[[], tuple[MatrixOperator, Tensor]],
    transposed: bool,
    alone: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opdgeo.numerics.operators.CACHED", 5 * COLS)  # several blocks of rows
    operator, matrix = make()
    if transposed:
        operator, matrix = operator.T, matrix.T
    rows, cols = matrix.shape

    def same(ours: Tensor, theirs: Tensor, tolerance: float = 1e-13) -> None:
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= tolerance * (1 + float(theirs.abs().max()))

    block, left, right = random(cols, 3, seed=6), random(rows, 2, seed=7), random(cols, 5, seed=8)
    assert tuple(operator.shape) == (rows, cols)
    assert operator.device == matrix.device
    assert math.isclose(operator.norm, float(torch.linalg.vector_norm(matrix)), rel_tol=1e-13)
    same(operator.dense(), matrix)
    same(operator.T.dense(), matrix.T)
    same(operator.T.T.dense(), matrix)
    same(operator @ block, matrix @ block)
    same(operator.gram_product(block), matrix.T @ (matrix @ block))
    for ours, theirs in zip(operator.onto(left, right), (left.T @ matrix, matrix @ right), strict=True):
        same(ours, theirs)
    single = operator.normalised()
    same((single @ block.float()).double(), matrix @ block / operator.norm, 1e-5)
    same(single.gram_product(block.float()).double(), matrix.T @ (matrix @ block) / operator.norm**2, 1e-5)
    if make is sharded and transposed:
        with pytest.raises(NumericsError, match="transposed"):
            operator.row_blocks()
    else:
        blocks = list(operator.row_blocks())
        assert make is low_rank or len(blocks) > 1
        same(torch.cat(blocks), matrix)
    found = operator.structured_svd(3)
    assert (found is None) == (make is not low_rank)
    if found is not None:
        exact = torch.linalg.svdvals(matrix)[: len(found.sigma)]
        assert bool(((found.sigma - exact).abs() <= found.errors).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_a_difference_and_its_shards_take_the_same_way_to_the_same_triplets(
    transposed: bool, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "KRYLOV", 100)
    before = random(320, 240, seed=1)
    low = random(320, 12, seed=2) @ (random(12, 240, seed=3) * 0.7 ** torch.arange(12)[:, None])
    after = before + low + 1e-3 * random(320, 240, seed=4)
    norm = float(torch.linalg.vector_norm(after - before))
    whole: MatrixOperator = Difference(before, after, norm)
    parts: MatrixOperator = ShardedDifference(before, after, norm, Rows(320, 0))
    if transposed:
        whole, parts = whole.T, parts.T
    exact = spectrum((after - before).T if transposed else after - before, 4)
    for operator in (whole, parts, DenseMatrix(whole.dense())):
        found = truncated_svd(operator, 4)
        assert found.method == "krylov"
        assert bool(((found.sigma - exact.sigma[:4]).abs() <= found.errors + exact.errors[:4]).all())
        assert float(exact.sigma[4]) <= found.tail_bound * (1 + 1e-12)
        for side in ("left", "right"):
            apart = float(principal_angles(getattr(found, side), getattr(exact, side)).max())
            assert apart <= found.subspace_error(4, side) + exact.subspace_error(4, side) + 1e-12


def test_the_largest_rank_is_half_the_smaller_side() -> None:
    assert [largest_rank(*shape) for shape in ((1, 1), (2, 9), (9, 7), (64, 64))] == [1, 1, 3, 32]


def test_the_examples_of_the_numerics_run() -> None:
    tried = 0
    for info in pkgutil.iter_modules(opdgeo.numerics.__path__):
        result = doctest.testmod(importlib.import_module(f"opdgeo.numerics.{info.name}"))
        assert result.failed == 0, info.name
        tried += result.attempted
    assert tried >= 10


@pytest.mark.parametrize("first", [dense, difference, low_rank])
@pytest.mark.parametrize("second", [dense, difference, low_rank])
def test_inner_products_are_those_of_the_entries(
    first: Callable[[], tuple[MatrixOperator, Tensor]],
    second: Callable[[], tuple[MatrixOperator, Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("opdgeo.numerics.operators.CACHED", 5 * COLS)  # several blocks of rows
    (one, a), (two, b) = first(), second()
    inner, own, other = inner_products(one, two)
    expected = float((a * b).sum() / torch.linalg.vector_norm(a) / torch.linalg.vector_norm(b))
    assert math.isclose(inner, expected, rel_tol=1e-12, abs_tol=1e-14)
    assert math.isclose(own, 1, rel_tol=1e-13) and math.isclose(other, 1, rel_tol=1e-13)
    for operator, matrix in ((one, a), (two, b)):
        found = operator.structured_inner(two)
        assert found is None or math.isclose(found, float((matrix * b).sum()), rel_tol=1e-12, abs_tol=1e-13)
    same = inner_products(one, first()[0])
    assert same[0] == same[1] == same[2]

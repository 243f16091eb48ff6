"""`gpu`: two doubles of GPUs, and where there is one, a real one (`pytest -m cuda`)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cuda_double import Counted, cuda_doubles

REAL = pytest.param("real", marks=[pytest.mark.cuda, pytest.mark.needs("cuda")])


@pytest.fixture(params=["doubles", REAL])
def gpu(request: pytest.FixtureRequest) -> Iterator[Counted | None]:
    """What was counted on the doubles; None on a real GPU."""
    if request.param == "real":
        yield None
        return
    with cuda_doubles(2) as counted:
        yield counted


@pytest.fixture
def doubles() -> Iterator[Counted]:
    with cuda_doubles(2) as counted:
        yield counted

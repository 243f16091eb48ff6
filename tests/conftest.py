"""One thread a process: small matrices gain nothing from more, and BLAS threads that wait for a busy core cost minutes."""

import atexit
import os
import shutil
import tempfile

import pytest

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Nothing that a test computes is kept in the user's cache, and every test process has one of its own.
os.environ["OPDGEO_CACHE"] = f"{tempfile.gettempdir()}/opdgeo-test-cache-{os.getpid()}"
atexit.register(shutil.rmtree, os.environ["OPDGEO_CACHE"], ignore_errors=True)

# The files that take longest start first, so that no core waits for one of them at the end.
LONG = (
    "reproduce",
    "ray",
    "constrain",
    "engines",
    "plan",
    "report",
    "smollm2",
    "resume",
    "train_plan",
    "cache",
    "monitor",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))

"""One thread a process: small matrices gain nothing from more, and BLAS threads that wait for a busy core cost minutes."""

import atexit
import os
import shutil
import tempfile

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

# Nothing that a test computes is kept in the user's cache, and every test process has one of its own.
os.environ["OPDGEO_CACHE"] = f"{tempfile.gettempdir()}/opdgeo-test-cache-{os.getpid()}"
atexit.register(shutil.rmtree, os.environ["OPDGEO_CACHE"], ignore_errors=True)

"""Importing this holds every library that is loaded later to one thread.

More threads gain nothing on small matrices and tables, and BLAS threads that wait for a busy core cost minutes.
"""

from __future__ import annotations

import os

for _variable in (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "POLARS_MAX_THREADS",
    "RAYON_NUM_THREADS",
):
    os.environ.setdefault(_variable, "1")

# Where a program takes more all the same, as a study's first run does, its threads sleep while they wait: spinning, on cores that
# other tests use, cost more than four times the work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

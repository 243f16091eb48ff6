"""One thread a process: small matrices gain nothing from more, and BLAS threads that wait for a busy core cost minutes."""

import os

for _variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

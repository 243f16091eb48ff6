"""The dense method: LAPACK's SVD of the matrix itself.

Backward stable: exact for a matrix within ‖E‖₂ ≤ ε of the given one (`certificates.svd_error`), whatever its condition number. It
costs the most, about 4·large·small² + 8·small³ multiply-adds with vectors, and is taken for small matrices and where the
quicker methods give up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdgeo.numerics.certificates import Spectrum, svd_error
from opdgeo.numerics.devices import solve


def by_svd(matrix: Tensor, rank: int) -> Spectrum:
    """All singular values of a float64 (rows, cols) matrix and the vectors of the leading `rank` (0: none).

    >>> by_svd(torch.tensor([[3.0, 0.0], [0.0, -4.0]], dtype=torch.float64), 0).sigma.tolist()
    [4.0, 3.0]
    """
    rows, cols = matrix.shape
    if rank:
        (left, sigma, right_t), where = solve(torch.linalg.svd, matrix, full_matrices=False)
        left, right, method = left[:, :rank].contiguous(), right_t[:rank].T.contiguous(), "svd" + where
    else:
        sigma, where = solve(torch.linalg.svdvals, matrix)
        left, right, method = matrix.new_empty(rows, 0), matrix.new_empty(cols, 0), "svdvals" + where
    error = svd_error(rows, cols, float(sigma[0]))
    return Spectrum(sigma, left, right, error, method, torch.full_like(sigma, error), error)

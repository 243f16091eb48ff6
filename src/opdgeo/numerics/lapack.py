"""Symmetric eigenproblems through LAPACK's own steps: one tridiagonal reduction serves all values and the top vectors.

`torch.linalg` offers values alone or every vector, and reduces again for each. SciPy exports LAPACK as C pointers; called
through ctypes they run outside the interpreter lock, so that a pool of threads can use them.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor


class EigenError(ArithmeticError):
    """LAPACK or the GPU's solver reports that an eigenproblem was not solved."""


@cache
def _function(name: str, arguments: int) -> Any:
    from scipy.linalg import cython_blas, cython_lapack

    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype, api.PyCapsule_GetName.argtypes = ctypes.c_char_p, [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    capsule = {**cython_blas.__pyx_capi__, **cython_lapack.__pyx_capi__}[name]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address)


def threads(count: int) -> Any:
    """Let SciPy's BLAS use `count` threads a call, as `torch.set_num_threads` does for torch's; undo by `restore_original_limits()`."""
    import scipy.linalg  # noqa: F401  (loads the library whose limit is set)
    from threadpoolctl import threadpool_limits

    return threadpool_limits(count, user_api="blas")


_SCALARS: dict[type, Any] = {bytes: ctypes.c_char, int: ctypes.c_int, float: ctypes.c_double}


def _places(arguments: tuple[Tensor | int | bytes | float, ...]) -> tuple[list[int], list[Any]]:
    """Addresses of Fortran arguments, and the scalars that must live as long as the call."""
    held: list[Any] = []
    places: list[int] = []
    for argument in arguments:
        if type(argument) in _SCALARS:
            held.append(_SCALARS[type(argument)](argument))
            places.append(ctypes.addressof(held[-1]))
        else:
            places.append(cast(Tensor, argument).data_ptr())
    return places, held


def _call(name: str, *arguments: Tensor | int | bytes | float) -> None:
    """Call a LAPACK routine whose last argument is `info`, which is added here; raises where it is not 0."""
    info = ctypes.c_int(0)
    places, _held = _places(arguments)
    _function(name, len(arguments) + 1)(*places, ctypes.addressof(info))
    if info.value != 0:
        raise EigenError(f"{name} returned info = {info.value}.")


def gram_matrix(tall: Tensor) -> Tensor:
    """The upper triangle of AᵀA of a float64 (rows, cols) matrix: (cols, cols); what stands below it means nothing.

    >>> gram_matrix(torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)).triu().tolist()
    [[1.0, 2.0], [0.0, 5.0]]
    """
    rows, cols = tall.shape
    if tall.device.type != "cpu":
        return tall.T @ tall
    stored_by_columns = tall.stride(0) == 1 and tall.stride(1) >= rows
    if not stored_by_columns:
        tall = tall.contiguous()
    product = tall.new_empty(cols, cols)
    # LAPACK counts by columns: our rows are its columns, our upper triangle its lower one.
    trans, lead = (b"T", tall.stride(1)) if stored_by_columns else (b"N", cols)
    places, _held = _places((b"L", trans, cols, rows, 1.0, tall, max(lead, 1), 0.0, product, cols))
    _function("dsyrk", 10)(*places)
    return product


def eigen(symmetric: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues, descending, and the (n, k) vectors of the k largest.

    Args:
        symmetric: (n, n) float64, contiguous; only the upper triangle is read. Overwritten on the CPU.

    Raises:
        EigenError: the solver did not converge.

    >>> values, vectors = eigen(torch.tensor([[2.0, 0.0], [0.0, 3.0]], dtype=torch.float64), 1)
    >>> values.tolist(), vectors.abs().flatten().tolist()
    ([3.0, 2.0], [0.0, 1.0])
    """
    n = symmetric.shape[0]
    if symmetric.device.type != "cpu":
        try:
            if not k:
                return torch.linalg.eigvalsh(symmetric, UPLO="U").flip(0), symmetric.new_empty(n, 0)
            values, vectors = torch.linalg.eigh(symmetric, UPLO="U")
        except RuntimeError as error:  # cuSOLVER does not converge, or the memory of the GPU does not hold its work
            raise EigenError(f"the GPU's solver failed: {error}") from error
        return values.flip(0), vectors[:, n - k :].flip(1).contiguous()

    diagonal, beside, tau = (symmetric.new_empty(n) for _ in range(3))
    work = symmetric.new_empty(64 * n)
    _call("dsytrd", b"L", n, symmetric, n, diagonal, beside, tau, work, work.numel())
    if not k:
        _call("dsterf", n, diagonal, beside)
        return diagonal.flip(0), symmetric.new_empty(n, 0)
    divided = 6 * k > n
    values, vectors = _divided(diagonal, beside, k) if divided else _separate(diagonal, beside, k)
    work = symmetric.new_empty(max(64 * k, 65 * 64 + 64 * max(n, k)))
    _call("dormtr", b"L", b"L", b"N", n, k, symmetric, n, tau, vectors, n, work, work.numel())
    top = vectors.flip(0).T.contiguous()
    if not divided:  # vectors of close values are orthogonal to some 1e-12: one Newton step makes it 1e-16
        overlap = top.T @ top
        if not float((overlap - torch.eye(k, dtype=torch.float64)).abs().max()) <= 1e-8:
            raise EigenError("dstemr returned vectors that are not orthogonal.")
        top = torch.addmm(top, top, overlap, beta=1.5, alpha=-0.5)
    return values.flip(0), top


def _divided(diagonal: Tensor, beside: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ascending values and the top k vectors, one a row, of a tridiagonal matrix: all of them by divide and conquer."""
    n = len(diagonal)
    vectors = diagonal.new_empty(n, n)
    work, whole = diagonal.new_empty(1 + 4 * n + n * n), torch.empty(3 + 5 * n, dtype=torch.int32)
    _call("dstedc", b"I", n, diagonal, beside, vectors, n, work, work.numel(), whole, whole.numel())
    return diagonal, vectors[n - k :]


def _separate(diagonal: Tensor, beside: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same where k is a small part of n: values first, then each vector by relatively robust representations."""
    n = len(diagonal)
    values = diagonal.clone()
    _call("dsterf", n, values, beside.clone())
    vectors = diagonal.new_zeros(k, n)
    found, top = torch.zeros(1, dtype=torch.int32), diagonal.new_empty(n)
    support, whole = torch.empty(2 * k, dtype=torch.int32), torch.empty(10 * n, dtype=torch.int32)
    relative = torch.ones(1, dtype=torch.int32)
    work = diagonal.new_empty(18 * n)
    matrix, selected = (n, diagonal, beside), (0.0, 0.0, n - k + 1, n)
    result = (found, top, vectors, n, k, support, relative)
    _call("dstemr", b"V", b"I", *matrix, *selected, *result, work, work.numel(), whole, whole.numel())
    if int(found) != k:
        raise EigenError(f"dstemr found {int(found)} of {k} vectors.")
    return values, vectors

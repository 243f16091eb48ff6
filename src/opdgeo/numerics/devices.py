"""What depends on the device that a matrix lies on: the size of blocks, who solves a small eigenproblem, and how float32 multiplies.

On the CPU every function here is the plain one of torch, so that nothing of it changes a bit there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch import Tensor

WHOLE = 1 << 26  # entries of a block on a GPU, 512 MiB in float64: nearly every matrix is one block there
SMALL = 256  # a smaller side below which a core solves an eigenproblem as fast as a GPU (docs/gpu.md)
SMALL_SVD = 512  # the same of an SVD


def rows_of_block(cols: int, device: torch.device, cached: int) -> int:
    """Rows of a block, at least one: `cached` entries on the CPU, where a block stays in the cache, `WHOLE` on a GPU.

    A GPU has no use for small blocks: each costs it the start of every kernel, and a sum that is brought back the wait for all of them.

    >>> rows_of_block(1 << 16, torch.device("cpu"), 1 << 18), rows_of_block(1 << 16, torch.device("cuda"), 1 << 18)
    (4, 1024)
    """
    return max(1, (cached if device.type == "cpu" else WHOLE) // max(1, cols))


def gpus(device: str) -> list[str]:
    """The GPUs that "cuda" means, all that are visible, or the one that "cuda:1" names.

    >>> gpus("cuda:1")
    ['cuda:1']
    """
    return [device] if ":" in device else [f"cuda:{i}" for i in range(torch.cuda.device_count())]


def start(device: str) -> None:
    """Load the linear algebra of a GPU. torch does it at the first call, and two threads that make it together end the program."""
    one = torch.eye(2, dtype=torch.float64, device=device)
    torch.linalg.eigh(one)
    torch.linalg.svdvals(one, driver="gesvd")
    torch.linalg.qr(one)
    torch.linalg.lu_factor_ex(one)
    torch.linalg.cholesky_ex(one)
    torch.linalg.solve_triangular(one, one, upper=True)


@contextmanager
def stream(device: str) -> Iterator[None]:
    """On a GPU, what this thread asks for meanwhile goes to a stream of its own and runs beside what other threads ask for."""
    if device == "cpu":
        yield
    else:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            yield


def upload(stored: Tensor, device: str | torch.device) -> Tensor:
    """`stored`, from the host, on `device`; to a GPU through pinned memory, which is copied at the full rate of the bus."""
    if torch.device(device).type == "cpu":
        return stored.to(device)
    return stored.pin_memory().to(device, non_blocking=True)


def solve(solver: Callable[..., Any], matrix: Tensor, **options: Any) -> tuple[Any, str]:
    """What a solver of `torch.linalg` finds for a matrix, on its device, and where it was found: "" or " on the CPU".

    Small matrices of a GPU are solved on the CPU. Those are too whose solver fails there: it does not converge, or has no memory.
    `svd` and `svdvals` take cuSOLVER's `gesvd`, which is backward stable; torch's own choice, a Jacobi iteration, stops at a
    tolerance that no bound of `certificates` covers.
    """
    if matrix.device.type == "cpu":
        return solver(matrix, **options), ""
    failed = ""
    svd = solver in (torch.linalg.svd, torch.linalg.svdvals)
    if min(matrix.shape) >= (SMALL_SVD if svd else SMALL):
        quick = options | ({"driver": "gesvd"} if svd else {})
        try:
            return solver(matrix, **quick), ""
        except RuntimeError:  # torch.linalg.LinAlgError and torch.cuda.OutOfMemoryError are
            failed = " on the CPU"
    found = solver(matrix.cpu(), **options)
    back = found.to(matrix.device) if torch.is_tensor(found) else tuple(part.to(matrix.device) for part in found)
    return back, failed


def solved(solver: Callable[..., Any], matrix: Tensor, **options: Any) -> Any:
    """What `solve` finds, wherever."""
    return solve(solver, matrix, **options)[0]


_exact = Lock()
_users, _before = 0, None


@contextmanager
def float32_products(device: torch.device) -> Iterator[None]:
    """Float32 products of a GPU at the full precision of float32, not TF32's ten bits, while this holds; then as it was before.

    The switch is one for the process, so threads share it: the first throws it and the last puts it back.
    """
    global _users, _before
    if device.type == "cpu":
        yield
        return
    # From torch 2.9 on. Its older switch is not to be read where a program has set the newer one.
    newer = hasattr(torch.backends.cuda.matmul, "fp32_precision")
    flag, exact = ("fp32_precision", "ieee") if newer else ("allow_tf32", False)
    with _exact:
        if not _users:
            _before = getattr(torch.backends.cuda.matmul, flag)
            setattr(torch.backends.cuda.matmul, flag, exact)
        _users += 1
    try:
        yield
    finally:
        with _exact:
            _users -= 1
            if not _users:
                setattr(torch.backends.cuda.matmul, flag, _before)

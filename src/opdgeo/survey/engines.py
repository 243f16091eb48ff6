"""Where matrices are measured: `local`, a pool of threads, or `ray`, tasks on a cluster.

An engine is a function of a job, its work and the execution that yields every matrix with what was measured of it, in the order in which
they finish. One BLAS thread a matrix: LAPACK runs outside the interpreter lock, threads that wait for a busy core cost more
than they bring, and so neither the engine nor the number of workers changes a bit of the result.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Lock
from typing import Any

from opdgeo.checkpoints import Matrix
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.machine import available_gpu_memory, available_memory, version
from opdgeo.numerics.devices import gpus, start, stream
from opdgeo.survey.measure import Job, Measured, measure
from opdgeo.survey.memory import LIBRARIES, Memory, block_set, give_back, peak_memory, working_set
from opdgeo.survey.request import Execution

Work = Sequence[tuple[Matrix, Measured | None]]  # the largest first; beside each what is known of it
Finished = Generator[tuple[Matrix, Measured], None, None]

LANES = 4  # matrices of a GPU at a time: one alone leaves it idle while the host works
RETRIES = 5  # starts of a matrix after workers that died with it
GIVEN_BACK = (
    64 << 20
)  # bytes of matrices after which a thread returns freed memory: that takes as long as a small matrix
PATIENCE = 10.0  # seconds without a result after which the cluster is looked at again


def local(job: Job, work: Work, execution: Execution) -> Finished:
    """On threads of this process (`workers`), as many matrices at a time as memory holds.

    A GPU takes up to `LANES` matrices at a time, as its memory holds, each on a stream of its own: while the host works for one, the GPU
    works for another.
    """
    memory, waiting, lock, stop = Memory(available_memory() * 8 // 10), iter(work), Lock(), Event()
    done: SimpleQueue[tuple[Matrix, Measured] | BaseException] = SimpleQueue()

    def measuring(lane: Job) -> None:
        """One matrix after the other: a task a matrix would cost as much as a small one."""
        left = 0  # bytes of the matrices since memory was given back
        try:
            while not stop.is_set():
                with lock:
                    matrix, known = next(waiting, (None, None))
                if matrix is None:
                    return
                size = _size(lane, matrix)
                on_gpu = gpu_memory[lane.device].room_for(size + block_set(matrix)) if gpu_memory else nullcontext()
                with memory.room_for(size), on_gpu, stream(lane.device):
                    done.put((matrix, measure(lane, matrix, known)))
                    left += size
                    if left >= GIVEN_BACK:
                        give_back()
                        left = 0
        except BaseException as error:  # it ends the survey, in the thread that asked for it
            done.put(error)

    lanes = (
        [job] * workers(execution)
        if job.device == "cpu"
        else [replace(job, device=device) for device in LANES * gpus(job.device)][: workers(execution)]
    )
    lanes = lanes[: max(1, len(work))]
    devices = {lane.device for lane in lanes} - {"cpu"}
    for device in devices:
        start(device)  # here, before there are threads
    gpu_memory = {device: Memory(available_gpu_memory(device) * 8 // 10) for device in devices}
    pool = ThreadPoolExecutor(len(lanes))
    try:
        with _one_thread():
            for lane in lanes:
                pool.submit(measuring, lane)
            for _ in work:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                yield found
    finally:
        stop.set()
        pool.shutdown()


def ray(job: Job, work: Work, execution: Execution) -> Finished:
    """As tasks of a Ray cluster: one CPU and the matrix's memory each, started again where a worker or a node dies with it.

    Checkpoints lie at the same paths on every node; the base's factors are shared through the cache on disk. The default address
    is `$RAY_ADDRESS`, else the cluster started on this machine, else one of this process alone. The default number of tasks at
    a time is what the cluster has room for.

    Raises:
        ConfigError: Ray is not installed, no cluster answers, or none of its nodes has room for a matrix.
        CheckpointError: a worker does not see a file of the checkpoints.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--engine ray needs Ray, which is not installed. Try: pip install 'opdgeo[ray]'") from None

    program = peak_memory() + LIBRARIES  # a worker's is about the same
    with _cluster(ray, execution.address):
        remote = ray.remote(_on_a_worker)
        shared = ray.put((job, str(Path.cwd()), _files(job), _versions()))
        waiting = list(reversed(work))
        pending: dict[Any, Matrix] = {}
        try:
            while waiting or pending:
                room = execution.workers or 2 * int(ray.cluster_resources().get("CPU", 1))
                while waiting and len(pending) < room:
                    matrix, known = waiting.pop()
                    needs = _needs(job, matrix, program)
                    _refuse_what_no_node_holds(ray.nodes(), matrix, needs)
                    task = remote.options(
                        num_cpus=needs["CPU"], num_gpus=needs["GPU"], memory=needs["memory"], max_retries=RETRIES
                    )
                    pending[task.remote(shared, matrix, known)] = matrix
                done, _ = ray.wait(list(pending), timeout=PATIENCE)
                for reference in done:
                    matrix = pending.pop(reference)
                    yield matrix, _result(ray, reference, matrix)
                if not done:
                    for matrix in pending.values():
                        _refuse_what_no_node_holds(ray.nodes(), matrix, _needs(job, matrix, program))
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


ENGINES = {"local": local, "ray": ray}


def workers(execution: Execution) -> int:
    """Matrices measured at a time on this machine: one a CPU core, or `LANES` a GPU, unless fewer are asked for."""
    if execution.device == "cpu" or execution.engine != "local":
        return execution.workers or cpu_cores()
    count = LANES * len(gpus(execution.device))
    return min(execution.workers or count, count)


def cpu_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _size(job: Job, matrix: Matrix) -> int:
    return working_set(matrix, [job.base, *job.checkpoints], job.settings, pairs=job.pairs)


@contextmanager
def _one_thread() -> Iterator[None]:
    """One BLAS thread, torch's and SciPy's, for every matrix."""
    import torch

    from opdgeo.numerics import lapack

    before, limits = torch.get_num_threads(), lapack.threads(1)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        limits.restore_original_limits()


@contextmanager
def _cluster(ray: Any, address: str | None) -> Iterator[None]:
    """A connection to the cluster that was asked for, else one of this process alone; one that was there before stays.

    Without an address Ray would join whatever cluster was last started on this machine, which may be anybody's.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if found := re.fullmatch(r"(?:ray://)?(.+):(\d+)", address or ""):  # Ray itself tries for minutes
            socket.create_connection((found[1], int(found[2])), timeout=10).close()
        ray.init(address=address or "local", log_to_driver=False, logging_level="error", include_dashboard=False)
    except (OSError, ValueError, RuntimeError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address or 'this machine'} ({error}); expected HOST:PORT of a head node with this Python "
            "and this Ray. Start one with `ray start --head --port=6379`; of one that asks for a token, be a client by RAY_AUTH_MODE=token."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _needs(job: Job, matrix: Matrix, program: int) -> dict[str, int]:
    """What a node must have: every worker is a process of its own."""
    return {"CPU": 1, "GPU": int(job.device.startswith("cuda")), "memory": _size(job, matrix) + program}


def _refuse_what_no_node_holds(nodes: list[dict[str, Any]], matrix: Matrix, needs: dict[str, int]) -> None:
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in needs.items()) for node in alive):
        offered = max((node.get("memory", 0) for node in alive), default=0)
        raise ConfigError(
            f"no node of the Ray cluster has room for {matrix.name} ({matrix.rows}×{matrix.cols}): it needs a CPU, "
            f"{'a GPU, ' if needs['GPU'] else ''}{needs['memory'] / 1e9:.1f} GB; the largest of {len(alive)} nodes offers "
            f"{offered / 1e9:.1f} GB. Start a node with more (`ray start --memory=BYTES`), or leave the role out with --roles."
        )


def _result(ray: Any, reference: Any, matrix: Matrix) -> Measured:
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ModuleNotFoundError):
            raise ConfigError(
                f"a worker of the Ray cluster cannot run opdgeo ({error.cause}). Install the same opdgeo on every node."
            ) from error
        raise error.cause from error
    except ray.exceptions.RayError as error:
        raise ConfigError(
            f"the Ray cluster lost {RETRIES + 1} workers over {matrix.name} ({matrix.rows}×{matrix.cols}): "
            f"{str(error).splitlines()[0]} What is finished is kept: give the same command again, with nodes of more memory or "
            "fewer --workers."
        ) from error


def _files(job: Job) -> list[tuple[Path, int]]:
    """Every file of the checkpoints and its size."""
    return [(file, file.stat().st_size) for c in (job.base, *job.checkpoints) for file in c.files]


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("opdgeo", "torch", "numpy", "scipy")}


def _on_a_worker(
    shared: tuple[Job, str, list[tuple[Path, int]], dict[str, str]], matrix: Matrix, known: Measured | None
) -> Measured:
    """One task: the paths of the driver, seen from this machine.

    Raises:
        ConfigError: other versions here than there. CheckpointError: a file that is not there, or another one.
    """
    job, folder, files, versions = shared
    here = socket.gethostname()
    if _versions() != versions:
        raise ConfigError(f"the Ray worker on {here} has {_versions()}; expected {versions}, as on the driver.")
    with suppress(OSError):
        os.chdir(folder)  # relative paths are the driver's
    for file, size in files:
        if not file.is_file() or file.stat().st_size != size:
            raise CheckpointError(
                f"{file} is {'another file' if file.is_file() else 'not there'} on {here}, a node of the Ray cluster; expected the "
                "checkpoints at the same path on every node. Put them on a shared file system."
            )
    if job.device != "cpu":
        start(job.device)
    with _one_thread():
        found = measure(job, matrix, known)
    give_back()
    return found

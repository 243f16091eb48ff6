"""A process that has imported the libraries once and forks a child for every program that a test starts.

A cold start imports torch, transformers and TRL anew: up to nine seconds of processor time, and the suite starts a hundred
programs. Here only the first one pays. The test processes of pytest-xdist are forked from it too, so all share its hash seed.
What a child runs is what `python ARGUMENTS` would run, in a process of its own, with its own working directory, environment,
streams, signals and exit status, and it ends as Python ends. The processes that `multiprocessing` starts for it come from here as well.

Before a fork there are no threads but the allocators' own: torch and BLAS are held to one thread, polars and pyarrow start theirs
when first used. Not for a test of what an import costs or does, nor for an environment variable that is read at import (but for the hub's): such a
test starts a real process, by `cold=True` in `program.py`, which is the other side of this file.

    fork_server.py SOCKET       listens until its standard input ends
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import selectors
import signal
import socket
import struct
import sys
import threading
import types
import weakref
from importlib.util import source_hash
from pathlib import Path
from typing import Any, NoReturn

# What the programs import, by what they do; each is all of those above it and more. "tests": what the test modules import.
LIBRARIES = {
    "survey": (
        "numpy", "scipy.linalg", "threadpoolctl", "torch", "polars", "pyarrow.parquet", "rich.console", "rich._emoji_replace",
        "rich._emoji_codes", "jinja2", "matplotlib.pyplot", "matplotlib.backends.backend_svg", "opdgeo.survey.follow",
        "opdgeo.report.page", "opdgeo.report.terminal", "opdgeo.diagnostics.gaussian_null", "opdgeo.commands",
    ),
    "training": (
        "datasets", "peft", "accelerate", "trl", "trl.trainer.sft_trainer", "trl.trainer.grpo_trainer",
        "transformers.models.auto.modeling_auto", "transformers.models.qwen3.modeling_qwen3",
        "transformers.models.llama.modeling_llama", "opdgeo.training.train", "opdgeo.training.policy", "opdgeo.training.channel",
        "opdgeo.experiments.reproduce", "opdgeo.experiments.gradient_moments", "torch.distributed.fsdp",
    ),
    "tests": (
        "pytest", "hypothesis", "pandas", "scipy.stats", "torch.distributed.checkpoint", "torch.distributed.tensor", "opdgeo",
        "opdgeo.report.notebook", "opdgeo.experiments.related", "xdist.remote",
    ),
}  # fmt: skip


@functools.cache
def load(libraries: str, tests: tuple[str, ...]) -> None:
    """Import what `libraries` names; `tests` are the files and folders that the test processes will collect."""
    kinds = list(LIBRARIES)
    for kind in kinds[: kinds.index(libraries) + 1]:
        for name in LIBRARIES[kind]:
            importlib.import_module(name)
    if libraries != "survey":  # a thousand patterns, which each child would compile at its first model
        sys.modules["transformers.conversion_mapping"].get_checkpoint_conversion_mapping("qwen3")
    if tests:
        rewrite(tests)
    sys.modules["torch"].set_num_threads(1)
    leave_as_it_is()
    gc.collect()
    gc.freeze()  # a child's collector leaves the shared pages alone


def leave_as_it_is() -> None:
    """At its end a child does not clear away what was there before it: PyTorch would have each tell its compile times and take its
    operators apart, up to a tenth of a second."""
    if dynamo := sys.modules.get("torch._dynamo.utils"):
        atexit.unregister(dynamo.dump_compile_times)
    for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
        finalizer.atexit = False


def rewrite(tests: tuple[str, ...]) -> None:
    """Have pytest rewrite assertions here, once: each test process would do it for all files, five seconds of processor time."""
    from _pytest.assertion import rewrite

    original = rewrite._rewrite_test
    paths = [Path(test.partition("::")[0]).resolve() for test in tests]
    files = {file for path in paths for file in (path.rglob("test_*.py") if path.is_dir() else [path])}
    made = {file: original(file, None) for file in files if file.suffix == ".py" and file.is_file()}  # type: ignore[arg-type]

    def rewritten(file: Path, config: Any) -> Any:
        known = made.get(file)
        return known if known and known[0] == source_hash(file.read_bytes()) else original(file, config)

    rewrite._rewrite_test = rewritten


def serve(path: str) -> dict[str, Any] | None:
    """Answer requests. Returns None in the server, at the end, and the request in each child."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    # Ctrl-C is pytest's: when it ends, so does the standard input here. A child takes its own when it is ready.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    woken, wake = socket.socketpair()
    woken.setblocking(False)
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    ready = selectors.DefaultSelector()
    for source in (listener, woken, sys.stdin):
        ready.register(source, selectors.EVENT_READ)
    running: dict[int, socket.socket] = {}
    while True:
        sources = {key.fileobj for key, _ in ready.select()}
        if woken in sources:
            with contextlib.suppress(BlockingIOError):
                woken.recv(4096)
            _reap(running)
        if sys.stdin in sources:
            signal.set_wakeup_fd(-1)
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            return None
        if listener in sources:
            connection, _ = listener.accept()
            request, files = _request(connection)
            try:
                load(request["libraries"], tuple(request.get("tests", ())))
            except BaseException as error:
                connection.sendall(json.dumps({"error": repr(error)}).encode() + b"\n")
                raise
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
                ready.close()
                for other in (listener, woken, wake, connection, *running.values()):
                    other.close()
                aside = [fcntl.fcntl(file, fcntl.F_DUPFD, max(request["files"]) + 1) for file in files]
                for file in files:
                    os.close(file)
                for target, file in zip(request["files"], aside, strict=True):
                    os.dup2(file, target)
                    os.close(file)
                return request
            running[pid] = connection
            for file in files:
                os.close(file)
            connection.sendall(json.dumps({"pid": pid}).encode() + b"\n")


def _request(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Length and JSON, with the open files beside the first byte, the three streams first."""
    first, files, _, _ = socket.recv_fds(connection, 4, 64)
    (length,) = struct.unpack("!I", first)
    text = b""
    while len(text) < length:
        text += connection.recv(length - len(text))
    return json.loads(text), files


def _reap(running: dict[int, socket.socket]) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        if connection := running.pop(pid, None):
            ended = {"status": os.waitstatus_to_exitcode(status), "seconds": usage.ru_utime + usage.ru_stime}
            with contextlib.suppress(OSError):  # the test did not wait for it
                connection.sendall(json.dumps(ended).encode() + b"\n")
            connection.close()


def end(request: dict[str, Any]) -> NoReturn:
    """Run the program and end as Python does, but for taking every module apart."""
    status = 0
    try:
        become(request)
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        if not isinstance(exit_.code, int | None):
            print(exit_.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if not stream.closed:
            stream.flush()
    os._exit(status)


def become(request: dict[str, Any]) -> None:
    """Run what `python ARGUMENTS` would, at the top of a new `__main__`."""
    os.chdir(request["cwd"])
    if any(os.environ.get(name) != request["env"].get(name) for name in ("HF_ENDPOINT", "HF_HOME", "HF_HUB_OFFLINE")):
        for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
            del sys.modules[name]  # it reads them when it is imported
    os.environ.clear()
    os.environ.update(request["env"])
    multiprocessing.set_executable(request["python"])
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv = rest
        sys.path[0] = request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path[0] = ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [first, *rest]
        sys.path[0] = os.path.dirname(first)  # noqa: PTH120 (as Python does)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    if request := serve(sys.argv[1]):
        end(request)

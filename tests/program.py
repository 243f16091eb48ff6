"""Start programs in tests: the command line, other Python programs, and several processes of one training run.

    run_opdgeo("compare", base, tuned, "-o", out)        a finished process: returncode, stdout, stderr
    start_opdgeo("track", base, run, "--follow")         one that runs: pid, poll, wait, kill, send_signal, communicate
    run_python("-c", code, …), run_python(script, …)     as `python …`
    launch("fsdp2", 2, script, …)                        two ranks, with the environment that `accelerate launch` gives them
    python program.py -c LINE …                          `python -c LINE …` by the server, for what starts Python itself: pytest-xdist
                                                         (`THROUGH_SERVER`), and `multiprocessing` in a program (`PYTHON`)

Each is a process of its own, forked from one that has the libraries loaded (`fork_server.py`), or, with `cold=True`, started anew.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

SOURCE = Path(__file__).parents[1] / "src"
ADDRESS = "OPDGEO_TEST_SERVER"
TESTS = "OPDGEO_TESTS"  # what pytest was asked to run
TIMEOUT = 1500.0  # seconds: a hung program, not a slow machine
THROUGH_SERVER = shlex.join([sys.executable, str(Path(__file__).resolve())])
PYTHON = "python"  # beside the server's socket: what `multiprocessing` takes for Python
spent = 0.0  # seconds of processor time of the programs that the server ran and that ended
TRAINING = {"train", "evaluate", "reproduce", "signals", "channel"}  # commands that load TRL or transformers


@contextmanager
def server() -> Iterator[None]:
    """Have a server at `ADDRESS`, for this process and those that it starts. It loads nothing before it is first asked."""
    folder = tempfile.mkdtemp(prefix="opdgeo-server-")
    write_python(Path(folder))
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py")), f"{folder}/socket"]
    running = subprocess.Popen(command, stdin=subprocess.PIPE, env=_environment({}))
    os.environ[ADDRESS] = f"{folder}/socket"
    try:
        yield
    finally:
        del os.environ[ADDRESS]
        if running.stdin:
            running.stdin.close()
        running.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def write_python(folder: Path) -> None:
    """Write `PYTHON` beside the server's socket in `folder`."""
    (folder / PYTHON).write_text(f'#!/bin/sh\nexec {THROUGH_SERVER} "$@"\n')
    (folder / PYTHON).chmod(0o755)


class Program:
    """A process of the server's, with the methods of `subprocess.Popen` that tests use. Its output goes to files."""

    def __init__(
        self, arguments: list[str], libraries: str, cwd: Path | str | None, env: Mapping[str, str], cold: bool
    ) -> None:
        self.args, self.returncode, self.stdout, self.stderr = arguments, None, _file(), _file()
        self._rest = b""
        folder = str(cwd or Path.cwd())
        if cold:
            self._process = subprocess.Popen(
                [sys.executable, *arguments], cwd=folder, env=env, stdout=self.stdout, stderr=self.stderr,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            self.pid = self._process.pid
            return
        self._process = None
        self._connection = _connected(os.environ[ADDRESS])
        request = {"arguments": arguments, "libraries": libraries, "cwd": folder, "env": dict(env)}
        with Path(os.devnull).open() as nothing:
            _send(self._connection, request, {0: nothing.fileno(), 1: self.stdout.fileno(), 2: self.stderr.fileno()})
            answer = self._answer(None)
        if answer is None or "pid" not in answer:
            raise RuntimeError(f"the fork server ended: {answer}")
        self.pid: int = answer["pid"]

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = TIMEOUT) -> int:
        if self._process is not None:
            self.returncode = self._process.wait(timeout)
        elif self.returncode is None:
            ended = self._answer(timeout)
            if ended is None:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            global spent
            self._connection.close()
            self.returncode = ended["status"]
            spent += ended["seconds"]
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
        """Wait, and return all that it wrote.

        Raises:
            subprocess.TimeoutExpired: it was still running, and was killed.
        """
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired as late:
            self.kill()
            self.wait()
            late.stdout, late.stderr = self.output()
            raise
        return self.output()

    def output(self) -> tuple[str, str]:
        """What it wrote so far."""
        files = [file.fileno() for file in (self.stdout, self.stderr)]
        out, err = (os.pread(file, os.fstat(file).st_size, 0).decode() for file in files)
        return out, err

    def _answer(self, timeout: float | None) -> dict[str, Any] | None:
        """The server's next line; None if none came in time."""
        until = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._rest:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._connection], [], [], left)[0]:
                return None
            got = self._connection.recv(65536)
            if not got:
                raise RuntimeError("the fork server ended; its own output says why")
            self._rest += got
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)


def start_python(
    *arguments: object, libraries: str = "survey", cwd: Path | str | None = None, env: Mapping[str, str] | None = None,
    cold: bool = False,
) -> Program:  # fmt: skip
    """Start `python ARGUMENTS` ("-m", "-c" or a script first) with `env` added to the environment and this checkout's sources."""
    return Program([str(a) for a in arguments], libraries, cwd, _environment(env or {}), cold)


def run_python(*arguments: object, timeout: float = TIMEOUT, **how: Any) -> subprocess.CompletedProcess[str]:
    program = start_python(*arguments, **how)
    out, err = program.communicate(timeout)
    return subprocess.CompletedProcess(program.args, program.returncode or 0, out, err)


def start_opdgeo(*arguments: object, **how: Any) -> Program:
    """Start `opdgeo ARGUMENTS`."""
    needs = "training" if arguments and arguments[0] in TRAINING else "survey"
    return start_python("-m", "opdgeo", *arguments, **{"libraries": needs, **how})


def run_opdgeo(*arguments: object, timeout: float = TIMEOUT, **how: Any) -> subprocess.CompletedProcess[str]:
    """Run `opdgeo ARGUMENTS` to its end."""
    program = start_opdgeo(*arguments, **how)
    out, err = program.communicate(timeout)
    return subprocess.CompletedProcess(program.args, program.returncode or 0, out, err)


def kept_matrices(out: Path) -> int:
    """How many finished matrices an unfinished run has in `out`."""
    lines = [line for file in (out / ".parts").glob("*.jsonl") for line in file.read_text().splitlines()]
    return sum(line.startswith('{"matrix":') and line.endswith("}}") for line in lines)


def launch(engine: str, processes: int, script: Path | str, *arguments: object, cold: bool = False) -> None:
    """Run a training script on several processes, as `accelerate launch --config_file ENGINE.yaml` does; all must end well.

    `cold` is that very command. Else its environment is taken from accelerate and the ranks are forked.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    from opdgeo.training.distributed import launch_file

    command = ["--config_file", str(launch_file(engine)), "--num_processes", str(processes), "--main_process_port", "0"]
    if cold:
        done = run_python("-m", "accelerate.commands.launch", *command, script, *arguments, cold=True)
        assert done.returncode == 0, done.stderr[-12000:]
        return
    asked, *_ = _validate_launch_command(launch_command_parser().parse_args([*command, str(script)]))
    shared = prepare_multi_gpu_env(asked) | {
        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(asked.main_process_port),
    }  # fmt: skip
    ranks = [
        start_python(script, *arguments, libraries="training", env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(processes)
    ]
    until = time.monotonic() + TIMEOUT
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            assert time.monotonic() < until, ranks[0].output()[1][-4000:]
            time.sleep(0.05)
        assert [rank.poll() for rank in ranks] == [0] * processes, "\n".join(r.output()[1][-4000:] for r in ranks)
    finally:
        for rank in ranks:
            rank.kill()


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(SOURCE), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, **changes}


def _connected(path: str) -> socket.socket:
    for _ in range(600):  # the server has just been started
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            time.sleep(0.05)
        else:
            return connection
    raise RuntimeError(f"no fork server answers at {path}")


def _file() -> IO[bytes]:
    return tempfile.TemporaryFile()


def _send(connection: socket.socket, request: dict[str, Any], files: dict[int, int]) -> None:
    """Length and JSON, with the program's open files (its number: ours) beside the first byte."""
    more = {"files": list(files), "python": str(Path(os.environ[ADDRESS]).with_name(PYTHON))}
    text = json.dumps(request | more).encode()
    socket.send_fds(connection, [struct.pack("!I", len(text))], list(files.values()))
    connection.sendall(text)


def _through_server(arguments: list[str]) -> int:
    """Have the server run `python ARGUMENTS` with this process's own files; its exit status."""
    files = {number: number for number in range(3, 256) if _is_open(number)}  # multiprocessing's pipes
    arguments = arguments[arguments.index("-c") :]  # after options of the interpreter
    tests = json.loads(os.environ.pop(TESTS, "[]"))
    libraries = "training" if "multiprocessing" in arguments[1] else "tests"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the process itself
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # until it can be passed on
    with _connected(os.environ[ADDRESS]) as connection:
        request = {
            "arguments": arguments, "libraries": libraries, "cwd": str(Path.cwd()), "env": dict(os.environ), "tests": tests,
        }  # fmt: skip
        _send(connection, request, {0: 0, 1: 1, 2: 2} | files)
        for number in files:
            os.close(number)
        answers = connection.makefile()
        started = json.loads(answers.readline() or "{}")
        if "pid" in started:
            signal.signal(signal.SIGTERM, lambda *_: os.kill(started["pid"], signal.SIGTERM))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        ended = answers.readline()
    status = json.loads(ended)["status"] if ended else 1
    if status < 0:  # as it ended, so does this one
        with suppress(OSError):  # SIGKILL has no handler
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(_through_server(sys.argv[1:]))

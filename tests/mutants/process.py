"""Children of a process that has the libraries loaded and this package not: the tests run there, on the sources as they are or on changed ones.

A change is compiled in place of its file's source, so every `from … import` sees it, and so do the programs that a test starts: they are
forked from a server that is forked from that child (`fork_server.py`). A `cold` program alone sees the file on the disk.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import traceback
import uuid
from collections.abc import Callable, Iterable, Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

import coverage
import hypothesis
import pytest

import fork_server
import processor_time
import program

ROOT = Path(__file__).parents[2]
FOLDERS = ["src/opdgeo/numerics", "src/opdgeo/diagnostics", "src/opdgeo/checkpoints"]  # what is changed
CONTEXT = "OPDGEO_MUTANTS_CONTEXT"
MEMORY = 4 << 30  # bytes of addresses beyond what a child starts with


def load() -> None:
    """Load what tests and programs import, but nothing of the package."""
    for name in (n for libraries in fork_server.LIBRARIES.values() for n in libraries):
        if not name.startswith("opdgeo"):
            importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    assert not any(name.partition(".")[0] == "opdgeo" for name in sys.modules)
    phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("mutants", derandomize=True, database=None, phases=phases)
    hypothesis.settings.load_profile("mutants")


def forked(work: Callable[[Path], int], place: Path, seconds: float, wait: float) -> tuple[int | None, float]:
    """Run `work(place)` in a child with `seconds` of a core; its exit status, None if a limit ended it, and its processor time."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _limits(seconds)
        os.environ["TMPDIR"] = str(place)
        tempfile.tempdir = None
        os.chdir(ROOT)
        with (place / "output").open("wb") as output:
            for stream in (1, 2):
                os.dup2(output.fileno(), stream)
        status = 3
        try:
            with _server(place):
                status = work(place)
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    late = False

    def end(*_: Any) -> None:
        nonlocal late
        late = True
        os.killpg(pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, wait)
    _, status, usage = os.wait4(pid, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)  # programs that a failed test left
    ended = os.waitstatus_to_exitcode(status)
    return None if late or ended == -signal.SIGXCPU else ended, usage.ru_utime + usage.ru_stime


def _limits(seconds: float) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    addresses = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (addresses, addresses))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    now = sum(os.times()[:2])
    resource.setrlimit(resource.RLIMIT_CPU, (int(now + seconds) + 1, resource.RLIM_INFINITY))


@contextlib.contextmanager
def _server(place: Path) -> Iterator[None]:
    """The fork server of this child's tests, forked from it."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.close(write)
        os.dup2(read, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        request = fork_server.serve(f"{place}/socket")
        if request is None:
            os._exit(0)
        if context := request["env"].get(CONTEXT):
            _measure(context, place)
        fork_server.end(request)
    program.write_python(place)
    os.environ[program.ADDRESS] = f"{place}/socket"
    try:
        yield
    finally:
        os.close(write)


def put(path: Path, code: CodeType) -> None:
    """Have `code` be what a source file compiles to, from its next import on."""
    usual = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, name: str) -> CodeType | None:
        return code if Path(self.path) == path else usual(self, name)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def run(files: list[str], plugin: object, *options: str) -> int:
    """pytest on files of tests; its exit status."""
    usual = ("--tb=no", "--assert=plain", "-p", "no:cacheprovider", "--rootdir", str(ROOT))
    return int(pytest.main([*usual, *options, *files], plugins=[plugin]))


class Chosen:
    """Runs some tests in an order of their own, and keeps the name of the first that fails."""

    def __init__(self, tests: Iterable[str], place: Path):
        self.order, self.place = {test: i for i, test in enumerate(tests)}, place

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda item: self.order[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            (self.place / "failed").write_text(report.nodeid)


class Lines:
    """Which lines of `FOLDERS` a test runs: itself, in its wider fixtures, in the children that it forks and the programs that it starts."""

    def __init__(self, place: Path):
        self.place, self.fixtures, self.seconds, self.failed = place, {}, {}, set()
        self.measure = _measured()
        self.measure.start()
        self._in("")
        own, leave = os.getpid(), os._exit

        def leaving(status: int) -> NoReturn:  # a child that a test forked
            if os.getpid() != own:
                self._keep()
            leave(status)

        os._exit = leaving

    def _in(self, context: str) -> None:
        self.context = os.environ[CONTEXT] = context
        self.measure.switch_context(context)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        before = processor_time.spent()
        known = item._fixtureinfo.name2fixturedefs.values()
        self.fixtures[item.nodeid] = {_name(f) for several in known for f in several if f.scope != "function"}
        self._in(item.nodeid)
        result = yield
        self._in("")
        self.seconds[item.nodeid] = processor_time.spent() - before
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Any:
        outer = self.context
        if fixturedef.scope != "function":
            self._in(_name(fixturedef))
        try:
            return (yield)
        finally:
            self._in(outer)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed:
            self.failed.add(report.nodeid)

    def _keep(self) -> None:
        """Write the lines so far, for `found`."""
        self.measure.stop()
        _write(self.measure.get_data(), self.place)

    def found(self) -> dict[str, Any]:
        """`tests`: of each that passed, its processor time and its lines by file; `failed`: the others."""
        self._keep()
        lines: dict[str, dict[str, set[int]]] = {}
        for path in self.place.glob("*.lines"):
            for file, line, contexts in json.loads(path.read_text()):
                for context in contexts:
                    lines.setdefault(context, {}).setdefault(file, set()).add(line)
        tests = {}
        for test in self.seconds.keys() - self.failed:
            of: dict[str, set[int]] = {}
            for context in (test, *self.fixtures[test]):
                for file, some in lines.get(context, {}).items():
                    of.setdefault(str(Path(file).relative_to(ROOT)), set()).update(some)
            tests[test] = [round(self.seconds[test], 3), {file: sorted(some) for file, some in of.items()}]
        return {"tests": tests, "failed": sorted(self.failed & self.seconds.keys())}


def _name(fixture: Any) -> str:
    return f"fixture {fixture.baseid} {fixture.argname}"


def _measured() -> coverage.Coverage:
    include = [f"{ROOT / folder}/*" for folder in FOLDERS]
    return coverage.Coverage(data_file=None, config_file=False, include=include)


def _write(data: coverage.CoverageData, place: Path) -> None:
    found = [(f, n, of) for f in data.measured_files() for n, of in data.contexts_by_lineno(f).items()]
    (place / f"{uuid.uuid4()}.lines").write_text(json.dumps(found))


def _measure(context: str, place: Path) -> None:
    """In a program: keep its lines when it ends."""
    measure = _measured()
    measure.start()
    measure.switch_context(context)

    def keep() -> None:
        measure.stop()
        _write(measure.get_data(), place)

    atexit.register(keep)

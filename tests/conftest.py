"""Fixtures of all tests, and the run as a whole: one thread a process, no cache shared, the fork server, what a machine lacks."""

from __future__ import annotations

import atexit
import gc
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import one_thread  # noqa: F401 (before what it holds)
import program
from needs import missing
from processor_time import ProcessorTime

if TYPE_CHECKING:
    from opdgeo.training.config import TrainConfig

# Nothing that a test computes is kept in the user's cache, and every test process has one of its own.
os.environ["OPDGEO_CACHE"] = f"{tempfile.gettempdir()}/opdgeo-test-cache-{os.getpid()}"
atexit.register(shutil.rmtree, os.environ["OPDGEO_CACHE"], ignore_errors=True)

# The files that take longest start first, so that no core waits for one of them at the end.
LONG = (
    "reproduce",
    "ray",
    "report",
    "confirmatory",
    "processes",
    "constrain",
    "plan",
    "resume",
    "training_runs",
    "train_plan",
    "tasks",
    "torture",
    "monitor",
    "compare",
    "answers",
    "noise",
    "formats",
    "pair_nulls",
    "outcomes",
    "first_minutes",
    "streams",
    "untrusted_models",
    "examples",
    "commands",
    "served",
    "in_chromium",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--processor-time", type=int, default=0, metavar="N", help="show the N tests that take most of it")


def pytest_configure(config: pytest.Config) -> None:
    if shown := config.getoption("--processor-time"):
        config.pluginmanager.register(ProcessorTime(shown))


@pytest.hookimpl(wrapper=True)
def pytest_sessionstart(session: pytest.Session) -> Iterator[None]:
    """One fork server for all test processes: it belongs to the one that starts the others."""
    if program.ADDRESS not in os.environ:
        server = program.server()
        server.__enter__()
        session.config.add_cleanup(lambda: server.__exit__(None, None, None))
    return (yield)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    """Test processes are forked from the server as well: each would import everything anew, fifteen seconds of processor time."""
    os.environ[program.TESTS] = json.dumps([str(config.invocation_params.dir / test) for test in config.args])
    for spec in specs:
        spec.python = program.THROUGH_SERVER


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}.py": place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONG)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    # Every training collects garbage: 0.4 s over all objects of the libraries, nothing over those of one test.
    gc.collect()
    gc.freeze()
    for mark in item.iter_markers("needs"):
        if why := missing(*mark.args):
            pytest.skip(why)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say once what was not tested here, and why."""
    why = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ()))
    if why:
        terminalreporter.section("not tested on this machine")
        for reason, count in sorted(why.items()):
            terminalreporter.line(f"{count:4} {reason}")


@pytest.fixture(scope="session")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers."""
    from tiny_models import random_model

    return random_model(tmp_path_factory.mktemp("models") / "origin", 0)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another one."""
    from tiny_models import random_model

    return random_model(tmp_path_factory.mktemp("models") / "teacher", 1)


@pytest.fixture(scope="session")
def config(origin: Path, teacher: Path) -> Callable[..., TrainConfig]:
    """`config(kind, **changes)`: a run of a few steps from `origin`."""
    from tiny_models import run_config

    return lambda kind, **changes: run_config(kind, origin, teacher, **changes)

"""Which tests take the processor's time: `pytest --processor-time 30`. On a busy machine it is the time to trust.

Counted are the test process, its children, and the programs that the fork server runs for it, user and system together. Not
counted is what nobody waits for: the workers of a rehearsed study, of Ray, and the processes of Chromium.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import program

KEY = "processor seconds"


def spent() -> float:
    """Of this process, of the children that it waited for, and of the programs that ended, in seconds."""
    return sum(os.times()[:4]) + program.spent


class ProcessorTime:
    def __init__(self, shown: int):
        self.shown, self.before, self.processes = shown, 0.0, 0.0

    def pytest_runtest_logstart(self) -> None:
        self.before = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report = yield
        now = spent()
        report.user_properties.append((KEY, now - self.before))
        self.before = now
        return report

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput[KEY] = spent()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.processes += getattr(node, "workeroutput", {}).get(KEY, 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        took = [
            (seconds, report.when, report.nodeid)
            for reports in terminalreporter.stats.values()
            for report in reports
            for key, seconds in getattr(report, "user_properties", ())
            if key == KEY
        ]
        terminalreporter.section("processor time")
        for seconds, when, name in sorted(took, reverse=True)[: self.shown]:
            terminalreporter.line(f"{seconds:7.2f} s {when:8} {name}")
        tests = sum(seconds for seconds, _, _ in took)
        others = (self.processes or spent()) - tests
        terminalreporter.line(
            f"{tests:7.0f} s in tests, {others:.0f} s to start and collect; the fork server's own is not counted"
        )

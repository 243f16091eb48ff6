"""One Chromium for the tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from browser import Browser


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """For tests that are marked `needs("chromium")`."""
    with Browser(tmp_path_factory.mktemp("browser")) as running:
        yield running

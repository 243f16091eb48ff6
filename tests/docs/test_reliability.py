"""docs/reliability.md names tests: each of them exists."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
PAGE = TESTS.parent / "docs" / "reliability.md"


def test_every_test_that_the_page_names_is_there() -> None:
    named = 0
    for line in (line for line in PAGE.read_text().splitlines() if line.startswith("|")):
        file = ""
        for place, test in re.findall(r"`([\w/]+\.py)?(?:::(\w+))?`", line):
            file = place or file
            if not file:
                continue
            source = (TESTS / file).read_text()
            named += 1
            assert not test or f"def {test}(" in source, f"{file} has no {test}"
    assert named > 30

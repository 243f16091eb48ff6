"""`make mutants` changes what a result depends on and nothing else, and each change is the one that it names."""

from __future__ import annotations

import ast
from collections import Counter
from types import CodeType
from typing import Any

from mutants.__main__ import wilson
from mutants.changes import changes

SOURCE = '''
"""A module's text."""
from typing import TYPE_CHECKING, cast
if TYPE_CHECKING:
    import numpy
__all__ = ["area"]
BLOCK = 1 << 18  # a size that changes how long it takes
LIMIT = 100

def area(width: int, height: int = 1, *, unit: str = "m") -> int:
    """What it is."""
    assert width != 7, "a text"
    if width < 0 or height < 0:
        raise ValueError(f"{width} + 1 is below 0")
    print("a line of a log")
    kept = sorted((w for w in [width] if w), reverse=True)
    return cast("list[int]", kept)[0] * height if not LIMIT < width else LIMIT

DIAGNOSTIC = dict(title="Area", unit="m", said="two words")
'''

EXPECTED = {
    8: {"100 → 101", "100 → 99"},
    10: {"1 → 2", "1 → 0", "'m' → 'XXm'"},
    13: {
        "width < 0 or height < 0 → not (width < 0 or height < 0)",
        "width < 0 or height < 0 → width < 0 and height < 0",
        "width < 0 or height < 0 → width <= 0 or height < 0",
        "width < 0 or height < 0 → width < 0 or height <= 0",
        "width < 0 → width < 1",
        "width < 0 → width < -1",
        "height < 0 → height < 1",
        "height < 0 → height < -1",
    },
    14: {"raise ValueError(f'{width} + 1 is below 0') → pass"},
    16: {
        "sorted((w for w in [width] if w), reverse=True) → sorted((w for w in [width] if w))",
        "reverse=True → reverse=False",
        "(w for w in [width] if w) → (w for w in [width] if not w)",
    },
    17: {
        "return cast('list[int]', kept)[0] * height if not LIMIT < width else LIMIT → return None",
        "cast('list[int]', kept)[0] * height if not LIMIT < width else LIMIT → "
        "cast('list[int]', kept)[0] * height if LIMIT < width else LIMIT",
        "cast('list[int]', kept)[0] * height if not LIMIT… → cast('list[int]', kept)[0] / height if not LIMIT…",
        "not LIMIT < width → not LIMIT <= width",
        "cast('list[int]', kept)[0] → cast('list[int]', kept)[1]",
        "cast('list[int]', kept)[0] → cast('list[int]', kept)[-1]",
    },
    19: {
        "dict(title='Area', unit='m', said='two words') → dict(title='Area', said='two words')",
        "unit='m' → unit='XXm'",
    },
}


def variants() -> list[tuple[int, str, str, CodeType]]:
    """Line and name of every change, with the whole source after it."""
    found = []
    for index in range(sum(1 for _ in changes(ast.parse(SOURCE)))):
        tree = ast.parse(SOURCE)
        change = next(c for i, c in enumerate(changes(tree)) if i == index)
        change.make()
        found.append((change.line, change.what, ast.unparse(tree), compile(tree, "area.py", "exec")))
    return found


def test_what_a_result_depends_on_is_changed_and_nothing_else() -> None:
    found = variants()
    assert {line for line, *_ in found} == EXPECTED.keys()
    for line, expected in EXPECTED.items():
        assert {what for at, what, *_ in found if at == line} == expected


def test_each_change_is_the_one_that_it_names_and_no_two_are_alike() -> None:
    original = ast.unparse(ast.parse(SOURCE)).splitlines()
    texts = [text for *_, text, _ in variants()]
    assert len(set(texts)) == len(texts)
    for text in texts:
        lines = text.splitlines()
        assert len(lines) == len(original) and sum(a != b for a, b in zip(lines, original, strict=True)) == 1


def test_a_changed_source_does_what_it_says() -> None:
    results: Counter[object] = Counter()
    for *_, code in variants():
        names: dict[str, Any] = {}
        exec(code, names)
        try:
            results[names["area"](3, 4)] += 1
        except (ValueError, IndexError) as error:
            results[type(error)] += 1
    # 3 × 4 where nothing that this call meets was changed; 3 / 4; LIMIT; `return None`; the guard negated; the end of a list, twice.
    assert results == {12: 19, 0.75: 1, 100: 1, None: 1, ValueError: 1, IndexError: 2}


def test_the_interval_of_a_share() -> None:
    low, high = wilson(81, 263)  # Newcombe, Statistics in Medicine 17 (1998), table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    assert wilson(10, 10)[1] == 1.0

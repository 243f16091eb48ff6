"""PEFT's patterns of module names, matched in bounded time.

peft takes a pattern's value for a module where ``re.match(rf"(.*\\.)?({pattern})$", name)`` finds one. Python's matcher goes back and
forth, and a pattern of thirty characters can keep it busy for years. Here the same regular expression, parsed by Python, is
followed for all places at once: the set of places in the name that each part can end at. What needs more than that (references,
looking around) is refused, and so is what takes too many steps.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from re import _parser  # type: ignore[attr-defined]
from typing import Any

_STEPS = 5_000_000  # places looked at for all modules of an adapter
_AT_ONCE = 2500  # characters that Python's matcher compares while a place is looked at here
_LENGTH = 1_000_000  # characters of all patterns together
_PLAIN = re.compile(r"(?:[\w.-]|\\\.)*")  # nothing that repeats or branches: Python's matcher cannot go astray


class Patterns:
    """A mapping of patterns to values.

    Raises:
        ValueError: a pattern that is none, uses what is not followed here, or takes too long.
    """

    def __init__(self, values: Mapping[str, Any]):
        if sum(map(len, values)) > _LENGTH:
            raise ValueError(f"patterns of more than {_LENGTH} characters")
        self.left = _STEPS
        self.values = [(self._compiled(pattern), value) for pattern, value in values.items()]

    def find(self, name: str) -> Any:
        """The value of the first pattern that matches a module's name; None where none does."""
        for pattern, value in self.values:
            self._spend(1)
            if isinstance(pattern, re.Pattern):  # it is compared with the name's end, from each of its dots on
                self._spend(len(name) * min(len(name), len(pattern.pattern)) // _AT_ONCE)
            if pattern.match(name) if isinstance(pattern, re.Pattern) else self._ends(pattern, name, {0}):
                return value
        return None

    def _compiled(self, pattern: str) -> Any:
        whole = rf"(.*\.)?({pattern})$"
        if _PLAIN.fullmatch(pattern):
            return re.compile(whole)
        try:
            parsed = _parser.parse(whole)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{pattern[:80]!r} is no regular expression: {error}") from error
        if parsed.state.flags & ~int(re.UNICODE):
            raise ValueError(f"{pattern[:80]!r} sets flags")
        return list(parsed)

    def _spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ValueError("its patterns take too long to match")

    def _ends(self, parts: Any, text: str, starts: set[int]) -> set[int]:
        """Where in `text` a sequence of parts can end that begins at one of `starts`."""
        self._spend(len(starts) + 1)
        for operation, argument in parts:
            if not starts:
                break
            self._spend(len(starts) + 1)
            starts = self._step(str(operation), argument, text, starts)
        return starts

    def _step(self, operation: str, argument: Any, text: str, starts: set[int]) -> set[int]:
        if operation in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return {i + 1 for i in starts if i < len(text) and self._fits(operation, argument, text[i])}
        if operation == "BRANCH":
            return set().union(*(self._ends(parts, text, starts) for parts in argument[1]))
        if operation == "SUBPATTERN" and not argument[1] and not argument[2]:
            return self._ends(argument[3], text, starts)
        if operation in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, parts = argument
            return self._repeat(least, most, parts, text, starts)
        if operation == "AT":
            end = len(text)
            places = {
                "AT_BEGINNING": {0}, "AT_BEGINNING_STRING": {0}, "AT_END_STRING": {end},
                "AT_END": {end, end - 1} if text.endswith("\n") else {end},
            }  # fmt: skip
            if str(argument) in places:
                return starts & places[str(argument)]
        raise ValueError(f"a pattern with {operation.lower()}, which opdgeo does not follow")

    def _repeat(self, least: int, most: Any, parts: Any, text: str, starts: set[int]) -> set[int]:
        # After len(text) + 1 rounds more of them lead nowhere new: one of them must have been empty.
        bound = len(text) + 2
        for _ in range(min(int(least), bound)):
            starts = self._ends(parts, text, starts)
        reached = set(starts)
        for _ in range(min(int(most) - int(least), bound)):
            starts = self._ends(parts, text, starts) - reached
            if not starts:
                break
            reached |= starts
        return reached

    def _fits(self, operation: str, argument: Any, character: str) -> bool:
        if operation == "ANY":
            return character != "\n"
        if operation == "LITERAL":
            return ord(character) == int(argument)
        if operation == "NOT_LITERAL":
            return ord(character) != int(argument)
        self._spend(len(argument))
        negated = str(argument[0][0]) == "NEGATE"
        return negated != any(_inside(str(kind), value, character) for kind, value in argument[negated:])


def _inside(kind: str, value: Any, character: str) -> bool:
    """Whether one item of a set of characters holds a character."""
    if kind == "LITERAL":
        return ord(character) == int(value)
    if kind == "RANGE":
        return int(value[0]) <= ord(character) <= int(value[1])
    found = {
        "DIGIT": character.isdecimal(),
        "SPACE": character.isspace(),
        "WORD": character.isalnum() or character == "_",
    }
    name = str(value).removeprefix("CATEGORY_")
    return found[name.removeprefix("NOT_")] != name.startswith("NOT_")

"""Tasks: prompts, demonstrations and verifiers. A name maps lazily to its module, so listing tasks loads none of them."""

from __future__ import annotations

import difflib
import importlib
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from opdgeo.errors import ConfigError

NAMES = {
    "arithmetic": "opdgeo.tasks.arithmetic:Arithmetic",
    "digits": "opdgeo.tasks.digits:Digits",
    "docstrings": "opdgeo.tasks.docstrings:Docstrings",
    "problems": "opdgeo.tasks.problems:Problems",
    "reasoning_gym": "opdgeo.tasks.gym:ReasoningGym",
}


@dataclass(frozen=True)
class Example:
    """`prompt` is given, `completion` demonstrates, `answer` is what the verifier compares with ("" without one)."""

    prompt: str
    completion: str
    answer: str


class Task(Protocol):
    """Examples of two disjoint splits and, where answers can be checked, a verifier."""

    @property
    def verifiable(self) -> bool:
        """True where answers can be checked, as RLVR needs."""

    @property
    def prompted(self) -> bool:
        """False for plain text: there are no prompts to answer, so only SFT can use the task."""

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        """At most `count` distinct examples of one split, the same ones in the same order for the same seed."""

    def verify(self, completion: str, answer: str) -> float:
        """Reward of a decoded completion: 1.0 right, 0.0 wrong."""


HELD_OUT_ONE_IN = 8
PATIENCE = 2000  # draws without a new example before a task counts as exhausted


def in_held_out(key: str, one_in: int = HELD_OUT_ONE_IN) -> bool:
    """True for the one key in `one_in`, by a checksum, that is kept for evaluation: no seed can bring it before a trainer."""
    return zlib.crc32(key.encode()) % one_in == 0


def distinct(drawn: Iterable[Example], count: int) -> list[Example]:
    """The first `count` examples with different prompts; fewer where so many draws bring nothing new that there are no more.

    >>> [e.prompt for e in distinct(iter([Example("a", "", ""), Example("a", "", ""), Example("b", "", "")]), 2)]
    ['a', 'b']
    """
    found: dict[str, Example] = {}
    fruitless = 0
    for example in drawn if count > 0 else ():
        fruitless = fruitless + 1 if example.prompt in found else 0
        found.setdefault(example.prompt, example)
        if len(found) == count or fruitless == PATIENCE:
            break
    return list(found.values())


def load(name: str, options: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`, with its own options (`arithmetic`: operands).

    Raises:
        ConfigError: there is no such task, or it has no such option.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these."
        raise ConfigError(f"there is no task {name!r}; expected one of {', '.join(NAMES)}: {hint}")
    module, _, attribute = NAMES[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    try:
        task: Task = kind(**(options or {}))
    except TypeError as error:
        raise ConfigError(
            f"the task {name!r} does not take the options {dict(options or {})}; expected {_options(kind)}. ({error})"
        ) from None
    return task


def _options(kind: type) -> str:
    fields = getattr(kind, "__dataclass_fields__", {})
    return ", ".join(f"{field.name}={field.default}" for field in fields.values()) or "none"

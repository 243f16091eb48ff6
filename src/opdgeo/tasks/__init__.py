"""Tasks: prompts, demonstrations and verifiers. A name maps lazily to its module, so listing tasks loads none of them."""

from __future__ import annotations

import difflib
import importlib
import json
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


def harmless(name: str, options: Mapping[str, Any]) -> bool:
    """Whether a task may be made because a file says so that came with a checkpoint, without asking.

    Such a task reads no file, fetches nothing, and its options cannot ask for much work: the packaged tasks, which bound
    their own options, and the families of reasoning-gym that are scored safely, as they are or, where the size of a problem
    is plain, with small numbers.
    """
    if name in ("arithmetic", "digits", "docstrings"):
        return True
    if name != "reasoning_gym":
        return False
    gym = importlib.import_module("opdgeo.tasks.gym")

    family, *others = options.get("family", "chain_sum"), *(v for n, v in options.items() if n != "family")
    if not isinstance(family, str) or not (family in gym.FAMILIES or family in gym.VERIFIERS):
        return False
    small = all(isinstance(v, bool) or (type(v) is int and 0 <= v <= 100) for v in others)
    return not others or (family in ("chain_sum", "products") and small)


def require_harmless(name: str, options: Mapping[str, Any], source: object, advice: str) -> None:
    """Refuse a task that the file `source` beside a checkpoint names, unless it is known to be harmless.

    Raises:
        ConfigError: it is not; `advice` says what to pass where the file is trusted.
    """
    if not harmless(name, options):
        said = json.dumps(dict(options))
        raise ConfigError(
            f"{source} names the task {name!r} with the options {said[:200]}; expected one that is known to be harmless, because the "
            f"file came with the checkpoint and such a task reads files, fetches data or takes long. {advice}"
        )


def _options(kind: type) -> str:
    fields = getattr(kind, "__dataclass_fields__", {})
    return ", ".join(f"{field.name}={field.default}" for field in fields.values()) or "none"

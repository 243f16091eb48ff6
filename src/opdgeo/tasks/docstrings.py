"""Real English text that needs no download: the prose of the standard library's docstrings.

Sources are parsed, never imported, so reading them has no side effects. A paragraph counts as prose when it reads like
sentences (no doctests, tables or signatures). Whole modules belong to one split, by a checksum of the top-level
module's name, because docstrings inside a module repeat each other. The text is that of the running Python, so
another minor version gives a slightly different corpus.
"""

from __future__ import annotations

import ast
import os
import random
import sys
import sysconfig
import textwrap
import warnings
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, in_held_out

SHORTEST = 160
Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "site-packages", "__pycache__", "ensurepip"}


@dataclass(frozen=True)
class Docstrings:
    """Plain text (`opdgeo.tasks.Task` without a verifier): every example has an empty prompt and answer."""

    @property
    def verifiable(self) -> bool:
        return False

    @property
    def prompted(self) -> bool:
        return False

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        texts = [text for module, text in corpus() if in_held_out(module) == held_out]
        random.Random(f"{seed}-{held_out}").shuffle(texts)
        return [Example("", text, "") for text in texts[:count]]

    def verify(self, completion: str, answer: str) -> float:
        raise ConfigError(
            "docstrings are plain text without answers; expected a task with a verifier, try `arithmetic`."
        )


@cache
def corpus() -> tuple[tuple[str, str], ...]:
    """(top-level module, prose) of every docstring long enough, in the order of the files' names; no text twice.

    Raises:
        ConfigError: the interpreter has no library sources (some embedded builds ship bytecode only).
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for path in sorted(_sources(root)):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in sys.stdlib_module_names:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in library sources
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for node in _documented(tree):
            text = prose(ast.get_docstring(node) or "")
            if len(text) >= SHORTEST:
                found.setdefault(text, parts[0])
    if not found:
        raise ConfigError(
            f"found no docstrings under {root}; expected the standard library's sources. "
            "Use a Python that ships them (python.org, a distribution's package, conda or uv)."
        )
    return tuple((module, text) for text, module in found.items())


def _sources(root: Path) -> Iterator[Path]:
    """The Python files below a folder, without those of the folders that are `SKIPPED`."""
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED]
        yield from (Path(folder, name) for name in files if name.endswith(".py"))


def _documented(tree: ast.Module) -> Iterator[Documented]:
    """The module, its classes and its functions in the order of `ast.walk`, which visits every expression too."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        if isinstance(node, Documented):
            yield node
        for block in ("body", "handlers", "orelse", "finalbody", "cases"):  # the order of their fields
            waiting.extend(getattr(node, block, ()))


def prose(docstring: str) -> str:
    """The paragraphs that read like sentences, each on one line, joined by blank lines.

    >>> prose("Return the sum of two numbers, both of which must be finite.\\n\\n>>> add(1, 2)\\n3")
    'Return the sum of two numbers, both of which must be finite.'
    """
    kept = []
    for block in docstring.split("\n\n"):
        lines = textwrap.dedent(block).strip("\n").splitlines()
        if not lines or any(line.startswith((" ", "\t", ">>>", "|")) for line in lines):
            continue
        text = " ".join(" ".join(lines).split())
        if len(text) >= 40 and text[0].isupper() and text[-1] in ".!?":
            letters = sum(c.isalpha() or c == " " for c in text)
            if letters >= 0.9 * len(text):
                kept.append(text)
    return "\n\n".join(kept)

"""Rules of the code itself, read from its source: what may import what, and how many arguments a caller must count.

A rule's present breaches are listed beside it. The lists only shrink: a breach that is mended must leave its list, and a new one is
not added.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import opdgeo

PACKAGE = Path(opdgeo.__file__).parent

# What the modules of a package may import besides their own package: CONTRIBUTING.md. Modules right below `opdgeo` that are no
# command are the bottom: all may import them, and they import each other alone. `numerics` knows no file format.
LEFT_OF = {
    "checkpoints": set(),
    "numerics": set(),
    "diagnostics": {"checkpoints", "numerics"},
    "survey": {"checkpoints", "numerics", "diagnostics"},
    "report": {"checkpoints", "numerics", "diagnostics", "survey"},
    "tasks": set(),
    "training": {"tasks", "checkpoints", "numerics", "diagnostics"},
    "experiments": {"tasks", "training", "checkpoints", "numerics", "diagnostics", "survey", "report"},
}
TOP = {
    "api",
    "commands",
    "__main__",
    "",
}  # may import everything; "" is `opdgeo` itself, whose names load lazily

BACKWARD: set[tuple[str, str]] = set()
CIRCLES: set[frozenset[str]] = set()

MOST_POSITIONAL = 6
LONG_SIGNATURES: set[str] = set()


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its name below `opdgeo`; a package by its own, `opdgeo` itself by ""."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(file.read_text(), str(file))
    return found


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of the package that a module imports anywhere, inside functions and for types too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute, so that this test sees them"
            if node.module == "opdgeo" or (node.module or "").startswith("opdgeo."):
                of = (node.module or "").partition(".")[2]
                inner = {f"{of}.{alias.name}".lstrip(".") for alias in node.names} & modules().keys()
                yield from inner or {of}
        elif isinstance(node, ast.Import):
            yield from (a.name.partition(".")[2] for a in node.names if a.name.partition(".")[0] == "opdgeo")


def imports() -> dict[str, set[str]]:
    return {name: set(imported(tree)) - {name} for name, tree in modules().items()}


def package(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_its_place() -> None:
    packages = {package(name) for name in modules() if "." in name}
    assert packages <= LEFT_OF.keys() | TOP, packages - LEFT_OF.keys() - TOP


def test_a_file_imports_only_what_stands_to_its_left() -> None:
    backward = set()
    for module, others in imports().items():
        here = package(module)
        for other in others - {""} if here not in TOP else ():
            there = package(other)
            bottom = there not in LEFT_OF and there not in TOP
            if not bottom and there != here and there not in LEFT_OF.get(here, set()):
                backward.add((module, other))
    assert backward - BACKWARD == set(), "imports against the order of CONTRIBUTING.md"
    assert BACKWARD - backward == set(), "mended: take these out of BACKWARD"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = imports()

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph.get(waiting.pop(), set()) - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    beyond = {module: reached(module) for module in graph}
    circles = {frozenset(o for o in beyond[m] if m in beyond[o]) for m in graph if m in beyond[m]}
    assert circles - CIRCLES == set(), "modules that import each other, directly or through others"
    assert CIRCLES - circles == set(), "mended: take these out of CIRCLES"


def signatures(tree: ast.Module, module: str) -> Iterator[tuple[str, int]]:
    """Every function, method and nested function by its name, and how many arguments it takes by position."""

    def walk(node: ast.AST, place: str, in_class: bool) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in child.decorator_list)
                count = len(child.args.posonlyargs) + len(child.args.args) - (in_class and not static)
                yield f"{place}.{child.name}", count
                yield from walk(child, f"{place}.{child.name}", False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, f"{place}.{child.name}", True)
            else:
                yield from walk(child, place, in_class)

    return walk(tree, module, False)


def test_no_function_takes_more_than_six_arguments_by_position() -> None:
    long = {name for m, tree in modules().items() for name, count in signatures(tree, m) if count > MOST_POSITIONAL}
    assert long - LONG_SIGNATURES == set(), "pass an object that says what its parts are, or make them keyword-only"
    assert LONG_SIGNATURES - long == set(), "mended: take these out of LONG_SIGNATURES"


def test_the_numerics_ask_no_object_for_its_kind() -> None:
    asked = [
        f"{module}, line {node.lineno}"
        for module, tree in modules().items()
        if package(module) == "numerics"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "isinstance"
    ]
    assert asked == []


def test_no_two_modules_differ_by_a_letter() -> None:
    """Of `training` and `experiments` against every other; the files of `commands` are named as a user types them."""
    names = [m.rpartition(".")[2] for m in modules() if package(m) != "commands"]
    own = [m.rpartition(".")[2] for m in modules() if m.startswith(("training.", "experiments."))]
    for name in own:
        assert names.count(name) == 1, name
        assert f"{name}s" not in names and name.removesuffix("s") not in set(names) - {name}, name

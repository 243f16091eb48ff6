"""`training` imports only what stands to its left, and its modules and those of `experiments` import each other in no circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import opdgeo

ROOT = Path(opdgeo.__file__).parent
LEFT = {"errors", "machine", "checkpoints", "numerics", "diagnostics", "tasks", "training"}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, inside functions and for annotations too, as folder/module or a module."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            top, *parts = name.split(".")
            if top == "opdgeo" and parts:
                file = ROOT.joinpath(*parts[:2]).with_suffix(".py")
                found.add("/".join(parts[:2]) if file.is_file() else parts[0])
    return found


def test_training_stands_left_of_survey_and_report() -> None:
    for path in (ROOT / "training").glob("*.py"):
        beyond = {name for name in imports(path) if name.partition("/")[0] not in LEFT}
        assert not beyond, f"{path.name} imports {', '.join(sorted(beyond))}"


@pytest.mark.parametrize("folder", ["training", "experiments"])
def test_no_modules_import_each_other_in_a_circle(folder: str) -> None:
    graph = {f"{folder}/{p.stem}": imports(p) for p in (ROOT / folder).glob("*.py")}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"a circle: {' → '.join((*path[path.index(name) :], name))}"
        for other in graph[name] & graph.keys():
            visit(other, (*path, name))

    for name in graph:
        visit(name, ())


def test_no_two_modules_differ_by_a_letter() -> None:
    """Of `training` and `experiments` against every other of the package."""
    names = [p.stem for p in ROOT.rglob("*.py") if not p.stem.startswith("__")]
    own = [p.stem for folder in ("training", "experiments") for p in (ROOT / folder).glob("*.py") if p.stem[0] != "_"]
    for name in own:
        assert names.count(name) == 1, name
        assert f"{name}s" not in names and name.removesuffix("s") not in set(names) - {name}, name


@pytest.mark.parametrize("folder", ["training", "experiments"])
def test_no_function_takes_more_than_six_arguments_by_position(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
                assert len(names) <= 6, f"{path.name}: {node.name}({', '.join(names)})"

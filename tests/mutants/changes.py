"""What may be changed in a source file: one operator, constant, condition, statement or keyword at a time.

Left out is what no result can depend on, as far as the syntax tells: annotations, docstrings, texts (in f-strings, in what is raised or
logged, or with a space in them), decorators, assertions and `CHECKS`, and the sizes of `SPEED`.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

_BOTH = {
    "Lt": "LtE",
    "Gt": "GtE",
    "Eq": "NotEq",
    "Is": "IsNot",
    "In": "NotIn",
    "And": "Or",
    "Add": "Sub",
    "Mult": "Div",
}
_BOTH |= {"LShift": "RShift", "BitAnd": "BitOr"}
OPERATORS = {
    **_BOTH,
    **{b: a for a, b in _BOTH.items()},
    "FloorDiv": "Mult",
    "Mod": "Mult",
    "Pow": "Mult",
    "BitXor": "BitAnd",
}
NEGATED = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # whose change is the negation already
PROSE = {"title", "formula", "meaning", "caveat", "example", "source", "headline", "label"}  # of a `Diagnostic`
CHECKS = {"strict"}  # keywords that only make sure, as an assertion does
SPEED = {"BLOCK", "KEPT", "BINS", "CACHED", "WHOLE", "CONNECTIONS", "RUN"}  # sizes that change how long a thing takes
LOGS = {"print", "warn", "debug", "info", "warning"}


@dataclass(frozen=True)
class Place:
    """Where a node stands.

    Attributes:
        lines: the first and the last line of its statement, of its head where it has a body.
        runs: whether it runs when a function is called, not when the module is imported.
        users: what runs with its result, if it runs at import: the lines of the function or class, or names.
    """

    lines: tuple[int, int] = (1, 1)
    runs: bool = False
    users: tuple[int, int] | tuple[str, ...] = ()


@dataclass(frozen=True)
class Change:
    line: int
    what: str
    place: Place
    make: Callable[[], None]  # changes the tree


def changes(node: ast.AST, place: Place | None = None) -> Iterator[Change]:
    """Every change of a syntax tree, in the order of the source. Each is made in the tree itself, so one tree serves for one."""
    for field, value in ast.iter_fields(node):
        for i, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, ast.AST) or _left_out(node, field, child):
                continue
            here = _inside(node, field, child, place or Place())
            for new in _alternatives(child):

                def make(value: Any = value, field: str = field, i: int = i, new: ast.AST = new) -> None:
                    if isinstance(value, list):
                        value[i] = new
                    else:
                        setattr(node, field, new)
                    ast.fix_missing_locations(node)

                what = _shown(child, new)
                if isinstance(node, ast.expr | ast.keyword | ast.comprehension):  # what a constant is for
                    around = copy.copy(node)
                    setattr(around, field, [*value[:i], new, *value[i + 1 :]] if isinstance(value, list) else new)
                    what = _shown(node, around)
                yield Change(getattr(child, "lineno", here.lines[0]), what, here, make)
            if not isinstance(child, ast.Raise):
                yield from changes(child, here)


def _alternatives(node: Any) -> Iterator[ast.AST]:
    def changed(**fields: Any) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield changed(ops=[*ops[:i], _other(op), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) | ast.BoolOp(op=op) if type(op).__name__ in OPERATORS:
            yield changed(op=_other(op))
        case ast.UnaryOp(op=ast.Not() | ast.USub()):
            yield node.operand
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value)):
            yield changed(value=value + 1)
            yield changed(value=value - 1)
        case ast.Constant(value=float(value)):
            yield changed(value=value + 1)
        case ast.Constant(value=str(value)) if " " not in value:
            yield changed(value="XX" + value)
        case ast.Constant(value=bytes(value)):
            yield changed(value=b"XX" + value)
        case ast.Return(value=value) if value and not (isinstance(value, ast.Constant) and value.value is None):
            yield changed(value=ast.copy_location(ast.Constant(None), value))
        case ast.Raise() | ast.Expr(value=ast.Call()):
            yield ast.copy_location(ast.Pass(), node)
        case ast.Continue():
            yield ast.copy_location(ast.Break(), node)
        case ast.Break():
            yield ast.copy_location(ast.Continue(), node)
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test) if _worth_negating(test):
            yield changed(test=_not(test))
        case ast.comprehension(ifs=ifs):
            for i, test in enumerate(ifs):
                if _worth_negating(test):
                    yield changed(ifs=[*ifs[:i], _not(test), *ifs[i + 1 :]])
        case ast.Call(keywords=keywords):
            for i, keyword in enumerate(keywords):
                if keyword.arg and keyword.arg not in PROSE | CHECKS and not _text(keyword.value):
                    yield changed(keywords=[*keywords[:i], *keywords[i + 1 :]])


def _other(operator: ast.AST) -> ast.AST:
    return getattr(ast, OPERATORS[type(operator).__name__])()


def _worth_negating(test: ast.expr) -> bool:
    simple = isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATED)
    return not (
        simple or isinstance(test, ast.Constant) or (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not))
    )


def _not(test: ast.expr) -> ast.expr:
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)


def _text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    )


def _left_out(parent: ast.AST, field: str, node: Any) -> bool:
    if field in ("annotation", "returns", "decorator_list"):
        return True
    if isinstance(parent, ast.Call) and _named(parent) == "cast" and node is parent.args[0]:
        return True
    match node:
        case ast.JoinedStr() | ast.Assert() | ast.Expr(value=ast.Constant()):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")):
            return True
        case ast.keyword(arg=str(name)):
            return name in PROSE | CHECKS
        case ast.Expr(value=ast.Call() as call):
            return _named(call) in LOGS
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name in SPEED | {"__all__"} or _named(node.value) == "TypeVar"
    return False


def _named(node: ast.AST) -> str:
    """What a call calls, without what stands before the last dot."""
    function = getattr(node, "func", None)
    return getattr(function, "id", getattr(function, "attr", ""))


def _inside(parent: ast.AST, field: str, node: Any, place: Place) -> Place:
    if isinstance(parent, ast.FunctionDef | ast.Lambda):
        whole = (node.lineno if hasattr(node, "lineno") else parent.lineno, parent.end_lineno or parent.lineno)
        place = replace(place, runs=True) if field == "body" else replace(place, users=place.users or whole)
    if not isinstance(node, ast.stmt):
        return place
    body = getattr(node, "body", None) or getattr(node, "cases", None)
    last = getattr(body[0], "lineno", node.lineno + 1) - 1 if body else node.end_lineno or node.lineno
    place = replace(place, lines=(node.lineno, max(node.lineno, last)))
    if place.runs:
        return place
    if isinstance(node, ast.ClassDef):
        return replace(place, users=(node.lineno, node.end_lineno or node.lineno))
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    names = tuple(t.id for t in targets if isinstance(t, ast.Name) and t.id != "DIAGNOSTIC")
    return replace(place, users=place.users or names)


def _shown(before: ast.AST, after: ast.AST) -> str:
    """Both as they read on a line, of a statement with a body the condition; of long ones, what differs and a little around it."""
    texts = [" ".join(ast.unparse(n.test if isinstance(n, ast.If | ast.While) else n).split()) for n in (before, after)]
    start = _alike(*texts)
    end = _alike(*(t[start:][::-1] for t in texts))
    if start > 40:
        texts = ["…" + t[start - 30 :] for t in texts]
    if end > 30:
        texts = [t[: 20 - end] + "…" for t in texts]
    return " → ".join(texts)


def _alike(first: str, second: str) -> int:
    """How many letters two texts share at their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))

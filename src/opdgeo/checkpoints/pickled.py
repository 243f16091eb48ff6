"""Pickles read as data: a machine of stacks that knows containers, numbers and text, and calls nothing.

A class or function that a pickle names must be in the list that the reader gives; it becomes a `Named`, what is built by it
a `Record`, and no code of it is looked up. The machine walks the opcodes one by one without recursion and keeps what they
say by reference, so that its time and memory are bounded by the length of the pickle, whatever that says: dictionary keys
are plain numbers and text (a tuple's hash would walk all that it holds), the memo is a dictionary (an index allocates nothing),
and nothing is copied. What is said once and meant many times, by reference, is counted as often as a reader would meet it. Source of the opcodes: the standard library's `pickletools`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Mapping
from typing import Any

from opdgeo.checkpoints.stored import LONGEST_NAME
from opdgeo.errors import CheckpointError

MOST = 1_000_000  # opcodes of any pickle; a larger checkpoint may have more, one for every `EACH` of its bytes
EACH = 256
_DIGITS = 64  # bytes of an integer


class Named:
    """The name of a class or function that a pickle may mention."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name


class Record:
    """What an object was pickled as: the full name of its class, the arguments and the state; none of its code.

    Attributes and `get` look into the state, as the object's own attributes would.
    """

    __slots__ = ("arguments", "kind", "state")

    def __init__(self, kind: str, arguments: tuple[Any, ...]):
        self.kind, self.arguments, self.state = kind, arguments, None

    @property
    def name(self) -> str:
        """The last part of the class's name."""
        return self.kind.rpartition(".")[2]

    def get(self, attribute: str, default: Any = None) -> Any:
        for part in self.state[:2] if isinstance(self.state, tuple) else (self.state,):
            if isinstance(part, dict) and attribute in part:
                return part[attribute]
        return default

    def __getattr__(self, attribute: str) -> Any:
        found = self.get(attribute, self)
        if found is self:
            raise AttributeError(f"a {self.name} without {attribute}")
        return found


Build = Callable[..., Any]
_MARK = object()


def load(
    data: bytes,
    allowed: Collection[str],
    builders: Mapping[str, Build] | None = None,
    persistent: Callable[[Any], Any] | None = None,
    *,
    holds: int = 0,
) -> Any:
    """What a pickle holds.

    Args:
        allowed: full names of the classes and functions that it may mention.
        builders: by such a name, what stands in for a call of it.
        persistent: what stands in for an object that is kept outside of the pickle.
        holds: bytes of the checkpoint that the pickle describes, which may be long when those are many.

    Raises:
        CheckpointError: it names anything else, is damaged, or too long for what it describes.
    """
    try:
        most = MOST + holds // EACH
        found = _Machine(allowed, builders or {}, persistent, most).run(data)
        _refuse_what_repeats(found, most)
        return found
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle raises almost anything
        raise CheckpointError(f"its pickle is damaged ({error or type(error).__name__}); copy it again") from error


def _refuse_what_repeats(content: Any, most: int) -> None:
    """Whether `content`, with everything by reference written out where it is referred to, has more than `most` containers or entries.

    Then a short pickle would keep whoever walks it busy for long.
    """
    waiting = [content]
    while waiting:
        one = waiting.pop()
        inside: Any = ()
        if isinstance(one, dict):
            inside = one.values()
        elif isinstance(one, (list, tuple)):
            inside = one
        elif isinstance(one, Record):
            inside = (one.arguments, one.state)
        most -= len(inside)
        if most < 0:
            raise ValueError("its parts refer to one another over and over")
        waiting += [each for each in inside if isinstance(each, (dict, list, tuple, Record))]


class _Machine:
    def __init__(
        self,
        allowed: Collection[str],
        builders: Mapping[str, Build],
        persistent: Callable[[Any], Any] | None,
        most: int,
    ):
        self.allowed, self.builders, self.persistent, self.most = allowed, builders, persistent, most
        self.stack: list[Any] = []
        self.memo: dict[Any, Any] = {}

    def run(self, data: bytes) -> Any:
        stack, memo, steps = self.stack, self.memo, _STEPS
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if count >= self.most:
                raise CheckpointError(f"its pickle is longer than {self.most} instructions")
            name = opcode.name
            if name in _VALUES:
                stack.append(argument)
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name == "STOP":
                return stack.pop()
            elif step := steps.get(name):
                step(self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise CheckpointError(f"its pickle has the instruction {name}, which torch does not write")
        raise ValueError("no end")

    def items(self) -> list[Any]:
        """What was pushed since the last mark."""
        stack, at = self.stack, len(self.stack) - 1
        while stack[at] is not _MARK:  # each item is passed once: they are taken off
            at -= 1
            if at < 0:
                raise ValueError("no mark")
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def pop_mark(self, _: Any) -> None:
        self.items()

    def named(self, name: str) -> None:
        name = name.replace("__builtin__.", "builtins.") if name.startswith("__builtin__.") else name
        if name not in self.allowed:
            raise CheckpointError(
                f"asks for {name} to be run or built; opdgeo reads tensors and the records around them only and ran nothing"
            )
        self.stack.append(Named(name))

    def call(self, function: Any, arguments: Any) -> None:
        if not isinstance(function, Named) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no name")
        build = self.builders.get(function.name)
        self.stack.append(build(*arguments) if build else Record(function.name, arguments))

    def put_all(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise TypeError("entries of what is no dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_key(key)] = value

    def append(self, _: Any) -> None:
        value = self.stack.pop()
        _list(self.stack[-1]).append(value)

    def appends(self, _: Any) -> None:
        items = self.items()
        _list(self.stack[-1]).extend(items)

    def set_item(self, _: Any) -> None:
        items = [self.stack.pop(), self.stack.pop()][::-1]
        self.put_all(self.stack[-1], items)

    def set_items(self, _: Any) -> None:
        items = self.items()
        self.put_all(self.stack[-1], items)

    def dictionary(self, _: Any) -> None:
        items = self.items()
        self.stack.append({})
        self.put_all(self.stack[-1], items)

    def last(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError("an empty stack")
        found = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.stack.append(found)

    def reduce(self, _: Any) -> None:
        arguments = self.stack.pop()
        self.call(self.stack.pop(), arguments)

    def new_with_words(self, _: Any) -> None:
        del self.stack[-1]
        self.reduce(None)

    def build(self, _: Any) -> None:
        state, made = self.stack.pop(), self.stack[-1]
        if isinstance(made, Record):
            made.state = state

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError("a name that is no text")
        self.named(f"{module}.{name}")

    def outside(self, _: Any) -> None:
        if self.persistent is None:
            raise ValueError("an object outside of the pickle")
        self.stack.append(self.persistent(self.stack.pop()))


def _list(target: Any) -> list[Any]:
    if type(target) is not list:
        raise TypeError("items of what is no list")
    return target


def _key(key: Any) -> Any:
    """Numbers and text; records count by identity. Their hashes take no time and do not collide at an attacker's will."""
    if isinstance(key, (str, bytes)) and len(key) > LONGEST_NAME:
        raise ValueError(f"a name of {len(key)} characters")
    if isinstance(key, (str, bytes, Record)) or key is None or (isinstance(key, int) and abs(key) < 1 << 60):
        return key
    raise TypeError(f"a {type(key).__name__} as the key of a dictionary")


def _integer(machine: _Machine, value: int) -> None:
    if value.bit_length() > 8 * _DIGITS:
        raise ValueError("an integer of thousands of digits")
    machine.stack.append(value)


_VALUES = frozenset(
    (
        "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
        "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
    )
)  # fmt: skip
_Step = Callable[[_Machine, Any], None]
_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("INT", "LONG", "LONG1", "LONG4"), _integer),
    "NONE": lambda m, _: m.stack.append(None),
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_SET": lambda m, _: m.stack.append([]),  # nothing asks whether it is one
    "EMPTY_DICT": lambda m, _: m.stack.append({}),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "TUPLE1": lambda m, _: m.last(1),
    "TUPLE2": lambda m, _: m.last(2),
    "TUPLE3": lambda m, _: m.last(3),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.items())),
    "FROZENSET": lambda m, _: m.stack.append(m.items()),
    "LIST": lambda m, _: m.stack.append(m.items()),
    "DICT": _Machine.dictionary,
    "MARK": lambda m, _: m.stack.append(_MARK),
    "POP": lambda m, _: m.stack.pop(),
    "POP_MARK": _Machine.pop_mark,
    "DUP": lambda m, _: m.stack.append(m.stack[-1]),
    "MEMOIZE": lambda m, _: m.memo.update({len(m.memo): m.stack[-1]}),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": lambda m, argument: m.named(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_words,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.outside,
}

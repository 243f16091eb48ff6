"""Worked arithmetic in characters: the task of the `tiny` preset.

A prompt is a chain of additions and subtractions, ``4735+2851-1362=``; a demonstration works it out one
operation at a time and repeats the result behind ``#``: ``4735+2851=7586;7586-1362=6224#6224``. The verifier
reads only what follows the last ``#``, so a policy is free to work in another way.

Running totals never go below zero. A problem belongs to the held-out split by a checksum of its prompt,
so no seed can ever put an evaluation problem in front of the trainer.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, distinct, in_held_out

OPERANDS = 3
LARGEST = 9999


@dataclass(frozen=True)
class Problem:
    """One chain: `operands` of length n and `signs` of length n − 1, each "+" or "-"."""

    operands: tuple[int, ...]
    signs: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the policy is given, ending in "="."""
        tail = "".join(s + str(x) for s, x in zip(self.signs, self.operands[1:], strict=True))
        return f"{self.operands[0]}{tail}="

    @property
    def totals(self) -> tuple[int, ...]:
        """Running totals after each operation; the last one is the answer."""
        totals, total = [], self.operands[0]
        for sign, x in zip(self.signs, self.operands[1:], strict=True):
            total = total + x if sign == "+" else total - x
            totals.append(total)
        return tuple(totals)

    @property
    def answer(self) -> int:
        return self.totals[-1]

    @property
    def demonstration(self) -> str:
        """The worked solution that SFT imitates."""
        before = (self.operands[0], *self.totals[:-1])
        steps = zip(before, self.signs, self.operands[1:], self.totals, strict=True)
        return ";".join(f"{a}{s}{b}={c}" for a, s, b, c in steps) + f"#{self.answer}"

    @property
    def held_out(self) -> bool:
        """True for a problem that is kept for evaluation."""
        return in_held_out(self.prompt)


def draw(rng: random.Random, operands: int = OPERANDS, largest: int = LARGEST) -> Problem:
    """A random chain from either split; operands are uniform in [1, largest]."""
    numbers = [rng.randint(1, largest)]
    signs: list[str] = []
    total = numbers[0]
    for _ in range(operands - 1):
        x = rng.randint(1, largest)
        sign = rng.choice("+-")
        if sign == "-" and x > total:
            sign = "+"
        total = total + x if sign == "+" else total - x
        numbers.append(x)
        signs.append(sign)
    return Problem(tuple(numbers), tuple(signs))


def verify(completion: str, answer: int | str) -> float:
    """1.0 when the text behind the last "#" is the answer to the letter, else 0.0.

    >>> verify("1+2=3#3", 3), verify("1+2=3#4", 3), verify("3", 3)
    (1.0, 0.0, 0.0)
    """
    _, mark, claimed = completion.rpartition("#")
    return float(bool(mark) and claimed == str(answer))


def corpus(rng: random.Random) -> Iterator[str]:
    """Endless pretraining text of several kinds, none of it from the held-out split.

    Most of it is arithmetic in forms other than the demonstrations' (single operations, direct answers, totals
    alone), so that the base knows the facts without preferring the worked form; a fifth is other digit work.
    """
    while True:
        kind = rng.random()
        if kind < 0.20:
            word = rng.choice(("sort", "rev", "max"))
            digits = [rng.choice("0123456789") for _ in range(rng.randint(3, 7))]
            done = {"sort": sorted(digits), "rev": digits[::-1], "max": [max(digits)]}[word]
            yield f"{word} {''.join(digits)}={''.join(done)}"
            continue
        single = kind < 0.60
        problem = draw(rng, 2 if single else rng.randint(3, 4), 999 if rng.random() < 0.7 else 9999 if single else 99)
        if problem.held_out:
            continue
        if single:
            yield f"{problem.prompt}{problem.answer}"
        elif kind < 0.70:
            yield f"{problem.prompt}#{problem.answer}"
        elif kind < 0.85:
            yield f"{problem.prompt}{';'.join(map(str, problem.totals))}#{problem.answer}"
        else:
            yield f"{problem.prompt}{problem.demonstration}"


def _short(value: object) -> str:
    """An option as a message shows it."""
    return f"a number of {value.bit_length()} bits" if isinstance(value, int) and value >= 1 << 64 else repr(value)[:40]


@dataclass(frozen=True)
class Arithmetic:
    """The task as trainers see it (`opdgeo.tasks.Task`): chains of `operands` numbers up to `largest`."""

    operands: int = OPERANDS
    largest: int = LARGEST

    def __post_init__(self) -> None:
        if type(self.operands) is not int or not 2 <= self.operands <= 8:
            raise ConfigError(f"a chain of {_short(self.operands)} operands was asked for; expected between 2 and 8.")
        if type(self.largest) is not int or not 99 <= self.largest <= 10**15:
            raise ConfigError(
                f"operands up to {_short(self.largest)} were asked for; expected a whole number of at least 99 and at most 10^15."
            )

    @property
    def verifiable(self) -> bool:
        return True

    @property
    def prompted(self) -> bool:
        return True

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        rng = random.Random(f"{seed}-{held_out}-{self.operands}-{self.largest}")
        drawn = (draw(rng, self.operands, self.largest) for _ in itertools.count())
        chosen = (Example(p.prompt, p.demonstration, str(p.answer)) for p in drawn if p.held_out == held_out)
        return distinct(chosen, count)

    def verify(self, completion: str, answer: str) -> float:
        return verify(completion, answer)

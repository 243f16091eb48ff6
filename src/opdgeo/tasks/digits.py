"""Digit strings: another task for the `tiny` models, so that the data can change and the models stay.

``sort 4821347=`` is answered by ``1234478``, ``rev`` by the string turned round, ``max`` by its largest digit. The base has
met the three words in pretraining with 3 to 7 digits; the task asks for 7 to 10, so there is something left to learn.
A problem belongs to the held-out split by a checksum of its prompt, as in `arithmetic`.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, distinct, in_held_out
from opdgeo.tasks.arithmetic import _short

WORDS = ("sort", "rev", "max")


def draw(rng: random.Random, shortest: int, longest: int) -> Example:
    """A random problem from either split."""
    word = rng.choice(WORDS)
    digits = [rng.choice("0123456789") for _ in range(rng.randint(shortest, longest))]
    answer = "".join({"sort": sorted(digits), "rev": digits[::-1], "max": [max(digits)]}[word])
    return Example(f"{word} {''.join(digits)}=", answer, answer)


@dataclass(frozen=True)
class Digits:
    """The task as trainers see it (`opdgeo.tasks.Task`): strings of `shortest` to `longest` digits."""

    shortest: int = 7
    longest: int = 10

    def __post_init__(self) -> None:
        whole = type(self.shortest) is int and type(self.longest) is int
        if not whole or not 4 <= self.shortest <= self.longest <= 32:
            raise ConfigError(
                f"strings of {_short(self.shortest)} to {_short(self.longest)} digits were asked for; expected 4 ≤ shortest ≤ longest ≤ 32."
            )

    @property
    def verifiable(self) -> bool:
        return True

    @property
    def prompted(self) -> bool:
        return True

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        rng = random.Random(f"{seed}-{held_out}-{self.shortest}-{self.longest}")
        drawn = (draw(rng, self.shortest, self.longest) for _ in itertools.count())
        return distinct((e for e in drawn if in_held_out(e.prompt) == held_out), count)

    def verify(self, completion: str, answer: str) -> float:
        """1.0 when the completion is the answer to the letter, else 0.0."""
        return float(completion == answer)

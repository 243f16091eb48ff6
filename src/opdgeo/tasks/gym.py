"""reasoning-gym (extra `opdgeo[tasks]`): procedurally generated problems with a verifier.

reasoning-gym gives partial credit; the reward here is 1 for a full score and 0 for anything less. The answer stands between
``<answer>`` and ``</answer>``, as the prompt says. A problem belongs to the held-out split by a checksum of its question.

What a model writes is untrusted, and some of reasoning-gym's scorers give it to Python's `eval` or to SymPy's parser, which
calls `eval`. So a family is taken only if it stands in one of two lists:

* `FAMILIES`: its scorer was read (reasoning-gym 0.1.25, hence the pin) and compares strings, plain numbers or JSON, or
  plays a bounded game, at a cost that the length of the answer bounds.
* `VERIFIERS`: it is scored here instead, by comparison or by a parser of numbers and + - * / ( ).

The others are refused: the integration families and polynomial_multiplication (SymPy), composite, codeio, and the ones whose
scorer repeats a move as often as the answer says (rubiks_cube, rush_hour) or was not followed to its end (boxnet, codeio,
sokoban, propositional_logic); acre makes all of its problems before the first.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, distinct, in_held_out

AT_ONCE = 1_000_000  # problems of one seed; they are generated as they are asked for
INSTRUCTION = "\nGive the final answer between <answer> and </answer>."
OPENING, CLOSING = "<answer>", "</answer>"
LONGEST = 100_000  # characters of an answer; no family's is a tenth as long
LONGEST_EXPRESSION, DEEPEST = 1000, 50  # characters, parentheses

_READ = """
    ab advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf binary_alternation bitwise_arithmetic
    caesar_cipher calendar_arithmetic chain_sum circuit_logic color_cube_rotation complex_arithmetic count_bits count_primes
    course_schedule cryptarithm decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
    fraction_simplification futoshiki game_of_life game_of_life_halting gcd graph_color group_anagrams gsm_symbolic
    isomorphic_strings jugs kakurasu knight_swap knights_knaves largest_island lcm leg_counting letter_counting letter_jumble
    list_functions mahjong_puzzle manipulate_matrix maze mini_sudoku modulo_grid needle_haystack number_filtering number_format
    number_sequence number_sorting palindrome_generation palindrome_partitioning path_star polynomial_equations pool_matrix
    power_function prime_factorization products quantum_lock ransom_note rearc rectangle_count rotate_matrix rotten_oranges
    self_reference sentence_reordering shortest_path simple_equations simple_geometry spell_backward string_manipulation
    string_splitting string_synthesis sudoku survo syllogism time_intervals tower_of_hanoi tsumego word_ladder
    word_sequence_reversal word_sorting zebra_puzzles
"""
FAMILIES = frozenset(_READ.split())


def value(expression: str) -> Fraction:
    """The exact value of numbers joined by + - * / and parentheses; nothing else is understood.

    >>> value("(3 + 5) * 2 - 1/2"), value("-2*-3"), value("0.25")
    (Fraction(31, 2), Fraction(6, 1), Fraction(1, 4))

    Raises:
        ValueError: it is something else, too long, nested too deep, or divides by zero.
    """
    if len(expression) > LONGEST_EXPRESSION:
        raise ValueError("too long")
    tokens = re.findall(r"\d+(?:\.\d+)?|[^\s]", expression, re.ASCII)[::-1]  # taken from the end

    def sum_(depth: int) -> Fraction:
        total = product(depth)
        while tokens and tokens[-1] in "+-":
            total = total + product(depth) if tokens.pop() == "+" else total - product(depth)
        return total

    def product(depth: int) -> Fraction:
        total = number(depth)
        while tokens and tokens[-1] in "*/":
            divides, right = tokens.pop() == "/", number(depth)
            if divides and not right:
                raise ValueError("a division by zero")
            total = total / right if divides else total * right
        return total

    def number(depth: int) -> Fraction:
        sign = 1
        while tokens and tokens[-1] in "+-":
            sign = -sign if tokens.pop() == "-" else sign
        token = tokens.pop() if tokens else ""
        if token == "(" and depth < DEEPEST:
            inner = sum_(depth + 1)
            if not tokens or tokens.pop() != ")":
                raise ValueError("a parenthesis that is not closed")
            return sign * inner
        if not token[:1].isdigit():
            raise ValueError(f"{token!r} where a number should be")
        return sign * Fraction(token)

    found = sum_(0)
    if tokens:
        raise ValueError(f"{tokens[-1]!r} after the end")
    return found


def _expression(given: str, numbers: list[int], target: int) -> bool:
    """Whether an expression uses exactly these numbers and has this value."""
    used = [int(n) for n in re.findall(r"\d+", given, re.ASCII)] if len(given) <= LONGEST_EXPRESSION else []
    return sorted(used) == sorted(numbers) and value(given) == target


def _number(given: str) -> Fraction:
    """A fraction or a decimal number; its exponent has two digits at most, for `Fraction` writes it out."""
    if not re.fullmatch(r"[+-]?\d{1,40}(/\d{1,40}|(\.\d{0,40})?([eE][+-]?\d{1,2})?)", given, re.ASCII):
        raise ValueError("no number")
    return Fraction(given)


# Family -> whether an answer deserves the full score of an entry. A ValueError is a no.
VERIFIERS: Mapping[str, Callable[[str, Mapping[str, Any]], bool]] = {
    "countdown": lambda given, entry: _expression(given, entry["metadata"]["numbers"], entry["metadata"]["target"]),
    "puzzle24": lambda given, entry: _expression(given, entry["metadata"]["numbers"], 24),
    "coin_flip": lambda given, entry: abs(_number(given) - _number(entry["answer"])) <= Fraction(1, 10_000),
    # reasoning-gym evaluates answers to these only to give a part of the score.
    "binary_matrix": lambda given, entry: given == entry["answer"],
    "spiral_matrix": lambda given, entry: given == entry["answer"].strip(),
    "string_insertion": lambda given, entry: given == entry["answer"],
    "n_queens": lambda given, entry: given in entry["metadata"]["valid_answers"],
}


class ReasoningGym:
    """The task as trainers see it (`opdgeo.tasks.Task`): `family` and the family's own options, such as min_terms.

    `Example.answer` is "seed:index" of the problem, from which reasoning-gym makes it again to score a completion.

    Raises:
        ConfigError: reasoning-gym is missing, there is no such family, its answers cannot be scored safely, or it does not
            take the options.
    """

    def __init__(self, family: str = "chain_sum", **options: Any) -> None:
        if importlib.util.find_spec("reasoning_gym") is None:
            raise ConfigError(
                "the task `reasoning_gym` needs the package reasoning-gym, which is not installed; try: pip install 'opdgeo[tasks]'"
            )
        from reasoning_gym.factory import DATASETS

        if family in DATASETS and family not in FAMILIES and family not in VERIFIERS:
            raise ConfigError(
                f"reasoning-gym's scorer of {family!r} would run what a model writes as code, or at a cost without bound; expected a "
                "family whose answers are only compared (opdgeo.tasks.gym lists them), such as chain_sum or countdown. For expressions, "
                "write the problems to a .jsonl file with prompt and answer and use the task `problems`."
            )
        self.family, self.options = family, options
        self._data: dict[int, Any] = {}
        self._dataset(0)

    def _dataset(self, seed: int) -> Any:
        if seed not in self._data:
            import reasoning_gym

            try:
                self._data[seed] = reasoning_gym.create_dataset(self.family, seed=seed, size=AT_ONCE, **self.options)
            except Exception as error:  # families check their options in their own ways
                raise ConfigError(
                    f"reasoning-gym does not make {self.family!r} with the options {self.options}: {error}; expected one of its "
                    "families (reasoning_gym.factory.DATASETS) and that family's options."
                ) from None
        return self._data[seed]

    @property
    def verifiable(self) -> bool:
        return True

    @property
    def prompted(self) -> bool:
        return True

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        data = self._dataset(seed)

        def drawn() -> Iterator[Example]:
            for index in range(AT_ONCE):
                entry = data[index]
                if in_held_out(entry["question"]) == held_out:
                    completion = f"{OPENING}{entry['answer']}{CLOSING}"
                    yield Example(entry["question"] + INSTRUCTION, completion, f"{seed}:{index}")

        return distinct(drawn(), count)

    def verify(self, completion: str, answer: str) -> float:
        """Raises ConfigError for an `answer` that names no problem, as a file of rollouts of another task does."""
        named = re.fullmatch(r"(\d{1,18}):(\d{1,18})", answer, re.ASCII)
        if not named or int(named[2]) >= AT_ONCE:
            raise ConfigError(
                f"the answer {answer[:40]!r} names no problem of {self.family}; expected SEED:INDEX, as this task's examples have. "
                "Replay rollouts with the task that recorded them."
            )
        given = _last_answer(completion)
        if given is None or len(given) > LONGEST:
            return 0.0
        data = self._dataset(int(named[1]))
        entry = data[int(named[2])]
        try:
            if self.family in VERIFIERS:
                return float(VERIFIERS[self.family](given, entry))
            return float(data.score_answer(given, entry=entry) >= 1.0)
        except Exception:  # an answer of another form than the scorer reads
            return 0.0


def _last_answer(completion: str) -> str | None:
    """What stands between the last pair of marks, without the space around it; in time linear in the text.

    >>> _last_answer("<answer>1</answer> no, <answer> 2 </answer>"), _last_answer("<answer>3")
    ('2', None)
    """
    found, at = None, 0
    while (start := completion.find(OPENING, at)) >= 0:
        start += len(OPENING)
        end = completion.find(CLOSING, start)
        if end < 0:
            break
        found, at = completion[start:end].strip(), end + len(CLOSING)
    return found

"""Tasks: the verifier, the disjoint splits, and text from the standard library."""

from __future__ import annotations

import ast
import random
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from opdgeo import tasks
from opdgeo.errors import ConfigError
from opdgeo.tasks import arithmetic, docstrings
from program import run_python


@given(seed=st.integers(0, 2**32), operands=st.integers(2, 5))
def test_a_demonstration_is_right_and_totals_never_go_below_zero(seed: int, operands: int) -> None:
    problem = arithmetic.draw(random.Random(seed), operands)
    assert min(problem.totals) >= 0
    assert problem.answer == eval(problem.prompt.rstrip("="))
    assert arithmetic.verify(problem.demonstration, problem.answer) == 1.0
    assert arithmetic.verify(problem.demonstration, problem.answer + 1) == 0.0
    for step in problem.demonstration.partition("#")[0].split(";"):
        left, _, right = step.partition("=")
        assert eval(left) == int(right)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("1+2=3#3", 1),
        ("#3", 1),
        ("#4#3", 1),
        ("3", 0),
        ("", 0),
        ("#", 0),
        ("#3 ", 0),
        ("#03", 0),
        ("#3#", 0),
        ("#33", 0),
    ],
)
def test_the_verifier_reads_the_last_claim_to_the_letter(completion: str, reward: int) -> None:
    assert arithmetic.verify(completion, 3) == reward == arithmetic.verify(completion, "3")


@examples(20)
@given(seeds=st.tuples(st.integers(0, 1000), st.integers(0, 1000)), operands=st.integers(2, 4))
def test_splits_are_disjoint_whatever_the_seeds(seeds: tuple[int, int], operands: int) -> None:
    task = tasks.load("arithmetic", {"operands": operands})
    train = {e.prompt for e in task.examples(300, seeds[0], held_out=False)}
    held_out = {e.prompt for e in task.examples(60, seeds[1], held_out=True)}
    assert len(train) == 300 and len(held_out) == 60
    # Draws from so many problems would hardly meet by chance, so membership itself is checked.
    assert all(zlib.crc32(prompt.encode()) % tasks.HELD_OUT_ONE_IN == 0 for prompt in held_out)
    assert not any(zlib.crc32(prompt.encode()) % tasks.HELD_OUT_ONE_IN == 0 for prompt in train)
    assert all(prompt.count("+") + prompt.count("-") == operands - 1 for prompt in train)


@pytest.mark.parametrize(
    ("name", "options", "least"),
    [("digits", {"shortest": 4, "longest": 4}, 29_000), ("arithmetic", {"operands": 2, "largest": 99}, 14_000)],
)
def test_a_task_without_more_problems_gives_what_it_has(name: str, options: dict[str, int], least: int) -> None:
    task = tasks.load(name, options)
    found = [task.examples(10**6, 0, held_out=held) for held in (False, True)]
    prompts = {e.prompt for split in found for e in split}
    assert least < len(prompts) == sum(map(len, found)) <= 30_000


def test_the_same_seed_draws_the_same_examples_and_another_does_not() -> None:
    task = tasks.load("arithmetic")
    assert task.examples(50, 3, held_out=False) == task.examples(50, 3, held_out=False)
    assert task.examples(50, 3, held_out=False) != task.examples(50, 4, held_out=False)
    assert task.examples(10, 3, held_out=False) == task.examples(50, 3, held_out=False)[:10]


def test_docstrings_are_prose_and_never_in_both_splits() -> None:
    task = tasks.load("docstrings")
    train, held_out = (task.examples(10**6, 0, held_out=held) for held in (False, True))
    texts = [e.completion for e in train]
    assert len(train) > 1000 and len(held_out) > 50
    assert len(set(texts)) == len(texts) and not set(texts) & {e.completion for e in held_out}
    assert not any(">>>" in text or len(text) < docstrings.SHORTEST for text in texts)
    assert not task.verifiable
    with pytest.raises(ConfigError, match="verifier"):
        task.verify("", "")


def test_docstrings_are_found_in_the_order_of_a_walk() -> None:
    source = (
        "class A:\n def f(self):\n  try:\n   def g(): pass\n  except E:\n   def h(): pass\n  else:\n   class B: pass\n"
    )
    source += "if x:\n async def i(): pass\nelse:\n def j(): pass\nmatch x:\n case 1:\n  def k(): pass\n"
    for text in (source, Path(random.__file__).read_text()):
        tree = ast.parse(text)
        expected = [node for node in ast.walk(tree) if isinstance(node, docstrings.Documented)]
        assert list(docstrings._documented(tree)) == expected and len(expected) > 8


def test_docstrings_are_the_same_in_another_process_with_other_hashes() -> None:
    here = [e.completion for e in tasks.load("docstrings").examples(5, 7, held_out=False)]
    script = (
        "from opdgeo import tasks; import json; "
        "print(json.dumps([e.completion for e in tasks.load('docstrings').examples(5, 7, held_out=False)]))"
    )
    import json

    done = run_python("-c", script, cold=True, env={"PYTHONHASHSEED": "1"})
    assert json.loads(done.stdout) == here


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return the sum of two numbers, both of which must be finite.", True),
        ("x -- the first of the two numbers\ny -- the second of the two.", False),
        (">>> add(1, 2)\n3", False),
        ("Short.", False),
        ("Values | names | more\n------+-------+-----\n 1 | 2 | 3 and so on.", False),
    ],
)
def test_what_counts_as_prose(docstring: str, expected: bool) -> None:
    assert bool(docstrings.prose(docstring)) is expected


def test_an_unknown_task_or_option_says_what_is_there() -> None:
    with pytest.raises(ConfigError, match="did you mean 'arithmetic'"):
        tasks.load("arithmetics")
    with pytest.raises(ConfigError, match="expected operands=3"):
        tasks.load("arithmetic", {"digits": 3})
    with pytest.raises(ConfigError, match="between 2 and 8"):
        tasks.load("arithmetic", {"operands": 1})

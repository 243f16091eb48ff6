"""Nothing that a model writes, or that a checkpoint brings along, is run: scorers, a run's own config, replayed rollouts."""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdgeo import tasks
from opdgeo.errors import ConfigError
from opdgeo.experiments.presets import PRESETS, train_config
from opdgeo.tasks import gym
from opdgeo.training import benchmark

# Calls that run text as code, read it with something that does, or take a time that its length does not bound.
RUNNING = {
    "eval", "exec", "compile", "__import__", "import_module", "parse_expr", "sympify", "literal_eval", "S", "lambdify", "solve",
    "simplify", "nsimplify", "system", "popen", "Popen", "run", "check_output", "loads_pickle", "Fraction", "pow", "open",
}  # fmt: skip
# Families whose scorer evaluates what reasoning-gym itself generated, never what a model wrote.
OF_ITS_OWN = {"number_sorting": 'eval(entry["answer"])', "bitwise_arithmetic": "eval(problem)"}


def reached(scorer: FunctionType, kind: type) -> Iterator[tuple[str, str]]:
    """Name and source of a scorer and of every function of its module or class that it can name, and so on."""
    todo, done = [scorer], set()
    while todo:
        function = todo.pop()
        if function in done or function.__code__.co_filename == "<string>":  # a dataclass's own methods
            continue
        done.add(function)
        source = textwrap.dedent(inspect.getsource(function))
        yield function.__qualname__, source
        tree = ast.parse(source)
        names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        names |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        module = sys.modules[function.__module__]
        for name in names:
            found = getattr(kind, name, None) or getattr(module, name, None) or getattr(_utils(), name, None)
            members = vars(found).values() if inspect.isclass(found) else [found]
            for member in members:
                member = inspect.unwrap(getattr(member, "__func__", member)) if callable(member) else member
                if isinstance(member, FunctionType) and member.__module__.startswith("reasoning_gym"):
                    todo.append(member)


def _utils() -> Any:
    import reasoning_gym.utils

    return reasoning_gym.utils


def running(source: str) -> set[str]:
    calls = {n.func for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)}
    names = {c.id if isinstance(c, ast.Name) else c.attr if isinstance(c, ast.Attribute) else "" for c in calls}
    return names & RUNNING


@pytest.mark.parametrize("family", sorted(gym.FAMILIES))
def test_no_allowed_scorer_runs_text(family: str) -> None:
    from reasoning_gym.factory import DATASETS

    kind = DATASETS[family][0]
    for name, source in reached(kind.score_answer, kind):
        if name.endswith("__init__") or name.endswith("__getitem__"):
            continue
        assert not running(source.replace(OF_ITS_OWN.get(family, "\0"), "own")), name


def test_the_check_sees_the_scorers_that_do() -> None:
    from reasoning_gym.factory import DATASETS

    seen = {
        family
        for family, (kind, _) in DATASETS.items()
        if any(running(source) for name, source in reached(kind.score_answer, kind) if not name.endswith("__"))
    }
    assert seen >= {
        "countdown", "puzzle24", "intermediate_integration", "simple_integration", "polynomial_multiplication", "binary_matrix",
        "spiral_matrix", "string_insertion", "n_queens", "coin_flip",
    }  # fmt: skip


def attacks(mark: Path) -> list[str]:
    call = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return [call, f"[{call}]", f"({call}, 1)[1]", f"[[{call}]]", f"lambda: {call}", "x." + call, f"f'{{{call}}}'"]


def test_no_answer_of_any_family_runs(tmp_path: Path) -> None:
    from reasoning_gym.factory import DATASETS

    mark = tmp_path / "it-ran"
    refused = set()
    few = {
        "chain_sum",
        "bitwise_arithmetic",
        "number_sorting",
        "complex_arithmetic",
        "pool_matrix",
        "game_of_life",
        "jugs",
    }
    for family in sorted(few | DATASETS.keys() - gym.FAMILIES):  # the scorers of all were read by the test above
        try:
            task = tasks.load("reasoning_gym", {"family": family})
        except ConfigError as error:
            assert "would run what a model writes" in str(error)
            refused.add(family)
            continue
        for attack in attacks(mark):
            assert task.verify(f"<answer>{attack}</answer>", "0:0") == 0.0
            assert not mark.exists(), (family, attack)
    assert refused == {
        "acre", "boxnet", "codeio", "composite", "intermediate_integration", "polynomial_multiplication", "propositional_logic",
        "rubiks_cube", "rush_hour", "simple_integration", "sokoban",
    }  # fmt: skip


@pytest.mark.parametrize("family", sorted(gym.VERIFIERS))
def test_our_own_verifiers_accept_the_demonstrations(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.load("reasoning_gym", {"family": family})
    entries = [task._dataset(0)[index] for index in range(2)]  # some families take a second to make one
    monkeypatch.setattr(task, "_dataset", lambda seed: entries)
    for index, entry in enumerate(entries):
        assert task.verify(f"<answer>{entry['answer']}</answer>", f"0:{index}") == 1.0
        for wrong in (
            "",
            "0.0",
            "1/0",
            "9" * 999,
            "(" * 400,
            "5e999999999",
            "1e99",
            "nan",
            "9**9**9**9",
            "٣",
            "-",
            "7 7",
        ):
            assert task.verify(f"<answer>{wrong}</answer>", f"0:{index}") == 0.0, wrong


def test_an_expression_must_use_the_numbers_and_reach_the_target() -> None:
    entry = {"metadata": {"numbers": [8, 3, 2, 1]}}
    right = gym.VERIFIERS["puzzle24"]
    assert right("8*3*(2-1)", entry) and right(" ( 8*3 ) / (2 - 1) ", entry)
    assert not any(
        right(wrong, entry)
        for wrong in ("8*3", "8*3*(2-1)+0", "6+6+6+6", "83-2-1", "8+3+2+1", "8*3*(2-1)*1", "8*3*(2-1)=24")
    )
    for wrong in ("8*3**(2-1)", "8*3(2-1)", "(8*3*(2-1)", "8*3*(2-1))", "8 3 2 1", "'8'*3*(2-1)"):
        with pytest.raises(ValueError):
            right(wrong, entry)


expressions = st.recursive(
    st.integers(0, 50).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map("({0[0]}{0[1]}{0[2]})".format),
        inner.map("-{}".format), inner.map(" {} ".format),
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(" ".join),
    ),
    max_leaves=12,
)  # fmt: skip


@given(expressions)
def test_the_parser_agrees_with_python(expression: str) -> None:
    exact = "".join(f"Fraction({p})" if p.isdigit() else p for p in _pieces(expression))
    try:
        expected = eval(exact, {"Fraction": Fraction})
    except ZeroDivisionError:
        expected = None
    if expected is None:
        with pytest.raises(ValueError, match="division by zero"):
            gym.value(expression)
    else:
        assert gym.value(expression) == expected


def _pieces(expression: str) -> list[str]:
    import re

    return re.findall(r"\d+|.", expression)


@given(st.text(alphabet="0123456789+-*/(). x_'\"", max_size=60))
def test_the_parser_refuses_or_gives_a_number(text: str) -> None:
    with suppress(ValueError):
        assert isinstance(gym.value(text), Fraction)


@pytest.mark.parametrize("answer", ["", "3", "0:", "a:b", "0:1000000", "-1:0", "0:-1", "0:9" + "9" * 5000])
def test_rollouts_of_another_task_are_refused(answer: str) -> None:
    with pytest.raises(ConfigError, match="names no problem"):
        tasks.load("reasoning_gym").verify("<answer>1</answer>", answer)


def test_many_marks_take_no_time() -> None:
    text = "<answer>" * 200_000
    assert gym._last_answer(text) is None
    assert gym._last_answer(text + "1</answer>") == "<answer>" * 199_999 + "1"


def beside(folder: Path, **changes: Any) -> Path:
    """A checkpoint's folder with a run's config.json beside it, as a download brings both."""
    config = json.loads(train_config("rlvr", "tiny", origin="tiny/base").to_json()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "step-000001").mkdir(exist_ok=True)
    return folder / "step-000001"


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("problems", {"source": "/etc/hostname.jsonl"}),
        ("problems", {"source": "someone/dataset"}),
        ("reasoning_gym", {"family": "countdown", "max_numbers": 30}),
        ("reasoning_gym", {"family": "chain_sum", "max_digits": 10**9, "max_terms": 10**9}),
        ("reasoning_gym", {"family": "chain_sum", "max_digits": "9"}),
        ("reasoning_gym", {"family": "tower_of_hanoi", "max_disks": 64}),
        ("reasoning_gym", {"family": "codeio"}),
        ("reasoning_gym", {"family": ["chain_sum"]}),
        ("a-task-of-tomorrow", {}),
    ],
)
def test_a_checkpoint_chooses_no_task_that_is_not_known_to_be_harmless(
    task: str, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opdgeo.experiments import gradient_moments as signals

    folder = beside(tmp_path, task=task, task_options=options)
    monkeypatch.setattr(tasks, "load", None)  # calling it would fail
    with pytest.raises(ConfigError, match=r"--trust-run"):
        benchmark._task("task", folder, plain=True, trust_run=False)
    with pytest.raises(ConfigError, match=r"--task"):
        signals._settings(folder, "tiny", None, None)
    assert signals._settings(folder, "tiny", None, "arithmetic").task == "arithmetic"
    with pytest.raises(TypeError):
        benchmark._task("task", folder, plain=True, trust_run=True)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_of_our_own_presets_only_tasks_that_read_a_source_are_asked_about(preset: str, tmp_path: Path) -> None:
    config = train_config("rlvr", preset, origin="a-model")
    folder = beside(tmp_path, task=config.task, task_options=dict(config.task_options))
    if config.task == "problems":  # a file or a dataset
        with pytest.raises(ConfigError, match=r"--trust-run"):
            benchmark._task("task", folder, plain=True, trust_run=False)
    else:
        task, _ = benchmark._task("task", folder, plain=True, trust_run=False)
        assert task.verifiable


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("arithmetic", {"operands": 2.5}),
        ("arithmetic", {"operands": "3"}),
        ("arithmetic", {"largest": 10**4000}),
        ("digits", {"shortest": 4.5}),
    ],
)
def test_options_of_another_type_or_size_are_refused(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        tasks.load(name, options)


def test_an_answer_that_takes_too_much_is_wrong_and_the_next_one_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same process, one product of integers in C would run for hours: no signal ends it."""
    monkeypatch.setattr("opdgeo.tasks.answers.PATIENCE", 1.5)
    from opdgeo.tasks.problems import verify

    assert verify("so \\boxed{1/2}", "0.5") == 1.0
    started = time.monotonic()
    assert verify("so \\boxed{9^{9^{9^9}}}", "387420489") == 0.0
    assert verify("so \\boxed{7}", "7") == 1.0
    assert time.monotonic() - started < 200  # of hours

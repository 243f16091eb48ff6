"""TRL, transformers and accelerate: every use of their internals stands in `training/trl_hooks.py`, read against stated versions."""

from __future__ import annotations

import ast
import importlib
import inspect
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback
from trl import GRPOTrainer

import opdgeo
from opdgeo.training import trl_hooks

FOLDER = Path(opdgeo.__file__).parent / "training"
OTHERS = sorted(p for p in FOLDER.glob("*.py") if p.name != "trl_hooks.py")
LIBRARIES = ("trl", "transformers", "accelerate", "peft")


def test_the_libraries_are_those_that_were_read() -> None:
    assert {name: version(name) for name in trl_hooks.CHECKED} == trl_hooks.CHECKED


@pytest.mark.parametrize("name", trl_hooks.SIGNATURES)
def test_what_is_overridden_or_called_takes_what_it_took(name: str) -> None:
    found: Any = importlib.import_module(name.partition(".")[0])
    for i, part in enumerate(name.split(".")[1:], start=1):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[: i + 1]))
        found = getattr(found, part)
    if name.endswith("CallbackHandler.add_callback"):
        found = trl_hooks._add_last  # what transformers had there
    expected = trl_hooks.SIGNATURES[name]
    assert tuple(inspect.signature(found).parameters)[: len(expected)] == expected


def test_trl_takes_a_credit_for_every_token() -> None:
    assert "advantages.dim() == 1" in inspect.getsource(GRPOTrainer._compute_loss)  # (B, T) is accepted
    assert hasattr(GRPOTrainer, "create_model_card")


def _names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in found if name.startswith("_")}


@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.name)
def test_no_other_module_touches_internals(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = _names(tree)
    for node in ast.walk(tree):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in LIBRARIES:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            assert "trl" not in names and not any(n.startswith("_") for n in names), where
        if isinstance(node, ast.Import):
            assert all(alias.name.partition(".")[0] != "trl" for alias in node.names), where
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            assert node.attr in own, f"{where}: {node.attr}"
        if isinstance(node, ast.Attribute) and node.attr in (
            "training_step",
            "callback_handler",
            "current_gradient_accumulation_steps",
        ):
            raise AssertionError(f"{where}: {node.attr}")
        if isinstance(node, ast.ClassDef):
            bases = {b.id if isinstance(b, ast.Name) else getattr(b, "attr", "") for b in node.bases}
            assert not any(base.endswith("Trainer") for base in bases), where


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda p: p.name)
def test_no_frame_is_walked_and_no_namespace_written(path: Path) -> None:
    text = path.read_text()
    for word in ("_getframe", "currentframe", "inspect.stack", "f_locals", "f_back", "__dict__", "get_referrers"):
        assert word not in text, word


class Named(TrainerCallback):
    def __init__(self, name: str, seen: list[str]):
        self.name, self.seen = name, seen

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.seen.append(self.name)


class NamedFirst(Named, trl_hooks.FirstCallback):
    pass


@pytest.mark.parametrize("registered", ["constructor", "later"])
def test_a_first_callback_is_called_before_all_others(registered: str) -> None:
    seen: list[str] = []
    others = [DefaultFlowCallback(), Named("reporter", seen)]
    first = NamedFirst("first", seen)
    given = [*others, first] if registered == "constructor" else others
    handler = CallbackHandler(given, None, None, None, None)
    if registered == "later":
        handler.add_callback(first)
    handler.add_callback(Named("last", seen))
    handler.on_train_begin(None, TrainerState(), TrainerControl())  # type: ignore[arg-type]
    assert seen == ["first", "reporter", "last"]

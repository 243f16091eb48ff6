"""Names that were changed: what people still write must go on working, with a warning that says the new one."""

from __future__ import annotations

import importlib

import pytest


def test_verl_and_slime_find_their_functions_under_the_former_path() -> None:
    module = importlib.import_module("opdgeo.training.adapters")
    new = importlib.import_module("opdgeo.training.external_trainers")
    for name in ("verl_advantages", "slime_advantages", "ChannelAdamW", "VERL_REWARD"):
        with pytest.warns(FutureWarning, match=r"opdgeo\.training\.external_trainers"):
            assert getattr(module, name) is getattr(new, name)

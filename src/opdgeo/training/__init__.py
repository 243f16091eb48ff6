"""Training the arms on TRL: who writes the tokens, what credit each gets, and what a run leaves behind."""

import os
import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

# TRL and transformers report their use over the network; a training run on somebody's machine should not.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


class _Renamed(ModuleType):
    """`opdgeo.training.adapters`, which configurations of verl and slime still name: now `external_trainers`."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        warnings.warn(f"{self.__name__} is now opdgeo.training.external_trainers.", FutureWarning, stacklevel=2)
        return getattr(import_module("opdgeo.training.external_trainers"), name)


sys.modules["opdgeo.training.adapters"] = _Renamed("opdgeo.training.adapters")

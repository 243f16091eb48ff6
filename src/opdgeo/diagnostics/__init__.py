"""The diagnostics, one short file each. Each file defines one `Diagnostic`: what it is, how it is computed, how it is read.

To add one, write the file and put its name into `NAMES`. The order of the names is the order of the tables and of the page.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from opdgeo.diagnostics.diagnostic import Diagnostic, Settings, Value

if TYPE_CHECKING:
    from opdgeo.diagnostics.kinds import OfPair, OfRun, OfTrajectory, OfUpdate
    from opdgeo.diagnostics.pair import Pair
    from opdgeo.diagnostics.trajectory import Point, Trajectory
    from opdgeo.diagnostics.update import Base, Update

NAMES = (
    "update_sparsity",
    "frobenius_norm",
    "relative_norm",
    "operator_norm",
    "stable_rank",
    "effective_rank",
    "hill_exponent",
    "principal_angles",
    "spectral_shift",
    "mask_overlap",
    "principal_energy",
    "subspace_similarity",
    "channel_energy",
    "locking",
    "bound_ratio",
    "update_cosine",
    "update_multiple",
    "sign_agreement",
    "visible_jaccard",
    "visible_lift",
    "shared_subspace",
    "shared_channel",
)
CURVES = ("sigma_base", "sigma_tuned", "sigma_update", "angle_left", "angle_right")
"""The order of the curves in the data file. Other curves follow in the order of their diagnostics."""

DIAGNOSTICS: dict[str, Diagnostic] = {name: import_module(f"opdgeo.diagnostics.{name}").DIAGNOSTIC for name in NAMES}
"""Every diagnostic by name."""


def _of_scope(scope: str) -> dict[str, Any]:
    return {name: d for name, d in DIAGNOSTICS.items() if d.scope == scope}


def diagnostics() -> dict[str, OfUpdate]:
    """Every diagnostic of a single update, by name and in the order of the tables."""
    return cast("dict[str, OfUpdate]", _of_scope("update"))


def of_trajectories() -> dict[str, OfTrajectory]:
    """Every diagnostic that compares the checkpoints of a trajectory."""
    return cast("dict[str, OfTrajectory]", _of_scope("trajectory"))


def of_pairs() -> dict[str, OfPair]:
    """Every diagnostic that compares two updates of one base."""
    return cast("dict[str, OfPair]", _of_scope("pair"))


def of_runs() -> dict[str, OfRun]:
    """Every diagnostic of the table of a whole run."""
    return cast("dict[str, OfRun]", _of_scope("run"))


_WITH_TORCH = {"Base": "update", "Update": "update", "Point": "trajectory", "Trajectory": "trajectory", "Pair": "pair"}


def __getattr__(name: str) -> Any:
    if name in _WITH_TORCH:
        return getattr(import_module(f"opdgeo.diagnostics.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module 'opdgeo.diagnostics' has no attribute {name!r}")


__all__ = [
    "CURVES",
    "DIAGNOSTICS",
    "NAMES",
    "Base",
    "Diagnostic",
    "Pair",
    "Point",
    "Settings",
    "Trajectory",
    "Update",
    "Value",
    "diagnostics",
    "of_pairs",
    "of_runs",
    "of_trajectories",
]

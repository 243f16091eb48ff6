"""The four kinds of diagnostics by what they measure, what they find, and what their null is computed from. For annotations."""

from __future__ import annotations

from typing import Any

import polars as pl

from opdgeo.diagnostics.diagnostic import Diagnostic, Value
from opdgeo.diagnostics.gaussian_null import Isotropic
from opdgeo.diagnostics.pair import Pair
from opdgeo.diagnostics.trajectory import Trajectory
from opdgeo.diagnostics.update import Update

OfUpdate = Diagnostic[Update, dict[str, Value], Isotropic]
OfTrajectory = Diagnostic[Trajectory, dict[str, Value], Trajectory]
OfRun = Diagnostic[pl.DataFrame, list[dict[str, Any]], None]
OfPair = Diagnostic[Pair, dict[str, Value], Pair]

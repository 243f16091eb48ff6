"""The diagnostics, one short file each: a formula, its source, and what it asks of `numerics`.

A diagnostic module has `variants(settings)`, the names of its rows, `measure(update)`, a value for each of them, and `READS`,
the settings that its values depend on (whatever asks for W₀'s or W₊'s spectrum: `rank` and `mask_rank`; for ΔW's: `top_k`).
To add one: write the module and name it in `MODULES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Protocol, cast

from opdgeo.diagnostics.update import Base, Settings, Update, Value

MODULES = (
    "update_sparsity",
    "frobenius_norm",
    "relative_norm",
    "operator_norm",
    "stable_rank",
    "hill_exponent",
    "principal_angles",
    "spectral_shift",
    "mask_overlap",
    "principal_energy",
    "bound_ratio",
)


class Diagnostic(Protocol):
    """What every module of `MODULES` offers."""

    READS: tuple[str, ...]

    def variants(self, settings: Settings) -> list[str]: ...

    def measure(self, update: Update) -> dict[str, Value]: ...


def diagnostics() -> dict[str, Diagnostic]:
    """Every diagnostic of a single update, by name and in the order of the tables."""
    return {name: cast(Diagnostic, import_module(f"opdgeo.diagnostics.{name}")) for name in MODULES}


__all__ = ["MODULES", "Base", "Diagnostic", "Settings", "Update", "Value", "diagnostics"]

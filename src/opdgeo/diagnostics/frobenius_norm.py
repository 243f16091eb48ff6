"""‖ΔW‖_F, the size of the update (PAPER §2)."""

from __future__ import annotations

from opdgeo.diagnostics.update import Settings, Update, Value

READS: tuple[str, ...] = ()


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    return {"": Value(update.norm, update.norm * update.norm_error, update.norm_method)}

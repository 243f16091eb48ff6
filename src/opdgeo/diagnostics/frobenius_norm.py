"""‖ΔW‖_F, the size of the update (PAPER §2)."""

from __future__ import annotations

from opdgeo.diagnostics.update import Settings, Update, Value, norm_error

READS: tuple[str, ...] = ()


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    return {"": Value(update.norm, norm_error(update.norm, update.weights.numel()), "sum")}

"""‖ΔW‖_F / ‖W₀‖_F: the size of the update against the weights it changes."""

from __future__ import annotations

from opdgeo.diagnostics.update import Settings, Update, Value, undefined

READS: tuple[str, ...] = ()


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    if update.base.norm == 0:
        return {"": undefined("the base matrix is zero")}
    ratio = update.norm / update.base.norm
    return {"": Value(ratio, 2 * ratio * update.norm_error, update.norm_method)}

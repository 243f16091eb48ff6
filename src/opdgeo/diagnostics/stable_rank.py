"""Stable rank ‖ΔW‖_F² / ‖ΔW‖₂² (PAPER §2): how many directions carry the update; between 1 and the rank."""

from __future__ import annotations

from opdgeo.diagnostics.update import UNMOVED, Settings, Update, Value, undefined

READS = ("top_k",)


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": undefined(UNMOVED)}
    spectrum = update.delta_spectrum
    largest = float(spectrum.sigma[0])
    value = (update.norm / largest) ** 2
    relative = update.norm_error + spectrum.error / largest
    return {"": Value(value, 2.1 * value * relative, spectrum.method)}

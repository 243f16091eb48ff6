"""‖ΔW‖₂, the largest singular value of the update (PAPER §3: the size that Wedin's and Weyl's bounds see)."""

from __future__ import annotations

from opdgeo.diagnostics.update import Settings, Update, Value

READS = ("top_k",)


def variants(settings: Settings) -> list[str]:
    return [""]


def measure(update: Update) -> dict[str, Value]:
    if not update.moved:
        return {"": Value(0.0, 0.0, "count")}
    spectrum = update.delta_spectrum
    return {"": Value(float(spectrum.sigma[0]), spectrum.error, spectrum.method)}

"""Lines of the arms of a study: means over seeds, and the spread of these."""

from __future__ import annotations

from dataclasses import replace

from opdgeo.report.charts import Series, style_of
from opdgeo.report.glossary import arm_label


def over_seeds(
    lines: list[tuple[str, list[dict[int, float]]]], nulls: dict[str, list[dict[int, float]]] | None = None
) -> list[Series]:
    """A line an arm. `lines` holds an arm's name and step → value for every seed."""
    known = [arm for arm, _ in lines]
    out = []
    for arm, seeds in lines:
        steps = sorted(set.intersection(*(set(s) for s in seeds))) if seeds else []
        if not steps:
            continue
        columns = [[s[t] for s in seeds] for t in steps]
        spread = len(seeds) > 1
        null = None
        if nulls and nulls.get(arm):
            null = [_mean([n[t] for n in nulls[arm] if t in n]) for t in steps]
        low, high = ([of(c) for c in columns] if spread else None for of in (min, max))
        means = [sum(c) / len(c) for c in columns]
        line = Series(arm_label(arm), [float(t) for t in steps], means, low=low, high=high, null=null)
        out.append(replace(line, style=style_of(arm, known)))
    return out


def against_step(series: list[Series]) -> tuple[list[Series], str]:
    """Arms of different length are drawn against the share of their training, so that one does not squeeze the others."""
    ends = {s.x[-1] for s in series}
    if len(ends) < 2 or min(ends) <= 0:
        return series, "step"
    return [replace(s, x=[x / s.x[-1] for x in s.x]) for s in series], "share of the arm's training, %"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None

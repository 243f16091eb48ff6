"""What training reached: accuracy, distance to the teacher and completion length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdgeo.report import charts
from opdgeo.report.charts import Scale
from opdgeo.report.glossary import arm_order, split_seed
from opdgeo.report.sections.over_seeds import against_step, over_seeds
from opdgeo.report.sections.section import Figure, Section, View
from opdgeo.report.terminal import OUTCOMES

CURVES = (
    ("accuracy_greedy", "Accuracy, greedy, %", "share"),
    ("accuracy_sampled", "Accuracy, sampled, %", "share"),
    ("kl_teacher", "KL to the teacher, nats", "number"),
    ("completion_length", "Completion length, tokens", "number"),
)


@dataclass(frozen=True)
class Outcomes:
    """`table` is claims.json's `outcomes`, by arm; `columns` holds key, head and unit."""

    charts: list[Figure]
    table: dict[str, Any]
    columns: tuple[tuple[str, str, str], ...]


def find(view: View) -> Outcomes | None:
    grouped: dict[str, list[list[dict[str, Any]]]] = {}
    for folder, rows in view.results.logs.items():
        evaluated = [r for r in rows if r.get("event") == "eval" and r.get("step") is not None]
        grouped.setdefault(split_seed(folder)[0], []).append(evaluated)
    drawn = []
    for key, title, unit in CURVES:
        lines = []
        for arm in arm_order(set(grouped)):
            seeds = [{r["step"]: r[key] for r in rows if r.get(key) is not None} for rows in grouped[arm]]
            lines.append((arm, [s for s in seeds if s]))
        if series := over_seeds(lines):
            drawn.append(view.draw(charts.trajectory(f"log-{key}", title, Scale(unit), *against_step(series))))
    return Outcomes(drawn, view.claims.get("outcomes") or {}, OUTCOMES) if drawn else None


SECTION = Section("training", "What training reached", "Training", find)

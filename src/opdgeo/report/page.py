"""The HTML page: its sections, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opdgeo.report.charts import Chart
from opdgeo.report.data import Results
from opdgeo.report.glossary import clean, stem
from opdgeo.report.sections import (
    alike,
    experts,
    judged,
    maps,
    outcomes,
    provenance,
    sizes,
    spectra,
    trajectories,
    values,
    verdict,
)
from opdgeo.report.sections.section import Section, View
from opdgeo.report.view import environment

SECTIONS: tuple[Section[Any], ...] = (
    verdict.SECTION,
    sizes.FIRST,
    sizes.OTHERS,
    judged.SECTION,
    outcomes.SECTION,
    alike.SECTION,
    values.SECTION,
    maps.SECTION,
    experts.SECTION,
    trajectories.SECTION,
    spectra.SECTION,
    provenance.SECTION,
)


@dataclass(frozen=True)
class Title:
    head: str
    sub: str


def build(results: Results) -> tuple[str, list[Chart]]:
    """The page as HTML text and the charts in it, in the order of the page."""
    view, templates = View(results), environment()
    shown = []
    for section, data in _sections(view):
        template = templates.get_template(f"sections/{section.id}.html.j2")
        shown.append((section, Markup(template.render(data=data, view=view))))
    page = templates.get_template("page.html.j2")
    return page.render(title=_title(results), sections=shown), view.charts


def charts_of(results: Results) -> list[Chart]:
    """The charts of the page alone, none of them drawn."""
    view = View(results)
    for _ in _sections(view):
        pass
    return view.charts


def _sections(view: View) -> Iterator[tuple[Section[Any], Any]]:
    """The sections that apply, in the order of the page, and what each shows."""
    opening = (sizes.FIRST,) if view.kind == "reproduce" else ()  # the picture of a study comes before its words
    for section in dict.fromkeys((*opening, *SECTIONS)):
        data = section.find(view)
        if data is not None:
            yield section, data


def _title(results: Results) -> Title:
    if results.kind == "reproduce":
        preset = (results.claims or {}).get("preset")
        sub = f"opdgeo reproduce, preset {clean(preset)}" if preset else "opdgeo reproduce"
        return Title("SFT, OPD and RLVR: where the weights moved", sub)
    base = clean(stem((results.run.get("base") or {}).get("path", "base")), 60)
    return Title("Where the weights moved", f"{base} → {clean(results.summary[-1]['checkpoint'], 60)}")

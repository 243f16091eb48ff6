"""Where the numbers come from: run, settings, checkpoints, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opdgeo.report.data import Results
from opdgeo.report.sections.section import MAX_LISTED, Section, View
from opdgeo.report.sections.verdict import skipped


@dataclass(frozen=True)
class Pairing:
    """Which tensors of two checkpoints were measured; `entry` is its entry in run.json."""

    arm: str
    entry: dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint and its files; `entry` is its entry in run.json."""

    name: str
    entry: dict[str, Any]


@dataclass(frozen=True)
class Provenance:
    settings: list[tuple[str, Any]]
    versions: list[tuple[str, str]]
    timings: list[tuple[str, Any]]
    manifests: list[Manifest]
    pairings: list[Pairing]
    problems: list[dict[str, Any]]
    limit: int = MAX_LISTED


def find(view: View) -> Provenance:
    run = view.run
    parts = run.get("arms") or {"": {key: run.get(key) for key in ("base", "checkpoints", "pairing")}}
    return Provenance(
        settings=list(_flat(run.get("settings") or {})),
        versions=list((run.get("versions") or {}).items()),
        timings=list(_flat(run.get("timings") or {})),
        manifests=_manifests(parts.values()),
        pairings=_pairings(parts),
        problems=_problems(view.everything),
    )


def _manifests(parts: Iterable[dict[str, Any]]) -> list[Manifest]:
    """Every checkpoint once, though arms share a base."""
    found: dict[tuple[Any, Any], Manifest] = {}
    for part in parts:
        named = [("base", part.get("base") or {}), *(("checkpoint", c) for c in part.get("checkpoints") or [])]
        for role, one in named:
            if one:
                manifest = Manifest(one.get("checkpoint") or role, one)
                found.setdefault((one.get("path"), one.get("checkpoint")), manifest)
    return list(found.values())


def _pairings(parts: dict[str, dict[str, Any]]) -> list[Pairing]:
    """One an arm, or a single one where all arms' are the same."""
    pairings = [Pairing(arm, part["pairing"]) for arm, part in parts.items() if part.get("pairing")]
    if pairings and all(p.entry == pairings[0].entry for p in pairings):
        return [Pairing("", pairings[0].entry)]
    return pairings


def _problems(results: Results) -> list[dict[str, Any]]:
    """Matrices skipped as a whole; one more than the page lists, so that it can say that there are more."""
    return skipped(results).head(MAX_LISTED + 1).to_dicts()


def _flat(data: dict[str, Any], before: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value if not isinstance(value, list) else ", ".join(map(str, value))


SECTION = Section("provenance", "Provenance", "Provenance", find)

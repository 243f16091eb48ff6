"""A study as a page of text, for a repository's documentation: from claims.json and run.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.report import apart, limits
from opdgeo.report.data import load
from opdgeo.report.glossary import about, arm_label, number
from opdgeo.report.pairs import of_study
from opdgeo.report.terminal import OUTCOMES, unit_of


def write_markdown(out: Path, path: Path) -> Path:
    """Write what the study in `out` found to `path`: what holds, what fails, what is only size; every number is the data's.

    Raises:
        ConfigError: `out` is no finished study.
    """
    results = load(out)
    claims = results.claims
    if claims is None:
        raise ConfigError(
            f"{out} holds no claims.json; expected the folder of a finished study. Run opdgeo reproduce first."
        )
    judged = claims["claims"]
    lines = ["# What the study found", "", *_made_by(results.run, claims), ""]
    if claims.get("rehearsal"):
        lines += ["**A rehearsal: every arm trained for a few steps. The numbers mean nothing.**", ""]
    lines += [*_limits(claims), ""]
    lines += ["| | claim | as the paper compares | after matching |", "|---|---|---|---|"]
    lines += [f"| {c['id']} | {c['claim']} | {c['verdict']} | {c.get('after_matching', '')} |" for c in judged]
    lines += ["", *_in_words(judged), ""]
    for claim in judged:
        lines += _claim(claim)
    lines += apart.as_text(claims)
    lines += ["## What training reached", "", *_outcomes(claims.get("outcomes") or {}), ""]
    lines += _alike(claims)
    if left := claims.get("left_out"):
        lines += ["## Left out", "", *(f"* {line}" for line in left), ""]
    lines += [
        "For bf16 values the η = 1e-3 rule of the sparsity is the same as inequality of the bits: neighbouring bf16 numbers differ "
        "by at least 2⁻⁸ relative. Small weights have finer spacing, so a small isotropic update looks sparse and low-magnitude "
        "too: read those claims beside their null and their excess.",
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def _made_by(run: dict[str, Any], claims: dict[str, Any]) -> list[str]:
    command = " ".join(run.get("command") or [])
    return [
        f"Written by `opdgeo report OUT --markdown FILE` from the data files of `{command}`: preset {claims.get('preset')}, "
        f"study {claims.get('study', 'small')}, {len(claims.get('seeds') or [0])} seeds. Machine: {run.get('platform')}; "
        f"{run.get('seconds', 0) / 60:.0f} minutes for this call (finished parts are kept from call to call). "
        "The rules were written before the run (`src/opdgeo/experiments/rules.py`); "
        "`python tests/recompute_claims.py OUT` computes every number once more from the data files.",
    ]


def _limits(claims: dict[str, Any]) -> list[str]:
    """What the study can and cannot decide, with the noise control beside the arms."""
    first, *others = limits.paragraphs(claims)
    lines = [f"**What this can and cannot decide.** {first}", ""]
    if found := limits.rows(claims):
        head = " | ".join(name for _, name, _ in limits.COLUMNS)
        lines += [f"| | lr | sequences | {head} |", "|---" * (len(limits.COLUMNS) + 3) + "|"]
        for row in found:
            cells = []
            for key, _, unit in limits.COLUMNS:
                null = row.get(f"{key}_null")
                cells.append(number(row.get(key), unit) + ("" if null is None else f" ({number(null, unit)})"))
            name = limits.ARMS.get(row["arm"], arm_label(row["arm"])) + (
                ", exploratory" if row.get("exploratory") else ""
            )
            budget = f"{row.get('learning_rate') or 0:g} | {row.get('sequences') or '–'}"
            lines.append(f"| {name} | {budget} | " + " | ".join(cells) + " |")
        lines += ["", limits.note(claims), ""]
    return [*lines, " ".join(others)]


def _in_words(judged: list[dict[str, Any]]) -> list[str]:
    """Which claims hold, which fail, and which of those that hold are only size."""

    def named(*wanted: tuple[str, str]) -> str:
        ids = [c["id"] for c in judged if (c["verdict"], c.get("after_matching", "")) in wanted]
        return ", ".join(ids) or "none"

    after = ("", "does not", "inconclusive", "still holds")
    against = {
        "Reversed": ("reversed",),
        "No difference": ("no difference",),
        "Fails": ("fails",),
        "Open": ("open", "inconclusive"),
    }
    lines = [
        f"* Holds, and still holds at equal size with a matched SFT: {named(('holds', 'still holds'))}.",
        f"* Holds as the paper compares, but not after matching (size, start, learning rate or steps): {named(('holds', 'does not'))}.",
        f"* Holds as the paper compares; open after matching: {named(('holds', 'inconclusive'))}.",
    ]
    for title, verdicts in against.items():
        if (found := named(*((v, a) for v in verdicts for a in after))) != "none":
            lines.append(f"* {title}: {found}.")
    return lines


def _claim(claim: dict[str, Any]) -> list[str]:
    unit = unit_of(claim.get("unit"))
    lines = [f"## {claim['id']}: {claim['claim']}", ""]
    lines += [f"{claim['rule']} In the paper: {claim.get('paper', '')}.", ""]
    lines += [
        f"**{claim['verdict']}**; after matching: **{claim.get('after_matching', '')}**. {claim.get('explanation', '')}.",
        "",
    ]
    if measured := claim.get("measured"):
        ratio = about(str(claim.get("diagnostic"))).ratio
        excess_unit = "number" if ratio else "points"
        lines += ["| arm | mean [95 %] | seeds | null | excess over the null |", "|---|---|---|---|---|"]
        for arm, got in measured.items():
            interval = f"{number(got['mean'], unit)} [{number(got['low'], unit)}, {number(got['high'], unit)}]"
            above = "" if "excess" not in got else number(got["excess"], excess_unit, signed=not ratio)
            lines.append(
                f"| {arm_label(arm)} | {interval} | {len(got['seeds'])} | {number(got.get('null'), unit)} | {above} |"
            )
        lines.append("")
    if recovery := claim.get("recovery"):
        lines += [f"Recovery = (constrained − frozen) / (free − frozen), K = {claim.get('k')}:", ""]
        lines += ["| | constraint | recovery [95 %] | outside the channel |", "|---|---|---|---|"]
        for paradigm, kinds in recovery.items():
            for what, got in kinds.items():
                outside = (claim["measured"].get(f"s1-{paradigm}-{what}") or {}).get("outside")
                lines.append(
                    f"| {arm_label(paradigm)} | {what} | {number(got['mean'], 'number')} [{number(got['low'], 'number')}, "
                    f"{number(got['high'], 'number')}] | {number(outside, 'number')} |"
                )
        lines.append("")
    if controls := claim.get("controls"):
        lines += ["| control | verdict | |", "|---|---|---|"]
        lines += [f"| {c.get('name', c['control'])} | {c['verdict']} | {c.get('explanation', '')} |" for c in controls]
        lines.append("")
    return lines


def _outcomes(outcomes: dict[str, Any]) -> list[str]:
    head = " | ".join(name for _, name, _ in OUTCOMES)
    lines = [f"| arm | {head} |", "|---" * (len(OUTCOMES) + 1) + "|"]
    for arm, reached in outcomes.items():
        cells = []
        for key, _, unit in OUTCOMES:
            ends = reached.get(key)
            shown = [number(ends[at]["mean"], unit) for at in ("start", "end")] if ends else []
            cells.append(" → ".join(shown))
        lines.append(f"| {arm_label(arm)} | " + " | ".join(cells) + " |")
    return lines


def _alike(claims: dict[str, Any]) -> list[str]:
    """How alike the arms' last updates are, a sentence a pair; nothing where the study did not relate them."""
    between, among = of_study(claims)
    said = [between.said(*pair) for pair in between.by_likeness()] + (among.sentences() if among.by_likeness() else [])
    if not said:
        return []
    text = "An open question of the paper's, reported without a verdict. Of every two arms that start from the same SFT checkpoint: their last updates, "
    text += "means over seeds, and in brackets what two independent isotropic updates of the same sizes have."
    if among.by_likeness():
        text += " At the end two runs of SFT from the shared base, in different seeds."
    sentences = ("".join(part if isinstance(part, str) else number(*part) for part in parts) for parts in said)
    return ["## Do these updates move alike?", "", text, "", *(f"* {sentence}" for sentence in sentences), ""]

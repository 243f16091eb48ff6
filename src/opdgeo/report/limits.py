"""What a study can and cannot decide: the paragraph and the noise control's rows that stand above its verdicts, on the page and in text."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    ("norm", "‖ΔW‖", "number"),
    ("unchanged", "unchanged in bf16", "share"),
    ("stable_rank", "stable rank", "number"),
    ("angle", "angle", "degrees"),
    ("shift", "spectral shift", "number"),
    ("low_magnitude", "low-magnitude overlap", "share"),
    ("similarity", "Sim₁₆, first with last", "share"),
)
"""Keys of a row of claims.json's `noise` (each with its null under `KEY_null`), in the order of the table."""

ARMS = {"coin": "coin flips (noise)", "opd-random-sign": "OPD, random signs (noise)"}

CANNOT = (
    "A verdict below is one of this learning rate, these batches and this number of steps. “Fails” merges three things: a reversed order, "
    "no difference, and a difference smaller than a margin that was set beforehand. In another regime the same rules can give the "
    "opposite verdict, so none of them says what a paradigm does in general.",
    "Intervals are percentile bootstraps. Over three seeds one holds the truth in about three of four studies, not in nineteen of twenty; "
    "of an arm with one seed it is over matrices alone and says nothing of another run. Those of S1 are too wide, about twice: the outcomes "
    "of the same prompts are drawn anew for each arm, as if they were not the same.",
)
SEEDS = (
    "A verdict below is one of this learning rate, these batches and this number of steps. In another regime the same rules can give "
    "another one, so none of them says what a paradigm does in general.",
    "The unit of replication is the seed: intervals are Student's over seeds, within which the arms share anchor and prompts. One seed has no "
    "interval, so every verdict of a study of one seed is open.",
)
"""The same of a study that is judged by the protocol."""


def rows(claims: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of the table: the study's own arms, then those of the exploratory runs that the package carries."""
    noise = claims.get("noise") or {}
    return [*(noise.get("rows") or []), *(r | {"exploratory": True} for r in noise.get("exploratory") or [])]


def paragraphs(claims: dict[str, Any]) -> list[str]:
    """What the study can and cannot decide, as plain text."""
    shown = rows(claims)
    noise = [row for row in shown if row["arm"] in ARMS]
    if not noise:
        first = (
            "This study trained no noise control, so nothing in it says how much of an update is learning and how much the optimizer "
            "makes of noise. No claim of a paradigm, or of structure, follows from it."
        )
    else:
        first = (
            "A noise control is trained as its arm is, for the same steps, on rewards or signs of fair coin flips: there is nothing to "
            "learn, and its update is what the optimizer makes of noise. Only what differs from that row can be the work of an objective. "
            "Length, unchanged share, angles, overlaps and a stable rank far below an isotropic update's are all there without learning."
        )
    return [first, *(SEEDS if claims.get("protocol") else CANNOT)]


def note(claims: dict[str, Any]) -> str:
    """Where the table's rows come from."""
    parts = [
        "Means over matrices at the last checkpoint, in brackets the isotropic null of the same size (for Sim₁₆ a random walk)."
    ]
    if any(row.get("exploratory") for row in rows(claims)):
        parts.append("Rows marked exploratory are of one seed that no verdict counts.")
    if early := sorted({row["source"] for row in rows(claims) if row.get("source")}):
        parts.append(f"Those without a null: {'; '.join(early)}.")
    return " ".join(parts)

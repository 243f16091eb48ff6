"""The locking step of a run: the first step from which Sim_K to the final update stays at or above a threshold.

The paper reads locking off a curve by eye (PAPER §1, L4). The step depends on the threshold, so it is given over `THRESHOLDS`.
It is given again for the curve of the walk null, which locks too: later points of a walk look alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from opdgeo.diagnostics.diagnostic import PAPER, Diagnostic, Live, Part
from opdgeo.diagnostics.rows import compared
from opdgeo.diagnostics.stable_rank import DIAGNOSTIC as STABLE_RANK
from opdgeo.diagnostics.subspace_similarity import DIAGNOSTIC as SIMILARITY
from opdgeo.diagnostics.subspace_similarity import SHOWN, SIDES, name, parts, ranks

if TYPE_CHECKING:
    import polars as pl

    from opdgeo.diagnostics.kinds import OfRun

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
TOLD = 0.8  # the threshold of the one sentence


def locking_step(steps: Sequence[int], similarities: Sequence[float | None], threshold: float) -> int | None:
    """The earliest of `steps`, in order of training, from which no similarity is below `threshold`; None if there is none.

    The similarity of the last point to itself is 1 and says nothing, so the caller leaves it out. An unknown similarity counts
    as below.

    >>> locking_step([10, 20, 30, 40], [0.9, 0.6, 0.8, 0.95], 0.7)
    30
    """
    locked = None
    for step, value in zip(reversed(steps), reversed(similarities), strict=True):
        if value is None or value < threshold:
            break
        locked = step
    return locked


def measure(measurements: pl.DataFrame) -> list[dict[str, Any]]:
    """Where every run's Sim_K to its final checkpoint locks, for every K and side, over a range of thresholds.

    `step`: of the mean over matrices. `null_step`: of the mean of their walk nulls. `median_step`: the step by which half of
    the matrices have locked, one by one. None: not before the last checkpoint. A checkpoint without a step counts as its place.
    """
    import polars as pl

    final = measurements.filter(
        (pl.col("diagnostic") == SIMILARITY.name) & pl.col("variant").str.starts_with("final.")
    ).with_columns(run=pl.col("checkpoint").str.extract(r"^(.+)/", 1).fill_null(""))
    found = []
    for (run, variant), rows in final.group_by("run", "variant", maintain_order=True):
        places: dict[str, list[int]] = {}  # of the rows of each checkpoint: to cut a table into small ones takes longer
        for place, checkpoint in enumerate(rows["checkpoint"]):
            places.setdefault(checkpoint, []).append(place)
        at = list(places.values())
        every = rows["step"].to_list()
        steps = [every[here[0]] for here in at]
        if None in steps:
            steps = list(range(1, len(at) + 1))
        order = sorted(range(len(at)), key=lambda i: steps[i])[:-1]  # the last one equals itself
        if not order:
            continue
        at, steps = [at[i] for i in order], [steps[i] for i in order]
        curve, chance = (_means(rows, at, column) for column in ("value", "null_mean"))
        matrices, values = rows["matrix"].to_list(), rows["value"].to_list()
        known = [{matrices[i]: values[i] for i in here} for here in at]
        alone = [[by_matrix.get(matrices[i]) for by_matrix in known] for i in at[-1]]
        _, side, k = parts(str(variant))
        found.append(
            {
                "run": run,
                "side": side,
                "rank": k,
                "steps": steps,
                "thresholds": list(THRESHOLDS),
                "step": [locking_step(steps, curve, t) for t in THRESHOLDS],
                "null_step": [locking_step(steps, chance, t) for t in THRESHOLDS],
                "median_step": [_median_step([locking_step(steps, a, t) for a in alone]) for t in THRESHOLDS],
            }
        )
    return found


def _means(rows: pl.DataFrame, places: list[list[int]], column: str) -> list[float | None]:
    """The mean of a column over the matrices of each checkpoint, whose rows stand at `places`."""
    valued, nulled = (rows[name].is_not_null().to_numpy() for name in ("value", "null_mean"))
    numbers, present = rows[column].to_numpy(), rows[column].is_not_null().to_numpy()
    means: list[float | None] = []
    for here in places:
        known = numbers[here][compared(valued[here], nulled[here]) & present[here]]
        means.append(float(known.mean()) if len(known) else None)
    return means


def _median_step(steps: list[int | None]) -> int | None:
    """The step by which at least half have locked."""
    known = sorted(s for s in steps if s is not None)
    half = (len(steps) + 1) // 2
    return known[half - 1] if 0 < half <= len(known) else None


def answer(checkpoints: list[dict[str, Any]], rows: list[dict[str, Any]]) -> list[Part] | None:
    """How early the final subspace is there, and from when on it stays.

    Past the directions that carry the update the rest is noise, and Sim_K of noise is that of chance. So the largest K leads that is
    not above the stable rank of the final update (its mean over matrices, rounded), at least 1 and at most 16; the paper's K = 16
    stands behind it. Of a K without a value the next smaller one is told, and the reason.

    `checkpoints` are those of one run in `summary.json`, `rows` what `measure` found of it.
    """
    unit = "step" if all(c.get("step") is not None for c in checkpoints) else "checkpoint"
    of = [{d["variant"]: d for d in c["diagnostics"] if d["diagnostic"] == SIMILARITY.name} for c in checkpoints]
    place = next((i for i, known in enumerate(of[:-1]) if any(d["mean"] is not None for d in known.values())), 0)
    right = [r for r in rows if r["side"] == "right" and r["rank"] <= SHOWN and r.get("steps")]
    why, told = None, []
    for row in sorted(right, key=lambda r: -r["rank"]):
        variant = name("final", "right", row["rank"])
        entry = of[place].get(variant, {})
        if entry.get("mean") is not None:
            told.append((row, entry))
        elif not told and not why:
            # The last checkpoint is compared with itself: what it lacks, the final update lacks.
            final = of[-1].get(variant, {}).get("reason")
            if reason := final or entry.get("reason"):
                why = f"at {checkpoints[-1 if final else place]['checkpoint']}, {reason}"
    if not told:
        return [f"How early the final subspace is there has no answer: {why}."] if why else None
    carried = _stable_rank(checkpoints[-1])
    widest, entry = told[0]
    led = [one for one in told if one[0]["rank"] <= max(1, round(carried))] if carried is not None else []
    lead = led[0] if led else told[0]
    said: list[Part] = ["The final subspace, top ", (lead[0]["rank"], "integer"), " right"]
    if lead[0] is not widest and carried is not None:
        said += [" (the stable rank of the final update is ", (carried, "number"), ")"]
    said += [f": at {unit} ", (lead[0]["steps"][place], "integer")]
    said += [", the first that moved, " if place else ", the first checkpoint, ", *_there(*lead, unit), "."]
    if lead[0] is not widest:
        said += [" The wider top ", (widest["rank"], "integer"), ": ", *_there(widest, entry, unit), "."]
    return [*said, f" K = {SHOWN}: {why}."] if why else said


def _stable_rank(checkpoint: dict[str, Any]) -> float | None:
    """The mean over matrices, None where it is not known."""
    found = (d["mean"] for d in checkpoint["diagnostics"] if d["diagnostic"] == STABLE_RANK.name)
    return next(found, None)


def _there(row: dict[str, Any], entry: dict[str, Any], unit: str) -> list[Part]:
    """How much of a subspace is there, and from when on it is nearly all, each beside the walk null."""
    at = min(range(len(row["thresholds"])), key=lambda i: abs(row["thresholds"][i] - TOLD))
    chance = (entry["null"] or {}).get("mean")
    said: list[Part] = [(entry["mean"], "share"), " of it is there"]
    said += [] if chance is None else [" (walk null: ", (chance, "share"), ")"]
    said += [", and at least ", (row["thresholds"][at], "share"), *_from(unit, row["step"][at])]
    return said if chance is None else [*said, " (walk null:", *_from(unit, row["null_step"][at]), ")"]


def _from(unit: str, step: int | None) -> list[Part]:
    return [" only at the last checkpoint"] if step is None else [f" from {unit} ", (step, "integer"), " on"]


def label(variant: str) -> str:
    side, _, k = variant.partition(".")
    return f"K = {k}, {side}"


DIAGNOSTIC: OfRun = Diagnostic(
    name="locking",
    scope="run",
    counts="optimizer steps",
    of=SIMILARITY.name,
    variants=lambda settings: [f"{side}.{k}" for side in SIDES for k in ranks(settings)],
    measure=measure,
    title="Locking step",
    formula="min { t : Sim_K(s, end) ≥ threshold for all checkpoints s from t on }",
    meaning="The locking step is the first checkpoint from which Sim_K to the final update stays at or above the threshold, of the "
    "mean over matrices. The last checkpoint is left out, as it equals itself.",
    caveat="The null is the same step of the walk's curve, for a walk locks too. Only a lock well before the walk's says that the "
    "channel was found early. The threshold is a choice, so the step is given for all of them. Beyond the stable rank of the update "
    "its directions are mostly noise, and those of a K above it lock late or never.",
    example="Similarities 0.4, 0.7, 0.6, 0.9 at steps 10, 20, 30, 40 of 50: locked above 0.5 from step 20 on, above 0.8 from step 40 on.",
    source=f"this program; {PAPER}, §1, L4, reads it off the curve of the similarity",
    answer=answer,
    label=label,
    listed=lambda variant: variant == f"right.{SHOWN}",
    live=(Live("locked_since"),),
    since=locking_step,
)

"""The confirmatory study's verdicts, map and page, from its units' files alone (`units.py`); nothing is trained.

    python -m opdgeo.experiments.confirmatory docs/results [--json FILE] [--page FILE.md] [--figure FILE.svg] [--sizes FILE.parquet]

reads docs/results/units/*.parquet, or with `--preset smollm2` docs/results/smollm2/*.parquet. A file counts when it was made by the rules as they are (their hash is in it), with a planned seed, and
is no rehearsal; every other file is named and left out. A claim is judged at a point when all planned seeds are there, and over
the regime when all its points are: before that it is open, and what is known so far stands beside it.

SFT in a verdict is the matched SFT, which has OPD's start, learning rate, steps and sequences; with the anchor's own SFT, as the
paper compares, the same is reported beside. The noise arm in each learning arm's place is judged by the same rule.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from opdgeo.diagnostics import DIAGNOSTICS
from opdgeo.errors import ConfigError
from opdgeo.experiments import regime, related
from opdgeo.experiments.claims import Content, Data, accuracy_samples, compare, compared_again, controls_of
from opdgeo.experiments.distances import APART, at_the_end, from_null
from opdgeo.experiments.reduced import SCHEMA, unpacked
from opdgeo.experiments.regime import MAIN, TINY, Point, Regime
from opdgeo.experiments.rules import (
    ACCURACY,
    CLAIMS,
    COHERENCE,
    EXPLORATORY,
    NOISE,
    NORM,
    OPD,
    PERSISTENCE,
    RLVR,
    SFT,
    SPARSITY,
    STABLE_RANK,
    Claim,
    Quantity,
)
from opdgeo.experiments.statistics import MOST_SEEDS, OPEN, over_the_regime, t_interval, would_show
from opdgeo.files import atomic_path, write_atomically
from opdgeo.report.apart import NOTE, TITLE

PRIMARY = "matched SFT"
"""The control whose reading is the verdict where a claim is about SFT."""
SHOWN = (NORM, SPARSITY, STABLE_RANK, PERSISTENCE, COHERENCE, ACCURACY)
OWN = "as the paper compares"
T_SEEDS = 3
"""With fewer seeds, whether an arm learned is read over prompts, seed by seed (docs/protocol.md)."""


@dataclass(frozen=True)
class Units:
    """The files that count: their rows with a column `point`, what each says of itself, and what was left out and why.

    `relations` are the rows of pairs (`related.py`), with a column `point` too; the first units that were kept have none.
    """

    rows: pl.DataFrame
    about: list[dict[str, Any]]
    left_out: dict[str, str]
    relations: pl.DataFrame = field(default_factory=lambda: pl.DataFrame(schema=related.COLUMNS | {"point": pl.String}))
    of: Regime = TINY

    def at(self, point: Point) -> pl.DataFrame:
        """The rows of a point, borrowed arms included."""
        parts = [self.rows.filter(pl.col("point") == point.name)]
        for arm, other in point.borrows.items():
            parts.append(self.rows.filter(pl.col("point") == other, pl.col("arm") == arm))
        return pl.concat(parts).drop("point")


def load(folder: Path, of: Regime = TINY) -> Units:
    """Read every unit's file in `folder`.

    Raises:
        ConfigError: there is no such folder, or a file in it is no unit's.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder {folder}; expected the finished units of `python -m opdgeo.experiments.units`."
        )
    points = of.by_name
    rows, about, left_out = [pl.DataFrame(schema=SCHEMA | {"point": pl.String})], [], dict[str, str]()
    relations = [pl.DataFrame(schema=related.COLUMNS | {"point": pl.String})]
    for path in sorted(folder.glob("*.parquet")):
        said = pl.read_parquet_metadata(path)
        if not {"point", "seed", "rules"} <= said.keys() or said["point"] not in points:
            raise ConfigError(
                f"{path} is no unit of the confirmatory study of {of.preset}; expected a file that units.py wrote."
            )
        point, seed = points[said["point"]], int(said["seed"])
        reason = ""
        counts = regime.counting(point, of)
        if said["rules"] not in counts or json.loads(said["begun"])["rules"] != said["rules"]:
            reason = f"made by rules {said['rules']}, not {regime.rules_hash(of)}"
        elif said["rehearsal"] == "True":
            reason = "a rehearsal"
        elif seed in EXPLORATORY or seed not in regime.planned(point):
            reason = f"seed {seed} is exploratory or not planned"
        if reason:
            left_out[path.name] = reason
            continue
        about.append(
            {
                k: json.loads(v) if k in ("begun", "settings", "minutes", "versions") else v
                for k, v in said.items()
                if k != "ARROW:schema"
            }
        )
        table = pl.read_parquet(path).with_columns(point=pl.lit(point.name))
        if "over" in table.columns:
            relations.append(table.filter(pl.col("over").is_not_null()).select(*related.COLUMNS, "point"))
            table = table.filter(pl.col("over").is_null())
        rows.append(table.select(*SCHEMA, "point"))
    return Units(pl.concat(rows), about, left_out, pl.concat(relations), of)


def judged(units: Units) -> dict[str, Any]:
    """Every claim over the regime: the content of the confirmatory claims.json."""
    of = units.of
    data = {point.name: Data(units.at(point)) for point in of.points}
    claims = [found for claim in CLAIMS if (found := _claim(claim, of, data))]
    return {
        "preset": of.preset,
        "study": "confirmatory",
        "protocol": {"version": of.version, "frozen": of.frozen, "rules": regime.rules_hash(of)},
        "regime": [
            {
                "name": p.name,
                "text": p.text,
                "seeds": p.seeds,
                "first": regime.FIRST,
                "borrows": p.borrows,
                "rules": sorted(regime.counting(p, of)),
            }
            for p in of.points
        ],
        "seeds": sorted({int(unit["seed"]) for unit in units.about}),
        "claims": claims,
        "arms": [row for point in of.points for row in _arms(point, data[point.name])],
        "gains": [row for point in of.points if point.seeds < T_SEEDS for row in gains(units, point)],
        "sizes": sizes(units).to_dicts(),
        "related": [
            {"point": point.name} | row
            for point in of.points
            for row in related.over_seeds(units.relations.filter(point=point.name).drop("point"))
        ],
        "units": units.about,
        "left_out": units.left_out,
    }


def points_of(claim: Claim, of: Regime = TINY) -> list[Point]:
    """The points whose arms a claim can be judged on."""
    return [p for p in of.points if set(claim.arms) <= set(p.all_arms)]


def _claim(claim: Claim, of: Regime, data: dict[str, Data]) -> dict[str, Any] | None:
    points = points_of(claim, of)
    if not points:
        return None
    found = {point.name: _at(claim, point, data[point.name]) for point in points}
    whole = {name: compared_again(at["comparisons"]) for name, at in found.items() if at["complete"] and at["defined"]}
    over, each = over_the_regime(whole) if whole else (OPEN, {})
    for name, at in found.items():
        at["verdict"] = each.get(name, OPEN)
        at["also_without_learning"] = [
            noise for noise, said in at["noise"].items() if said["verdict"] == at["verdict"] != OPEN
        ]
        if name in whole and at["verdict"] == OPEN:
            at["would_show"] = would_show(whole[name], len(points))
    main = found.get(MAIN) or next(iter(found.values()))
    complete = len(whole) == len(found)
    return {
        "id": claim.id,
        "claim": claim.claim,
        "paper": claim.paper,
        "rule": claim.rule,
        "quantity": claim.quantity.name,
        "unit": claim.quantity.unit,
        "at": claim.at,
        "verdict": over if complete else OPEN,
        "so_far": over,
        "points_complete": [len(whole), len(found)],
        "measured": main["measured"],
        "points": found,
    }


def _at(claim: Claim, point: Point, data: Data) -> dict[str, Any]:
    """One claim at one point: the verdict's comparisons, the noise controls, and the readings that carry no verdict."""
    planned = regime.planned(point)
    name = ACCURACY.name if claim.quantity is ACCURACY else NORM.name
    seeds = data.seeds(point.all_arms, name)  # a unit is kept whole, and an arm that is borrowed may still be missing
    out: dict[str, Any] = {
        "seeds": seeds,
        "planned": len(planned),
        "complete": seeds == planned,
        "defined": False,
        "comparisons": [],
        "noise": {},
        "others": {},
        "measured": {},
    }
    if not seeds:
        return out
    if claim.quantity is ACCURACY:
        _, out["comparisons"] = compare(claim.comparisons, accuracy_samples(data, claim.arms, seeds), seeds)
        for own in claim.own_controls:
            used = list(dict.fromkeys(arm for c in own.comparisons for arm in c.arms))
            if data.seeds(used, name):
                verdict, comparisons = compare(own.comparisons, accuracy_samples(data, used, seeds), seeds)
                out["others"][own.name] = {"verdict": verdict, "comparisons": comparisons}
    else:
        controls = {control.name: control for control in controls_of(claim, data)}
        primary = controls.pop(PRIMARY, None) if SFT in claim.arms else None
        content = Content(data, claim, primary, list(claim.arms))
        _, out["comparisons"] = compare(claim.comparisons, content.samples(), content.seeds)
        index = 0 if claim.at.startswith("first") else -1
        for arm, values in content.tested.items():
            real = primary.arm(arm) if primary else arm
            out["measured"][real] = _interval(values[:, index])
        if primary:
            plain = Content(data, claim, None, list(claim.arms))
            verdict, comparisons = compare(claim.comparisons, plain.samples(), plain.seeds)
            out["others"][OWN] = {"verdict": verdict, "comparisons": comparisons}
        for control in controls.values():
            content = Content(data, claim, control, list(claim.arms))
            noise = control.name.startswith("noise in")
            tests = claim.matched if claim.matched and control.read != "last" else claim.comparisons
            if content.unmatched:
                said: dict[str, Any] = {"verdict": OPEN, "comparisons": [], "explanation": content.unmatched}
            else:
                verdict, comparisons = compare(tests, content.samples(), content.seeds)
                said = {"verdict": verdict, "comparisons": comparisons}
            out["noise" if noise else "others"][control.name] = said
    out["defined"] = bool(out["comparisons"]) and all(c["p"] for c in out["comparisons"])
    return out


def _interval(values: np.ndarray) -> dict[str, Any]:
    known = np.asarray(values, float)[np.isfinite(values)]
    if not len(known):
        return {"mean": None, "low": None, "high": None, "seeds": []}
    low, high = (float(end) for end in t_interval(known))
    ends = {"low": low, "high": high} if np.isfinite(low) else {"low": None, "high": None}
    return {"mean": float(known.mean()), **ends, "seeds": known.tolist()}


def _arms(point: Point, data: Data) -> list[dict[str, Any]]:
    """What every arm of a point is at its end, and what it gained in accuracy: a noise arm must gain none."""
    rows = []
    for arm in point.all_arms:
        row: dict[str, Any] = {"point": point.name, "arm": arm}
        for q in SHOWN:
            if seeds := data.seeds([arm], q.name):
                row[q.name] = _interval(np.array([[*data.evaluated(arm, q.name, seed).values()][-1] for seed in seeds]))
        gains = [[*data.evaluated(arm, ACCURACY.name, seed).values()] for seed in data.seeds([arm], ACCURACY.name)]
        if gains and point.name != regime.S1:
            row["gain"] = _interval(np.array([found[-1] - found[0] for found in gains]))
        if len(row) > 2:
            rows.append(row)
    return rows


def sizes(units: Units) -> pl.DataFrame:
    """How far every arm is from the null of its own size: the rows of `distances.from_null` with a column `point`, in their order."""
    order = {point.name: place for place, point in enumerate(units.of.points)}
    found = from_null(units.rows, ("point", "arm"))
    return found.sort(pl.col("point").replace_strict(order, return_dtype=pl.Int32), maintain_order=True)


def gains(units: Units, point: Point) -> list[dict[str, Any]]:
    """What each arm of a point gained in sampled accuracy, seed by seed, with Student's 95 % interval over the same prompts before and after."""
    count = units.of.evaluated["eval_prompts"]
    rows = units.at(point).filter(pl.col("name") == ACCURACY.name, pl.col("right").is_not_null()).sort("seed", "step")
    out = []
    for arm in point.all_arms:
        for (seed,), mine in rows.filter(arm=arm).group_by("seed", maintain_order=True):
            before, after = (unpacked(mine["right"][i], count).astype(float) for i in (0, -1))
            low, high = (float(end) for end in t_interval(after - before))
            ends = {"before": float(before.mean()), "after": float(after.mean())}
            out.append({"point": point.name, "arm": arm, "seed": seed, **ends, "low": low, "high": high})
    return out


def unlearned(found: dict[str, Any]) -> list[str]:
    """OPD or RLVR that did not gain accuracy in every seed, beyond the interval over prompts: of these nothing is said of an arm that learns."""
    without = [row for row in found["gains"] if row["arm"] in (OPD, RLVR) and not row["low"] > 0]
    return list(dict.fromkeys(f"{row['arm']} at {row['point']}" for row in without))


def void(found: dict[str, Any]) -> list[str]:
    """Noise arms that gained accuracy, more than NOISE_GAINS by their whole interval: a protocol whose noise learns is void until that is explained."""
    return [
        f"{row['arm']} at {row['point']}"
        for row in found["arms"]
        if row["arm"] in NOISE
        and row.get("gain")
        and row["gain"]["low"] is not None
        and row["gain"]["low"] > regime.NOISE_GAINS
    ]


# As text


def page(found: dict[str, Any]) -> str:
    """The results page: the map, the verdicts with noise beside them, and how far the study is."""
    of = regime.REGIMES[found["preset"]]
    shown = [point for point in of.points if point.name != regime.S1]
    counts = {p.name: len({u["seed"] for u in found["units"] if u["point"] == p.name}) for p in of.points}
    option = "" if of == TINY else f"--preset {of.preset} "
    lines = [
        f"# {of.title}",
        "",
        f"Written by `python -m opdgeo.experiments.confirmatory docs/results {option}--page FILE` from the units in docs/results/{of.folder}, by protocol "
        f"{of.version} (rules `{found['protocol']['rules']}`, fixed on {of.frozen}; [protocol.md](../protocol.md)). "
        f"`python tests/recompute_claims.py --units docs/results/{of.folder} FILE.json` computes every effect and verdict once more.",
        "",
        "Seeds finished: " + ", ".join(f"{p.name} {counts[p.name]} of {p.seeds}" for p in of.points) + ". "
        "A claim is judged at a point when all its planned seeds are there; until then it is open, and what is known so far is in brackets.",
        "",
    ]
    if wrong := void(found):
        lines += [
            f"**A noise arm gained accuracy ({', '.join(wrong)}): no verdict below counts until that is explained.**",
            "",
        ]
    if idle := unlearned(found):
        lines += [
            f"**Did not learn in every seed: {', '.join(idle)}** (below, “What was learned”). What is said of such an arm is not said of one that learns.",
            "",
        ]
    lines += [
        "| | claim | over the regime | " + " | ".join(p.name for p in shown) + " |",
        "|---" * (3 + len(shown)) + "|",
    ]
    for claim in found["claims"]:
        if list(claim["points"]) == [regime.S1]:
            continue
        cells = [_cell(claim["points"].get(p.name)) for p in shown]
        lines.append(f"| {claim['id']} | {claim['claim']} | {_over(claim)} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "*also without learning*: the same verdict is reached with a noise arm in a learning arm's place.",
        "",
    ]
    for claim in found["claims"]:
        lines += [f"## {claim['id']}: {claim['claim']}", "", f"{claim['rule']} In the paper: {claim['paper']}.", ""]
        lines += ["| point | reading | comparison | effect [95 %] | sign-flip p | said |", "|---|---|---|---|---|---|"]
        for name, at in claim["points"].items():
            for reading, said in (("verdict", at), *at["noise"].items(), *at["others"].items()):
                for c in said["comparisons"]:
                    lines.append(
                        f"| {name} | {reading} | {c['text']} | {_effect(c)} | {_p(c['sign_flip'])} | {c['outcome']} |"
                    )
        lines.append("")
    lines += _needed(found)
    lines += _learned(found["gains"])
    lines += [
        "## Arms",
        "",
        "| point | arm | ‖ΔW‖ | unchanged | stable rank | persistence | coherence | accuracy | gained |",
        "|---" * 9 + "|",
    ]
    for row in found["arms"]:
        cells = [_number(row.get(q.name)) for q in SHOWN]
        lines.append(f"| {row['point']} | {row['arm']} | " + " | ".join(cells) + f" | {_number(row.get('gain'))} |")
    lines += [
        "",
        f"## {TITLE}",
        "",
        NOTE,
        "",
        "| point | arm | " + " | ".join(_short(q) for q in APART) + " |",
        "|---" * (2 + len(APART)) + "|",
    ]
    last: dict[tuple[str, str], dict[str, Any]] = {}
    for row in at_the_end(found["sizes"], ("point", "arm")):
        last.setdefault((row["point"], row["arm"]), {})[row["name"]] = row
    for point, arm in dict.fromkeys((row["point"], row["arm"]) for row in found["sizes"]):
        at = last.get((point, arm), {})
        cells = [_number((row := at.get(q.name)) and {**row, "mean": row["excess"]}) for q in APART]
        lines.append(f"| {point} | {arm} | " + " | ".join(cells) + " |")
    lines += _related(found["related"])
    minutes = sum(sum(unit["minutes"].values()) for unit in found["units"])
    lines += [
        "",
        f"{len(found['units'])} units, {minutes:.0f} minutes of processor time, without what starts that were killed had taken.",
    ]
    if found["left_out"]:
        lines += ["", "Not counted: " + "; ".join(f"{name} ({why})" for name, why in found["left_out"].items()) + "."]
    return "\n".join(lines) + "\n"


def _needed(found: dict[str, Any]) -> list[str]:
    """How many seeds would decide what all planned seeds leave open; nothing where they leave nothing open."""
    rows = [
        f"| {claim['id']} | {name} | {at['would_show'][0]} | {at['would_show'][1] or f'> {MOST_SEEDS}'} | {at['planned']} |"
        for claim in found["claims"]
        for name, at in claim["points"].items()
        if "would_show" in at
    ]
    if not rows:
        return []
    return [
        "## What all planned seeds leave open",
        "",
        "If every effect and its standard deviation between seeds are as seen, so many seeds show the verdict in four of five studies. A plan for a next "
        "version, not a test: an effect near its margin needs very many, and a standard deviation of two seeds is hardly known.",
        "",
        "| claim | point | would be | seeds | planned here |",
        "|---|---|---|---|---|",
        *rows,
        "",
    ]


def _learned(rows: list[dict[str, Any]]) -> list[str]:
    """The table of `gains`; nothing where they are read over seeds."""
    if not rows:
        return []
    lines = [
        "## What was learned",
        "",
        "Sampled accuracy on the same held-out prompts before and after, seed by seed, and what was gained with Student's 95 % interval over prompts.",
        "",
        "| point | arm | seed | before | after | gained |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        gained = _number(row | {"mean": row["after"] - row["before"]})
        cells = [row["point"], row["arm"], row["seed"], f"{row['before']:.1%}", f"{row['after']:.1%}", gained]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return [*lines, ""]


def _related(rows: list[dict[str, Any]]) -> list[str]:
    """The table of relations, a line a pair of arms and point; nothing where no unit has any."""
    if not rows:
        return []
    columns = list(dict.fromkeys((row["diagnostic"], row["variant"]) for row in rows))
    heads = [headline.column for name, _ in columns if (headline := DIAGNOSTICS[name].headline)]
    lines = [
        "",
        "## Do the updates move alike?",
        "",
        "An open question of the paper's, reported without a verdict. The last updates of two arms of a seed, from the same anchor, compared as "
        "[`opdgeo relate`](../relate.md) does: all matrices as one long vector, or their mean where there is no such number. Mean over seeds with the 95 % "
        "interval; behind it, after “by chance”, what two independent isotropic updates of the same sizes share, where that is 0 its standard deviation. A noise "
        "arm has learned nothing: what two arms share with it as well is not the work of an objective. The first units were kept without these numbers.",
        "",
        "| point | arms | seeds | " + " | ".join(heads) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    pairs: dict[tuple[str, str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in rows:
        pairs.setdefault((row["point"], row["arm"], row["other"]), {})[row["diagnostic"], row["variant"]] = row
    for (point, arm, other), numbers in pairs.items():
        seeds = max(len(row["seeds"]) for row in numbers.values())
        cells = []
        for column in columns:
            found = numbers.get(column, {"value": None, "null": None, "null_std": None})
            around = DIAGNOSTICS[column[0]].around_zero
            chance = found["null_std" if around else "null"]
            beside = "" if chance is None else f", by chance {'± ' if around else ''}{chance:.3g}"
            cells.append(_number(found | {"mean": found["value"]}) + beside)
        lines.append(f"| {point} | {arm} and {other} | {seeds} | " + " | ".join(cells) + " |")
    return lines


def _short(q: Quantity) -> str:
    return f"{DIAGNOSTICS[q.diagnostic].title.lower()}, {'value / null' if q.ratio else 'value − null'}"


def _over(claim: dict[str, Any]) -> str:
    done, all_of = claim["points_complete"]
    return f"**{claim['verdict']}**" if done == all_of else f"open ({done} of {all_of} points: {claim['so_far']})"


def _cell(at: dict[str, Any] | None) -> str:
    if at is None:
        return "–"
    if not at["comparisons"]:
        return f"open ({len(at['seeds'])} of {at['planned']} seeds)"
    effects = "; ".join(_effect(c) for c in at["comparisons"])
    head = at["verdict"] if at["complete"] else f"open ({len(at['seeds'])} of {at['planned']} seeds)"
    return f"{head}{', also without learning' if at['also_without_learning'] else ''}: {effects}"


def _effect(c: dict[str, Any]) -> str:
    if c["value"] is None:
        return "undefined"
    return f"{c['value']:.3g}" + ("" if c["low"] is None else f" [{c['low']:.3g}, {c['high']:.3g}]")


def _number(found: dict[str, Any] | None) -> str:
    if not found or found["mean"] is None:
        return "–"
    return f"{found['mean']:.3g}" + ("" if found["low"] is None else f" [{found['low']:.3g}, {found['high']:.3g}]")


def _p(p: float | None) -> str:
    return "–" if p is None else f"{p:.3f}"


def figure(found: dict[str, Any], path: Path) -> None:
    """The map, one panel a claim: each comparison's effect at every point, and beside it the same with a noise arm.

    A claim that is judged at one point alone has no panel, unless all are.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    claims = [claim for claim in found["claims"] if len(claim["points"]) > 1] or found["claims"]
    wide = 3
    tall = -(-len(claims) // wide)
    picture, panels = pyplot.subplots(tall, wide, figsize=(4.6 * wide, 2.9 * tall), squeeze=False)
    for panel in panels.flat[len(claims) :]:
        panel.axis("off")
    for panel, claim in zip(panels.flat, claims, strict=False):
        names = list(claim["points"])
        bars: dict[str, list[tuple[float, float, float]]] = {}
        marks: dict[int, Any] = {}
        for place, at in enumerate(claim["points"].values()):
            for reading, colour, shift in (("verdict", "#1f5f8b", -0.12), ("noise", "#999999", 0.12)):
                sets = [at["comparisons"]] if reading == "verdict" else [n["comparisons"] for n in at["noise"].values()]
                for comparisons in sets:
                    for i, c in enumerate(comparisons):
                        for effect in [np.array(c["effects"][-1], float)] if c["effects"] else []:
                            x, margin = place + shift + 0.05 * i, _least(c)
                            style = {"marker": "o^sD"[i % 4], "color": colour, "markersize": 4, "linestyle": ""}
                            words = re.sub(r" (above|within a factor|at every).*", "", c["text"])
                            (mark,) = panel.plot([x], [effect.mean() / margin], label=words, **style)
                            if reading == "verdict":
                                marks.setdefault(i, mark)
                            low, high = t_interval(effect)
                            if np.isfinite(low):
                                bars.setdefault(colour, []).append((x, float(low / margin), float(high / margin)))
        for colour, ends in bars.items():
            panel.vlines(*zip(*ends, strict=True), color=colour, linewidth=1)
        panel.axhspan(-1, 1, color="#f0f0f0", zorder=0)
        panel.axhline(0, color="black", linewidth=0.6)
        panel.set_xlim(-0.5, len(names) - 0.5)
        panel.set_yscale("symlog", linthresh=1)
        panel.yaxis.set_major_formatter("{x:g}")
        if marks:
            panel.legend(
                handles=list(marks.values()), fontsize=6, frameon=False, loc="lower right", bbox_to_anchor=(1, 0.98)
            )
        panel.set_xticks(range(len(names)), names, rotation=30, fontsize=7, ha="right")
        panel.set_title(f"{claim['id']}: {_over(claim).strip('*')}", fontsize=9, loc="left")
    picture.supylabel(
        "effect over its margin, in the claim's direction (grey: noise in an arm's place; band: within the margin)",
        fontsize=8,
    )
    picture.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(picture)


def _least(c: dict[str, Any]) -> float:
    return float(np.log(c["required"])) if c["log"] else float(c["required"])


def table(found: dict[str, Any]) -> Sequence[str]:
    """The verdicts as lines for a terminal."""
    return [
        f"{claim['id']:>4}  {_over(claim):<40}  "
        + "; ".join(
            f"{name}: {at['verdict']} ({len(at['seeds'])}/{at['planned']})" for name, at in claim["points"].items()
        )
        for claim in found["claims"]
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m opdgeo.experiments.confirmatory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("results", type=Path, help="the folder that holds the study's folder of units")
    parser.add_argument("--preset", default="tiny", choices=regime.REGIMES, help="the study (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where the verdicts go")
    parser.add_argument("--page", type=Path, help="where the results page goes (Markdown)")
    parser.add_argument("--figure", type=Path, help="where the map goes (SVG, PNG or PDF)")
    parser.add_argument("--sizes", type=Path, help="where the arms' distances from the null of their size go (parquet)")
    options = parser.parse_args(arguments)
    try:
        of = regime.REGIMES[options.preset]
        units = load(options.results / of.folder, of)
        found = judged(units)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    for path, text in ((options.json, json.dumps(found, indent=1) + "\n"), (options.page, page(found))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(path) as partial:
                partial.write_text(text, encoding="utf-8")
    if options.sizes:
        write_atomically(options.sizes, lambda path: sizes(units).write_parquet(path))
    if options.figure:
        figure(found, options.figure)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

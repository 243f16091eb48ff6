"""The confirmatory study: verdicts over the regime on planted units, what counts, the frozen rules, and real units in a few steps."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from polars.testing import assert_frame_equal
from scipy import stats

import recompute_claims
from opdgeo.errors import ConfigError
from opdgeo.experiments import confirmatory, regime, units
from opdgeo.experiments.claims import Data
from opdgeo.experiments.reduced import SCHEMA, unpacked, walk
from opdgeo.experiments.rules import (
    ACCURACY,
    CLAIMS,
    COIN,
    EXPLORATORY,
    MATCHED,
    NORM,
    OPD,
    QUANTITIES,
    RANDOM_SIGN,
    RLVR,
    SPARSITY,
    STABLE_RANK,
    VERSION,
)
from opdgeo.experiments.study import BY_NAME, configure
from opdgeo.report.apart import TITLE
from opdgeo.training.config import TrainConfig
from program import run_python

ROOT = Path(__file__).parents[2]
Plant = Callable[[str, str, str], float | None]
RULES = regime.rules_hash()
BEGUN = json.dumps({"date": "2026-12-01T00:00:00+00:00", "rules": RULES})


def write_unit(folder: Path, point: regime.Point, seed: int, plant: Plant, **metadata: str) -> Path:
    """A unit whose numbers are what `plant` says of (point, arm, quantity), with 1 % of noise between seeds."""
    rng = np.random.default_rng(seed)
    steps = [round(share * point.steps) for share in (0.2, 0.4, 0.6, 0.8, 1.0)]
    rows = []
    for arm in point.arms:
        few = BY_NAME[arm].part if arm in BY_NAME else 1.0
        known = {"arm": arm, "seed": seed}
        if point.name != regime.S1:
            for q in QUANTITIES:
                plain = {NORM.name: 0.1, STABLE_RANK.name: 4.0}.get(q.name, 0.5)
                value = plant(point.name, arm, q.name) or plain
                for i, step in enumerate(s for s in steps if s <= few * point.steps):
                    grown = value * (i + 1) / 5 if q is NORM else value
                    number = grown * (1 + 0.01 * rng.standard_normal())
                    rows.append(
                        known
                        | {
                            "step": step,
                            "name": q.name,
                            "value": number,
                            "null": value,
                            "excess": number / value if q.ratio else number - value,
                        }
                    )
        prompts, end = 200, plant(point.name, arm, ACCURACY.name) or 0.5
        for i, step in enumerate((0, *(s for s in steps if s <= few * point.steps))):
            right = rng.permutation(prompts) < round(prompts * (0.2 + (end - 0.2) * i / 5))
            rows.append(known | {"step": step, "name": "kl_origin", "value": 0.01 * i * (1 + end)})
            rows.append(
                known
                | {"step": step, "name": ACCURACY.name, "value": right.mean(), "right": np.packbits(right).tobytes()}
            )
    table = pl.DataFrame([dict.fromkeys(SCHEMA) | row for row in rows], schema=SCHEMA, orient="row")
    said = {
        "point": point.name, "seed": str(seed), "protocol": str(VERSION), "rules": RULES, "begun": BEGUN, "finished": "",
        "settings": "{}", "minutes": '{"opd": 1.0}', "machine": "-", "versions": "{}", "rehearsal": "False",
    } | metadata  # fmt: skip
    path = units.file_of(folder, point.name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(path, metadata=said)
    return path


def write_units(folder: Path, plant: Plant) -> None:
    for point, seed in regime.units():
        write_unit(folder / "units", point, seed, plant)


def study(folder: Path, plant: Plant) -> dict[str, dict[str, Any]]:
    write_units(folder, plant)
    return {claim["id"]: claim for claim in confirmatory.judged(confirmatory.load(folder / "units"))["claims"]}


@pytest.fixture
def r1_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confirmatory, "CLAIMS", [claim for claim in CLAIMS if claim.id == "R1"])


def sparsity(**by_arm: float) -> Plant:
    names = {"matched": MATCHED, "random_sign": RANDOM_SIGN}
    values = {names.get(arm, arm): value for arm, value in by_arm.items()}
    return lambda point, arm, quantity: values.get(arm) if quantity == SPARSITY.name else None


@pytest.mark.usefixtures("r1_alone")
@pytest.mark.parametrize(
    ("plant", "expected"),
    [
        (sparsity(matched=0.3, opd=0.5, rlvr=0.7), "holds"),
        (sparsity(matched=0.5, opd=0.5, rlvr=0.5), "no difference"),
        (sparsity(matched=0.7, opd=0.5, rlvr=0.3), "reversed"),
        (sparsity(matched=0.3, opd=0.5, rlvr=0.523), "open"),
    ],
    ids=["difference", "equality", "reversal", "about the margin"],
)
def test_a_planted_pattern_gets_its_verdict(tmp_path: Path, plant: Plant, expected: str) -> None:
    found = study(tmp_path, plant)["R1"]
    assert found["verdict"] == expected, found["points"]["main"]["comparisons"]
    assert {at["verdict"] for at in found["points"].values()} == {expected}
    assert all(at["complete"] and len(at["seeds"]) == at["planned"] for at in found["points"].values())
    text = confirmatory.page(confirmatory.judged(confirmatory.load(tmp_path / "units")))
    left = [line for line in text.splitlines() if re.match(r"\| R1 \| main \| [a-z ]+ \| [> \d]+ \| 7 \|", line)]
    assert bool(left) == (expected == "open"), "what is left open is told with the seeds that would decide it"


@pytest.mark.usefixtures("r1_alone")
def test_what_differs_between_learning_rates_depends(tmp_path: Path) -> None:
    cold = sparsity(matched=0.3, opd=0.5, rlvr=0.7)

    def plant(point: str, arm: str, quantity: str) -> float | None:
        return None if point == "hot" else cold(point, arm, quantity)

    found = study(tmp_path, plant)["R1"]
    assert found["verdict"] == "depends"
    assert found["points"]["hot"]["verdict"] == "no difference" and found["points"]["main"]["verdict"] == "holds"
    assert "depends" in confirmatory.page(confirmatory.judged(confirmatory.load(tmp_path / "units")))


@pytest.mark.usefixtures("r1_alone")
def test_what_noise_does_too_is_said_so(tmp_path: Path) -> None:
    as_noise = study(tmp_path / "a", sparsity(matched=0.3, opd=0.5, random_sign=0.5, rlvr=0.7, coin=0.7))["R1"]
    learned = study(tmp_path / "b", sparsity(matched=0.3, opd=0.5, random_sign=0.9, rlvr=0.7, coin=0.4))["R1"]
    assert as_noise["points"]["main"]["also_without_learning"] == ["noise in OPD's place", "noise in RLVR's place"]
    assert learned["points"]["main"]["also_without_learning"] == []


@pytest.mark.usefixtures("r1_alone")
def test_a_batch_point_takes_the_other_arms_from_the_main_point(tmp_path: Path) -> None:
    def plant(point: str, arm: str, quantity: str) -> float | None:
        if quantity != SPARSITY.name:
            return None
        return {"main": 0.6, "batch-16": 0.9}.get(point) if arm == RLVR else 0.5

    at = study(tmp_path, plant)["R1"]["points"]
    second = {name: at[name]["comparisons"][1]["value"] for name in ("main", "batch-16")}
    assert second == pytest.approx({"main": 0.1, "batch-16": 0.4}, abs=0.01)


@pytest.mark.usefixtures("r1_alone")
def test_a_verdict_waits_for_all_planned_seeds(tmp_path: Path) -> None:
    write_units(tmp_path, sparsity(matched=0.3, opd=0.5, rlvr=0.7))
    units.file_of(tmp_path / "units", "hot", regime.FIRST + 4).unlink()
    found = confirmatory.judged(confirmatory.load(tmp_path / "units"))
    claim = next(c for c in found["claims"] if c["id"] == "R1")
    assert claim["verdict"] == "open" and claim["so_far"] == "holds"
    assert claim["points"]["hot"]["verdict"] == "open" and len(claim["points"]["hot"]["seeds"]) == 4
    assert "open (4 of 5 seeds)" in confirmatory.page(found)


def test_only_planned_seeds_of_these_rules_count(tmp_path: Path) -> None:
    plant = sparsity(matched=0.3, opd=0.5, rlvr=0.7)
    main, folder = regime.BY_NAME["main"], tmp_path / "units"
    write_unit(folder, main, 101, plant)
    write_unit(folder, main, 900, plant)
    write_unit(folder, main, 102, plant, rules="another")
    write_unit(folder, main, 103, plant, begun=json.dumps({"date": "2026-12-01", "rules": "another"}))
    write_unit(folder, main, 104, plant, rehearsal="True")
    write_unit(folder, main, 190, plant)
    found = confirmatory.load(folder)
    assert [unit["seed"] for unit in found.about] == ["101"]
    assert sorted(found.left_out) == [f"main-seed{s}.parquet" for s in (102, 103, 104, 190, 900)]
    assert all(seed not in EXPLORATORY for point in regime.POINTS for seed in regime.planned(point))
    (folder / "other.parquet").write_bytes((ROOT / "docs/results/noise.parquet").read_bytes())
    with pytest.raises(ConfigError, match="no unit"):
        confirmatory.load(folder)
    with pytest.raises(ConfigError, match="no folder"):
        confirmatory.load(tmp_path / "nowhere")


@pytest.mark.usefixtures("r1_alone")
def test_noise_that_learns_makes_the_protocol_void(tmp_path: Path) -> None:
    def plant(point: str, arm: str, quantity: str) -> float | None:
        return 0.2 if quantity == ACCURACY.name and arm in (COIN, RANDOM_SIGN) and arm != learns else None

    learns = ""
    write_units(tmp_path / "fair", plant)
    assert confirmatory.void(confirmatory.judged(confirmatory.load(tmp_path / "fair/units"))) == []
    learns = COIN
    write_units(tmp_path / "learns", plant)
    wrong = confirmatory.void(confirmatory.judged(confirmatory.load(tmp_path / "learns/units")))
    assert wrong and {line.split(" at ")[0] for line in wrong} == {COIN}


def test_verdicts_and_page_come_from_the_files_alone_and_are_recomputed(tmp_path: Path) -> None:
    def plant(point: str, arm: str, quantity: str) -> float | None:
        by_arm = {
            MATCHED: 0.31,
            OPD: 0.5,
            RLVR: 0.66,
            COIN: 0.6,
            RANDOM_SIGN: 0.52,
            "s1-sft-matched-update": 0.4,
            "s1-opd-frozen": 0.3,
        }
        return (
            by_arm.get(arm, 0.45) * {"hot": 0.6, "between": 0.8}.get(point, 1.0) * (1 if quantity != NORM.name else 0.3)
        )

    write_units(tmp_path, plant)
    paths = {name: tmp_path / f"out.{name}" for name in ("json", "md", "svg")}
    confirmatory.main(
        [str(tmp_path), "--json", str(paths["json"]), "--page", str(paths["md"]), "--figure", str(paths["svg"])]
    )
    assert paths["svg"].read_text().count("<svg") == 1 and "L4" in paths["md"].read_text()
    row = max(
        (
            r
            for r in json.loads(paths["json"].read_text())["sizes"]
            if (r["point"], r["arm"], r["name"]) == ("hot", OPD, STABLE_RANK.name)
        ),
        key=lambda r: r["step"],
    )
    shown = f"{row['excess']:.3g} [{row['low']:.3g}, {row['high']:.3g}]"
    assert any(
        line.startswith(f"| hot | {OPD} |") and shown in line
        for line in paths["md"].read_text().split(TITLE)[1].splitlines()
    )
    assert sum(path.stat().st_size for path in (tmp_path / "units").iterdir()) < 5_000_000
    found = json.loads(paths["json"].read_text())
    found["claims"][0]["points"]["main"]["comparisons"][0]["effects"][0][0] += 1e-3
    found["claims"][1]["verdict"] = "depends"
    paths["json"].write_text(json.dumps(found))
    wrong = recompute_claims.main(tmp_path / "units", paths["json"])
    assert len(wrong) == 2 and any("R1/main" in line for line in wrong), "all else is the same"


def test_distances_from_the_null_are_means_over_seeds_with_t_intervals(tmp_path: Path) -> None:
    write_units(tmp_path, sparsity(opd=0.5))
    found = confirmatory.sizes(confirmatory.load(tmp_path / "units"))
    files = [pl.read_parquet(units.file_of(tmp_path / "units", "hot", seed)) for seed in range(101, 106)]
    for name, steps in ((SPARSITY.name, 5), (STABLE_RANK.name, 5)):
        of_arm = found.filter(point="hot", arm=OPD, name=name)
        assert of_arm.height == steps and set(of_arm["seeds"]) == {5}
        row = of_arm.row(by_predicate=pl.col("step") == of_arm["step"].max(), named=True)
        each = [file.filter(arm=OPD, name=name, step=row["step"]) for file in files]
        values = np.array([one["excess"].item() for one in each])
        values = np.log(values) if row["ratio"] else values
        low, high = stats.t.interval(0.95, len(values) - 1, values.mean(), values.std(ddof=1) / len(values) ** 0.5)
        expected = np.array([values.mean(), low, high])
        expected = np.exp(expected) if row["ratio"] else expected
        assert [row["excess"], row["low"], row["high"]] == pytest.approx(expected, rel=1e-9)
        assert row["value"] == pytest.approx(np.mean([one["value"].item() for one in each]))
    alone = confirmatory.sizes(confirmatory.Units(confirmatory.load(tmp_path / "units").rows.filter(seed=101), [], {}))
    assert alone["low"].null_count() == alone.height and alone["excess"].null_count() == 0


# What is frozen


def kept_units() -> list[tuple[regime.Regime, Path]]:
    """Every unit's file in the repository, with the regime that it belongs to."""
    results = ROOT / "docs/results"
    return [(of, path) for of in regime.REGIMES.values() for path in sorted((results / of.folder).glob("*.parquet"))]


def test_every_study_has_its_own_rules() -> None:
    hashes = {of.preset: regime.rules_hash(of) for of in regime.REGIMES.values()}
    assert len(set(hashes.values())) == len(hashes)
    assert hashes["tiny"] == RULES
    for of in regime.REGIMES.values():
        assert {point.name for point in of.points} == set(of.by_name)
        assert regime.rules_hash(pickle.loads(pickle.dumps(of))) == hashes[of.preset], "a worker has a copy"


def test_units_of_one_study_are_no_units_of_another(tmp_path: Path) -> None:
    real, other = regime.SMOLLM2.points
    rules = regime.rules_hash(regime.SMOLLM2)
    begun = json.dumps({"date": "2026-12-01T00:00:00+00:00", "rules": rules})
    unchanged = {"sft": 0.1, MATCHED: 0.1, OPD: 0.5, RLVR: 0.9}  # far apart: two seeds show no less
    for seed in regime.planned(real):

        def plant(_: str, arm: str, name: str) -> float | None:
            return unchanged.get(arm) if name == SPARSITY.name else None

        write_unit(tmp_path / "smollm2", real, seed, plant, rules=rules, begun=begun)
        write_unit(tmp_path / "smollm2", other, seed, plant, rules=rules, begun=begun)
    units_of = confirmatory.load(tmp_path / "smollm2", regime.SMOLLM2)
    found = confirmatory.judged(units_of)
    claims = {claim["id"]: claim for claim in found["claims"]}
    assert set(claims) == {"R1", "R3", "R4", "R5a", "R5b", "L1", "L2", "L3", "L4"}  # those whose arms are there
    assert claims["R1"]["points"]["smollm2"]["complete"] and claims["R1"]["verdict"] == "holds"
    assert claims["R1"]["points"]["smollm2"]["noise"]["noise in RLVR's place"]["verdict"] != "holds"
    text = confirmatory.page(found)
    assert f"`{rules}`" in text and "smollm2 2 of 2, smollm2-1e-5 2 of 2" in text and "--preset smollm2" in text
    assert recomputed(tmp_path, found, tmp_path / "smollm2") == []
    with pytest.raises(ConfigError, match="no unit of the confirmatory study of tiny"):
        confirmatory.load(tmp_path / "smollm2")


def test_of_two_seeds_what_was_learned_is_read_over_prompts(tmp_path: Path) -> None:
    for point in regime.SMOLLM2.points:
        for seed in regime.planned(point):

            def plant(name: str, arm: str, quantity: str, seed: int = seed) -> float | None:
                lost = arm == COIN or (arm, name, seed) == (RLVR, "smollm2", 102)
                return (0.1 if lost else 0.6) if quantity == ACCURACY.name else None

            rules = regime.rules_hash(regime.SMOLLM2)
            write_unit(tmp_path / "smollm2", point, seed, plant, rules=rules, begun=BEGUN.replace(RULES, rules))
    kept = confirmatory.load(tmp_path / "smollm2", regime.SMOLLM2)
    found = confirmatory.judged(kept)
    assert recomputed(tmp_path, found, tmp_path / "smollm2") == []
    assert confirmatory.unlearned(found) == ["rlvr at smollm2"], "one seed that lost is enough; the coin need not learn"
    assert "**Did not learn in every seed: rlvr at smollm2**" in confirmatory.page(found)
    row = next(r for r in found["gains"] if (r["point"], r["arm"], r["seed"]) == ("smollm2", OPD, 101))
    mine = kept.rows.filter(point="smollm2", arm=OPD, seed=101, name=ACCURACY.name).sort("step")
    bits = [np.unpackbits(np.frombuffer(mine["right"][i], np.uint8)).astype(float) for i in (0, -1)]
    gained = bits[1] - bits[0]
    assert (row["low"], row["high"]) == pytest.approx(
        stats.t.interval(0.95, len(gained) - 1, gained.mean(), gained.std(ddof=1) / len(gained) ** 0.5)
    )


def test_units_of_an_earlier_version_count_where_their_rules_are_the_same(tmp_path: Path) -> None:
    old = dataclasses.replace(regime.SMOLLM2, points=regime.SMOLLM2.points[:1], version=1, before={})
    assert {regime.rules_hash(old): ("smollm2",)} == regime.SMOLLM2.before, "only a point was added"
    rules = regime.rules_hash(old)
    for point in regime.SMOLLM2.points:
        begun = json.dumps({"date": "2026-12-01T00:00:00+00:00", "rules": rules})
        write_unit(tmp_path / "smollm2", point, 101, sparsity(opd=0.5), rules=rules, begun=begun)
    kept = confirmatory.load(tmp_path / "smollm2", regime.SMOLLM2)
    assert [unit["point"] for unit in kept.about] == ["smollm2"]
    assert list(kept.left_out) == ["smollm2-1e-5-seed101.parquet"]
    assert recomputed(tmp_path, confirmatory.judged(kept), tmp_path / "smollm2") == []


def recomputed(folder: Path, found: dict[str, Any], units_folder: Path) -> list[str]:
    file = folder / "found.json"
    file.write_text(json.dumps(found))
    return recompute_claims.main(units_folder, file)


PAGES = {"tiny": "confirmatory.md", "smollm2": "smollm2.md"}


@pytest.mark.parametrize("of", regime.REGIMES.values(), ids=regime.REGIMES)
def test_the_page_in_docs_is_of_the_units_beside_it(of: regime.Regime) -> None:
    folder = ROOT / "docs/results"
    kept = confirmatory.load(folder / of.folder, of)
    again = f"python -m opdgeo.experiments.confirmatory docs/results --preset {of.preset} --page docs/results/{PAGES[of.preset]}"
    assert (folder / PAGES[of.preset]).read_text() == confirmatory.page(confirmatory.judged(kept)), again
    if of is regime.TINY:
        table = pl.read_parquet(folder / "sizes.parquet")
        assert_frame_equal(table, confirmatory.sizes(kept), rel_tol=1e-9)


def test_the_results_page_tells_the_verdicts_of_the_units() -> None:
    """docs/results.md is written by hand; each verdict in its tables is what the units say, with the mark of noise."""
    folder = ROOT / "docs/results"
    told: dict[tuple[str, str], str] = {}  # (column, claim) → cell
    for of in regime.REGIMES.values():
        for claim in confirmatory.judged(confirmatory.load(folder / of.folder, of))["claims"]:
            told[f"over {of.preset}", claim["id"]] = f"**{claim['verdict']}**"
            for name, at in claim["points"].items():
                if at["seeds"] and len(claim["points"]) > 1:  # else it is the verdict over all points
                    told[name, claim["id"]] = at["verdict"] + "*" * bool(at["also_without_learning"])
    columns: list[str] = []
    compared = set()
    for line in (ROOT / "docs/results.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| |"):
            columns = [(re.findall("`([a-z0-9 -]+)`", cell) or [""])[0] for cell in cells]
        elif columns and cells[0] in {claim for _, claim in told}:
            for column, cell in list(zip(columns, cells, strict=True))[1:]:
                if column:
                    assert cell == told.get((column, cells[0]), "–"), (cells[0], column)
                    compared.add((column, cells[0]))
    assert compared >= {(column, claim) for column, claim in told if column != "over smollm2"}, told.keys() - compared


def test_the_protocol_states_the_rules_that_judge() -> None:
    text = (ROOT / "docs/protocol.md").read_text()
    stated = re.findall(r"[Vv]ersion (\d+), fixed on (\d{4}-\d\d-\d\d), rules `([0-9a-f]{16})`", text)
    assert stated == [(str(of.version), of.frozen, regime.rules_hash(of)) for of in regime.REGIMES.values()], (
        "rules changed without a new version of the protocol"
    )
    for of in regime.REGIMES.values():
        for point in of.points:
            assert f"| `{point.name}` | {point.text} | {point.seeds} |" in text
    assert all(str(seed) in text for seed in EXPLORATORY)


def test_the_protocols_commit_precedes_every_confirmatory_unit() -> None:
    kept = kept_units()
    for of, path in kept:
        said = pl.read_parquet_metadata(path)
        begun = json.loads(said["begun"])
        assert begun["rules"] == said["rules"] in regime.counting(of.by_name[said["point"]], of), path.name
        assert datetime.fromisoformat(begun["date"]).date() >= date.fromisoformat(of.frozen), path.name
        assert path.stat().st_size <= 100_000
    if not kept or not (ROOT / ".git").exists() or shutil.which("git") is None:
        return
    dates: dict[str, list[str]] = {}
    for rules in {rules for of in regime.REGIMES.values() for rules in (regime.rules_hash(of), *of.before)}:
        log = [
            "git",
            "-C",
            str(ROOT),
            "log",
            "--reverse",
            "--format=%cI",
            f"-Srules `{rules}`",
            "--",
            "docs/protocol.md",
        ]
        dates[rules] = subprocess.run(log, capture_output=True, text=True, check=False).stdout.split()
    for _, path in kept:
        said = pl.read_parquet_metadata(path)
        if dates[said["rules"]]:  # a shallow clone has no such commit
            begun = json.loads(said["begun"])["date"]
            assert datetime.fromisoformat(dates[said["rules"]][0]) <= datetime.fromisoformat(begun), path.name


def test_every_kept_arm_ran_with_the_settings_of_its_point(tmp_path: Path) -> None:
    for of, path in kept_units():
        said = pl.read_parquet_metadata(path)
        point, seed = of.by_name[said["point"]], int(said["seed"])
        ran = json.loads(said["settings"])
        now = {
            arm: units.settings_hash(units.settings(point, arm, seed, tmp_path, of=of)) for arm in units.arms_of(point)
        }
        assert ran == now, path.name


def test_the_rules_hash_follows_every_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    before = regime.rules_hash()
    assert regime.rules_hash() == before
    monkeypatch.setattr(regime, "LEG_FROM", 11)
    assert regime.rules_hash() != before


def test_settings_differ_between_points_as_the_regime_says(tmp_path: Path) -> None:
    for point in regime.POINTS:
        for arm in units.arms_of(point):
            config = units.settings(point, arm, 101, tmp_path)
            assert config.seed == 101
            if arm == "sft":
                assert (config.learning_rate, config.steps) == (3e-4, 60)
                continue
            assert config.sequences_per_step == point.sequences and config.learning_rate == point.learning_rate
            if arm in BY_NAME and point.name != regime.S1:
                assert config.steps == round(BY_NAME[arm].part * point.steps)
                plain = configure(BY_NAME[arm], 101, "tiny", tmp_path)
                changed = set(config.differences(plain))
                assert changed <= {"learning_rate", "steps", "sequences_per_step", "origin", *regime.EVALUATED}, arm
    for real, arm in ((point, arm) for point in regime.SMOLLM2.points for arm in units.arms_of(point)):
        config = units.settings(real, arm, 101, tmp_path, of=regime.SMOLLM2)
        plain = configure(BY_NAME[arm], 101, "smollm2", tmp_path)
        assert set(config.differences(plain)) <= {
            "origin",
            "learning_rate",
            "eval_kl_origin",
            "eval_prompts_between",
            "monitor",
        }
        assert (config.steps, config.learning_rate) == (
            (plain.steps, plain.learning_rate) if arm == "sft" else (real.steps, real.learning_rate)
        )
        assert config.teacher == "smollm2/teacher" and config.eval_prompts == 1024
    held = units.settings(regime.BY_NAME[regime.S1], "s1-opd-other", 101, tmp_path)
    assert (held.steps, held.constrain, held.eval_samples) == (90, "update", 4)
    elsewhere = units.settings(regime.BY_NAME[regime.S1], "s1-opd-other", 101, tmp_path / "elsewhere")
    assert held != elsewhere and units.settings_hash(held) == units.settings_hash(elsewhere)


def test_units_come_in_order_of_worth() -> None:
    listed = [(point.name, seed) for point, seed in regime.units()]
    assert len(listed) == len(set(listed)) == sum(point.seeds for point in regime.POINTS)
    assert listed[:2] == [("main", 101), ("main", 102)]
    for point in regime.POINTS:
        assert [seed for name, seed in listed if name == point.name] == regime.planned(point)


def test_a_unit_begun_under_other_rules_does_not_go_on(tmp_path: Path) -> None:
    here = tmp_path / "hot-seed101"
    here.mkdir()
    (here / "begun.json").write_text(json.dumps({"date": "2026-11-01T00:00:00+00:00", "rules": "older"}))
    with pytest.raises(ConfigError, match="begun under rules older"):
        units.run_unit(regime.BY_NAME["hot"], 101, tmp_path, tmp_path / "units")


def test_a_unit_that_fails_is_told_at_once_and_stops_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (101, 102):
        (tmp_path / f"hot-seed{seed}").mkdir()
        older = json.dumps({"date": "2026-11-01T00:00:00+00:00", "rules": "older"})
        (tmp_path / f"hot-seed{seed}/begun.json").write_text(older)
    hot = regime.BY_NAME["hot"]
    with pytest.raises(ConfigError, match=f"begun under rules older; expected {RULES}"):
        units.run_all([(hot, 101), (hot, 102)], tmp_path, tmp_path / "units", workers=2)
    told = capsys.readouterr().err
    assert all(f"hot seed {seed}: failed, the other units go on" in told for seed in (101, 102))
    asked = [
        "-o",
        str(tmp_path),
        "--keep",
        str(tmp_path / "units"),
        "--points",
        "hot",
        "--seeds",
        "1",
        "--workers",
        "1",
    ]
    with pytest.raises(SystemExit, match=r"^error: .*begun under rules older"):  # no traceback
        units.main(asked)


# What is reduced


def test_outcomes_are_unpacked() -> None:
    right = np.random.default_rng(0).random(37) < 0.5
    assert np.array_equal(unpacked(np.packbits(right).tobytes(), 37), right)


def test_a_straight_walk_is_persistent_and_coherent_and_a_random_one_is_not(
    tmp_path: Path, config: Callable[..., TrainConfig]
) -> None:
    from safetensors.torch import load_file, save_file

    from opdgeo.training import models

    asked = config("opd", steps=100, checkpoints=(0.25, 0.5, 0.75, 1.0), learning_rate=1e-3)
    base = models.resolve(asked.origin)
    for kind in ("straight", "random"):
        rng, at = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
        first: dict[str, torch.Tensor] = {}
        for step in asked.checkpoint_steps:
            folder = tmp_path / kind / f"step-{step:06d}"
            shutil.copytree(base, folder)
            weights = at or {n: t.float() for n, t in load_file(base / "model.safetensors").items()}
            for name, tensor in weights.items():
                signs = torch.randn(tensor.shape, generator=rng)
                move = first.setdefault(name, signs.sign()) * 25 if kind == "straight" else signs * 5
                at[name] = tensor + asked.learning_rate * move  # 25 steps of size lr in every entry
            save_file(at, folder / "model.safetensors", metadata={"format": "pt"})
        rows = [{"event": "step", "step": s, "learning_rate": asked.learning_rate} for s in range(1, 101)]
        (tmp_path / kind / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        table = walk(tmp_path / kind, base, asked, "opd", 7)
        data = Data(table)
        persistence, coherence = (data.evaluated("opd", name, 7) for name in ("persistence", "coherence"))
        if kind == "straight":
            assert persistence == pytest.approx({25: 5, 50: 50**0.5, 75: 75**0.5, 100: 10}, rel=1e-3)
            assert coherence == pytest.approx({50: 1, 75: 1, 100: 1}, rel=1e-3)
        else:
            assert persistence == pytest.approx(dict.fromkeys((25, 50, 75, 100), 1.0), rel=0.02)
            assert all(abs(x) < 0.05 for x in coherence.values())


def test_units_run_and_are_reduced_to_small_files(tmp_path: Path) -> None:
    """Both kinds of unit in a few steps: the arms of a point, and S1 with all its channels."""
    keep = tmp_path / "results" / "units"

    def run(points: str) -> None:
        command = [
            "-o",
            tmp_path / "work",
            "--keep",
            keep,
            "--rehearse",
            "--seeds",
            1,
            "--workers",
            1,
            "--points",
            points,
        ]
        done = run_python("-m", "opdgeo.experiments.units", *command, libraries="training")
        assert done.returncode == 0, done.stderr[-3000:]

    earlier = tmp_path / "work" / "batch-16-seed101" / "minutes.json"
    earlier.parent.mkdir(parents=True)
    earlier.write_text('{"coin": 60.0}')  # of a start that was killed
    run("batch-16,s1")
    assert json.loads(pl.read_parquet_metadata(units.file_of(keep, "batch-16", 101))["minutes"])["coin"] > 60
    for name in ("batch-16", "s1"):
        point, path = regime.BY_NAME[name], units.file_of(keep, name, 101)
        said, table = pl.read_parquet_metadata(path), pl.read_parquet(path)
        assert said["rules"] == regime.rules_hash() and said["rehearsal"] == "True"
        assert set(json.loads(said["settings"])) == set(units.arms_of(point))
        assert set(point.arms) <= set(table["arm"]) and set(table["seed"]) == {101}
        assert path.stat().st_size < 100_000
        assert not (tmp_path / "work" / f"{name}-seed101").exists(), "the weights are gone"
        accuracies = table.filter(pl.col("name") == ACCURACY.name)
        counts = 8 * (4 if name == "s1" else 1)
        for row in accuracies.filter(pl.col("step") == pl.col("step").max().over("arm")).to_dicts():
            assert unpacked(row["right"], counts).mean() == row["value"]
    walked = pl.read_parquet(units.file_of(keep, "batch-16", 101)).filter(pl.col("name") == "persistence")
    assert set(walked["arm"]) == {"sft", "rlvr", "coin"}
    alike = pl.read_parquet(units.file_of(keep, "batch-16", 101)).filter(pl.col("over").is_not_null())
    assert set(zip(alike["arm"], alike["other"], strict=True)) == {("rlvr", "coin"), ("coin", "rlvr")}
    assert "over" not in pl.read_parquet_schema(units.file_of(keep, "s1", 101)), "S1's arms share no checkpoint"
    moved = walked.filter(pl.col("arm") != "rlvr")["value"]  # in three tokens nothing is ever right
    assert moved.is_between(0.5, 4).all()
    written = {path: path.stat().st_mtime_ns for path in keep.iterdir()}
    run("batch-16")
    assert {path: path.stat().st_mtime_ns for path in keep.iterdir()} == written, "what is kept is not run again"

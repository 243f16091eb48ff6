"""How alike a study's updates are: planted updates, a mean over seeds, units that have these numbers beside units that do not."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import stats

import planted
from opdgeo.experiments import confirmatory, related, study
from opdgeo.experiments.reproduce import plan
from opdgeo.experiments.rules import COIN, MATCHED, OPD, RANDOM_SIGN, RLVR, SFT
from opdgeo.survey.results import Result

ROOT = Path(__file__).parents[2]
NAMES = [planted.tensor_name(0, m) for m in ("self_attn.q_proj", "mlp.up_proj")]
SHAPE = (48, 40)
COSINES = {101: 0.3, 102: 0.5, 103: 0.6}
"""Of RLVR's update with OPD's, by seed; the coin's is at a right angle to both."""


def anchored(folder: Path, seed: int) -> tuple[Path, list[Path]]:
    """An anchor, and what OPD, RLVR and the coin made of it."""
    rng = np.random.default_rng(seed)
    start = {n: planted.weights(rng, *SHAPE) for n in NAMES}
    opd, apart, coin = dict[str, planted.Matrix](), dict[str, planted.Matrix](), dict[str, planted.Matrix]()
    for n in NAMES:  # three directions at right angles in every matrix
        basis = np.linalg.qr(rng.standard_normal((SHAPE[0] * SHAPE[1], 3)))[0]
        opd[n], apart[n], coin[n] = (basis[:, i].reshape(SHAPE) for i in range(3))
    c = COSINES[seed]
    moves = {OPD: opd, RLVR: {n: c * opd[n] + (1 - c * c) ** 0.5 * apart[n] for n in NAMES}, COIN: coin}
    base = planted.write_checkpoint(folder / f"anchor{seed}", start, "float32")
    return base, [
        planted.write_checkpoint(
            folder / "arms" / study.folder(arm, seed) / "step-000100", {n: start[n] + move[n] for n in NAMES}, "float32"
        )
        for arm, move in moves.items()
    ]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Result]:
    folder = tmp_path_factory.mktemp("related")
    return {seed: related.relate_arms(*anchored(folder, seed), folder / f"seed{seed}") for seed in COSINES}


def table(results: dict[int, Result], *seeds: int) -> pl.DataFrame:
    arms = (OPD, RLVR, COIN)
    return pl.concat([related.rows(results[s], [study.folder(arm, s) for arm in arms]) for s in seeds or results])


def test_planted_cosines_are_found_within_their_errors(results: dict[int, Result]) -> None:
    rows = table(results)
    assert dict(rows.schema) == {name: kind() for name, kind in related.COLUMNS.items()}
    cosines = rows.filter(name="update_cosine")
    assert cosines.height == 3 * 3 * 2, "three seeds, three pairs, over matrices and over entries"
    for row in cosines.iter_rows(named=True):
        expected = COSINES[row["seed"]] if {row["arm"], row["other"]} == {OPD, RLVR} else 0.0
        assert abs(row["value"] - expected) <= row["error"] + 1e-6, row  # 1e-6: float32 stores the checkpoints
        assert row["null"] == 0 and row["seed"] == row["other_seed"] and row["step"] == 100
        entries = SHAPE[0] * SHAPE[1] * (len(NAMES) if row["over"] == related.ENTRIES else 1)
        assert row["null_std"] == pytest.approx(entries**-0.5, rel=1e-2)
    ways = {(row["arm"], row["other"]) for row in rows.filter(name="update_multiple").iter_rows(named=True)}
    assert (OPD, COIN) in ways and (COIN, OPD) in ways
    alone = related.rows(results[101], [study.folder(arm, 101) for arm in (OPD, COIN)])
    assert set(alone["arm"]) | set(alone["other"]) == {OPD, COIN}, "an arm that is not of the study is left out"


def test_the_mean_over_seeds_has_students_interval(results: dict[int, Result]) -> None:
    shown = {(r["arm"], r["other"], r["diagnostic"]): r for r in related.over_seeds(table(results))}
    assert len(shown) == 3 * 4, "three pairs, and the four numbers that tables show"
    row = shown[OPD, RLVR, "update_cosine"]
    low, high = stats.t.interval(0.95, 2, np.mean([*COSINES.values()]), stats.sem([*COSINES.values()]))
    assert [row["value"], row["low"], row["high"]] == pytest.approx([np.mean([*COSINES.values()]), low, high], abs=1e-5)
    assert row["seeds"] == [101, 102, 103] and row["over"] == related.ENTRIES
    assert shown[OPD, COIN, "shared_subspace"]["over"] == related.MATRICES, "which has no number of all entries"
    one = related.over_seeds(table(results, 102))[0]
    assert one["value"] == pytest.approx(0.5, abs=1e-5) and one["low"] is one["high"] is None
    across = table(results, 102).with_columns(other_seed=pl.lit(103, pl.Int32), other=pl.col("arm"))
    assert {(r["arm"], r["other"]) for r in related.over_seeds(across)} >= {("opd-seed102", "opd-seed103")}


def test_what_is_known_is_not_related_again(tmp_path: Path) -> None:
    base, updates = anchored(tmp_path, 101)
    out = tmp_path / "out"
    assert not related.holds(out, updates)
    related.relate_arms(base, updates[:2], out)
    written = (out / "run.json").stat().st_mtime_ns
    assert related.holds(out, updates[:2]) and not related.holds(out, updates)
    related.relate_arms(base, updates[:2], out)
    assert (out / "run.json").stat().st_mtime_ns == written
    assert len(related.relate_arms(base, updates, out).run["checkpoints"]) == 3, "an arm more"


def test_a_seeds_arms_and_sft_over_the_seeds_are_related(tmp_path: Path) -> None:
    def jobs(name: str, seeds: int) -> dict[str, tuple[str, ...]]:
        return {
            j.name: j.relates for j in plan(study.chosen(name, "tiny"), range(seeds), "tiny", tmp_path) if j.relates
        }

    small, full = jobs("small", 1), jobs("full", 2)
    assert small == {"related/seed0": tuple(f"{arm}/step-000100" for arm in (MATCHED, OPD, RLVR))}
    five = (MATCHED, OPD, RLVR, COIN, RANDOM_SIGN)
    assert full["related/seed1"] == tuple(f"{arm}-seed1/step-000100" for arm in five)
    assert full[f"related/{SFT}"] == ("sft/step-000060", "sft-seed1/step-000060") and len(full) == 3


def test_units_without_relations_count_beside_units_that_have_them(
    tmp_path: Path, results: dict[int, Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit that was kept before there were any, three times."""
    monkeypatch.setattr(confirmatory, "CLAIMS", [claim for claim in confirmatory.CLAIMS if claim.id in ("R1", "L1")])
    kept = ROOT / "docs/results/units/main-seed101.parquet"
    said, rows = pl.read_parquet_metadata(kept), pl.read_parquet(kept)
    said.pop("ARROW:schema")

    def write(seed: int, *more: pl.DataFrame) -> None:
        of_seed = rows.with_columns(seed=pl.lit(seed, pl.Int32))
        whole = pl.concat([of_seed, *more], how="diagonal")
        whole.write_parquet(tmp_path / f"main-seed{seed}.parquet", metadata=said | {"seed": str(seed)})

    for seed in (101, 102, 103):
        write(seed)
    alone = confirmatory.load(tmp_path)
    before = confirmatory.judged(alone)
    assert before["related"] == [] and "move alike" not in confirmatory.page(before)
    for seed in (101, 102):
        write(seed, table(results, seed))
    found = confirmatory.load(tmp_path)
    after = confirmatory.judged(found)
    assert found.rows.height == alone.rows.height
    assert found.relations["seed"].unique().sort().to_list() == [101, 102]
    for part in ("claims", "arms", "sizes"):
        assert json.dumps(after[part]) == json.dumps(before[part]), "no verdict reads a relation"
    page = confirmatory.page(after).split("## Do the updates move alike?")[1]
    line = next(line for line in page.splitlines() if line.startswith("| main | opd and rlvr | 2 |"))
    low, high = stats.t.interval(0.95, 1, 0.4, stats.sem([0.3, 0.5]))
    chance = (len(NAMES) * SHAPE[0] * SHAPE[1]) ** -0.5
    assert f"| 0.4 [{low:.3g}, {high:.3g}], by chance ± {chance:.3g} |" in line

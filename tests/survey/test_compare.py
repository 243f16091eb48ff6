"""`opdgeo compare` and `opdgeo track` as a user runs them, on planted checkpoints, row by row against the reference."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from agreement import BASE, NAMES, SCHEMA, TUNED, check_rows, compared, rows_of, write_pair
from opdgeo.diagnostics import Settings
from opdgeo.errors import CheckpointError, ConfigError
from program import run_opdgeo
from reference import Matrix, channel_energy, gaussian_null, measure, subspace_similarity

DATA_FILES = ("measurements.parquet", "curves.parquet", "summary.json", "run.json", "report.html")


# Agreement ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", planted.DTYPES)
def test_every_row_agrees_with_the_reference(dtype: str, shards: int, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), dtype, shards)
    out = tmp_path / "out"
    compared(base, tuned, out, "--nulls", 0)
    frame = pl.read_parquet(out / "measurements.parquet")
    assert dict(frame.schema) == SCHEMA
    rows = rows_of(frame)
    assert {name for name, _, _ in rows} == set(NAMES)
    curves = {
        (row["matrix"], row["curve"]): row["values"]
        for row in pl.read_parquet(out / "curves.parquet").iter_rows(named=True)
    }
    for name in NAMES:
        expected = measure(planted.stored(BASE[name], dtype), planted.stored(TUNED[name], dtype))
        check_rows(rows, name, expected.values)
        for curve, values in expected.curves.items():
            tolerance = 1e-6 if curve.startswith("angle") else 1e-9 * values[0]
            assert curves[name, curve] == pytest.approx(values.tolist(), abs=tolerance), (name, curve)
        _, _, layer, block, role, _ = name.split(".")
        for key, row in rows.items():
            if key[0] == name:
                assert (row["checkpoint"], row["step"]) == ("tuned", None)
                assert (row["layer"], row["role"], (row["rows"], row["cols"])) == (int(layer), role, BASE[name].shape)
                assert row["null_mean"] is None
                assert row["null_std"] is None
                assert block in ("self_attn", "mlp")


def test_the_same_values_in_another_dtype_or_in_shards_give_the_same_table(tmp_path: Path) -> None:
    # bf16 values of weight size are fp16 and fp32 values too (their 8 bits fit; the exponents are small enough).
    rng = np.random.default_rng(3)
    before = {n: planted.stored(np.clip(rng.standard_normal(v.shape), 0.01, 4), "bfloat16") for n, v in BASE.items()}
    after = {n: planted.stored(v * (1 + 0.02 * rng.standard_normal(v.shape)), "bfloat16") for n, v in before.items()}
    tables = []
    for i, (dtype, shards) in enumerate([("bfloat16", 1), ("bfloat16", 4), ("float16", 2), ("float32", 1)]):
        for n, v in before.items():
            assert np.array_equal(planted.stored(v, dtype), v), n
        base, tuned = write_pair(tmp_path / str(i), (before, after), dtype, shards)
        result = opdgeo.compare(base, tuned, settings=Settings(nulls=2))
        tables.append(result.measurements)
        assert result.curves.equals(opdgeo.compare(base, tuned, settings=Settings(nulls=0)).curves)
    for table in tables[1:]:
        assert table.equals(tables[0])


def test_two_runs_write_identical_data_and_workers_change_only_rounding(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    outs = [tmp_path / name for name in ("one", "two", "three")]
    for out, workers in zip(outs, (2, 2, 1), strict=True):
        compared(base, tuned, out, "--nulls", 2, "--workers", workers)
    for file in ("measurements.parquet", "curves.parquet", "summary.json"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes(), file
    several, one = rows_of(outs[0]), rows_of(outs[2])
    assert list(several) == list(one)
    for key, row in several.items():
        assert (row["status"], row["reason"]) == (one[key]["status"], one[key]["reason"])
        if row["value"] is not None:
            assert abs(row["value"] - one[key]["value"]) <= row["error"] + one[key]["error"], key
            assert row["null_mean"] == pytest.approx(one[key]["null_mean"], rel=1e-6, abs=1e-9), key


def test_one_safetensors_file_stands_for_a_checkpoint(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    by_folder = opdgeo.compare(base, tuned, settings=Settings(nulls=0)).measurements
    by_file = opdgeo.compare(
        base / "model.safetensors", tuned / "model.safetensors", settings=Settings(nulls=0)
    ).measurements
    assert by_file.drop("checkpoint").equals(by_folder.drop("checkpoint"))


def test_other_safetensors_in_the_folder_are_not_read(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    before = opdgeo.compare(base, tuned, settings=Settings(nulls=0)).measurements
    planted.write_safetensors(tuned / "adapter_model.safetensors", {NAMES[0]: np.ones((2, 2))}, "float32")
    (tuned / "consolidated.safetensors").write_bytes(b"not weights")
    assert opdgeo.compare(base, tuned, settings=Settings(nulls=0)).measurements.equals(before)


def test_the_summary_is_the_mean_of_the_rows(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float32")
    out = tmp_path / "out"
    compared(base, tuned, out, "--nulls", 3)
    frame = pl.read_parquet(out / "measurements.parquet").with_columns(entries=pl.col("rows") * pl.col("cols"))
    (checkpoint,) = json.loads((out / "summary.json").read_text())["checkpoints"]
    assert checkpoint["checkpoint"] == "tuned"
    assert len(checkpoint["diagnostics"]) == frame.select("diagnostic", "variant").unique().height

    def agrees(block: dict[str, Any], part: pl.DataFrame, entries: bool) -> None:
        done = part.filter(pl.col("status") == "computed")
        assert (block["computed"], block["total"]) == (done.height, part.height)
        values = done["value"].to_numpy()
        weights = done["entries"].to_numpy() if entries else None
        assert block["mean"] == pytest.approx(float(np.average(values, weights=weights)), rel=1e-9)
        assert values.min() <= block["p10"] <= block["median"] <= block["p90"] <= values.max()
        if not entries:
            assert block["median"] == pytest.approx(float(np.median(values)), rel=1e-9)

    for block in checkpoint["diagnostics"]:
        part = frame.filter(diagnostic=block["diagnostic"], variant=block["variant"])
        entries = block["diagnostic"] == "update_sparsity"
        assert block["weighting"] == ("entries" if entries else "matrices")
        agrees(block, part, entries)
        assert set(block["roles"]) == set(part["role"])
        for role, inner in block["roles"].items():
            agrees(inner, part.filter(role=role), entries)
        done = part.filter(pl.col("status") == "computed")
        null = np.average(done["null_mean"].to_numpy(), weights=done["entries"].to_numpy() if entries else None)
        assert block["null"]["mean"] == pytest.approx(float(null), rel=1e-9), block["diagnostic"]
        assert block["null"]["excess"] == pytest.approx(block["mean"] - float(null), rel=1e-6, abs=1e-12)
        assert block["null"]["low"] <= block["null"]["high"]


def test_the_manifest_names_what_was_read(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float16", shards=2)
    out = tmp_path / "out"
    compared(base, tuned, out, "--nulls", 0)
    run = json.loads((out / "run.json").read_text())
    assert run["opdgeo"] == opdgeo.__version__
    assert run["settings"]["rank"] == 512
    assert run["device"] == "cpu"
    assert run["pairing"]["measured"] == len(NAMES)
    assert set(run["seconds_by_shape"]) == {"x".join(map(str, BASE[name].shape)) for name in NAMES}
    assert sum(run["seconds_by_shape"].values()) == pytest.approx(sum(run["timings"].values()))
    (checkpoint,) = run["checkpoints"]
    for folder, manifest in ((base, run["base"]), (tuned, checkpoint)):
        assert manifest["dtypes"] == {"float16": len(BASE)}
        files = sorted(folder.glob("*.safetensors"))
        assert [(f["name"], f["bytes"], f["sha256"]) for f in manifest["files"]] == [
            (f.name, f.stat().st_size, hashlib.sha256(f.read_bytes()).hexdigest()) for f in files
        ]


# Options --------------------------------------------------------------------------------------------------------


def test_roles_choose_the_matrices(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    asked = {
        "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "mlp": ["gate_proj", "up_proj", "down_proj"],
        "q_proj,down_proj": ["q_proj", "down_proj"],
    }
    for roles, wanted in asked.items():
        table = opdgeo.compare(base, tuned, roles=roles, settings=Settings(nulls=0)).measurements
        assert set(table["matrix"]) == {name for name in NAMES if name.split(".")[-2] in wanted}, roles
    out = tmp_path / "out"
    compared(base, tuned, out, "--nulls", 0, "--roles", "q_proj,down_proj")
    assert {row["role"] for row in rows_of(out).values()} == {"q_proj", "down_proj"}
    left_out = {module.split(".")[1] for module in planted.SHAPES} - {"q_proj", "down_proj"}
    assert left_out <= set(json.loads((out / "run.json").read_text())["pairing"]["not_selected"])


def test_ranks_and_masks_choose_the_variants(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float32")
    out = tmp_path / "out"
    options = ("--rank", 5, "--top-k", 4, "--mask-rank", 6, "--mask-share", "0.25,0.4", "--eta", "0.05")
    compared(base, tuned, out, "--nulls", 0, *options)
    rows = rows_of(out)
    for name in NAMES:
        before, after = planted.stored(BASE[name], "float32"), planted.stored(TUNED[name], "float32")
        expected = measure(before, after, rank=5, top_k=4, mask_rank=6, mask_shares=(0.25, 0.4), eta=0.05)
        check_rows(rows, name, expected.values)
    for row in rows.values():
        if row["status"] == "computed":
            assert row["reason"] is None, "no rank had to be cut"


def test_a_cut_rank_keeps_its_name_and_says_so(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    rows = rows_of(opdgeo.compare(base, tuned, settings=Settings(nulls=0)).measurements)
    wide = planted.tensor_name(1, "mlp.down_proj")
    assert "24" in rows[wide, "principal_energy", "left.64"]["reason"]
    assert "24" in rows[wide, "principal_angles", "left.max"]["reason"]
    assert rows[wide, "hill_exponent", "16"]["reason"] is None


# Nulls ----------------------------------------------------------------------------------------------------------


def test_nulls_stand_beside_every_computed_row_by_default(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float32")
    compared(base, tuned, tmp_path / "out")
    for key, row in rows_of(tmp_path / "out").items():
        if row["status"] == "computed":
            assert row["null_mean"] is not None, key
            assert row["null_std"] is not None, key
            assert row["null_std"] >= 0, key


def test_the_gaussian_null_agrees_with_another_sampling_of_it(tmp_path: Path) -> None:
    draws = 40
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float32")
    rows = rows_of(opdgeo.compare(base, tuned, roles="q_proj,down_proj", settings=Settings(nulls=draws)).measurements)
    for name in (planted.tensor_name(0, "self_attn.q_proj"), planted.tensor_name(1, "mlp.down_proj")):
        before, after = planted.stored(BASE[name], "float32"), planted.stored(TUNED[name], "float32")
        for (diagnostic, variant), (mean, deviation) in gaussian_null(before, after, draws, seed=11).items():
            row = rows[name, diagnostic, variant]
            standard_error = math.sqrt((deviation**2 + row["null_std"] ** 2) / draws)
            assert abs(row["null_mean"] - mean) <= 5 * standard_error + 1e-9 * abs(mean), (name, diagnostic, variant)
            if deviation > 1e-9 * abs(mean):
                assert 0.5 < row["null_std"] / deviation < 2, (name, diagnostic, variant)


def test_the_shuffled_null_keeps_the_entries(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), "float32")
    settings = Settings(nulls=8, null="shuffled")
    rows = rows_of(opdgeo.compare(base, tuned, roles="v_proj,o_proj", settings=settings).measurements)
    for name in (planted.tensor_name(0, "self_attn.v_proj"), planted.tensor_name(0, "self_attn.o_proj")):
        norm = rows[name, "frobenius_norm", ""]
        assert norm["null_mean"] == pytest.approx(norm["value"], rel=1e-12)
    low_rank = rows[planted.tensor_name(0, "self_attn.o_proj"), "stable_rank", ""]
    assert low_rank["null_mean"] > 4 * low_rank["value"]  # shuffling spreads a rank-3 update over the spectrum


# Degenerate matrices --------------------------------------------------------------------------------------------


def test_unmoved_and_non_finite_matrices(tmp_path: Path) -> None:
    still, nan, inf = NAMES[0], NAMES[1], NAMES[2]
    before, after = dict(BASE), dict(TUNED)
    after[still] = before[still]
    after[nan] = after[nan].copy()
    after[nan][3, 5] = np.nan
    before[inf] = before[inf].copy()
    before[inf][0, 0] = np.inf
    base, tuned = write_pair(tmp_path, (before, after), "float16")
    out = tmp_path / "out"
    done = compared(base, tuned, out, "--nulls", 2, status=3)
    rows = rows_of(out)
    assert {name for name, _, _ in rows} == set(NAMES)
    for (name, diagnostic, variant), row in rows.items():
        if name in (nan, inf):
            assert (row["status"], row["value"], row["null_mean"]) == ("skipped", None, None), (diagnostic, variant)
            assert ("NaN" if name == nan else "inf") in row["reason"] or "finite" in row["reason"]
    check_rows(
        rows, still, measure(planted.stored(before[still], "float16"), planted.stored(after[still], "float16")).values
    )
    for name in NAMES[3:]:
        check_rows(
            rows, name, measure(planted.stored(before[name], "float16"), planted.stored(after[name], "float16")).values
        )
    said = " ".join((done.stdout + done.stderr).split())
    assert nan in said.replace(" ", "") or "2 of 14" in said or "12 of 14" in said, said
    (checkpoint,) = json.loads((out / "summary.json").read_text())["checkpoints"]
    for block in checkpoint["diagnostics"]:
        missing = 2 + (rows[still, block["diagnostic"], block["variant"]]["status"] == "undefined")
        assert block["total"] == 14
        assert block["computed"] <= 14 - missing


ODD = {
    "self_attn.q_proj": (1, 40), "self_attn.k_proj": (40, 1), "self_attn.v_proj": (1, 1), "self_attn.o_proj": (2, 2),
    "mlp.gate_proj": (200, 3), "mlp.up_proj": (3, 200), "mlp.down_proj": (33, 32),
}  # fmt: skip


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_odd_shapes_and_scales(scale: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    before = {planted.tensor_name(0, m): planted.weights(rng, *shape, scale=scale) for m, shape in ODD.items()}
    after = {name: w + planted.low_rank_update(rng, w, 4, 0.05) for name, w in before.items()}
    base, tuned = write_pair(tmp_path, (before, after), "float32")
    rows = rows_of(opdgeo.compare(base, tuned, settings=Settings(nulls=2)).measurements)
    for name in before:
        stored = planted.stored(before[name], "float32"), planted.stored(after[name], "float32")
        check_rows(rows, name, measure(*stored).values)


def test_a_subspace_without_a_gap_is_undefined_with_that_reason(tmp_path: Path) -> None:
    name = planted.tensor_name(0, "self_attn.q_proj")
    before = {name: np.diag([4.0] * 20 + [2.0] * 20)}
    after = {name: before[name] + 1e-2 * np.random.default_rng(1).standard_normal((40, 40))}
    base, tuned = write_pair(tmp_path, (before, after), "float32")
    found = rows_of(opdgeo.compare(base, tuned, settings=Settings(nulls=2, rank=10)).measurements)
    angle = found[name, "principal_angles", "left.max"]
    assert angle["status"] == "undefined"
    assert "gap" in angle["reason"]
    assert found[name, "principal_energy", "left.64"]["status"] == "computed"  # its cut, 20, lies in the gap
    assert found[name, "spectral_shift", ""]["status"] == "computed"


# Laws on whole checkpoints --------------------------------------------------------------------------------------


def test_swapping_the_checkpoints_negates_the_update(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    settings = Settings(nulls=0)
    forth = rows_of(opdgeo.compare(base, tuned, settings=settings).measurements)
    back = rows_of(opdgeo.compare(tuned, base, settings=settings).measurements)
    for key, row in forth.items():
        if key[1] in (
            "update_sparsity",
            "frobenius_norm",
            "operator_norm",
            "stable_rank",
            "hill_exponent",
            "principal_angles",
        ):
            assert back[key]["status"] == row["status"]
            if row["value"] is not None:
                assert back[key]["value"] == pytest.approx(
                    row["value"], rel=1e-9, abs=row["error"] + back[key]["error"]
                ), key


def test_bound_ratios_never_exceed_one(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    frame = opdgeo.compare(base, tuned).measurements.filter(diagnostic="bound_ratio", status="computed")
    assert frame.height > 3 * 10
    assert ((frame["value"] - frame["error"]) <= 1).all()
    assert (frame["value"] <= 1 + 1e-9).all()


# Trajectories ---------------------------------------------------------------------------------------------------


def write_run(folder: Path, dtype: str = "float32") -> tuple[Path, Path, dict[int, dict[str, Matrix]]]:
    """A base and a run of three steps (2, 10, 100) whose updates grow from 20 % to all of the planted one, with noise."""
    rng = np.random.default_rng(8)
    base = planted.write_checkpoint(folder / "base", BASE, dtype)
    steps: dict[int, dict[str, Matrix]] = {}
    for step, share in ((100, 1.0), (2, 0.2), (10, 0.6)):
        steps[step] = {
            n: w + share * (TUNED[n] - w) + 1e-4 * share * rng.standard_normal(w.shape) for n, w in BASE.items()
        }
        planted.write_checkpoint(folder / "run" / f"checkpoint-{step}", steps[step], dtype)
    (folder / "run" / "logs").mkdir()
    return base, folder / "run", steps


def test_a_trajectory_agrees_with_the_reference(tmp_path: Path) -> None:
    base, run, steps = write_run(tmp_path)
    out = tmp_path / "out"
    done = run_opdgeo("track", base, run, "-o", out, "--no-report", "--nulls", 3)
    assert done.returncode == 0, done.stderr[-3000:]
    frame = pl.read_parquet(out / "measurements.parquet")
    assert dict(frame.schema) == SCHEMA
    assert frame["step"].unique().sort().to_list() == [2, 10, 100]
    before = {n: planted.stored(BASE[n], "float32") for n in NAMES}
    deltas = {s: {n: planted.stored(w[n], "float32") - before[n] for n in NAMES} for s, w in steps.items()}
    for step, previous in ((2, None), (10, 2), (100, 10)):
        rows = rows_of(frame.filter(step=step))
        for name in NAMES:
            expected = measure(before[name], before[name] + deltas[step][name]).values
            delta = deltas[step][name]
            others = {"final": deltas[100][name], "previous": deltas[previous][name] if previous else None}
            for kind, other in others.items():
                for k in (1, 2, 4, 8, 16, 32):
                    of = None if other is None else subspace_similarity(delta, other, k)
                    left = None if other is None else subspace_similarity(delta.T, other.T, k)
                    expected["subspace_similarity", f"{kind}.{k}"] = of
                    expected["subspace_similarity", f"{kind}.left.{k}"] = left
            channels = {"first": deltas[2][name] if previous else None, "previous": others["previous"]}
            for kind, other in channels.items():
                of = None if other is None else channel_energy(delta, other)
                left = None if other is None else channel_energy(delta.T, other.T)
                expected["channel_energy", f"{kind}.16"] = of
                expected["channel_energy", f"{kind}.left.16"] = left
            check_rows(rows, name, expected)
            for key, row in rows.items():
                if key[0] == name and key[1] in ("subspace_similarity", "channel_energy"):
                    assert (row["null_mean"] is None) == (row["value"] is None), key
                    assert row["null_mean"] is None or 0 < row["null_mean"] <= 1, key
    summary = json.loads((out / "summary.json").read_text())["checkpoints"]
    locked = json.loads((out / "summary.json").read_text())["locking"]
    assert [(one["side"], one["rank"]) for one in locked] == [
        (s, k) for s in ("right", "left") for k in (1, 2, 4, 8, 16, 32)
    ]
    for one in locked:
        variant = f"final.{'left.' if one['side'] == 'left' else ''}{one['rank']}"
        of = frame.filter(diagnostic="subspace_similarity", variant=variant)
        means = [of.filter(step=step)["value"].mean() for step in (2, 10)]
        for threshold, step in zip(one["thresholds"], one["step"], strict=True):
            assert step == (2 if min(means) >= threshold else 10 if means[1] >= threshold else None)
    assert [(c["checkpoint"], c["step"]) for c in summary] == [
        ("checkpoint-2", 2),
        ("checkpoint-10", 10),
        ("checkpoint-100", 100),
    ]


def test_the_walk_null_shares_a_prefix(tmp_path: Path) -> None:
    # Independent sampling of a walk with the observed increments' norms, for one matrix of each shape.
    base, run, steps = write_run(tmp_path)
    draws, names = 60, [planted.tensor_name(1, m) for m in ("self_attn.o_proj", "mlp.up_proj")]
    rows = opdgeo.track(base, run, roles="o_proj,up_proj", settings=Settings(nulls=1)).measurements
    rng = np.random.default_rng(12)
    for name in names:
        before = planted.stored(BASE[name], "float32")
        points = [before] + [planted.stored(steps[s][name], "float32") for s in (2, 10, 100)]
        norms = [float(np.linalg.norm(b - a)) for a, b in itertools.pairwise(points)]
        sampled: dict[tuple[int, str, str], list[float]] = {}
        for _ in range(draws):
            walk = [np.zeros_like(before)]
            for norm in norms:
                noise = rng.standard_normal(before.shape)
                walk.append(walk[-1] + noise * (norm / np.linalg.norm(noise)))
            for step, kind, one, two in ((2, "final", 1, 3), (10, "final", 2, 3), (10, "previous", 2, 1)):
                for k in (1, 4, 16):
                    found = (
                        subspace_similarity(walk[one], walk[two], k),
                        subspace_similarity(walk[one].T, walk[two].T, k),
                    )
                    for side, value in zip(("", "left."), found, strict=True):
                        assert value is not None
                        sampled.setdefault((step, "subspace_similarity", f"{kind}.{side}{k}"), []).append(value)
            for step, kind, at, channel in ((10, "previous", 2, 1), (100, "previous", 3, 2), (100, "first", 3, 1)):
                found = channel_energy(walk[at], walk[channel]), channel_energy(walk[at].T, walk[channel].T)
                for side, value in zip(("", "left."), found, strict=True):
                    assert value is not None
                    sampled.setdefault((step, "channel_energy", f"{kind}.{side}16"), []).append(value)
        for (step, diagnostic, variant), values in sampled.items():
            row = rows_of(rows.filter(step=step))[name, diagnostic, variant]
            mean, deviation = np.mean(values), np.std(values, ddof=1)
            assert abs(row["null_mean"] - mean) <= 5 * math.hypot(deviation / draws**0.5, row["null_std"] / 4), (
                step,
                variant,
            )


# Pairing --------------------------------------------------------------------------------------------------------


def test_unmatched_tensors_are_reported_and_the_rest_is_measured(tmp_path: Path) -> None:
    before, after = dict(BASE), dict(TUNED)
    gone, new = NAMES[0], planted.tensor_name(7, "mlp.up_proj")
    del after[gone]
    after[new] = np.ones((4, 4))
    base, tuned = write_pair(tmp_path, (before, after))
    out = tmp_path / "out"
    done = compared(base, tuned, out, "--nulls", 0)
    pairing = json.loads((out / "run.json").read_text())["pairing"]
    assert pairing["measured"] == 13
    assert pairing["base_only"] == [gone]
    assert pairing["tuned_only"] == [new]
    assert {name for name, _, _ in rows_of(out)} == set(NAMES) - {gone}
    assert "unmatched" in done.stdout + done.stderr or gone in (done.stdout + done.stderr).replace("\n", "")


def test_embedding_head_and_norms_are_counted_and_not_measured(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    compared(base, tuned, tmp_path / "out", "--nulls", 0)
    pairing = json.loads((tmp_path / "out" / "run.json").read_text())["pairing"]
    assert pairing["not_selected"] == {"embedding": 1, "head": 1, "norm": 5}


def test_a_tied_head_is_not_an_unmatched_tensor(tmp_path: Path) -> None:
    after = {n: w for n, w in TUNED.items() if n != "lm_head.weight"}
    base = planted.write_checkpoint(tmp_path / "base", BASE)
    tuned = planted.write_checkpoint(tmp_path / "tuned", after, config={"tie_word_embeddings": True})
    compared(base, tuned, tmp_path / "out", "--nulls", 0)
    pairing = json.loads((tmp_path / "out" / "run.json").read_text())["pairing"]
    assert (pairing["tied"], pairing["base_only"]) == (["lm_head.weight"], [])


# Bad input ------------------------------------------------------------------------------------------------------


def refused(out: Path, *arguments: object) -> str:
    """The message of a refused request: exit status 2, one clean message, no results left behind."""
    done = run_opdgeo(*arguments, "-o", out)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, (done.returncode, said[-2000:])
    assert "Traceback" not in said
    left = sorted(p.name for p in out.iterdir()) if out.exists() else []
    assert not [name for name in left if name in DATA_FILES], left
    return said


def test_a_missing_folder(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    said = refused(tmp_path / "out", "compare", base, tmp_path / "nowhere")
    assert "nowhere" in said
    assert "expected" in said


def test_a_folder_without_weights(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("{}")
    said = refused(tmp_path / "out", "compare", tmp_path / "empty", base)
    assert "empty" in said
    assert "model.safetensors" in said


def test_two_architectures(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    other = planted.write_checkpoint(tmp_path / "other", TUNED, config={"model_type": "qwen3"})
    said = refused(tmp_path / "out", "compare", base, other)
    assert "llama" in said
    assert "qwen3" in said


def test_nothing_in_common(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    gpt2 = {f"h.{i}.mlp.c_fc.weight": np.ones((8, 32)) for i in range(2)}
    planted.write_safetensors(tmp_path / "gpt2.safetensors", gpt2, "float32")
    said = refused(tmp_path / "out", "compare", base, tmp_path / "gpt2.safetensors")
    assert "gpt2.safetensors" in said
    assert "base" in said


def test_a_truncated_file(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    file = tuned / "model.safetensors"
    raw = file.read_bytes()
    for keep in (0, 4, 100, len(raw) // 2, len(raw) - 1):  # in the length, in the header, in the data
        file.write_bytes(raw[:keep])
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            opdgeo.compare(base, tuned)
    said = refused(tmp_path / "out", "compare", base, tuned)
    assert "tuned/model.safetensors" in said.replace(" ", "")


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), shards=3)
    (tuned / "model-00002-of-00003.safetensors").unlink()
    said = refused(tmp_path / "out", "compare", base, tuned)
    assert "model-00002-of-00003.safetensors" in said.replace(" ", "")


def test_an_index_that_points_out_of_its_folder(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED), shards=2)
    planted.write_safetensors(tmp_path / "secret.safetensors", BASE, "bfloat16")
    index = {"weight_map": dict.fromkeys(BASE, "../secret.safetensors")}
    (tuned / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "secret.safetensors" in refused(tmp_path / "out", "compare", base, tuned)


def test_a_shape_mismatch_names_both_sides(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    other = planted.write_checkpoint(tmp_path / "other", {**TUNED, NAMES[4]: TUNED[NAMES[4]][:, :40]})
    said = refused(tmp_path / "out", "compare", base, other)
    for part in (NAMES[4], "96×48", "96×40", str(base), str(other)):
        assert part in said or part in said.replace(" ", ""), part


def test_options_out_of_range(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    for option, value in (("--roles", "queries"), ("--mask-share", "1.5")):
        said = refused(tmp_path / "out", "compare", base, tuned, f"{option}={value}")
        assert value in said
        assert "expected" in said
    wrong: list[dict[str, Any]] = [
        {"rank": 0},
        {"top_k": -1},
        {"mask_rank": 0},
        {"nulls": -2},
        {"eta": math.nan},
        {"mask_share": ()},
    ]
    for asked in wrong:
        with pytest.raises(ConfigError, match="expected"):
            Settings(**asked)


def test_a_run_folder_without_checkpoints(tmp_path: Path) -> None:
    base, _ = write_pair(tmp_path, (BASE, TUNED))
    (tmp_path / "run").mkdir()
    said = refused(tmp_path / "out", "track", base, tmp_path / "run")
    assert "run" in said
    assert "step-" in said or "checkpoint-" in said


def test_a_refused_run_leaves_earlier_results_as_they_were(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    out = tmp_path / "out"
    compared(base, tuned, out, "--nulls", 0)
    before = {file: (out / file).read_bytes() for file in DATA_FILES if (out / file).exists()}
    assert run_opdgeo("compare", base, tmp_path / "nowhere", "-o", out).returncode == 2
    assert {file: (out / file).read_bytes() for file in DATA_FILES if (out / file).exists()} == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("scale", "measured"), [(1e90, True), (1e157, False), (1e-250, True)])
def test_numbers_whose_squares_leave_float64_end_no_survey(scale: float, measured: bool, tmp_path: Path) -> None:
    rng, name = np.random.default_rng(0), planted.tensor_name(0, "mlp.up_proj")
    base = rng.standard_normal((40, 30))
    folders = [tmp_path / f"step-{i}" for i in range(3)]
    for i, folder in enumerate(folders):
        planted.write_checkpoint(folder, {name: base}, "float32")  # its configuration
        weights = torch.from_numpy(scale * (base + 0.1 * i * rng.standard_normal(base.shape)))
        save_file({name: weights}, folder / "model.safetensors", metadata={"format": "pt"})
    for result in (
        opdgeo.compare(*folders[:2], out=tmp_path / "compared", cache=False),
        opdgeo.track(folders[0], folders[1:], out=tmp_path / "tracked", cache=False),
        opdgeo.relate(*folders, out=tmp_path / "related", cache=False),
    ):
        rows = result.measurements
        assert ("computed" in rows["status"].to_list()) == measured
        for column in ("value", "error", "null_mean", "null_std"):
            assert rows[column].drop_nulls().is_finite().all(), column
        if not measured:
            assert "entries beyond 1e+100" in rows["reason"][0]

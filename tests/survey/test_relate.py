"""`opdgeo relate` on planted updates of one base: every number against its answer or the reference, and the program as a user runs it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from opdgeo.diagnostics import of_pairs
from opdgeo.diagnostics.diagnostic import ONE_UNMOVED
from opdgeo.diagnostics.subspace_similarity import RANKS
from opdgeo.errors import ConfigError
from program import kept_matrices, run_opdgeo
from reference import Matrix, disagreement, related

ROWS, COLS = 60, 44
NAME, SECOND = planted.tensor_name(0, "mlp.up_proj"), planted.tensor_name(1, "self_attn.q_proj")
DIRECTED = {name for name, d in of_pairs().items() if d.directed}
EXACT = {("update_cosine", ""), ("update_multiple", ""), ("sign_agreement", ""), ("visible_jaccard", "")}

Rows = dict[tuple[str, str], dict[str, Any]]


def relate(folder: Path, updates: dict[str, Matrix], dtype: str = "float32", **options: Any) -> opdgeo.Result:
    """The result for one matrix; what is planted in multiples of 2⁻²⁵ is exact in float32."""
    weights = exact(planted.weights(np.random.default_rng(0), ROWS, COLS))
    base = planted.write_checkpoint(folder / "base", {NAME: weights}, dtype)
    given = [planted.write_checkpoint(folder / n, {NAME: weights + u}, dtype) for n, u in updates.items()]
    return opdgeo.relate(base, *given, cache=False, **options)


def exact(values: Matrix) -> Matrix:
    """Multiples of 2⁻²⁵: sums of a few below 1/2 are float32."""
    return np.asarray(np.round(values * 2**25) / 2**25)


def seen(result: opdgeo.Result, first: str, other: str, matrix: str = NAME) -> Rows:
    """The rows of a pair as the first is seen against the other: those that are the same both ways are stored once."""
    table = result.measurements.filter(matrix=matrix).filter(
        ((pl.col("checkpoint") == first) & (pl.col("other") == other))
        | ((pl.col("checkpoint") == other) & (pl.col("other") == first) & ~pl.col("diagnostic").is_in(list(DIRECTED)))
    )
    rows = {(row["diagnostic"], row["variant"]): row for row in table.iter_rows(named=True)}
    assert len(rows) == len(table)
    return rows


def low_rank(seed: int, spectrum: list[float], scale: float = 2e-2) -> tuple[Matrix, Matrix, Matrix]:
    """U, σ and V with orthonormal columns."""
    rng, s = np.random.default_rng(seed), scale * np.asarray(spectrum)
    return planted.orthonormal(rng, ROWS, len(s)), s, planted.orthonormal(rng, COLS, len(s))


NOISE = 2e-3 * np.random.default_rng(7).standard_normal((3, ROWS, COLS))


def test_an_update_against_itself_its_opposite_and_its_double_is_exactly_that(tmp_path: Path) -> None:
    one = exact(NOISE[0])
    result = relate(tmp_path, {"a": one, "same": one, "opposite": -one, "double": 2 * one})
    for other, cosine, multiple, signs in (("same", 1, 1, 1), ("opposite", -1, -1, 0), ("double", 1, 0.5, 1)):
        rows = seen(result, "a", other)
        assert rows["update_cosine", ""]["value"] == cosine
        assert rows["update_multiple", ""]["value"] == multiple
        assert seen(result, other, "a")["update_multiple", ""]["value"] == 1 / multiple
        assert rows["sign_agreement", ""]["value"] == signs
        for key, row in rows.items():
            if key[0] == "shared_subspace":
                assert row["value"] == pytest.approx(1, abs=row["error"]) and row["error"] < 1e-9, key
    assert seen(result, "a", "same")["visible_jaccard", ""]["value"] == 1
    assert seen(result, "a", "same")["update_cosine", ""]["null_std"] == pytest.approx(1 / math.sqrt(ROWS * COLS))
    itself = seen(result, "a", "same")["shared_channel", "right.16"]
    sigma = np.linalg.svd(one, compute_uv=False)
    assert itself["value"] == pytest.approx((sigma[:16] ** 2).sum() / (sigma**2).sum(), abs=itself["error"] + 1e-12)
    (pair,) = (p for p in result.summary["pairs"] if (p["checkpoint"], p["other"]) == ("a", "same"))
    assert next(d for d in pair["diagnostics"] if d["diagnostic"] == "update_cosine")["together"]["value"] == 1


def test_orthogonal_updates_share_nothing(tmp_path: Path) -> None:
    """Disjoint columns: entries, signs, right directions; the left ones are planted apart too."""
    u, _, _ = low_rank(1, [1.0] * 16)
    v = np.eye(COLS)
    fall = 2e-2 * 0.8 ** np.arange(8)
    one, other = (u[:, :8] * fall) @ v[:, :8].T, (u[:, 8:] * fall) @ v[:, 8:16].T
    weights = {"a": exact(one), "b": exact(other)}
    rows = seen(relate(tmp_path, weights, settings=opdgeo.Settings(top_k=4)), "a", "b")
    assert rows["update_cosine", ""]["value"] == rows["update_multiple", ""]["value"] == 0
    assert rows["visible_jaccard", ""]["value"] == rows["visible_lift", ""]["value"] == 0
    assert rows["sign_agreement", ""]["status"] == "undefined"
    assert rows["sign_agreement", ""]["reason"] == "no entry moved visibly in bf16 in both updates"
    for key in (("shared_subspace", "right.4"), ("shared_channel", "right.4")):
        assert rows[key]["value"] == pytest.approx(0, abs=rows[key]["error"])
    for key in (("shared_subspace", "left.4"), ("shared_channel", "left.4")):
        assert rows[key]["value"] == pytest.approx(0, abs=1e-9), "rounded to 2⁻²⁵"


@pytest.mark.parametrize("degrees", [0.5, 30.0, 75.0])
def test_a_rotation_by_a_known_angle_is_found(degrees: float, tmp_path: Path) -> None:
    """Every one of the four leading directions is turned by the same angle: Sim_4 = cos²θ on both sides; the cosine is cos θ · cos θ."""
    rng = np.random.default_rng(3)
    one, other = planted.rotated_pair(rng, ROWS, COLS, [0.4] * 4 + [0.0] * 4, 4, [degrees] * 4, [degrees] * 4)
    result = relate(tmp_path, {"a": one, "b": other}, settings=opdgeo.Settings(top_k=4))
    rows, share = seen(result, "a", "b"), math.cos(math.radians(degrees)) ** 2
    for side in ("right", "left"):
        similar, channel = rows["shared_subspace", f"{side}.4"], rows["shared_channel", f"{side}.4"]
        assert similar["value"] == pytest.approx(share, abs=similar["error"] + 1e-6)
        assert channel["value"] == pytest.approx(share, abs=channel["error"] + 1e-6)
    assert rows["update_cosine", ""]["value"] == pytest.approx(share, abs=1e-6)
    assert rows["shared_subspace", "right.8"]["status"] == "undefined", "rank four: the fifth direction is rounding"


@pytest.mark.parametrize("k", [1, 3, 6])
def test_updates_that_share_k_directions_of_eight(k: int, tmp_path: Path) -> None:
    """Sim_8 = k/8 on the right, 0 on the left, and the curve over K says where they stop."""
    fall = [0.8**i for i in range(8)]
    u, s, v = low_rank(4, [1.0] * 16)
    s = 2e-1 * np.asarray(fall)
    shared = np.hstack([v[:, :k], v[:, 8 : 16 - k]])
    one, other = (u[:, :8] * s) @ v[:, :8].T, (u[:, 8:] * s) @ shared.T
    result = relate(tmp_path, {"a": one, "b": other}, settings=opdgeo.Settings(top_k=8))
    rows = seen(result, "a", "b")
    right, left = rows["shared_subspace", "right.8"], rows["shared_subspace", "left.8"]
    assert right["value"] == pytest.approx(k / 8, abs=right["error"] + 1e-6)
    assert left["value"] == pytest.approx(0, abs=left["error"] + 1e-6)
    energy = (s[:k] ** 2).sum() / (s**2).sum()
    assert rows["shared_channel", "right.8"]["value"] == pytest.approx(energy, abs=1e-6)
    curves = {row["curve"]: row["values"] for row in result.curves.iter_rows(named=True)}
    expected = [min(k, rank) / rank for rank in range(1, 9)]
    assert curves["similarity_right"][:8] == pytest.approx(expected, abs=1e-6)
    assert len(curves["similarity_right"]) == min(max(RANKS), COLS // 2)
    assert curves["similarity_right"][8:] == [None] * (len(curves["similarity_right"]) - 8)
    assert curves["similarity_right_null"] == pytest.approx([rank / COLS for rank in range(1, 23)])


@pytest.mark.parametrize("dtype", planted.DTYPES)
def test_every_row_agrees_with_the_reference(dtype: str, tmp_path: Path) -> None:
    """Unrelated, half shared, sparse, of other sizes: rounded to the dtype as a checkpoint is."""
    rng = np.random.default_rng(5)
    weights = planted.weights(rng, ROWS, COLS)
    updates = {"a": NOISE[0], "b": 0.3 * NOISE[0] + NOISE[1], "c": 0.02 * NOISE[2] * (rng.random((ROWS, COLS)) < 0.3)}
    base = planted.write_checkpoint(tmp_path / "base", {NAME: weights}, dtype)
    given = {n: planted.write_checkpoint(tmp_path / n, {NAME: weights + u}, dtype) for n, u in updates.items()}
    result = opdgeo.relate(base, *given.values(), cache=False)
    at = {n: planted.stored(weights + u, dtype) for n, u in updates.items()} | {"base": planted.stored(weights, dtype)}
    for first in updates:
        for other in updates.keys() - {first}:
            rows, expected = seen(result, first, other), related(at["base"], at[first], at[other], ranks=RANKS)
            assert rows.keys() == expected.keys()
            for key, row in rows.items():
                exact_key = (key[0], key[1])
                wrong = disagreement(exact_key, row["value"], row["error"], expected[exact_key])
                # A float16 update of so small a norm is determined to a lower rank than the reference knows.
                assert wrong is None or (row["status"] == "undefined" and "rounding of the stored" in row["reason"]), (
                    wrong
                )


def test_an_update_that_did_not_move_is_undefined_and_one_that_is_broken_is_skipped(tmp_path: Path) -> None:
    broken = NOISE[1].copy()
    broken[3, 4] = np.nan
    result = relate(tmp_path, {"a": exact(NOISE[0]), "still": 0 * NOISE[0], "broken": broken})
    for rows in (seen(result, "a", "still"), seen(result, "still", "a")):
        assert {(row["status"], row["reason"], row["value"]) for row in rows.values()} == {
            ("undefined", ONE_UNMOVED, None)
        }
        assert all(row["null_mean"] is None for row in rows.values())
    for rows in (seen(result, "a", "broken"), seen(result, "broken", "still")):
        reasons = {(row["status"], row["reason"]) for row in rows.values()}
        assert reasons == {("skipped", "1 non-finite entries in broken")}
    pairs = {(p["checkpoint"], p["other"]): p for p in result.summary["pairs"]}
    assert pairs["a", "still"]["unmoved"] == 1
    assert all(d["mean"] is d["together"] is None for d in pairs["a", "still"]["diagnostics"])
    assert result.skipped == [NAME]


def test_models_of_another_origin_share_the_base_that_both_lack(tmp_path: Path) -> None:
    """A − W₀ and B − W₀ of three unrelated models: relative norm √2, cosine ½."""
    others = {n: planted.weights(np.random.default_rng(i), ROWS, COLS) for i, n in enumerate(("a", "b"), 1)}
    weights = exact(planted.weights(np.random.default_rng(0), ROWS, COLS))
    result = relate(tmp_path, {n: w - weights for n, w in others.items()})
    assert seen(result, "a", "b")["update_cosine", ""]["value"] == pytest.approx(0.5, abs=0.06)
    norms = result.measurements.filter(diagnostic="relative_norm")["value"]
    assert norms.to_list() == pytest.approx([math.sqrt(2)] * 2, rel=0.1)


# All matrices together ------------------------------------------------------------------------------------------


def test_all_matrices_together_are_one_long_vector(tmp_path: Path) -> None:
    """Three matrices of other shapes and sizes; in one of them one update did not move. Against the entries of all in one row."""
    rng = np.random.default_rng(8)
    shapes = {NAME: (40, 30), SECOND: (20, 50), planted.tensor_name(2, "mlp.down_proj"): (24, 32)}
    weights = {n: exact(planted.weights(rng, *shape)) for n, shape in shapes.items()}
    common = {n: rng.standard_normal(shape) for n, shape in shapes.items()}
    ups = {}
    for i, name in enumerate(("a", "b")):
        scale = {n: 1e-3 * (1 + 2 * place * (i + 1)) for place, n in enumerate(shapes)}
        ups[name] = {n: exact(scale[n] * (common[n] + rng.standard_normal(common[n].shape))) for n in shapes}
    ups["b"][SECOND] *= 0
    base = planted.write_checkpoint(tmp_path / "base", weights, "float32")
    for name, up in ups.items():
        planted.write_checkpoint(tmp_path / name, {n: weights[n] + up[n] for n in shapes}, "float32")
    result = opdgeo.relate(base, tmp_path / "a", tmp_path / "b", cache=False)
    long = [np.concatenate([of[n].ravel() for n in shapes]) for of in (weights, *(dict(ups[u]) for u in "ab"))]
    whole = related(*(x[None] for x in (long[0], long[0] + long[1], long[0] + long[2])), top_k=1)
    back = related(*(x[None] for x in (long[0], long[0] + long[2], long[0] + long[1])), top_k=1)
    pairs = {(p["checkpoint"], p["other"]): p for p in result.summary["pairs"]}
    checked = set()
    for (first, _), pair in pairs.items():
        assert pair["unmoved"] == 1
        for entry in pair["diagnostics"]:
            key = entry["diagnostic"], entry["variant"]
            if key in EXACT | {("visible_lift", "")}:
                together = entry["together"]
                expected = (whole if first == "a" else back)[key]
                assert together["value"] == pytest.approx(expected, abs=together["error"] + 1e-12), key
                assert together["error"] < 1e-9
                checked.add((first, key[0]))
            if entry["diagnostic"] == "update_cosine":  # independent isotropic updates of these norms, matrix by matrix
                sizes = [[float((ups[u][n] ** 2).sum()) for n in shapes] for u in "ab"]
                entries = [math.prod(shape) for shape in shapes.values()]
                spread = sum(a * b / n for a, b, n in zip(*sizes, entries, strict=True)) / sum(sizes[0]) / sum(sizes[1])
                assert entry["together"]["null_std"] == pytest.approx(math.sqrt(spread))
            if entry["diagnostic"] == "shared_channel":
                part = result.measurements.filter(
                    checkpoint=first, diagnostic="shared_channel", variant=entry["variant"]
                )
                norms = {n: float((ups[first][n] ** 2).sum()) for n in shapes}
                known = part.filter(pl.col("value").is_not_null())
                w = np.array([norms[n] for n in known["matrix"]])
                assert entry["together"]["value"] == pytest.approx(
                    float((w * known["value"].to_numpy()).sum() / w.sum())
                )
    assert checked == {("a", name) for name, _ in EXACT | {("visible_lift", "")}} | {("b", "update_multiple")}
    for pair in pairs.values():
        for entry in pair["diagnostics"]:
            if entry["null"]:
                assert entry["mean"] - entry["null"]["mean"] == pytest.approx(entry["null"]["excess"], abs=1e-12)


# Formats --------------------------------------------------------------------------------------------------------


def adapter(folder: Path, name: str, factors: dict[str, tuple[Matrix, Matrix]]) -> Path:
    """A LoRA in PEFT's layout: B (rows, r), A (r, cols)."""
    state, at = {}, folder / name
    at.mkdir(parents=True)
    rank = next(iter(factors.values()))[0].shape[1]
    for tensor, (up, down) in factors.items():
        module = f"base_model.model.{tensor.removesuffix('.weight')}"
        state[f"{module}.lora_B.weight"] = torch.from_numpy(up.astype(np.float32))
        state[f"{module}.lora_A.weight"] = torch.from_numpy(down.astype(np.float32))
    save_file(state, at / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (at / "adapter_config.json").write_text(json.dumps(config))
    return at


def test_an_adapter_and_its_merged_checkpoint_are_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(9)
    weights = planted.weights(rng, ROWS, COLS).astype(np.float32).astype(float)
    up, down = (
        x.astype(np.float32).astype(float)
        for x in (rng.standard_normal((ROWS, 4)), 1e-2 * rng.standard_normal((4, COLS)))
    )
    base = planted.write_checkpoint(tmp_path / "base", {NAME: weights}, "float32")
    lora = adapter(tmp_path, "lora", {NAME: (up, down)})
    again = shutil.copytree(lora, tmp_path / "again")
    merged = planted.write_checkpoint(tmp_path / "merged", {NAME: weights}, "float32")
    save_file({NAME: torch.from_numpy(weights + up @ down)}, merged / "model.safetensors")  # float64: the sum itself
    from opdgeo.numerics.operators import LowRankMatrix

    def formed(*_: object) -> None:
        raise AssertionError("the factors were multiplied out")

    for method in ("dense", "row_blocks"):
        monkeypatch.setattr(LowRankMatrix, method, formed)
    result = opdgeo.relate(base, lora, merged, again, cache=False, settings=opdgeo.Settings(top_k=4))
    rows = seen(result, "lora", "merged")
    for key in (
        ("update_cosine", ""),
        ("update_multiple", ""),
        ("shared_subspace", "right.4"),
        ("shared_channel", "left.4"),
    ):
        assert rows[key]["value"] == pytest.approx(1, abs=rows[key]["error"] + 1e-12), key
        assert rows[key]["error"] < 1e-9
    assert rows["visible_jaccard", ""]["value"] == rows["sign_agreement", ""]["value"] == 1
    assert (
        rows["shared_subspace", "right.8"]["reason"].startswith("singular value 8")
        or rows["shared_subspace", "right.8"]["status"] == "undefined"
    )
    for key in EXACT:
        assert seen(result, "lora", "again")[key]["value"] == 1, key


def test_what_no_shared_name_tells_apart(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weights = planted.weights(rng, 24, 16)
    base = planted.write_checkpoint(tmp_path / "base", {NAME: weights}, "float32")
    runs = [
        planted.write_checkpoint(
            tmp_path / f"seed{i}" / "checkpoint-5", {NAME: weights + 1e-3 * rng.standard_normal((24, 16))}, "float32"
        )
        for i in range(2)
    ]
    result = opdgeo.relate(base, *runs, cache=False)
    assert set(result.measurements["checkpoint"]) == {"seed0/checkpoint-5", "seed1/checkpoint-5"}
    assert set(result.measurements["step"]) == {5}
    with pytest.raises(ConfigError, match="given twice"):
        opdgeo.relate(base, runs[0], runs[0])
    with pytest.raises(ConfigError, match="two or more"):
        opdgeo.relate(base, runs[0])


# The program ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three updates of two matrices: two that share a part, and one of its own."""
    folder = tmp_path_factory.mktemp("relate")
    rng = np.random.default_rng(0)
    weights = {n: planted.weights(rng, 48, 40) for n in (NAME, SECOND)}
    planted.write_checkpoint(folder / "base", weights, "bfloat16")
    common = {n: 2e-3 * rng.standard_normal(w.shape) for n, w in weights.items()}
    for name, part in (("seed0", 1.0), ("rlvr", 0.0), ("seed1", 1.0)):
        up = {n: w + part * common[n] + 1e-3 * rng.standard_normal(w.shape) for n, w in weights.items()}
        planted.write_checkpoint(folder / name, up, "bfloat16")
    return folder


def run(folders: Path, out: Path, *options: object, updates: tuple[str, ...] = ("seed0", "rlvr", "seed1")) -> Any:
    return run_opdgeo("relate", folders / "base", *(folders / u for u in updates), "-o", out, "--no-cache", *options)


def test_the_command_writes_what_the_function_returns(folders: Path, tmp_path: Path) -> None:
    done = run(folders, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    result = opdgeo.relate(folders / "base", *(folders / u for u in ("seed0", "rlvr", "seed1")), cache=False)
    stored = opdgeo.load(tmp_path / "out")
    assert stored.measurements.equals(result.measurements) and stored.curves.equals(result.curves)
    assert stored.summary == json.loads(json.dumps(result.summary))
    assert stored.run["pairs"] == 3
    assert "other" in result.to_pandas().columns
    assert len(stored.measurements.unique(["checkpoint", "other", "matrix", "diagnostic", "variant"])) == len(
        stored.measurements
    )
    unlike = run(folders, tmp_path / "roles", "--roles", "q_proj", "--nulls", 0, "--top-k", 3, "--no-report")
    assert unlike.returncode == 0, unlike.stderr
    table = pl.read_parquet(tmp_path / "roles" / "measurements.parquet")
    assert set(table["matrix"]) == {SECOND} and table["null_mean"].null_count() == len(table)
    assert {"right.3"} <= set(table["variant"])


def test_the_plan_reads_headers_and_the_help_teaches(folders: Path, tmp_path: Path) -> None:
    plan = run(folders, tmp_path / "out", "--plan")
    assert plan.returncode == 0 and "2 matrices, 3 checkpoint(s)" in plan.stdout
    assert not (tmp_path / "out").exists()
    shown = run_opdgeo("relate", "--help").stdout
    assert "opdgeo relate anchor/" in shown and "--mask-rank" not in shown and "--top-k" in shown
    one = run_opdgeo("relate", folders / "base", folders / "rlvr")
    assert one.returncode == 2 and "B" in one.stderr


def test_another_result_stays_and_the_same_one_goes_on(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run_opdgeo("compare", folders / "base", folders / "seed0", "-o", out, "--no-report", "--nulls", 0)
    assert first.returncode == 0, first.stderr
    refused = run(folders, out, "--no-report")
    assert refused.returncode == 2 and "--overwrite" in refused.stderr
    assert run(folders, out, "--no-report", "--overwrite").returncode == 0
    kept = (out / "measurements.parquet").read_bytes()
    again = run(folders, out, "--no-report")
    assert again.returncode == 0 and "taken over from an earlier run" in again.stdout, again.stderr
    assert (out / "measurements.parquet").read_bytes() == kept
    back = run_opdgeo("compare", folders / "base", folders / "seed0", "-o", out, "--no-report", "--nulls", 0)
    assert back.returncode == 2 and "the result of relate" in back.stderr
    fewer = run(folders, out, "--no-report", updates=("seed0", "rlvr"))
    assert fewer.returncode == 2, "the third's numbers would be lost"
    other = run(folders, out, "--no-report", "--top-k", 4)
    assert other.returncode == 0 and "sign_agreement" in other.stdout, "what reads no rank is taken over"
    fresh = run(folders, tmp_path / "fresh", "--no-report", "--top-k", 4)
    assert fresh.returncode == 0
    for name in ("measurements.parquet", "curves.parquet", "summary.json"):
        assert (out / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes(), name


def test_a_killed_run_goes_on_from_its_matrices(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ended after the first matrix, the second call measures the other one alone, and the bytes are those of an undisturbed run."""
    from opdgeo.survey import engines

    given = [folders / u for u in ("seed0", "rlvr", "seed1")]
    opdgeo.relate(folders / "base", *given, cache=False).save(tmp_path / "whole")
    plain: Callable[..., Any] = engines.measure
    calls: list[str] = []

    def ending(job: Any, matrix: Any, known: Any = None) -> Any:
        calls.append(matrix.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(job, matrix, known)

    monkeypatch.setattr(engines, "measure", ending)
    with pytest.raises(KeyboardInterrupt):
        opdgeo.relate(folders / "base", *given, cache=False, workers=1, out=tmp_path / "out")
    assert kept_matrices(tmp_path / "out") == 1
    opdgeo.relate(folders / "base", *given, cache=False, workers=1, out=tmp_path / "out").save(tmp_path / "out")
    assert len(calls) == 3
    for name in ("measurements.parquet", "curves.parquet", "summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name

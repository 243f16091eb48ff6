"""Runs stored as chains of weight deltas measure what the same run in whole checkpoints does, to the last digit.

The deltas are written as slime's trainer writes them: by the zstandard, xxhash and safetensors libraries.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
import zstandard
from safetensors.torch import load_file, save_file

import opdgeo
from delta_writer import INDEX, Weights, publish
from opdgeo.errors import CheckpointError

SETTINGS = opdgeo.Settings(rank=8, top_k=4, mask_rank=8, nulls=1)
CONFIG = {"model_type": "qwen3"}


def save(folder: Path, weights: Weights) -> Path:
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def steps() -> list[Weights]:
    """A bf16 model and four versions after it, of which each changes a few per cent of the entries of some tensors."""
    rng = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{m}.weight" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.down_proj")]
    first = {n: (0.02 * torch.randn(40, 32, generator=rng)).bfloat16() for n in names}
    first["model.norm.weight"] = torch.ones(32, dtype=torch.bfloat16)
    versions = [first]
    for step in range(4):
        after = {n: t.clone() for n, t in versions[-1].items()}
        for name in names[: 2 + step % 3]:
            mask = torch.rand(40, 32, generator=rng) < 0.05
            after[name][mask] += 0.01 * torch.randn(int(mask.sum()), generator=rng).bfloat16()
        versions.append(after)
    return versions


@pytest.fixture
def run(steps: list[Weights], tmp_path: Path) -> tuple[Path, Path]:
    """The base and a run of two encodings and two checksums."""
    ways = (("xor", "xxh3-128"), ("overwrite", "xxh3-128"), ("xor", "adler32"), ("overwrite", "adler32"))
    for version, (encoding, checksum) in enumerate(ways, 1):
        publish(tmp_path / "run", version, steps[version - 1], steps[version], encoding, checksum)
    return save(tmp_path / "base", steps[0]), tmp_path / "run"


@pytest.mark.parametrize("anchored", [False, True])
def test_a_chain_measures_what_whole_checkpoints_do(
    anchored: bool, run: tuple[Path, Path], steps: list[Weights], tmp_path: Path
) -> None:
    base, deltas = run
    whole = [save(tmp_path / "whole" / f"weight_v{v:06d}", steps[v]) for v in range(1, 5)]
    if anchored:  # a version in whole, from which the chain goes on
        shutil.rmtree(deltas / "weight_v000002")
        shutil.copytree(whole[1], deltas / "weight_v000002")
    expected = opdgeo.track(base, tmp_path / "whole", settings=SETTINGS, cache=False)
    found = opdgeo.track(base, deltas, settings=SETTINGS, cache=False, workers=1, out=tmp_path / "out")
    assert found.measurements["step"].unique().to_list() == [1, 2, 3, 4]
    assert found.measurements.equals(expected.measurements)
    assert found.curves.equals(expected.curves)
    manifest = found.run["checkpoints"][2]
    assert manifest["format"] == "weight delta" and manifest["base_version"] == 2
    names = [f["name"] for f in manifest["files"]]
    assert names == ["model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", INDEX]
    last = opdgeo.compare(base, deltas / "weight_v000004", settings=SETTINGS, cache=False)
    other = opdgeo.compare(base, whole[3], settings=SETTINGS, cache=False)
    assert last.measurements.equals(other.measurements)


def test_tensors_are_rebuilt_to_the_bit_in_any_order(run: tuple[Path, Path], steps: list[Weights]) -> None:
    base = opdgeo.open_checkpoint(run[0])
    opened = [opdgeo.open_checkpoint(run[1] / f"weight_v{v:06d}", base) for v in range(1, 5)]
    for order in ((0, 1, 2, 3), (3, 0, 2, 1), (2, 2, 3, 3)):
        for name in steps[0]:
            for at in order:
                stored = opened[at].tensors[name]
                assert torch.equal(stored[(slice(None),) * len(stored.shape)], steps[at + 1][name])
                assert torch.equal(
                    stored[(slice(3, 9), *[slice(None)] * (len(stored.shape) - 1))], steps[at + 1][name][3:9]
                )


def index_with(**facts: Any) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        index = run / "weight_v000003" / INDEX
        known = json.loads(index.read_text())
        index.write_text(json.dumps(known | {"metadata": known["metadata"] | facts}))

    return change


def shard_with(frame: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        file = run / "weight_v000003" / "model-00000-of-00002.safetensors"
        with safetensors.safe_open(file, framework="np") as opened:
            sums = opened.metadata()
        found = {n: np.frombuffer(frame(t.tobytes()), np.uint8) for n, t in safetensors.numpy.load_file(file).items()}
        file.write_bytes(safetensors.numpy.save(found, metadata=sums))

    return change


def outside(run: Path) -> None:
    index = run / "weight_v000003" / INDEX
    known = json.loads(index.read_text())
    known["weight_map"] = dict.fromkeys(known["weight_map"], "../weight_v000002/model-00000-of-00002.safetensors")
    index.write_text(json.dumps(known))


def bomb(_: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=1).compress(bytes(1 << 26))


def other_type(run: Path) -> None:
    file = run / "weight_v000003" / "model-00000-of-00002.safetensors"
    frames = {n: torch.zeros(8, dtype=torch.bfloat16) for n in safetensors.numpy.load_file(file)}
    with safetensors.safe_open(file, framework="np") as opened:
        save_file(frames, file, metadata=opened.metadata())


REFUSALS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a version is missing": (lambda r: shutil.rmtree(r / "weight_v000002"), r"builds on version 2.*is missing"),
    "another encoding": (index_with(delta_encoding="add"), r"delta_encoding 'add'.*xor, overwrite"),
    "another compression": (index_with(compression_format="lz4"), r"'lz4'"),
    "another checksum": (index_with(checksum_format="crc"), r"'crc'"),
    "no base version": (index_with(base_version=None), r"base_version"),
    "an infinite base version": (index_with(base_version=float("inf")), r"base_version.*infinity"),
    "a circle": (index_with(base_version="000003"), r"is missing"),
    "a path": (outside, r"no weight_map"),
    "not zstd": (shard_with(lambda b: b"x" * len(b)), r"cannot read the delta"),
    "another type": (other_type, r"cannot read the delta"),
    "cut off": (shard_with(lambda b: b[: len(b) // 2]), r"cannot read the delta|does not fit"),
    "longer than a change": (shard_with(bomb), r"longer than a change"),
    "other bytes": (
        shard_with(lambda b: zstandard.ZstdCompressor().compress(bytes(40 * 32 * 2))), r"another adler32 checksum",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_rebuilt_is_refused(case: str, run: tuple[Path, Path]) -> None:
    change, expected = REFUSALS[case]
    change(run[1])
    with pytest.raises(CheckpointError, match=expected):
        opdgeo.track(run[0], run[1], settings=SETTINGS, cache=False)


def test_a_chain_needs_the_checkpoint_it_started_from(run: tuple[Path, Path], tmp_path: Path) -> None:
    base, deltas = run
    with pytest.raises(CheckpointError, match=r"track BASE RUN_DIR"):
        opdgeo.open_checkpoint(deltas / "weight_v000001")
    weights = load_file(base / "model.safetensors")
    other = save(tmp_path / "other", {n: t + 0.5 for n, t in weights.items()})
    with pytest.raises(CheckpointError, match=r"another xxh3-128 checksum.*Is BASE the checkpoint"):
        opdgeo.compare(other, deltas / "weight_v000001", settings=SETTINGS)
    wider = save(tmp_path / "wider", {n: t.float() for n, t in weights.items()})
    with pytest.raises(CheckpointError, match=r"for 2560 bytes.* has 5120.*same dtype"):
        opdgeo.compare(wider, deltas / "weight_v000001", settings=SETTINGS)
    part = save(tmp_path / "part", {n: t for n, t in weights.items() if "layers.0.mlp" not in n})
    result = opdgeo.compare(part, deltas / "weight_v000001", settings=SETTINGS)
    assert "changes 1 tensors that" in result.run["checkpoints"][0]["notes"][0]

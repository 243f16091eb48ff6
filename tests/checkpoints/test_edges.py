"""What lies on the edge of what a format allows; parts of tensors, whichever way these are stored; servers that answer later."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
from delta_writer import publish
from hub_server import Answer, Hub
from opdgeo.checkpoints import transport
from opdgeo.checkpoints.stored import Pieces, Raw, Rows, Stored, contiguous
from opdgeo.checkpoints.zero import Stretches
from opdgeo.errors import CheckpointError


def test_a_delta_may_change_every_byte(tmp_path: Path) -> None:
    """Then it is as long as a delta can be."""
    name = "model.layers.0.self_attn.q_proj.weight"
    before = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    after = before.view(torch.int16).bitwise_not().view(torch.bfloat16)
    (tmp_path / "base").mkdir()
    save_file({name: before}, tmp_path / "base" / "model.safetensors")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "qwen3"}')
    base = opdgeo.open_checkpoint(tmp_path / "base")
    for encoding in ("xor", "overwrite"):
        version = publish(tmp_path / encoding, 1, {name: before}, {name: after}, encoding)
        found = opdgeo.open_checkpoint(version, base).tensors[name][(slice(None), slice(None))]
        assert torch.equal(found.view(torch.int16), after.view(torch.int16))


SHAPE = (6, 4, 3)
TRUTH = torch.arange(72, dtype=torch.float32).reshape(SHAPE)


def stored(kind: str, folder: Path) -> Stored:
    """`TRUTH`, on disk after a few other bytes."""
    file, begin = folder / "file", 20
    flat = TRUTH.numpy()
    order = {"raw": (0, 1, 2), "by columns": (2, 1, 0)}.get(kind, (0, 1, 2))
    swapped = kind == "big-endian"
    written = flat.transpose(order).astype(">f4" if swapped else "<f4")
    file.write_bytes(bytes(begin) + written.tobytes() + b"end")
    strides = contiguous(written.shape)
    whole = Raw(file, begin, SHAPE, tuple(strides[order.index(a)] for a in range(3)), "float32", swapped=swapped)
    if kind == "stretches":  # that break inside of rows; one is empty
        starts = (0, 5, 5, 30, 71)
        ends = (*starts[1:], 72)
        parts = tuple(Raw(file, begin + 4 * a, (b - a,), (1,), "float32") for a, b in zip(starts, ends, strict=True))
        return Stretches("t", SHAPE, parts, starts)
    if kind == "pieces":  # a cut through each of two axes, and one that lies twice
        boxes = [
            (slice(0, 4), slice(0, 3)),
            (slice(4, 6), slice(0, 3)),
            (slice(0, 6), slice(3, 4)),
            (slice(1, 3), slice(1, 4)),
        ]
        pieces = []
        for i, (a, b) in enumerate(boxes):
            part, at = np.ascontiguousarray(flat[a, b]), folder / str(i)
            at.write_bytes(part.tobytes())
            pieces.append(((a.start, b.start, 0), Raw(at, 0, part.shape, contiguous(part.shape), "float32")))
        return Pieces("t", SHAPE, tuple(pieces))
    return whole


@pytest.mark.parametrize("kind", ["raw", "by columns", "big-endian", "stretches", "pieces"])
def test_a_part_of_a_stored_tensor_is_that_part_of_the_tensor(kind: str, tmp_path: Path) -> None:
    tensor = stored(kind, tmp_path)
    asked = (0, 3, 5), (1, 3), (0, 2)
    for axes in itertools.product(
        [*asked[0], slice(None), slice(1, 4), slice(5, 9), slice(2, 2)],
        [*asked[1], slice(None), slice(1, 3)],
        [*asked[2], slice(0, 2)],
    ):
        found, expected = tensor[axes], TRUTH[axes]
        assert found.shape == expected.shape and torch.equal(found, expected), axes


def test_rows_of_a_tensor_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = Rows(stored("raw", tmp_path), ((2, 4), (0, 1)), (3,))
    expected = TRUTH[3][[2, 3, 0]]
    assert rows.shape == (3, 3) and torch.equal(rows[slice(None), slice(None)], expected)
    assert torch.equal(rows[1, slice(1, 3)], expected[1, 1:3])


def test_a_file_that_ends_within_a_tensor_is_refused(tmp_path: Path) -> None:
    tensor = stored("raw", tmp_path)
    file, size = tmp_path / "file", 20 + 72 * 4
    file.write_bytes(file.read_bytes()[:size])
    assert torch.equal(tensor[5, 3, slice(None)], TRUTH[5, 3])
    file.write_bytes(file.read_bytes()[: size - 1])
    with pytest.raises(CheckpointError, match="ends before a tensor"):
        tensor[5, 3, slice(None)]
    assert torch.equal(tensor[0, 0, slice(None)], TRUTH[0, 0])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub({"org/model": {"model.safetensors": bytes(range(200))}}) as one:
        for name, value in one.environment(tmp_path / "hf").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", one.url)
        monkeypatch.setattr(transport, "PAUSE", 0.0)
        yield one


@pytest.mark.parametrize(
    ("status", "waited"),
    [*((s, True) for s in (408, 429, 500, 502, 503, 504)), *((s, False) for s in (400, 404, 410, 501))],
)
def test_a_server_that_may_answer_later_is_asked_again(status: int, waited: bool, hub: Hub) -> None:
    url = transport.address("org/model", hub.commit("org/model"), "model.safetensors")

    def bend(answer: Answer) -> None:
        tries.append(answer.status)
        answer.status = status if len(tries) <= often else answer.status

    hub.bend = bend
    tries: list[int] = []
    often = transport.TRIES - 1
    if waited:
        assert b"".join(transport.part(url, 10, 30, {})) == bytes(range(10, 30))
        assert len(tries) == often + 2  # the last goes on to the storage
    tries, often = [], 100
    with pytest.raises(CheckpointError, match=f"broke {transport.TRIES} times" if waited else "does not give"):
        list(transport.part(url, 10, 30, {}))
    assert len(tries) == (transport.TRIES if waited else 1)

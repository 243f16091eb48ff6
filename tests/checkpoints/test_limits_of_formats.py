"""What lies on the edge of what a format allows; parts of tensors, whichever way these are stored; servers that answer later."""

from __future__ import annotations

import itertools
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
from delta_writer import publish
from hub_server import Answer, Hub
from opdgeo.checkpoints import pickled, transport
from opdgeo.checkpoints.names import matrices
from opdgeo.checkpoints.patterns import Patterns
from opdgeo.checkpoints.stored import Pieces, Raw, Rows, Stored, contiguous
from opdgeo.checkpoints.torchfile import unpickle
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


def test_reads_that_the_system_cuts_short_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, preadv = stored("raw", tmp_path), os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, buffers, at: preadv(file, [buffers[0][:7]], at))
    assert torch.equal(tensor[1:5, :, :], TRUTH[1:5])


def long_form(file: Path, fields: tuple[str, ...]) -> None:
    """Write a zip's directory anew as of one beyond 4 GB: `fields` of every entry, and the place of the directory, in their long forms."""
    whole = file.read_bytes()
    end = whole.rindex(b"PK\5\6")
    count, _, offset = struct.unpack_from("<HII", whole, end + 10)
    directory, at = b"", offset
    for _ in range(count):
        fixed = bytearray(whole[at : at + 46])
        names, extra, comment = struct.unpack_from("<HHH", fixed, 28)
        values = dict(zip(("packed", "whole"), struct.unpack_from("<II", fixed, 20), strict=True))
        values["header"] = struct.unpack_from("<I", fixed, 42)[0]
        long = b""
        for field, place in (("whole", 24), ("packed", 20), ("header", 42)):  # the order of the extra field
            if field in fields:
                struct.pack_into("<I", fixed, place, 0xFFFFFFFF)
                long += struct.pack("<Q", values[field])
        more = b"AB" + struct.pack("<H", 3) + b"xyz" + struct.pack("<HH", 1, len(long)) + long
        struct.pack_into("<HHH", fixed, 28, names, len(more), 4)
        directory += bytes(fixed) + whole[at + 46 : at + 46 + names] + more + b"note"
        at += 46 + names + extra + comment
    where = offset + len(directory)
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, len(directory), offset)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, where, 1)
    last = b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    file.write_bytes(whole[:offset] + directory + record + locator + last)


@pytest.mark.parametrize("fields", [("whole", "packed", "header"), ("header",), ("whole", "packed"), ()])
def test_a_torch_file_beyond_four_gigabytes(fields: tuple[str, ...], tmp_path: Path) -> None:
    """Its zip has another directory, as torch reads it too."""
    state = {"model.norm.weight": torch.arange(5.0), "model.layers.0.mlp.up_proj.weight": TRUTH[0].clone()}
    file = tmp_path / "pytorch_model.bin"
    torch.save(state, file)
    long_form(file, fields)
    assert torch.load(file)["model.norm.weight"].tolist() == [0, 1, 2, 3, 4]
    opened = opdgeo.open_checkpoint(tmp_path).tensors
    assert opened.keys() == state.keys()
    assert all(torch.equal(opened[n][(slice(None),) * t.ndim], t) for n, t in state.items())
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"PK\6\6", b"PK\6\5"))
    with pytest.raises(CheckpointError, match="its zip is damaged"):
        opdgeo.open_checkpoint(tmp_path)


PATTERNS = r"[a-c]x [^a-c]x \dx \Dx \w\s \W [0-9_]+ a{2,3}x a+?x (a|bc)*x .x [^.]x b?x x\Z ^x"


@pytest.mark.parametrize("pattern", PATTERNS.split())
def test_a_pattern_of_module_names_means_what_it_means_in_python(pattern: str) -> None:
    names = (
        "ax",
        "cx",
        "dx",
        "5x",
        "_ ",
        "a ",
        "-",
        "07_",
        "aax",
        "aaaax",
        "bcax",
        "bcx",
        "x",
        "a.x",
        "a.bx",
        "bx\n",
        "\nx",
        "",
        ".x",
    )
    for name in names:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
        assert (Patterns({pattern: 1}).find(name) is not None) == expected, name


def test_names_of_experts() -> None:
    """Mixtral's, and those that every token passes."""
    config = {"model_type": "mixtral"}
    for w, role in {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}.items():
        (one,) = matrices(f"model.layers.3.block_sparse_moe.experts.12.{w}.weight", (7, 5), config)
        assert (one.layer, one.role, one.expert, one.rows, one.cols) == (3, role, 12, 7, 5)
    (one,) = matrices("model.layers.2.mlp.experts.9.up_proj.weight", (7, 5), {"model_type": "qwen3_moe"})
    assert (one.layer, one.role, one.expert) == (2, "up_proj", 9)
    (one,) = matrices("model.layers.2.mlp.shared_experts.up_proj.weight", (7, 5), {"model_type": "deepseek_v3"})
    assert (one.layer, one.role, one.expert) == (2, "up_proj", None)


def test_an_integer_of_a_pickle_has_at_most_512_bits() -> None:
    for value in (2**511, -(2**511), 2**512 - 1):
        assert pickled.load(pickle.dumps([value], 4), ()) == [value]
    with pytest.raises(CheckpointError, match="thousands of digits"):
        pickled.load(pickle.dumps([2**512], 4), ())


@pytest.mark.needs("gguf")
def test_a_gguf_model_in_parts(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3", split_max_tensors=1)
    writer.add_block_count(1)
    values = {
        f"blk.0.{part}.weight": np.arange(12, dtype=np.float32).reshape(3, 4) + i
        for i, part in enumerate(("ffn_up", "ffn_gate", "ffn_down"))
    }
    for name, value in values.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 3
    for place in (tmp_path, files[0]):
        opened = opdgeo.open_checkpoint(place).tensors
        for part, value in zip(("up", "gate", "down"), values.values(), strict=True):
            assert torch.equal(opened[f"model.layers.0.mlp.{part}_proj.weight"][:, :], torch.from_numpy(value))
    files[1].unlink()
    with pytest.raises(CheckpointError, match=r"in 3 parts, of which model-00002-of-00003\.gguf is missing"):
        opdgeo.open_checkpoint(tmp_path)


def test_numbers_of_every_type_that_torch_stores(tmp_path: Path) -> None:
    """Also those that are no weights: what lies beside these is read as what it is."""
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex128 complex64 uint16 uint32 uint64 float8_e5m2"
    state = {n: torch.arange(6).to(getattr(torch, n)).reshape(2, 3) for n in names.split()}
    for kind in ("float32", "bfloat16"):
        state[f"{kind} beside"] = state[kind][:, 1:]
    torch.save(state, tmp_path / "pytorch_model.bin")
    found = unpickle(tmp_path / "pytorch_model.bin")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        read = found[name][slice(None), slice(None)]
        assert read.dtype == tensor.dtype and torch.equal(
            read.view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


@pytest.mark.parametrize("protocol", range(6))
def test_what_pickles_of_every_protocol_hold(protocol: int) -> None:
    shared = [1, 2]
    held: list[object] = [
        None,
        True,
        False,
        0,
        255,
        256,
        70_000,
        -1,
        -(2**40),
        2**200,
        1.5,
        -0.25,
        "text",
        "\u00e9\u4e2d",
        "x" * 300,
        {},
        [],
        (),
        (1,),
        (1, 2),
        (1, 2, 3),
        (1, 2, 3, 4),
        {"a": 1},
        {"a": {"b": [3]}, 2: (4,)},
        [shared, shared],
        [7],
    ]
    found = pickled.load(pickle.dumps(held, protocol), ())
    assert found == held and [type(a) for a in found] == [type(b) for b in held]
    assert found[-2][0] is found[-2][1]


@pytest.mark.needs("gguf")
def test_a_gguf_header_with_facts_of_every_type(tmp_path: Path) -> None:
    """They are passed over to the byte."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3")
    writer.add_block_count(1)
    for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{kind}")(f"general.{kind}", 100)
    for kind in ("float32", "float64"):
        getattr(writer, f"add_{kind}")(f"general.{kind}", 0.5)
    writer.add_bool("general.bool", True)
    writer.add_string("general.text", "text")
    for name, values in {
        "texts": ["a", "bc"],
        "numbers": [1, 2, 3],
        "reals": [0.5],
        "bools": [True, False],
    }.items():
        writer.add_array(f"general.{name}", values)
    writer.add_tensor("blk.0.ffn_up.weight", TRUTH[0].numpy())
    short = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("blk.0.ffn_gate.weight", gguf.quants.quantize(TRUTH[1].numpy(), short), raw_dtype=short)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = opdgeo.open_checkpoint(tmp_path).tensors
    assert torch.equal(opened["model.layers.0.mlp.up_proj.weight"][:, :], TRUTH[0])
    gate = opened["model.layers.0.mlp.gate_proj.weight"]
    assert (gate.dtype, gate.quantised) == ("bfloat16", None) and torch.equal(gate[:, :], TRUTH[1].bfloat16())


def test_a_torch_file_that_does_not_say_the_order_of_its_bytes_is_little_endian(tmp_path: Path) -> None:
    """As before torch 2.1, which did not write it."""
    torch.save({"model.norm.weight": TRUTH[0].clone()}, tmp_path / "with")
    with zipfile.ZipFile(tmp_path / "with") as known, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as out:
        kept = [name for name in known.namelist() if not name.endswith("/byteorder")]
        assert len(kept) == len(known.namelist()) - 1
        for name in kept:
            out.writestr(name, known.read(name))
    found = opdgeo.open_checkpoint(tmp_path).tensors["model.norm.weight"]
    assert torch.equal(found[:, :], TRUTH[0])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_file_that_a_distributed_index_names_and_is_not_there(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import save

    save({"model.layers.0.mlp.up_proj.weight": TRUTH[0].clone()}, checkpoint_id=tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    assert torch.equal(opdgeo.open_checkpoint(tmp_path).tensors["model.layers.0.mlp.up_proj.weight"][:, :], TRUTH[0])
    (file,) = tmp_path.glob("*.distcp")
    file.unlink()
    with pytest.raises(CheckpointError, match=f"names {file.name}, which is missing"):
        opdgeo.open_checkpoint(tmp_path)

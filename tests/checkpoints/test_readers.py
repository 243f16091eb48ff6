"""Any checkpoint opens with its writer's values, or is refused: within 10 s of a core and 2 GB, and with the package's own error."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import struct
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from examples import examples
from opdgeo.checkpoints import ggufs, megatron, open_checkpoint, pair, patterns, pickled
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.checkpoints.patterns import Patterns
from opdgeo.checkpoints.stored import Pieces, Raw
from opdgeo.errors import CheckpointError, OpdgeoError, PairingError, printable
from zero_writer import UP, zero_folder

DOWN = "model.layers.0.mlp.down_proj.weight"


def some_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {UP: torch.randn(12, 8), DOWN: torch.randn(8, 12), "model.norm.weight": torch.randn(8).bfloat16()}


def check(folder: Path, state: dict[str, Tensor]) -> None:
    """Every tensor is read whole and in part as it was written."""
    opened = open_checkpoint(folder)
    assert opened.tensors.keys() == state.keys()
    for name, tensor in state.items():
        stored = opened.tensors[name]
        assert torch.equal(stored[(slice(None),) * tensor.ndim], tensor), name
        part = (slice(1, 5), *(slice(2, n) for n in tensor.shape[1:]))
        assert torch.equal(stored[part], tensor[part]), name


def test_memory_is_read_into_again_only_when_nothing_looks_at_it(tmp_path: Path) -> None:
    """Tensors, views of them and numpy's views each keep what was read, whatever is read after, also in other threads."""
    rng = torch.Generator().manual_seed(0)
    wanted = [torch.randint(256, (1100, 1000), dtype=torch.uint8, generator=rng) for _ in range(6)]
    (tmp_path / "raw").write_bytes(b"".join(w.numpy().tobytes() for w in wanted))
    stored = [Raw(tmp_path / "raw", i * 1_100_000, (1100, 1000), (1000, 1), "uint8") for i in range(6)]
    whole = (slice(None), slice(None))
    views: list[Any] = [stored[0][whole][5:9], stored[1][whole].numpy()[3:, 7], stored[2][whole].T, stored[3][whole]]
    with ThreadPoolExecutor(2) as pool:
        others = list(pool.map(lambda i: stored[i][whole], (4, 5, 4, 5)))
    for i in range(6):
        assert torch.equal(stored[i][whole], wanted[i])
    assert (
        torch.equal(views[0], wanted[0][5:9])
        and torch.equal(views[2], wanted[2].T)
        and torch.equal(views[3], wanted[3])
    )
    assert (views[1] == wanted[1].numpy()[3:, 7]).all()
    assert all(torch.equal(found, wanted[i]) for found, i in zip(others, (4, 5, 4, 5), strict=True))
    del views
    places = {stored[i][whole].data_ptr() for i in range(6)}
    assert len(places) <= 2, "memory that is free was not read into again"


# Sound checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("threads", "single", "several"), product((1, 2, 3), (True, False), (True, False)))
def test_a_distributed_checkpoint_over_the_writers_options(
    threads: int, single: bool, several: bool, tmp_path: Path
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    state = some_state() if several else {UP: some_state()[UP]}
    writer = FileSystemWriter(tmp_path, single_file_per_rank=single, thread_count=threads)
    dcp.save(state, storage_writer=writer, no_dist=True)
    check(tmp_path, state)


def test_a_grown_vocabulary_is_counted_and_a_matrix_of_another_shape_refused(tmp_path: Path) -> None:
    state = some_state()
    for name, words in (("base", 10), ("tuned", 13)):
        (tmp_path / name).mkdir()
        save_file(state | {"model.embed_tokens.weight": torch.ones(words, 8)}, tmp_path / name / "model.safetensors")
    found = pair(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned"))
    assert [m.name for m in found.matrices] == [UP, DOWN]
    assert found.not_selected["embedding of another shape"] == 1
    save_file(state | {UP: torch.ones(11, 8)}, tmp_path / "tuned" / "model.safetensors")
    with pytest.raises(PairingError, match=r"12×8 in .* and 11×8"):
        pair(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned"))
    # Not measured with these roles, and so not refused.
    found = pair(open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned"), "down_proj")
    assert found.not_selected["up_proj of another shape"] == 1


def test_a_big_endian_torch_file_is_read(tmp_path: Path) -> None:
    state = some_state()
    little = io.BytesIO()
    torch.save(state, little)
    with zipfile.ZipFile(little) as old, zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if "/data/" in name:
                size = 2 if len(data) == 16 else 4
                data = b"".join(data[i : i + size][::-1] for i in range(0, len(data), size))
            new.writestr(name, b"big" if name.endswith("byteorder") else data)
    check(tmp_path, state)


@pytest.mark.parametrize("big", [False, True])
def test_a_gguf_file_of_either_endianness(big: bool, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="gguf is not installed")
    state = some_state()
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3", endianess=order)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_token_list([b"a", b"b"])
    writer.add_tensor("blk.0.ffn_up.weight", state[UP].numpy())
    writer.add_tensor("blk.0.ffn_down.weight", state[DOWN].half().numpy())
    norm = gguf.quants.quantize(state["model.norm.weight"].float().numpy(), gguf.GGMLQuantizationType.BF16)
    writer.add_tensor("output_norm.weight", norm, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert torch.equal(opened.tensors[UP][:, :], state[UP])
    assert torch.equal(opened.tensors[DOWN][2:5, 1:], state[DOWN].half()[2:5, 1:])
    if big:  # the library's own writer and converter disagree on the order inside of these
        assert "whose writers disagree" in opened.tensors["model.norm.weight"].dtype
    else:
        assert torch.equal(opened.tensors["model.norm.weight"][:,], state["model.norm.weight"])


# Numbers that would be wrong ------------------------------------------------------------------------------------


def dcp_folder(path: Path, state: dict[str, Tensor], change: Callable[[Any], None]) -> Path:
    """A distributed checkpoint, and a change to its index."""
    import torch.distributed.checkpoint as dcp

    dcp.save(state, checkpoint_id=path, no_dist=True)
    metadata = pickle.loads((path / ".metadata").read_bytes())
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_of_another_dtype_than_its_chunks_is_refused(tmp_path: Path) -> None:
    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[UP].properties.dtype = torch.bfloat16

    opened = open_checkpoint(dcp_folder(tmp_path / "a", some_state(), change))
    with pytest.raises(CheckpointError, match=r"holds float32 .* promises bfloat16"):
        opened.tensors[UP][:, :]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_that_places_chunks_on_one_another_is_refused(tmp_path: Path) -> None:
    def change(metadata: Any) -> None:
        infos = list(metadata.storage_data.values())
        infos[1].offset, infos[1].length = infos[0].offset, infos[0].length

    with pytest.raises(CheckpointError, match="two chunks on the same bytes"):
        open_checkpoint(dcp_folder(tmp_path / "a", {UP: torch.ones(4, 4), DOWN: torch.ones(4, 4)}, change))


def test_overlapping_parts_are_compared(tmp_path: Path) -> None:
    whole = torch.randn(6, 4)
    whole[3, 1] = torch.nan  # equal to itself
    below = whole[2:].clone()
    for name, tensor in (("a", whole[:4]), ("b", below)):
        (tmp_path / name).write_bytes(tensor.numpy().tobytes())

    def pieces() -> Pieces:
        parts = (((0, 0), Raw(tmp_path / "a", 0, (4, 4), (4, 1), "float32")),)
        return Pieces("x", (6, 4), (*parts, ((2, 0), Raw(tmp_path / "b", 0, (4, 4), (4, 1), "float32"))))

    assert torch.equal(pieces()[:, :].nan_to_num(7), whole.nan_to_num(7))
    below[1, 2] += 1e-6
    (tmp_path / "b").write_bytes(below.numpy().tobytes())
    with pytest.raises(CheckpointError, match="cover the same entries with different values"):
        pieces()[:, :]
    assert torch.equal(pieces()[:2, :], whole[:2])  # where they do not meet, nothing is wrong
    with pytest.raises(CheckpointError, match="do not cover it"):
        Pieces("x", (7, 4), pieces().pieces[:1])[:, :]


# Small files that would hang, crash or fill the memory ----------------------------------------------------------


def within_limits(open_it: Callable[[], Any]) -> str:
    """Run in a process of its own, with 10 s of a core and 2 GB more than it has: "done", or the OpdgeoError's message."""
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            memory = pages * resource.getpagesize() + (2 << 30)
            resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
            used = int(sum(resource.getrusage(resource.RUSAGE_SELF)[:2]))
            resource.setrlimit(resource.RLIMIT_CPU, (used + 10, used + 11))
            try:
                open_it()
                text = "done"
            except OpdgeoError as error:
                text = f"OpdgeoError: {error}"
            except BaseException as error:
                text = f"{type(error).__name__}: {str(error)[:300]}"
            os.write(write, text.encode(errors="replace")[:4000])
        finally:
            os._exit(0)
    os.close(write)
    until = time.monotonic() + 600  # for a pipe that never answers: such a wait takes none of the core
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > until:
            os.kill(child, 9)
        time.sleep(0.02)
    with os.fdopen(read, "rb") as answer:
        text = answer.read().decode()
    assert ended[1] == 0, f"killed by signal {ended[1] & 127}"
    assert text == "done" or text.startswith("OpdgeoError"), text
    return text


def packed(
    path: Path, data: bytes, order: bytes = b"little", kind: int = zipfile.ZIP_STORED, **storages: bytes
) -> Path:
    """A torch file around a pickle."""
    with zipfile.ZipFile(path, "w", kind) as out:
        out.writestr("x/data.pkl", data)
        out.writestr("x/byteorder", order)
        out.writestr("x/.format_version", b"1")
        for key, content in storages.items():
            out.writestr(f"x/data/{key.removeprefix('k')}", content)
    return path


def tensor(shape: tuple[int, ...], stride: tuple[int, ...], entries: int, name: str = UP) -> bytes:
    """The pickle of {name: a float32 tensor of the storage 0}."""

    def ints(values: tuple[int, ...]) -> bytes:
        return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", v) for v in values) + b"t"

    storage = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu" + ints((entries,))[1:-1] + b"tQ"
    return (
        b"\x80\x02}X" + struct.pack("<I", len(name)) + name.encode() + b"ctorch._utils\n_rebuild_tensor_v2\n("
        + storage + b"K\0" + ints(shape) + ints(stride) + b"\x89}tRs."
    )  # fmt: skip


DOUBLED = b"\x80\x02)" + b"q\x00h\x00\x86" * 60
PICKLES = {
    "doubling tuples as a key": b"\x80\x02}" + DOUBLED[2:] + b"K\x01s.",
    "doubling tuples": DOUBLED + b".",
    "a million levels": b"\x80\x02" + b"]" * 1_000_000 + b"a" * 999_999 + b".",
    "a million levels of tuples": b"\x80\x02)" + b"\x85" * 1_000_000 + b".",
    "a gigabyte of bytes": b"\x80\x02c__builtin__\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "a length beyond the file": b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",
    "a place in the memo": b"\x80\x02Nr" + struct.pack("<I", (1 << 27) + 1) + b".",
    "an integer of a million digits": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "a long integer": b"\x80\x02\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20) + b".",
    "integers that collide": b"\x80\x02}(" + b"".join(
        b"\x8a\x10" + (i * ((1 << 61) - 1)).to_bytes(16, "little") + b"N" for i in range(1, 100_000)) + b"u.",
    "a list that holds itself": b"\x80\x02]q\x00h\x00a.",
    "a size of a long list over and over": b"\x80\x02](" + b"K\x01" * 100_000 + b"eq\x00" + b"0ctorch\nSize\nh\x00\x85R" * 1000 + b".",
    "millions of empty lists": b"\x80\x02(" + b"]" * 6_000_000 + b"l.",
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("where", ["bin", "metadata"])
def test_a_hostile_pickle_ends(case: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many instructions as are allowed in one place; the other, read by the same machine, has fewer to wait for."""
    if where == "bin":
        packed(tmp_path / "pytorch_model.bin", PICKLES[case])
    else:
        (tmp_path / ".metadata").write_bytes(PICKLES[case])
        monkeypatch.setattr(pickled, "MOST", pickled.MOST // 10)
    assert "OpdgeoError" in within_limits(lambda: open_checkpoint(tmp_path))


def test_hostile_torch_files_end(tmp_path: Path) -> None:
    file = tmp_path / "pytorch_model.bin"

    def read() -> str:
        return within_limits(lambda: open_checkpoint(file).tensors[UP][:, :])

    packed(file, tensor((4, 4), (4, 1), 16), k0=bytes(64))
    assert read() == "done"
    packed(file, tensor((4, 4), (4, 1), 16), b"big", k0=bytes(64))
    assert read() == "done"
    packed(file, tensor((4, 4), (4, 1), 16), b"middle", k0=bytes(64))
    assert "the order of its bytes" in read()
    packed(file, tensor((20_000, 20_000), (0, 0), 1), k0=bytes(4))
    assert file.stat().st_size < 1000 and "an expanded float32 tensor" in read()
    packed(file, tensor((1 << 40, 1 << 40), (1 << 40, 1), 1), k0=bytes(4))
    assert "larger than its storage" in read()
    packed(file, tensor((4, 4), (-4, 1), 16), k0=bytes(64))
    assert "OpdgeoError" in read()
    packed(file, b"\x80\x02]." + bytes(1 << 28), kind=zipfile.ZIP_DEFLATED)
    assert file.stat().st_size < 1 << 20 and "compressed" in read()
    torch.save(some_state(), file)
    whole = file.read_bytes()
    opened = open_checkpoint(file)
    file.write_bytes(whole[:500])  # cut short between opening and reading
    assert "OpdgeoError" in within_limits(lambda: opened.tensors[UP][:, :])


def test_tuples_that_double_are_not_written_out(tmp_path: Path) -> None:
    """Where a storage, a number of ranks or a name should stand: their text, their order and their hash take 2⁴⁰ steps."""
    doubled = b")" + b"q\x63h\x63\x86" * 40
    whole = tensor((4, 4), (4, 1), 16)
    start, end = whole.index(b"(X\x07\0\0\0storage"), whole.index(b"K\0(")
    packed(tmp_path / "pytorch_model.bin", whole[:start] + doubled + whole[end:], k0=bytes(64))
    assert "a storage that is none" in within_limits(lambda: open_checkpoint(tmp_path / "pytorch_model.bin"))
    for key in ("partition_count", "shared_params"):
        folder = zero_folder(tmp_path / key, some_state(), 2, 2)
        nested: Any = ()
        for _ in range(40):
            nested = (nested, nested)
        pattern = "*_optim_states.pt" if key == "partition_count" else "*_model_states.pt"
        for file in (folder / "global_step7").glob(pattern):
            content = torch.load(file, weights_only=True)
            if key == "partition_count":
                content["optimizer_state_dict"][key] = nested
            else:
                content[key] = {"lm_head.weight": nested}
            torch.save(content, file)
        within_limits(lambda folder=folder: open_checkpoint(folder))


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    """A link to itself, a name longer than any file's, a folder called like a file."""
    dcp_folder(tmp_path / "a", some_state(), lambda _: None)
    (tmp_path / "a" / "b.distcp").symlink_to("b.distcp")
    save_file(some_state(), tmp_path / "model.safetensors")
    (tmp_path / "latest").write_text("x" * 4000)
    (tmp_path / "model.gguf").mkdir()
    with pytest.raises(CheckpointError, match=r"Too many levels|symbolic link"):
        open_checkpoint(tmp_path / "a")
    assert open_checkpoint(tmp_path).tensors.keys() == some_state().keys()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {UP: "x" * 300 + ".safetensors"}}))
    with pytest.raises(CheckpointError, match=r"expected a \.safetensors file in the folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "a.gguf", ".metadata", "config.json",
                                  "model_world_size_1_rank_0.pt", "adapter_config.json", "model.safetensors.index.json"])  # fmt: skip
def test_a_pipe_where_a_file_is_expected_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    if name == "config.json":
        save_file(some_state(), tmp_path / "model.safetensors")
        assert within_limits(lambda: open_checkpoint(tmp_path)) == "done"
    else:
        assert "OpdgeoError" in within_limits(lambda: open_checkpoint(tmp_path))
    assert "OpdgeoError" in within_limits(lambda: open_checkpoint(tmp_path / name))
    assert "OpdgeoError" in within_limits(lambda: open_checkpoint("/dev/zero"))


def test_hostile_json_ends(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text in ("[" * 1_000_000, '{"a":' * 100_000, '{"a":' * 500 + "1" + "}" * 500, "1" * 10_000, "\udcff", "[]", ""):
        file.write_bytes(text.encode(errors="surrogateescape"))
        assert "OpdgeoError" in within_limits(lambda: read_json(file))
    with file.open("wb") as out:
        out.truncate(3 << 30)
    assert "expected JSON of at most" in within_limits(lambda: read_json(file))
    file.write_text(json.dumps({"text_config": [1], "model_type": {"a": 1}, "num_attention_heads": "x"}))
    save_file(some_state(), tmp_path / "model.safetensors")
    opened = open_checkpoint(tmp_path)
    assert len(pair(opened, opened).matrices) == 2


@pytest.mark.parametrize("shape", [(10**9, 0, 0), (10**9, 1, 0), (0, 4, 4)])
def test_stacks_of_empty_experts_end(shape: tuple[int, ...], tmp_path: Path) -> None:
    header = {"model.layers.0.mlp.experts.down_proj": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    header[UP] = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')

    def both() -> None:
        opened = open_checkpoint(tmp_path)
        assert [m.name for m in pair(opened, opened).matrices] == [UP]

    assert within_limits(both) == "done"


def safetensors_file(folder: Path, **more: dict[str, Any]) -> None:
    """A checkpoint of one matrix, with other entries in its header."""
    text = json.dumps({UP: {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}, **more}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))


@pytest.mark.parametrize("case", ["a product beyond any float", "a name of megabytes"])
def test_hostile_safetensors_headers_end(case: str, tmp_path: Path) -> None:
    name, shape = ("x", [1 << 62] * 20) if case.startswith("a product") else ("module." * 4_000_000 + "x", [0])
    safetensors_file(tmp_path, **{name: {"dtype": "F32", "shape": shape, "data_offsets": [16, 16]}})
    answer = within_limits(lambda: open_checkpoint(tmp_path))
    assert "is not a readable safetensors file" in answer and len(answer) < 9000


def distributed(folder: Path, sizes: dict[str, tuple[int, ...]], config: str = "{}") -> Any:
    """A Megatron checkpoint of tensors of ones, and its index, to be bent and written again with `rewrite`."""
    import torch.distributed.checkpoint as dcp

    dcp.save({name: torch.ones(size) for name, size in sizes.items()}, checkpoint_id=folder, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    (folder / "config.json").write_text(config)
    return pickle.loads((folder / ".metadata").read_bytes())


HEADS = '{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}'
MANY = json.dumps({"num_attention_heads": 1 << 40, "num_key_value_heads": 1 << 40, "head_dim": 1})
QKV, FC1 = "decoder.layers.0.self_attention.linear_qkv.weight", "decoder.layers.mlp.experts.experts.linear_fc1.weight"
FC2 = "decoder.layers.0.mlp.linear_fc2.weight"
MASTER = f"optimizer.state.fp32_param.{FC2}"
# What is saved, what the index then promises, config.json, the refusal ("" for none).
PROMISES: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]], str, str]] = {
    "groups of heads": ({QKV: (3, 1)}, {QKV: (3 << 40, 1)}, MANY, "groups of attention heads"),
    "layers of experts": ({FC1: (1, 1, 2, 1)}, {FC1: (4096, 16384, 2, 1)}, HEADS, "layers and experts"),
    "cells of a master": ({FC2: (4, 1), MASTER: (4, 1, 1)}, {FC2: (1 << 24, 1), MASTER: (1 << 24, 1, 1)}, HEADS,
                          "parts of an optimizer's master"),
    "a layer of thousands of digits": ({f"decoder.layers.{'9' * 5000}.mlp.linear_fc2.weight": (4, 4)}, {}, HEADS, ""),
    "too few axes": ({"decoder.layers.mlp.linear_fc2.weight": (4,)}, {}, HEADS, "fewer axes"),
    "no axes": ({"decoder.final_layernorm.weight": ()}, {}, HEADS, "fewer axes"),
    "a chunk of other axes": ({FC2: (4, 4)}, {FC2: (4, 4, 1)}, HEADS, "a chunk of 2 axes"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", PROMISES)
def test_what_a_distributed_index_promises_ends(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron, "MOST_TENSORS", 1 << 12)  # the same, with fewer to wait for
    saved, promised, config, refusal = PROMISES[case]
    index = distributed(tmp_path, saved, config)
    for name, size in promised.items():
        index.state_dict_metadata[name].size = torch.Size(size)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    answer = within_limits(lambda: open_checkpoint(tmp_path))
    assert answer == "done" if not refusal else answer.startswith("OpdgeoError") and refusal in answer


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_index_that_refers_to_one_list_of_chunks_over_and_over_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pickled, "MOST", pickled.MOST // 10)
    index = distributed(tmp_path, {FC2: (4, 4)}, HEADS)
    entry = index.state_dict_metadata[FC2]
    entry.chunks = entry.chunks * 20_000
    index.state_dict_metadata |= {f"x{i}": entry for i in range(1000)}
    ((key, place),) = index.storage_data.items()
    index.storage_data |= {type(key)(f"x{i}", key.offset): place for i in range(1000)}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert "refer to one another" in within_limits(lambda: open_checkpoint(tmp_path))


@pytest.mark.parametrize("part", ["self_attention.linear_proj.weight", "mlp.experts.experts.linear_fc2.weight"])
def test_megatrons_stacks_of_what_is_not_there_end(part: str, tmp_path: Path) -> None:
    """More layers, or experts, than any chunk holds, and a master without any: an index may promise both."""
    name = f"decoder.layers.{part}" if "proj" in part else f"decoder.layers.0.{part}"
    master = f"optimizer.state.fp32_param.{name}"
    index = distributed(tmp_path, {name: (1, 4, 4), master: (1, 4, 4)}, HEADS)
    index.state_dict_metadata[name].size = torch.Size([1 << 40, 4, 4])
    index.state_dict_metadata[master].size = torch.Size([0, 4, 4])
    (tmp_path / ".metadata").write_bytes(pickle.dumps(index))
    assert "expected at most" in within_limits(lambda: open_checkpoint(tmp_path))


def gguf_file(
    path: Path, values: bytes, count: int, infos: bytes = b"", tensors: int = 0, architecture: bytes = b"qwen3moe"
) -> Path:
    def text(t: bytes) -> bytes:
        return struct.pack("<Q", len(t)) + t

    head = text(b"general.architecture") + struct.pack("<I", 8) + text(architecture)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, count + 1) + head + values + infos + bytes(64))
    return path


def test_hostile_gguf_headers_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggufs, "MOST_LAYERS", 32)  # the same, with less to wait for
    monkeypatch.setattr(ggufs, "MOST_TENSORS", 1 << 15)

    def text(t: bytes) -> bytes:
        return struct.pack("<Q", len(t)) + t

    def info(name: bytes, *dims: int, kind: int = 0) -> bytes:
        return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, 0)

    file = tmp_path / "a.gguf"
    arrays = [(kind, count) for kind in (0, 8, 9, 12) for count in (1 << 40, (1 << 64) - 1)]
    for kind, count in arrays:
        gguf_file(file, text(b"a") + struct.pack("<IIQ", 9, kind, count), 1)
        assert "OpdgeoError" in within_limits(lambda: open_checkpoint(file))
    gguf_file(file, text(b"a") + struct.pack("<IIQ", 9, 8, 1 << 40), 1)
    with file.open("r+b") as out:  # as many empty texts as it promises, in a file of holes
        out.truncate(8 << 30)
    assert "texts in its header" in within_limits(lambda: open_checkpoint(file))
    for dims in ((0, 0, 10**9), (1, 1, 1 << 40), (0, 0, (1 << 64) - 1), (1 << 40, 1 << 40), (3, 1 << 62, 1 << 62)):
        gguf_file(file, b"", 0, info(b"blk.0.ffn_up_exps.weight", *dims), 1)
        within_limits(lambda: open_checkpoint(file))
    for dims in ((0, 1 << 51), (1, 1 << 23)):  # rows of nothing, and rows in a file of holes
        heads = text(b"llama.attention.head_count") + struct.pack("<II", 4, 2)
        gguf_file(file, heads, 1, info(b"blk.0.attn_q.weight", *dims), 1, architecture=b"llama")
        os.truncate(file, 64 << 20)
        assert within_limits(lambda: open_checkpoint(file)) == "done"
    gguf_file(file, heads, 1, info(b"blk.0.attn_q.weight", 0, 1 << 20) + b"".join(
        info(b"blk.%d.attn_k.weight" % i, 0, 1 << 20) for i in range(200)), 201, architecture=b"llama")  # fmt: skip
    assert within_limits(lambda: open_checkpoint(file)) == "done"
    layers = text(b"qwen3.block_count") + struct.pack("<II", 4, 20_000)
    scalars = b"".join(info(b"x%d" % i, 0) for i in range(20_000))
    gguf_file(
        file, layers, 1, scalars, 20_000, architecture=b"qwen3"
    )  # layers that the library's table would have names for
    assert within_limits(lambda: open_checkpoint(file)) == "done"
    stacks = b"".join(info(b"blk.%d.ffn_up_exps.weight" % i, 1, 1, 1 << 14) for i in range(1000))
    gguf_file(file, b"", 0, stacks, 1000)
    os.truncate(file, 1 << 20)
    assert "experts and more" in within_limits(lambda: open_checkpoint(file))
    gguf_file(file, text(b"tokenizer.chat_template") + struct.pack("<IQ", 8, 3 << 30), 1)
    os.truncate(file, 4 << 30)  # a text that is longer than the memory, in a file of holes
    assert within_limits(lambda: open_checkpoint(file)).startswith(("done", "OpdgeoError"))
    gguf_file(file, b"", 0, info(b"blk.0.attn_output.weight", 1 << 63, 1 << 63, kind=999), 1, architecture=b"qwen3")
    assert "has the shape" in within_limits(lambda: open_checkpoint(file))  # no table holds it
    gguf_file(file, b"", 0, b"", 1 << 62)
    assert "OpdgeoError" in within_limits(lambda: open_checkpoint(file))
    gguf_file(file, text(b"general.alignment") + struct.pack("<II", 4, 0), 1, info(b"x", 2), 1)
    within_limits(lambda: open_checkpoint(file))
    gguf_file(file, b"", 0, info(b"blk.0.ffn_up.weight", 2, 2, kind=999), 1)
    assert "does not know" in within_limits(lambda: open_checkpoint(file))


@pytest.mark.parametrize("ranks", [26, 40])
def test_meshes_of_ranks_that_are_not_there_end(ranks: int, tmp_path: Path) -> None:
    """A shard whose mesh has 2^n ranks by its layout, as torch's newer versions pickle it."""

    def name(module: str, last: str) -> bytes:
        return b"c" + module.encode() + b"\n" + last.encode() + b"\n"

    def text(t: str) -> bytes:
        return b"X" + struct.pack("<I", len(t)) + t.encode()

    def record(module: str, last: str, state: bytes) -> bytes:
        return name(module, last) + b")\x81}(" + state + b"ub"

    local = tensor((4, 4), (4, 1), 16)
    local = local[local.index(b"ctorch._utils") : -2]
    twos = b"(" + b"K\x02" * ranks + b"t"
    layout = record("torch.distributed._mesh_layout", "_MeshLayout", text("shape") + twos + text("stride") + twos)
    mesh = record("torch.distributed.device_mesh", "DeviceMesh", text("_layout") + layout + text("_rank_map") + local)
    place = record("torch.distributed.tensor.placement_types", "Shard", text("dim") + b"K\0")
    spec = record(
        "torch.distributed.tensor._dtensor_spec", "DTensorSpec",
        text("mesh") + mesh + text("placements") + b"(" + place + b"t",
    )  # fmt: skip
    whole = (
        name("torch._tensor", "_rebuild_from_type_v2") + b"(" + name("torch._utils", "_rebuild_wrapper_subclass")
        + name("torch.distributed.tensor", "DTensor") + b"(" + name("torch.distributed.tensor", "DTensor")
        + name("torch", "float32") + b"K\x04K\x04\x86K\x04K\x01\x86K\0N" + text("cpu") + b"\x89t"
        + b"}(" + text("_local_tensor") + local + text("_spec") + spec + b"utR"
    )  # fmt: skip
    packed(tmp_path / "model_world_size_1_rank_0.pt", b"\x80\x02}" + text(UP) + whole + b"s.", k0=bytes(64))
    assert "ranks; expected at most 1" in within_limits(lambda: open_checkpoint(tmp_path))


# Patterns of adapters -------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@examples(100)
@given(st.text("ab.|()*+?[]{}1,\\d^$", max_size=8), st.text("ab.1", max_size=6))
def test_patterns_match_as_python_matches_them(pattern: str, name: str) -> None:
    try:
        expected = re.match(rf"(.*\.)?({pattern})$", name) is not None
    except re.error:
        with pytest.raises(ValueError, match=r"no regular expression|missing|unterminated|nothing to repeat|bad"):
            Patterns({pattern: 1})
        return
    try:
        assert (Patterns({pattern: 1}).find(name) is not None) == expected
    except ValueError as error:
        assert re.search(r"does not follow|sets flags", str(error))


@pytest.mark.parametrize("pattern", ["((a+)+)+b", "(a|a)*b", "a?" * 40 + "a" * 40 + "b", "(.*)*(.*)*(.*)*b",
                                     "(((((a{0,99}){0,99}){0,99}){0,99}){0,99}){0,99}b", "(" * 5000 + ")" * 5000, "(a)\\1", "(?=a)a",
                                     "(?:(?:(?:){4000}){4000}){4000}", "(.*)(?:" + "|" * 300_000 + "b)b"])  # fmt: skip
def test_patterns_that_go_astray_end(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patterns, "_STEPS", patterns._STEPS // 10)

    def find() -> None:
        try:
            Patterns({pattern: 1}).find("a" * 400)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    assert within_limits(find).startswith(("done", "OpdgeoError"))


# What the tables could not hold ---------------------------------------------------------------------------------


def test_names_that_the_tables_cannot_hold_are_found_at_opening(tmp_path: Path) -> None:
    state = some_state()
    far = {f"model.layers.{10**10}.mlp.up_proj.weight": torch.ones(3, 3)}
    far |= {f"model.layers.{'9' * 5000}.mlp.up_proj.weight": torch.ones(3, 3)}
    (tmp_path / "base").mkdir()
    save_file(state | far, tmp_path / "base" / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    found = pair(base, base)
    assert [m.name for m in found.matrices] == [UP, DOWN] and len(found.unrecognised) == 2
    (tmp_path / f"step-{10**18}").mkdir()
    save_file(state, tmp_path / f"step-{10**18}" / "model.safetensors")
    with pytest.raises(CheckpointError, match="a step of 19 digits"):
        open_checkpoint(tmp_path / f"step-{10**18}")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/\ud800\x1b[2J"}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    module = f"base_model.model.{UP.removesuffix('.weight')}"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 8), f"{module}.lora_B.weight": torch.ones(12, 2)}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    note, _ = open_checkpoint(tmp_path / "adapter", base).notes
    note.encode()
    assert r"org/\ud800\x1b[2J" in note
    save_file({n: t.to(torch.int8) for n, t in factors.items()}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"int8|I8"):
        open_checkpoint(tmp_path / "adapter", base)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64, torch.int64])
def test_weights_that_are_no_plain_numbers_are_known_when_pairing(dtype: torch.dtype, tmp_path: Path) -> None:
    for name, kind in (("base", torch.float32), ("tuned", dtype)):
        (tmp_path / name).mkdir()
        torch.save(some_state() | {UP: torch.ones(12, 8).to(kind)}, tmp_path / name / "pytorch_model.bin")
    base, tuned = open_checkpoint(tmp_path / "base"), open_checkpoint(tmp_path / "tuned")
    found = pair(base, tuned)
    assert list(found.unreadable) == [UP]
    assert "Convert the checkpoint" in found.unreadable[UP] and found.to_json()["unreadable"] == found.unreadable
    with pytest.raises(CheckpointError, match="none of 1 matrices can be read"):
        pair(base, tuned, "up_proj")


def test_a_message_is_no_longer_than_a_screen_or_two() -> None:
    """A name in a file may have a gigabyte. What is wrong stands first, and what to try last."""
    text = str(CheckpointError("The name " + "x" * 10_000_000 + " is long. Copy it again."))
    assert len(text) < 9000 and text.startswith("The name x") and text.endswith("x is long. Copy it again.")


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert printable("a\x1b[2J\x9b\u202e\udcffé") == "a\\x1b[2J\\x9b\\u202e\\udcffé"


# DeepSpeed's layout ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "ranks", "frozen"), product((1, 2, 3), (1, 3, 12), (None, DOWN)))
def test_a_checkpoint_in_deepspeeds_layout(stage: int, ranks: int, frozen: str | None, tmp_path: Path) -> None:
    state = some_state() | {"model.layers.1.mlp.up_proj.weight": torch.randn(5, 7)}
    folder = zero_folder(tmp_path / "run", state, stage, ranks, frozen)
    expected = {n: t.float() for n, t in state.items()}
    check(folder, expected | {"lm_head.weight": expected[UP]})
    files = {f.name for f in open_checkpoint(folder).files}
    assert len(files) > 0 and files <= {f.name for f in (folder / "global_step7").iterdir()}


def test_a_file_added_to_a_zero_checkpoint_after_it_was_opened_is_not_read(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'trace'}",)

    state = some_state()
    folder = zero_folder(tmp_path / "run", state, 2, 2)
    opened = open_checkpoint(folder)
    for name in ("zero_pp_rank_9_mp_rank_00_optim_states.pt", "a_model_states.pt"):
        torch.save(Runs(), folder / "global_step7" / name)
    assert torch.equal(opened.tensors[UP][:, :], state[UP])
    with pytest.raises(CheckpointError):
        open_checkpoint(folder)
    assert not (tmp_path / "trace").exists()


def test_zero_checkpoints_that_lack_a_rank_or_are_too_short_are_refused(tmp_path: Path) -> None:
    folder = zero_folder(tmp_path / "a", some_state(), 3, 3)
    (folder / "global_step7" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match="3 ranks, and 2 of their files"):
        open_checkpoint(folder)
    folder = zero_folder(tmp_path / "b", some_state(), 2, 2)
    file = folder / "global_step7" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    content["param_shapes"][1][UP] = torch.Size((1 << 20, 1 << 20))
    torch.save(content, file)
    assert "vectors of" in within_limits(lambda: open_checkpoint(folder))

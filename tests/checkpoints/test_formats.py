"""One update in every format gives the numbers of its plain safetensors version; nothing in a checkpoint is run."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed.tensor  # which allows torch.load its own classes: they must not be the ones used
from torch import Tensor

import opdgeo
from opdgeo.checkpoints import open_checkpoint, run_checkpoints
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.diagnostics import Settings, diagnostics
from opdgeo.errors import CheckpointError
from program import run_opdgeo, run_python

HERE = Path(__file__).parents[1]
ROWS = sum(len(d.variants(Settings())) for d in diagnostics().values())  # of a matrix
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ and tuned/: a Qwen3 of two layers before and after an update, in float32 as transformers writes it."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    root = tmp_path_factory.mktemp("pair")
    config = Qwen3Config(
        vocab_size=56, hidden_size=32, intermediate_size=46, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(root / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(root / "tuned")
    (root / "expected.json").write_text(json.dumps(table(root / "base", root / "tuned").to_dicts()))
    return root


def table(base: Path, tuned: Path) -> pl.DataFrame:
    return opdgeo.compare(base, tuned, settings=opdgeo.Settings(nulls=0), cache=False, workers=1).measurements.drop(
        "checkpoint", "step"
    )


def weights(folder: Path) -> Tensors:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def check(pair: Path, tuned: Path, base: Path | None = None) -> None:
    """`tuned` measures like pair/tuned: equal names, roles, states; values within 1e-12."""
    found = table(base or pair / "base", tuned).to_dicts()
    expected = json.loads((pair / "expected.json").read_text())
    assert len(found) == len(expected) == 14 * ROWS
    for one, other in zip(found, expected, strict=True):
        assert one.pop("value") == pytest.approx(other.pop("value"), rel=1e-12, abs=1e-300)
        # A bound holds a residual, itself rounding that depends on where the matrix lies in memory.
        assert one.pop("error") == pytest.approx(other.pop("error"), rel=1e-2)
        assert one == other


def folder(pair: Path, path: Path) -> Path:
    path.mkdir(parents=True)
    shutil.copy(pair / "tuned" / "config.json", path)
    return path


class Runs:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.trace}",)


# Files of torch.save --------------------------------------------------------------------------------------------


def test_a_bin_file_and_its_shards(pair: Path, tmp_path: Path) -> None:
    state = weights(pair / "tuned")
    torch.save(state, folder(pair, tmp_path / "single") / "pytorch_model.bin")
    check(pair, tmp_path / "single")
    check(pair, tmp_path / "single" / "pytorch_model.bin")
    shards = folder(pair, tmp_path / "sharded")
    where = {name: f"pytorch_model-0000{i % 2}-of-00002.bin" for i, name in enumerate(state)}
    for file in set(where.values()):
        torch.save({n: t for n, t in state.items() if where[n] == file}, shards / file)
    (shards / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    torch.save({"state": {}}, shards / "optimizer.bin")
    check(pair, shards)
    assert len(open_checkpoint(shards).files) == 2


def test_views_and_wrapped_names_in_a_bin_file(pair: Path, tmp_path: Path) -> None:
    wrapped: Tensors = {}
    for name, tensor in weights(pair / "tuned").items():
        inner = name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")
        # A transposed view of a larger storage: strides and offsets count.
        wide = torch.zeros(*(n + 3 for n in reversed(tensor.shape)))
        view = wide.permute(*reversed(range(tensor.ndim)))[tuple(slice(2, 2 + n) for n in tensor.shape)]
        view.copy_(tensor)
        wrapped[f"module.{inner}"] = view
    torch.save(wrapped, folder(pair, tmp_path / "views") / "pytorch_model.bin")
    check(pair, tmp_path / "views")


def test_a_bin_file_that_runs_something_is_refused_and_not_run(pair: Path, tmp_path: Path) -> None:
    bad = folder(pair, tmp_path / "bad")
    torch.save(weights(pair / "tuned") | {"x": Runs(tmp_path / "trace")}, bad / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"posix\.system to be run .*ran nothing"):
        open_checkpoint(bad)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("how", ["stored", "compressed", "backwards"])
def test_a_bin_file_that_was_packed_again_is_read_where_it_can_be(how: str, pair: Path, tmp_path: Path) -> None:
    torch.save(weights(pair / "tuned"), tmp_path / "whole.bin")
    again = folder(pair, tmp_path / "again") / "pytorch_model.bin"
    kind = zipfile.ZIP_DEFLATED if how == "compressed" else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "whole.bin") as old, zipfile.ZipFile(again, "w", kind) as new:
        for name in reversed(old.namelist()) if how == "backwards" else old.namelist():
            new.writestr(name, old.read(name))
    assert torch.load(again).keys() == weights(pair / "tuned").keys()  # torch itself still reads it
    if how != "compressed":
        check(pair, again)
        return
    with pytest.raises(CheckpointError, match="packed or compressed again"):
        open_checkpoint(again)


def test_a_bin_file_of_a_lazily_negated_tensor_and_files_cut_short_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(3, dtype=torch.complex64).conj().imag}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="x is stored as a lazily negated or conjugated float32 tensor"):
        open_checkpoint(tmp_path / "x.bin")
    torch.save({"x": torch.eye(3)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    for length in (0, 8):  # nothing, and the head of a pickle
        (tmp_path / "y.bin").write_bytes((tmp_path / "x.bin").read_bytes()[:length])
        with pytest.raises(CheckpointError, match="not a readable torch file"):
            open_checkpoint(tmp_path / "y.bin")
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not readable JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("shard", ["../outside", "/etc/outside", "a/b", "..\\outside"])
def test_an_index_that_leaves_its_folder_is_refused(kind: str, shard: str, tmp_path: Path) -> None:
    name = "pytorch_model.bin" if kind == "bin" else "model.safetensors"
    (tmp_path / f"{name}.index.json").write_text(json.dumps({"weight_map": {"a": f"{shard}.{kind}"}}))
    with pytest.raises(CheckpointError, match="in the folder"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["sparse", "legacy", "list"])
def test_bin_files_that_hold_no_plain_tensors_are_refused(kind: str, tmp_path: Path) -> None:
    plain = torch.eye(3)
    content: Any = {"sparse": {"a": plain.to_sparse()}, "legacy": {"a": plain}, "list": [plain]}[kind]
    torch.save(content, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError, match="state dict" if kind == "list" else "save it again as safetensors"):
        open_checkpoint(tmp_path)


def test_a_truncated_bin_file_is_refused(pair: Path, tmp_path: Path) -> None:
    file = folder(pair, tmp_path / "cut") / "pytorch_model.bin"
    torch.save(weights(pair / "tuned"), file)
    file.write_bytes(file.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is not a readable torch file"):
        open_checkpoint(tmp_path / "cut")


# Distributed checkpoints ----------------------------------------------------------------------------------------

RANKS = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import torch.distributed.checkpoint as dcp

def rank(rank, world, out, source):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=world)
    out, state = Path(out), load_file(Path(source) / "model.safetensors")
    meshes = {
        "flat": (init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",)), [Shard(0)]),
        "hybrid": (init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp")), [Replicate(), Shard(0)]),
        "twice": (init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("fsdp", "tp")), [Shard(0), Shard(1)]),
        "same": (init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("fsdp", "tp")), [Shard(0), Shard(0)]),
    }
    for name, (mesh, placements) in meshes.items():
        (out / name).mkdir(exist_ok=True)
        flat = [p if not isinstance(p, Shard) or p.dim == 0 else Replicate() for p in placements]
        shards = {n: distribute_tensor(t, mesh, placements if t.ndim > 1 else flat) for n, t in state.items()}
        torch.save(shards, out / name / f"model_world_size_{world}_rank_{rank}.pt")
        torch.save({"state": {}}, out / name / f"optim_world_size_{world}_rank_{rank}.pt")
        if name in ("flat", "twice"):
            optimizer = {"state": {n: {"exp_avg": t} for n, t in shards.items()}}
            dcp.save({"model": shards, "optim": optimizer}, checkpoint_id=out / f"dcp-{name}")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (4, sys.argv[1], sys.argv[2]), 4, start_method="fork")
"""


@pytest.fixture(scope="module")
def ranks(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuned weights from four processes: DTensors on four meshes, as a file a rank and by torch's DCP."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "ranks.py").write_text(RANKS)
    done = run_python(out / "ranks.py", out, pair / "tuned")
    assert done.returncode == 0, done.stderr[-3000:]
    for inner in ("flat", "hybrid", "twice", "same", "dcp-flat", "dcp-twice"):
        shutil.copy(pair / "tuned" / "config.json", out / inner)
    return out


@pytest.mark.parametrize("mesh", ["flat", "hybrid", "twice", "same"])
def test_shards_of_four_ranks(mesh: str, pair: Path, ranks: Path) -> None:
    check(pair, ranks / mesh)


@pytest.mark.parametrize("mesh", ["dcp-flat", "dcp-twice"])
def test_a_distributed_checkpoint_of_four_ranks(mesh: str, pair: Path, ranks: Path) -> None:
    check(pair, ranks / mesh)
    opened = open_checkpoint(ranks / mesh)
    assert opened.tensors.keys() == weights(pair / "tuned").keys()
    assert ".metadata" in [f["name"] for f in opened.manifest()["files"]]


def test_shards_padded_to_the_size_of_the_first(pair: Path, ranks: Path, tmp_path: Path) -> None:
    """46 rows on four ranks are 12, 12, 12 and 10: some savers fill the last up to 12."""
    padded = Path(shutil.copytree(ranks / "flat", tmp_path / "padded"))
    file = padded / "model_world_size_4_rank_3.pt"
    shards = torch.load(file, weights_only=True)
    filled = 0
    for name, shard in shards.items():
        local = shard._local_tensor
        rows = -(-shard.shape[0] // 4)
        filled += local.shape[0] < rows
        shard._local_tensor = torch.cat([local, torch.full((rows - len(local), *local.shape[1:]), 7.0)])
        shards[name] = shard
    assert filled == 4
    torch.save(shards, file)
    check(pair, padded)


def test_a_missing_rank_is_named(ranks: Path, tmp_path: Path) -> None:
    shutil.copytree(ranks / "flat", tmp_path / "flat")
    (tmp_path / "flat" / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match="lacks the shards of rank 2 of 4"):
        open_checkpoint(tmp_path / "flat")


@pytest.mark.parametrize("name", ["model_world_size_99999999999_rank_0.pt", "model_world_size_1_rank_1.pt"])
def test_names_that_promise_other_ranks_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=r"lacks the shards of rank (0|1, 2, 3, 4, 5, 6, 7, 8) of"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_that_runs_something_is_refused_and_not_run(protocol: int, ranks: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(ranks / "dcp-flat", tmp_path / "bad"))
    metadata = pickle.loads((bad / ".metadata").read_bytes())
    metadata.planner_data = Runs(tmp_path / "trace")
    (bad / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    with pytest.raises(CheckpointError, match=r"posix\.system to be run .*ran nothing"):
        open_checkpoint(bad)
    (bad / ".metadata").write_bytes(pickle.dumps(metadata.state_dict_metadata, protocol))
    with pytest.raises(CheckpointError, match="expected a torch distributed checkpoint's index"):
        open_checkpoint(bad)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("outside", ["../flat/x.distcp", "/etc/passwd", ".."])
def test_metadata_that_leaves_its_folder_is_refused(outside: str, ranks: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(ranks / "dcp-flat", tmp_path / "bad"))
    metadata = pickle.loads((bad / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = outside
    (bad / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="expected a file in the folder"):
        open_checkpoint(bad)


def test_a_chunk_that_runs_something_is_refused_and_not_run(ranks: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(ranks / "dcp-flat", tmp_path / "bad"))
    metadata = pickle.loads((bad / ".metadata").read_bytes())
    torch.save([Runs(tmp_path / "trace"), torch.zeros(999)], bad / "chunk.distcp")
    index, info = next((i, d) for i, d in metadata.storage_data.items() if "q_proj" in i.fqn)
    info.relative_path, info.offset, info.length = "chunk.distcp", 0, (bad / "chunk.distcp").stat().st_size
    (bad / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="ran nothing"):
        open_checkpoint(bad).tensors[index.fqn.removeprefix("model.")][:, :]
    assert not (tmp_path / "trace").exists()


def test_shards_that_run_something_are_refused_and_not_run(ranks: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(ranks / "flat", tmp_path / "bad"))
    torch.save({"x": Runs(tmp_path / "trace")}, bad / "model_world_size_4_rank_3.pt")
    with pytest.raises(CheckpointError, match=r"rank_3\.pt asks for posix\.system"):
        open_checkpoint(bad)
    assert not (tmp_path / "trace").exists()


# Megatron -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuned weights from Megatron-Core in float32, in bf16 with masters; and a mixture of experts, hf-moe/ and moe/."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    out = tmp_path_factory.mktemp("megatron")
    config = Qwen3MoeConfig(
        vocab_size=56, hidden_size=32, intermediate_size=44, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=3, num_experts_per_tok=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).save_pretrained(out / "hf-moe")
    jobs = [(pair / "tuned", "plain/iter_0000003", "plain"), (pair / "tuned", "masters/iter_0000003", "masters")]
    jobs.append((out / "hf-moe", "moe/iter_0000003", "plain"))
    (out / "plain").mkdir()
    arguments = [str(a) for source, where, kind in jobs for a in (source, out / where, kind)]
    done = run_python(HERE / "megatron_writer.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.needs("megatron")
@pytest.mark.parametrize("kind", ["plain", "masters"])
def test_a_megatron_checkpoint(kind: str, pair: Path, megatron: Path, tmp_path: Path) -> None:
    """Heads and vocabulary come from config.json where there is one, else from Megatron's own arguments."""
    check(pair, megatron / kind / "iter_0000003")
    copy = Path(shutil.copytree(megatron / kind, tmp_path / "run")) / "iter_0000003"
    shutil.copy(pair / "tuned" / "config.json", copy)
    (copy / "common.pt").unlink()
    (opened,) = run_checkpoints([tmp_path / "run"])
    assert (opened.name, opened.step, opened.format) == ("iter_0000003", 3, "Megatron")
    expected = weights(pair / "tuned")
    assert opened.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened.tensors[name][(slice(None),) * tensor.ndim], tensor), name


@pytest.mark.needs("megatron")
def test_flat_masters_of_an_older_distributed_optimizer(pair: Path, megatron: Path, tmp_path: Path) -> None:
    """Megatron-Core 0.16 does not write them: torch's DCP does here, in the layout that its loader describes, [X/x, Y/y, Z/z,
    x·y·z] for local shapes [x, y, z]; two ranks of tensor parallelism, gate and up halved by them each.
    """
    import torch.distributed.checkpoint as dcp

    from opdgeo.checkpoints.dcp import chunks

    read = chunks(megatron / "plain" / "iter_0000003")
    state: Tensors = {}
    for name, stored in read.items():
        whole = stored[(slice(None),) * len(stored.shape)]
        state[name] = whole.bfloat16()
        if whole.ndim == 3:  # layers × rows × cols
            parts = 4 if "linear_fc1" in name else 2
            axis = 2 if name.endswith(("linear_proj.weight", "linear_fc2.weight")) else 1
            cells = [torch.stack([c.reshape(-1) for c in layer.chunk(parts, axis - 1)]) for layer in whole]
            grid = (len(whole), parts, 1, -1) if axis == 1 else (len(whole), 1, parts, -1)
            state[f"optimizer.state.fp32_param.{name}"] = torch.stack(cells).reshape(grid)
            state[f"optimizer.state.exp_avg.{name}"] = torch.zeros(3)
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    shutil.copy(megatron / "plain" / "iter_0000003" / "metadata.json", tmp_path)
    shutil.copy(pair / "tuned" / "config.json", tmp_path)
    check(pair, tmp_path)


@pytest.mark.needs("megatron")
def test_experts_of_a_megatron_checkpoint(megatron: Path) -> None:
    opened, expected = open_checkpoint(megatron / "moe" / "iter_0000003"), weights(megatron / "hf-moe")
    assert opened.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(opened.tensors[name][(slice(None),) * tensor.ndim], tensor), name


@pytest.mark.needs("megatron")
def test_megatron_arguments_that_run_something_are_refused_and_not_run(megatron: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(megatron / "plain" / "iter_0000003", tmp_path / "bad"))
    torch.save({"args": Runs(tmp_path / "trace")}, bad / "common.pt")
    with pytest.raises(CheckpointError, match=r"posix\.system to be run .*config\.json"):
        open_checkpoint(bad)
    assert not (tmp_path / "trace").exists()


@pytest.mark.needs("megatron")
def test_heads_that_do_not_divide_a_megatron_checkpoint_are_refused(megatron: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(megatron / "plain" / "iter_0000003", tmp_path / "bad"))
    (bad / "config.json").write_text(json.dumps({"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}))
    with pytest.raises(CheckpointError, match="linear_qkv has 64 rows; 8 heads of 8 in 2 groups make 96"):
        open_checkpoint(bad)


# DeepSpeed ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def zero(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tuned weights as masters of DeepSpeed's engine, stages 2 and 3."""
    out = tmp_path_factory.mktemp("zero")
    done = run_python(HERE / "deepspeed_writer.py", pair / "tuned", out, 2, 3, cold=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.mark.needs("deepspeed")
@pytest.mark.parametrize("stage", [2, 3])
def test_a_deepspeed_checkpoint(stage: int, pair: Path, zero: Path) -> None:
    check(pair, zero / f"zero-{stage}")
    check(pair, zero / f"zero-{stage}" / "global_step7")
    (opened,) = run_checkpoints([zero / f"zero-{stage}"])
    assert (opened.step, opened.format) == (7, "DeepSpeed ZeRO")


@pytest.mark.needs("deepspeed")
def test_a_deepspeed_checkpoint_that_runs_something_is_refused_and_not_run(zero: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(zero / "zero-3", tmp_path / "bad")) / "global_step7"
    (file,) = bad.glob("*_optim_states.pt")
    torch.save({"optimizer_state_dict": Runs(tmp_path / "trace")}, file)
    with pytest.raises(CheckpointError, match=r"posix\.system to be run .*ran nothing"):
        open_checkpoint(bad)
    assert not (tmp_path / "trace").exists()


def test_a_deepspeed_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "global_step7").mkdir()
    torch.save({}, tmp_path / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    (tmp_path / "latest").write_text("global_step7")
    with pytest.raises(CheckpointError, match=r"no \*_model_states"):
        open_checkpoint(tmp_path)
    torch.save({}, tmp_path / "global_step7" / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointError, match=r"holds a NoneType.*DeepSpeed"):
        open_checkpoint(tmp_path)
    (tmp_path / "latest").write_text("../elsewhere")
    with pytest.raises(CheckpointError, match="is a run and not one checkpoint"):
        open_checkpoint(tmp_path)


# GGUF -----------------------------------------------------------------------------------------------------------


def write_gguf(path: Path, state: Tensors, architecture: str, quantised: str | None = None) -> Path:
    """The state as llama.cpp's converter writes it, with the gguf library; matrices with 32 columns quantised."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([b"a", b"b"])
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(arch, 2)
    for name, tensor in state.items():
        values = tensor.float().numpy()
        if architecture == "llama" and (heads := 4 if "q_proj" in name else 2 if "k_proj" in name else 0):
            values = values.reshape(heads, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)
        kind = None
        if quantised and values.ndim == 2 and values.shape[1] % 32 == 0:
            kind = gguf.GGMLQuantizationType[quantised]
            values = gguf.quants.quantize(values, kind)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.needs("gguf")
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
def test_a_gguf_file(architecture: str, pair: Path, tmp_path: Path) -> None:
    state = {n: t for n, t in weights(pair / "tuned").items() if architecture == "qwen3" or "_norm" not in n}
    file = write_gguf(tmp_path / "model" / "tuned.gguf", state, architecture)
    check(pair, file)
    check(pair, file.parent)
    assert open_checkpoint(file).tensors.keys() == state.keys()


@pytest.mark.needs("gguf")
def test_a_quantised_gguf_file_is_marked(pair: Path, tmp_path: Path) -> None:
    from gguf import GGMLQuantizationType, quants

    state = weights(pair / "tuned")
    opened = open_checkpoint(write_gguf(tmp_path / "tuned.gguf", state, "qwen3", "Q8_0"))
    assert opened.manifest()["quantised"] == {"Q8_0": 14}
    assert "is quantised (Q8_0)" in opened.notes[0]
    name = "model.layers.1.self_attn.k_proj.weight"
    rounded = quants.quantize(state[name].numpy(), GGMLQuantizationType.Q8_0)
    expected = torch.from_numpy(quants.dequantize(rounded, GGMLQuantizationType.Q8_0))
    assert torch.equal(opened.tensors[name][:, :], expected)
    assert torch.equal(opened.tensors[name][3:9, 5:7], expected[3:9, 5:7])
    assert not torch.equal(expected, state[name])


@pytest.mark.needs("gguf")
def test_gguf_folders_that_do_not_say_which_and_other_architectures_are_refused(pair: Path, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "many" / "a.gguf", weights(pair / "tuned"), "qwen3")
    shutil.copy(file, file.with_name("b.gguf"))
    with pytest.raises(CheckpointError, match=r"several GGUF models: a\.gguf, b\.gguf"):
        open_checkpoint(file.parent)
    with pytest.raises(CheckpointError, match="architecture 'gemma'"):
        open_checkpoint(write_gguf(tmp_path / "gemma.gguf", {}, "gemma"))
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="not a readable GGUF file"):
        open_checkpoint(tmp_path / "cut.gguf")


@pytest.mark.needs("gguf")
@pytest.mark.parametrize("layers", [1, 1 << 31])
def test_a_gguf_header_with_another_number_of_layers(layers: int, pair: Path, tmp_path: Path) -> None:
    state = {n: t for n, t in weights(pair / "tuned").items() if "_norm" not in n}
    file = write_gguf(tmp_path / "llama.gguf", state, "llama")
    whole, key = file.read_bytes(), b"llama.block_count"
    at = whole.index(key) + len(key)
    assert struct.unpack_from("<II", whole, at) == (4, 2)  # the type u4, and two layers
    file.write_bytes(whole[:at] + struct.pack("<II", 4, layers) + whole[at + 8 :])
    opened = open_checkpoint(file).tensors
    assert len(opened) == len(state)
    assert ("blk.1.attn_q.weight" in opened) == (layers == 1)  # under its own name: no rule knows it


# Where trainers put them ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["actor", "policy"], ids=["verl", "SkyRL"])
def test_a_run_of_verl_or_skyrl_is_a_trajectory(policy: str, pair: Path, ranks: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        actor = tmp_path / "run" / f"global_step_{step}" / policy
        shutil.copytree(ranks / "flat", actor)
        (actor / "huggingface").mkdir()
        (actor / "config.json").rename(actor / "huggingface" / "config.json")
    opened = run_checkpoints([tmp_path / "run"])
    assert [(c.name, c.step, c.format) for c in opened] == [
        ("global_step_2", 2, "FSDP shards"),
        ("global_step_10", 10, "FSDP shards"),
    ]
    inner = open_checkpoint(tmp_path / "run" / "global_step_2" / policy)
    assert (inner.name, inner.step) == ("global_step_2", 2)
    assert opened[0].config["model_type"] == "qwen3"
    check(pair, tmp_path / "run" / "global_step_10")


def test_two_folders_of_one_step_are_refused(tmp_path: Path) -> None:
    for name in ("step-000010", "checkpoint-10", "step-000020"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"checkpoint-10 and step-000010, both of step 10"):
        run_checkpoints([tmp_path])


def test_a_checkpoint_of_accelerate_and_what_else_lies_in_it(pair: Path, ranks: Path, tmp_path: Path) -> None:
    checkpoint = folder(pair, tmp_path / "run" / "checkpoint-7")
    shutil.copytree(ranks / "dcp-flat", checkpoint / "pytorch_model_fsdp_0")
    shutil.copytree(ranks / "dcp-twice", checkpoint / "optimizer_0")
    shutil.copy(pair / "base" / "model.safetensors", checkpoint / "adapter_model.safetensors")
    (opened,) = run_checkpoints([tmp_path / "run"])
    assert opened.notes == ()
    check(pair, checkpoint)
    shutil.copy(pair / "base" / "model.safetensors", checkpoint)
    (noticed,) = open_checkpoint(checkpoint).notes
    assert "also holds safetensors weights (model.safetensors), which were not read" in noticed
    check(pair, checkpoint)


def test_the_command_plans_measures_and_resumes_on_a_distributed_checkpoint(
    pair: Path, ranks: Path, tmp_path: Path
) -> None:
    checkpoint = folder(pair, tmp_path / "run" / "checkpoint-7")
    shutil.copytree(ranks / "dcp-flat", checkpoint / "pytorch_model_fsdp_0")
    shutil.copy(pair / "base" / "model.safetensors", checkpoint)
    command = ["track", pair / "base", tmp_path / "run", "-o", tmp_path / "out"]
    plan = run_opdgeo(*command, "--plan")
    assert "14 matrices, 1 checkpoint(s)" in plan.stdout
    assert "note: " in plan.stdout
    assert "also holds safetensors weights" in plan.stdout
    options = [*command, "--nulls", "0", "--no-report", "--no-cache"]
    first = run_opdgeo(*options)
    assert first.returncode == 0, first.stderr
    assert "also holds safetensors weights" in first.stdout
    (manifest,) = json.loads((tmp_path / "out" / "run.json").read_text())["checkpoints"]
    assert (manifest["format"], manifest["step"]) == ("torch distributed", 7)
    inner = checkpoint / "pytorch_model_fsdp_0"
    assert {f["name"]: f["sha256"] for f in manifest["files"]} == {
        f"pytorch_model_fsdp_0/{f.name}": hashlib.sha256(f.read_bytes()).hexdigest()
        for f in (inner / ".metadata", *inner.glob("*.distcp"))
    }
    # The same command finds everything done; a changed file makes it anew.
    again = run_opdgeo(*options)
    assert "taken over from an earlier run" in again.stdout
    os.utime(inner / ".metadata", (1, 1))
    anew = run_opdgeo(*options)
    assert anew.returncode == 0
    assert "taken over from an earlier run" not in anew.stdout


@pytest.mark.needs("gguf")
def test_an_open_checkpoint_can_be_sent_to_another_process(pair: Path, ranks: Path, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    state = weights(pair / "tuned")
    torch.save(state, tmp_path / "pytorch_model.bin")
    gguf = write_gguf(tmp_path / "tuned.gguf", state, "qwen3")
    for place in (pair / "tuned", tmp_path / "pytorch_model.bin", gguf, ranks / "twice", ranks / "dcp-twice"):
        sent = pickle.dumps(open_checkpoint(place))
        assert len(sent) < 100_000
        assert torch.equal(pickle.loads(sent).tensors[name][:, :], state[name]), place

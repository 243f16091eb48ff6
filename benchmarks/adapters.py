"""The spectral diagnostics of ΔW from an adapter's factors, against the same from the merged checkpoint.

    python benchmarks/adapters.py [--base FOLDER] [--rank 16] [--repeats 5]

The base is SmolLM2-135M-Instruct in bf16 unless given. The peft library makes a LoRA on all its linear layers, with random factors, and
merges it in float32. For every matrix both sides read what they need besides W₀ (A and B, or W₊), and measure norms, stable rank,
Hill exponent, the top 16 singular triplets and principal energy; ‖W₀‖ and W₀'s singular vectors are computed before the clock starts.
One thread; seconds are the best of the repeats, the two sides in turn. Markdown on standard output.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from opdgeo.checkpoints import Matrix, open_checkpoint, pair
from opdgeo.diagnostics import Base, Settings, Update, diagnostics
from opdgeo.diagnostics.update import LowRankUpdate
from opdgeo.numerics import lapack
from opdgeo.numerics.spectra import LowRankMatrix

SPECTRAL = ("frobenius_norm", "relative_norm", "operator_norm", "stable_rank", "hill_exponent", "principal_energy")
SETTINGS = Settings(rank=64)  # the rank of the principal angles, which are not measured here


def adapter_and_merged(base: Path, folder: Path, rank: int) -> tuple[Path, Path]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    with torch.no_grad():
        for name, weights in tuned.named_parameters():
            if "lora_B" in name:  # a relative update of about a per cent
                weights.normal_(std=5e-3)
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def measured(update: Update) -> dict[str, float]:
    known = diagnostics()
    found = {(name, v): value.value for name in SPECTRAL for v, value in known[name].measure(update).items()}
    assert update.delta_spectrum.right.shape[1] == min(16, *update.base.weights.shape)
    return {" ".join(key).strip(): value for key, value in found.items() if value is not None}


def timed(work: Callable[[], Update]) -> tuple[float, dict[str, float], Update]:
    started = time.perf_counter()
    update = work()
    found = measured(update)
    return time.perf_counter() - started, found, update


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--base", type=Path)
    options.add_argument("--rank", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    if args.base is None:
        from opdgeo.training.models import smollm2

        args.base = smollm2()
    torch.set_num_threads(1)
    lapack.threads(1)
    seconds: dict[tuple[int, int], list[float]] = {}
    apart: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        adapter, merged = adapter_and_merged(args.base, Path(folder), args.rank)
        before = open_checkpoint(args.base)
        factored, whole = open_checkpoint(adapter, before), open_checkpoint(merged)
        matrices = pair(before, factored).matrices
        for matrix in matrices:
            base = Base(before.read(matrix), SETTINGS)
            assert base.norm > 0 and base.spectrum.left.shape[1] > 0

            def from_factors(matrix: Matrix = matrix, base: Base = base) -> Update:
                found = factored.factors(matrix)
                assert found is not None
                return LowRankUpdate(base, LowRankMatrix(*found), directions=True)

            def from_merged(matrix: Matrix = matrix, base: Base = base) -> Update:
                return Update(base, whole.read(matrix), directions=True)

            best = [float("inf")] * 2
            for _ in range(args.repeats):
                runs = [timed(from_factors), timed(from_merged)]
                best = [min(b, run[0]) for b, run in zip(best, runs, strict=True)]
            (_, mine, first), (_, theirs, second) = runs
            for name, value in theirs.items():
                scale = 1.0 if name.startswith("principal_energy") else abs(value)
                apart[name] = max(apart.get(name, 0.0), abs(mine[name] - value) / scale)
            overlap = first.delta_spectrum.right.T @ second.delta_spectrum.right
            similarity = float(torch.linalg.vector_norm(overlap)) ** 2 / overlap.shape[0]
            apart["1 − subspace_similarity"] = max(apart.get("1 − subspace_similarity", 0.0), 1 - similarity)
            entry = seconds.setdefault((matrix.rows, matrix.cols), [0, 0.0, 0.0])
            entry[0] += 1
            entry[1:] = [total + b for total, b in zip(entry[1:], best, strict=True)]

    print(
        f"{platform.platform()}, torch {torch.__version__}, one thread; {args.base.name}, rank {args.rank}, "
        f"{len(matrices)} matrices, best of {args.repeats}.\n"
    )
    print("| matrix | matrices | merged, ms each | factors, ms each | ratio |\n|---|---|---|---|---|")
    rows = [(f"{r}×{c}", *entry) for (r, c), entry in seconds.items()]
    rows.append(("all", *(sum(entry[i] for entry in seconds.values()) for i in range(3))))
    for name, count, fast, slow in rows:
        print(f"| {name} | {count:.0f} | {1e3 * slow / count:.2f} | {1e3 * fast / count:.2f} | {slow / fast:.0f}× |")
    print("\nLargest difference between the two, relative to the value (of shares, as it is):\n")
    print("| " + " | ".join(apart) + " |\n" + "|---" * len(apart) + "|")
    print("| " + " | ".join(f"{value:.1e}" for value in apart.values()) + " |")


if __name__ == "__main__":
    main()

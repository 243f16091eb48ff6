"""How well the nulls agree with drawn ones, and what they cost.

    python benchmarks/nulls.py grid                        # about ten minutes on one core
    python benchmarks/nulls.py cost                        # SmolLM2's four shapes
    python benchmarks/nulls.py cost --shape 4096x1024 --shape 4096x4096     # minutes each

`grid`: every null that is not a closed form, against `--draws` drawn matrices that are measured in full, over relative norms 1e-4 … 0.3,
four spectra of W₀ and both orientations. A cell agrees where the means differ by at most 2 % of the value or two standard errors, and the
spreads by at most 2 % of the value or two standard errors of theirs. Both standard errors count our draws too. Of cells that agree in
truth, one in twenty lies outside by chance.

`cost`: CPU seconds of all diagnostics of one pair with nulls off and of the nulls beside them, one thread, best of `--repeats`.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdgeo.diagnostics import Base, Settings, Update, diagnostics
from opdgeo.diagnostics.diagnostic import mean_std
from opdgeo.diagnostics.gaussian_null import SHIFTS, TURNS, gaussian_null
from opdgeo.numerics import lapack, nulls
from opdgeo.survey.measure import _null

NORMS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3)
SHAPES = ((192, 192), (480, 160), (160, 480))
COMPARED = {"spectral_shift": SHIFTS, "principal_angles": TURNS, "bound_ratio": SHIFTS}
LAYER = {(4096, 4096): 2, (1024, 4096): 2, (12288, 4096): 2, (4096, 12288): 1}  # Qwen3-8B's: matrices of a layer
SMOLLM2 = {(576, 576): 60, (192, 576): 60, (1536, 576): 60, (576, 1536): 30}


def with_spectrum(sigma: np.ndarray, rows: int, cols: int) -> Tensor:
    """W₀ with these singular values. A Gaussian update looks the same in every basis, so its bases are the axes'."""
    weights = torch.zeros(rows, cols, dtype=torch.float64)
    weights.diagonal().copy_(torch.from_numpy(sigma))
    return weights


def spectra(n: int) -> dict[str, np.ndarray]:
    """Flat: all within a tenth. Power: i^−0.7. Spiked: five isolated values above an even band."""
    band = np.linspace(1.5, 0.1, n)
    band[:5] = 20, 14, 10, 7, 5
    return {"flat": np.linspace(1.0, 0.9, n), "power": np.arange(1, n + 1) ** -0.7, "spiked": band}


@dataclass(frozen=True)
class Cell:
    """One variant of one diagnostic: what `gaussian_null` says, and mean and standard deviation of drawn nulls."""

    diagnostic: str
    variant: str
    ours: tuple[float, float]
    drawn: tuple[float, float]
    draws: int

    @property
    def off(self) -> tuple[float, float]:
        """How far mean and spread lie apart, in units of what is allowed."""
        count = COMPARED[self.diagnostic] if self.variant != "wedin" else TURNS
        (mean, spread), (expected, deviation) = self.ours, self.drawn
        share = 0.02 * abs(expected)
        one = math.hypot(deviation / math.sqrt(self.draws), spread / math.sqrt(count))
        two = math.hypot(deviation / math.sqrt(2 * (self.draws - 1)), spread / math.sqrt(2 * (count - 1)))
        return abs(mean - expected) / max(share, 2 * one), abs(spread - deviation) / max(share, 2 * two)


def compare(weights: Tensor, relative: float, draws: int, rank: int = 512) -> list[Cell]:
    """Our nulls of an update of this relative norm, against drawn matrices that are measured."""
    settings = Settings(rank=rank, mask_rank=min(rank, 64))
    base = Base(weights, settings)
    wanted = [diagnostics()[name] for name in COMPARED]
    rows, cols = weights.shape
    found: dict[tuple[str, str], list[float]] = {}
    for draw in range(draws):
        delta = nulls.gaussian(rows, cols, relative * base.norm, nulls.generator("benchmark", draw))
        update = Update(base, delta.add_(weights), sampled=True)
        for d in wanted:
            for variant, value in d.measure(update).items():
                if value.value is not None:
                    found.setdefault((d.name, variant), []).append(value.value)
    ours, _ = gaussian_null(update, wanted, "benchmark")
    return [
        Cell(*key, ours[key], mean_std(values), len(values))
        for key, values in found.items()
        if len(values) > draws // 2
    ]


def grid(draws: int, norms: tuple[float, ...] = NORMS) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    matrices: list[tuple[str, Tensor]] = []
    for rows, cols in SHAPES:
        matrices += [(name, with_spectrum(s, rows, cols)) for name, s in spectra(min(rows, cols)).items()]
    real = smollm2({(192, 576): 1, (576, 576): 1})
    matrices += [("smollm2", real[192, 576]), ("smollm2", real[192, 576].T), ("smollm2", real[576, 576])]
    print(
        "| W₀ | shape | relative norm | diagnostic | ours | drawn | mean off | spread off |\n|---|---|---|---|---|---|---|---|"
    )
    for name, weights in matrices:
        for relative in norms:
            for cell in compare(weights.double(), relative, draws):
                off = cell.off
                shape = "×".join(map(str, weights.shape))
                print(
                    f"| {name} | {shape} | {relative:g} | {cell.diagnostic} {cell.variant} | {cell.ours[0]:.4g} ± {cell.ours[1]:.2g} "
                    f"| {cell.drawn[0]:.4g} ± {cell.drawn[1]:.2g} | {off[0]:.2f} | {off[1]:.2f} |",
                    flush=True,
                )
                apart = cell.ours[0] / cell.drawn[0] - 1
                records.append(
                    {"w0": name, "shape": shape, "norm": relative, "what": f"{cell.diagnostic} {cell.variant}".strip()}
                    | {"mean": off[0], "spread": off[1], "apart": apart}
                )
    return records


def smollm2(shapes: dict[tuple[int, int], int]) -> dict[tuple[int, int], Tensor]:
    """A matrix of each of these shapes from a middle layer of SmolLM2-135M."""
    from safetensors.torch import load_file

    from opdgeo.training.models import smollm2 as folder

    found: dict[tuple[int, int], Tensor] = {}
    for name, tensor in load_file(str(folder() / "model.safetensors")).items():
        if ".12." in name and tuple(tensor.shape) in shapes:
            found.setdefault(tuple(tensor.shape), tensor)  # type: ignore[arg-type]
    return found


def large(rows: int, cols: int) -> Tensor:
    """Weights with uneven columns and a heavy-tailed top, as bf16 stores them."""
    from numerics import pair

    return pair(rows, cols, rows + cols)[0]


def cost(weights: Tensor, relative: float, draws: int, repeats: int) -> tuple[float, float]:
    """CPU seconds of all diagnostics of a pair, and of the nulls beside them. What a shape needs once is computed before."""
    rows, cols = weights.shape
    settings = Settings(nulls=draws)
    delta = nulls.gaussian(rows, cols, relative * float(weights.double().norm()), nulls.generator("cost"))
    tuned = delta.add_(weights).float()
    places = SimpleNamespace(name="cost", rows=rows, cols=cols), SimpleNamespace(name="tuned")
    for name in ("stable_rank", "effective_rank", "hill_exponent"):
        gaussian_null(Update(Base(weights, settings), tuned), [diagnostics()[name]])
    best = [math.inf, math.inf]
    for _ in range(repeats):
        update = Update(Base(weights, settings), tuned)
        started = time.thread_time()
        for d in diagnostics().values():
            d.measure(update)
        measured = time.thread_time()
        _null(update, *places)  # type: ignore[arg-type]
        best = [min(best[0], measured - started), min(best[1], time.thread_time() - measured)]
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "cost"])
    parser.add_argument("--draws", type=int, default=64, help="drawn matrices of a cell (grid)")
    parser.add_argument("--norm", type=float, action="append", help="only this relative norm (repeatable)")
    parser.add_argument("--shape", action="append", help="such as 4096x4096 (cost, repeatable); default: SmolLM2's")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lapack.threads(1)
    if options.what == "grid":
        records = grid(options.draws, tuple(options.norm or NORMS))
        for part in ("mean", "spread"):
            outside = sorted((r for r in records if r[part] > 1), key=lambda r: -r[part])
            print(f"\n{part}: {len(records) - len(outside)} of {len(records)} agree; the farthest of the others:")
            for record in outside[:10]:
                print(json.dumps(record))
        return
    if options.shape:
        shapes = {tuple(map(int, s.split("x"))): 1 for s in options.shape}
        matrices = {shape: large(*shape) for shape in shapes}
        weights = {shape: LAYER.get(shape, 1) for shape in shapes}  # type: ignore[call-overload]
    else:
        matrices, weights = smollm2(SMOLLM2), SMOLLM2  # type: ignore[assignment]
    print("| matrix | relative norm | nulls off, CPU s | nulls 4, CPU s more | ratio |\n|---|---|---|---|---|")
    for relative in options.norm or (1e-2,):
        total = [0.0, 0.0]
        for shape, matrix in matrices.items():
            seconds = cost(matrix, relative, 4, options.repeats)
            total = [t + weights[shape] * s for t, s in zip(total, seconds, strict=True)]
            rows, cols = shape
            print(
                f"| {rows}×{cols} | {relative:g} | {seconds[0]:.3f} | {seconds[1]:.3f} | {1 + seconds[1] / seconds[0]:.2f}× |",
                flush=True,
            )
        if len(matrices) > 1:
            print(
                f"| all, weighted by their number | {relative:g} | {total[0]:.1f} | {total[1]:.1f} | {1 + total[1] / total[0]:.2f}× |"
            )


if __name__ == "__main__":
    main()

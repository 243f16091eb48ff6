"""How fast and how exact the diagnostics of one matrix are, against plain float64 SVDs of W₀, W₊ and ΔW, in one run.

    python benchmarks/numerics.py --out numerics            # Qwen3-8B's shapes: about ten minutes and 6 GB
    python benchmarks/numerics.py --small                   # an eighth of every side: seconds

Writes OUT.md and OUT.json. The plain side is charged for its three `torch.linalg.svd` alone; ours for everything that the
diagnostics compute, masks and counts included. "Floor" is what the unavoidable products would take at the GEMM rate measured
in the same run: two Gram matrices, two tridiagonal reductions, and the products that give the vectors of both sides.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from opdgeo.diagnostics import Base, Settings, Update, diagnostics
from opdgeo.numerics import lapack
from opdgeo.numerics.spectra import principal_angles
from opdgeo.survey.measure import _null

SHAPES = {  # Qwen3-8B's seven matrices of a layer
    (4096, 4096): ["q_proj", "o_proj"],
    (1024, 4096): ["k_proj", "v_proj"],
    (12288, 4096): ["gate_proj", "up_proj"],
    (4096, 12288): ["down_proj"],
}
CHECKPOINTS = 5


def pair(rows: int, cols: int, seed: int) -> tuple[Tensor, Tensor]:
    """Weights with uneven columns and a heavy-tailed top, and an update with a heavy-tailed top; both as bf16 stores them."""
    rng = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    def top(rank: int, size: float, power: float) -> Tensor:
        left, right = torch.linalg.qr(randn(rows, rank)).Q, torch.linalg.qr(randn(cols, rank)).Q
        return (left * (size * torch.arange(1, rank + 1, dtype=torch.float64) ** -power)) @ right.T

    edge = math.sqrt(max(rows, cols))
    rank = min(rows, cols) // 4
    before = 0.02 * (randn(rows, cols) * (0.5 * randn(cols)).exp() + top(rank, 8 * edge, 0.7))
    after = before + 1e-4 * (0.3 * randn(rows, cols) + top(max(4, rank // 16), 4 * edge, 0.6))
    return before.bfloat16().double(), after.bfloat16().double()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def gemm_rate() -> float:
    """Float64 multiply-adds times two a second, in a product of two 2048 × 2048 matrices; best of three."""
    a = torch.randn(2048, 2048, dtype=torch.float64)
    return 2 * 2048**3 / min(timed(lambda: a @ a)[0] for _ in range(3))


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 256 MB; best of three."""
    a = torch.ones(1 << 25, dtype=torch.float64)
    b = torch.empty_like(a)
    return 2 * 8 * len(a) / min(timed(lambda: b.copy_(a))[0] for _ in range(3))


def floor_flops(rows: int, cols: int, k: int) -> float:
    small, large = min(rows, cols), max(rows, cols)
    return 2 * (large * small**2 + 4 / 3 * small**3 + 2 * small**2 * k + 2 * large * small * k)


def ours(
    before: Tensor, after: Tensor, settings: Settings
) -> tuple[dict[str, float], Update, dict[tuple[str, str], Any]]:
    """Every diagnostic, with the seconds of each shared quantity that is computed along the way."""
    base = Base(before, settings)
    seconds: dict[str, float] = {}
    seconds["W0"], _ = timed(lambda: base.spectrum)
    seconds["W0 masks"], _ = timed(lambda: (base.low_magnitude, base.principal, base.norm))
    seconds["delta"], update = timed(lambda: Update(base, after))
    seconds["W+"], _ = timed(lambda: update.tuned_spectrum)
    seconds["angles"], _ = timed(lambda: update.angles)
    seconds["dW"], _ = timed(lambda: update.delta_spectrum)
    seconds["visible"], _ = timed(lambda: update.visible)
    seconds["rest"], values = timed(
        lambda: {(n, v): x for n, d in diagnostics().items() for v, x in d.measure(update).items()}
    )
    return seconds, update, values


def accuracy(update: Update, plain: list[Any], values: dict[tuple[str, str], Any]) -> dict[str, float]:
    """Largest differences from the plain SVDs, beside the errors that opdgeo states."""
    (u0, s0, v0), (u1, s1, v1), (_, sd, _) = plain
    k, _ = update.base.cut(update.settings.rank)
    before, after, delta = update.base.spectrum, update.tuned_spectrum, update.delta_spectrum
    shift = float(torch.linalg.vector_norm(s1 - s0) / torch.linalg.vector_norm(s0))
    angles = {"left": principal_angles(u0[:, :k], u1[:, :k]), "right": principal_angles(v0[:k].T, v1[:k].T)}
    found = values["spectral_shift", ""]
    return {
        "sigma": max(float((a.sigma - b).abs().max() / b[0]) for a, b in ((before, s0), (after, s1))),
        "sigma_stated": max(a.error / float(a.sigma[0]) for a in (before, after)),
        "shift": abs(found.value - shift),
        "shift_stated": found.error,
        "angle_degrees": max(
            math.degrees(float((update.angles[side] - exact).abs().max())) for side, exact in angles.items()
        ),
        "angle_degrees_stated": values["principal_angles", "left.max"].error or math.nan,
        "sigma_update": float((delta.sigma - sd[: len(delta.sigma)]).abs().max() / sd[0]),
        "sigma_update_stated": delta.error / float(delta.sigma[0]),
        "condition": float(s0[0] / s0[-1]),
    }


def bench(rows: int, cols: int, settings: Settings, rate: float, nulls: bool) -> dict[str, Any]:
    before, after = pair(rows, cols, rows + cols)
    seconds, update, values = ours(before, after, settings)
    record: dict[str, Any] = {
        "rows": rows, "cols": cols, "ours": seconds,
        "methods": [update.base.spectrum.method, update.tuned_spectrum.method, update.delta_spectrum.method],
    }  # fmt: skip
    if nulls:
        matrix, name = SimpleNamespace(name="bench", rows=rows, cols=cols), SimpleNamespace(name="tuned")
        record["nulls"], _ = timed(lambda: _null(update, matrix, name))  # type: ignore[arg-type]
    plain, times = [], []
    for m in (before, after, update.delta):
        elapsed, factors = timed(lambda m=m: torch.linalg.svd(m, full_matrices=False))
        times.append(elapsed)
        plain.append(factors)
    record["plain"] = dict(zip(("W0", "W+", "dW"), times, strict=True))
    record["accuracy"] = accuracy(update, plain, values)
    record["floor"] = floor_flops(rows, cols, update.base.factored_rank) / rate
    total = sum(seconds.values())
    once = seconds["W0"] + seconds["W0 masks"]
    record["pair"] = {"ours": total, "plain": sum(times), "ratio": sum(times) / total}
    many = once + CHECKPOINTS * (total - once)
    plain_many = times[0] + CHECKPOINTS * (times[1] + times[2])
    record["checkpoints"] = {"ours": many, "plain": plain_many, "ratio": plain_many / many}
    record["update"] = {"ours": seconds["dW"], "plain": times[2], "ratio": times[2] / seconds["dW"]}
    return record


def layer(records: list[dict[str, Any]], shapes: dict[tuple[int, int], list[str]]) -> dict[str, Any]:
    """The seven matrices of a layer together."""
    weights = [len(names) for names in shapes.values()]
    out: dict[str, Any] = {}
    for part in ("pair", "checkpoints", "update"):
        both = [sum(w * r[part][side] for w, r in zip(weights, records, strict=True)) for side in ("ours", "plain")]
        out[part] = {"ours": both[0], "plain": both[1], "ratio": both[1] / both[0]}
    out["floor"] = sum(w * r["floor"] for w, r in zip(weights, records, strict=True))
    if all("nulls" in r for r in records):
        out["nulls"] = sum(w * r["nulls"] for w, r in zip(weights, records, strict=True))
    return out


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Numerics against plain float64 SVDs", "",
        f"{report['platform']}, {report['threads']} thread(s), torch {report['torch']}; float64 GEMM {report['gemm'] / 1e9:.0f} GF/s, "
        f"copy {report['bandwidth'] / 1e9:.0f} GB/s; rank {report['settings']['rank']}.", "",
        "| matrix | plain s | ours s | ratio | 5 checkpoints | ΔW alone | nulls s | floor s | W₀ / W₊ / ΔW by |", "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in [*report["shapes"], {**report["layer"], "rows": "layer", "cols": "", "methods": []}]:
        name = f"{r['rows']}×{r['cols']}" if r["cols"] else "seven matrices of a layer"
        nulls = f"{r['nulls']:.1f}" if "nulls" in r else "–"
        lines.append(
            f"| {name} | {r['pair']['plain']:.1f} | {r['pair']['ours']:.1f} | {r['pair']['ratio']:.1f}× "
            f"| {r['checkpoints']['ratio']:.1f}× | {r['update']['ratio']:.0f}× | {nulls} | {r['floor']:.1f} | {' / '.join(r['methods'])} |"
        )
    lines += ["", "Largest difference from the plain SVDs, and (stated error):", ""]
    lines += ["| matrix | condition | σ / σ₁ | shift | angles, degrees | σ(ΔW) / σ₁(ΔW) |", "|---|---|---|---|---|---|"]
    for r in report["shapes"]:
        a = r["accuracy"]
        cells = [f"{a[n]:.1e} ({a[n + '_stated']:.1e})" for n in ("sigma", "shift", "angle_degrees", "sigma_update")]
        lines.append(f"| {r['rows']}×{r['cols']} | {a['condition']:.1e} | {' | '.join(cells)} |")
    parts = list(report["shapes"][0]["ours"])
    lines += ["", "Seconds by part:", "", f"| matrix | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]
    for r in report["shapes"]:
        cells = [f"{r['ours'][part]:.2f}" for part in parts]
        lines.append(f"| {r['rows']}×{r['cols']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="an eighth of every side")
    parser.add_argument("--shape", action="append", help="only this shape, such as 4096x4096 (repeatable)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: one per core")
    parser.add_argument("--no-nulls", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("numerics"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lapack.threads(options.threads)
    shrink = 8 if options.small else 1
    shapes = {(r // shrink, c // shrink): names for (r, c), names in SHAPES.items()}
    if options.shape:
        shapes = {s: n for s, n in shapes.items() if f"{s[0]}x{s[1]}" in options.shape}
    settings = Settings(rank=512 // shrink)
    rate = gemm_rate()
    records = []
    for rows, cols in shapes:
        records.append(bench(rows, cols, settings, rate, not options.no_nulls))
        print(json.dumps(records[-1]), flush=True)
    report = {
        "platform": platform.platform(), "threads": options.threads, "torch": torch.__version__, "gemm": rate,
        "bandwidth": bandwidth(), "settings": settings.to_json(), "shapes": records, "layer": layer(records, shapes),
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    options.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

"""How fast and how exact the diagnostics of one matrix are, against plain float64 SVDs of W₀, W₊ and ΔW, in one run.

    python benchmarks/numerics.py --out numerics            # Qwen3-8B's shapes: about fifteen minutes and 8 GB
    python benchmarks/numerics.py --small                   # an eighth of every side: seconds

Writes OUT.md and OUT.json. Every core works on its own copy of the same problem with one BLAS thread, on both sides, as
`compare` does. The plain side is charged for its three `torch.linalg.svd` alone; ours for everything that the diagnostics
compute, masks and counts included. "Peer" is the method of SydCS/OPD-Param-Analysis as described: four float32 SVDs a
matrix and checkpoint (W₀, W₊, ΔW, and W₀ again for the mask). "Floor" is what the unavoidable work would take at the GEMM rate
and the memory bandwidth measured in the same run: two Gram matrices, two tridiagonal reductions (half of it products, half one
pass over the trailing triangle a column), the products that give the vectors of both sides, and one pass over the entries.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
CORES = len(os.sched_getaffinity(0))
CACHE = 32 << 20  # bytes; a larger triangle is read from memory once a column


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
    return before.bfloat16(), after.bfloat16()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds a core and the result, while every other core does the same."""
    started = time.perf_counter()
    with ThreadPoolExecutor(CORES) as pool:
        jobs = [pool.submit(work) for _ in range(CORES)]
        results = [job.result() for job in jobs]
    return (time.perf_counter() - started) / CORES, results[0]


def gemm_rate() -> float:
    """Float64 multiply-adds times two a second, all cores, in products of two 2048 × 2048 matrices; best of three."""
    a = torch.randn(2048, 2048, dtype=torch.float64)
    return 2 * 2048**3 / min(timed(lambda: a @ a)[0] for _ in range(3))


def bandwidth() -> float:
    """Bytes a second, all cores, of sums over 256 MB; best of three."""
    a = torch.ones(1 << 25, dtype=torch.float64)
    return 8 * len(a) / min(timed(a.sum)[0] for _ in range(3))


def floor(rows: int, cols: int, k: int, gemm: float, bytes_a_second: float) -> float:
    """Seconds that a pair takes at least by this method."""
    small, large = min(rows, cols), max(rows, cols)
    flops = large * small**2 + 2 / 3 * small**3 + 2 * small**2 * k + 2 * large * small * k
    streamed = 8 * small**3 / 6 if 8 * small**2 > CACHE else 0
    return 2 * (flops / gemm + streamed / bytes_a_second) + 2 * 2 * rows * cols / bytes_a_second


def ours(
    before: Tensor, after: Tensor, settings: Settings
) -> tuple[dict[str, float], Update, dict[tuple[str, str], Any]]:
    """Every diagnostic, with the seconds a core of each shared quantity that is computed along the way."""
    seconds: dict[str, float] = {}
    bases = [Base(before, settings) for _ in range(CORES)]
    updates = [Update(base, after) for base in bases]
    again = [Base(before, settings) for _ in range(CORES)]

    def part(name: str, work: Callable[[Base, Update], Any], bases: list[Base] = bases) -> None:
        started = time.perf_counter()
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(work, bases, updates))
        seconds[name] = (time.perf_counter() - started) / CORES

    part("W0", lambda base, _: base.spectrum)
    part("W0 masks", lambda base, _: (base.low_magnitude, base.principal, base.norm))
    for base, known in zip(again, bases, strict=True):  # as read from the cache
        base.spectrum, base.thresholds = known.spectrum, dict(known.thresholds)
    part("W0 masks, warm", lambda base, _: (base.low_magnitude, base.principal, base.norm), again)
    del again
    part("W+", lambda _, update: update.tuned_spectrum)
    part("angles", lambda _, update: update.angles)
    part("dW", lambda _, update: (update.delta_spectrum, update.norm))
    part("visible", lambda _, update: update.visible)
    found: list[dict[tuple[str, str], Any]] = []
    part(
        "rest",
        lambda _, update: found.append(
            {(n, v): x for n, d in diagnostics().items() for v, x in d.measure(update).items()}
        ),
    )
    return seconds, updates[0], found[0]


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


def bench(
    rows: int, cols: int, settings: Settings, gemm: float, bytes_a_second: float, nulls: bool, peer: bool
) -> dict[str, Any]:
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
    for m in (before.double(), after.double(), update.delta.dense()):
        elapsed, factors = timed(lambda m=m: torch.linalg.svd(m, full_matrices=False))
        times.append(elapsed)
        plain.append(factors)
    record["plain"] = dict(zip(("W0", "W+", "dW"), times, strict=True))
    record["accuracy"] = accuracy(update, plain, values)
    del plain
    if peer:
        single = [before.float(), after.float(), after.float() - before.float(), before.float()]
        record["peer"] = sum(timed(lambda m=m: torch.linalg.svd(m, full_matrices=False))[0] for m in single)
    record["floor"] = floor(rows, cols, update.base.factored_rank, gemm, bytes_a_second)
    warm = seconds.pop("W0 masks, warm")
    total = sum(seconds.values())
    once = seconds["W0"] + seconds["W0 masks"]
    record["pair"] = {"ours": total, "plain": sum(times), "ratio": sum(times) / total}
    many = once + CHECKPOINTS * (total - once)
    plain_many = times[0] + CHECKPOINTS * (times[1] + times[2])
    record["checkpoints"] = {"ours": many, "plain": plain_many, "ratio": plain_many / many}
    record["update"] = {"ours": seconds["dW"], "plain": times[2], "ratio": times[2] / seconds["dW"]}
    warm += total - once
    record["warm"] = {"ours": warm, "plain": total, "ratio": total / warm}
    return record


def layer(records: list[dict[str, Any]], shapes: dict[tuple[int, int], list[str]]) -> dict[str, Any]:
    """The seven matrices of a layer together."""
    weights = [len(names) for names in shapes.values()]
    out: dict[str, Any] = {}
    for part in ("pair", "checkpoints", "update", "warm"):
        both = [sum(w * r[part][side] for w, r in zip(weights, records, strict=True)) for side in ("ours", "plain")]
        out[part] = {"ours": both[0], "plain": both[1], "ratio": both[1] / both[0]}
    out["floor"] = sum(w * r["floor"] for w, r in zip(weights, records, strict=True))
    for part in ("nulls", "peer"):
        if all(part in r for r in records):
            out[part] = sum(w * r[part] for w, r in zip(weights, records, strict=True))
    return out


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Numerics against plain float64 SVDs", "",
        f"{report['platform']}, {report['cores']} cores, torch {report['torch']}; all cores together: float64 GEMM {report['gemm'] / 1e9:.0f} GF/s, "
        f"reading {report['bandwidth'] / 1e9:.0f} GB/s; rank {report['settings']['rank']}. Seconds a matrix with all cores at work.", "",
        "| matrix | plain s | peer s | ours s | floor s | pair | 5 checkpoints | ΔW alone | nulls s | W₀ / W₊ / ΔW by |", "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in [*report["shapes"], {**report["layer"], "rows": "layer", "cols": "", "methods": []}]:
        name = f"{r['rows']}×{r['cols']}" if r["cols"] else "seven matrices of a layer"
        nulls, peer = (f"{r[part]:.1f}" if part in r else "–" for part in ("nulls", "peer"))
        lines.append(
            f"| {name} | {r['pair']['plain']:.1f} | {peer} | {r['pair']['ours']:.1f} | {r['floor']:.1f} | {r['pair']['ratio']:.1f}× "
            f"| {r['checkpoints']['ratio']:.1f}× | {r['update']['ratio']:.0f}× | {nulls} | {' / '.join(r['methods'])} |"
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
    parser.add_argument("--no-nulls", action="store_true")
    parser.add_argument("--peer", action="store_true", help="also the peer's four float32 SVDs")
    parser.add_argument("--out", type=Path, default=Path("numerics"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    lapack.threads(1)
    shrink = 8 if options.small else 1
    shapes = {(r // shrink, c // shrink): names for (r, c), names in SHAPES.items()}
    if options.shape:
        shapes = {s: n for s, n in shapes.items() if f"{s[0]}x{s[1]}" in options.shape}
    settings = Settings(rank=512 // shrink)
    rates = gemm_rate(), bandwidth()
    records = []
    for rows, cols in shapes:
        records.append(bench(rows, cols, settings, *rates, not options.no_nulls, options.peer))
        print(json.dumps(records[-1]), flush=True)
    report = {
        "platform": platform.platform(), "cores": CORES, "torch": torch.__version__, "gemm": rates[0],
        "bandwidth": rates[1], "settings": settings.to_json(), "shapes": records, "layer": layer(records, shapes),
    }  # fmt: skip
    options.out.with_suffix(".json").write_text(json.dumps(report, indent=1))
    options.out.with_suffix(".md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

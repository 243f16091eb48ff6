"""What a run will measure, and what it will take, from headers alone."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from opdgeo.checkpoints import Checkpoint, Matrix, Pairing
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError, printable
from opdgeo.machine import available_gpu_memory, available_memory, duration
from opdgeo.numerics.devices import gpus
from opdgeo.numerics.spectra import KRYLOV
from opdgeo.numerics.subspaces import largest_rank
from opdgeo.survey.memory import LIBRARIES, PAGE, block_set, peak_memory, working_set

STARTUP = 2.5  # seconds


@dataclass(frozen=True)
class Plan:
    """Predictions for one machine: seconds of the whole run and bytes at its peak; `groups` has one row a shape.

    A row: rows, cols, matrices, bytes of one matrix's working set, seconds of all of them on one core.
    """

    groups: list[tuple[int, int, int, int, float]]
    seconds: float
    peak: int
    available: int


def plan(
    work: Sequence[Matrix], checkpoints: Sequence[Checkpoint], settings: Settings, workers: int, *, pairs: bool = False
) -> Plan:
    """The plan for measuring `work` over `checkpoints` (the base first) with `workers` matrices at a time; `pairs` as in a `Request`."""
    rate = _gemm_rate()
    shapes = Counter((m.rows, m.cols) for m in work)
    example = {(m.rows, m.cols): m for m in work}
    groups = []
    for (rows, cols), count in sorted(shapes.items(), key=lambda item: -item[0][0] * item[0][1]):
        size = working_set(example[rows, cols], checkpoints, settings, pairs=pairs)
        flops = (_flops_of_pairs if pairs else _flops)(rows, cols, settings, len(checkpoints) - 1)
        groups.append((rows, cols, count, size, count * flops / rate))
    largest = sorted((size for _, _, count, size, _ in groups for _ in range(min(count, workers))), reverse=True)
    available = available_memory()
    peak = largest[0]
    for size in largest[1:workers]:
        peak += size if peak + size <= available * 8 // 10 else 0
    seconds = STARTUP + sum(group[4] for group in groups) / min(workers, len(work))
    return Plan(groups, seconds, peak_memory() + max(peak + LIBRARIES, PAGE), available)


def refuse_what_cannot_fit(
    work: Sequence[Matrix],
    checkpoints: Sequence[Checkpoint],
    settings: Settings,
    *,
    device: str = "cpu",
    pairs: bool = False,
) -> None:
    """Raises:
    ConfigError: one matrix alone needs more memory than there is, on the device too; the message says what would make it fit.
    """
    sizes = {m: working_set(m, checkpoints, settings, pairs=pairs) for m in work}
    _refuse(sizes, available_memory(), "available")
    if device != "cpu":
        free = min(available_gpu_memory(gpu) for gpu in gpus(device))
        _refuse({m: size + block_set(m) for m, size in sizes.items()}, free, "free on the GPU; --device cpu needs none")


def _refuse(sizes: dict[Matrix, int], available: int, where: str) -> None:
    largest = max(sizes, key=lambda m: sizes[m])
    if sizes[largest] <= available:
        return
    work = list(sizes)
    fits = [m.role for m in work if sizes[m] <= available]
    cure = (
        f"Measure the others with --roles {','.join(dict.fromkeys(fits))}" if fits else "Use a machine with more memory"
    )
    raise ConfigError(
        f"{largest.name} ({largest.rows}×{largest.cols}) needs about {sizes[largest] / 1e9:.1f} GB and {available / 1e9:.1f} GB are "
        f"{where}. {cure}."
    )


def describe(plan: Plan, pairing: Pairing, checkpoints: int, workers: int) -> str:
    """The plan as text."""
    lines = [f"{sum(g[2] for g in plan.groups)} matrices, {checkpoints} checkpoint(s), {workers} at a time:", ""]
    lines.append(f"  {'shape':>16}  {'matrices':>8}  {'memory each':>11}  {'time on a core':>14}")
    for rows, cols, count, size, seconds in plan.groups:
        lines.append(f"  {f'{rows}×{cols}':>16}  {count:>8}  {size / 1e9:>8.2f} GB  {duration(seconds):>14}")
    lines += [
        "",
        f"about {duration(plan.seconds)}, at most {plan.peak / 1e9:.2f} GB of {plan.available / 1e9:.1f} GB available",
    ]
    account = pairing.to_json()
    left = [f"{count} {kind}" for kind, count in account["not_selected"].items()]
    if left:
        lines.append(f"not measured, by kind: {', '.join(left)}")
    for label in ("base_only", "tuned_only", "tied", "unrecognised"):
        if names := account[label]:
            more = ", …" if len(names) > 3 else ""
            lines.append(
                f"not measured, {label.replace('_', ' ')}: {len(names)} tensors ({', '.join(map(printable, names[:3]))}{more})"
            )
    if account["unreadable"]:
        lines.append(f"will be skipped, not stored as plain numbers: {len(account['unreadable'])} matrices")
        lines += [f"  {printable(reason)}" for reason in dict.fromkeys(account["unreadable"].values())]
    return "\n".join(lines)


def _flops(rows: int, cols: int, settings: Settings, updates: int) -> float:
    """Work of one matrix in units of a multiply or an add inside a matrix product; what is bound by memory counts more."""
    small, large = min(rows, cols), max(rows, cols)
    k = min(max(settings.rank, settings.mask_rank), largest_rank(rows, cols))
    values = large * small**2 + 4.0 * small**3
    factors = values + 4 * small**2 * k + 2 * large * small * k + 4 * large * k**2
    delta = 2200.0 * rows * cols if small >= KRYLOV else values
    entries = 1500.0 * rows * cols
    each = factors + 6 * (rows + cols) * k**2 + delta + entries
    if settings.nulls:
        each += 0.2 * (factors + delta) if settings.null == "gaussian" else settings.nulls * each
    return factors + entries + updates * each


def _flops_of_pairs(rows: int, cols: int, settings: Settings, updates: int) -> float:
    """The same for every update alone and every pair of them."""
    small, large = min(rows, cols), max(rows, cols)
    delta = 2200.0 * rows * cols if small >= KRYLOV else large * small**2 + 4.0 * small**3
    each = 600.0 * rows * cols
    return updates * (delta + each) + updates * (updates - 1) / 2 * each * (2 if settings.nulls else 1)


def _gemm_rate() -> float:
    """Flops a second of a float64 product on one core; best of three."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(768, 768, dtype=torch.float64)
        best = 1e9
        for _ in range(3):
            started = time.perf_counter()
            a @ a
            best = min(best, time.perf_counter() - started)
    finally:
        torch.set_num_threads(before)
    return float(2 * 768**3 / best)

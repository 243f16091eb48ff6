"""What `opdgeo signals` estimates of one matrix, and of the credit: rows of numbers from sums over blocks of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opdgeo.numerics import moments
from opdgeo.numerics.moments import Products
from opdgeo.numerics.subspaces import largest_rank
from opdgeo.training.evaluation import Completions

ALPHAS = (0.75, 0.5, 0.25)
MASKS: tuple[tuple[str, float], ...] = (("top", 0.5), ("top", 0.25), ("random", 0.5), ("random", 0.25))
BLOCKS, BOOTSTRAP, SPLITS = 16, 200, 200


@dataclass(frozen=True)
class Sample:
    """Sequences with their credit: the scaled a_t of every objective, and how the blocks of prompts divide them."""

    done: Completions
    credit: dict[str, Tensor]  # objective → (B, T), divided by the length
    blocks: list[slice]
    rewards: Tensor | None = None


@dataclass
class Sums:
    """Block sums of one matrix: entry → (J, …), and sequences by block."""

    right: dict[str, Tensor]
    left: dict[str, Tensor]
    mean: dict[str, Tensor]
    sizes: np.ndarray


def statistics(
    own: Sums, shown: Sums, weights: Tensor, top_k: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows (without the matrix's name) and spectra of one matrix; `weights` (m, n) are those the gradient was taken at."""
    rows: list[dict[str, Any]] = []
    spectra: list[dict[str, Any]] = []
    counts = moments.draws(len(own.sizes), BOOTSTRAP, seed)
    picks = moments.halves(len(own.sizes), SPLITS, seed)
    left, _, right_T = torch.linalg.svd(weights, full_matrices=False)
    for side, directions in (("right", right_T.T), ("left", left)):
        entries = dict(getattr(own, side)) | getattr(shown, side)
        sizes = {k: own.sizes if k in getattr(own, side) else shown.sizes for k in entries}
        rows += _of_side(side, entries, sizes, directions, top_k=top_k, counts=counts, picks=picks, spectra=spectra)
    rows += _of_means(own, shown, counts)
    return rows, spectra


PAIRS = (
    ("opd", "rlvr"),
    ("opd", "sft"),
    ("rlvr", "sft"),
    ("opd", "random_credit"),
    ("rlvr", "random_credit"),
    ("sft", "random_credit"),
)


def _split(entry: str) -> tuple[str, str]:
    """Unit and objective of an entry; random credit has no terms between tokens, so that its units are one."""
    if entry == "token.random_credit":
        return "sequence", "random_credit"
    return ("token", entry.removeprefix("token.")) if entry.startswith("token.") else ("sequence", entry)


def _of_side(
    side: str,
    entries: dict[str, Tensor],
    sizes: dict[str, np.ndarray],
    directions: Tensor,
    *,
    top_k: int,
    counts: np.ndarray,
    picks: np.ndarray,
    spectra: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Everything about the second moments of one side of one matrix."""
    rows: list[dict[str, Any]] = []
    size = next(iter(entries.values())).shape[1]
    k = min(top_k, largest_rank(size, directions.shape[1]))
    products = Products(entries, sizes)
    traces = {a: e.diagonal(dim1=1, dim2=2).sum(1).double().numpy() for a, e in entries.items()}
    totals = {a: (counts @ traces[a]) / (counts @ sizes[a]) for a in entries}
    squares = {a: moments.unequal(np.outer(t, t), sizes[a], sizes[a], counts) for a, t in traces.items()}
    norms = {a: products.inner(a, a, counts) for a in entries}
    rank = {a: _ratio(squares[a], norms[a]) for a in entries}
    known = {a: products.reliability(a, picks) for a in entries}
    vectors: dict[str, list[Tensor]] = {}

    def row(entry: str, quantity: str, draws: np.ndarray, other: str | None = None, **more: Any) -> None:
        unit, objective = _split(entry)
        other = other and _split(other)[1]
        rows.append(number_row(objective, other, quantity, unit, side, draws, **more))

    measured = [a for a in entries if a != "cross" and not a.startswith("expected.")]
    half = torch.from_numpy(picks[0]).float()
    for a in measured:
        unit, objective = _split(a)
        if not totals[a][0] > 0:
            row(a, "second_moment", totals[a])
            row(a, "effective_rank", np.full(len(counts), np.nan), reason="no credit: every gradient is 0")
            continue
        values, _ = moments.spectrum(entries[a].sum(0))
        parts = [moments.spectrum(torch.einsum("j,jab->ab", h, entries[a])) for h in (half, 1 - half)]
        vectors[a] = [v[:, :k][:, sigma[:k] > 1e-6 * sigma[0]] for sigma, v in parts]
        share = (values / values.sum()).tolist()
        spectra.append({"objective": objective, "unit": unit, "side": side, "values": share})
        row(a, "second_moment", totals[a])
        row(a, "effective_rank", rank[a], reliability=known[a])
        inside = torch.einsum("nk,jnl,lk->j", directions[:, :k].float(), entries[a], directions[:, :k].float())
        row(
            a,
            "weight_alignment",
            _ratio(counts @ inside.double().numpy(), counts @ traces[a]),
            "weights",
            chance=k / size,
        )
        if (token := f"token.{objective}") in entries and a != token:
            row(a, "coherence", _ratio(totals[a], totals[token]))
        if objective != "opd" and unit == "sequence" and objective.partition(".")[0] in ("top", "random", "mixture"):
            predicted = _ratio(totals[f"expected.{a}"], totals["opd"])[0] if f"expected.{a}" in totals else None
            row(a, "second_moment_ratio", _ratio(totals[a], totals["opd"]), "opd", chance=predicted)

    compared = [*PAIRS, *((a, "opd") for a in measured if a.partition(".")[0] in ("top", "random", "mixture"))]
    for one, two in compared:
        for prefix in ("", "token."):
            a, b = (prefix + o if prefix + o in entries else f"token.{o}" for o in (one, two))
            if a not in vectors or b not in vectors or (prefix and a != f"token.{one}"):
                continue
            chance = float(np.sqrt(rank[a][0] * rank[b][0])) / size  # under a random rotation of one against the other
            row(
                a,
                "alignment",
                products.cosine(a, b, counts),
                b,
                chance=chance,
                reliability=float(np.sqrt(known[a] * known[b])),
            )
            if min(v.shape[1] for v in (*vectors[a], *vectors[b])) < k:
                continue  # a half has fewer directions than are compared
            (a1, a2), (b1, b2) = vectors[a], vectors[b]
            shared = [float((u.T @ v).square().sum()) / k for u, v in ((a1, b2), (a2, b1), (a1, a2), (b1, b2))]
            row(
                a,
                "subspace_overlap",
                np.array([(shared[0] + shared[1]) / 2]),
                b,
                chance=k / size,
                reliability=float(np.sqrt(shared[2] * shared[3])),
            )

    if totals["opd"][0] > 0 and totals["rlvr"][0] > 0:
        rows += _mixtures(side, products, entries, norms, counts, picks)
    for a in (a for a in entries if a.startswith("expected.") and totals[a][0] > 0):
        drawn = a.removeprefix("expected.")
        apart = norms[drawn] + norms[a] - 2 * products.inner(drawn, a, counts)
        row(drawn, "mask_error", np.sqrt(np.maximum(apart, 0) / norms[drawn]), "expected", reliability=known[drawn])
    return rows


def _mixtures(
    side: str,
    products: Products,
    entries: dict[str, Tensor],
    norms: dict[str, np.ndarray],
    counts: np.ndarray,
    picks: np.ndarray,
) -> list[dict[str, Any]]:
    """Does Σ_α = α²Σ_OPD + (1 − α)²Σ_RLVR + α(1 − α)Σ_cross? Relative Frobenius errors ‖measured − predicted‖ / ‖measured‖.

    `mixture_error`: of the formula, on the same gradients: an identity, up to rounding. `mixture_error_without_cross`: when
    Σ_cross is left out (corrected for noise). `mixture_error_held_out`: predicted from one half of the prompts, measured on
    the other; `mixture_noise`: measured on both halves, which no prediction can beat.
    """
    rows = []
    sizes = products.sizes["opd"]
    halves = [p / (p @ sizes)[:, None] for p in (picks, 1 - picks)]
    for alpha in ALPHAS:
        name = f"mixture.{alpha:g}"
        formula = {"opd": alpha**2, "rlvr": (1 - alpha) ** 2, "cross": alpha * (1 - alpha)}
        measured, predicted = entries[name].sum(0), torch.zeros(())
        for k, c in formula.items():
            predicted = predicted + c * entries[k].sum(0)
        same = float((measured - predicted).norm() / measured.norm())
        cross = alpha * (1 - alpha) * np.sqrt(np.maximum(norms["cross"], 0) / norms[name])
        scale = products.norm({name: halves[0]})
        held = products.norm({name: halves[0]} | {k: -c * halves[1] for k, c in formula.items()}) / scale
        noise = products.norm({name: halves[0] - halves[1]}) / scale
        for quantity, values, average in (
            ("mixture_error", np.array([same]), False),
            ("mixture_error_without_cross", cross, False),
            ("mixture_error_held_out", held, True),
            ("mixture_noise", noise, True),
        ):
            draws = np.concatenate([[values.mean()], values]) if average else values
            rows.append(number_row(name, "opd + rlvr", quantity, "sequence", side, draws))
    return rows


def _of_means(own: Sums, shown: Sums, counts: np.ndarray) -> list[dict[str, Any]]:
    """How much of the second moment is the mean gradient, and which way the mean gradients point."""
    rows = []
    entries = own.mean | shown.mean
    sizes = dict.fromkeys(own.mean, own.sizes) | dict.fromkeys(shown.mean, shown.sizes)
    products = Products(entries, sizes)
    for a in entries:
        norm = products.inner(a, a, counts)
        trace = (own if a in own.mean else shown).right[a].diagonal(dim1=1, dim2=2).sum(1).double().numpy()
        if not trace.sum() > 0:
            continue
        rows.append(
            number_row(a, None, "mean_share", "sequence", "", _ratio(norm, (counts @ trace) / (counts @ sizes[a])))
        )
        for b in ("opd", "rlvr", "sft"):
            listed = (a, b) in PAIRS or (b == "opd" and a.partition(".")[0] in ("top", "random", "mixture"))
            if listed and float(entries[b].abs().max()) > 0:
                unseen = "a mean gradient is smaller than its sampling error"
                rows.append(
                    number_row(a, b, "mean_cosine", "sequence", "", products.cosine(a, b, counts), reason=unseen)
                )
    return rows


def credit_rows(sample: Sample, seed: int) -> list[dict[str, Any]]:
    """What the credit a_t of every objective looks like, over the tokens of the student's samples."""
    rows = []
    mask = sample.done.mask_BT.bool()
    counts = moments.draws(len(sample.blocks), BOOTSTRAP, seed)
    length_B1 = sample.done.mask_BT.sum(1, keepdim=True)

    def over_tokens(value_BT: Tensor) -> np.ndarray:
        sums = [(float(value_BT[b][mask[b]].sum()), float(mask[b].sum())) for b in sample.blocks]
        return _ratio(counts @ np.array(sums)[:, 0], counts @ np.array(sums)[:, 1])

    for name, scaled_BT in sample.credit.items():
        if name == "random_credit":
            continue
        credit_BT = scaled_BT * length_B1
        square_BT = credit_BT.double() ** 2
        mean, second = over_tokens(credit_BT), over_tokens(square_BT)
        largest = torch.quantile(square_BT[mask], 0.9)
        for quantity, draws in (
            ("credit_mean", mean),
            ("credit_std", np.sqrt(np.maximum(second - mean**2, 0))),
            ("credit_zero_share", over_tokens((credit_BT == 0).double())),
            ("credit_top_tenth", _ratio(over_tokens(torch.where(square_BT > largest, square_BT, 0.0)), second)),
        ):
            rows.append(number_row(name, None, quantity, "token", "", draws, reason="no credit: every a_t is 0"))
    right = np.array([float(sample.rewards[b].mean()) for b in sample.blocks])  # type: ignore[index]
    rows.append(number_row("rlvr", None, "reward", "sequence", "", counts @ right / counts.sum(1)))
    return rows


def number_row(
    objective: str,
    other: str | None,
    quantity: str,
    unit: str,
    side: str,
    draws: np.ndarray,
    *,
    chance: float | None = None,
    reliability: float | None = None,
    reason: str | None = None,
) -> dict[str, Any]:
    """One number: the first draw is the estimate, the rest its bootstrap; a number that is not finite is none, with its reason."""
    finite = draws[1:][np.isfinite(draws[1:])]
    value = float(draws[0]) if np.isfinite(draws[0]) else None
    low, high = np.quantile(finite, [0.025, 0.975]).tolist() if value is not None and len(finite) > 1 else (None, None)
    return {
        "objective": objective,
        "other": other,
        "quantity": quantity,
        "unit": unit,
        "side": side,
        "value": value,
        "low": low,
        "high": high,
        "chance": chance,
        "reliability": reliability if reliability is None or np.isfinite(reliability) else None,
        "reason": None if value is not None else reason or "too few prompts with credit to tell it from noise",
        "draws": np.where(np.isfinite(draws), draws, np.nan).tolist() if value is not None else [],
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(below > 0, above / below, np.nan)

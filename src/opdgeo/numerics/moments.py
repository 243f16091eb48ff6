"""Second moments of matrix gradients, from factors, and unbiased statistics of them.

A sequence's gradient under some credit is G = Σ_t a_t φ_t with φ_t = Σ_s δ_{t,s} x_sᵀ (`training/gradients.py`). Its two
second moments are Σ_right = E[GᵀG] (n × n) and Σ_left = E[GGᵀ] (m × m): the two marginals of E[vec g vec gᵀ], which has
(mn)² entries. Without the terms between different tokens Σ_right is E Σ_t a_t² φ_tᵀφ_t, the second moment that the same
tokens would have with credit of random sign.

From N samples the inner product ⟨Σ_a, Σ_b⟩ is too large where a and b share samples. Here samples come in independent
blocks and only products of two different blocks are used, so inner products are unbiased: ranks do not shrink, and
alignments do not fall, because there were few samples. A bootstrap draw is a vector of block counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Sums over sequences. R right and O left entries, in the order of `accumulate`."""

    right_Rnn: Tensor
    left_Omm: Tensor
    mean_Omn: Tensor


def accumulate(
    x_BLn: Tensor,
    delta_BTLm: Tensor,
    credit_OBT: Tensor,
    crosses: list[tuple[int, int]],
    token_UBT: Tensor,
    blends: list[tuple[int, int, Tensor, Tensor]],
) -> Moments:
    """Second moments of B sequences of L positions and T credited tokens under O credits, without forming a gradient of a token.

    Args:
        x_BLn: what the matrix multiplies, at every position.
        delta_BTLm: the gradient of each token's log-probability at the matrix's output.
        credit_OBT: the credit of every token under each objective.
        crosses: pairs (i, j) of credits; gives E[GᵢᵀGⱼ + GⱼᵀGᵢ].
        token_UBT: credits whose token-by-token second moment is wanted.
        blends: (credit, token credit, p_B, q_B): p · GᵀG + q · Σ_t a_t² φ_tᵀφ_t, a weight a sequence.

    Returns:
        right: O credits, crosses, U token credits, blends. left: O credits, crosses. mean: ΣG of the O credits.
    """
    shape = delta_BTLm.shape
    count = len(credit_OBT)
    delta_BOLm = torch.bmm(credit_OBT.transpose(0, 1), delta_BTLm.flatten(2)).view(shape[0], count, *shape[2:])
    kernels = list((delta_BOLm @ delta_BOLm.mT).unbind(1))
    for i, j in crosses:
        product = delta_BOLm[:, i] @ delta_BOLm[:, j].mT
        kernels.append(product + product.mT)
    if len(token_UBT):
        each_BTLL = delta_BTLm @ delta_BTLm.mT
        tokens = torch.einsum("ubt,btlk->ublk", token_UBT**2, each_BTLL)
        kernels += tokens.unbind(0)
        kernels += [p[:, None, None] * kernels[i] + q[:, None, None] * tokens[u] for i, u, p, q in blends]
    flat = x_BLn.flatten(0, 1)
    right = torch.stack([flat.T @ (kernel @ x_BLn).flatten(0, 1) for kernel in kernels])

    input_BLL = x_BLn @ x_BLn.mT
    weighed = [(input_BLL @ delta_BOLm[:, o]).flatten(0, 1) for o in range(count)]
    deltas = [delta_BOLm[:, o].flatten(0, 1) for o in range(count)]
    left = [d.T @ w for d, w in zip(deltas, weighed, strict=True)]
    for i, j in crosses:
        product = deltas[i].T @ weighed[j]
        left.append(product + product.T)
    return Moments(right, torch.stack(left), torch.stack([d.T @ flat for d in deltas]))


def draws(blocks: int, count: int, seed: int) -> np.ndarray:
    """Block counts (1 + count, blocks): first every block once, then bootstrap draws.

    >>> draws(3, 2, seed=0).sum(axis=1).tolist()
    [3.0, 3.0, 3.0]
    """
    rng = np.random.default_rng(seed)
    return np.vstack([np.ones(blocks), rng.multinomial(blocks, [1 / blocks] * blocks, size=count)])


def halves(blocks: int, count: int, seed: int) -> np.ndarray:
    """Indicators (count, blocks) of random halves of the blocks; 1 − indicator is the other half."""
    rng = np.random.default_rng(seed)
    picks = np.zeros((count, blocks))
    for row in picks:
        row[rng.permutation(blocks)[: blocks // 2]] = 1
    return picks


class Products:
    """Inner products of block sums, and what can be estimated from them.

    Args:
        entries: name → block sums (J, …), all of one shape.
        sizes: sequences in each block, by entry (J,).
    """

    def __init__(self, entries: dict[str, Tensor], sizes: dict[str, np.ndarray]):
        self.names = list(entries)
        self.blocks = len(next(iter(entries.values())))
        flat = torch.cat([e.flatten(1) for e in entries.values()])
        scale = float(flat.abs().max()) or 1.0  # products of small gradients would leave float32
        table = (flat / scale @ (flat / scale).T).double().numpy() * scale**2
        shape = (len(self.names), self.blocks)
        self.table = table.reshape(*shape, *shape).transpose(0, 2, 1, 3)
        self.at = {name: i for i, name in enumerate(self.names)}
        self.sizes = sizes

    def inner(self, a: str, b: str, counts: np.ndarray) -> np.ndarray:
        """⟨E a, E b⟩ for every draw (R,), from products of different blocks; NaN where a draw holds one block only."""
        return unequal(self.table[self.at[a], self.at[b]], self.sizes[a], self.sizes[b], counts)

    def cosine(self, a: str, b: str, counts: np.ndarray) -> np.ndarray:
        """⟨E a, E b⟩ / (‖E a‖ ‖E b‖) for every draw, corrected for sampling noise: it can exceed 1 by its own error."""
        norms = self.inner(a, a, counts) * self.inner(b, b, counts)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(norms > 0, self.inner(a, b, counts) / np.sqrt(np.abs(norms)), np.nan)

    def norm(self, parts: dict[str, np.ndarray]) -> np.ndarray:
        """‖Σ over entries and blocks of weight · block sum‖ (R,), as it stands; weights (R, J) by entry."""
        total = np.zeros(len(next(iter(parts.values()))))
        for a, u in parts.items():
            for b, v in parts.items():
                total += np.einsum("ri,ij,rj->r", u, self.table[self.at[a], self.at[b]], v)
        return np.sqrt(np.maximum(total, 0))

    def reliability(self, a: str, picks: np.ndarray) -> float:
        """Mean cosine between one half of the sample and the other: 1 without noise."""
        table, other = self.table[self.at[a], self.at[a]], 1 - picks
        across = np.einsum("ri,ij,rj->r", picks, table, other)
        within = [np.einsum("ri,ij,rj->r", p, table, p) for p in (picks, other)]
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(np.mean(across / np.sqrt(within[0] * within[1])))


def unequal(table: np.ndarray, sizes_a: np.ndarray, sizes_b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Σ_{i≠j} w_i w_j table_ij / Σ_{i≠j} w_i w_j n_i n_j for every row w of `counts`: (R,).

    Args:
        table: (J, J) inner products of block sums.
        sizes_a, sizes_b: (J,) sequences in each block, of either entry.
        counts: (R, J).
    """

    def pairs(matrix: np.ndarray) -> np.ndarray:
        return np.einsum("ri,ij,rj->r", counts, matrix, counts) - (counts**2) @ np.diag(matrix)

    with np.errstate(invalid="ignore", divide="ignore"):
        return pairs(table) / pairs(np.outer(sizes_a, sizes_b))


def spectrum(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (n,), descending, with negative rounding cut to 0, and eigenvectors in columns (n, n) of a second moment, in
    float64."""
    values, vectors = torch.linalg.eigh(moment.double())
    return values.flip(0).clamp(min=0), vectors.flip(1)

"""Null models: updates that share only the size of the measured one."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

# Draws of a large matrix whose W₀ + ΔW is factored: at this size draws differ little, and each costs a spectrum.
FACTORED = 2
LARGE = 200  # smaller sides from here on


def factored_draws(rows: int, cols: int, draws: int) -> int:
    """How many of `draws` null updates serve the diagnostics that need the spectrum of W₀ + ΔW; the others use them all."""
    return draws if min(rows, cols) < LARGE else min(draws, FACTORED)


def generator(*key: object) -> torch.Generator:
    """A CPU generator whose seed is a digest of `key`: the same on every device, worker and run."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def gaussian(rows: int, cols: int, norm: float, rng: torch.Generator) -> Tensor:
    """An isotropic Gaussian (rows, cols) matrix scaled to the Frobenius norm `norm`, float64."""
    draw = torch.randn(rows, cols, dtype=torch.float64, generator=rng)
    return draw * (norm / torch.linalg.vector_norm(draw))


def shuffled(delta: Tensor, rng: torch.Generator) -> Tensor:
    """The entries of `delta` in random places: the same histogram of changes, no structure."""
    flat = delta.flatten()
    return flat[torch.randperm(flat.numel(), generator=rng).to(delta.device)].reshape(delta.shape)

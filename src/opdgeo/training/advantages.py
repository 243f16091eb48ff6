"""Advantages: what credit each token gets. Pure functions, without a model, a trainer or a random state.

Shapes, by suffix: B completions, T tokens of the longest one; `_BT` a value a token, `_G` one a completion (relative to
the group of completions of its prompt). `mask_BT` is 1 on completion tokens, the end token included, 0 on padding.

With S = log p_student, T = log p_teacher of the sampled token (PAPER: "On the Geometry of On-Policy Distillation", §4):

    A = alpha · (T − S) · keep · (|y| / Σ keep) · mask  +  (1 − alpha) · A_group

Dropping tokens at random and rescaling leaves the expected gradient as it is: every token is kept with the same probability
and counts for the inverse of it. Keeping the tokens with the largest gap changes the objective: it always leaves out the tokens
that the teacher likes better than the student does.

Nothing is normalised across the batch, so the two terms have different scales. This is the paper's mixture.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor


def keep_tokens(
    gap_BT: Tensor, mask_BT: Tensor, share: float, choice: Literal["top", "random"], noise_BT: Tensor | None = None
) -> Tensor:
    """1 for the tokens that keep their credit, 0 otherwise; exactly ⌈share · |y|⌉ of every completion y.

    `top` keeps the largest gap r = log p_student − log p_teacher, signed as in the paper, so tokens that the student
    likes too much come first; ties go to the earlier token. `random` keeps the largest of `noise_BT` (uniform numbers
    from the caller, which owns the random state). An empty completion keeps nothing.

    Args:
        gap_BT: S − T, any float dtype.
        mask_BT: 1 on completion tokens.
        share: in (0, 1].
    """
    mask_BT = mask_BT.bool()
    if share >= 1.0:
        return mask_BT.to(gap_BT.dtype)
    if choice == "random":
        if noise_BT is None:
            raise ValueError("choice 'random' needs noise_BT, uniform numbers of the gap's shape")
        score_BT = noise_BT
    else:
        score_BT = gap_BT
    score_BT = score_BT.masked_fill(~mask_BT, -math.inf)
    # The multiplication is rounded first: 0.1 · 30 must count 3 tokens, not ⌈3.0000000000000004⌉ = 4.
    counts_B1 = torch.tensor([[math.ceil(round(share * n, 9))] for n in mask_BT.sum(1).tolist()], device=gap_BT.device)
    order_BT = score_BT.argsort(dim=1, descending=True, stable=True)
    rank_BT = torch.empty_like(order_BT).scatter_(
        1, order_BT, torch.arange(order_BT.shape[1], device=gap_BT.device).expand_as(order_BT)
    )
    return ((rank_BT < counts_B1) & mask_BT).to(gap_BT.dtype)


def distillation_advantages(student_BT: Tensor, teacher_BT: Tensor, mask_BT: Tensor, keep_BT: Tensor) -> Tensor:
    """(T − S) on kept tokens, rescaled by |y| / Σ keep so that a completion's mean credit keeps its size; else 0.

    A plain number: no gradient flows through it. Following it ascends −KL(student ‖ teacher) token by token; it is
    not the sequence-level gradient, which would also credit a token with the gaps that follow it.
    """
    length_B1 = mask_BT.sum(1, keepdim=True)
    kept_B1 = (keep_BT * mask_BT).sum(1, keepdim=True)
    gap_BT = torch.where(mask_BT.bool(), teacher_BT - student_BT, 0.0)  # padding may hold anything, even inf
    return (gap_BT * keep_BT * (length_B1 / kept_B1.clamp(min=1))).detach()


def correct_advantages(reward_G: Tensor, mean_reward: Tensor) -> Tensor:
    """1 for a right completion and 0 for a wrong one (G,), over the share of right ones; 0 where none is right.

    With it the objective is the mean, over the right completions, of the mean log p of their tokens: SFT on the student's
    own correct samples.
    """
    return torch.where(mean_reward > 0, reward_G / mean_reward.clamp(min=1e-9), torch.zeros_like(reward_G))


def divergence(student_BTV: Tensor, teacher_BTV: Tensor, direction: Literal["reverse_kl", "forward_kl"]) -> Tensor:
    """KL(student ‖ teacher) or KL(teacher ‖ student) of two arrays of logits, (B, T), differentiable in the student's.

    The gradient of the reverse one at a state is the expectation, over the student's own next token, of −(T − S) ∇S: the
    sampled token's credit is its one-sample estimate (a test enumerates it).
    """
    logp_BTV, logq_BTV = student_BTV.float().log_softmax(-1), teacher_BTV.float().log_softmax(-1)
    if direction == "forward_kl":
        logp_BTV, logq_BTV = logq_BTV, logp_BTV
    return (logp_BTV.exp() * (logp_BTV - logq_BTV)).sum(-1)


def group_advantages(reward_G: Tensor, generations: int) -> Tensor:
    """(r − mean) / (std + 1e-4) within each prompt's `generations` consecutive completions; 0 where all rewards are equal.

    What TRL computes in training (a test holds the two together), for measurements outside a trainer.
    """
    reward_PG = reward_G.view(-1, generations)
    return ((reward_PG - reward_PG.mean(1, keepdim=True)) / (reward_PG.std(1, keepdim=True) + 1e-4)).flatten()


def coin_rewards(noise_G: Tensor) -> Tensor:
    """1 or 0 with equal chance, from uniform numbers of the caller: the reward of a completion whatever it says.

    RLVR on it is the noise control: its updates are what the optimizer makes of gradients without a direction.
    """
    return (noise_G < 0.5).to(noise_G.dtype)


def random_signs(adv_BT: Tensor, noise_BT: Tensor) -> Tensor:
    """Every token's credit, its sign turned where the caller's uniform number is below one half.

    Sizes stay those of the teacher's gaps; in expectation no token is liked or disliked.
    """
    return torch.where(noise_BT < 0.5, -adv_BT, adv_BT)


def token_advantages(adv_opd_BT: Tensor | None, adv_G: Tensor, mask_BT: Tensor, alpha: float) -> Tensor:
    """alpha · A_OPD + (1 − alpha) · A_group on completion tokens, 0 on padding.

    `adv_opd_BT` may be None when alpha is 0. Law: alpha = 1 ignores the reward, alpha = 0 ignores the teacher, and a
    group whose rewards are all equal (A_group = 0) contributes through the teacher only.
    """
    mask_BT = mask_BT.to(adv_G.dtype)
    if alpha == 0.0:
        return adv_G[:, None] * mask_BT
    if adv_opd_BT is None:
        raise ValueError(f"alpha = {alpha:g} needs the teacher's advantages")
    if alpha == 1.0:
        return adv_opd_BT * mask_BT
    return (alpha * adv_opd_BT + (1.0 - alpha) * adv_G[:, None]) * mask_BT

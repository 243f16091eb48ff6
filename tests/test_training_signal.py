"""The credit a token gets, against numbers worked out by hand, and the laws of its parts."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opdgeo.training.signal import distillation_advantages, keep_tokens, token_advantages

# Two completions, of 4 and 2 tokens. Gaps S − T: 1, −0.5, 2, 0 and 0.25, −1. Padding holds rubbish on purpose.
STUDENT_BT = torch.tensor([[-1.0, -2.5, -1.0, -3.0], [-1.75, -4.0, math.inf, 7.0]])
TEACHER_BT = torch.tensor([[-2.0, -2.0, -3.0, -3.0], [-2.0, -3.0, math.nan, -9.0]])
MASK_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
GROUP_G = torch.tensor([0.7, -0.7])
GAP_BT = STUDENT_BT - TEACHER_BT


def advantages(alpha: float, share: float = 1.0, adv_G: torch.Tensor = GROUP_G) -> torch.Tensor:
    keep_BT = keep_tokens(GAP_BT, MASK_BT, share, "top")
    opd_BT = distillation_advantages(STUDENT_BT, TEACHER_BT, MASK_BT, keep_BT)
    return token_advantages(opd_BT, adv_G, MASK_BT, alpha)


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (1.0, [[-1.0, 0.5, -2.0, 0.0], [-0.25, 1.0, 0.0, 0.0]]),
        (0.0, [[0.7, 0.7, 0.7, 0.7], [-0.7, -0.7, 0.0, 0.0]]),
        (0.75, [[-0.575, 0.55, -1.325, 0.175], [-0.3625, 0.575, 0.0, 0.0]]),
        (0.5, [[-0.15, 0.6, -0.65, 0.35], [-0.475, 0.15, 0.0, 0.0]]),
        (0.01, [[0.683, 0.698, 0.673, 0.693], [-0.6955, -0.683, 0.0, 0.0]]),
    ],
)
def test_advantages_worked_by_hand(alpha: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(advantages(alpha), torch.tensor(expected))


def test_rlvr_needs_no_teacher_and_a_mixture_does() -> None:
    torch.testing.assert_close(token_advantages(None, GROUP_G, MASK_BT, 0.0), advantages(0.0))
    with pytest.raises(ValueError, match="teacher"):
        token_advantages(None, GROUP_G, MASK_BT, 0.5)


def test_a_group_without_reward_variance_is_moved_by_the_teacher_alone() -> None:
    zero_G = torch.zeros(2)
    assert torch.count_nonzero(advantages(0.0, adv_G=zero_G)) == 0
    torch.testing.assert_close(advantages(0.5, adv_G=zero_G), 0.5 * advantages(1.0))


def test_a_half_of_the_tokens_is_kept_by_signed_gap_and_rescaled() -> None:
    # Row 0 keeps gaps 2 and 1 of four (× 4/2), row 1 keeps 0.25 of two (× 2/1); −1 is large but not on top.
    torch.testing.assert_close(advantages(1.0, 0.5), torch.tensor([[-2.0, 0.0, -4.0, 0.0], [-0.5, 0.0, 0.0, 0.0]]))


def test_ties_go_to_the_earlier_token() -> None:
    kept = keep_tokens(torch.zeros(1, 5), torch.ones(1, 5), 0.4, "top")
    assert kept.tolist() == [[1, 1, 0, 0, 0]]


def test_random_choice_follows_the_callers_noise() -> None:
    noise_BT = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.6, 0.99, 0.99]])
    kept = keep_tokens(GAP_BT, MASK_BT, 0.5, "random", noise_BT)
    assert kept.tolist() == [[0, 1, 0, 1], [0, 1, 0, 0]]
    with pytest.raises(ValueError, match="noise"):
        keep_tokens(GAP_BT, MASK_BT, 0.5, "random")


def test_no_gradient_flows_through_the_credit() -> None:
    student_BT = torch.randn(2, 3, requires_grad=True)
    ones_BT = torch.ones(2, 3)
    assert not distillation_advantages(student_BT, torch.randn(2, 3), ones_BT, ones_BT).requires_grad


def test_an_empty_completion_keeps_nothing_and_stays_finite() -> None:
    mask_BT = torch.zeros(1, 3)
    keep_BT = keep_tokens(torch.randn(1, 3), mask_BT, 0.5, "top")
    adv_BT = distillation_advantages(torch.randn(1, 3), torch.randn(1, 3), mask_BT, keep_BT)
    assert keep_BT.sum() == 0 and adv_BT.tolist() == [[0, 0, 0]]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=5),
    share=st.sampled_from([0.1, 0.25, 0.3, 0.5, 0.75, 1.0]),
    choice=st.sampled_from(["top", "random"]),
    seed=st.integers(0, 2**16),
)
def test_exactly_the_share_is_kept_and_equal_gaps_keep_their_mean(
    lengths: list[int], share: float, choice: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, 1)
    mask_BT = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    gap_BT = torch.randn(len(lengths), width, generator=generator, dtype=torch.float64)
    noise_BT = torch.rand(len(lengths), width, generator=generator)
    keep_BT = keep_tokens(gap_BT, mask_BT, share, choice, noise_BT)  # type: ignore[arg-type]
    assert keep_BT.sum(1).tolist() == [-(-round(share * 100) * n // 100) for n in lengths]
    assert bool((keep_BT <= mask_BT).all())
    # rescaling: where every gap is the same, dropping tokens leaves a completion's total credit alone
    ones_BT = torch.ones_like(gap_BT)
    total_B = distillation_advantages(0 * ones_BT, ones_BT, mask_BT, keep_BT).sum(1)
    torch.testing.assert_close(total_B, torch.tensor(lengths, dtype=torch.float64))

"""The credit a token gets, against numbers worked out by hand, and the laws of its parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from opdgeo.training.advantages import (
    correct_advantages,
    distillation_advantages,
    divergence,
    keep_tokens,
    token_advantages,
)

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
        (0.25, [[0.275, 0.65, 0.025, 0.525], [-0.5875, -0.275, 0.0, 0.0]]),
        (0.05, [[0.615, 0.69, 0.565, 0.665], [-0.6775, -0.615, 0.0, 0.0]]),
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


@pytest.mark.parametrize(
    ("alpha", "share", "choice", "expected"),
    [
        # top: row 0 keeps gap 2 of four (× 4), row 1 keeps gap 0.25 of two (× 2)
        (1.0, 0.25, "top", [[0.0, 0.0, -8.0, 0.0], [-0.5, 0.0, 0.0, 0.0]]),
        # random by the noise below: row 0 keeps tokens 1 and 3 (× 2) or 1 alone (× 4), row 1 keeps token 1 (× 2)
        (1.0, 0.5, "random", [[0.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]),
        (1.0, 0.25, "random", [[0.0, 2.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]),
        # a mixture drops the teacher's part alone: the reward's stays on every token
        (0.75, 0.5, "top", [[-1.325, 0.175, -2.825, 0.175], [-0.55, -0.175, 0.0, 0.0]]),
        (0.25, 0.25, "random", [[0.525, 1.025, 0.525, 0.525], [-0.525, -0.025, 0.0, 0.0]]),
        (0.0, 0.25, "top", [[0.7, 0.7, 0.7, 0.7], [-0.7, -0.7, 0.0, 0.0]]),
    ],
)
def test_dropped_tokens_worked_by_hand(alpha: float, share: float, choice: str, expected: list[list[float]]) -> None:
    noise_BT = torch.tensor([[0.1, 0.9, 0.2, 0.8], [0.3, 0.6, 0.99, 0.99]])
    keep_BT = keep_tokens(GAP_BT, MASK_BT, share, choice, noise_BT)  # type: ignore[arg-type]
    opd_BT = distillation_advantages(STUDENT_BT, TEACHER_BT, MASK_BT, keep_BT)
    torch.testing.assert_close(token_advantages(opd_BT, GROUP_G, MASK_BT, alpha), torch.tensor(expected))


def test_the_credit_is_the_same_whoever_wrote_the_tokens() -> None:
    """With the teacher's rollouts the gaps are those of the teacher's tokens, and the formula is the same: hand-computed."""
    student_BT, teacher_BT = (
        torch.tensor([[-3.0, -0.5]]),
        torch.tensor([[-0.25, -0.5]]),
    )  # tokens that the teacher likes
    mask_BT, adv_G = torch.ones(1, 2), torch.tensor([0.5])
    opd_BT = distillation_advantages(student_BT, teacher_BT, mask_BT, mask_BT)
    torch.testing.assert_close(token_advantages(opd_BT, adv_G, mask_BT, 1.0), torch.tensor([[2.75, 0.0]]))
    torch.testing.assert_close(token_advantages(opd_BT, adv_G, mask_BT, 0.5), torch.tensor([[1.625, 0.25]]))


def test_right_completions_count_one_over_their_share() -> None:
    reward_G = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    assert correct_advantages(reward_G, reward_G.mean()).tolist() == [4, 0, 4, 0, 0, 0, 0, 0]
    assert correct_advantages(0 * reward_G, torch.tensor(0.0)).tolist() == [0] * 8


# A language of three tokens and completions of exactly four, with a logit for every position and previous token: small enough to
# write out every completion and every choice of tokens, so that expectations are sums.
VOCABULARY, LENGTH = 3, 4


def every_completion(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All completions (B, T) and log p of their tokens (B, T) under `logits` (T, previous, next); the start counts as token 0."""
    ids_BT = torch.cartesian_prod(*[torch.arange(VOCABULARY)] * LENGTH)
    previous_BT = torch.cat([torch.zeros(len(ids_BT), 1, dtype=torch.long), ids_BT[:, :-1]], dim=1)
    return ids_BT, logits.log_softmax(-1)[torch.arange(LENGTH), previous_BT, ids_BT]


def expected_gradient(share: float, choice: str) -> torch.Tensor:
    """E[(1/|y|) Σ_t A_t ∇ log p(y_t)] over all completions of the student and, with `random`, over all choices of tokens."""
    rng = torch.Generator().manual_seed(3)
    shape = (LENGTH, VOCABULARY, VOCABULARY)
    student = torch.randn(shape, generator=rng, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(shape, generator=rng, dtype=torch.float64)
    (_, student_BT), (_, teacher_BT) = every_completion(student), every_completion(teacher)
    mask_BT = torch.ones_like(student_BT)
    chance_B = student_BT.detach().sum(1).exp()
    assert float(chance_B.sum()) == pytest.approx(1.0)
    gap_BT = (student_BT - teacher_BT).detach()
    orders = list(itertools.permutations(range(LENGTH))) if choice == "random" else [range(LENGTH)]
    total = torch.zeros(shape, dtype=torch.float64)
    for order in orders:
        noise_BT = torch.tensor(order, dtype=torch.float64).expand_as(gap_BT)
        keep_BT = keep_tokens(gap_BT, mask_BT, share, choice, noise_BT)  # type: ignore[arg-type]
        adv_BT = token_advantages(
            distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT), chance_B, mask_BT, 1.0
        )
        objective = (chance_B * (adv_BT * student_BT).mean(1)).sum()
        total += torch.autograd.grad(objective, student, retain_graph=True)[0] / len(orders)
    return total


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_dropping_tokens_at_random_keeps_the_expected_gradient(share: float) -> None:
    torch.testing.assert_close(expected_gradient(share, "random"), expected_gradient(1.0, "top"))


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_keeping_the_largest_gaps_does_not(share: float) -> None:
    kept, full = expected_gradient(share, "top"), expected_gradient(1.0, "top")
    assert float((kept - full).norm() / full.norm()) > 0.2


def test_the_sampled_tokens_credit_estimates_the_gradient_of_the_full_reverse_kl() -> None:
    rng = torch.Generator().manual_seed(4)
    student = torch.randn(1, 1, 5, generator=rng, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(1, 1, 5, generator=rng, dtype=torch.float64)
    (exact,) = torch.autograd.grad(divergence(student, teacher, "reverse_kl").sum(), student)
    log_student, log_teacher = student.log_softmax(-1)[0, 0], teacher.log_softmax(-1)[0, 0]
    credit = (log_teacher - log_student).detach()  # A of each token that could have been sampled
    (expected,) = torch.autograd.grad(-(log_student.detach().exp() * credit * log_student).sum(), student)
    torch.testing.assert_close(expected, exact.to(expected), atol=1e-6, rtol=1e-5)


def test_divergences_worked_by_hand() -> None:
    half, skewed = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.75, 0.25]]]).log()
    reverse = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    forward = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert float(divergence(half, skewed, "reverse_kl")) == pytest.approx(reverse, abs=1e-6)
    assert float(divergence(half, skewed, "forward_kl")) == pytest.approx(forward, abs=1e-6)


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


@examples(25)
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

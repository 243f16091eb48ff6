"""verl's and slime's tensors in, `opdgeo train`'s credit out; and an optimizer class whose steps stay in a channel."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from opdgeo import Channel
from opdgeo.errors import ConfigError
from opdgeo.training import advantages
from opdgeo.training.external_trainers import (
    VERL_REWARD,
    ChannelAdamW,
    group_advantages,
    slime_advantages,
    verl_advantages,
)

LENGTHS = [5, 3, 7, 1, 4, 6, 2, 7]
UIDS = ["a", "b", "a", "b", "a", "b", "a", "b"]
RIGHT = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0])


def rollout() -> tuple[Tensor, Tensor, Tensor]:
    """log p of student and teacher (B, T), and the mask."""
    torch.manual_seed(0)
    mask = (torch.arange(7) < torch.tensor(LENGTHS)[:, None]).float()
    student, gaps = -torch.rand(8, 7) * 3, torch.randn(8, 7) * 4
    return student, student - gaps, mask


def expected(alpha: float, share: float) -> Tensor:
    """What `policy.TokenCredit` gives the same completions."""
    student, teacher_, mask = rollout()
    keep = advantages.keep_tokens(student - teacher_, mask, share, "top")
    opd = advantages.distillation_advantages(student, teacher_, mask, keep)
    group = torch.zeros(8)
    for uid in "ab":
        rows = torch.tensor([u == uid for u in UIDS])
        group[rows] = (RIGHT[rows] - RIGHT[rows].mean()) / (RIGHT[rows].std() + 1e-4)
    return advantages.token_advantages(opd, group, mask, alpha)


CREDITS = [(1.0, 1.0), (1.0, 0.5), (0.5, 1.0), (0.25, 0.25), (0.0, 1.0)]


@pytest.mark.parametrize(("alpha", "share"), CREDITS)
def test_verl_gets_the_same_credit(alpha: float, share: float) -> None:
    student, teacher_, mask = rollout()
    rewards = (
        -1.0 * (student - teacher_) * mask * (alpha > 0)
    )  # verl: token_level_scores − β · kl, with kl = log p − log p_ref
    rewards[torch.arange(8), torch.tensor(LENGTHS) - 1] += VERL_REWARD * RIGHT
    config = {"opdgeo_alpha": alpha, "opdgeo_token_share": share}
    before = rewards.clone()
    advantages, returns = verl_advantages(token_level_rewards=rewards, response_mask=mask, index=UIDS, config=config)
    assert torch.equal(rewards, before)
    torch.testing.assert_close(advantages, expected(alpha, share), rtol=1e-5, atol=2e-4)
    assert torch.equal(advantages, returns) and advantages[mask == 0].abs().sum() == 0


@pytest.mark.parametrize(("alpha", "share"), CREDITS)
def test_slime_gets_the_same_credit(alpha: float, share: float) -> None:
    student, teacher_, _ = rollout()
    cut = lambda x: [row[:n] for row, n in zip(x, LENGTHS, strict=True)]  # noqa: E731
    data: dict[str, Any] = {
        "log_probs": cut(student), "loss_masks": [torch.ones(n, dtype=torch.int) for n in LENGTHS],
        "rewards": group_advantages(RIGHT, UIDS).tolist(), "response_lengths": LENGTHS,
    }  # fmt: skip
    if alpha > 0:
        data["teacher_log_probs"] = cut(teacher_)
    args = SimpleNamespace(opdgeo_alpha=alpha, opdgeo_token_share=share, use_opd=alpha > 0, opd_kl_coef=0.0)
    slime_advantages(args, data)
    for i, n in enumerate(LENGTHS):
        assert data["advantages"][i].shape == data["returns"][i].shape == (n,)
        torch.testing.assert_close(data["advantages"][i], expected(alpha, share)[i, :n])


def test_what_the_trainers_did_not_hand_over_is_named() -> None:
    student, teacher_, mask = rollout()
    with pytest.raises(ConfigError, match="use_kl_in_reward=True"):
        verl_advantages(torch.zeros(8, 7), mask, UIDS, {"opdgeo_alpha": 1.0})
    with pytest.raises(ConfigError, match="expected one uid a completion"):
        verl_advantages(torch.zeros(8, 7), mask, None, {"opdgeo_alpha": 0.0})
    wrong = torch.zeros(8, 7)
    wrong[0, 1] = VERL_REWARD  # a reward before the end
    with pytest.raises(ConfigError, match="expected one of the two"):
        verl_advantages(wrong, mask, UIDS, {"opdgeo_alpha": 0.0})
    with pytest.raises(ConfigError, match="opdgeo_token_share 0 and"):
        verl_advantages(wrong, mask, UIDS, {"opdgeo_token_share": 0.0})
    data = {"log_probs": [student[0]], "loss_masks": [mask[0]], "rewards": [0.0]}
    with pytest.raises(ConfigError, match="--use-opd"):
        slime_advantages(SimpleNamespace(), data)
    with pytest.raises(ConfigError, match=r"opd_kl_coef is 1\.0; expected 0"):
        slime_advantages(SimpleNamespace(use_opd=True, opd_kl_coef=1.0), data | {"teacher_log_probs": [teacher_[0]]})
    with pytest.raises(ConfigError, match="without context parallelism"):
        slime_advantages(SimpleNamespace(), data | {"loss_masks": [mask[0][:3]], "teacher_log_probs": [teacher_[0]]})


@pytest.mark.parametrize("mode", ["update", "gradient"])
def test_an_optimizer_class_stays_in_the_channel(mode: str, origin: Path, teacher: Path, tmp_path: Path) -> None:
    """Built as verl builds it: from `parameters()`, lr, weight_decay, betas and the overrides."""
    channel = Channel.extract(origin, teacher, 4)
    path = channel.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    overrides = {"channel": str(path), "model": str(origin), "mode": mode}
    optimizer = ChannelAdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), **overrides)
    ids = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(5):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "tuned")
    outside = [x for x in channel.energy_outside(origin, tmp_path / "tuned").values() if x is not None]
    assert len(outside) == 14
    assert max(outside) < 1e-8 if mode == "update" else 1e-4 < max(outside) < 0.9  # Adam leaks
    assert optimizer.constraint.outside() == pytest.approx(sum(outside) / 14, abs=0.5)


def test_an_optimizer_refuses_parameters_of_another_model(origin: Path, teacher: Path, tmp_path: Path) -> None:
    path = str(Channel.extract(origin, teacher, 2).save(tmp_path))
    flat = torch.nn.Parameter(torch.zeros(1000))
    with pytest.raises(ConfigError, match=r"got 1 parameters.*use FSDP2"):
        ChannelAdamW([flat], lr=1e-3, channel=path, model=str(origin))
    with pytest.raises(ConfigError, match="mode is 'adapter'"):
        ChannelAdamW([flat], lr=1e-3, channel=path, model=str(origin), mode="adapter")


def test_the_functions_take_what_the_trainers_pass() -> None:
    """verl 0.9.1 calls its estimators by keyword with these names; slime calls (args, rollout_data)."""
    names = inspect.signature(verl_advantages).parameters
    assert {"token_level_rewards", "response_mask", "config", "index"} <= names.keys()
    assert any(p.kind is p.VAR_KEYWORD for p in names.values())  # reward_baselines and whatever comes
    assert list(inspect.signature(slime_advantages).parameters) == ["args", "rollout_data"]


@pytest.mark.needs("verl")
def test_inside_the_real_verl(origin: Path, teacher: Path, tmp_path: Path) -> None:
    """Its registry, its log-ratio and its way of building an optimizer (verl 0.9.1, where it is installed)."""
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    optimizers = importlib.import_module("verl.workers.config.optimizer")
    core.register_adv_est("opdgeo")(verl_advantages)
    student, teacher_, mask = rollout()
    rewards = -core.kl_penalty(student, teacher_, "kl") * mask
    rewards[torch.arange(8), torch.tensor(LENGTHS) - 1] += VERL_REWARD * RIGHT
    found, _ = core.get_adv_estimator_fn("opdgeo")(
        token_level_rewards=rewards, response_mask=mask, config={"opdgeo_alpha": 0.5}, index=UIDS
    )
    torch.testing.assert_close(found, expected(0.5, 1.0), rtol=1e-5, atol=2e-4)

    path = Channel.extract(origin, teacher, 4).save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    built = optimizers.build_optimizer(
        model.parameters(),
        optimizers.FSDPOptimizerConfig(
            lr=1e-3, optimizer="ChannelAdamW", optimizer_impl="opdgeo.training.external_trainers",
            override_optimizer_config={"channel": str(path), "model": str(origin)},
        ),
    )  # fmt: skip
    assert isinstance(built, ChannelAdamW)
    ids = torch.randint(3, 40, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        built.step()
    outside = built.constraint.outside()
    assert outside is not None and outside < 1e-8

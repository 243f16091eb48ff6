"""The credit and the channel of `opdgeo train` in two other trainers: verl (read at 0.9.1) and slime (read in October 2026).

In verl the teacher is the reference model, whose log-probabilities verl subtracts from the rewards itself:

    algorithm.adv_estimator=opdgeo  +algorithm.opdgeo_alpha=1.0        (also opdgeo_token_share, opdgeo_token_choice)
    algorithm.use_kl_in_reward=True  algorithm.kl_penalty=kl  algorithm.kl_ctrl.kl_coef=1.0     (for alpha > 0)
    +actor_rollout_ref.ref.model.path=TEACHER

    # in a module that verl imports before it trains:
    from verl.trainer.ppo.core_algos import register_adv_est
    from opdgeo.training.external_trainers import verl_advantages
    register_adv_est("opdgeo")(verl_advantages)

The reward function returns `VERL_REWARD` for a right completion and 0 for a wrong one. verl hands over reward and log-ratio as one
sum, and a reward of that size lets the two be told apart. The channel:

    actor_rollout_ref.actor.optim.optimizer_impl=opdgeo.training.external_trainers  actor_rollout_ref.actor.optim.optimizer=ChannelAdamW
    actor_rollout_ref.actor.strategy=fsdp2
    +actor_rollout_ref.actor.optim.override_optimizer_config.channel=CHANNEL
    +actor_rollout_ref.actor.optim.override_optimizer_config.model=ANCHOR

slime has an option for such a function, and computes the teacher's log-probabilities itself:

    --custom-advantage-function-path opdgeo.training.external_trainers.slime_advantages
    --use-opd --opd-type megatron --opd-teacher-load TEACHER --opd-kl-coef 0      (the term is in our function; its own is off)

with opdgeo_alpha, opdgeo_token_share and opdgeo_token_choice in the file of --custom-config-path. slime's optimizer is Megatron's. It
works on fused and sharded buffers, so a channel cannot be held there. Train the adapter that `opdgeo channel` writes instead.

Both depart from `opdgeo train` in two points. Gradients are clipped before they are projected, and random tokens are drawn from
torch's own random state.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from opdgeo.errors import ConfigError
from opdgeo.training import advantages
from opdgeo.training.channel import Channel
from opdgeo.training.constrain import Constraint, Mode

VERL_REWARD = 256.0
"""A power of two. Adding it to a log-ratio and subtracting it again costs at most 2⁻¹⁵ nats, and no gap comes near half of it."""


def _settings(source: Any) -> tuple[float, float, Any]:
    """alpha, token share and token choice from a mapping or an object. Where one is not set: 1, 1 and top."""
    read = source.get if hasattr(source, "get") else lambda name, default: getattr(source, name, default)
    alpha, share = float(read("opdgeo_alpha", 1.0)), float(read("opdgeo_token_share", 1.0))
    choice = read("opdgeo_token_choice", "top")
    if not (0 <= alpha <= 1 and 0 < share <= 1 and choice in ("top", "random")):
        raise ConfigError(
            f"opdgeo_alpha is {alpha:g}, opdgeo_token_share {share:g} and opdgeo_token_choice {choice!r}; expected a number from 0 to 1, "
            "a share above 0 and at most 1, and top or random."
        )
    return alpha, share, choice


def credit(
    gap_BT: Tensor | None, adv_G: Tensor, mask_BT: Tensor, *, alpha: float, share: float = 1.0, choice: Any = "top"
) -> Tensor:
    """The advantages of `advantages.py` from the gap S − T (log p_student − log p_teacher) instead of from its two terms."""
    if alpha == 0:
        return advantages.token_advantages(None, adv_G, mask_BT, 0.0)
    if gap_BT is None:
        raise ConfigError(f"opdgeo_alpha is {alpha:g} and there are no teacher log-probabilities; expected them.")
    noise_BT = torch.rand_like(gap_BT) if choice == "random" else None
    keep_BT = advantages.keep_tokens(gap_BT, mask_BT, share, choice, noise_BT)
    adv_opd_BT = advantages.distillation_advantages(gap_BT, torch.zeros_like(gap_BT), mask_BT, keep_BT)
    return advantages.token_advantages(adv_opd_BT, adv_G, mask_BT, alpha)


def group_advantages(rewards_B: Tensor, groups: Iterable[Any]) -> Tensor:
    """(r − mean) / (std + 1e-4) within each group, std with n − 1, as TRL's `scale_rewards="group"`; `groups` names each one's."""
    names = list(groups)
    index = {name: i for i, name in enumerate(dict.fromkeys(names))}
    of_B = torch.tensor([index[name] for name in names], device=rewards_B.device)
    adv_B = torch.zeros_like(rewards_B)
    for i in range(len(index)):
        member = of_B == i
        mine = rewards_B[member]
        if len(mine) > 1:
            adv_B[member] = (mine - mine.mean()) / (mine.std() + 1e-4)
    return adv_B


def verl_advantages(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """verl's advantage estimator: (advantages, returns), both (B, T).

    Args:
        token_level_rewards: (B, T), `VERL_REWARD` or 0 at the last token, less S − T at every token where use_kl_in_reward is on.
        response_mask: (B, T), 1 on completion tokens.
        index: the prompt that each completion belongs to (verl's uid).
        config: verl's `algorithm` section.

    Raises:
        ConfigError: rewards other than 0 and `VERL_REWARD`, or alpha > 0 without the KL in the reward.
    """
    alpha, share, choice = _settings(config if config is not None else {})
    mask_BT = response_mask.to(token_level_rewards.dtype)
    last_B = (mask_BT * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)).argmax(1)
    rows = torch.arange(len(mask_BT), device=mask_BT.device)
    right_B = (token_level_rewards[rows, last_B] > VERL_REWARD / 2).to(token_level_rewards.dtype)
    gap_BT = -token_level_rewards.clone()
    gap_BT[rows, last_B] += VERL_REWARD * right_B
    gap_BT = gap_BT * mask_BT
    if float(gap_BT.abs().max()) > VERL_REWARD / 2:
        raise ConfigError(
            f"a token's reward is {float(-gap_BT.abs().max()):g} off from 0 and {VERL_REWARD:g}; expected one of the two for a completion "
            "(opdgeo.training.external_trainers.VERL_REWARD for a right one), less the log-ratio to the teacher."
        )
    if alpha > 0 and not bool(gap_BT.any()):
        raise ConfigError(
            f"opdgeo_alpha is {alpha:g} and no token has a log-ratio to the teacher; expected algorithm.use_kl_in_reward=True with "
            "kl_penalty=kl and kl_coef=1, and the teacher as the reference model."
        )
    adv_B = group_advantages(right_B, _uids(index, len(rows))) if alpha < 1 else torch.zeros_like(right_B)
    adv_BT = credit(gap_BT, adv_B, mask_BT, alpha=alpha, share=share, choice=choice)
    return adv_BT, adv_BT.clone()


def _uids(index: Any, count: int) -> list[Any]:
    if index is None or len(index) != count:
        raise ConfigError("verl gave no index of prompts; expected one uid a completion, as GRPO needs.")
    return list(index)


def slime_advantages(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's custom advantage function: sets `advantages` and `returns`, lists of one (T,) tensor a completion.

    Reads `log_probs` (or `rollout_log_probs` where slime trains on those), `teacher_log_probs`, `loss_masks` and `rewards`, which
    slime has normalised within each group already.

    Raises:
        ConfigError: no teacher log-probabilities although alpha > 0, or sequences split by context parallelism.
    """
    alpha, share, choice = _settings(args)
    student = rollout_data["rollout_log_probs" if getattr(args, "use_rollout_logprobs", False) else "log_probs"]
    masks = [mask.to(s) for mask, s in zip(rollout_data["loss_masks"], student, strict=True)]
    teacher = rollout_data.get("teacher_log_probs")
    if alpha > 0 and teacher is None:
        raise ConfigError(
            f"opdgeo_alpha is {alpha:g} and the batch has no teacher_log_probs; expected --use-opd with a teacher and --opd-kl-coef 0."
        )
    if getattr(args, "use_opd", False) and float(getattr(args, "opd_kl_coef", 0.0)) != 0.0:
        raise ConfigError(
            f"opd_kl_coef is {args.opd_kl_coef}; expected 0, or slime would subtract the teacher's term a second time."
        )
    advantages = []
    for i, (s, mask) in enumerate(zip(student, masks, strict=True)):
        if mask.shape != s.shape:
            raise ConfigError(
                f"completion {i} has {len(s)} log-probabilities here and {len(mask)} mask entries; expected equally many. "
                "Train without context parallelism."
            )
        gap = (s - teacher[i].to(s))[None] if alpha > 0 and teacher is not None else None
        reward = torch.as_tensor(rollout_data["rewards"][i], dtype=s.dtype, device=s.device)[None]
        advantages.append(credit(gap, reward, mask[None], alpha=alpha, share=share, choice=choice)[0])
    rollout_data["advantages"] = advantages
    rollout_data["returns"] = [a.clone() for a in advantages]


class ChannelAdamW(torch.optim.AdamW):
    """AdamW whose steps stay in a channel (`constrain.Constraint`), for trainers that build their optimizer from a class.

    Args:
        params: all parameters of the model in its own order, whole or sharded by rows (FSDP2): what `model.parameters()` gives.
        channel: path of `channel.safetensors`, or its folder.
        model: folder of a checkpoint of this architecture, which says what the parameters are called.
        mode: update (exact) or gradient (the paper's).

    Raises:
        ConfigError: the parameters are not those of `model` (FSDP1 flattens them: use FSDP2), or `adapter` is asked for.
    """

    def __init__(self, params: Iterable[Any], *, channel: str, model: str, mode: Mode = "update", **adamw: Any) -> None:
        if mode not in ("update", "gradient"):
            raise ConfigError(
                f"mode is {mode!r}; expected update or gradient: an adapter is another model, not an optimizer."
            )
        parameters = list(params)
        named = _names(parameters, model)
        super().__init__(parameters, **adamw)
        held = Channel.load(channel)
        frozen = {s.matrix.tensor for s in held.subspaces.values() if s.k == 0}
        for name, parameter in named:
            if name in frozen:
                parameter.requires_grad_(False)
        self.constraint = Constraint(named, held, mode)
        self.constraint.hold(self)


def _names(parameters: list[Tensor], model: str) -> list[tuple[str, Tensor]]:
    from transformers import AutoConfig, AutoModelForCausalLM

    from opdgeo.training import models

    config = AutoConfig.from_pretrained(models.resolve(model), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        expected = list(AutoModelForCausalLM.from_config(config, trust_remote_code=False).named_parameters())
    shapes = [tuple(p.shape) for p in parameters]
    if shapes != [tuple(p.shape) for _, p in expected]:
        raise ConfigError(
            f"the optimizer got {len(shapes)} parameters, the first of shape {shapes[0] if shapes else None}, and {model} has "
            f"{len(expected)}, the first of shape {tuple(expected[0][1].shape)}; expected the same in the same order. FSDP1 flattens "
            "parameters: use FSDP2."
        )
    return [(name, p) for (name, _), p in zip(expected, parameters, strict=True)]

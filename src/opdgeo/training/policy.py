"""OPD, RLVR, their mixtures, token sparsification and teacher rollouts: one subclass of TRL's `GRPOTrainer`.

Objective, per step, on completions y of prompts x (see `signal.py` for the advantage A):

    L = − mean over completions of (1/|y|) Σ_t min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)

with ρ_t the ratio of the current to the sampling policy. There is one update per rollout, so ρ_t = 1 in value and the
clip never binds: the gradient is A_t ∇ log p(y_t). KL direction: reverse, KL(student ‖ teacher), by the score function
on the sampled token; nothing is back-propagated through A. No KL to the origin, no entropy bonus, no dropout.
Three other credits stand beside it as controls (`TrainConfig.credit`): the exact KL(student ‖ teacher) or KL(teacher ‖ student)
over the vocabulary at every token the student wrote, averaged in the same way and back-propagated through the student; and
1 on the tokens of right completions (SFT on the student's own samples, drawn anew every step).
Temperature 1 without top-k or top-p, so that the sampling distribution is the one that is scored.

Departures from the paper:
* Groups without reward variance get A = 0 but stay in the mean; the paper drops them (and refills the batch).
* Adam's ε is 1e-8 in every arm; the paper gives 1e-15 for RLVR and nothing for the others.
* The number of prompts × completions a step is the preset's; the paper samples 300 × 8 and updates with batches of 64.
* A completion cut at `max_tokens` is trained on as it is.
* With teacher rollouts the ratio is taken to the student itself (1 in value), as no importance weight is applied: the
  same signal on other tokens. ε is 1.0, as in the paper.

Departures from TRL: advantages have shape (B, T) instead of (B,); the student's log-probabilities are computed once
more before the update to form them; no model card is written; trainer states are written whole or not at all.
"""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.trainer.utils import add_fused_lm_head

from opdgeo.tasks import Task
from opdgeo.training import evaluation, signal
from opdgeo.training.callbacks import Resumable
from opdgeo.training.config import TrainConfig


class PolicyTrainer(Resumable, GRPOTrainer):
    """`GRPOTrainer` with a credit for every token.

    Args:
        config: says who writes the tokens and what credit each gets.
        teacher: needed when config.alpha > 0 or config.rollouts is "teacher"; frozen, fp32, on the CPU.
        train_dataset: columns `prompt` and `answer`.
    """

    def __init__(
        self, *, config: TrainConfig, task: Task, model: PreTrainedModel, teacher: PreTrainedModel | None,
        tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, train_dataset: Dataset, callbacks: list[Any],
    ) -> None:  # fmt: skip
        def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
            return [task.verify(text, right) for text, right in zip(completions, answer, strict=True)]

        super().__init__(
            model=model, reward_funcs=[reward], args=args, train_dataset=train_dataset, processing_class=tokenizer,
            callbacks=callbacks, rollout_func=teacher_rollouts if config.rollouts == "teacher" else None,
        )  # fmt: skip
        self.config = config
        self.task = task
        self.teacher = teacher
        if self.teacher is not None:
            # Prepared as GRPOTrainer prepares its reference model: the fused head first, with the same temperature.
            add_fused_lm_head(self.teacher, temperature=self.temperature, outputs=("log_probs",))
            self.teacher.requires_grad_(False)
            if self.is_deepspeed_enabled:
                self.teacher = prepare_deepspeed(self.teacher, self.accelerator)
            elif self.is_fsdp_enabled:
                self.teacher = prepare_fsdp(self.teacher, self.accelerator)
            else:
                self.teacher = self.accelerator.prepare_model(self.teacher, evaluation_mode=True)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts and group-relative advantages, with `advantages` (B,) replaced by (B, T)."""
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        mask_BT = output["completion_mask"]
        if "tool_mask" in output:
            mask_BT = mask_BT * output["tool_mask"]
        adv_opd_BT = None
        if self.config.alpha > 0:
            student_BT, teacher_BT = self._log_probs(output)
            gap_BT = student_BT - teacher_BT
            noise_BT = torch.rand_like(gap_BT) if self.config.token_choice == "random" else None
            keep_BT = signal.keep_tokens(gap_BT, mask_BT, self.config.token_share, self.config.token_choice, noise_BT)
            adv_opd_BT = signal.distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT)
            sums = torch.stack([torch.where(mask_BT.bool(), gap_BT, 0.0).sum(), mask_BT.sum().to(gap_BT.dtype)])
            total, count = self.accelerator.reduce(sums, reduction="sum")
            self._metrics["train" if self.model.training else "eval"]["kl_teacher"].append((total / count).item())
        # The mask of padding is never edited to drop tokens: it is the attention mask too.
        adv_G = output["advantages"]
        if self.config.credit == "correct":
            texts = self.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
            right = [self.task.verify(text, row["answer"]) for text, row in zip(texts, inputs, strict=True)]
            reward_G = torch.tensor(right, device=adv_G.device, dtype=adv_G.dtype)
            adv_G = signal.correct_advantages(reward_G, self.accelerator.reduce(reward_G.mean(), reduction="mean"))
        output["advantages"] = signal.token_advantages(adv_opd_BT, adv_G, mask_BT, self.config.alpha)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; for credit over the whole vocabulary the mean divergence instead, normalised in the same way."""
        if self.config.credit not in ("reverse_kl", "forward_kl"):
            loss: Tensor = super()._compute_loss(model, inputs)
            return loss
        mask_BT = inputs["completion_mask"]
        tokens = mask_BT.shape[1]
        sequences = {
            "input_ids": torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            "attention_mask": torch.cat([inputs["prompt_mask"], mask_BT], dim=1),
            "use_cache": False,
        }
        with self.accelerator.autocast():
            student_BTV = model(**sequences).logits[:, -tokens - 1 : -1]
            with torch.no_grad():
                teacher_BTV = self.teacher(**sequences).logits[:, -tokens - 1 : -1]  # type: ignore[misc]
        kl_BT = signal.divergence(student_BTV, teacher_BTV, self.config.credit)
        mean = ((kl_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)).mean()
        return mean / self.current_gradient_accumulation_steps

    @torch.no_grad()
    def _log_probs(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """log p of the completion tokens (B, T) under the student and the teacher."""
        ids_BL = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_BL = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        tokens = output["completion_ids"].shape[1]
        batch = self.args.per_device_train_batch_size
        student_BT = output.get("old_per_token_logps")  # there when TRL needed it for the ratio
        if student_BT is None:
            student_BT, _, _ = self._get_per_token_logps_and_entropies(
                self.model, ids_BL, attention_BL, tokens, batch_size=batch
            )
        teacher_BT, _, _ = self._get_per_token_logps_and_entropies(
            self.teacher, ids_BL, attention_BL, tokens, batch_size=batch
        )
        return student_BT, teacher_BT


def teacher_rollouts(prompts: list[str], trainer: PolicyTrainer) -> dict[str, Any]:
    """TRL's `rollout_func`: one completion a row of `prompts`, sampled from the teacher at temperature 1."""
    tokenizer = trainer.processing_class
    teacher = trainer.accelerator.unwrap_model(trainer.teacher)
    prompt_ids: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    completion_ids: list[list[int]] = []
    batch = trainer.args.per_device_train_batch_size
    for start in range(0, len(prompts), batch):
        done = evaluation.complete(
            teacher, tokenizer, prompts[start : start + batch], trainer.config.max_tokens, sample=True
        )
        ids_BT = done.ids_BL[:, done.start :]
        completion_ids += [ids[keep.bool()].tolist() for ids, keep in zip(ids_BT, done.mask_BT, strict=True)]
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

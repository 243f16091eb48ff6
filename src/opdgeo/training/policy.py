"""OPD, RLVR, their mixtures, token sparsification and teacher rollouts: one subclass of TRL's `GRPOTrainer`.

Objective, per step, on completions y of prompts x (see `advantages.py` for the advantage A):

    L = − mean over completions of (1/|y|) Σ_t min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)

with ρ_t the ratio of the current to the sampling policy. With one update per rollout ρ_t = 1 in value and the clip never
binds: the gradient is A_t ∇ log p(y_t). KL direction: reverse, KL(student ‖ teacher), by the score function
on the sampled token; nothing is back-propagated through A. No KL to the origin, no entropy bonus, no dropout.
Three other credits stand beside it as controls (`TrainConfig.credit`): the exact KL(student ‖ teacher) or KL(teacher ‖ student)
over the vocabulary at every token the student wrote, averaged in the same way and back-propagated through the student; and
1 on the tokens of right completions (SFT on the student's own samples, drawn anew every step).
Temperature 1 without top-k or top-p, so that the sampling distribution is the one that is scored.

Departures from the paper:
* Groups without reward variance get A = 0 but stay in the mean, unless `dynamic_sampling`: then, as in the paper, they are
  dropped and replaced by other prompts, for at most `ROUNDS` rounds; should some remain, the mean is over the others.
* Adam's ε is 1e-8 in every arm; the paper gives 1e-15 for RLVR and nothing for the others.
* With `rollout_prompts` several updates follow one rollout, as many as whole batches fit; otherwise every update has its own.
* A completion cut at `max_tokens` is trained on as it is.
* With teacher rollouts the ratio is taken to the student itself (1 in value), as no importance weight is applied: the
  same credit on other tokens. ε is 1.0, as in the paper.

Departures from TRL: advantages have shape (B, T) instead of (B,); the student's log-probabilities are computed before the
update to form them, and once more in the loss unless the batch is used whole and once; no model card is written; trainer
states are written whole or not at all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from opdgeo.tasks import Task
from opdgeo.training import advantages, distributed, evaluation, rollouts
from opdgeo.training.callbacks import Resumable
from opdgeo.training.config import TrainConfig
from opdgeo.training.rollouts import Recorded
from opdgeo.training.served import ServedTeacher

ROUNDS = 10  # of sampling for one batch without flat groups
# The student's log-probabilities (B, T), entropies and auxiliary loss of a batch, from its scoring for its loss.
SCORED = ("scored_logps", "scored_entropies", "scored_aux_loss")
NOTHING = (None, None, None)


class PolicyTrainer(Resumable, GRPOTrainer):
    """`GRPOTrainer` with a credit for every token.

    Args:
        config: says who writes the tokens and what credit each gets.
        teacher: needed when config.alpha > 0 or config.rollouts is "teacher"; a model on the CPU, frozen here, or a served one.
        train_dataset: columns `prompt` and `answer`.
        reserve: rows of the same kind that replace groups without reward variance.
        record: file to which every completion is appended.
    """

    def __init__(
        self, *, config: TrainConfig, task: Task, model: PreTrainedModel, teacher: PreTrainedModel | ServedTeacher | None,
        tokenizer: PreTrainedTokenizerBase, args: GRPOConfig, train_dataset: Dataset, callbacks: list[Any],
        reserve: list[dict[str, str]], record: Path | None = None,
    ) -> None:  # fmt: skip
        def reward(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
            if not task.verifiable:
                return [None] * len(completions)  # TRL's word for no reward
            return [task.verify(text, right) for text, right in zip(completions, answer, strict=True)]

        prepared = config.replays is not None or config.dynamic_sampling
        source = (lambda prompts, trainer: trainer.prepared) if prepared else teacher_rollouts
        super().__init__(
            model=model, reward_funcs=[reward], args=args, train_dataset=train_dataset, processing_class=tokenizer,
            callbacks=callbacks, rollout_func=source if prepared or config.rollouts == "teacher" else None,
        )  # fmt: skip
        self.config, self.reward, self.record, self.reserve = config, reward, record, reserve
        self.scored: tuple[Any, ...] = NOTHING
        self.prepared: dict[str, Any] = {}  # completions written before TRL asks for them
        self.recorded: Recorded | None = None
        if config.replays is not None:
            self.recorded = Recorded(config.replays, config.generations, model.config.vocab_size)
        self.teacher: Any = teacher
        if isinstance(teacher, PreTrainedModel):
            # Prepared as GRPOTrainer prepares its reference model: the fused head first, with the same temperature.
            add_fused_lm_head(self.teacher, temperature=self.temperature, outputs=("log_probs",))
            self.teacher = distributed.prepare_teacher(self, self.teacher)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts and group-relative advantages, with `advantages` (B,) replaced by (B, T)."""
        scale = 1.0
        if self.recorded is not None:
            count = len(inputs) * self.accelerator.num_processes
            rows = self.recorded.step(self.state.global_step + 1, count)
            scale = self._scale(rows) if self.config.dynamic_sampling else 1.0
            inputs = self._prepare(rows)
        elif self.config.dynamic_sampling:
            rows, scale = self._informative(inputs)
            inputs = self._prepare(rows)
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        if self.record is not None:
            self._record(self.record, inputs, output)
        mask_BT = output["completion_mask"]
        if "tool_mask" in output:
            mask_BT = mask_BT * output["tool_mask"]
        adv_opd_BT = None
        if self.config.alpha > 0:
            student_BT, teacher_BT = self._score(output)
            gap_BT = student_BT - teacher_BT
            noise_BT = self._noise(gap_BT) if self.config.token_choice == "random" else None
            keep_BT = advantages.keep_tokens(
                gap_BT, mask_BT, self.config.token_share, self.config.token_choice, noise_BT
            )
            adv_opd_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT)
            sums = torch.stack([torch.where(mask_BT.bool(), gap_BT, 0.0).sum(), mask_BT.sum().to(gap_BT.dtype)])
            total, count = self.accelerator.reduce(sums, reduction="sum")
            self._metrics["train" if self.model.training else "eval"]["kl_teacher"].append((total / count).item())
        # The mask of padding is never edited to drop tokens: it is the attention mask too.
        adv_G = output["advantages"] * scale
        if self.config.credit == "correct":
            texts = self.processing_class.batch_decode(output["completion_ids"], skip_special_tokens=True)
            reward_G = adv_G.new_tensor(self.reward(texts, [row["answer"] for row in inputs]))
            adv_G = advantages.correct_advantages(reward_G, self.accelerator.reduce(reward_G.mean(), reduction="mean"))
        output["advantages"] = advantages.token_advantages(adv_opd_BT, adv_G, mask_BT, self.config.alpha)
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """TRL's loss; for credit over the whole vocabulary the mean divergence instead, normalised in the same way."""
        if self.config.credit not in ("reverse_kl", "forward_kl"):
            self.scored = tuple(inputs.pop(name, None) for name in SCORED)
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
                teacher_BTV = self.teacher(**sequences).logits[:, -tokens - 1 : -1]
        kl_BT = advantages.divergence(student_BTV, teacher_BTV, self.config.credit)
        mean = ((kl_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)).mean()
        return mean / self.current_gradient_accumulation_steps

    def _prepare(self, rows: list[dict[str, Any]]) -> list[dict[str, str]]:
        """Hand this process's share of the global batch `rows` to TRL as finished completions; returns its inputs."""
        share = len(rows) // self.accelerator.num_processes
        mine = rows[self.accelerator.process_index * share :][:share]
        names = ("prompt_ids", "completion_ids")
        self.prepared = {name: [row[name] for row in mine] for name in names} | {"logprobs": None}
        return [{"prompt": row["prompt"], "answer": row["answer"]} for row in mine]

    def _record(self, path: Path, inputs: list[dict[str, str]], output: dict[str, Any]) -> None:
        """Append the global batch to `path`, in the order of the processes."""
        ids = {
            f"{part}_ids": [
                row[mask.bool()].tolist()
                for row, mask in zip(output[f"{part}_ids"], output[f"{part}_mask"], strict=True)
            ]
            for part in ("prompt", "completion")
        }
        rows = [
            {"step": self.state.global_step + 1, "prompt": row["prompt"], "answer": row["answer"]}
            | {name: values[i] for name, values in ids.items()}
            for i, row in enumerate(inputs)
        ]
        rows = gather_object(rows)
        if self.accelerator.is_main_process:
            rollouts.append(path, rows)

    def _informative(self, inputs: list[dict[str, str]]) -> tuple[list[dict[str, Any]], float]:
        """A global batch of groups with reward variance, completions included, and the factor that its advantages take.

        Groups in which every completion has the same reward are dropped; prompts from the reserve, drawn afresh for the
        step, take their place. What is flat after `ROUNDS` rounds fills the batch without counting in its mean.
        """
        size, world = self.config.generations, self.accelerator.num_processes
        wanted = len(inputs) * world // size
        spare = list(self.reserve)
        random.Random(f"{self.args.seed}-{self.state.global_step}").shuffle(spare)
        kept: list[list[dict[str, Any]]] = []
        flat: list[list[dict[str, Any]]] = []
        for _ in range(ROUNDS):
            rows = gather_object(self._written(inputs))
            for group in (rows[i : i + size] for i in range(0, len(rows), size)):
                (kept if len({row["reward"] for row in group}) > 1 else flat).append(group)
            each = -(-(wanted - len(kept)) // world)  # groups that every process writes next
            if each <= 0 or len(spare) < each * world:
                break
            drawn, spare = spare[: each * world], spare[each * world :]
            mine = drawn[self.accelerator.process_index * each :][:each]
            inputs = [row for row in mine for _ in range(size)]
        kept = kept[:wanted]
        self._metrics["train"]["dropped_groups"].append(float(len(flat)))
        batch = kept + flat[: wanted - len(kept)]
        return [row for group in batch for row in group], wanted / max(1, len(kept))

    def _scale(self, rows: list[dict[str, Any]]) -> float:
        """What `_informative` gave the recorded batch `rows`: its groups over those with reward variance."""
        texts = self.processing_class.batch_decode([row["completion_ids"] for row in rows], skip_special_tokens=True)
        rewards, size = self.reward(texts, [row["answer"] for row in rows]), self.config.generations
        groups = [set(rewards[i : i + size]) for i in range(0, len(rewards), size)]
        return len(groups) / max(1, sum(len(group) > 1 for group in groups))

    def _written(self, inputs: list[dict[str, str]]) -> list[dict[str, Any]]:
        """A completion, with its reward, for every row."""
        prompts = [row["prompt"] for row in inputs]
        if self.config.rollouts == "teacher":
            done = teacher_rollouts(prompts, self)
            prompt_ids, completion_ids = done["prompt_ids"], done["completion_ids"]
        else:
            prompt_ids, images, fields = self._tokenize_prompts(prompts)
            completion_ids, _ = self._generate_single_turn(prompt_ids, images, fields, self.num_generations)
        texts = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = self.reward(texts, [row["answer"] for row in inputs])
        return [
            {**row, "prompt_ids": start, "completion_ids": end, "reward": reward}
            for row, start, end, reward in zip(inputs, prompt_ids, completion_ids, rewards, strict=True)
        ]

    def _noise(self, like_BT: Tensor) -> Tensor:
        """Uniform numbers for the random choice of tokens, the same for a completion whichever process holds it."""
        rows, width = like_BT.shape
        random_state = torch.Generator().manual_seed(self.args.seed * 1_000_003 + self.state.global_step)
        first = self.accelerator.process_index * rows
        noise = torch.rand(rows * self.accelerator.num_processes, self.config.max_tokens, generator=random_state)
        return noise[first : first + rows, :width].to(like_BT)

    @torch.no_grad()
    def _score(self, output: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """log p of the completion tokens (B, T) under the student and the teacher.

        Where the batch is used once and whole, by one process, the student's come with their graph in `output`, for the loss.
        """
        ids_BL = torch.cat([output["prompt_ids"], output["completion_ids"]], dim=1)
        attention_BL = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
        tokens = output["completion_ids"].shape[1]
        batch = self.args.per_device_train_batch_size
        if isinstance(self.teacher, ServedTeacher):
            teacher_BT = self.teacher.logprobs(ids_BL, attention_BL, tokens)
        else:
            teacher_BT, _, _ = self._get_per_token_logps_and_entropies(
                self.teacher, ids_BL, attention_BL, tokens, batch_size=batch
            )
        student_BT = output.get("old_per_token_logps")  # there when TRL needed it for the ratio
        if student_BT is None:
            sharded = self.accelerator.num_processes > 1 or self.is_fsdp_enabled or self.is_deepspeed_enabled
            once = self.config.credit == "sampled" and self.args.steps_per_generation == 1 and not sharded
            with torch.set_grad_enabled(once):
                found = self._get_per_token_logps_and_entropies(
                    self.model, ids_BL, attention_BL, tokens, batch_size=batch, compute_entropy=once,
                    compute_aux_loss=once and self.aux_loss_enabled,
                )  # fmt: skip
            if once:
                output |= dict(zip(SCORED, found, strict=True))
            student_BT = found[0].detach()
        return student_BT, teacher_BT

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """TRL's, unless the loss asks for what scoring has computed."""
        scored, self.scored = self.scored, NOTHING
        if scored[0] is not None:
            return scored
        return super()._get_per_token_logps_and_entropies(model, *arguments, **named)


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

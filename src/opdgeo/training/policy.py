"""OPD, RLVR, their mixtures, token sparsification and teacher rollouts: what TRL's `GRPOTrainer` is told of the completions.

Objective, per step, on completions y of prompts x (see `advantages.py` for the advantage A):

    L = − mean over completions of (1/|y|) Σ_t min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t)

ρ_t is the ratio of the current policy to the one that sampled. With one update per rollout ρ_t = 1 in value and the clip
never binds, so the gradient is A_t ∇ log p(y_t). The KL is the reverse one, KL(student ‖ teacher), estimated by the score
function on the sampled token. Nothing is back-propagated through A. There is no KL to the origin, no entropy bonus and no
dropout. The temperature is 1, without top-k or top-p: tokens are scored under the distribution that they were drawn from.

Other credits are controls (`TrainConfig.credit`). Two are the exact KL(student ‖ teacher) and KL(teacher ‖ student) over
the vocabulary, at every token that the student wrote; they are averaged in the same way and back-propagated through the
student. The third is 1 on the tokens of right completions: SFT on the student's own samples, drawn anew every step.

Two more are noise. One puts a fair coin in the verifier's place; the log's reward stays the verifier's. The other gives the
teacher's gap a random sign on every token. Both are drawn for each completion and step from the run's seed alone. So the noise
does not follow the text, and a resumed run draws it again.

Departures from the paper:
* Groups without reward variance get A = 0 and stay in the mean. With `dynamic_sampling` they are dropped and replaced by other
  prompts, as in the paper, for at most `ROUNDS` rounds. If some remain, the mean is over the others.
* Adam's ε is 1e-8 in every arm; the paper gives 1e-15 for RLVR and nothing for the others.
* With `rollout_prompts` one rollout serves several updates, as many as it fills whole batches. Else every update has its own.
* A completion cut at `max_tokens` is trained on as it is.
* With teacher rollouts no importance weight is applied: the ratio is taken to the student itself and is 1 in value. Other
  tokens get the same credit. ε is 1.0, as in the paper.

Departures from TRL: advantages have shape (B, T) instead of (B,). They need the student's log-probabilities, which are computed
before the update; the loss uses the same pass where a batch is used whole and once, and else computes them again. No model
card is written. Trainer states are written whole or not at all.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel

from opdgeo.tasks import Task
from opdgeo.training import advantages, evaluation, rollouts
from opdgeo.training.config import TrainConfig
from opdgeo.training.rollouts import Recorded
from opdgeo.training.served import ServedTeacher
from opdgeo.training.trl_hooks import PolicyHooks, sequences

ROUNDS = 10  # of sampling for one batch without flat groups
NOISE = 2**31  # keeps the draws of the noise controls apart from every other use of a seed
Rows = list[dict[str, Any]]


class TokenCredit:
    """Who writes the completions of a run, and what credit their tokens get (`trl_hooks.Credit`).

    Args:
        config: says both.
        task: verifies the completions.
        teacher: a frozen model or a served one; needed when config.alpha > 0 or config.rollouts is "teacher".
        reserve: rows with `prompt` and `answer` that replace groups without reward variance.
        vocabulary: the student's number of tokens.
        record: file to which every completion is appended.
    """

    def __init__(
        self,
        config: TrainConfig,
        task: Task,
        *,
        teacher: PreTrainedModel | ServedTeacher | None,
        reserve: list[dict[str, str]],
        vocabulary: int,
        record: Path | None = None,
    ) -> None:
        self.config, self.task, self.reserve, self.record = config, task, reserve, record
        self.teacher: Any = teacher
        self.recorded: Recorded | None = None
        if config.replays is not None:
            self.recorded = Recorded(config.replays, config.generations, vocabulary)
        self.completes = config.replays is not None or config.dynamic_sampling or config.rollouts == "teacher"
        self.finished: dict[str, Any] = {}  # completions written before TRL asks for them
        self.scale = 1.0  # of the advantages: the groups of a batch over those with reward variance

    def reward(self, completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
        """The verifier's verdict on each completion; None, TRL's word for no reward, where the task has no verifier."""
        if not self.task.verifiable:
            return [None] * len(completions)
        return [self.task.verify(text, right) for text, right in zip(completions, answer, strict=True)]

    def prepare(self, trainer: PolicyHooks, rows: Rows) -> Rows:
        """The rows that this process trains on: recorded ones, prompts whose rewards vary, or `rows` as they are."""
        if self.recorded is not None:
            count = len(rows) * trainer.accelerator.num_processes
            whole = self.recorded.step(trainer.state.global_step + 1, count)
            self.scale = self._scale(trainer, whole) if self.config.dynamic_sampling else 1.0
            return self._share(trainer, whole)
        if self.config.dynamic_sampling:
            whole, self.scale = self._informative(trainer, rows)
            return self._share(trainer, whole)
        return rows

    def complete(self, prompts: list[str], trainer: PolicyHooks) -> dict[str, Any]:
        """The completions that `prepare` wrote or read, or the teacher's."""
        return self.finished or self._by_teacher(prompts, trainer)

    def advantages(self, trainer: PolicyHooks, rows: Rows, batch: dict[str, Any]) -> Tensor:
        """The credit (B, T) of every token of `batch`; records its completions too."""
        if self.record is not None:
            _record(self.record, trainer, rows, batch)
        mask_BT = batch["completion_mask"]
        if "tool_mask" in batch:
            mask_BT = mask_BT * batch["tool_mask"]
        adv_opd_BT = None
        if self.config.alpha > 0:
            teacher_BT = self._teacher_log_probs(trainer, batch)
            student_BT = trainer.student_log_probs(batch, for_loss=self.config.credit in ("sampled", "random_sign"))
            gap_BT = student_BT - teacher_BT
            noise_BT = self._noise(trainer, gap_BT) if self.config.token_choice == "random" else None
            keep_BT = advantages.keep_tokens(
                gap_BT, mask_BT, self.config.token_share, self.config.token_choice, noise_BT
            )
            adv_opd_BT = advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT)
            if self.config.credit == "random_sign":
                adv_opd_BT = advantages.random_signs(adv_opd_BT, self._noise(trainer, gap_BT, NOISE))
            sums = torch.stack([torch.where(mask_BT.bool(), gap_BT, 0.0).sum(), mask_BT.sum().to(gap_BT.dtype)])
            total, count = trainer.accelerator.reduce(sums, reduction="sum")
            trainer.add_to_log("kl_teacher", (total / count).item())
        # The mask of padding is never edited to drop tokens: it is the attention mask too.
        adv_G = batch["advantages"] * self.scale
        if self.config.credit == "correct":
            texts = trainer.processing_class.batch_decode(batch["completion_ids"], skip_special_tokens=True)
            reward_G = adv_G.new_tensor(self.reward(texts, [row["answer"] for row in rows]))
            mean = trainer.accelerator.reduce(reward_G.mean(), reduction="mean")
            adv_G = advantages.correct_advantages(reward_G, mean)
        if self.config.credit == "coin":
            first = trainer.accelerator.process_index * len(adv_G)
            coin_G = advantages.coin_rewards(
                _uniform(trainer, len(adv_G), 1, NOISE)[:, 0]
            )  # a group may lie on two processes
            adv_G = advantages.group_advantages(coin_G, self.config.generations)[first : first + len(adv_G)].to(adv_G)
        return advantages.token_advantages(adv_opd_BT, adv_G, mask_BT, self.config.alpha)

    def loss(self, trainer: PolicyHooks, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """For credit over the whole vocabulary the mean divergence, normalised as TRL normalises its loss; else None."""
        if self.config.credit not in ("reverse_kl", "forward_kl"):
            return None
        mask_BT = batch["completion_mask"]
        tokens = mask_BT.shape[1]
        ids_BL, attention_BL = sequences(batch)
        inputs = {"input_ids": ids_BL, "attention_mask": attention_BL, "use_cache": False}
        with trainer.accelerator.autocast():
            student_BTV = model(**inputs).logits[:, -tokens - 1 : -1]
            with torch.no_grad():
                teacher_BTV = self.teacher(**inputs).logits[:, -tokens - 1 : -1]
        kl_BT = advantages.divergence(student_BTV, teacher_BTV, self.config.credit)
        return ((kl_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)).mean()

    def _teacher_log_probs(self, trainer: PolicyHooks, batch: dict[str, Any]) -> Tensor:
        if isinstance(self.teacher, ServedTeacher):
            return self.teacher.logprobs(*sequences(batch), batch["completion_ids"].shape[1])
        return trainer.teacher_log_probs(batch)

    def _share(self, trainer: PolicyHooks, rows: Rows) -> Rows:
        """This process's share of the global batch `rows`, whose completions `complete` hands to TRL."""
        share = len(rows) // trainer.accelerator.num_processes
        mine = rows[trainer.accelerator.process_index * share :][:share]
        names = ("prompt_ids", "completion_ids")
        self.finished = {name: [row[name] for row in mine] for name in names} | {"logprobs": None}
        return [{"prompt": row["prompt"], "answer": row["answer"]} for row in mine]

    def _informative(self, trainer: PolicyHooks, inputs: list[dict[str, str]]) -> tuple[Rows, float]:
        """A global batch of groups with reward variance, completions included, and the factor that its advantages take.

        Groups in which every completion has the same reward are dropped. Prompts from the reserve, drawn afresh for the
        step, take their place. What is flat after `ROUNDS` rounds fills the batch and does not count in its mean.
        """
        size, world = self.config.generations, trainer.accelerator.num_processes
        wanted = len(inputs) * world // size
        spare = list(self.reserve)
        random.Random(f"{trainer.args.seed}-{trainer.state.global_step}").shuffle(spare)
        kept: list[Rows] = []
        flat: list[Rows] = []
        for _ in range(ROUNDS):
            rows = gather_object(self._written(trainer, inputs))
            for group in (rows[i : i + size] for i in range(0, len(rows), size)):
                (kept if len({row["reward"] for row in group}) > 1 else flat).append(group)
            each = -(-(wanted - len(kept)) // world)  # groups that every process writes next
            if each <= 0 or len(spare) < each * world:
                break
            drawn, spare = spare[: each * world], spare[each * world :]
            mine = drawn[trainer.accelerator.process_index * each :][:each]
            inputs = [row for row in mine for _ in range(size)]
        kept = kept[:wanted]
        trainer.add_to_log("dropped_groups", float(len(flat)))
        batch = kept + flat[: wanted - len(kept)]
        return [row for group in batch for row in group], wanted / max(1, len(kept))

    def _scale(self, trainer: PolicyHooks, rows: Rows) -> float:
        """The factor that `_informative` gave the recorded batch `rows`."""
        texts = trainer.processing_class.batch_decode([row["completion_ids"] for row in rows], skip_special_tokens=True)
        rewards, size = self.reward(texts, [row["answer"] for row in rows]), self.config.generations
        groups = [set(rewards[i : i + size]) for i in range(0, len(rows), size)]
        return len(groups) / max(1, sum(len(group) > 1 for group in groups))

    def _written(self, trainer: PolicyHooks, inputs: list[dict[str, str]]) -> Rows:
        """A completion, with its reward, for every row."""
        prompts = [row["prompt"] for row in inputs]
        if self.config.rollouts == "teacher":
            done = self._by_teacher(prompts, trainer)
            prompt_ids, completion_ids = done["prompt_ids"], done["completion_ids"]
        else:
            prompt_ids, completion_ids = trainer.sample(prompts)
        texts = trainer.processing_class.batch_decode(completion_ids, skip_special_tokens=True)
        rewards = self.reward(texts, [row["answer"] for row in inputs])
        return [
            {**row, "prompt_ids": start, "completion_ids": end, "reward": reward}
            for row, start, end, reward in zip(inputs, prompt_ids, completion_ids, rewards, strict=True)
        ]

    def _by_teacher(self, prompts: list[str], trainer: PolicyHooks) -> dict[str, Any]:
        """One completion of every prompt, sampled from the teacher at temperature 1."""
        tokenizer = trainer.processing_class
        teacher = trainer.accelerator.unwrap_model(self.teacher)
        prompt_ids: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        completion_ids: list[list[int]] = []
        batch = trainer.args.per_device_train_batch_size
        for start in range(0, len(prompts), batch):
            part = prompts[start : start + batch]
            done = evaluation.complete(teacher, tokenizer, part, self.config.max_tokens, sample=True)
            ids_BT = done.ids_BL[:, done.start :]
            completion_ids += [ids[keep.bool()].tolist() for ids, keep in zip(ids_BT, done.mask_BT, strict=True)]
        return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}

    def _noise(self, trainer: PolicyHooks, like_BT: Tensor, stream: int = 0) -> Tensor:
        """Uniform numbers for this process's tokens, the same for a completion whichever process holds it."""
        rows, width = like_BT.shape
        first = trainer.accelerator.process_index * rows
        return _uniform(trainer, rows, self.config.max_tokens, stream)[first : first + rows, :width].to(like_BT)


def _uniform(trainer: PolicyHooks, rows: int, width: int, stream: int) -> Tensor:
    """Uniform numbers for the global batch of the step, `rows` of it on every process."""
    random_state = torch.Generator().manual_seed(trainer.args.seed * 1_000_003 + trainer.state.global_step + stream)
    return torch.rand(rows * trainer.accelerator.num_processes, width, generator=random_state)


def _record(path: Path, trainer: PolicyHooks, inputs: Rows, batch: dict[str, Any]) -> None:
    """Append the global batch to `path`, in the order of the processes."""
    ids = {
        f"{part}_ids": [
            row[mask.bool()].tolist() for row, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)
        ]
        for part in ("prompt", "completion")
    }
    rows = [
        {"step": trainer.state.global_step + 1, "prompt": row["prompt"], "answer": row["answer"]}
        | {name: values[i] for name, values in ids.items()}
        for i, row in enumerate(inputs)
    ]
    rows = gather_object(rows)
    if trainer.accelerator.is_main_process:
        rollouts.append(path, rows)

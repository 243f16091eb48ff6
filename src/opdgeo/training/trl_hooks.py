"""Everything that opdgeo changes in TRL, transformers and accelerate, or reads of their internals. Nothing else is here.

The other files of `training` hold opdgeo's own logic and use the public interface of these libraries. A new version of TRL or
transformers is therefore read against this file: `CHECKED` names the versions, `SIGNATURES` what the methods took. TRL is
imported where a trainer of its is made and no earlier, because that import takes vLLM along where vLLM is installed.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler

from opdgeo.errors import ConfigError
from opdgeo.training import distributed
from opdgeo.training.config import TrainConfig

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CHECKED = {"trl": "1.16.0", "transformers": "5.24.0", "accelerate": "1.15.0"}
"""The versions whose source this file was read against."""

SIGNATURES: dict[str, tuple[str, ...]] = {
    "trl.GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "trl.GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    "trl.GRPOTrainer._get_per_token_logps_and_entropies": (
        *("self", "model", "input_ids", "attention_mask", "logits_to_keep"),
        *("batch_size", "compute_entropy", "compute_aux_loss"),
    ),
    "trl.GRPOTrainer._tokenize_prompts": ("self", "prompts"),
    "trl.GRPOTrainer._generate_single_turn": ("self", "prompt_ids", "images", "multimodal_fields", "num_generations"),
    "trl.GRPOTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.SFTTrainer._save_checkpoint": ("self", "model", "trial"),
    "trl.trainer.utils.add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "trl.models.prepare_deepspeed": ("model", "accelerator"),
    "transformers.Trainer.training_step": ("self", "model", "inputs", "num_items_in_batch"),
    "transformers.Trainer.log": ("self", "logs", "start_time"),
    "transformers.trainer_callback.CallbackHandler.add_callback": ("self", "callback"),
    "accelerate.utils.fsdp_utils.fsdp2_prepare_model": ("accelerator", "model"),
}
"""The first parameters of every function that is overridden, wrapped or called here and is not documented; a test compares them."""


# Callbacks ------------------------------------------------------------------------------------------------------


class FirstCallback(TrainerCallback):
    """A callback that its trainer calls before all others, however it was registered.

    What it adds to a row of the log then reaches every reporter, W&B and TensorBoard included. A trainer calls its
    callbacks in the order of a list, and reporters come before what a user adds.
    """


_add_last = CallbackHandler.add_callback


def _add_callback(handler: CallbackHandler, callback: Any) -> None:
    """`CallbackHandler.add_callback`, which puts a `FirstCallback` at the head of the list."""
    _add_last(handler, callback)
    if isinstance(handler.callbacks[-1], FirstCallback):
        handler.callbacks.insert(0, handler.callbacks.pop())


CallbackHandler.add_callback = _add_callback


# Any trainer of transformers ------------------------------------------------------------------------------------


def before_clipping(trainer: Any, action: Callable[[], None]) -> None:
    """Call `action` whenever the gradients of a step are complete, before the trainer clips them.

    No callback serves: the trainer calls them after clipping.
    """
    step = trainer.training_step

    def training_step(*arguments: Any, **named: Any) -> Any:
        loss = step(*arguments, **named)
        if trainer.accelerator.sync_gradients:
            action()
        return loss

    trainer.training_step = training_step


def before_logging(trainer: Any, add: Callable[[dict[str, float]], None]) -> None:
    """Let `add` put numbers into every row before the trainer logs it."""
    log = trainer.log

    def logged(logs: dict[str, float], *arguments: Any, **named: Any) -> None:
        add(logs)
        log(logs, *arguments, **named)

    trainer.log = logged


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer of torch inside accelerate's, or `optimizer` itself."""
    return getattr(optimizer, "optimizer", optimizer)


def states(folder: Path) -> list[Path]:
    """Complete trainer states in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-*"), key=state_step)


def state_step(state: Path) -> int:
    """The step after which a trainer state was saved, from its folder's name."""
    return int(state.name.removeprefix("checkpoint-"))


class WholeStates:
    """Mixed into a trainer. Its states appear under their name when they are complete, and only the newest one is kept."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        args: Any = self.args  # type: ignore[attr-defined]
        final = Path(args.output_dir)
        partial = final / ".partial"
        if args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
        args.output_dir = str(partial)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        finally:
            args.output_dir = str(final)
        self.accelerator.wait_for_everyone()  # type: ignore[attr-defined]
        if args.should_save:
            older = states(final)
            for written in partial.glob("checkpoint-*"):
                written.rename(final / written.name)
            for state in older:
                shutil.rmtree(state)
            shutil.rmtree(partial, ignore_errors=True)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """No README in the state folder."""


# One process or many --------------------------------------------------------------------------------------------


def shard_without_gpu() -> None:
    """Let FSDP2 run on CPUs (gloo). Accelerate offers it to GPUs only; torch itself has no such limit.

    Call it after the training arguments are made, which start the process group, and before the trainer, which reads its kind.
    """
    from accelerate.state import DistributedType, PartialState

    wanted = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if wanted and not torch.cuda.is_available() and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate makes FSDP of it


def is_sharded(trainer: Any) -> bool:
    """True where FSDP or DeepSpeed spreads the model over the processes."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def whole_weights(trainer: Any) -> dict[str, Any] | None:
    """The trained weights, gathered on the CPU of the first process. Every process must call it.

    None where the model in memory is whole already.
    """
    if not is_sharded(trainer):
        return None
    gathered: dict[str, Any] = (
        trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
    )  # DeepSpeed's others: None
    tied = trainer.accelerator.unwrap_model(trainer.model).all_tied_weights_keys  # name -> the tensor that it repeats
    return {name: value for name, value in gathered.items() if name not in tied}


def mark_student(trainer: Any) -> None:
    """Mark a model that FSDP2 will shard, so that `generate` keeps calling it until every process has finished."""
    if trainer.is_fsdp_enabled:
        trainer.model._is_fsdp_managed_module = True


def keep_output_types(trainer: Any) -> None:
    """Let FSDP2 hand on what a model returns as it is. Under bf16 autocast accelerate has it rounded to bf16, and with it the
    log-probabilities, which are sums in fp32: their differences, OPD's credit, would be lost. Call it before a model is sharded."""
    plugin: Any = getattr(trainer.accelerator.state, "fsdp_plugin", None) if trainer.is_fsdp_enabled else None
    policy: Any = getattr(plugin, "mixed_precision_policy", None)
    if getattr(policy, "output_dtype", None) is not None:
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def place_frozen(trainer: Any, model: PreTrainedModel) -> Any:
    """Freeze `model` and place it as the trainer places its own: on the device, and sharded by layers where that one is.

    Raises:
        ConfigError: FSDP of version 1.
    """
    model.requires_grad_(False)
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    if trainer.is_fsdp_enabled:
        from accelerate.utils.fsdp_utils import fsdp2_prepare_model

        if not accelerator.is_fsdp2:
            raise ConfigError(
                "FSDP version 1 was asked for; expected version 2. Set `fsdp_version: 2` (see docs/engines.md)."
            )
        model._is_fsdp_managed_module = True
        return fsdp2_prepare_model(accelerator, model).eval()
    return accelerator.prepare_model(model, evaluation_mode=True)


# TRL's trainers -------------------------------------------------------------------------------------------------


class Credit(Protocol):
    """What a policy trainer asks of opdgeo (`policy.TokenCredit`). B completions, T tokens of the longest one."""

    teacher: Any
    """A model or a server; None where the teacher counts for nothing."""
    completes: bool
    """True where `complete` writes the completions, and TRL none."""

    def reward(self, completions: list[str], answer: list[str], **others: Any) -> list[float | None]:
        """TRL's reward function."""

    def prepare(self, trainer: PolicyHooks, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The rows that this process trains on, of `rows` or in their place; called before they are completed."""

    def complete(self, prompts: list[str], trainer: PolicyHooks) -> dict[str, Any]:
        """TRL's `rollout_func`."""

    def advantages(self, trainer: PolicyHooks, rows: list[dict[str, Any]], batch: dict[str, Any]) -> Tensor:
        """The credit (B, T) of every token of TRL's `batch`, whose own `advantages` are (B,)."""

    def loss(self, trainer: PolicyHooks, model: Any, batch: dict[str, Any]) -> Tensor | None:
        """The mean loss of a batch where it is not TRL's."""


# The student's log-probabilities (B, T), entropies and auxiliary loss of a batch, from its scoring for its loss.
SCORED = ("scored_logps", "scored_entropies", "scored_aux_loss")
NOTHING = (None, None, None)


class PolicyHooks:
    """Mixed into `GRPOTrainer`. It lets a `Credit` choose the completions, the advantages and the loss.

    Its public methods are what a `Credit` may ask of the trainer, beside the public attributes of transformers' `Trainer`.
    """

    accelerator: Any
    args: Any
    model: Any
    processing_class: Any
    state: Any
    credit: Credit
    scored: tuple[Any, ...] = NOTHING

    def add_to_log(self, name: str, value: float) -> None:
        """Add a number to the next row of the log, which has the mean of them."""
        self._metrics["train" if self.model.training else "eval"][name].append(value)  # type: ignore[attr-defined]

    def sample(self, prompts: list[str]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of the prompts and of one completion each, written by the student."""
        hooked: Any = self
        prompt_ids, images, fields = hooked._tokenize_prompts(prompts)
        completion_ids, _ = hooked._generate_single_turn(prompt_ids, images, fields, hooked.num_generations)
        return prompt_ids, completion_ids

    @torch.no_grad()
    def teacher_log_probs(self, batch: dict[str, Any]) -> Tensor:
        """log p (B, T) of the completion tokens under the teacher model."""
        found_BT: Tensor = self._log_probs(self.credit.teacher, batch)[0]
        return found_BT

    @torch.no_grad()
    def student_log_probs(self, batch: dict[str, Any], *, for_loss: bool) -> Tensor:
        """log p (B, T) of the completion tokens under the student, without a graph.

        With `for_loss`, the loss of this batch may use the same forward pass. It does where the batch is used once and
        whole, by one process.
        """
        known_BT: Tensor | None = batch.get("old_per_token_logps")  # there when TRL needed it for the ratio
        if known_BT is not None:
            return known_BT
        once = for_loss and self.args.steps_per_generation == 1
        once = once and self.accelerator.num_processes == 1 and not is_sharded(self)
        auxiliary = once and self.aux_loss_enabled  # type: ignore[attr-defined]
        with torch.set_grad_enabled(once):
            found = self._log_probs(self.model, batch, compute_entropy=once, compute_aux_loss=auxiliary)
        if once:
            batch |= dict(zip(SCORED, found, strict=True))
        found_BT: Tensor = found[0].detach()
        return found_BT

    def _log_probs(self, model: Any, batch: dict[str, Any], **more: bool) -> tuple[Any, ...]:
        ids_BL, attention_BL = sequences(batch)
        return self._get_per_token_logps_and_entropies(
            model,
            ids_BL,
            attention_BL,
            batch["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
            **more,
        )

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's rollouts, with `advantages` (B,) replaced by (B, T)."""
        rows = self.credit.prepare(self, inputs)
        batch: dict[str, Any] = super()._generate_and_score_completions(rows)  # type: ignore[misc]
        batch["advantages"] = self.credit.advantages(self, rows, batch)
        return batch

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """The credit's own loss, or TRL's."""
        mean = self.credit.loss(self, model, inputs)
        if mean is not None:
            return mean / self.current_gradient_accumulation_steps  # type: ignore[attr-defined]
        self.scored = tuple(inputs.pop(name, None) for name in SCORED)
        loss: Tensor = super()._compute_loss(model, inputs)  # type: ignore[misc]
        return loss

    def _get_per_token_logps_and_entropies(self, model: Any, *arguments: Any, **named: Any) -> Any:
        """TRL's, unless the loss asks for what scoring has computed."""
        scored, self.scored = self.scored, NOTHING
        if scored[0] is not None:
            return scored
        return super()._get_per_token_logps_and_entropies(model, *arguments, **named)  # type: ignore[misc]


def sequences(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (B, L) of a batch of TRL's: the prompts padded on the left, the completions on the right."""
    ids_BL = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    return ids_BL, torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)


def policy_trainer(
    credit: Credit,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    args: Any,
    data: Dataset,
    callbacks: list[TrainerCallback],
) -> Any:
    """A `GRPOTrainer` whose tokens get the credit that `credit` gives them.

    Args:
        args: a `GRPOConfig`.
        data: rows with `prompt` and `answer`.
    """
    from transformers import PreTrainedModel
    from trl import GRPOTrainer
    from trl.trainer.utils import add_fused_lm_head

    class PolicyTrainer(PolicyHooks, WholeStates, GRPOTrainer):
        """`GRPOTrainer` with a credit for every token."""

    trainer: Any = PolicyTrainer(
        model=model,
        reward_funcs=[credit.reward],
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=callbacks,
        rollout_func=credit.complete if credit.completes else None,
    )
    trainer.credit = credit
    keep_output_types(trainer)
    if isinstance(credit.teacher, PreTrainedModel):
        # Prepared as GRPOTrainer prepares its reference model: the fused head first, with the same temperature.
        add_fused_lm_head(credit.teacher, temperature=trainer.temperature, outputs=("log_probs",))
        credit.teacher = place_frozen(trainer, credit.teacher)
    return _finished(trainer)


def demonstration_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    args: Any,
    data: Dataset,
    callbacks: list[TrainerCallback],
) -> Any:
    """An `SFTTrainer` on examples that are tokenised already; `args` is an `SFTConfig`."""
    from trl import SFTTrainer

    class DemonstrationTrainer(WholeStates, SFTTrainer):
        """`SFTTrainer` whose trainer states are written whole or not at all."""

    return _finished(
        DemonstrationTrainer(
            model=model, processing_class=tokenizer, train_dataset=data, callbacks=callbacks, args=args
        )
    )


def _finished(trainer: Any) -> Any:
    keep_output_types(trainer)
    mark_student(trainer)
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_arguments(config: TrainConfig, folder: Path, cuda: bool) -> Any:
    """A run in TRL's terms: an `SFTConfig` or a `GRPOConfig`, with trainer states in `folder`. No file is read."""
    from trl import GRPOConfig, SFTConfig

    size, micro_batches = distributed.batch_sizes(config)
    cosine = config.schedule == "cosine"
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.seed,
        "max_steps": config.steps,
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "cosine_with_min_lr" if cosine else "constant",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1} if cosine else {},
        "warmup_steps": round(0.1 * config.steps) if cosine else 0,
        "adam_beta1": config.betas[0],
        "adam_beta2": config.betas[1],
        "adam_epsilon": config.adam_epsilon,
        "weight_decay": config.weight_decay,
        "optim": "adamw_torch" if config.optimizer == "adamw" else "sgd",
        "max_grad_norm": config.max_grad_norm,  # transformers clips only above 0, and logs the norm either way
        "bf16": cuda and config.autocast,
        "fp16": False,
        "use_cpu": not cuda,
        "report_to": "none",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # on, it would replace a NaN loss by the mean of earlier ones
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        "remove_unused_columns": False,
    }
    if config.rollouts == "demonstrations":
        return SFTConfig(**common, max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True})
    server = config.vllm == "server"
    off_policy = config.rollouts == "teacher"
    return GRPOConfig(
        **common,
        num_generations=config.generations,
        max_completion_length=config.max_tokens,
        steps_per_generation=micro_batches * config.updates_per_rollout,
        num_iterations=1,
        beta=0.0,
        epsilon=1.0 if off_policy else config.clip_low,
        epsilon_high=1.0 if off_policy else config.clip_high,
        loss_type="grpo",
        scale_rewards="group",
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        use_vllm=config.uses_vllm,
        vllm_mode="server" if server else "colocate",
        vllm_server_base_url=config.vllm_server if server else None,
        vllm_gpu_memory_utilization=config.vllm_memory,
        vllm_max_model_length=config.max_prompt_tokens + config.max_tokens,
        vllm_importance_sampling_correction=False,
        disable_dropout=True,
    )

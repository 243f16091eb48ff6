"""Run by tests in one process or several: TRL's SFTTrainer held in a channel by `constrain`, and resumed from half-way.

channel_worker.py ORIGIN CHANNEL OUT MODE…     writes OUT/MODE/{whole,resumed}.safetensors (.factors: of adapters), log.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from opdgeo import Channel, tasks
from opdgeo.training import constrain, distributed, models, trl_hooks
from opdgeo.training.sft import tokenized

STEPS, BATCH = 4, 4
torch.set_num_threads(1)


class SaveAt(TrainerCallback):
    """Save a trainer state half-way."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == STEPS // 2


def trainer(origin: Path, out: Path, callbacks: list[Any], steps: int = STEPS, model: Any = None) -> SFTTrainer:
    """TRL's trainer: AdamW with weight decay 0.1, clipping that binds, two or more micro-batches a step."""
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(origin)
    examples = tasks.load("arithmetic", {"operands": 2}).examples(BATCH * steps, 0, held_out=False)
    args = SFTConfig(
        output_dir=str(out), max_steps=steps, per_device_train_batch_size=1, use_cpu=True, bf16=False,
        gradient_accumulation_steps=BATCH // distributed.processes(), learning_rate=1e-3,
        lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.5, optim="adamw_torch", report_to="none",
        logging_steps=STEPS // 4, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, max_length=None,
        packing=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
    )  # fmt: skip
    trl_hooks.shard_without_gpu()
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    return SFTTrainer(
        model=model, processing_class=tokenizer, args=args, callbacks=callbacks,
        train_dataset=Dataset.from_list([tokenized(e, tokenizer, 64) for e in examples]),
    )  # fmt: skip


def save(trained: SFTTrainer, path: Path) -> None:
    weights = trained.accelerator.get_state_dict(trained.model)
    if trained.accelerator.is_main_process:
        clean = {constrain.parameter_name(n): w.clone().contiguous() for n, w in weights.items()}
        own, factors = constrain.without_factors(clean)
        save_file(own, path)
        if factors:
            save_file(factors, path.with_suffix(".factors"))
    trained.accelerator.wait_for_everyone()


def main(origin: Path, channel: Path, out: Path, modes: list[str]) -> None:
    for name in modes:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        mode = "update" if name == "left" else name
        held = Channel.load(channel.with_name(f"left-{channel.name}") if name == "left" else channel)
        whole = trainer(origin, folder / "states", [SaveAt()])
        constrain.constrain(whole, held, mode)
        whole.train()
        save(whole, folder / "whole.safetensors")
        if whole.accelerator.is_main_process:
            facts = {
                "outside": [row["channel/outside"] for row in whole.state.log_history if "channel/outside" in row],
                "processes": whole.accelerator.num_processes,
                "parameters": type(next(whole.model.parameters()).data).__name__,
            }
            (folder / "log.json").write_text(json.dumps(facts))
        if name == "left":
            continue
        resumed = trainer(origin, folder / "states", [])
        constrain.constrain(resumed, held, mode)
        resumed.train(resume_from_checkpoint=str(folder / "states" / f"checkpoint-{STEPS // 2}"))
        save(resumed, folder / "resumed.safetensors")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])

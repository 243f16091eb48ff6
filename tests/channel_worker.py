"""Run by tests in one process or under `accelerate launch`: TRL's SFTTrainer held in a channel, stopped half-way and resumed.

channel_worker.py OUT MODE…      writes OUT/MODE/{whole,resumed}.safetensors and OUT/MODE/log.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import DistributedType, PartialState
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from opdgeo import Channel, tasks
from opdgeo.training import constrain, models
from opdgeo.training.sft import tokenized

STEPS = 50
torch.set_num_threads(1)


class SaveAt(TrainerCallback):
    """Save a trainer state half-way."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = state.global_step == STEPS // 2


def trainer(origin: Path, channel: Channel, mode: str, out: Path, callbacks: list[Any]) -> SFTTrainer:
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(origin)
    examples = tasks.load("arithmetic", {"operands": 2}).examples(4 * STEPS, 0, held_out=False)
    args = SFTConfig(
            output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=1, use_cpu=True, bf16=False,
            gradient_accumulation_steps=4 // int(os.environ.get("WORLD_SIZE", "1")), learning_rate=1e-3,
            lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.5, optim="adamw_torch", report_to="none",
            logging_steps=10, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, max_length=None,
            packing=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
    )  # fmt: skip
    if (
        os.environ.get("ACCELERATE_USE_FSDP") == "true"
    ):  # accelerate offers FSDP to GPUs only; torch itself has no such limit
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    made = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32), processing_class=tokenizer, args=args,
        train_dataset=Dataset.from_list([tokenized(e, tokenizer, 64) for e in examples]), callbacks=callbacks,
    )  # fmt: skip
    constrain.constrain(made, channel, mode)
    return made


def save(trained: SFTTrainer, path: Path) -> None:
    weights = trained.accelerator.get_state_dict(trained.model)
    if trained.accelerator.is_main_process:
        clean = {constrain.parameter_name(n): w.clone().contiguous() for n, w in weights.items()}
        save_file(constrain.merged(clean)[0], path)
        if any(".lora_" in n for n in clean):
            save_file({n: w for n, w in clean.items() if ".lora_" in n}, path.with_suffix(".factors"))
    trained.accelerator.wait_for_everyone()


def main(origin: Path, channel_path: Path, out: Path, modes: list[str]) -> None:
    channel = Channel.load(channel_path)
    for mode in modes:
        folder = out / mode
        folder.mkdir(parents=True, exist_ok=True)
        whole = trainer(origin, channel, mode, folder / "states", [SaveAt()])
        whole.train()
        save(whole, folder / "whole.safetensors")
        logged = [row["channel/outside"] for row in whole.state.log_history if "channel/outside" in row]
        resumed = trainer(origin, channel, mode, folder / "states", [])
        resumed.train(resume_from_checkpoint=str(folder / "states" / f"checkpoint-{STEPS // 2}"))
        save(resumed, folder / "resumed.safetensors")
        if whole.accelerator.is_main_process:
            kind = type(next(iter(extract_model_from_parallel(whole.model).parameters()))).__name__
            facts = {"outside": logged, "processes": whole.accelerator.num_processes, "parameter": kind}
            (folder / "log.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]), sys.argv[4:])

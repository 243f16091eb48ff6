"""What a constraint costs: step time and optimizer state of every mode over the free run's, in one process, taken in turns.

    python benchmarks/channel.py [--model tiny/base] [--k 4] [--sequences 64] [--rounds 4] [--steps 6]

A real TRL SFTTrainer, AdamW with weight decay, every step logged (so `channel/outside` is measured every step, as in a run).
A step is the time from one start to the next, in CPU seconds of this process; of all rounds the fastest step and the
median of ratios to the free run of the same round are given. Optimizer state: numbers held for the channel's matrices.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import tempfile
import time
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from opdgeo import Channel, open_checkpoint, tasks
from opdgeo.checkpoints import pair
from opdgeo.training import constrain, models
from opdgeo.training.channel import Subspace
from opdgeo.training.sft import tokenized
from opdgeo.training.train import quiet

MODES = (None, "gradient", "update", "adapter")


class Clock(TrainerCallback):
    def __init__(self) -> None:
        self.starts: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.starts.append(time.process_time())


def run(mode: str | None, held: Channel, rows: list[dict], args: argparse.Namespace, folder: str) -> tuple[list, int]:
    """Seconds of every step but the first, and how many numbers Adam holds for the channel's matrices."""
    origin = models.resolve(args.model)
    config = SFTConfig(
        output_dir=folder, max_steps=args.steps + 1, per_device_train_batch_size=args.sequences, use_cpu=True, bf16=False,
        learning_rate=1e-4, weight_decay=0.1, optim="adamw_torch", report_to="none", logging_steps=1, save_strategy="no",
        disable_tqdm=True, dataloader_pin_memory=False, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
    )  # fmt: skip
    clock = Clock()
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32), args=config, callbacks=[clock],
        train_dataset=Dataset.from_list(rows), processing_class=models.load_tokenizer(origin),
    )  # fmt: skip
    trainer.pop_callback(next(type(c) for c in trainer.callback_handler.callbacks if "Print" in type(c).__name__))
    if mode:
        constrain.constrain(trainer, held, mode, unconstrained=args.unconstrained)  # type: ignore[arg-type]
    trainer.train()
    named = {id(p): constrain.parameter_name(n) for n, p in trainer.model.named_parameters()}
    inside = {s.matrix.tensor for s in held.open()}
    state = trainer.optimizer.optimizer.state
    numbers = sum(
        slots[key].numel()
        for parameter, slots in state.items()
        if named[id(parameter)].replace(".channel_B", ".weight") in inside
        for key in ("exp_avg", "exp_avg_sq")
    )
    return [b - a for a, b in zip(clock.starts[1:], clock.starts[2:], strict=False)], numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny/base")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=80, help="longest sequence")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--unconstrained", choices=("free", "frozen"), default="free")
    args = parser.parse_args()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable_progress_bar()

    origin = models.resolve(args.model)
    opened = open_checkpoint(origin)
    of = {m.name: Subspace(m, torch.zeros(m.cols, min(args.k, m.cols))) for m in pair(opened, opened).matrices}
    held = Channel.random(Channel("right", of), 0)  # a step costs the same in any channel
    options = {"operands": 3, "largest": 9999} if args.task == "arithmetic" else {}
    examples = tasks.load(args.task, options).examples(args.sequences * (args.steps + 1), 0, held_out=False)
    tokenizer = models.load_tokenizer(origin)
    rows = [tokenized(e, tokenizer, args.tokens) for e in examples]

    fastest, ratios, numbers = {}, {mode: [] for mode in MODES}, {}
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for _ in range(args.rounds):
            medians = {}
            for mode in MODES:
                seconds, numbers[mode] = run(mode, held, rows, args, folder)
                gc.collect()
                medians[mode] = statistics.median(seconds)
                fastest[mode] = min([*seconds, fastest.get(mode, float("inf"))])
            for mode in MODES:
                ratios[mode].append(medians[mode] / medians[None])
    print(f"{args.model}, K = {args.k}, {args.sequences} sequences a step, {platform.processor() or platform.machine()}, "
          f"{torch.get_num_threads()} thread(s)")  # fmt: skip
    print(f"{'mode':<10}{'fastest step':>14}{'over free':>11}{'median ratio':>14}{'optimizer state':>17}")
    for mode in MODES:
        print(
            f"{mode or 'free':<10}{fastest[mode]:>12.3f} s{fastest[mode] / fastest[None]:>11.3f}"
            f"{statistics.median(ratios[mode]):>14.3f}{numbers[mode] / numbers[None]:>16.2%}"
        )
    whole = sum(s.matrix.rows * s.matrix.cols for s in held.open())
    print(f"K/n over the channel's matrices, by entries: {sum(s.matrix.rows * s.k for s in held.open()) / whole:.2%}")


if __name__ == "__main__":
    main()

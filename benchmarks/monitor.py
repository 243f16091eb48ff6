"""What the live monitor adds to a step at its default settings: python benchmarks/monitor.py [--model tiny|smollm2] [--steps N]

`--walk` prints instead what the walk null of a large matrix costs, and how far it is from the one of `track`.

One process, one run of TRL's SFTTrainer with the preset's batch. The monitor's share is measured where it is spent: the CPU time
of its measurements (all threads) over the CPU time of the steps themselves, in the same run, so that other programs on the machine
change neither. Overhead = cost of a measurement / (every × a step). What is done once stands apart: W₀ and its spectrum, and what
the nulls keep of a shape, in whichever measurement it falls.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from opdgeo import GeometryMonitor, tasks
from opdgeo.experiments.presets import train_config
from opdgeo.numerics import nulls, perturbed
from opdgeo.training import models
from opdgeo.training.sft import tokenized

DEFAULT = GeometryMonitor().every


class Once:
    """Notes the CPU seconds of a function whose results are kept."""

    seconds = 0.0

    def __init__(self, work: Callable[..., Any]):
        self.work = work

    def __call__(self, *args: Any) -> Any:
        start, misses = time.process_time(), self.work.cache_info().misses
        found = self.work(*args)
        if self.work.cache_info().misses > misses:
            Once.seconds += time.process_time() - start
        return found


class Timed(GeometryMonitor):
    """Notes the CPU seconds of every measurement, less those of `Once`."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.began = 0.0
        self.measurements: list[float] = []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        start = time.process_time()
        super().on_train_begin(*args, **kwargs)
        self.began = time.process_time() - start

    def measure(self, step: int) -> dict[str, float]:
        start = time.process_time() - Once.seconds
        found = super().measure(step)
        self.measurements.append(time.process_time() - Once.seconds - start)
        return found


class Steps(TrainerCallback):
    """CPU seconds of every step, up to where the monitor begins: it comes first, and measures after this is read."""

    def __init__(self) -> None:
        self.start = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = time.process_time()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.process_time() - self.start)


def walk() -> None:
    """The walk null of the monitor beside that of `track`, K = 16, at angles from a hundredth of a right angle to a right one."""
    angles = [math.pi / 2 * x for x in (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)]
    for side in (1200, 4096):
        table, farthest, sums = nulls.PairSimilarity(side, side, (16,)), 0.0, [0.0, 0.0]
        known = perturbed.walk_node.cache_info().misses
        for angle in angles:
            start = time.process_time()
            ours = perturbed.walk_similarity(side, side, 16, angle)
            middle = time.process_time()
            drawn = table(angle)["right", 16][0]
            sums = [sums[0] + middle - start, sums[1] + time.process_time() - middle]
            farthest = max(farthest, abs(ours - drawn))
            print(f"{side}×{side}, angle {math.degrees(angle):5.1f}°: monitor {ours:.3f}, track {drawn:.3f}")
        counts = perturbed.walk_node.cache_info().misses - known, len(table.nodes)
        for name, total, count in zip(("monitor", "track"), sums, counts, strict=True):
            print(f"{name}: {total:.2f} s CPU, {count} points of its table, {total / count:.3f} s each")
        print(f"farthest apart: {farthest:.3f} (track draws at {table.shape[0]}×{table.shape[1]})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", choices=("tiny", "smollm2"))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--measure-every", type=int, default=4, help="more often than the default, for more samples")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--walk", action="store_true", help="the walk null alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.walk:
        walk()
        return
    config = train_config("sft", args.model)
    origin = models.resolve(config.origin)
    tokenizer = models.load_tokenizer(origin)
    task = tasks.load(config.task, config.task_options)
    examples = task.examples(config.sequences_per_step * args.steps, 0, held_out=False)
    rows = [tokenized(e, tokenizer, config.max_prompt_tokens + config.max_tokens) for e in examples]
    batch = config.micro_batch or config.sequences_per_step
    nulls.own_singular_values = Once(nulls.own_singular_values)  # type: ignore[assignment]
    perturbed.walk_node = Once(perturbed.walk_node)  # type: ignore[assignment]
    monitor, steps = Timed(every=args.measure_every), Steps()
    with tempfile.TemporaryDirectory() as out:
        trainer = SFTTrainer(
            model=models.load_model(origin), processing_class=tokenizer, train_dataset=Dataset.from_list(rows),
            callbacks=[steps],
            args=SFTConfig(
                output_dir=out, max_steps=args.steps, per_device_train_batch_size=batch,
                gradient_accumulation_steps=config.sequences_per_step // batch, learning_rate=config.learning_rate,
                use_cpu=True, bf16=False, report_to="none", save_strategy="no", disable_tqdm=True, max_length=None,
                packing=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
                dataloader_pin_memory=False,
            ),
        )  # fmt: skip
        trainer.add_callback(monitor)
        trainer.train()
    step, first, rest = statistics.median(steps.seconds[1:]), monitor.measurements[0], monitor.measurements[1:]
    each = statistics.median(rest)
    once = monitor.began + first - each + Once.seconds
    held = sum(t.numel() * t.element_size() for s in monitor._subjects for t in (s.before, s.last) if t is not None)
    print(f"{args.model}: {len(monitor._subjects)} matrices, W₀ and the last W held: {held / 1e6:.1f} MB")
    print(
        f"a step: {step:.3f} s CPU; a measurement: {each:.3f} s; once: {once:.3f} s, of it {Once.seconds:.3f} for nulls"
    )
    print(f"overhead at every = {DEFAULT}: {100 * each / (DEFAULT * step):.2f} % of step time")
    print(f"with what is done once, over 100 steps: {100 * (100 / DEFAULT * each + once) / (100 * step):.2f} %")


if __name__ == "__main__":
    main()

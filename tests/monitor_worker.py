"""Run by tests in one process or several: TRL's SFTTrainer watched by `GeometryMonitor`, its checkpoints saved at the same steps.

monitor_worker.py ORIGIN OUT [TRACKER]      writes OUT/checkpoint-N, OUT/facts-RANK.json, and what the tracker writes
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from opdgeo import GeometryMonitor, tasks
from opdgeo.numerics import spectra
from opdgeo.numerics.sharded import Rows, ShardedDifference
from opdgeo.training import distributed, models, trl_hooks
from opdgeo.training.sft import tokenized

STEPS, EVERY, BATCH = 6, 2, 4
torch.set_num_threads(1)


class Reporter(TrainerCallback):
    """Stands where W&B and TensorBoard stand: before what the user adds."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.rows.append({**logs, "step": state.global_step})


def trainer(origin: Path, out: Path, reporter: Reporter, peft_config: Any = None, **changes: Any) -> SFTTrainer:
    torch.manual_seed(0)
    tokenizer = models.load_tokenizer(origin)
    examples = tasks.load("arithmetic", {"operands": 2}).examples(BATCH * STEPS, 0, held_out=False)
    settings: dict[str, Any] = dict(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=BATCH // distributed.processes(), use_cpu=True,
        bf16=False, learning_rate=1e-3, lr_scheduler_type="constant", weight_decay=0.1, report_to="none", logging_steps=4,
        save_strategy="steps", save_steps=EVERY, save_only_model=True, disable_tqdm=True, dataloader_pin_memory=False,
        max_length=None, packing=False, dataset_kwargs={"skip_prepare_dataset": True}, gradient_checkpointing=False,
    )  # fmt: skip
    args = SFTConfig(**settings | changes)
    trl_hooks.shard_without_gpu()
    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    return SFTTrainer(
        model=model, processing_class=tokenizer, args=args, callbacks=[reporter], peft_config=peft_config,
        train_dataset=Dataset.from_list([tokenized(e, tokenizer, 64) for e in examples]),
    )  # fmt: skip


def sharded_spectrum() -> dict[str, float]:
    """The Krylov iteration on a matrix whose rows lie on the processes, against the same on the whole one."""
    spectra.KRYLOV = 100
    rng = torch.Generator().manual_seed(1)
    worst: dict[str, float] = {}
    for rows, cols in ((500, 320), (320, 501)):
        before = torch.randn(rows, cols, generator=rng)
        low = torch.randn(rows, 20, generator=rng) @ (
            torch.randn(20, cols, generator=rng) * 0.8 ** torch.arange(20)[:, None]
        )
        after = before + 0.01 * low + 0.001 * torch.randn(rows, cols, generator=rng)
        norm = float(torch.linalg.vector_norm(after.double() - before.double()))
        parts = torch.tensor_split(torch.arange(rows), dist.get_world_size())
        mine = parts[dist.get_rank()]
        place = Rows(rows, int(mine[0]))
        delta = ShardedDifference(before[mine], after[mine], norm, place)
        found = spectra.truncated_svd(delta, 16)
        whole = spectra.truncated_svd(spectra.Difference(before, after, norm), 16)
        assert found.method == whole.method == "krylov", found.method
        apart = max(
            float(spectra.principal_angles(getattr(found, s), getattr(whole, s))[-1]) for s in ("left", "right")
        )
        worst["sigma"] = max(worst.get("sigma", 0), float(((found.sigma - whole.sigma) / whole.sigma[0]).abs().max()))
        worst["angle"] = max(worst.get("angle", 0), apart)
        left, right = (
            torch.randn(rows, 3, dtype=torch.float64, generator=rng),
            torch.randn(cols, 2, dtype=torch.float64, generator=rng),
        )
        for ours, theirs in zip(
            delta.onto(left, right), spectra.Difference(before, after, norm).onto(left, right), strict=True
        ):
            worst["onto"] = max(worst.get("onto", 0), float((ours - theirs).abs().max()))
    return worst


def main(origin: Path, out: Path, tracker: str = "none") -> None:
    reporter, monitor = Reporter(), GeometryMonitor(every=EVERY, watch=6)
    watched = trainer(origin, out, reporter, report_to=tracker)
    watched.add_callback(monitor)
    watched.train()
    parameter = next(p for n, p in watched.model.named_parameters() if "q_proj" in n)
    facts = {
        "rows": monitor.rows,
        "reported": reporter.rows,
        "history": watched.state.log_history,
        "parameters": type(parameter.data).__name__,
        "held": sum(s.before.numel() for s in monitor._subjects),
        "whole": sum(s.matrix.rows * s.matrix.cols for s in monitor._subjects),
        "sharded": sharded_spectrum() if distributed.processes() > 1 else {},
    }
    (out / f"facts-{watched.args.process_index}.json").write_text(json.dumps(facts))
    watched.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])

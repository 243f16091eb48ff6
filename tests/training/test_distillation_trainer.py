"""TRL's own `DistillationTrainer`: monitor and channel work in it, and its gradient is that of our full reverse KL."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DistillationConfig, DistillationTrainer

import opdgeo
from opdgeo import Channel, GeometryMonitor
from opdgeo.diagnostics import Settings
from opdgeo.tasks.arithmetic import Arithmetic
from opdgeo.training.config import TrainConfig
from opdgeo.training.constrain import constrain
from opdgeo.training.train import train
from tiny_models import weights

TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"
PROMPTS = [e.prompt for e in Arithmetic(operands=2).examples(4, 0, held_out=False) for _ in range(2)]
RATE = 1024.0  # of one step of plain SGD: the weights' own rounding is then far below their change


def distillation(student: Path, teacher: Path, out: Path, **changes: Any) -> DistillationTrainer:
    """On eight prompts a step, in float32, as little else as possible."""
    settings: dict[str, Any] = dict(
        output_dir=str(out),
        max_steps=1,
        per_device_train_batch_size=8,
        beta=1.0,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        shuffle_dataset=False,
        dataloader_pin_memory=False,
    )
    return DistillationTrainer(
        model=str(student),
        teacher_model=str(teacher),
        args=DistillationConfig(**settings | changes),
        train_dataset=Dataset.from_list([{"prompt": p} for p in PROMPTS]),
    )


def test_the_monitor_and_a_channel_work_in_it(tmp_path: Path) -> None:
    """The packaged student and teacher; every number is that of `compare` on what was saved."""
    channel = Channel.extract(TINY / "base", TINY / "teacher", 20, roles="q_proj")
    names = sorted(channel.subspaces)
    trainer = distillation(TINY / "base", TINY / "teacher", tmp_path, max_steps=2, learning_rate=1e-3, logging_steps=1)
    monitor = GeometryMonitor(every=1, watch=names, channel=channel)
    trainer.add_callback(monitor)
    constrain(trainer, channel, "update")
    trainer.train()
    trainer.save_model(str(tmp_path / "tuned"))

    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in logged] == [1, 2]
    assert all(row["geometry/norm"] > 0 and row["geometry/outside"] < 1e-8 for row in logged)
    assert all(row["channel/outside"] < 1e-8 for row in logged)
    assert "geometry/similarity_first" in logged[-1]
    found = opdgeo.compare(TINY / "base", tmp_path / "tuned", settings=Settings(nulls=0), roles="q_proj", cache=False)
    for diagnostic in ("frobenius_norm", "stable_rank", "update_sparsity"):
        rows = found.measurements.filter(diagnostic=diagnostic).to_dicts()
        expected = {(r["matrix"], r["variant"]): r["value"] for r in rows if r["status"] == "computed"}
        measured = [r for r in monitor.rows if r["step"] == 2 and r["diagnostic"] == diagnostic]
        assert {r["matrix"] for r in measured} == set(names)
        assert all(r["value"] == pytest.approx(expected[r["matrix"], r["variant"]], rel=1e-4) for r in measured)
    outside = channel.energy_outside(TINY / "base", tmp_path / "tuned")
    assert len(outside) == len(names) and all(share is not None and share < 1e-8 for share in outside.values())


# One step of plain SGD by each trainer, on the tokens that TRL's own student wrote. What moved, over the rate, is the gradient.


def by_trl(origin: Path, teacher: Path, out: Path, **changes: Any) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The gradient of `DistillationTrainer`, and its completions as `rollouts.jsonl` has them."""
    plain = dict(optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0)
    trainer = distillation(origin, teacher, out, **plain | changes)
    trainer.train()
    trainer.save_model(str(out / "after"))
    batch = trainer._buffered_inputs[0]
    ids = {
        part: [row[mask.bool()].tolist() for row, mask in zip(batch[f"{part}_ids"], batch[f"{part}_mask"], strict=True)]
        for part in ("prompt", "completion")
    }
    rows = [
        {"step": 1, "prompt": trainer.processing_class.decode(p), "answer": "", "prompt_ids": p, "completion_ids": c}
        for p, c in sorted(zip(ids["prompt"], ids["completion"], strict=True))
    ]
    return gradient(origin, out / "after"), rows


def by_us(config: Callable[..., TrainConfig], rows: list[dict[str, Any]], out: Path, credit: str) -> dict[str, Tensor]:
    """The gradient of `opdgeo train opd` on these completions."""
    out.mkdir(exist_ok=True)
    (out / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = dict(
        credit=credit,
        rollouts=str(out / "rollouts.jsonl"),
        generations=2,
        steps=1,
        checkpoints=(1.0,),
        eval_prompts=0,
        optimizer="sgd",
        learning_rate=RATE,
        weight_decay=0.0,
    )
    asked = config("opd", **settings)
    return gradient(Path(asked.origin), train(asked, out / "run", progress=False))


def gradient(before: Path, after: Path) -> dict[str, Tensor]:
    start, end = weights(before), weights(after)
    return {name: (start[name].double() - end[name].double()) / RATE for name in start}


def exact(
    origin: Path, teacher: Path, rows: list[dict[str, Any]], shares: list[float], temperature: float = 1.0
) -> dict[str, Tensor]:
    """The gradient of Σ shares[i] · Σ_t KL(student ‖ teacher) in float64, a completion at a time and without padding."""
    student, scorer = (AutoModelForCausalLM.from_pretrained(p, dtype=torch.float64).eval() for p in (origin, teacher))
    for row, share in zip(rows, shares, strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        first = len(row["prompt_ids"]) - 1
        p, q = ((model(ids).logits[0, first:-1] / temperature).log_softmax(-1) for model in (student, scorer))
        (share * (p.exp() * (p - q.detach())).sum()).backward()
    tied = student.all_tied_weights_keys
    return {n: p.grad for n, p in student.named_parameters() if n not in tied}


def apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest ‖difference‖ / ‖expected‖ of a tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


def test_the_gradient_is_that_of_our_full_reverse_kl(
    origin: Path, teacher: Path, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """On completions of one length; float32, each tensor to 1e-5."""
    theirs, rows = by_trl(origin, teacher, tmp_path / "trl", generation_kwargs={"min_new_tokens": 6})
    assert [len(row["completion_ids"]) for row in rows] == [6] * 8 and len({len(row["prompt_ids"]) for row in rows}) > 1
    ours = by_us(config, rows, tmp_path / "ours", "reverse_kl")
    assert apart(ours, theirs) < 1e-5
    assert apart(theirs, exact(origin, teacher, rows, [1 / 48] * 8)) < 1e-5
    # The sampled token's credit is a one-sample estimate of it: another gradient on the same tokens.
    assert apart(by_us(config, rows, tmp_path / "sampled", "sampled"), theirs) > 0.5


def test_it_differs_where_lengths_do_and_in_temperature(
    origin: Path, teacher: Path, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """TRL's mean is over the tokens of the batch, ours over completions of their means. TRL scores at the sampling temperature."""
    theirs, rows = by_trl(origin, teacher, tmp_path / "trl", seed=3)
    lengths = [len(row["completion_ids"]) for row in rows]
    assert len(set(lengths)) > 1, lengths
    ours = by_us(config, rows, tmp_path / "ours", "reverse_kl")
    assert apart(theirs, exact(origin, teacher, rows, [1 / sum(lengths)] * 8)) < 1e-5
    assert apart(ours, exact(origin, teacher, rows, [1 / 8 / n for n in lengths])) < 1e-5
    assert apart(ours, theirs) > 0.01

    warm, rows = by_trl(origin, teacher, tmp_path / "warm", temperature=2.0)
    count = sum(len(row["completion_ids"]) for row in rows)
    assert apart(warm, exact(origin, teacher, rows, [1 / count] * 8, temperature=2.0)) < 1e-5
    assert apart(warm, exact(origin, teacher, rows, [1 / count] * 8)) > 0.1

"""The outcome of every prompt: what the accuracies are the means of, paired between models by the same random numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opdgeo import tasks
from opdgeo.errors import ConfigError
from opdgeo.experiments.reduced import unpacked
from opdgeo.training import callbacks, evaluation, models
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train

PROMPTS = 12


def outcomes(model: Any, **changes: Any) -> tuple[evaluation.Evaluation, np.ndarray, np.ndarray]:
    """The evaluation of a model on arithmetic, and its outcomes: greedy (prompts,), sampled (prompts, samples)."""
    task = tasks.load("arithmetic", {})
    settings: dict[str, Any] = {"teacher": None, "max_tokens": 40, "batch": 16, "longest": 72, "samples": 3} | changes
    found = evaluation.evaluate(
        model, models.load_tokenizer(models.resolve("tiny/teacher")), task, task.examples(PROMPTS, 0, held_out=True), **settings
    )  # fmt: skip
    assert found.right_greedy and found.right_sampled
    sampled = unpacked(bytes.fromhex(found.right_sampled), PROMPTS * settings["samples"]).reshape(PROMPTS, -1)
    return found, unpacked(bytes.fromhex(found.right_greedy), PROMPTS), sampled


def test_accuracies_are_the_means_of_outcomes_that_no_other_draw_touches() -> None:
    model = models.load_model(models.resolve("tiny/teacher")).eval()
    with torch.no_grad():  # a model that is right and wrong by turns
        for name, weight in model.named_parameters():
            if "proj" in name:
                weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    found, greedy, sampled = outcomes(model)
    assert found.accuracy_greedy == greedy.mean() and found.accuracy_sampled == sampled.mean()
    assert 0 < sampled.mean() < 1, "the test says nothing otherwise"
    torch.manual_seed(123)
    again, _, one = outcomes(model, samples=1)
    assert np.array_equal(one[:, 0], sampled[:, 0]) and again.accuracy_greedy == found.accuracy_greedy
    # Nearly the same model on the same prompts meets the same random numbers: nearly every outcome is the same.
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1 + 1e-6
    _, _, near = outcomes(model)
    assert (near == sampled).mean() >= 0.95
    if 0.1 < sampled.mean() < 0.9:
        assert (sampled[:, 0] == sampled[:, 1]).mean() < 1, "the samples of a prompt are drawn apart"


def test_a_run_can_leave_its_start_unmeasured(config: Callable[..., TrainConfig], tmp_path: Path) -> None:
    asked = dataclasses.replace(config("sft", steps=1, checkpoints=(1.0,)), eval_start=False, eval_samples=2)
    train(asked, tmp_path / "run", progress=False)
    (row,) = (row for row in callbacks.read_log(tmp_path / "run") if row["event"] == "eval")
    right = unpacked(bytes.fromhex(row["right_sampled"]), 2 * row["prompts"])
    assert row["step"] == 1 and row["accuracy_sampled"] == right.mean()
    with pytest.raises(ConfigError, match="eval_samples"):
        dataclasses.replace(asked, eval_samples=0)

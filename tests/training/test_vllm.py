"""vLLM in the trainer's own process writes the rollouts, or serves the teacher: on its CPU build, or on a GPU."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opdgeo.training import callbacks
from opdgeo.training.config import TrainConfig
from opdgeo.training.served import ServedTeacher
from opdgeo.training.train import train
from tiny_models import random_model

pytestmark = pytest.mark.needs("vllm")


def test_vllm_writes_with_the_weights_of_the_step(
    config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At every step vLLM's log-probabilities of what it wrote are the student's; the origin's are far from them."""
    from transformers import AutoModelForCausalLM
    from trl.generation.vllm_generation import VLLMGeneration

    # vLLM's attention on a CPU wants heads of 32.
    models = [str(random_model(tmp_path / f"model-{seed}", seed, head_dim=32)) for seed in (0, 1)]
    asked: TrainConfig = config(
        "opd", origin=models[0], teacher=models[1], vllm="colocate", vllm_memory=0.1, learning_rate=3e-2, steps=3, eval_prompts=0,
    )  # fmt: skip
    first = AutoModelForCausalLM.from_pretrained(asked.origin, dtype=torch.float32)
    generate, apart = VLLMGeneration.generate, []

    def logprobs(model: Any, prompt: list[int], completion: list[int]) -> torch.Tensor:
        ids = torch.tensor([prompt + completion], device=model.device)
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        return logits.log_softmax(-1).cpu()[torch.arange(len(completion)), completion]

    def watched(self: Any, prompts: Any, *arguments: Any, **named: Any) -> Any:
        prompt_ids, completion_ids, theirs, tokens = generate(self, prompts, *arguments, **named)
        distances = torch.tensor([
            [float((torch.tensor(t)[:, 0] - logprobs(m, p, c)).abs().mean()) for m in (self.model, first)]
            for p, c, t in zip(prompt_ids, completion_ids, theirs, strict=True)
        ])  # fmt: skip
        apart.append(distances.mean(0).tolist())
        return prompt_ids, completion_ids, theirs, tokens

    monkeypatch.setattr(VLLMGeneration, "generate", watched)
    train(asked, tmp_path / "run", progress=False)
    assert len(apart) == 3
    assert all(now < 0.05 for now, _ in apart), apart  # vLLM computes in the checkpoint's dtype
    assert min(then for _, then in apart[1:]) > 4 * max(now for now, _ in apart), apart
    steps = [row for row in callbacks.read_log(tmp_path / "run") if row["event"] == "step"]
    assert len(steps) == 3 and all(row["completion_length"] > 0 for row in steps)


def test_a_served_teachers_log_probabilities_are_the_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    from opdgeo.training.models import load_tokenizer

    folder = random_model(tmp_path / "teacher", 1, head_dim=32)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", str(port)]
    command += ["--dtype", "float32", "--max-model-len", "32", "--enforce-eager"]
    monkeypatch.setattr("opdgeo.training.served.PAUSES", [5] * 60)  # until it has started
    running = subprocess.Popen(command, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}, stderr=subprocess.STDOUT)
    try:
        server, tokenizer = ServedTeacher(f"http://127.0.0.1:{port}"), load_tokenizer(folder)
        server.require_same_tokens(tokenizer, ["1+2=1+2=3#3"], 31)
        ids_BL = torch.randint(3, len(tokenizer), (3, 12), generator=torch.Generator().manual_seed(0))
        attention_BL = torch.ones_like(ids_BL)
        attention_BL[0, :2] = attention_BL[1, 9:] = 0  # 6 tokens of prompt, 6 of completion
        found = server.logprobs(ids_BL, attention_BL, 6)
    finally:
        running.terminate()
        running.wait(60)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=ids_BL, attention_mask=attention_BL).logits[:, 5:-1]
    expected = logits.log_softmax(-1).gather(-1, ids_BL[:, 6:, None])[..., 0] * attention_BL[:, 6:]
    assert (found - expected).abs().max() < 1e-4

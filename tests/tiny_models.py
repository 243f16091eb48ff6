"""Small random models, runs of a few steps on them, and their weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from opdgeo.tasks import characters
from opdgeo.training.config import TrainConfig

KIND = {
    "sft": {"rollouts": "demonstrations"},
    "opd": {"rollouts": "student", "alpha": 1.0},
    "rlvr": {"rollouts": "student", "alpha": 0.0},
    # the random choice of tokens and the micro-batches draw on the random state that a resume must restore
    "mixture": {"rollouts": "student", "alpha": 0.5, "token_share": 0.5, "token_choice": "random", "micro_batch": 4},
    "teacher": {"rollouts": "teacher", "alpha": 1.0},
}


def random_model(folder: Path, seed: int, **changes: Any) -> Path:
    torch.manual_seed(seed)
    tokenizer = characters.tokenizer()
    settings: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.15,
    )  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**{**settings, **changes})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run_config(kind: str, origin: Path, teacher: Path, /, **changes: Any) -> TrainConfig:
    """A run of five steps of eight sequences."""
    values: dict[str, Any] = dict(
        arm=kind, task="arithmetic", task_options={"operands": 2}, origin=str(origin), teacher=str(teacher), steps=5,
        sequences_per_step=8, generations=4, max_prompt_tokens=12, max_tokens=6, learning_rate=1e-3,
        checkpoints=(0.4, 1.0), eval_prompts=4, eval_prompts_between=0, eval_batch=8, eval_kl_origin=True, device="cpu",
    )  # fmt: skip
    return TrainConfig(**{**values, **KIND[kind], **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_bit_equal(left: Path, right: Path) -> None:
    ours, theirs = weights(left), weights(right)
    assert ours.keys() == theirs.keys()
    differing = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not differing, differing

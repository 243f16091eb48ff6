"""Plans against real runs (memory), real parameter counts, and what they refuse. Time is compared in docs/engines.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from opdgeo.errors import ConfigError
from opdgeo.experiments.presets import train_config
from opdgeo.training import models, resources
from program import run_opdgeo, run_python

SMALL: dict[str, Any] = {
    "steps": 1,
    "eval_prompts": 8,
    "eval_prompts_between": 0,
    "eval_batch": 64,
    "checkpoints": (1.0,),
}
MACHINE = resources.Hardware("a test", 1, 16e9, 5e10, 4e-6, False)


def test_the_peak_is_near_the_measured_one(tmp_path: Path) -> None:
    config = train_config(
        "rlvr", "tiny", origin="tiny/base", device="cpu", sequences_per_step=128, max_tokens=32, **SMALL
    )
    script = (
        "import resource, sys; from opdgeo.training.config import TrainConfig; from opdgeo.training.train import train\n"
        "train(TrainConfig.from_json(sys.argv[1]), sys.argv[2], progress=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024))"
    )
    done = run_python("-c", script, config.to_json(), tmp_path / "run", cold=True)
    assert done.returncode == 0, done.stderr[-2000:]
    measured = int(done.stdout)
    assert resources.plan(config, MACHINE).peak == pytest.approx(measured, rel=0.15)


def test_parameters_are_counted_from_the_shape() -> None:
    from safetensors import safe_open

    with safe_open(models.resolve("tiny/base") / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
    assert resources.shape("tiny/base").parameters == stored
    published = {
        "Qwen3-4B": 4.02e9,
        "Qwen3-8B": 8.19e9,
        "Qwen3-14B": 14.77e9,
        "Qwen3-32B": 32.76e9,
        "Qwen3-30B-A3B": 30.53e9,
    }
    for name, count in published.items():
        assert resources.shape(f"Qwen/{name}").parameters == pytest.approx(count, rel=2e-3), name


def test_activations_are_what_autograd_keeps() -> None:
    """The formula against the tensors that PyTorch saves for the backward pass of one more layer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    def kept(kind: type, layers: int) -> float:
        config = kind(
            vocab_size=64, hidden_size=64, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(config).model
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        seen: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
            return tensor

        attention = torch.ones(3, 40, dtype=torch.long)
        attention[0, :5] = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.zeros(3, 40, dtype=torch.long), attention_mask=attention, use_cache=False)
        return sum(seen.values()) / (4 * 3 * 40)

    for kind, normed in ((Qwen3Config, True), (LlamaConfig, False)):
        shape = resources.Shape(1, 64, 192, 4, 2, 16, 64, True, normed)
        assert shape.activations(40) == pytest.approx(kept(kind, 2) - kept(kind, 1), rel=0.03)


def test_the_papers_runs_are_planned_without_the_weights(tmp_path: Path) -> None:
    command = ["train", "opd", "--preset", "qwen3-8b", "--model", "Qwen/Qwen3-8B-Base"]
    done = run_opdgeo(*command, "--plan", "h100x8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for word in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "teacher",
        "vLLM",
        "peak",
        "tokens:",
        "GPU hours",
        "disk:",
    ):
        assert word in done.stdout
    assert "assumed: FSDP2 or ZeRO-3" in done.stdout and not list(tmp_path.iterdir())
    one = run_opdgeo(*command, "--plan", "h100", cwd=tmp_path)
    assert one.returncode == 2 and "this run needs about" in one.stderr and "more processes" in one.stderr


def test_sharding_divides_and_batches_multiply() -> None:
    opd = train_config("opd", "qwen3-8b", origin="Qwen/Qwen3-8B-Base")
    one, eight = (resources.plan(opd, resources.hardware(name)) for name in ("h200", "h200x8"))
    for part in ("weights", "gradients", "optimizer", "teacher"):
        assert eight.memory[part] == pytest.approx(one.memory[part] / 8)
    trained, shared = (made.seconds["update"] + made.seconds["credit"] for made in (one, eight))
    assert eight.tokens == one.tokens and shared < 0.2 * trained
    # The tokens of a rollout follow one another on any number of GPUs, and every update has a rollout of its own.
    assert 0.5 * one.seconds["rollouts"] < eight.seconds["rollouts"] < one.seconds["rollouts"]
    assert one.memory["optimizer"] == pytest.approx(8 * 8.19e9, rel=1e-3)
    elsewhere = train_config("opd", "qwen3-8b", origin="Qwen/Qwen3-8B-Base", teacher_server="http://host:8000")
    served = resources.plan(elsewhere, resources.hardware("h200"))
    assert served.peak == pytest.approx(one.peak - one.memory["teacher"], rel=1e-9) and "server" in served.assumed[0]
    tiny = {n: resources.plan(train_config("sft", "tiny", micro_batch=n), MACHINE) for n in (16, 64)}
    assert tiny[64].memory["activations"] > 2 * tiny[16].memory["activations"] and tiny[64].tokens == tiny[16].tokens
    more = resources.plan(train_config("sft", "tiny", steps=600), MACHINE)
    assert more.seconds["update"] == pytest.approx(10 * tiny[64].seconds["update"], rel=1e-6)


def test_what_cannot_fit_is_refused_with_a_cure() -> None:
    made = resources.plan(
        train_config("sft", "tiny"), resources.Hardware("a small machine", 1, 0.8e9, 5e10, 4e-6, False)
    )
    with pytest.raises(
        ConfigError, match=r"needs about .* 0\.8 GB are there on a small machine.*Try a smaller micro_batch"
    ):
        resources.refuse_what_cannot_fit(made)
    with pytest.raises(ConfigError, match="the hardware is 'z80'; expected one of a100, h100"):
        resources.hardware("z80")


def test_a_plan_of_this_machine_is_text_with_every_part() -> None:
    text = resources.describe(resources.plan(train_config("opd", "tiny", origin="tiny/base"), resources.hardware(None)))
    assert "this machine's CPU" in text and "rollouts" in text and "time: about" in text and "disk: checkpoints" in text

"""Trainers and PEFT put modules around a model: its parameters have one name, in memory and in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from opdgeo.checkpoints import open_checkpoint
from opdgeo.checkpoints.names import unwrapped
from opdgeo.training.constrain import parameter_name
from opdgeo.training.monitor import GeometryMonitor

NAME = "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "name",
    [
        f"module.{NAME}",
        f"module.module.{NAME}",  # Megatron's Float16Module inside its DDP
        f"_orig_mod.module.{NAME}",  # torch.compile(DistributedDataParallel(model))
        f"module._orig_mod.{NAME}",
        f"module.base_model.model.{NAME}",  # PEFT under DDP
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up_proj.weight",
        "base_model.model.model.language_model.layers.0.mlp.up_proj.weight",  # PEFT around a multimodal model
    ],
)
def test_a_wrapped_parameter_has_the_name_of_its_checkpoint(name: str, tmp_path: Path) -> None:
    torch.save({name: torch.zeros(4, 2)}, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(tmp_path).tensors) == [NAME]
    assert parameter_name(name) == NAME


@pytest.mark.parametrize("name", ["model.layers.0.module.up_proj.weight", "model.base_model.model.weight", "module"])
def test_a_module_of_the_model_itself_stays_in_its_name(name: str, tmp_path: Path) -> None:
    assert unwrapped(name) == parameter_name(name) == name
    torch.save({name: torch.zeros(4, 2), NAME: torch.zeros(4, 2)}, tmp_path / "pytorch_model.bin")
    assert set(open_checkpoint(tmp_path).tensors) == {name, NAME}


def test_the_wrappers_of_the_libraries_are_known() -> None:
    """Made by torch and peft themselves, so that a name they change is noticed."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=4,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    plain = {n for n, _ in model.named_parameters()}
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    assert {unwrapped(n) for n, _ in torch.compile(model).named_parameters()} == plain
    model.model.layers[1] = model.model.layers[1]._checkpoint_wrapped_module
    tuned: nn.Module = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    found = {unwrapped(n) for n, _ in tuned.named_parameters()}
    own = {n for n in found if ".lora_" not in n}
    targets = {n for n in plain if "q_proj" in n}
    assert own == (plain - targets) | {n.replace(".weight", ".base_layer.weight") for n in targets}
    # The monitor adds the factors to their base layer, under the name of the matrix.
    monitor = GeometryMonitor(watch=sorted(targets))
    from transformers import TrainerControl, TrainerState

    monitor.on_train_begin(None, TrainerState(), TrainerControl(), model=tuned)  # type: ignore[arg-type]
    assert sorted(s.name for s in monitor._subjects) == sorted(targets)

"""Training on GPUs: the constraint, the live monitor and the gradients' statistics against the CPU, and what is asked of a machine."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cuda_double import Counted
from opdgeo import Channel, GeometryMonitor
from opdgeo.errors import ConfigError
from opdgeo.experiments.gradient_moments import signals
from opdgeo.experiments.presets import train_config
from opdgeo.numerics import sharded
from opdgeo.training import constrain, distributed, models, trl_hooks
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train

MATRIX = torch.backends.cuda.matmul


@pytest.fixture(scope="module")
def channels(origin: Path, teacher: Path) -> dict[str, Channel]:
    return {side: Channel.extract(origin, teacher, 4, side) for side in ("right", "left")}


def pull(model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """A loss whose gradient is the same on every device and turns with the weights."""
    rng = torch.Generator().manual_seed(0)
    parts = []
    for p in model.parameters():
        noise = torch.randn(p.shape, generator=rng).to(p.device, dtype)
        parts.append((noise * p).sum() + p.square().sum() / 2)
    return torch.stack(parts).sum()


def held(
    origin: Path, channel: Channel, mode: Any, device: str, dtype: str, **adam: Any
) -> tuple[dict[str, Tensor], float | None]:
    """Two steps in the channel: the weights, on the host, and the share outside."""
    model = models.load_model(origin, dtype)
    constrain.prepare(model, channel, mode)
    model.to(device)
    constraint = constrain.Constraint(model.named_parameters(), channel, mode)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1, **adam)
    constraint.hold(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        pull(model, getattr(torch, dtype)).backward()
        optimizer.step()
    return {n: p.detach().cpu() for n, p in model.named_parameters()}, constraint.outside()


@pytest.mark.parametrize(
    ("mode", "dtype"),  # the adapter's B is float32
    [
        (m, d)
        for m in ("gradient", "update", "adapter", "left")
        for d in ("float32", "bfloat16")
        if (m, d) != ("adapter", "bfloat16")
    ],
)
def test_a_constraint_holds_on_a_gpu(
    gpu: Counted | None, origin: Path, channels: dict[str, Channel], mode: str, dtype: str
) -> None:
    channel, kind = channels["left" if mode == "left" else "right"], "update" if mode == "left" else mode
    before = MATRIX.fp32_precision
    try:
        MATRIX.fp32_precision = "tf32"  # a trainer may have asked for it
        found, outside = held(origin, channel, kind, "cuda", dtype)
    finally:
        MATRIX.fp32_precision = before
    exact, beside = held(origin, channel, kind, "cpu", dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == "float32" else {"rtol": 2e-2, "atol": 2e-2}
    for name, weight in exact.items():
        torch.testing.assert_close(found[name], weight, **close, msg=lambda m, name=name: f"{name}: {m}")
    assert outside == pytest.approx(beside, rel=0.05, abs=1e-9)
    if kind != "gradient" and dtype == "float32":
        assert outside is not None and outside < 1e-9


@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_moments_of_a_checkpoint_count_steps_where_the_optimizer_does(
    doubles: Counted, origin: Path, tmp_path: Path, adam: dict[str, Any]
) -> None:
    model = models.load_model(origin).to("cuda")
    slots = {
        f"{constrain.parameter_name(n)}.{slot}": torch.full(p.shape, 1e-3)
        for n, p in model.named_parameters()
        for slot in ("exp_avg", "exp_avg_sq")
    }
    save_file(slots, tmp_path / constrain.MOMENTS, metadata={"step": "7"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **adam)
    constrain.load_moments(model.named_parameters(), optimizer, tmp_path, None)
    pull(model).backward()
    if "capturable" not in adam:  # which asks torch for a graph
        optimizer.step()
    state = next(iter(optimizer.state.values()))
    assert state["step"].device.type == ("cuda" if adam else "cpu") and float(state["step"]) >= 7
    assert state["exp_avg"].device.type == "cuda"


def test_the_monitor_measures_the_same_on_a_gpu(
    gpu: Counted | None, origin: Path, channels: dict[str, Channel]
) -> None:
    rows = []
    for device in ("cpu", "cuda"):
        model = models.load_model(origin).to(device)
        monitor = GeometryMonitor(1, watch=4, channel=channels["right"])
        state: Any = SimpleNamespace(global_step=0, max_steps=3)
        monitor.on_train_begin(SimpleNamespace(output_dir="nowhere"), state, SimpleNamespace(), model=model)  # type: ignore[arg-type]
        for step in (1, 2):
            with torch.no_grad():
                for i, p in enumerate(model.parameters()):
                    p += 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(device)
            logs = monitor.measure(step)
        assert logs["geometry/norm"] > 0 and logs["geometry/outside"] > 0
        rows.append(monitor.rows)
    assert len(rows[0]) == len(rows[1]) > 40
    for here, there in zip(*rows, strict=True):
        assert here.keys() == there.keys() and here["diagnostic"] == there["diagnostic"]
        assert here["value"] == pytest.approx(there["value"], rel=1e-6), here


def test_signals_of_a_gpu(
    doubles: Counted, origin: Path, teacher: Path, config: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    """The double draws the CPU's samples, so every number is the CPU's; a GPU draws others."""
    shutil.copytree(origin, tmp_path / "step-000001")
    (tmp_path / "config.json").write_text(config("opd").to_json())  # short completions
    how: dict[str, Any] = dict(prompts=4, generations=2, layers="0", roles="q_proj")
    found = signals(tmp_path / "step-000001", str(teacher), device="cuda", **how)
    assert (
        found.run["device"] == found.run["settings"]["device"] == "cuda"
        and doubles.calls["baddbmm"] + doubles.calls["bmm"] > 0
    )
    exact = signals(tmp_path / "step-000001", str(teacher), **how)
    names = [c for c in exact.signals.columns if c not in ("value", "low", "high", "chance", "reliability")]
    assert found.signals.select(names).equals(exact.signals.select(names))
    for here, there in zip(found.signals["value"], exact.signals["value"], strict=True):
        assert (here is None) == (there is None)
        assert there is None or here == pytest.approx(there, rel=1e-4, abs=1e-6, nan_ok=True)


def test_signals_refuse_a_gpu_that_is_not_there(origin: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        signals(origin, str(teacher), device="gpu")


def test_several_gpus_and_one_process_are_refused_before_a_folder_is_made(
    doubles: Counted, config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config("opd", device="auto")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ConfigError, match="accelerate launch"):
        train(asked, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
    distributed.require_devices(dataclasses.replace(asked, device="cpu"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    distributed.require_devices(asked)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setenv("LOCAL_RANK", "0")
    distributed.require_devices(asked)


def test_a_gpu_rounds_to_bf16_only_where_a_run_asks_for_it(
    config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    of = {name: train_config("opd", name, origin="here").autocast for name in ("tiny", "smollm2", "qwen3-8b")}
    assert of == {"tiny": False, "smollm2": False, "qwen3-8b": True}
    taken: list[bool] = []
    monkeypatch.setattr("trl.GRPOConfig", lambda **arguments: taken.append(arguments["bf16"]))
    for autocast in (False, True):
        for cuda in (False, True):
            trl_hooks.trl_arguments(config("opd", autocast=autocast), Path("nowhere"), cuda)
    assert taken == [False, False, False, True]


class Scorer(torch.nn.Module):
    """What a fused head returns: log-probabilities in float32, from products in bf16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).float().log_softmax(-1)


@pytest.fixture
def alone(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_fsdp2_hands_log_probabilities_on_in_float32(alone: None) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
    plugin.set_mixed_precision("bf16")
    trainer = SimpleNamespace(
        is_fsdp_enabled=True, accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    )
    trl_hooks.keep_output_types(trainer)
    torch.manual_seed(0)
    scorer = fully_shard(Scorer(), mesh=init_device_mesh("cpu", (1,)), mp_policy=plugin.mixed_precision_policy)
    logp = scorer(torch.randn(4, 8))
    assert logp.dtype == torch.float32
    assert not torch.equal(logp, logp.bfloat16().float())


def test_sums_over_processes_go_where_the_group_reaches(
    alone: None, doubles: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of NCCL alone: what lies on the host is summed on the GPU and brought back; gloo alone takes everything."""
    summed: list[str] = []
    monkeypatch.setattr(dist, "all_reduce", lambda part, group=None: summed.append(part.device.type) or part.mul_(2))
    rows = sharded.Rows(4, 0)
    for backends, places in (
        ("cuda:nccl", ["cuda"] * 3),
        ("cpu:gloo,cuda:nccl", ["cpu", "cpu", "cuda"]),
        ("cpu:gloo", ["cpu"] * 3),
    ):
        monkeypatch.setattr(dist, "get_backend_config", lambda group=None, backends=backends: backends)
        summed.clear()
        here, there = torch.ones(2, 2), torch.ones(2, 2).to("cuda")
        assert rows.total_of(1.0, 2.0) == [2.0, 4.0]
        assert torch.equal(rows.all_reduce(here), torch.full((2, 2), 2.0)) and here[0, 0] == 2
        assert rows.all_reduce(there).device.type == "cuda" and float(there.sum()) == 8
        assert summed == places, backends

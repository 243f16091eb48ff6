"""Training held in a channel: real TRL trainers, alone and with others, and the laws of projection on every layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, TrainerCallback

import channel_worker
from opdgeo import Channel
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.training import callbacks, constrain
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
from program import launch
from tiny_models import assert_bit_equal, random_model, weights

torch.set_num_threads(1)
FROZEN = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def channel(origin: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A right channel of K = 4, one matrix frozen; beside it a random left one."""
    folder = tmp_path_factory.mktemp("channel")
    found = Channel.extract(origin, teacher, 4)
    found.subspaces[FROZEN] = found.cut(0)[FROZEN]
    Channel.random(Channel.extract(origin, teacher, 3, "left"), 0).save(folder / "left-channel.safetensors")
    return found.save(folder)


def outside(held: Channel, base: Path, tuned: Path) -> list[float]:
    """The shares outside of every matrix that may move; the others stand still to the bit."""
    shares = held.energy_outside(base, tuned)
    assert all((share is None) == (held[name].k == 0) for name, share in shares.items())
    return [share for share in shares.values() if share is not None]


def factors_outside(held: Channel, factors: dict[str, torch.Tensor]) -> list[float]:
    """‖B Vᵀ (I − V Vᵀ)‖² / ‖B Vᵀ‖² in float64 of every factor B, with V as stored and the span of it made orthonormal."""
    assert factors.keys() == {s.matrix.tensor for s in held.open()}
    shares = []
    for tensor, b in factors.items():
        a, basis = held[tensor].basis.double().T, torch.linalg.qr(held[tensor].basis.double()).Q
        shares.append(float((b.double() @ (a - (a @ basis) @ basis.T)).norm() / (b.double() @ a).norm()) ** 2)
    return shares


def check(held: Channel, base: Path, folder: Path, mode: str) -> None:
    runs = ["whole"] if mode == "left" else ["whole", "resumed"]
    for name in runs:
        shares = outside(held, base, folder / mode / f"{name}.safetensors")
        assert max(shares) <= 1e-8 if mode != "gradient" else 0.01 < max(shares) < 0.9
        if mode == "adapter":
            factors = load_file(folder / mode / f"{name}.factors")
            assert max(factors_outside(held, factors)) <= 1e-12
            update = load_file(folder / mode / f"{name}.safetensors")
            for tensor, b in factors.items():  # the checkpoint's weights are the factors' to rounding
                expected = weights(base)[tensor] + b @ held[tensor].basis.T
                torch.testing.assert_close(update[tensor], expected, rtol=0, atol=3e-7)
    ours, again = (load_file(folder / mode / f"{n}.safetensors") for n in (runs[0], runs[-1]))
    assert all(torch.equal(ours[n], again[n]) for n in ours)


MODES = ["gradient", "update", "adapter"]


@pytest.fixture(scope="module")
def alone(origin: Path, channel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in every mode by one process, and resumed from the second."""
    out = tmp_path_factory.mktemp("alone")
    channel_worker.main(origin, channel, out, MODES)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_the_steps_of_one_process_stay_in_the_channel(mode: str, alone: Path, origin: Path, channel: Path) -> None:
    held = Channel.load(channel)
    check(held, origin, alone, mode)
    logged = json.loads((alone / mode / "log.json").read_text())["outside"]
    assert len(logged) == 4
    if mode == "gradient":  # what leaks is logged, as it is recomputed from the weights
        before, after = weights(origin), load_file(alone / mode / "whole.safetensors")
        update = {n: (after[n] - before[n]).double() for n in held.subspaces}
        whole = sum(float(update[n].norm()) ** 2 for n in held.subspaces)
        beyond = sum(float((update[n] - held.project(n, update[n])).norm()) ** 2 for n in held.subspaces)
        assert logged[-1] == pytest.approx(beyond / whole, rel=1e-4)
    else:
        assert max(logged) <= 1e-8


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_stay_in_the_channel_and_reach_the_same_weights(
    engine: str,
    alone: Path,
    origin: Path,
    channel: Path,
    tmp_path: Path,
) -> None:
    modes = ["update", "adapter"] + (["left"] if engine == "fsdp2" else [])
    launch(engine, 2, channel_worker.__file__, origin, channel, tmp_path, *modes)
    for mode in modes:
        path = channel.with_name(f"left-{channel.name}") if mode == "left" else channel
        check(Channel.load(path), origin, tmp_path, mode)
        facts = json.loads((tmp_path / mode / "log.json").read_text())
        assert facts["processes"] == 2 and (facts["parameters"] == "DTensor") == (engine == "fsdp2")
        assert len(facts["outside"]) == 4 and max(facts["outside"]) <= 1e-8
        if mode != "left":
            one = load_file(alone / mode / "whole.safetensors")
            for name, two in load_file(tmp_path / mode / "whole.safetensors").items():
                assert (two - one[name]).norm() <= 1e-5 * one[name].norm(), name


def test_gradients_are_projected_before_they_are_clipped(origin: Path, channel: Path, tmp_path: Path) -> None:
    """The norm that the trainer clips, and logs, is that of the projected gradient."""
    held, norms, found = Channel.load(channel), {}, {}

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.update({n: p.grad.clone() for n, p in kwargs["model"].named_parameters() if p.grad is not None})

    for mode in (None, "gradient"):
        made = channel_worker.trainer(origin, tmp_path / str(mode), [Watch()], steps=1)
        made.args.logging_steps, made.args.max_grad_norm = 1, 1e9 if mode is None else 0.5
        if mode:
            constrain.constrain(made, held, mode, unconstrained="frozen")
        made.train()
        norms[mode] = next(row["grad_norm"] for row in made.state.log_history if "grad_norm" in row)
        if mode is None:
            free = dict(found)
            found.clear()
    inside = {s.matrix.name: held.project(s.matrix.name, free[s.matrix.name]) for s in held.open()}
    norm = sum(float(g.norm()) ** 2 for g in inside.values()) ** 0.5
    assert norms["gradient"] == pytest.approx(norm, rel=1e-4) and norm > 0.5
    assert found.keys() == inside.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, inside[name] * (0.5 / norm), rtol=1e-3, atol=1e-6)


def test_the_adapter_in_plain_peft_and_trl_ends_where_the_mode_does(
    origin: Path,
    channel: Path,
    tmp_path: Path,
) -> None:
    from peft import PeftModel

    held = Channel.load(channel)
    held.to_adapter(origin, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    constrain.freeze_directions(model)
    plain = channel_worker.trainer(origin, tmp_path / "plain", [], steps=6, model=model)
    plain.train()
    plain.model.merge_and_unload().save_pretrained(tmp_path / "merged")

    ours = channel_worker.trainer(origin, tmp_path / "ours", [], steps=6)
    constrain.constrain(ours, held, "adapter", unconstrained="frozen")
    ours.train()
    channel_worker.save(ours, tmp_path / "ours.safetensors")
    theirs, moved = weights(tmp_path / "merged"), 0
    for name, weight in load_file(tmp_path / "ours.safetensors").items():
        if name == "lm_head.weight":  # tied
            continue
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=1e-7)
        moved += not torch.equal(weight, weights(origin)[name])
    assert moved == len(held.open())

    # Adam's state: B's alone, K/n of the matrices'.
    state = ours.optimizer.optimizer.state
    numbers = sum(slots[key].numel() for slots in state.values() for key in ("exp_avg", "exp_avg_sq"))
    assert numbers == sum(2 * s.matrix.rows * s.k for s in held.open())


def test_a_run_records_its_constraint_and_resumes_to_the_same_weights(
    config: Callable[..., TrainConfig],
    origin: Path,
    channel: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = config(
        "mixture", channel=str(channel), constrain="adapter", unconstrained="frozen", eval_prompts=0, resume_every=1
    )
    whole = train(asked, tmp_path / "whole", progress=False)
    recorded = json.loads((tmp_path / "whole" / "config.json").read_text())
    choices = {"channel": str(channel), "constrain": "adapter", "moments": "reset", "unconstrained": "frozen"}
    assert {name: recorded[name] for name in choices} == choices
    held = Channel.load(tmp_path / "whole")
    assert held.subspaces.keys() == Channel.load(channel).subspaces.keys()
    steps = [row for row in callbacks.read_log(tmp_path / "whole") if row["event"] == "step"]
    assert steps[0]["channel/outside"] <= 1e-12 and len(steps) == 5
    assert max(outside(held, origin, whole)) <= 1e-8
    assert max(outside(held, origin, whole / "adapter")) <= 1e-12  # from its factors: read as an adapter of its origin
    assert {n for n, w in weights(whole).items() if not torch.equal(w, weights(origin)[n])} == {
        s.matrix.tensor for s in held.open()
    }
    from peft import PeftModel

    opened = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32), whole / "adapter"
    )
    for name, weight in opened.merge_and_unload().state_dict().items():
        torch.testing.assert_close(weight, weights(whole).get(name, weight), rtol=0, atol=1e-7)

    class Killed(Exception):
        pass

    after = callbacks.Recorder.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            raise Killed
        after(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(callbacks.Recorder, "on_step_begin", on_step_begin)
        train(asked, tmp_path / "run", progress=False)
    assert_bit_equal(train(asked, tmp_path / "run", resume=True, progress=False), whole)


def test_policy_gradients_are_held_too_and_moments_are_carried_over(
    config: Callable[..., TrainConfig],
    origin: Path,
    channel: Path,
    tmp_path: Path,
) -> None:
    free = config("opd", steps=2, eval_prompts=0, keep_moments=True, max_grad_norm=0.5)
    start = train(free, tmp_path / "free", progress=False)
    held, leaked = Channel.load(channel), {}
    for moments in ("reset", "project", "keep"):
        asked = config(
            "opd", origin=str(start), steps=2, eval_prompts=0, channel=str(channel), constrain="gradient", moments=moments,
            weight_decay=0.0,
        )  # fmt: skip
        leaked[moments] = max(outside(held, start, train(asked, tmp_path / moments, progress=False)))
    assert 0 < leaked["reset"] < leaked["keep"] and leaked["project"] < leaked["keep"]
    slow = (1 - 1e-9,) * 2  # moments that hardly move: what the run starts from is what it ends with
    carried = config("sft", origin=str(start), steps=1, moments="keep", keep_moments=True, betas=slow, eval_prompts=0)
    ends = [train(carried, tmp_path / "carried", progress=False) / "moments.safetensors", start / "moments.safetensors"]
    found, kept = map(load_file, ends)
    assert found.keys() == kept.keys() and any(float(m.abs().max()) > 1e-4 for m in kept.values())
    for name, moment in found.items():
        torch.testing.assert_close(moment, kept[name], rtol=1e-5, atol=1e-6)
    exact = config("opd", steps=2, eval_prompts=0, channel=str(channel), constrain="update")
    assert max(outside(held, origin, train(exact, tmp_path / "update", progress=False))) <= 1e-8
    with pytest.raises(CheckpointError, match=r"holds no moments\.safetensors.*keep_moments=true"):
        train(config("sft", steps=1, moments="keep", eval_prompts=0), tmp_path / "none", progress=False)


def test_moments_come_back_equal_and_projected(origin: Path, channel: Path, tmp_path: Path) -> None:
    def steps(model: Any, count: int) -> torch.optim.Optimizer:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        rng = torch.Generator().manual_seed(0)
        for _ in range(count):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=rng)
            optimizer.step()
        return optimizer

    held = Channel.load(channel)
    models = [AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32) for _ in range(2)]
    before = steps(models[0], 3)
    constrain.save_moments(constrain.moments_of(models[0].named_parameters(), before), tmp_path)

    same = steps(models[0], 0)
    constrain.load_moments(models[0].named_parameters(), same, tmp_path, held)
    for parameter, slots in before.state.items():
        assert all(torch.equal(slots[key], same.state[parameter][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    constrain.Constraint(models[0].named_parameters(), held).project_moments(same)
    name, parameter = next((n, p) for n, p in models[0].named_parameters() if n.endswith("up_proj.weight"))
    expected = held.project(name, before.state[parameter]["exp_avg"])
    torch.testing.assert_close(same.state[parameter]["exp_avg"], expected)
    assert torch.equal(same.state[parameter]["exp_avg_sq"], before.state[parameter]["exp_avg_sq"])

    constrain.prepare(models[1], held, "adapter", "frozen")
    factors = steps(models[1], 0)
    constrain.load_moments(models[1].named_parameters(), factors, tmp_path, held)
    b = models[1].get_parameter(name.replace(".weight", ".channel_B"))
    basis, slots = held[name].basis, before.state[parameter]
    torch.testing.assert_close(factors.state[b]["exp_avg"], slots["exp_avg"] @ basis)
    torch.testing.assert_close(factors.state[b]["exp_avg_sq"], slots["exp_avg_sq"] @ basis**2)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_channel_layer_is_its_linear_layer_with_the_gradient_times_v(autocast: bool) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 3)).Q
    plain = torch.nn.Linear(12, 7)
    held = constrain.ChannelLinear(torch.nn.Linear(12, 7), basis)
    held.load_state_dict({**held.state_dict(), **plain.state_dict()})
    held.weight.requires_grad_(False)
    xs = [torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    outs = []
    for layer, x in zip((plain, held), xs, strict=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outs.append(layer(x))
        (outs[-1].float() ** 2).sum().backward()
    close = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(outs[1].float(), outs[0].float(), **close)
    torch.testing.assert_close(xs[1].grad, xs[0].grad, **close)
    torch.testing.assert_close(held.bias.grad, plain.bias.grad, rtol=0.05, atol=0.1)
    scale = float(plain.weight.grad.norm())
    assert float((held.channel_B.grad - plain.weight.grad @ basis).norm()) < (0.02 if autocast else 1e-6) * scale
    assert held.channel_B.grad.dtype == torch.float32 and held.weight.grad is None


@pytest.mark.parametrize("side", ["right", "left"])
def test_fused_and_transposed_matrices_are_held_in_any_loop(side: str, tmp_path: Path) -> None:
    """GPT-2 stores (in, out), with q, k and v in one tensor; and the loop is plain torch."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=2, n_head=2))
    model.save_pretrained(tmp_path / "a")
    moved = {n: p + 0.1 * torch.randn_like(p) for n, p in model.state_dict().items()}
    (tmp_path / "b").mkdir()
    save_file({n: t for n, t in moved.items() if n != "lm_head.weight"}, tmp_path / "b" / "model.safetensors")
    held = Channel.extract(tmp_path / "a", tmp_path / "b", 3, side)  # type: ignore[arg-type]
    assert len(held) == 12
    with pytest.raises(ConfigError, match=r"no ChannelLinear.*prepare\(model, channel, 'adapter'\)"):
        constrain.Constraint(model.named_parameters(), held, "adapter")
    constrain.prepare(model, held, "update")
    constraint = constrain.Constraint(model.named_parameters(), held, "update")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    constraint.hold(optimizer)
    assert constraint.outside() is None
    ids = torch.randint(50, (2, 12))
    for _ in range(5):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "c")
    assert max(outside(held, tmp_path / "a", tmp_path / "c")) <= 1e-10
    assert float(constraint.outside()) <= 1e-10  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"part of a larger tensor|left channel"):
        held.to_adapter(tmp_path / "a", tmp_path / "d")


def test_stacked_experts_are_held(tmp_path: Path) -> None:
    from opdgeo.checkpoints.names import matrices
    from opdgeo.training.channel import Subspace

    rng = torch.Generator().manual_seed(0)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    stored = torch.nn.Parameter(torch.randn(3, 20, 8, generator=rng))
    found = matrices(name, tuple(stored.shape), {"model_type": "qwen3_moe"}) or []
    like = Channel("right", {m.name: Subspace(m, torch.zeros(m.cols, 2)) for m in found})
    held = Channel.random(like, 0)
    constraint = constrain.Constraint([(name, stored)], held, "update")
    before = stored.detach().clone()
    with torch.no_grad():
        stored.add_(torch.randn(stored.shape, generator=rng))
    moved = stored.detach().clone()
    constraint.project_weights()
    for matrix in found:
        expected = held.project(matrix.name, matrix.cut(moved - before))
        torch.testing.assert_close(matrix.cut(stored.detach() - before), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constrain": "update"}, "channel is None; expected a channel and a way to constrain, or neither"),
        ({"channel": "x"}, "channel is 'x'"),
        ({"channel": "x", "constrain": "freeze"}, "constrain is 'freeze'; expected gradient"),
        ({"channel": "x", "constrain": "adapter", "moments": "keep"}, "moments is 'keep'"),
        ({"moments": "project"}, "expected a channel to project them on"),
        ({"channel": "x", "constrain": "update", "unconstrained": "all"}, "unconstrained is 'all'"),
    ],
)
def test_contradicting_choices_are_refused(
    changes: dict[str, Any],
    message: str,
    config: Callable[..., TrainConfig],
) -> None:
    with pytest.raises(ConfigError, match=message):
        config("sft", **changes)


def test_a_channel_of_another_model_is_refused_before_anything_is_trained(
    config: Callable[..., TrainConfig],
    channel: Path,
    tmp_path: Path,
) -> None:
    other = random_model(tmp_path / "other", 0, hidden_size=16)
    with pytest.raises(
        ConfigError, match=r"shape .* in the model and the channel holds .* expected a channel of this model"
    ):
        train(
            config("sft", origin=str(other), teacher=None, channel=str(channel), constrain="update"), tmp_path / "run"
        )
    with pytest.raises(CheckpointError, match=r"no channel .*nowhere"):
        train(config("sft", channel=str(tmp_path / "nowhere"), constrain="update"), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "name",
    [
        "module.model.layers.0.mlp.up_proj.weight",
        "_orig_mod.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight",
    ],
)
def test_wrappers_do_not_hide_a_parameter(name: str) -> None:
    assert constrain.parameter_name(name) == "model.layers.0.mlp.up_proj.weight"
    assert constrain.parameter_name("model.my_module.weight") == "model.my_module.weight"

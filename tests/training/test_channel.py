"""Channels: planted subspaces are found, files come back equal, adapters open in PEFT."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import opdgeo
from opdgeo import Channel
from opdgeo.errors import CheckpointError, ConfigError, PairingError
from opdgeo.training.channel import parse_choice
from planted import orthonormal, turned, write_checkpoint
from program import run_opdgeo

torch.set_num_threads(1)
TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"
UP, DOWN, OUT = (f"model.layers.0.{n}.weight" for n in ("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"))
SIGMA = {UP: [4.0, 2.0, 1.0, 0.5], DOWN: [1.0] * 6, OUT: []}  # OUT does not move


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """A pair whose ΔW has known singular vectors: (left, right) by name. Stored in float64 from W₀ = 0."""
    rng = np.random.default_rng(0)
    shapes = {UP: (24, 40), DOWN: (40, 24), OUT: (16, 16)}
    vectors = {
        n: (orthonormal(rng, r, len(SIGMA[n])), orthonormal(rng, c, len(SIGMA[n]))) for n, (r, c) in shapes.items()
    }
    folder = tmp_path_factory.mktemp("planted")
    update = {n: (u * np.array(SIGMA[n])) @ v.T for n, (u, v) in vectors.items()}
    for name, tensors in (("base", {n: np.zeros(s) for n, s in shapes.items()}), ("tuned", update)):
        save_file({n: torch.from_numpy(t) for n, t in tensors.items()}, folder / f"{name}.safetensors")
    return folder / "base.safetensors", folder / "tuned.safetensors", vectors


def span_error(basis: torch.Tensor, exact: np.ndarray) -> float:
    """‖(I − B Bᵀ) exact‖, with `exact` orthonormal."""
    found = np.linalg.qr(basis.double().numpy())[0]
    return float(np.linalg.norm(exact - found @ (found.T @ exact)))


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_planted_subspace_is_found(side: str, planted) -> None:
    base, tuned, vectors = planted
    channel = Channel.extract(base, tuned, 2, side)  # type: ignore[arg-type]
    exact = vectors[UP][side == "right"]
    assert channel[UP].k == 2 and span_error(channel[UP].basis, exact[:, :2]) < 1e-6
    assert channel[UP].inside == pytest.approx(20 / 21.25, abs=1e-6) and channel[UP].gap == pytest.approx(0.5, abs=1e-5)
    assert channel[DOWN].gap == pytest.approx(0, abs=1e-5)  # repeated singular values: any two directions
    assert channel[OUT].k == 0 and channel[OUT].inside is None
    outside = channel.energy_outside(base, tuned)
    assert outside[UP] == pytest.approx(1.25 / 21.25, rel=1e-5) and outside[OUT] is None
    assert repr(channel) == f"Channel({side}, 3 matrices, K=0–2, from {base} → {tuned})"
    assert "random=0" in repr(Channel.random(channel, 0)) and len(repr(opdgeo.open_checkpoint(base))) < 300


@pytest.mark.parametrize(
    ("choice", "up", "down"),
    [("1", 1, 1), ("0", 0, 0), ("20", 4, 6), ("0.9", 2, 6), ("0.75", 1, 5), ("0.98", 3, 6), ("stable_rank", 1, 6)],
)
def test_k_by_number_energy_and_stable_rank(choice: str, up: int, down: int, planted) -> None:
    channel = Channel.extract(*planted[:2], parse_choice(choice))
    assert (channel[UP].k, channel[DOWN].k) == (up, down)  # never above the rank of ΔW


@pytest.mark.parametrize("choice", ["-1", "1.5", "nan", "rank", "True"])
def test_a_k_that_does_not_exist_is_refused(choice: str) -> None:
    with pytest.raises(ConfigError, match="expected a whole number"):
        parse_choice(choice)


def test_a_channel_that_holds_everything_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    for name in ("base", "tuned"):
        square, wide = rng.standard_normal((16, 16)), rng.standard_normal((16, 24))
        write_checkpoint(tmp_path / name, {OUT: square, UP: wide}, "float32")
    with caplog.at_level(logging.WARNING):
        Channel.extract(tmp_path / "base", tmp_path / "tuned", 15)
        assert caplog.messages == []
        Channel.extract(tmp_path / "base", tmp_path / "tuned", 500)
    (said,) = caplog.messages
    assert f"k is 500: all 16 directions of {OUT} are in the channel, and so of 1 of 2 matrices" in said


def test_projection_twice_is_once_and_leaves_nothing_outside(planted) -> None:
    channel = Channel.extract(*planted[:2], 3)
    whole = torch.randn(24, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    once = channel.project(UP, whole)
    torch.testing.assert_close(channel.project(UP, once), once, rtol=0, atol=1e-6)
    exact = planted[2][UP][1][:, :3]
    np.testing.assert_allclose(once.numpy(), whole.numpy() @ exact @ exact.T, atol=1e-6)
    with pytest.raises(PairingError, match="24×40 in the channel and 40×24 here"):
        channel.project(UP, whole.T)


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_projected_update_lies_inside_to_the_last_digits(side: str, planted, tmp_path: Path) -> None:
    channel = Channel.random(Channel.extract(*planted[:2], 3, side), 1)  # type: ignore[arg-type]
    rng = torch.Generator().manual_seed(0)
    moved = {n: torch.randn(s.matrix.rows, s.matrix.cols, generator=rng) for n, s in channel.subspaces.items()}
    for name, scale in (("inside", 0.0), ("leak", 1e-3)):
        # Stored in float64: float32 would round a part of the update out of the channel.
        parts = {n: channel.project(n, m.double()) for n, m in moved.items()}
        stored = {n: p + scale * (moved[n] - p) for n, p in parts.items()}
        save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / f"{name}.safetensors")
    base = planted[0]
    assert max(channel.energy_outside(base, tmp_path / "inside.safetensors")[n] or 0 for n in (UP, DOWN)) < 1e-13
    for n, share in channel.energy_outside(base, tmp_path / "leak.safetensors").items():
        if channel[n].k:
            inside = float(parts[n].norm()) ** 2
            outside = 1e-6 * float((moved[n] - parts[n]).norm()) ** 2
            assert share == pytest.approx(outside / (inside + outside), rel=1e-4)


def test_two_channels_compare_by_their_planted_angles(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    left, right = orthonormal(rng, 24, 4), orthonormal(rng, 40, 8)
    pairs = [right[:, :4], turned(right, 4, [1e-3, 30.0, 60.0])[:, :4]]
    write_checkpoint(tmp_path / "base", {UP: np.zeros((24, 40))}, "float32")
    channels = [
        Channel.extract(tmp_path / "base", write_checkpoint(tmp_path / str(i), {UP: (left * [4, 3, 2, 1]) @ v.T}, "float32"), 4)
        for i, v in enumerate(pairs)
    ]  # fmt: skip
    angles = channels[0].compare(channels[1])[UP]
    np.testing.assert_allclose(angles.numpy(), [0, 1e-3, 30, 60], atol=2e-5)
    np.testing.assert_allclose(channels[0].cut(1).compare(channels[1])[UP].numpy(), [1e-3], atol=2e-5)
    assert channels[0].compare(channels[1].cut(0))[UP].numel() == 0


def test_a_random_channel_has_the_same_k_and_holds_what_chance_gives() -> None:
    base, tuned = TINY / "base", TINY / "teacher"
    found = Channel.extract(base, tuned, "stable_rank", roles="mlp")
    chance = Channel.random(found, 7)
    assert {n: s.k for n, s in found.subspaces.items()} == {n: s.k for n, s in chance.subspaces.items()}
    again, other = Channel.random(found, 7), Channel.random(found, 8)
    name = next(iter(found.subspaces))
    assert torch.equal(again[name].basis, chance[name].basis) and not torch.equal(other[name].basis, chance[name].basis)
    inside = chance.energy_inside(base, tuned)
    expected = {n: s.k / s.basis.shape[0] for n, s in chance.subspaces.items()}
    assert sum(map(float, inside.values())) == pytest.approx(sum(expected.values()), rel=0.25)  # type: ignore[arg-type]


def test_a_channel_comes_back_equal_and_a_damaged_one_is_refused(planted, tmp_path: Path) -> None:
    channel = Channel.extract(*planted[:2], 2)
    path = channel.save(tmp_path / "folder")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["channel.safetensors"] == [path.name]
    back = Channel.load(tmp_path / "folder")
    assert (back.side, back.source) == (channel.side, channel.source)
    for name, of in channel.subspaces.items():
        ours, theirs = vars(of), vars(back[name])
        assert torch.equal(ours.pop("basis"), (theirs := dict(theirs)).pop("basis")) and dict(ours) == theirs

    with safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = load_file(path)
    for broken, message in (
        ({**tensors, UP: 2 * tensors[UP]}, "not orthonormal"),
        ({**tensors, UP: tensors[UP] * float("nan")}, "not orthonormal"),
        ({**tensors, UP: tensors[UP][:5].contiguous()}, "shape"),
        ({n: t for n, t in tensors.items() if n != UP}, "UP|not contain|up_proj"),
    ):
        save_file(broken, path, metadata=about)
        with pytest.raises(CheckpointError, match=message):
            Channel.load(path)
    for wrong in (None, {**about, "source": "[" * 100_000}, {**about, "matrices": "[" * 100_000}):
        save_file(tensors, path, metadata=wrong)
        with pytest.raises(CheckpointError, match="not a readable channel"):
            Channel.load(path)
    with pytest.raises(CheckpointError, match=r"no channel .*nowhere"):
        Channel.load(tmp_path / "nowhere")


def test_the_adapter_opens_in_peft_changes_nothing_and_merges(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    channel = Channel.extract(TINY / "base", TINY / "teacher", 0.4)
    assert len({s.k for s in channel.subspaces.values()}) > 2  # ranks differ from matrix to matrix
    frozen = next(iter(channel.subspaces))
    channel.subspaces[frozen] = channel.cut(0)[frozen]
    channel.to_adapter(TINY / "base", tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    before = {n: p.clone() for n, p in plain.named_parameters()}
    ids = torch.arange(2, 22).reshape(2, 10)
    logits = plain(ids).logits
    model = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert torch.equal(model(ids).logits, logits)

    rng, factors = torch.Generator().manual_seed(0), {}
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_A"):
            of = channel[f"{name}.weight"]
            assert torch.equal(module.lora_A["default"].weight, of.basis.T) and module.scaling["default"] == 1
            factors[f"{name}.weight"] = torch.randn(of.matrix.rows, of.k, generator=rng) / 100
            module.lora_B["default"].weight.data.copy_(factors[f"{name}.weight"])
    assert factors.keys() == {s.matrix.name for s in channel.open()}
    merged = dict(model.merge_and_unload().named_parameters())
    for name, weight in before.items():
        expected = weight + factors[name] @ channel[name].basis.T if name in factors else weight
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def test_no_adapter_for_what_it_cannot_hold(planted, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="left channel"):
        Channel.extract(*planted[:2], 2, "left").to_adapter(planted[0], tmp_path / "a")
    with pytest.raises(ConfigError, match="every K of the channel is 0"):
        Channel.extract(*planted[:2], 0).to_adapter(planted[0], tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command_writes_channel_and_adapter_and_says_what_is_inside(tmp_path: Path) -> None:
    done = run_opdgeo("channel", TINY / "base", TINY / "teacher", "-k", 4, "-o", tmp_path / "c")
    assert done.returncode == 0, done.stderr
    channel = Channel.load(tmp_path / "c")
    assert len(channel) == 28 and {s.k for s in channel.subspaces.values()} == {4}
    assert "down_proj" in done.stdout and "energy inside" in done.stdout and done.stderr == ""
    assert json.loads((tmp_path / "c" / "adapter" / "adapter_config.json").read_text())["r"] == 4


def test_the_command_replaces_no_other_updates_channel_in_silence(planted, tmp_path: Path) -> None:
    base, tuned, _ = planted
    other = shutil.copy(tuned, tmp_path / "other.safetensors")
    out = tmp_path / "c"
    channel = partial(run_opdgeo, "channel", base)
    assert channel(tuned, "-k", 2, "-o", out).returncode == 0
    kept = (out / "channel.safetensors").read_bytes()
    refused = channel(other, "-o", out)
    assert refused.returncode == 2 and (out / "channel.safetensors").read_bytes() == kept
    for said in ("another update", str(base), str(tuned), "--overwrite", str(out)):
        assert said in refused.stderr, refused.stderr
    assert channel(tuned, "-k", 3, "-o", out).returncode == 0, "the same pair goes on"
    assert (out / "adapter").exists() and Channel.load(out)[UP].k == 3
    assert channel(other, "--side", "left", "-o", out, "--overwrite").returncode == 0
    assert Channel.load(out).source["tuned"] == str(other)
    assert not (out / "adapter").exists(), "the adapter of the channel before is none of this one"
    for name in ("run.json", "log.jsonl"):
        measured = tmp_path / name.partition(".")[0]
        measured.mkdir()
        (measured / name).write_text("{}")
        refused = channel(tuned, "-o", measured, "--overwrite")
        assert refused.returncode == 2 and "another folder" in refused.stderr
        assert [p.name for p in measured.iterdir()] == [name]
    (tmp_path / "file").write_text("mine")
    refused = channel(tuned, "-o", tmp_path / "file")
    assert refused.returncode == 2 and "is a file" in refused.stderr, refused.stderr
    assert channel(tuned, "-o", tmp_path / "one.safetensors").returncode == 0

"""PEFT adapters: whatever the merged checkpoint measures, the adapter on its base measures too, from its factors.

The peft library writes and merges every adapter here, in float64, so that merging itself costs no digit.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import torch.distributed.checkpoint
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import opdgeo
from opdgeo import checkpoints
from opdgeo.checkpoints import open_checkpoint
from opdgeo.checkpoints.adapter import Adapter
from opdgeo.errors import CheckpointError, PairingError
from opdgeo.survey import engines
from opdgeo.survey.request import Request
from opdgeo.survey.run import plan_text
from program import run_opdgeo

SETTINGS = opdgeo.Settings(rank=16, top_k=6, mask_rank=8, nulls=0)
SIZES: dict[str, Any] = dict(
    vocab_size=32, max_position_embeddings=32, pad_token_id=0, eos_token_id=1, bos_token_id=None
)
DENSE = dict(
    hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **SIZES
)
MODELS = {
    "qwen3": lambda: transformers.Qwen3Config(head_dim=12, **DENSE),
    "phi3": lambda: transformers.Phi3Config(**DENSE),
    "gpt2": lambda: transformers.GPT2Config(n_embd=48, n_layer=2, n_head=4, **SIZES),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        head_dim=12, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=20, **DENSE
    ),
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen3", dict(r=8, lora_alpha=12, target_modules="all-linear")),
    "rank below top-k": ("qwen3", dict(r=3, target_modules=["q_proj", "up_proj"])),
    "rank above the matrix": ("qwen3", dict(r=60, target_modules=["k_proj", "up_proj"])),
    "rslora, patterns": (
        "qwen3",
        dict(
            r=8, use_rslora=True, target_modules=ATTENTION, rank_pattern={"k_proj": 4, "layers.1.self_attn.q_proj": 6},
            alpha_pattern={"layers.1.*o_proj": 3, "v_proj": 24},
        ),
    ),
    "dora": ("qwen3", dict(r=4, use_dora=True, target_modules=[*ATTENTION, "down_proj"])),
    "whole modules, biases, layers": (
        "qwen3",
        dict(r=4, target_modules=ATTENTION, modules_to_save=["down_proj", "lm_head"], layers_to_transform=[1], bias="all"),
    ),
    "fused": ("phi3", dict(r=4, target_modules=["qkv_proj", "gate_up_proj", "down_proj"])),
    "fused dora": ("phi3", dict(r=4, use_dora=True, target_modules=["qkv_proj", "gate_up_proj"])),
    "conv1d": ("gpt2", dict(r=4, target_modules=["c_attn", "c_proj", "c_fc"])),
    "conv1d dora": ("gpt2", dict(r=4, use_dora=True, target_modules=["c_attn", "attn.c_proj"])),
    "experts": (
        "qwen3_moe",
        dict(
            r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            rank_pattern={"experts.down_proj": 3}, alpha_pattern={"experts.gate_up_proj": 5},
        ),
    ),
}  # fmt: skip


def base_model(folder: Path, family: str) -> Path:
    """A random model of the family, saved in bf16."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[family]()).bfloat16()
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, folder: Path, steps: int = 1, **config: Any) -> tuple[Path, Path]:
    """A random adapter of the base and the merged checkpoint, both written by peft."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    tuned = get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config))
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in (p for p in tuned.parameters() if p.requires_grad):
            weights.mul_(1 + 0.1 * torch.randn(weights.shape, generator=rng, dtype=weights.dtype))
    tuned.save_pretrained(folder / "adapter")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return folder / "adapter", folder / "merged"


def assert_equal(found: pl.DataFrame, expected: pl.DataFrame, tolerance: float = 1e-6, *, exact: bool = True) -> None:
    """The same rows, and values within `tolerance` of one another, relative to them or as shares of 1.

    Where the merged weights are `exact` to float64, also within the errors that both rows state.
    """
    keys = ["matrix", "diagnostic", "variant"]
    both = found.join(expected, on=keys, how="full", suffix="_merged")
    assert both.height == found.height == expected.height
    for row in both.iter_rows(named=True):
        key = tuple(row[k] for k in keys)
        assert row["status"] == row["status_merged"], (key, row)
        assert (row["rows"], row["cols"], row["role"]) == (row["rows_merged"], row["cols_merged"], row["role_merged"])
        if row["value"] is None:
            # Beyond its rank an update in factors has a gap that vanishes, a merged one the rounding of the file.
            why = {row["reason"], row["reason_merged"]}
            assert row["value_merged"] is None, (key, row)
            assert len(why) == 1 or all("determined" in reason for reason in why), (key, row)
            continue
        share = 1.0 if key[1] in ("principal_energy", "mask_overlap", "update_sparsity", "subspace_similarity") else 0.0
        apart = abs(row["value"] - row["value_merged"])
        assert apart <= tolerance * max(abs(row["value_merged"]), share), (key, row)
        assert not exact or apart <= row["error"] + row["error_merged"] + 1e-15, (key, row)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: base_model(tmp_path_factory.mktemp(family) / family, family) for family in MODELS}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_measures_what_its_merged_checkpoint_does(case: str, bases: dict[str, Path], tmp_path: Path) -> None:
    family, config = CASES[case]
    adapter, merged = adapted(bases[family], tmp_path, **config)
    found = opdgeo.compare(bases[family], adapter, settings=SETTINGS)
    expected = opdgeo.compare(bases[family], merged, settings=SETTINGS)
    assert_equal(found.measurements, expected.measurements)
    moved = found.measurements.filter((pl.col("diagnostic") == "operator_norm") & (pl.col("value") > 0))
    methods = {"dora": {"svdvals"}, "whole": {"factors", "svdvals"}}
    assert set(moved["method"]) == next((m for word, m in methods.items() if word in case), {"factors"})
    norms = found.measurements.filter((pl.col("diagnostic") == "frobenius_norm") & (pl.col("value") > 0))
    assert [m == "factors" for m in norms["method"]] == [m == "factors" for m in moved["method"]]


@pytest.fixture(scope="module")
def pair(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A base, a LoRA of rank 8 in float32 and the merged checkpoint in float32, as people have them."""
    base, folder = bases["qwen3"], tmp_path_factory.mktemp("pair")
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    config = LoraConfig(r=8, init_lora_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, config)
    tuned.save_pretrained(folder / "checkpoint-7")
    tuned.merge_and_unload().save_pretrained(folder / "merged")
    return base, folder / "checkpoint-7", folder / "merged"


def copied(adapter: Path, folder: Path, **config: Any) -> Path:
    """A copy of an adapter with other entries in its config."""
    shutil.copytree(adapter, folder)
    known = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(known | config))
    return folder


def test_the_command_line_reads_an_adapter(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, merged = pair
    other = copied(adapter, tmp_path / "checkpoint-7", base_model_name_or_path="someone/else")
    options = ["--rank", 16, "--top-k", 6, "--mask-rank", 8, "--no-report", "--nulls", 2]
    done = run_opdgeo("compare", base, other, "-o", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    assert "note: the adapter names someone/else as its base" in done.stdout
    found = pl.read_parquet(tmp_path / "out" / "measurements.parquet")
    expected = opdgeo.compare(base, merged, settings=replace(SETTINGS, nulls=2)).measurements
    assert_equal(found, expected, exact=False)
    assert found["step"].unique().to_list() == [7]
    # The draws of a null are seeded by the checkpoint's name.
    drawn = found["null_mean"].is_not_null()
    assert drawn.equals(expected["null_mean"].is_not_null()) and drawn.mean() > 0.8
    run = json.loads((tmp_path / "out" / "run.json").read_text())["checkpoints"][0]
    assert run["format"] == "peft" and run["dtypes"] == {"float32": 28}
    assert [f["name"] for f in run["files"]] == ["adapter_config.json", "adapter_model.safetensors"]
    plan = plan_text(Request.of_update(base, other))
    assert "14 matrices" in plan and "note: the adapter names someone/else" in plan


def test_a_killed_run_goes_on_and_another_scale_is_another_run(
    pair: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter, _ = pair
    measured: list[str] = []
    original = engines.measure

    def counted(job, matrix, *arguments):  # type: ignore[no-untyped-def]
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(matrix.name)
        return original(job, matrix, *arguments)

    monkeypatch.setattr(engines, "measure", counted)
    mine = copied(adapter, tmp_path / "adapter")
    with pytest.raises(KeyboardInterrupt):
        opdgeo.compare(base, mine, settings=SETTINGS, workers=1, out=tmp_path / "out")
    measured.clear()
    resumed = opdgeo.compare(base, mine, settings=SETTINGS, workers=1, out=tmp_path / "out")
    assert len(measured) == 14 - 9
    monkeypatch.undo()
    assert resumed.measurements.equals(opdgeo.compare(base, mine, settings=SETTINGS, workers=2).measurements)
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 4 * config["lora_alpha"]}))
    louder = opdgeo.compare(base, mine, settings=SETTINGS, out=tmp_path / "out")
    norms = [r.measurements.filter(diagnostic="frobenius_norm")["value"] for r in (resumed, louder)]
    assert ((norms[1] / norms[0] - 4).abs() < 1e-9).all()


def test_a_run_of_adapters_is_tracked(bases: dict[str, Path], tmp_path: Path) -> None:
    """The transformers Trainer writes checkpoint-N folders, peft the last adapter beside them."""
    torch.manual_seed(3)
    model = get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.float32),
        LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"),
    )
    rows = [{"input_ids": [i % 32] * 8, "labels": [i % 32] * 8} for i in range(24)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=3, save_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[],
        use_cpu=True, disable_tqdm=True, save_only_model=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    merged = []
    for step in (1, 2, 3):
        plain = transformers.AutoModelForCausalLM.from_pretrained(bases["qwen3"], dtype=torch.float64)
        whole = PeftModel.from_pretrained(plain, tmp_path / "run" / f"checkpoint-{step}").merge_and_unload()
        whole.save_pretrained(tmp_path / "merged" / f"step-{step}")
        merged.append(tmp_path / "merged" / f"step-{step}")
    # Of rank 4 and less, so top-k is 2: a third singular value may be rounding in the merged file.
    settings = opdgeo.Settings(rank=16, top_k=2, mask_rank=8, nulls=0)
    found = opdgeo.track(bases["qwen3"], tmp_path / "run", settings=settings)
    assert found.measurements["step"].unique().sort().to_list() == [1, 2, 3]
    expected = opdgeo.track(bases["qwen3"], merged, settings=settings)
    for step in (1, 2, 3):
        both = (r.measurements.filter(step=step) for r in (found, expected))
        assert_equal(*both)
    similar = found.measurements.filter(diagnostic="subspace_similarity", step=1, status="computed")["value"]
    assert 0.01 < similar.min() < 0.999
    assert found.measurements.filter(diagnostic="stable_rank", step=3)["method"].unique().sort().to_list() == [
        "",
        "factors",
    ]


def test_experts_one_by_one_or_stacked_are_the_same(bases: dict[str, Path], tmp_path: Path) -> None:
    """Base and adapter may each keep experts either way; peft for transformers 4 wrote a module for every expert."""
    base = bases["qwen3_moe"]
    adapter, _ = adapted(base, tmp_path, r=2, target_parameters=["mlp.experts.down_proj"], target_modules=[])
    expected = opdgeo.compare(base, adapter, roles="down_proj", settings=SETTINGS)
    assert expected.measurements.filter(pl.col("value") > 0, diagnostic="frobenius_norm").height == 2 * 3

    factors, single = load_file(adapter / "adapter_model.safetensors"), {}
    for name, factor in factors.items():
        module, part = name.split(".lora_")
        for expert in range(3):
            one = factor.reshape(3, 2, -1)[expert] if part[0] == "A" else factor.reshape(-1, 2, 3)[:, :, expert]
            single[f"{module}.{expert}.down_proj.lora_{part}"] = one.contiguous()
    alone = copied(adapter, tmp_path / "alone", target_parameters=None, target_modules=["down_proj"])
    save_file(single, alone / "adapter_model.safetensors")

    stacked = tmp_path / "stacked"
    stacked.mkdir()
    shutil.copy(base / "config.json", stacked)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    weights = {n: w for n, w in model.state_dict().items() if n != "lm_head.weight"}
    assert weights["model.layers.0.mlp.experts.down_proj"].shape == (3, 48, 20)
    save_file(weights, stacked / "model.safetensors", metadata={"format": "pt"})

    gaps = shutil.copytree(base, tmp_path / "gaps")
    kept = load_file(base / "model.safetensors")
    kept = {n.replace(".experts.2.", ".experts.7."): w for n, w in kept.items()}
    save_file(kept, gaps / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks some; expected all, numbered from 0"):
        opdgeo.compare(gaps, adapter, roles="down_proj", settings=SETTINGS)

    for before, after in ((base, alone), (stacked, adapter), (stacked, alone)):
        found = opdgeo.compare(before, after, roles="down_proj", settings=SETTINGS)
        assert_equal(found.measurements, expected.measurements, 0.0)


def test_torch_files_are_read_and_code_in_them_is_not_run(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = pair
    old = copied(adapter, tmp_path / "checkpoint-7")
    (old / "adapter_model.safetensors").unlink()
    torch.save(load_file(adapter / "adapter_model.safetensors"), old / "adapter_model.bin")
    found, expected = (opdgeo.compare(base, a, settings=SETTINGS, roles="q_proj") for a in (old, adapter))
    assert found.measurements.equals(expected.measurements)
    spared = tmp_path / "spared"
    spared.write_text("here")

    class Remove:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.unlink, (spared,)

    (old / "adapter_model.bin").write_bytes(pickle.dumps(Remove()))
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin"):
        opdgeo.compare(base, old)
    assert spared.exists()


def without(part: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if part not in n}, file)

    return change


REFUSALS: dict[str, tuple[dict[str, Any], Callable[[Path], None], str]] = {
    "another type": ({"peft_type": "IA3"}, lambda _: None, "IA3.*reads LORA.*merge_and_unload"),
    "no type": ({"peft_type": None}, lambda _: None, "type None"),
    "another variant": ({"kasa_config": {"beta": 1}}, lambda _: None, "kasa_config"),
    "a changed base": ({"init_lora_weights": "pissa_niter_4"}, lambda _: None, "pissa.*conversion"),
    "another rank": ({"r": 3}, lambda _: None, "rank 8 and 8.*says 3"),
    "no rank": ({"r": None}, lambda _: None, "no usable r "),
    "a broken pattern": ({"rank_pattern": {"(": 2}}, lambda _: None, "rank_pattern"),
    "half an adapter": ({}, without("layers.1.mlp.up_proj.lora_B"), "no lora_B for model.layers.1.mlp.up_proj"),
    "no magnitudes": ({"use_dora": True}, lambda _: None, "lora_magnitude_vector"),
    "no weights": ({}, lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.bin"),
    "damaged": ({}, lambda f: (f / "adapter_model.safetensors").write_bytes(b"x" * 40), "not a readable"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_read_is_refused(case: str, pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    config, change, expected = REFUSALS[case]
    adapter = copied(pair[1], tmp_path / "adapter", **config)
    change(adapter)
    with pytest.raises(CheckpointError, match=expected):
        opdgeo.compare(pair[0], adapter)


def test_factors_of_a_tensor_that_is_there_whole_in_another_shape_are_refused(
    pair: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    base, adapter, _ = pair
    shutil.copytree(adapter, tmp_path / "adapter")
    held = load_file(adapter / "adapter_model.safetensors")
    module = next(key for key in held if key.endswith(".lora_A.weight")).removesuffix(".lora_A.weight")
    rows, cols = held[f"{module}.lora_B.weight"].shape[0], held[f"{module}.lora_A.weight"].shape[1]
    whole = module.removeprefix("base_model.model.") + ".weight"
    save_file(held | {whole: torch.zeros(rows + 1, cols)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="and the tensor itself as"):
        open_checkpoint(tmp_path / "adapter", open_checkpoint(base))


def test_an_adapter_needs_the_base_it_was_made_for(pair: tuple[Path, Path, Path], bases: dict[str, Path]) -> None:
    base, adapter, _ = pair
    with pytest.raises(CheckpointError, match=r"without its base.*BASE ADAPTER"):
        opdgeo.open_checkpoint(adapter)
    with pytest.raises(PairingError, match=r"down_proj.*has no such weights"):
        opdgeo.compare(bases["gpt2"], adapter)
    wider = transformers.Qwen3Config(**DENSE | {"hidden_size": 40}, head_dim=12)
    folder = base.parent / "wider"
    transformers.AutoModelForCausalLM.from_config(wider).save_pretrained(folder)
    with pytest.raises(PairingError, match=r"= \(48, 80\), which is \(40, 80\)"):
        opdgeo.compare(folder, adapter)


def test_a_broken_factor_skips_its_matrix(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = pair
    broken = copied(adapter, tmp_path / "broken")
    factors = load_file(broken / "adapter_model.safetensors")
    factors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"][3, 2] = float("nan")
    save_file(factors, broken / "adapter_model.safetensors")
    result = opdgeo.compare(base, broken, roles="q_proj", settings=SETTINGS)
    assert result.skipped == ["model.layers.0.self_attn.q_proj.weight"]


def test_every_entry_of_an_adapter_reads_as_merged(pair: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = pair
    opened = opdgeo.open_checkpoint(base)
    tuned, whole = open_checkpoint(adapter, opened), opdgeo.open_checkpoint(merged)
    for matrix in checkpoints.pair(opened, tuned).matrices:
        found, factors = tuned.read(matrix), tuned.factors(matrix)
        assert factors is not None
        left, right = factors
        assert torch.equal(found, opened.read(matrix).double().addmm(left, right.T))
        # One rounding of the sum to float32 and a few of the product.
        torch.testing.assert_close(found, whole.read(matrix).double(), rtol=2e-6, atol=1e-8)


def test_what_else_lies_in_the_folder(pair: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Beside a whole model an adapter is not what was asked for; beside a trainer's sharded state it is."""
    base, adapter, merged = pair
    opened = opdgeo.open_checkpoint(base)
    both = copied(adapter, tmp_path / "both")
    shutil.copy(merged / "model.safetensors", both)
    assert type(open_checkpoint(both, opened)) is checkpoints.Checkpoint
    trained = copied(adapter, tmp_path / "trained")
    factors = load_file(adapter / "adapter_model.safetensors")
    torch.distributed.checkpoint.save(factors, checkpoint_id=trained / "pytorch_model_fsdp_0", no_dist=True)
    assert type(open_checkpoint(trained, opened)) is Adapter


def test_a_channel_of_an_adapter_is_that_of_the_merged_checkpoint(pair: tuple[Path, Path, Path]) -> None:
    base, adapter, merged = pair
    mine, theirs = (opdgeo.Channel.extract(base, tuned, k=4, side="left") for tuned in (adapter, merged))
    assert max(float(angles.max()) for angles in mine.compare(theirs).values()) < 0.01
    for outside in (mine.energy_outside(base, adapter), theirs.energy_outside(base, merged)):
        for name, share in mine.energy_outside(base, merged).items():
            assert share is not None and share == pytest.approx(outside[name], rel=1e-5)

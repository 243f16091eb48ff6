"""The live monitor on real TRL: its numbers are those of `track` on the saved checkpoints, in one process and in two."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import monitor_worker
import opdgeo
from opdgeo import Channel, GeometryMonitor
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from program import launch


def check_against_track(facts: dict[str, Any], origin: Path, out: Path) -> None:
    """Every number of the monitor within 1e-4 of `track`'s."""
    table = opdgeo.track(origin, out, settings=Settings(nulls=0), cache=False).measurements
    tracked = {(r["step"], r["matrix"], r["diagnostic"], r["variant"]): r["value"] for r in table.to_dicts()}
    for step in (4, 6):  # the similarity to the first is that of the first to a last
        pair = [out / "checkpoint-2", out / f"checkpoint-{step}"]
        rows = opdgeo.track(origin, pair, settings=Settings(nulls=0), cache=False).measurements
        first = rows.filter(step=2, diagnostic="subspace_similarity", variant="final.16").to_dicts()
        tracked |= {(step, r["matrix"], "subspace_similarity", "first.16"): r["value"] for r in first}
    seen = 0
    for row in facts["rows"]:
        key = row["step"], row["matrix"], row["diagnostic"], row["variant"]
        assert row["value"] == pytest.approx(tracked[key], rel=1e-4, abs=1e-5), key
        seen += 1
    assert seen == 6 * (3 * 8 + 2 * 2)  # six matrices, three steps, eight values; two similarities from the second on
    steps = [row for row in facts["reported"] if "geometry/norm" in row]
    assert [row["step"] for row in steps] == [2, 4, 6]
    assert "loss" in steps[0] and "geometry/similarity_first" in steps[1]
    ranks = [r["value"] for r in facts["rows"] if r["step"] == 6 and r["diagnostic"] == "stable_rank"]
    assert steps[2]["geometry/stable_rank"] == pytest.approx(sum(ranks) / 6)
    shares = [r["value"] for r in facts["rows"] if r["step"] == 6 and r["variant"] == "bf16_eta"]
    assert steps[2]["geometry/visible"] == pytest.approx(1 - sum(shares) / 6)
    logged = {row["step"]: row for row in facts["history"] if "geometry/norm" in row}
    assert logged.keys() == {2, 4, 6} and logged[4]["geometry/norm"] == steps[1]["geometry/norm"]


@pytest.fixture(scope="module")
def alone(origin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("monitored")
    monitor_worker.main(origin, out)
    return out


def test_one_process(alone: Path, origin: Path) -> None:
    facts = json.loads((alone / "facts-0.json").read_text())
    assert facts["held"] == facts["whole"]
    check_against_track(facts, origin, alone)
    similar = [row["geometry/similarity_first"] for row in facts["reported"] if "geometry/similarity_first" in row]
    last = next(row for row in facts["reported"] if row["step"] == 6)
    assert min(similar[1], last["geometry/similarity_previous"]) > 0.8 and last["geometry/locked_since"] == 2


def test_two_processes_with_sharded_rows(origin: Path, alone: Path, tmp_path: Path) -> None:
    launch("fsdp2", 2, monitor_worker.__file__, origin, tmp_path)
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0]["rows"] == facts[1]["rows"]  # both take the same decisions
    assert facts[0]["parameters"] == "DTensor"
    assert facts[0]["held"] * 2 == facts[0]["whole"]  # W₀ is kept in halves
    check_against_track(facts[0], origin, tmp_path)
    assert (
        facts[0]["sharded"]["sigma"] <= 1e-9
        and facts[0]["sharded"]["angle"] <= 2e-5
        and facts[0]["sharded"]["onto"] <= 1e-12
    )


def test_rules_stop_and_warn(origin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reporter = monitor_worker.Reporter()
    watched = monitor_worker.trainer(origin, tmp_path, reporter, save_strategy="no")
    random = Channel.random(Channel.extract(origin, origin_like(origin, tmp_path), k=4), seed=0)
    watched.add_callback(
        GeometryMonitor(
            every=1, watch=2, channel=random, stop="geometry/outside > 0.2", alert=lambda row: "loss" in row
        )
    )
    with caplog.at_level(logging.WARNING):
        watched.train()
    assert watched.state.global_step == 1  # nearly all of the update lies outside a random channel
    assert 0.5 < reporter.rows[0]["geometry/outside"] <= 1
    assert "geometry/outside > 0.2 holds, so training stops" in caplog.text and "<lambda> holds" in caplog.text


def origin_like(origin: Path, folder: Path) -> Path:
    """The model, moved a little."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(folder / "moved")
    return folder / "moved"


def test_a_resumed_run_measures_from_its_origin(alone: Path, origin: Path, tmp_path: Path) -> None:
    monitor = GeometryMonitor(every=2, watch=6)
    watched = monitor_worker.trainer(origin, tmp_path, monitor_worker.Reporter(), save_only_model=False, max_steps=2)
    watched.add_callback(GeometryMonitor(every=2, watch=6))
    watched.train()
    watched = monitor_worker.trainer(origin, tmp_path, monitor_worker.Reporter(), save_only_model=False, max_steps=4)
    watched.add_callback(monitor)
    watched.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    tracked = opdgeo.compare(origin, tmp_path / "checkpoint-4", settings=Settings(nulls=0), cache=False).measurements
    norms = {r["matrix"]: r["value"] for r in tracked.filter(diagnostic="frobenius_norm").to_dicts()}
    found = {r["matrix"]: r["value"] for r in monitor.rows if r["diagnostic"] == "frobenius_norm"}
    assert len(found) == 6 and all(math.isclose(norms[m], v, rel_tol=1e-6) for m, v in found.items())
    similar = {r["matrix"]: r["value"] for r in monitor.rows if r["variant"] == "first.16"}
    rows = opdgeo.track(origin, tmp_path, settings=Settings(nulls=0), cache=False).measurements
    earlier = rows.filter(step=2, diagnostic="subspace_similarity", variant="final.16").to_dicts()
    assert len(similar) == 6  # the channel of step 2 outlived the interruption
    assert all(r["value"] == pytest.approx(similar.get(r["matrix"], r["value"]), rel=1e-4) for r in earlier)
    lost = GeometryMonitor(base=tmp_path / "nowhere")
    watched = monitor_worker.trainer(origin, tmp_path / "other", monitor_worker.Reporter())
    watched.add_callback(lost)
    with pytest.raises(ConfigError, match="nowhere"):
        watched.train()


def test_a_lora_layer_is_measured_merged(origin: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    watched = monitor_worker.trainer(origin, tmp_path, monitor_worker.Reporter(), peft_config=lora, save_strategy="no")
    names = ["model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"]
    monitor = GeometryMonitor(every=6, watch=names)
    watched.add_callback(monitor)
    watched.train()
    watched.model.merge_and_unload().save_pretrained(tmp_path / "merged")
    tracked = opdgeo.compare(origin, tmp_path / "merged", settings=Settings(nulls=0), cache=False).measurements
    for diagnostic in ("frobenius_norm", "stable_rank"):
        expected = {r["matrix"]: r["value"] for r in tracked.filter(diagnostic=diagnostic).to_dicts()}
        found = {r["matrix"]: r["value"] for r in monitor.rows if r["diagnostic"] == diagnostic}
        assert found == pytest.approx({name: expected[name] for name in names}, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"lock": 2.0}, r"lock is 2\.0"),
        ({"stop": "outside is large"}, "cannot be read; expected a name of the log"),
        ({"stop": "channel/outside > much"}, "cannot be read"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeometryMonitor(**arguments)

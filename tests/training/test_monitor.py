"""The live monitor on real TRL: its numbers are those of `track` on the saved checkpoints, in one process and in two."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerControl, TrainerState

import monitor_worker
import opdgeo
from opdgeo import Channel, GeometryMonitor
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from opdgeo.numerics import nulls, perturbed
from opdgeo.training import monitor
from program import launch


def check_against_track(facts: dict[str, Any], origin: Path, out: Path, draws: int = 0) -> None:
    """Every number of the monitor within 1e-4 of `track`'s, and with `draws` every null; that of a walk within the error of its draws."""
    table = opdgeo.track(origin, out, settings=Settings(nulls=draws), cache=False).measurements
    tracked = {(r["step"], r["matrix"], r["diagnostic"], r["variant"]): r["value"] for r in table.to_dicts()}
    nulls = {(r["step"], r["matrix"], r["diagnostic"], r["variant"]): r["null_mean"] for r in table.to_dicts()}
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
        if draws and row["diagnostic"] not in ("frobenius_norm", "relative_norm") and row["variant"] in nulls:
            drawn = row["diagnostic"] == "subspace_similarity"
            assert row["null_mean"] == pytest.approx(nulls[key], rel=1e-4, abs=0.03 if drawn else 0.0), key
    assert seen == 6 * (3 * 8 + 2 * 2)  # six matrices, three steps, eight values; two similarities from the second on
    steps = [row for row in facts["reported"] if "geometry/norm" in row]
    assert [row["step"] for row in steps] == [2, 4, 6]
    assert "loss" in steps[0] and "geometry/similarity_first" in steps[1]
    ranks = [r["value"] for r in facts["rows"] if r["step"] == 6 and r["diagnostic"] == "stable_rank"]
    assert steps[2]["geometry/stable_rank"] == pytest.approx(sum(ranks) / 6)
    for column, name in (("value", "visible"), ("null_mean", "visible_null")):
        shares = [r[column] for r in facts["rows"] if r["step"] == 6 and r["variant"] == "bf16_eta"]
        assert steps[2][f"geometry/{name}"] == pytest.approx(1 - sum(shares) / 6)
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
    check_against_track(facts, origin, alone, draws=1)
    similar = [row["geometry/similarity_first"] for row in facts["reported"] if "geometry/similarity_first" in row]
    last = next(row for row in facts["reported"] if row["step"] == 6)
    assert min(similar[1], last["geometry/similarity_previous"]) > 0.8 and last["geometry/locked_since"] == 2
    assert 0.3 < last["geometry/similarity_previous_null"] < last["geometry/similarity_previous"]
    assert last["geometry/stable_rank_null"] > 2 * last["geometry/stable_rank"]
    assert last.get("geometry/locked_since_null") != 2  # a walk with these increments is not there yet


def test_two_processes_with_sharded_rows(origin: Path, alone: Path, tmp_path: Path) -> None:
    launch("fsdp2", 2, monitor_worker.__file__, origin, tmp_path)
    facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in (0, 1)]
    assert facts[0]["rows"] == facts[1]["rows"]  # both take the same decisions
    assert facts[0]["parameters"] == "DTensor"
    assert facts[0]["held"] * 2 == facts[0]["whole"]  # W₀ is kept in halves
    check_against_track(facts[0], origin, tmp_path)
    nulls = [
        [r["null_mean"] for r in of["rows"]] for of in (facts[0], json.loads((alone / "facts-0.json").read_text()))
    ]
    assert all(a == b if a is None else a == pytest.approx(b, rel=0.01) for a, b in zip(*nulls, strict=True))
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


def test_a_rule_that_cannot_be_decided_is_told_as_training_begins(
    origin: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = AutoModelForCausalLM.from_pretrained(origin)
    begin = partial(GeometryMonitor.on_train_begin, args=None, state=TrainerState(), control=TrainerControl())
    channel = Channel.extract(origin, origin_like(origin, tmp_path), k=1, roles="q_proj")
    rule = "geometry/outside > 0.2"
    with pytest.raises(ConfigError, match="no watched matrix is in the channel"):
        watch = ["model.layers.0.mlp.down_proj.weight"]
        begin(GeometryMonitor(watch=watch, channel=channel, stop=rule), model=model)
    with pytest.raises(ConfigError, match="no matrix that it can read"):
        begin(GeometryMonitor(alert="geometry/stable_rank < 2"), model=torch.nn.Linear(2, 2))
    begin(GeometryMonitor(channel=channel, stop=rule, watch=14), model=model)
    monitor = GeometryMonitor(stop="outside > 0.2", alert="eval_loss > 2")
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            monitor.on_log(None, TrainerState(global_step=step), TrainerControl(), logs={"loss": 1.0})
    (said,) = caplog.messages  # once, and no word of what comes with an evaluation
    assert "step 1: outside > 0.2 asks for what this log row lacks. Did you mean geometry/outside?" in said


def origin_like(origin: Path, folder: Path) -> Path:
    """The model, moved a little."""
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
    chances = {r["matrix"]: r["null_mean"] for r in monitor.rows if r["variant"] == "first.16"}
    rows = opdgeo.track(origin, tmp_path, settings=Settings(nulls=1), cache=False).measurements
    earlier = rows.filter(step=2, diagnostic="subspace_similarity", variant="final.16").to_dicts()
    assert len(similar) == 6  # the channel of step 2 outlived the interruption
    assert all(r["value"] == pytest.approx(similar.get(r["matrix"], r["value"]), rel=1e-4) for r in earlier)
    assert chances == pytest.approx({r["matrix"]: r["null_mean"] for r in earlier if r["matrix"] in chances}, abs=0.03)
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


def test_what_does_not_change_is_computed_once(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def count(where: Any, name: str) -> None:
        work = getattr(where, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return work(*args, **kwargs)

        monkeypatch.setattr(where, name, counted)

    count(monitor, "truncated_svd")  # of W₀; that of ΔW is called elsewhere
    count(monitor, "_pair")
    count(nulls.Magnitudes, "count")
    count(nulls, "top_singular_values")
    count(perturbed.Noise, "similarity")
    for kept in (nulls.own_singular_values, perturbed.walk_node):
        kept.cache_clear()

    def measured(times: int) -> list[Counter[str]]:
        model = AutoModelForCausalLM.from_pretrained(origin, dtype=torch.bfloat16).float()
        watch, rng, found = GeometryMonitor(watch=3), torch.Generator().manual_seed(0), []
        watch.on_train_begin(None, TrainerState(), TrainerControl(), model=model)  # type: ignore[arg-type]
        for step in range(times):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=rng))
            before = calls.copy()
            assert watch.measure(step)["geometry/visible_null"] > 0
            found.append(calls - before)
        return found

    first, *later = measured(4)
    shapes = first["top_singular_values"]
    assert first == {"truncated_svd": 3, "count": 3, "top_singular_values": shapes} and 0 < shapes <= 3
    for earlier, of in enumerate(later, start=1):
        assert of["_pair"] == 3 * earlier  # each earlier measurement once
        assert of.keys() <= {"_pair", "similarity"}
    assert 0 < calls["similarity"] == perturbed.walk_node.cache_info().misses
    for of in measured(4):  # another run has a W₀ of its own, and the shapes and angles of the first
        assert of.keys() <= {"truncated_svd", "count", "_pair"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"lock": 2.0}, r"lock is 2\.0"),
        ({"stop": "outside is large"}, "cannot be read; expected a name of the log"),
        ({"stop": "channel/outside > much"}, "cannot be read"),
        ({"stop": "geometry/outsid > 0.2"}, r"no log row will have.*Did you mean geometry/outside\?"),
        ({"alert": "geometri/stable_rank < 2"}, r"Did you mean geometry/stable_rank\?"),
        ({"stop": "geometry/norm_null > 2"}, "no log row will have"),
        ({"stop": "geometry/outside > 0.2"}, "only with channel="),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GeometryMonitor(**arguments)


def test_a_measurement_uses_as_many_threads_as_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """SciPy's own threads, one a core, wait for each other by turning where other work has the cores."""
    from threadpoolctl import threadpool_info

    seen: list[set[int]] = []

    def measured(self: GeometryMonitor, step: int) -> dict[str, float]:
        seen.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return {}

    monkeypatch.setattr(GeometryMonitor, "_measure", measured)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        GeometryMonitor().measure(1)
    finally:
        torch.set_num_threads(before)
    assert seen == [{1}]

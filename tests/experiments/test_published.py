"""The published pairs: listed, measured one by one within a budget, gone on from, drawn. On stand-ins of the same names, from a server
of this machine: what the real ones give has to be seen where there is a network."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hub_server import Answer, Hub
from opdgeo.experiments.released import PAIRS, Weights
from opdgeo.report import write_report
from opdgeo.report.published import load
from program import run_opdgeo

FAST = ("--rank", 4, "--top-k", 4, "--mask-rank", 4, "--nulls", 2)
WIDTH, ROLES = 24, ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")
WEIGHTS = len(ROLES) * WIDTH * WIDTH * 2  # bytes of a stand-in's measured weights, in bf16


def stand_in(seed: int, scale: float, start: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.0.{role}.weight" for role in ROLES]
    noise = {name: scale * torch.randn(WIDTH, WIDTH, generator=generator) for name in names}
    noise["model.embed_tokens.weight"] = torch.zeros(64, WIDTH)
    return {name: (value + (start[name].float() if start else 0)).bfloat16() for name, value in noise.items()}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """A stand-in for every model of the list, moved further by SFT than by RLVR."""
    models: dict[str, dict[str, torch.Tensor]] = {}
    for seed, pair in enumerate(PAIRS):
        base = models.setdefault(pair.base, stand_in(seed, 0.02))
        models[pair.tuned] = stand_in(100 + seed, 1e-3 if pair.paradigm == "sft" else 3e-5, base)
    config = json.dumps({"model_type": "qwen3"}).encode()
    with Hub({name: {"config.json": config, "model.safetensors": save(t)} for name, t in models.items()}) as server:
        yield server


def fetched(hub: Hub) -> int:
    return sum(end - first for name in hub.repositories for first, end in hub.ranges(name))


def held(home: Path) -> int:
    """Bytes of weights in the hub's cache of opdgeo."""
    files = (f for f in (home / "opdgeo").rglob("model.safetensors.*") if not f.name.endswith(".header"))
    return sum(f.stat().st_size for f in files)


def test_the_list_gives_names_methods_the_papers_numbers_and_where_the_names_are_from() -> None:
    shown = run_opdgeo("published")
    assert shown.returncode == 0, shown.stderr
    for pair in PAIRS:
        assert f"{pair.base} → {pair.tuned}" in shown.stdout
    assert "not asked for on the hub itself" in shown.stdout
    paper = {"Klear-Reasoner-8B-SFT": 0.6, "UniReason-14B-think-SFT": 18.8, "Klear-Reasoner-8B": 69.9}
    paper |= {"GT-Qwen3-8B-Base": 79.0, "Polaris-4B-Preview": 79.9}  # PAPER §4
    listed = json.loads(run_opdgeo("published", "--json").stdout)["pairs"]
    assert {one["name"]: round(100 * one["unchanged"], 6) for one in listed} == paper
    wrong = run_opdgeo("published", "klear-reasoner-9b", "-o", "out")
    assert wrong.returncode == 2
    assert "Did you mean Klear-Reasoner-8B?" in wrong.stderr


def test_a_list_in_the_results_folder_removes_no_file_of_others(tmp_path: Path) -> None:
    foreign = tmp_path / "models" / "mine"
    foreign.mkdir(parents=True)
    (foreign / "weights").write_bytes(b"mine")
    (foreign / "ranges.jsonl").write_text(json.dumps({"file": "weights", "sha256": "0"}) + "\n")
    (tmp_path / ".fetched.json").write_text(json.dumps([str(foreign)]))
    assert Weights(tmp_path, 1).keep_only(()) == 0
    assert {file.name for file in foreign.iterdir()} == {"weights", "ranges.jsonl"}


def test_all_are_measured_one_by_one_within_the_budget_and_gone_on_from(hub: Hub, tmp_path: Path) -> None:
    env, home, most = hub.environment(tmp_path / "hf"), tmp_path / "hf", [0]

    def watch(answer: Answer) -> None:
        most[0] = max(most[0], held(home))

    hub.bend, limit = watch, 2 * WEIGHTS + 100
    command = ("published", "-o", "out", "--disk", f"{limit / 1e6}MB", "--no-report", *FAST)
    first = run_opdgeo(*command, PAIRS[3].name, cwd=tmp_path, env=env)
    assert first.returncode == 0, first.stderr
    assert fetched(hub) == 2 * WEIGHTS  # the embedding is not measured
    done = run_opdgeo(*command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    # Bases and anchors that the next pair needs are kept where the budget allows it; the pair of before comes from its results.
    assert 2 * WEIGHTS < fetched(hub) <= 2 * len(PAIRS) * WEIGHTS
    assert most[0] <= limit
    assert held(home) == 0
    pairs = load(tmp_path / "out")
    assert [p.facts["name"] for p in pairs] == [p.name for p in PAIRS]
    ours = {p.name: p.value("update_sparsity", "bf16_eta") for p in pairs}
    sft, rlvr = ([ours[p.name] for p in PAIRS if p.paradigm == kind] for kind in ("sft", "rlvr"))
    assert max(v[0] for v in sft if v) < min(v[0] for v in rlvr if v)
    assert all(
        v and v[1] is not None and abs(v[0] - v[1]) < 0.05 for v in ours.values()
    )  # planted: isotropic, so size alone
    write_report(tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    for pair in PAIRS:
        value = ours[pair.name]
        assert value is not None
        assert f'<data value="{pair.unchanged!r}">' in page
        assert f'<data value="{value[0]!r}">' in page
    before = fetched(hub)
    again = run_opdgeo(*command, "--json", cwd=tmp_path, env=env)
    assert again.returncode == 0, again.stderr
    assert fetched(hub) == before
    assert {row["status"] for row in json.loads(again.stdout)["pairs"]} == {"measured"}


def test_a_pair_that_cannot_be_measured_is_passed_over_and_what_was_there_stays(hub: Hub, tmp_path: Path) -> None:
    env, home = hub.environment(tmp_path / "hf"), tmp_path / "hf"
    hub.bend = None
    klear, gt = PAIRS[1], PAIRS[2]
    # The base of one lies in the cache already, from something else.
    own = ("compare", gt.base, gt.base, "--no-report", *FAST, "-o", "own")
    assert run_opdgeo(*own, cwd=tmp_path, env=env).returncode == 0
    small = ("published", "-o", "out", "--no-report", *FAST, klear.name, gt.name, "--disk", f"{1.5 * WEIGHTS / 1e6}MB")
    done = run_opdgeo(*small, cwd=tmp_path, env=env)
    assert done.returncode == 3, done.stderr
    assert f"first {klear.name}: its weights take" in done.stderr  # the other needs one model alone
    rows = {row["name"]: row["status"] for row in json.loads((tmp_path / "out/published.json").read_text())["pairs"]}
    assert rows == {klear.name: "failed", gt.name: "measured"}
    assert held(home) == WEIGHTS
    (tmp_path / "out" / gt.name / "report.html").touch()
    page = write_report(tmp_path / "out").read_text()
    assert "its weights take" in page
    assert f'href="{gt.name}/report.html"' in page
    assert f'href="{klear.name}/report.html"' not in page

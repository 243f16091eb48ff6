"""What a user asks first is answered in words: how early the channel is there, whether the order of the pair makes sense, why a
number is missing; and a saved result comes back."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import opdgeo
import planted
from opdgeo.checkpoints import open_checkpoint
from opdgeo.diagnostics import locking
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.report import write_report
from opdgeo.report.glossary import number
from opdgeo.report.terminal import print_summary
from opdgeo.report.verdict import answers
from opdgeo.survey.kinship import remarks
from program import run_opdgeo
from report_data import write

NAME = planted.tensor_name(0, "mlp.up_proj")
FAST = ("--nulls", 1, "--no-cache")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two runs from it, `opd` of six steps and `rlvr` of one, as `opdgeo train` leaves them."""
    folder = tmp_path_factory.mktemp("answers")
    rng = np.random.default_rng(0)
    base = planted.weights(rng, 80, 64)
    planted.write_checkpoint(folder / "base", {NAME: base}, "float32")
    for run, steps in (("opd", (10, 20, 30, 40, 50, 60)), ("rlvr", (10,))):
        weights = base
        for step in steps:
            weights = weights + 1e-3 * rng.standard_normal(base.shape)
            planted.write_checkpoint(folder / run / f"step-{step:06d}", {NAME: weights}, "float32")
        (folder / run / "config.json").write_text(json.dumps({"arm": run, "origin": str(folder / "base")}))
    return folder


@pytest.fixture(scope="module")
def trajectory(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("trajectory") / "out"
    done = run_opdgeo("track", runs / "base", runs / "opd", "-o", out, *FAST, env={"COLUMNS": "70"})
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def words(text: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", "", text).split())


def test_track_states_its_answer(trajectory: tuple[Path, str]) -> None:
    out, said = trajectory
    summary = json.loads((out / "summary.json").read_text())
    (locked,) = (r for r in summary["locking"] if (r["side"], r["rank"]) == ("right", 16))
    (first,) = (
        r
        for r in summary["checkpoints"][0]["diagnostics"]
        if (r["diagnostic"], r["variant"]) == ("subspace_similarity", "final.16")
    )
    at = locked["thresholds"].index(0.8)

    def since(step: int | None) -> str:
        return "only at the last checkpoint" if step is None else f"from step {step} on"

    expected = (
        f"The final subspace, top 16 right: at step 10, the first checkpoint, {100 * first['mean']:.1f} % of it is there (walk null: "
        f"{100 * first['null']['mean']:.1f} %), and at least 80.0 % {since(locked['step'][at])} (walk null: "
        f"{since(locked['null_step'][at])})."
    )
    assert words(said).startswith(expected), said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert expected in words(page.partition('id="verdict"')[2].partition("<h2>")[0])
    assert page.index('id="early"') < page.index('id="diagnostics"')


def test_a_narrow_update_is_told_by_its_own_directions(tmp_path: Path) -> None:
    """Four planted directions in noise, there from the first step on: twelve of the top 16 are noise."""
    rng = np.random.default_rng(5)
    base = planted.weights(rng, 80, 64)
    planned = rng.standard_normal((80, 4)) @ planted.orthonormal(rng, 64, 4).T
    points = {"base": base}
    for step in range(1, 5):
        points[f"run/step-{step:06d}"] = base + 0.01 * step * planned + 1e-3 * rng.standard_normal(base.shape)
    for name, weights in points.items():
        planted.write_checkpoint(tmp_path / name, {NAME: weights}, "float32")
    summary = opdgeo.track(tmp_path / "base", tmp_path / "run", settings=opdgeo.Settings(nulls=1), cache=False).summary
    text = "".join(p if isinstance(p, str) else number(*p) for p in answers(summary["checkpoints"], summary)[0])
    rows = {(d["diagnostic"], d["variant"]): d for d in summary["checkpoints"][0]["diagnostics"]}
    rank = summary["checkpoints"][-1]["diagnostics"]
    (rank,) = (d["mean"] for d in rank if d["diagnostic"] == "stable_rank")
    narrow, wide = (rows["subspace_similarity", f"final.{k}"]["mean"] for k in (2, 16))
    assert 1.5 < rank < 4 and narrow > 0.95 and wide < 0.8
    assert text.startswith(
        f"The final subspace, top 2 right (the stable rank of the final update is {rank:.2f}): at step 1, the first checkpoint, "
        f"{100 * narrow:.1f} % of it is there (walk null: "
    ), text
    assert ", and at least 80.0 % from step 1 on (walk null: " in text
    assert f" The wider top 16: {100 * wide:.1f} % of it is there (walk null: " in text
    assert "and at least 80.0 % only at the last checkpoint (walk null: " in text and text.count("walk null") == 4


def test_the_rank_that_is_told_is_the_final_updates(tmp_path: Path) -> None:
    """An update of rank 2 on the way to one of rank 4: neither has a top 16, and the reader asks of the final one."""
    rng = np.random.default_rng(6)
    base = planted.weights(rng, 80, 64)
    left, right = rng.standard_normal((80, 4)), planted.orthonormal(rng, 64, 4)
    points = {"base": base}
    for step, rank in ((1, 2), (2, 4)):
        points[f"run/step-{step:06d}"] = base + 0.05 * left[:, :rank] @ right[:, :rank].T
    for name, weights in points.items():
        planted.write_checkpoint(tmp_path / name, {NAME: weights}, "float32")
    summary = opdgeo.track(tmp_path / "base", tmp_path / "run", settings=opdgeo.Settings(nulls=1), cache=False).summary
    text = "".join(p if isinstance(p, str) else number(*p) for p in answers(summary["checkpoints"], summary)[0])
    assert " K = 16: at step-000002, singular value 16 of the update is within the rounding" in text, text
    assert "determined to rank 4 only" in text and "rank 2 only" not in text, text


def test_a_first_checkpoint_that_did_not_move_leaves_an_answer(runs: Path) -> None:
    """The first step of a warm-up has learning rate 0."""
    steps = [runs / "base", *(runs / "opd" / f"step-{step:06d}" for step in (10, 20, 30))]
    result = opdgeo.track(runs / "base", steps, settings=opdgeo.Settings(nulls=1), cache=False)
    said = locking.answer(result.summary["checkpoints"], result.summary["locking"])
    text = "".join(part if isinstance(part, str) else number(*part) for part in said or ())
    assert text.startswith("The final subspace, top 16 right: at checkpoint 2, the first that moved, "), text


def test_every_checkpoint_is_listed_or_said_to_be_left_out(trajectory: tuple[Path, str]) -> None:
    out, said = trajectory
    names = [f"step-{s:06d}" for s in (10, 20, 30, 40, 50, 60)]
    assert all(name in words(said) for name in names)
    assert re.search(r"Not shown, for want of room: step-0000\d0.*has? all 6|have all 6", words(said)), said
    page = words((out / "report.html").read_text(encoding="utf-8"))
    assert f"Checkpoints: {', '.join(names)}; the tables" in page
    assert "–: there is no earlier checkpoint (" in words(said), "the dash is decoded"


def test_a_run_whose_last_checkpoint_is_its_base(runs: Path, tmp_path: Path) -> None:
    base = runs / "opd" / "step-000030"
    result = opdgeo.track(base, runs / "opd", settings=opdgeo.Settings(nulls=1), cache=False)
    assert any("swapped" in r for r in result.run["remarks"]), "BASE's step is later than that of a checkpoint"
    at = open_checkpoint(runs / "opd" / "step-000010"), open_checkpoint(runs / "opd" / "step-000060")
    assert remarks(at[0], [at[1]]) == []
    result = opdgeo.track(runs / "rlvr" / "step-000010", [runs / "base", runs / "rlvr" / "step-000010"], cache=False)
    console = Console(file=io.StringIO(), width=200)
    print_summary(result.summary, console)
    text = words(console.file.getvalue())  # type: ignore[attr-defined]
    assert "the last checkpoint, holds the weights of BASE; earlier checkpoints do not" in text
    assert "The weights did not move" not in text
    page = words(result.report(tmp_path / "out").read_text(encoding="utf-8"))
    assert "The last checkpoint holds the weights of the base" in page and "The weights did not move" not in page
    assert any("look swapped" in r for r in result.run["remarks"])
    assert "look swapped" in page


def test_two_siblings_are_said_to_be_siblings(runs: Path, tmp_path: Path) -> None:
    pair = runs / "opd" / "step-000010", runs / "rlvr" / "step-000010"
    done = run_opdgeo("compare", *pair, "-o", tmp_path / "out", *FAST)
    assert done.returncode == 0, done.stderr
    assert f"were both trained from {runs / 'base'}: what is measured is the difference between the two" in done.stdout
    assert "were both trained from" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    plan = run_opdgeo("compare", *pair, "--plan")
    assert "were both trained from" in plan.stdout
    relate = f"opdgeo relate {runs / 'base'} {pair[0]} {pair[1]}"
    assert relate in words(plan.stdout)
    asked = run_opdgeo(*relate.split()[1:], "-o", tmp_path / "related", "--no-report", "--no-cache")
    assert asked.returncode == 0 and "Cosine" in asked.stdout, asked.stderr
    assert remarks(open_checkpoint(runs / "base"), [open_checkpoint(pair[0])]) == []
    swapped = remarks(open_checkpoint(pair[0]), [open_checkpoint(runs / "base")])
    assert len(swapped) == 1 and "look swapped" in swapped[0]
    back = remarks(open_checkpoint(runs / "opd" / "step-000060"), [open_checkpoint(pair[0])])
    assert back == ["BASE is step 60 and step-000010 step 10 of the same run: they look swapped."]


def test_a_pair_that_does_not_fit_is_told_first(tmp_path: Path) -> None:
    """Another model, fewer layers, a swapped pair without a word in its metadata."""
    rng = np.random.default_rng(1)
    names = [planted.tensor_name(layer, "mlp.up_proj") for layer in range(3)]
    base = {name: planted.weights(rng, 24, 16) for name in names}
    tuned = {name: w + 1e-3 * rng.standard_normal(w.shape) for name, w in base.items()}
    stranger = {name: planted.weights(rng, 24, 16) for name in names}
    half = {name: stranger[name] if name == names[0] else w for name, w in base.items()}
    made = {"base": base, "tuned": tuned, "stranger": stranger, "half": half, "few": {n: base[n] for n in names[:2]}}
    made["run/checkpoint-30"] = tuned
    at = {name: planted.write_checkpoint(tmp_path / name, weights, "float32") for name, weights in made.items()}

    def said(first: str, second: str) -> list[str]:
        settings = opdgeo.Settings(nulls=0, rank=4)
        remarks: list[str] = opdgeo.compare(at[first], at[second], settings=settings, cache=False).run["remarks"]
        return remarks

    assert said("base", "tuned") == []
    assert said("base", "half") == [], "one matrix of three was made anew"
    (other,) = said("stranger", "tuned")
    assert re.match(
        r"BASE and tuned: the difference has 14\d % of the norm of BASE's weights, so the two do not look", other
    )
    (lone,) = said("few", "tuned")
    assert lone.startswith(f"1 of 3 matrices of tuned have no partner in few and are not measured, such as {names[2]}")
    (lone,) = said("tuned", "few")
    assert lone.startswith("1 of 3 matrices of tuned have no partner in few")
    (swapped,) = said("run/checkpoint-30", "base")
    assert "If training started from base, the two are swapped." in swapped
    alone = opdgeo.track(at["base"], [at["run/checkpoint-30"]], settings=opdgeo.Settings(nulls=1), cache=False)
    assert "checkpoint-30 is the only checkpoint, so there is no trajectory" in alone.run["remarks"][0]
    for everything in (False, True):
        console = Console(file=io.StringIO(), width=80)
        print_summary(alone.summary, console, everything=everything, base=str(at["base"]))
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert text.startswith("base → checkpoint-30: 3 of 3 matrices moved")
        assert "to final" not in text and "no earlier checkpoint" not in text


def test_siblings_by_the_name_that_transformers_keeps(runs: Path, tmp_path: Path) -> None:
    opened = []
    for name, origin in (("a", "Qwen/Qwen3-8B-Base"), ("b", "Qwen/Qwen3-8B-Base"), ("c", "other/model")):
        folder = planted.write_checkpoint(tmp_path / name, {NAME: np.eye(4)}, "float32")
        (folder / "config.json").write_text(json.dumps({"_name_or_path": origin}))
        opened.append(open_checkpoint(folder))
    (said,) = remarks(opened[0], [opened[1]])
    assert "both trained from Qwen/Qwen3-8B-Base" in said
    assert remarks(opened[0], [opened[2]]) == []


def test_a_run_in_the_place_of_a_checkpoint(runs: Path) -> None:
    done = run_opdgeo("compare", runs / "base", runs / "opd")
    assert done.returncode == 2 and "is a run and not one checkpoint: it holds 6" in done.stderr, done.stderr
    assert f"opdgeo track BASE {runs / 'opd'}" in done.stderr and "*" not in done.stderr
    with pytest.raises(CheckpointError, match="is a run and not one checkpoint"):
        opdgeo.track(runs / "base", [runs / "opd", runs / "rlvr"])
    with pytest.raises(CheckpointError, match=r"expected .*\(model\.safetensors, adapter.* holds step-000010\.$"):
        open_checkpoint(runs / "rlvr" / "step-000040")


def test_why_a_diagnostic_has_no_value_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = planted.weights(rng, 64, 48)
    planted.write_checkpoint(tmp_path / "base", {NAME: base}, "float32")
    names = ("lora_A", "lora_B")
    from safetensors.numpy import save_file

    (tmp_path / "lora").mkdir()
    shapes = {"lora_A": (3, 48), "lora_B": (64, 3)}
    key = f"base_model.model.{NAME.removesuffix('.weight')}"
    tensors = {f"{key}.{n}.weight": rng.standard_normal(shapes[n]).astype("float32") for n in names}
    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "target_modules": ["up_proj"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(config))
    result = opdgeo.compare(tmp_path / "base", tmp_path / "lora", settings=opdgeo.Settings(nulls=1), cache=False)
    row = result.measurements.filter(diagnostic="hill_exponent").row(0, named=True)
    assert row["status"] == "undefined"
    console = Console(file=io.StringIO(), width=200)
    print_summary(result.summary, console)
    reason = f"Over 0 of 1 matrices: Hill exponent (top 16) ({row['reason']})."
    assert reason in console.file.getvalue()  # type: ignore[attr-defined]
    print_summary(result.summary, console, everything=False)
    assert console.file.getvalue().count(reason) == 2, "in the short table too"  # type: ignore[attr-defined]
    (note,) = result.run["checkpoints"][0]["notes"]
    assert note.startswith("an adapter of rank 3: its updates have no more than 3 directions by construction")


def test_a_summary_without_the_newer_keys_still_prints(tmp_path: Path) -> None:
    steps = [(f"step-{s:06d}", s) for s in (20, 60, 100)]
    out = write(tmp_path / "out", steps, diagnostics=("stable_rank", "subspace_similarity"))
    write_report(out)
    console = Console(file=io.StringIO(), width=100)
    print_summary(out, console)
    assert "The final subspace" in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_saved_result_comes_back(
    trajectory: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = trajectory
    result = opdgeo.load(str(out))
    assert isinstance(result, opdgeo.Result) and result.measurements.equals(
        pl.read_parquet(out / "measurements.parquet")
    )
    printed = str(result).splitlines()
    assert "final subspace" in printed[0] and "stable rank" in str(result).lower()
    assert len(printed) < 60 and max(map(len, printed)) <= 80 and repr(result) == str(result)
    result.save(str(tmp_path / "copy"))
    again = opdgeo.load(tmp_path / "copy")
    assert again.measurements.equals(result.measurements) and again.curves.equals(result.curves)
    assert (again.summary, again.run) == (result.summary, result.run)
    with pytest.raises(ConfigError, match="not a complete results folder"):
        opdgeo.load(tmp_path)
    with pytest.raises(ConfigError, match="nosuch does not exist"):
        opdgeo.load(tmp_path / "nosuch")
    pandas = pytest.importorskip("pandas")
    table: Any = result.to_pandas()
    assert list(table.columns) == result.measurements.columns and len(table) == len(result.measurements)
    assert table["value"].dropna().tolist() == result.measurements["value"].drop_nulls().to_list()
    assert table["value"].isna().sum() == result.measurements["value"].null_count()
    assert str(table["step"].dtype) == "Int64" and isinstance(table, pandas.DataFrame)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        result.to_pandas()

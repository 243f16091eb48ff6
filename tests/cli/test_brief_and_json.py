"""What a terminal of 80 by 25 shows, and what a script reads: the brief table, --all and --json."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import planted
from opdgeo.commands.report import print_again
from program import run_opdgeo

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "result.schema.json").read_text())
HOSTILE = "<b>‮x" + "n" * 120


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base and a run of two steps, the second with a name that no terminal should obey."""
    at, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(3)
    names = [planted.tensor_name(layer, m) for layer in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    weights = {name: planted.weights(rng, 40, 24) for name in names}
    found = {"base": planted.write_checkpoint(at / "base", weights, "float32")}
    for name in ("step-10", "step-20", HOSTILE):
        weights = {n: w + planted.low_rank_update(rng, w, 4, 0.02) for n, w in weights.items()}
        found[name] = planted.write_checkpoint(at / name, weights, "float32")
    return found


def test_everything_is_shown_when_asked_and_again_without_the_checkpoints(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("compare", models["base"], models["step-10"], "--no-report", "--no-cache", "-o", tmp_path / "out")
    brief = run_opdgeo(*command)
    first = json.loads((tmp_path / "out" / "run.json").read_text())
    full = run_opdgeo(*command, "--all")
    run_opdgeo(*command)
    last = json.loads((tmp_path / "out" / "run.json").read_text())
    assert first["earlier"] == [] and sum(first["timings"].values()) > 0 == sum(last["timings"].values())
    (earlier,) = last["earlier"]
    assert earlier == {key: first[key] for key in earlier} and {"command", "seconds", "timings"} <= earlier.keys()
    assert "taken over from an earlier run: every number" in full.stdout
    for shown, everything in ((brief, False), (full, True)):
        print_again(tmp_path / "out", everything=everything)
        table = capsys.readouterr().out
        assert table.startswith("base → step-10: 4 of 4 matrices moved") and table.rstrip("\n") in shown.stdout
    assert "Principal angles (right largest): rank 512 cut to 12: half the smaller side." in " ".join(
        brief.stdout.split()
    )
    assert "bit-equal" not in brief.stdout and "bit-equal" in full.stdout
    assert "excess" in full.stdout and full.stdout.count("\n") > brief.stdout.count("\n")


@pytest.mark.parametrize("command", ["compare", "track", "relate"])
@pytest.mark.parametrize("nulls", ["0", "2"])
def test_json_is_one_object_of_the_published_schema(
    command: str, nulls: str, models: dict[str, Path], tmp_path: Path
) -> None:
    given = [models[n] for n in (["step-10"] if command == "compare" else ["step-10", "step-20", HOSTILE])]
    out = tmp_path / "out"
    done = run_opdgeo(
        command, models["base"], *given, "--json", "--nulls", nulls, "--no-report", "--no-cache", "-o", out
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jsonschema.validate(found, SCHEMA)
    assert found["summary"] == json.loads((out / "summary.json").read_text())
    assert (found["out"], found["report"], found["skipped"]) == (str(out), None, 0)
    assert "pairs" in found["summary"] if command == "relate" else found["summary"]["checkpoints"]


def test_the_schema_refuses_what_is_none_of_it() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    sound = {"format": 1, "out": "o", "report": None, "notes": [], "skipped": 0, "summary": {"checkpoints": []}}
    jsonschema.validate(sound, SCHEMA)
    for wrong in ({"format": 2}, {"skipped": -1}, {"more": 1}, {"summary": {"checkpoints": [{"checkpoint": "x"}]}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(sound | wrong, SCHEMA)


@pytest.mark.parametrize("flags", [(), ("--all",)])
def test_a_checkpoint_of_nan_says_that_nothing_could_be_measured(
    flags: tuple[str, ...], models: dict[str, Path], tmp_path: Path
) -> None:
    names = [planted.tensor_name(layer, m) for layer in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    diverged = planted.write_checkpoint(tmp_path / "nan", {n: np.full((40, 24), np.nan) for n in names}, "float32")
    run = run_opdgeo("compare", models["base"], diverged, "--no-cache", *flags, "-o", tmp_path / "out")
    assert run.returncode == 3
    said = " ".join(run.stdout.split())
    assert said.startswith("base → nan diagnostic") and "moved" not in said
    assert "No matrix could be measured." in said
    assert "Over 0 of 4 matrices: every diagnostic (960 non-finite entries in nan)." in said
    page = (tmp_path / "out" / "report.html").read_text()
    assert "No matrix could be measured." in page and "nothing here separates geometry from size" not in page

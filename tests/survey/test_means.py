"""A mean, its null and its excess are over the same matrices, in every output, whether all matrices moved or a few."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

import opdgeo
import planted
from opdgeo.experiments.claims import judge
from opdgeo.report.terminal import print_summary
from opdgeo.survey.results import _average, _quantiles
from planted_study import PAPER, logs, measurements
from program import run_opdgeo

BASE, TUNED = planted.tiny_pair()
LORA = ("self_attn.q_proj", "self_attn.v_proj")
CASES = {"full": (14, 0), "lora": (4, 10)}  # matrices that moved, and that did not


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`opdgeo compare` of a whole update, or of a LoRA on q and v of both layers."""
    folder = tmp_path_factory.mktemp("means")
    base = planted.write_checkpoint(folder / "base", BASE, "bfloat16")
    if request.param == "full":
        tuned = planted.write_checkpoint(folder / "tuned", TUNED, "bfloat16")
    else:
        tuned = write_lora(folder / "tuned")
    done = run_opdgeo("compare", base, tuned, "-o", folder / "out", "--nulls", 2, "--all", env={"COLUMNS": "160"})
    assert done.returncode == 0, done.stderr
    moved, still = CASES[request.param]
    return {"out": folder / "out", "said": done.stdout, "moved": moved, "still": still}


def write_lora(folder: Path) -> Path:
    folder.mkdir()
    rng = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in (0, 1):
        for module in LORA:
            rows, cols = planted.SHAPES[module]
            name = f"base_model.model.model.layers.{layer}.{module}"
            tensors[f"{name}.lora_A.weight"] = 0.02 * torch.randn(4, cols, generator=rng)
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(rows, 4, generator=rng)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def entries(case: dict[str, Any]) -> list[dict[str, Any]]:
    (checkpoint,) = json.loads((case["out"] / "summary.json").read_text())["checkpoints"]
    assert checkpoint["unmoved"] == case["still"]
    found: list[dict[str, Any]] = checkpoint["diagnostics"]
    return found


def test_summary_json(case: dict[str, Any]) -> None:
    table = pl.read_parquet(case["out"] / "measurements.parquet").with_columns(n=pl.col("rows") * pl.col("cols"))
    for entry in entries(case):
        rows = table.filter(diagnostic=entry["diagnostic"], variant=entry["variant"])
        both = rows.drop_nulls(["value", "null_mean"])
        assert entry["matrices"] == len(both) <= entry["computed"] == rows["value"].count()
        assert len(both) <= case["moved"]
        for of, key in ((both, "mean"), (rows.drop_nulls("value"), "mean_computed")):
            if not len(of):
                assert entry[key] is None, entry
                continue
            weights = of["n"] if entry["weighting"] == "entries" else np.ones(len(of))
            assert entry[key] == pytest.approx(np.average(of["value"], weights=weights), rel=1e-12)
        if not len(both):
            assert entry["null"] is None, entry
            continue
        assert entry["mean"] - entry["null"]["mean"] == pytest.approx(entry["null"]["excess"], rel=1e-6, abs=1e-12)
        assert entry["p10"] <= entry["median"] <= entry["p90"]
        for role, part in entry["roles"].items():
            means = both.filter(role=role)
            if len(means):
                weights = means["n"] if entry["weighting"] == "entries" else np.ones(len(means))
                assert part["null_mean"] == pytest.approx(np.average(means["null_mean"], weights=weights), rel=1e-12)
                assert part["mean"] == pytest.approx(np.average(means["value"], weights=weights), rel=1e-12)
            else:
                assert part["null_mean"] is None


def shown(text: str) -> tuple[float, float]:
    """A number as it is printed, and half a unit of its last digit."""
    plain = re.sub(r"[%°]| pp|\[.*", "", text).strip().replace("−", "-")
    mantissa, _, exponent = plain.partition("e")
    return float(plain), 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def test_terminal(case: dict[str, Any]) -> None:
    lines = [line for line in case["said"].splitlines() if re.search(r"\d+/14$", line.strip())]
    listed = 0
    for line in lines:
        cells = re.split(r"\s{2,}", line.strip())
        if len(cells) < 6 or "by construction" in line or "–" in line:
            continue  # without an excess
        *_, mean, null, excess, _, of = cells
        values = [shown(text) for text in (mean, null, excess)]
        (m, a), (n, b), (e, c) = values
        assert abs(m - n - e) <= 1.001 * (a + b + c), line
        assert int(of.partition("/")[0]) <= case["moved"], line
        listed += 1
    assert listed >= 15
    assert len(lines) >= listed
    said = case["said"].strip()
    if case["still"]:
        assert said.startswith("10 of 14 matrices did not move"), "said first"
    else:
        assert "did not move" not in said


def test_page(case: dict[str, Any]) -> None:
    page = (case["out"] / "report.html").read_text(encoding="utf-8")
    table = page[page.index('<th class="n">excess</th>') :].partition("</table>")[0]
    found = 0
    for row in re.findall(r"<tr.*?</tr>", table, re.S):
        numbers = [re.findall(r'<data value="([^"]+)">', cell) for cell in re.findall(r"<td.*?</td>", row, re.S)]
        _, mean, _, null, excess, _, _, count = numbers
        assert int(count[0]) <= case["moved"] and count[1] == "14"
        if excess:
            found += 1
            assert float(mean[0]) - float(null[0]) == pytest.approx(float(excess[0]), rel=1e-6, abs=1e-12), row
    assert found >= 15
    verdict = page[page.index('id="verdict"') :]
    if case["still"]:
        plain = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", verdict))
        assert plain.index("10 of 14 matrices did not move") < plain.index("the norm of the weights"), "said first"
        (sparsity,) = (e for e in entries(case) if e["variant"] == "bf16_eta")
        lead = verdict.partition('class="lead"')[2].partition("</p>")[0]
        assert repr(sparsity["mean"]) in lead and repr(sparsity["null"]["mean"]) in lead
    else:
        assert "did not move" not in verdict


def test_without_nulls_a_mean_is_over_the_matrices_that_moved(tmp_path: Path) -> None:
    base = planted.write_checkpoint(tmp_path / "base", BASE, "bfloat16")
    result = opdgeo.compare(base, write_lora(tmp_path / "lora"), settings=opdgeo.Settings(nulls=0), cache=False)
    for entry in result.summary["checkpoints"][0]["diagnostics"]:
        assert entry["null"] is None and entry["matrices"] <= 4
    still = opdgeo.compare(base, base, settings=opdgeo.Settings(nulls=2), cache=False)
    sparsity = still.summary["checkpoints"][0]["diagnostics"][0]
    assert (sparsity["mean"], sparsity["matrices"], still.summary["checkpoints"][0]["unmoved"]) == (1.0, 14, 14)
    console = Console(file=io.StringIO(), width=160)
    print_summary(still.summary, console)
    assert "The weights did not move" in console.file.getvalue()  # type: ignore[attr-defined]


def test_claims() -> None:
    nulls = {key: dict.fromkeys(arms, 0.9) for key, arms in PAPER.items()}
    table = measurements(PAPER, nulls)
    still = pl.col("matrix").is_in(["m1", "m4", "m11"]) & ~pl.col("checkpoint").str.starts_with("sft/")
    sparse = pl.col("diagnostic") == "update_sparsity"
    table = table.with_columns(
        value=pl.when(still & sparse).then(1.0).otherwise("value"), null_mean=pl.when(~still).then("null_mean")
    )
    compared = 0
    for claim in judge(table, logs()):
        for place in (claim, *(c for c in claim["controls"] if "beyond size" not in c["name"])):
            for arm, got in (place["measured"] or {}).items():
                if "excess" not in got or got["null"] is None:
                    continue
                compared += 1
                if claim["excess_as"] == "difference":
                    assert got["mean"] - got["null"] == pytest.approx(got["excess"], abs=1e-9), (claim["id"], arm)
                else:  # every null is 0.9
                    assert got["mean"] / got["null"] == pytest.approx(got["excess"], rel=1e-9), (claim["id"], arm)
                assert got["null"] == pytest.approx(0.9), (claim["id"], arm)
    assert compared > 50


def test_quantiles_and_means_are_numpys_to_the_bit() -> None:
    rng, shares = np.random.default_rng(0), (0.5, 0.1, 0.9, 0.025, 0.975)
    for size in (*range(1, 40), 1000, 2001):
        values = rng.standard_normal(size) * 10.0 ** rng.integers(-8, 8)
        for numbers in (values, np.round(values, 1)):
            assert _quantiles(numbers, *shares) == np.quantile(numbers, shares).tolist()
            weights = rng.integers(1, 10**6, size).astype(float)
            assert _average(numbers, weights) == float(np.average(numbers, weights=weights))

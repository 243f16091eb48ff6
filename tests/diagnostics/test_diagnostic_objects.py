"""Every diagnostic is one object that says what it is; what measures and shows it asks the object and names none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

import opdgeo
import planted
from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic, Settings, Value, diagnostics, of_pairs, of_runs, of_trajectories
from opdgeo.report.view import formula

PACKAGE = Path(opdgeo.__file__).parent
OUTSIDE = ("survey", "report", "training")


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_every_diagnostic_tells_a_reader_what_it_is(name: str) -> None:
    d = DIAGNOSTICS[name]
    assert d.name == name
    for text in (d.title, d.formula, d.meaning, d.caveat, d.source, d.example):
        assert text and text == text.strip()
    assert d.meaning.endswith(".") and d.caveat.endswith(".")
    assert set(d.reads) <= {field.name for field in fields(Settings)}
    names = d.variants(Settings())
    assert len(names) == len(set(names)) > 0
    assert all(d.label(variant) for variant in names if variant)
    assert any(d.listed(variant) for variant in names)
    assert all(any(v == start or v.startswith(start) for v in names) for start in d.charted)


def _svd(*values: float) -> np.ndarray:
    return np.asarray(values, float)


# Every example's number once more, from its own figures.
EXAMPLES = {
    "update_sparsity": lambda: "0.5005 is {:g} in bf16, whose next number is {:.4f}: unchanged. 0.5 → 0.503".format(
        *torch.tensor([0.5005, 0.503]).bfloat16().tolist()
    ),
    "frobenius_norm": lambda: f"= {np.linalg.norm([[3, 0], [0, 4]]):g}.",
    "relative_norm": lambda: f"{0.5 / 50:g}",
    "operator_norm": lambda: f"{np.linalg.norm([[3, 0], [0, 4]], 2):g}, for",
    "stable_rank": lambda: f"= {(_svd(2, 1, 1) ** 2).sum() / 4:g}",
    "effective_rank": lambda: f"= {np.exp(-sum(p * np.log(p) for p in _svd(2, 1, 1) ** 2 / 6)):.2f}",
    "hill_exponent": lambda: f"= {1 / np.log(_svd(4, 2)).mean():.2f}",
    "principal_angles": lambda: f"{np.degrees(np.arccos(np.dot([1, 0], [0.8, 0.6]))):.1f}°",
    "spectral_shift": lambda: f"= {np.linalg.norm(_svd(4.3, 3.4) - _svd(4, 3)) / np.linalg.norm(_svd(4, 3)):g}",
    "mask_overlap": lambda: f"{60 / 100:.0%}",
    "principal_energy": lambda: f"{np.linalg.norm(_DELTA @ [1, 0]) ** 2 / 25:.0%}",
    "subspace_similarity": lambda: _shared(),
    "channel_energy": lambda: f"{np.linalg.norm(_DELTA @ [0, 1]) ** 2 / 25:.0%}",
    "locking": lambda: "from step 20 on, above 0.8 from step 40 on",
    "bound_ratio": lambda: f"{0.1 / 0.5:g}",
    "update_cosine": lambda: f"= {np.dot([3, 4], [4, 3]) / 25:g}",
    "update_multiple": lambda: f"= {np.dot([2, 0], [1, 1]) / 2:g}. The other way round 2 / 4 = {2 / 4:g}",
    "sign_agreement": lambda: f"{150 / 200:.0%}",
    "visible_jaccard": lambda: f"{100 / (300 + 200 - 100):.0%}",
    "visible_lift": lambda: f"= {0.1 / (0.3 * 0.2):.2f}",
    "shared_subspace": lambda: _shared(),
    "shared_channel": lambda: f"{np.linalg.norm(_DELTA @ [0, 1]) ** 2 / 25:.0%}",
}
_DELTA = np.asarray([[3, 0], [0, 4]])


def _shared() -> str:
    unit = np.eye(3)
    return f"{np.linalg.norm(unit[:, [0, 1]].T @ unit[:, [0, 2]]) ** 2 / 2:.0%}"


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_the_number_of_every_example_is_right(name: str) -> None:
    assert EXAMPLES[name]() in DIAGNOSTICS[name].example.replace(" %", "%")


def test_the_scopes_are_those_of_updates_trajectories_pairs_and_runs() -> None:
    assert [*diagnostics(), *of_trajectories(), *of_pairs(), *of_runs()] == sorted(
        DIAGNOSTICS, key=lambda name: ["update", "trajectory", "pair", "run"].index(DIAGNOSTICS[name].scope)
    )
    assert all(DIAGNOSTICS[d.of or ""].pair for d in of_runs().values())


# Words of their own that happen to be a diagnostic's name: a choice of K, quantities of gradients, columns of claims.json.
OWN_WORDS = {"channel.py": {"stable_rank"}, "signals.py": {"effective_rank"}, "limits.py": {"stable_rank"}}


def test_nothing_else_names_a_diagnostic() -> None:
    along = "|".join(map(re.escape, [*of_trajectories(), *of_pairs(), *of_runs()]))
    for file in (f for part in OUTSIDE for f in (PACKAGE / part).rglob("*") if f.suffix in (".py", ".j2")):
        text = file.read_text(encoding="utf-8")
        assert not re.search(along, text), file
        if file.suffix == ".py":
            written = {n.value for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Constant)}
            assert written & set(DIAGNOSTICS) <= OWN_WORDS.get(file.name, set()), file


def test_reading_what_a_diagnostic_is_needs_no_torch() -> None:
    code = "import sys, opdgeo.diagnostics as d; print(len(d.DIAGNOSTICS), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(len(DIAGNOSTICS)), "False"]


def test_a_formula_becomes_markup_and_nothing_else_does() -> None:
    assert formula("‖ΔW‖_F² / σ_{i<k}^{−1}") == "‖ΔW‖<sub>F</sub>² / σ<sub>i&lt;k</sub><sup>−1</sup>"
    assert "<script" not in formula("<script>_{x}</script>")


def test_a_new_diagnostic_is_measured_compared_and_shown_without_another_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new: Diagnostic = Diagnostic(
        name="largest_entry",
        scope="update",
        weighting="entries",
        measure=lambda update: {
            "": Value(float((update.weights.double() - update.base.matrix).abs().max()), 0.0, "max")
        },
        title="Largest entry",
        formula="max_{ij} |ΔW_{ij}|",
        meaning="The entry that moved most.",
        caveat="It grows with the number of entries.",
        source="this test",
        charted=("",),
        curves={"rows": lambda update: update.base.matrix[:, 0].tolist()},
    )
    monkeypatch.setitem(DIAGNOSTICS, new.name, new)
    rng = np.random.default_rng(0)
    base, tuned = ({}, {})  # type: ignore[var-annotated]
    for layer, rows in ((0, 24), (1, 48)):
        name = planted.tensor_name(layer, "mlp.up_proj")
        base[name] = planted.weights(rng, rows, 16)
        tuned[name] = base[name] + 1e-2 * rng.standard_normal((rows, 16))
    folders = [planted.write_checkpoint(tmp_path / n, w, "float32") for n, w in (("base", base), ("tuned", tuned))]
    result = opdgeo.compare(*folders, settings=Settings(nulls=3), cache=False, workers=1)
    rows = result.measurements.filter(diagnostic=new.name).sort("layer")
    exact = [np.abs(tuned[n].astype("f4").astype(float) - base[n].astype("f4")).max() for n in sorted(base)]
    assert rows["value"].to_list() == pytest.approx(exact)
    assert rows["null_mean"].null_count() == 0, "a null that it does not give is sampled"
    (entry,) = (d for d in result.summary["checkpoints"][0]["diagnostics"] if d["diagnostic"] == new.name)
    assert entry["weighting"] == "entries"
    assert entry["mean"] == pytest.approx(np.average(exact, weights=[24 * 16, 48 * 16]))
    assert entry["null"]["kind"] == "gaussian"
    assert len(result.curves.filter(pl.col("curve") == "rows")) == 2
    page = result.report(tmp_path / "out").read_text(encoding="utf-8")
    assert "<h3>Largest entry</h3>" in page
    assert "max<sub>ij</sub> |ΔW<sub>ij</sub>|" in page

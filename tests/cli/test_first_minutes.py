"""What a newcomer types first: the demo, the packaged models by name, what a diagnostic means."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path

import polars as pl
import pytest

from opdgeo.commands import explain
from opdgeo.diagnostics import DIAGNOSTICS, Settings
from opdgeo.errors import ConfigError
from opdgeo.report.glossary import label
from opdgeo.report.pairs import READINGS
from program import run_opdgeo


def test_the_demo_measures_the_packaged_models_and_draws_the_page(tmp_path: Path) -> None:
    done = run_opdgeo("demo", cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "COLUMNS": "80"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "opdgeo-demo" / "report.html").is_file()
    by_name = run_opdgeo("compare", "tiny/base", "tiny/teacher", "--no-report", "-o", "named", cwd=tmp_path)
    assert by_name.returncode == 0, by_name.stderr
    ours, theirs = (pl.read_parquet(tmp_path / out / "measurements.parquet") for out in ("opdgeo-demo", "named"))
    assert ours.equals(theirs)
    # The first table fits a small terminal.
    lines = done.stdout.rstrip("\n").split("\n")
    assert len(lines) <= 25 and all(len(line) <= 80 or str(tmp_path) in line for line in lines), done.stdout
    assert "geometry ↓" in done.stdout and "report: " in done.stdout
    said = next(line for line in lines if line.startswith("Of "))
    assert int(said.split()[1]) >= 20  # judged numbers, all of which the long table shows


def test_a_folder_comes_before_a_packaged_model_of_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "tiny" / "base").mkdir(parents=True)
    done = run_opdgeo("compare", "tiny/base", "tiny/teacher", cwd=tmp_path)
    assert done.returncode == 2
    assert "tiny/base holds no weights" in done.stderr


@pytest.mark.parametrize("name", DIAGNOSTICS)
def test_every_diagnostic_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from opdgeo.commands import main

    with pytest.raises(SystemExit) as ended:
        main(["explain", name.replace("_", "-")])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{DIAGNOSTICS[name].title} ({name})"
    assert {"formula", "meaning", "caveat", "null", "example", "source"} <= {line.split()[0] for line in lines[2:]}
    assert max(map(len, lines)) <= 80


READING = (Path(__file__).parents[2] / "docs" / "reading.md").read_text()
BOLD = [
    word
    for row in re.findall(r"^\|(.*)", READING, re.M)
    for cell in re.findall(r"\*\*(.+?)\*\*", row)
    for word in cell.split(", ")
]


@pytest.mark.parametrize("word", [*dict.fromkeys(BOLD), "error"])
def test_every_word_of_the_tables_is_explained(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    from opdgeo.commands import main

    with pytest.raises(SystemExit) as ended:
        main(["explain", word])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert len(said) > 40 and max(map(len, said.splitlines())) <= 80


DATA = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
COLUMNS = re.findall(r"^\| `([^`\n]+)` \|", DATA.partition("## run.json")[0], re.M)


def explained(words: Iterable[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The first line that `explain` prints of every word; the error where it knows none."""
    said = {}
    for word in words:
        try:
            assert explain.run(argparse.Namespace(diagnostic=word)) == 0
            said[word] = capsys.readouterr().out.partition("\n")[0]
        except ConfigError as error:
            said[word] = f"refused: {error}"
    return said


def test_every_column_reading_and_unit_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    columns = [column.rpartition(".")[2].removesuffix("[]") for column in COLUMNS]
    assert {"null_std", "margin", "method", "p90"} <= set(columns)
    units = ("unit", "pp", "%", "°", "share", "degrees")
    others = [
        "walk null",
        "beyond chance ↑",
        "chance",
        "all",
        "middle 80 %",
        "excess [95 %]",
        "95 % interval",
        "curve",
        "sigma_base",
    ]
    words = [*columns, *units, *others, *READINGS.values(), *READINGS, *Settings().to_json(), "null std"]
    said = explained(words, capsys)
    assert [word for word, line in said.items() if line.startswith("refused: ")] == []


def test_a_row_as_printed_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {label(name, v): name for name, d in DIAGNOSTICS.items() for v in d.variants(Settings())}
    rows |= {re.sub("[()]", "", row): name for row, name in rows.items()}
    rows |= {"Principal energy both top 32": "principal_energy", "unchanged in bf16": "update_sparsity"}
    rows |= {
        "bf16_eta": "update_sparsity",
        "η rule": "update_sparsity",
        "both.32": "principal_energy",
        "Mirsky": "bound_ratio",
    }
    said = explained(rows, capsys)
    assert {row: line for row, line in said.items() if not line.endswith(f"({rows[row]})")} == {}
    assert explained(["17"], capsys)["17"].startswith("refused: there is no diagnostic"), "a bare number is no variant"


def test_the_sparsity_counts_what_is_equal(capsys: pytest.CaptureFixture[str]) -> None:
    from opdgeo.commands import main

    with pytest.raises(SystemExit):
        main(["explain", "update_sparsity"])
    assert "the same as equality of the numbers" in " ".join(capsys.readouterr().out.split())


def test_the_list_and_a_wrong_name() -> None:
    listed = run_opdgeo("explain")
    assert listed.returncode == 0
    assert [line.split()[0] for line in listed.stdout.splitlines()[: len(DIAGNOSTICS)]] == list(DIAGNOSTICS)
    wrong = run_opdgeo("explain", "stablerank")
    assert wrong.returncode == 2
    assert "Did you mean stable_rank?" in wrong.stderr
    assert "unit      directions" in run_opdgeo("explain", "effective-rank").stdout

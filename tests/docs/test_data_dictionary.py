"""docs/data.md against the data files of a real run: every column and key is described, with its type; the examples run."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from opdgeo.experiments import related
from program import run_opdgeo, run_python

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
ASSETS = Path(__file__).parents[2] / "src" / "opdgeo" / "assets" / "tiny"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `update`, the results of a two-step trajectory: all keys, those of a trajectory included."""
    where = tmp_path_factory.mktemp("dictionary")
    for step in (1, 2):
        shutil.copytree(ASSETS / "teacher", where / "run" / f"step-{step:06d}")
    options = ("--roles", "q_proj,o_proj", "--rank", 8, "--no-report", "-o", "update")
    done = run_opdgeo("track", ASSETS / "base", "run", *options, cwd=where)
    assert done.returncode == 0, done.stderr
    shutil.copytree(ASSETS / "teacher", where / "again")  # two updates that are the same
    done = run_opdgeo(
        "relate",
        ASSETS / "base",
        ASSETS / "teacher",
        "again",
        "--roles",
        "q_proj",
        "--no-report",
        "-o",
        "related",
        cwd=where,
    )
    assert done.returncode == 0, done.stderr
    return where


def table(title: str, head: str = "") -> dict[str, list[str]]:
    """The first table below the heading `title`, or the one whose first column has the head `head`: the name in the first column,
    and the other cells."""
    section = PAGE.read_text().split(f"## {title}\n")[1].split("\n## ")[0]
    section = section.split(f"| {head} |")[1] if head else section
    rows: dict[str, list[str]] = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if cells and cells[0].startswith("`"):
            rows[cells[0].strip("`")] = cells[1:]
        elif rows and not line.startswith("|"):
            break
    return rows


@pytest.mark.parametrize("name", ["measurements.parquet", "curves.parquet"])
def test_every_column_is_described_with_its_type_and_where_it_may_be_null(folder: Path, name: str) -> None:
    data = pl.read_parquet(folder / "update" / name)
    described = table(name)
    assert {column: str(kind) for column, kind in data.schema.items()} == {
        c: cells[0] for c, cells in described.items()
    }
    never = [column for column, cells in described.items() if cells[2].startswith("never")]
    assert {column: data[column].null_count() for column in never} == dict.fromkeys(never, 0)


@pytest.mark.parametrize("name", ["measurements.parquet", "curves.parquet"])
def test_the_columns_of_pairs_are_described(folder: Path, name: str) -> None:
    data = pl.read_parquet(folder / "related" / name)
    more = {column: cells[0] for column, cells in table("measurements.parquet", "column of `relate`").items()}
    described = {column: cells[0] for column, cells in table(name).items()} | more
    assert {column: str(kind) for column, kind in data.schema.items()} == described
    assert data.columns[1] == "other"
    never = [column for column, cells in table(name).items() if cells[2].startswith("never")]
    assert {column: data[column].null_count() for column in never} == dict.fromkeys(never, 0)
    text = PAGE.read_text()
    for column in {"diagnostic", "curve"} & set(data.columns):
        assert all(f"`{value}`" in text for value in data[column].unique())


def test_the_relations_of_a_study_are_described() -> None:
    """What a real study writes has these columns (tests/experiments/test_reproduce.py)."""
    described = {column: cells[0] for column, cells in table("relations.parquet").items()}
    assert described == {column: str(kind()) for column, kind in related.COLUMNS.items()}


def test_the_keys_of_pairs_are_described_with_their_types(folder: Path) -> None:
    summary, run = (json.loads((folder / "related" / f"{name}.json").read_text()) for name in ("summary", "run"))
    assert isinstance(run["pairs"], int) and run.keys() - table("run.json").keys() == set()
    known = {name.removeprefix("checkpoints[]."): cells[0] for name, cells in table("summary.json").items()}
    known |= {name: cells[0] for name, cells in table("summary.json", "key of a pair").items()}
    known = {name: of for name, of in known.items() if name not in ("checkpoints", "pairs", "locking")}
    found = {
        path: value
        for one in summary["pairs"]
        for path, value in keys(one)
        if not path.startswith("diagnostics[].roles.")
    }
    assert found.keys() - {"diagnostics"} <= known.keys()
    for one in summary["pairs"]:
        for path, value in keys(one):
            assert path not in known or value is None or kind(value) == known[path], path
    assert {path for path in known if path.startswith("diagnostics[].together")} <= found.keys()


def test_every_diagnostic_and_variant_is_described(folder: Path) -> None:
    text = PAGE.read_text().split("| diagnostic | variants | unit |")[1].split("\n\n")[0]
    data = pl.read_parquet(folder / "update" / "measurements.parquet")
    missing = [name for name in data["diagnostic"].unique() if f"`{name}`" not in text]
    assert not missing
    sparsity = data.filter(diagnostic="update_sparsity")["variant"].unique()
    assert all(f"`{variant}`" in text for variant in sparsity)


def keys(content: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested objects, with `[]` for the items of a list."""
    if isinstance(content, dict):
        for name, value in content.items():
            here = f"{path}.{name}" if path else name
            yield here, value
            yield from keys(value, here)
    elif isinstance(content, list):
        for value in content:
            yield from keys(value, f"{path}[]")


def kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", int: "number", float: "number"}
    return names[type(value)]


@pytest.mark.parametrize("name", ["summary.json", "run.json"])
def test_every_key_is_described_with_its_type(folder: Path, name: str) -> None:
    described = table(name)
    found = list(keys(json.loads((folder / "update" / name).read_text())))
    opened = {path.rsplit(".", 1)[0].removesuffix("[]") for path in described if "." in path}
    for path, value in found:
        parent = path.rsplit(".", 1)[0].removesuffix("[]") if "." in path else None
        if parent is not None and parent not in opened:
            continue  # inside an object that the page describes as a whole
        if path in opened and path not in described:
            continue  # a list that the page describes by its items
        assert path in described, f"{name} holds {path}, which docs/data.md does not describe"
        assert value is None or kind(value) == described[path][0], path
    absent = set(described) - {path for path, _ in found} - {"pairs"}  # which a trajectory has not
    assert not absent, f"docs/data.md describes {absent}, which {name} does not hold"


def examples(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.mark.parametrize("code", examples("python"))
def test_the_python_examples_run(folder: Path, code: str) -> None:
    done = run_python("-c", code, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize("query", examples("sql"))
def test_the_sql_examples_run(folder: Path, query: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert len(duckdb.sql(query).fetchall()) > 3

"""The scripts of `examples/`: what they say they do, held against the trainers and the commands."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer

import opdgeo
from opdgeo.training import rollouts
from opdgeo.training.config import TrainConfig
from opdgeo.training.train import train
from program import run_opdgeo, run_python
from tiny_models import weights

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def one_file() -> ModuleType:
    spec = importlib.util.spec_from_file_location("opd_in_one_file", EXAMPLES / "opd_in_one_file.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_opd_in_one_file_takes_the_trainers_steps_on_the_same_tokens(
    one_file: ModuleType,
    config: Callable[..., TrainConfig],
    origin: Path,
    teacher: Path,
    tmp_path: Path,
) -> None:
    # Adam's ε is large against rounding: with a small one, an entry whose gradient is only rounding moves by a whole step.
    settings = dict(
        steps=3, adam_epsilon=1e-4, weight_decay=0.0, eval_prompts=0, record_rollouts=True, checkpoints=(1.0,)
    )
    last = train(config("opd", **settings), tmp_path / "run", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(origin)
    student, scorer = one_file.load(origin), one_file.load(teacher)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.9, 0.98), eps=1e-4, weight_decay=0.0)
    rows = [json.loads(line) for line in (tmp_path / "run" / rollouts.FILE).read_text().splitlines()]
    for step in (1, 2, 3):
        batch = [row for row in rows if row["step"] == step]
        before = max(len(row["prompt_ids"]) for row in batch)
        after = max(len(row["completion_ids"]) for row in batch)
        ids = torch.full((len(batch), before + after), tokenizer.pad_token_id)
        attention, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for i, row in enumerate(batch):
            first, last_one = before - len(row["prompt_ids"]), before + len(row["completion_ids"])
            ids[i, first:last_one] = torch.tensor(row["prompt_ids"] + row["completion_ids"])
            attention[i, first:last_one] = 1
            mask[i, before:last_one] = 1
        one_file.distillation_step(student, scorer, optimizer, (ids, attention, mask))
    start = weights(origin)
    for name, value in weights(last).items():
        moved = value - start[name]
        difference = torch.linalg.vector_norm(student.get_parameter(name) - value)
        assert difference <= 1e-4 * torch.linalg.vector_norm(moved), name


def test_opd_in_one_file_writes_checkpoints_that_track_reads(tmp_path: Path) -> None:
    few = ("--steps", 6, "--sequences", 8, "--out", "run")
    done = run_python(EXAMPLES / "opd_in_one_file.py", *few, cwd=tmp_path, libraries="training")
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines()] == ["5", "6"]
    options = ("--roles", "o_proj", "--nulls", 0, "--no-report", "--no-cache", "-o", "out")
    done = run_opdgeo("track", TINY / "base", "run", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_first_example_of_the_monitors_page_runs_as_it_stands(origin: Path, teacher: Path, tmp_path: Path) -> None:
    page = (EXAMPLES.parent / "docs" / "monitor.md").read_text()
    example = page.partition("```python\n")[2].partition("```")[0]
    short = f'"{tmp_path}", max_steps=2, max_completion_length=4, use_cpu=True, bf16=False, save_strategy="no"'
    assert example.count('"runs/opd"') == 1
    found: dict[str, Any] = {
        "student": str(origin),
        "teacher": str(teacher),
        "prompts": Dataset.from_list([{"prompt": "1+2="}] * 16),
    }
    exec(example.replace('"runs/opd"', short), found)
    (row,) = (row for row in found["trainer"].state.log_history if "geometry/norm" in row)
    assert row["step"] == 2 and row["geometry/norm"] > 0


@pytest.mark.parametrize("trainer", ["distillation", "sft"])
def test_trls_own_trainers_log_the_geometry(trainer: str, tmp_path: Path) -> None:
    few = ("--steps", 2, "--every", 1, "--sequences", 2, "--out", "run")
    done = run_python(EXAMPLES / "monitor_in_trl.py", trainer, *few, cwd=tmp_path, libraries="training")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'geometry/stable_rank'") == 2
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    first, second = (row for row in state["log_history"] if "loss" in row)
    assert 0 < first["geometry/norm"] < second["geometry/norm"] and 0 < second["geometry/similarity_first"] <= 1


def test_a_plain_torch_loop_stays_in_the_channel(tmp_path: Path) -> None:
    few = ("--steps", 3, "--sequences", 4)
    done = run_python(EXAMPLES / "channel_in_a_torch_loop.py", *few, cwd=tmp_path, libraries="training")
    assert done.returncode == 0, done.stderr
    free, held = (float(line.rpartition(" ")[2]) for line in done.stdout.splitlines())
    assert free > 0.3 and held < 1e-8, done.stdout


def test_the_notebook_goes_from_two_checkpoints_to_three_pictures(tmp_path: Path) -> None:
    """Its cells in IPython, which Jupyter's kernel is built on; what each shows is what a notebook would be sent."""
    code = """if True:
        import json, sys
        from IPython.core.interactiveshell import InteractiveShell
        from traitlets.config import Config
        shell = InteractiveShell.instance(config=Config({"HistoryManager": {"enabled": False}}))
        shown = []
        for cell in json.load(open(sys.argv[1]))["cells"]:
            if cell["cell_type"] == "code":
                result = shell.run_cell("".join(cell["source"]))
                result.raise_error()
                shown.append(shell.display_formatter.format(result.result)[0])
        print(json.dumps(shown))
    """
    notebook = EXAMPLES / "two_checkpoints_three_pictures.ipynb"
    done = run_python("-c", code, notebook, cwd=tmp_path, env={"IPYTHONDIR": str(tmp_path / "ipython")})
    assert done.returncode == 0, done.stderr
    table, *pictures, numbers = (output["text/html"] for output in json.loads(done.stdout.splitlines()[-1]))
    assert "Stable rank" in table and table.count("<tr>") > 8
    assert len(pictures) == 3 and len(set(pictures)) == 3
    assert all(re.search(r'<svg [^>]*role="img".*</svg>', picture, re.S) for picture in pictures)
    assert "model.layers" in numbers and (tmp_path / "stable-rank.pdf").stat().st_size > 1000
    cells = json.loads(notebook.read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells), (
        "kept without outputs: they would not be those of this version"
    )

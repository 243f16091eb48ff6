"""Every block of commands and of Python in README and docs: it runs here, or `NOT_RUN` says why not and its options are checked.

A command runs on small random models that lie under the names that the pages use, with short settings added (`SHORT`).
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from opdgeo.commands import parser
from program import run_opdgeo, run_python

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    ROOT / "tests" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
LANGUAGES = {"bash", "python", "sql", "text", "bibtex"}

# The first pattern that is found in a command or in a block of Python says why it does not run here.
NOT_RUN = {
    r"^git |^pip |^uv |^python3 -m venv": "it needs the network",
    r"^make |pytest": "it is this suite, or holds it",
    r"^ray |--engine ray": "it needs a cluster; tests/survey/test_ray.py starts one",
    r" (Qwen|Kwai-Klear)/|^opdgeo published": "it needs the hub; tests/checkpoints/test_hub.py and tests/experiments/test_published.py have one of their own",
    r"--device cuda|device=cuda|gpu\.sh": "it needs a GPU",
    r"^CONFIGS=|^accelerate |^srun |^vllm ": "it needs several GPUs or machines; tests/training/test_processes.py starts two processes",
    r"^opdgeo --completion": "tests/cli/test_completion.py runs it",
    r"^opdgeo demo": "tests/cli/test_first_minutes.py runs it",
    r"^opdgeo (train|evaluate|signals|reproduce)|^opdgeo report study": "it trains for minutes; tests/training and tests/experiments do so",
    r"^python (-m opdgeo\.experiments|tests/recompute)": "it trains for hours, or reads a finished study",
    r"\$BASE|^export |smollm2": "it needs the weights of SmolLM2 and minutes; tests/survey/test_smollm2.py reads them",
    r" noise/arms/": "it reads the runs of hours of training",
    r"gradient_moments import signals": "it samples for minutes; tests/experiments/test_gradient_signals.py does so",
    r"read_parquet": "tests/docs/test_data_dictionary.py runs it",
}
QUICK = ("--roles", "o_proj", "--workers", "1", "--no-cache", "--no-report", "--overwrite")
SHORT = dict.fromkeys(("compare", "track", "relate"), QUICK)
MODELS = [
    "BASE",
    "TUNED",
    "A",
    "B",
    "C",
    "RUN_DIR/step-000001",
    "RUN_DIR/step-000002",
    "anchor",
    "runs/opd/step-000020",
    "runs/opd/step-000100",
    "runs/sft/step-000060",
    "runs/opd-seed0/step-000100",
    "runs/opd-seed1/step-000100",
    "my-run/checkpoint-500",
    "Qwen3-8B-Base",
]
MAKE_MODELS = """
import shutil, sys
from pathlib import Path
import torch
from safetensors.torch import load_file, save_file
sys.path.insert(0, sys.argv[1])
from tiny_models import random_model
first, *others = map(Path, sys.argv[2:])
random_model(first, 0, hidden_size=64, head_dim=32, num_key_value_heads=2)
for name in others:
    shutil.copytree(first, name)
    weights = {n: w + 0.01 * torch.randn_like(w) for n, w in load_file(first / "model.safetensors").items()}
    save_file(weights, name / "model.safetensors", metadata={"format": "pt"})
"""
PRELUDE = """
from functools import partial
import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model = AutoModelForCausalLM.from_pretrained("anchor")
base = AutoModelForCausalLM.from_pretrained("anchor")
optimizer = torch.optim.AdamW(model.parameters())
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained("anchor"), processing_class=AutoTokenizer.from_pretrained("anchor"),
    args=SFTConfig(output_dir="trained", max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"),
    train_dataset=Dataset.from_list([{"text": "1+1=2"}] * 8),
)
student, teacher, prompts = "anchor", "BASE", Dataset.from_list([{"prompt": "1+1="}] * 8)
trl.DistillationConfig = partial(
    trl.DistillationConfig, max_steps=1, max_completion_length=4, use_cpu=True, bf16=False, report_to="none", save_strategy="no",
)
"""
"""What the pages take for granted: a trainer, models, an optimizer, prompts; and one step where a page would train for long."""


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of every fenced block."""
    for found in re.finditer(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        yield found[1], found[2]


def commands(page: Path) -> Iterator[str]:
    """Every command of the page, in one line and without its comment."""
    for language, text in blocks(page):
        if language == "bash":
            for line in text.replace("\\\n", " ").splitlines():
                if command := re.sub(r"(^|\s)#.*", "", line).strip():
                    yield command


def reason(text: str) -> str | None:
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text, re.MULTILINE)), None)


COMMANDS = [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))]


def test_every_block_says_its_language() -> None:
    assert [(page.name, text) for page in PAGES for language, text in blocks(page) if language not in LANGUAGES] == []


def test_every_reason_is_still_needed() -> None:
    texts = [command for _, command in COMMANDS] + [
        t for p in PAGES for language, t in blocks(p) if language == "python"
    ]
    assert [p for p in NOT_RUN if not any(re.search(p, text, re.MULTILINE) for text in texts)] == []
    named = [path for why in NOT_RUN.values() for path in re.findall(r"tests/[\w/]+(?:\.py)?", why)]
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in COMMANDS))
def test_the_options_exist(command: str) -> None:
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # a variable for this command alone
        words = words[1:]
    if words[:1] == ["srun"]:  # … bash -c COMMAND
        words = shlex.split(words[-1])
    for file in re.findall(r"\$CONFIGS/([\w.]+)", command):
        assert (ROOT / "src" / "opdgeo" / "assets" / "accelerate" / file).exists(), file
    if "opdgeo" in words:
        arguments = words[words.index("opdgeo") + 1 :]
        parsed = parser().parse_args(arguments)  # ends the test where it does not know an option
        if parsed.command == "train":
            settings_exist(parsed)
    elif words[:2] == ["python", "-m"]:
        source = ROOT / "src" / Path(*words[2].split(".")).with_suffix(".py")
        options_stand_in(source, words[3:])
    elif words and words[0] in ("python", "benchmarks/gpu.sh"):
        options_stand_in(ROOT / words[words[0] == "python"], words[1:])
    elif words and words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif words and words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"(?:opdgeo|\.)\[([\w,]+)\]", command)
        assert {extra for names in named for extra in names.split(",")} <= extras.keys(), command
    for folder in re.findall(r"\btests/\w+", command):
        assert list((ROOT / "tests").glob(folder.removeprefix("tests/") + "*")), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name + "/" + page.name)
def test_the_commands_in_sentences_exist(page: Path) -> None:
    """`opdgeo track BASE RUN --follow` in a sentence: there is such a command, with such options."""
    known = next(a.choices for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    prose = re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for command, rest in re.findall(r"`opdgeo (\w+)([^`]*)`", prose):
        assert command in known, command
        options = {word.partition("=")[0] for word in rest.split() if word.startswith("-")}
        assert options <= known[command]._option_string_actions.keys(), (command, rest)


def options_stand_in(source: Path, words: list[str]) -> None:
    text = source.read_text()
    assert [word for word in words if word.startswith("--") and word not in text] == []


def settings_exist(parsed: object) -> None:
    """The preset knows the arm and every setting."""
    from opdgeo.commands.train import OVERRIDES, _setting
    from opdgeo.experiments.presets import train_config

    values = vars(parsed)
    overrides = dict(_setting(text) for text in values["settings"])
    overrides |= {name: value for name in OVERRIDES if (value := values.get(name)) is not None}
    train_config(values["paradigm"], values["preset"], origin=values["model"] or "anchor", **overrides)


@pytest.fixture(scope="module")
def workbench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small models under the names that the pages use: one random model, and copies with some noise added."""
    where = tmp_path_factory.mktemp("workbench")
    done = run_python("-c", MAKE_MODELS, ROOT / "tests", *MODELS, cwd=where, libraries="training")
    assert done.returncode == 0, done.stderr
    done = run_opdgeo("channel", "anchor", "runs/opd/step-000020", "-k", "16", "-o", "channel", cwd=where)
    assert done.returncode == 0, done.stderr
    shutil.copytree(where / "channel", where / "other")
    shutil.copy(where / "channel" / "channel.safetensors", where)
    return where


def shape(command: str) -> str:
    """The command without the names of its folders: those that differ in nothing else are run once."""
    words = re.sub(r" (-o|--out) \S+", "", command).split()
    named = [i for i in range(2, len(words)) if not words[i].startswith("-") and not words[i - 1].startswith("-")]
    return " ".join("X" if i in named else word for i, word in enumerate(words))


@pytest.mark.parametrize("command", {shape(c): c for _, c in reversed(COMMANDS) if not reason(c)}.values())
def test_the_command_runs(command: str, workbench: Path) -> None:
    program, *arguments = shlex.split(command)
    assert program == "opdgeo", f"{command!r} is no command of opdgeo; NOT_RUN has to say why it does not run"
    done = run_opdgeo(*arguments, *SHORT.get(arguments[0], ()), cwd=workbench)
    assert done.returncode == 0, done.stderr


def test_the_python_runs(workbench: Path) -> None:
    """Each page's blocks in order, those of all pages in one program."""
    done_for = []
    for page in PAGES:
        for language, text in blocks(page):
            if language == "python" and not reason(text):
                done_for.append(f"# {page.name}\n{text}")
    assert len(done_for) > 8
    done = run_python(
        "-c", "\n".join([PRELUDE, *done_for]), cwd=workbench, libraries="training", env={"BASE": "anchor"}
    )
    assert done.returncode == 0, done.stderr

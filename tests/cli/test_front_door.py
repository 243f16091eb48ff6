"""What a user meets first: the import, the help, the exit status, the public names, the tensor names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import opdgeo
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.checkpoints.names import matrices, other_kind
from opdgeo.commands import main
from opdgeo.errors import ConfigError
from opdgeo.report.notebook import Charts
from program import run_opdgeo, run_python


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["compare", "--help"],
        ["relate", "--help"],
        ["train", "--help"],
        ["signals", "--help"],
        [],
    ],
)
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom opdgeo.commands import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'numpy', 'polars', 'transformers', 'ray'} & set(sys.modules)"
    )
    done = run_python("-c", code, cold=True)
    assert done.returncode == 0, done.stderr
    assert "opdgeo" in done.stdout


def test_the_version_is_the_packages() -> None:
    assert run_opdgeo("--version", cold=True).stdout == f"opdgeo {opdgeo.__version__}\n"


def test_the_public_names() -> None:
    measuring = ["compare", "load", "open_checkpoint", "relate", "track"]
    assert opdgeo.__all__ == ["Channel", "GeometryMonitor", "Result", "Settings", *measuring]
    for name in opdgeo.__all__:
        assert getattr(opdgeo, name).__doc__


def test_a_mistyped_command_and_chart(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["comapre", "a", "b"])
    assert ended.value.code == 2 and "did you mean compare?" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="Did you mean 'size-stable-rank'"):
        Charts({"size-stable-rank": None})["size-stable_rank"]  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("compare a b --topk 8", "usage: opdgeo compare; unrecognized arguments: --topk 8; did you mean --top-k?"),
        ("track a b --topk=8", "usage: opdgeo track; unrecognized arguments: --topk=8; did you mean --top-k?"),
        ("compare a b c", "usage: opdgeo compare; unrecognized arguments: c\n"),
        ("--versoin", "usage: opdgeo [; unrecognized arguments: --versoin; did you mean --version?"),
    ],
)
def test_an_unknown_option_is_refused_by_its_command(given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given.split())
    shown = capsys.readouterr().err
    usage, _, error = said.partition("; ")
    assert ended.value.code == 2 and shown.startswith(usage) and error in shown


def test_help_names_the_default_of_its_own_command(capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        ("demo", "default: opdgeo-demo"),
        ("compare", "default: opdgeo-out"),
        ("channel", "--out DIR"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert said in " ".join(capsys.readouterr().out.split())


def test_an_unknown_preset_is_refused_by_name() -> None:
    done = run_opdgeo("train", "sft", "--preset", "tinny")
    assert done.returncode == 2
    assert "tinny" in done.stderr and "did you mean 'tiny'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "role", "layer"),
    [
        ("model.layers.11.self_attn.q_proj.weight", "q_proj", 11),
        ("layers.0.mlp.gate_proj.weight", "gate_proj", 0),
        ("transformer.h.3.mlp.c_fc.weight", "up_proj", 3),
        ("h.3.attn.c_proj.weight", "o_proj", 3),
    ],
)
def test_known_names(name: str, role: str, layer: int) -> None:
    (matrix,) = matrices(name, (6, 9)) or []
    assert (matrix.role, matrix.layer) == (role, layer)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.qkv_proj.weight",
        "model.layers.0.mlp.gate_up_projs.weight",
        "xvisual.blocks.0.attn.qkv.weight",
        "model.layers.0.mlp.experts.x.up_proj.weight",
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "xmodel.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.weight_scale",
    ],
)
def test_names_that_only_look_alike_are_not_guessed(name: str) -> None:
    assert matrices(name, (6, 9)) is None
    assert other_kind(name) is None


def test_gpt2_weights_are_read_as_out_by_in_with_q_k_v_apart(tmp_path: Path) -> None:
    stored = torch.arange(4 * 12, dtype=torch.float32).reshape(4, 12)  # Conv1D: (in, out)
    for folder in ("base", "tuned"):
        (tmp_path / folder).mkdir()
        save_file({"h.0.attn.c_attn.weight": stored}, tmp_path / folder / "model.safetensors")
    base = open_checkpoint(tmp_path / "base")
    found = pair(base, open_checkpoint(tmp_path / "tuned")).matrices
    assert [m.name for m in found] == [f"h.0.attn.c_attn.weight[{x}]" for x in "qkv"]
    for i, matrix in enumerate(found):
        assert (matrix.rows, matrix.cols) == (4, 4)
        assert torch.equal(base.read(matrix), stored[:, 4 * i : 4 * i + 4].T)


def test_names_from_a_checkpoint_do_not_steer_the_terminal(tmp_path: Path) -> None:
    evil, known = "evil\x1b]0;title\x07", "model.layers.0.mlp.up_proj.weight"
    for name, shape in (("base", 3), ("tuned", 3), ("other", 4)):
        (tmp_path / name).mkdir()
        state = {known: torch.rand(8, 8), evil: torch.zeros(shape)}
        save_file(state, tmp_path / name / "model.safetensors")
    out = ["-o", str(tmp_path / "out"), "--nulls", "0", "--no-report", "--no-cache"]
    done = run_opdgeo("compare", str(tmp_path / "base"), str(tmp_path / "tuned"), *out)
    assert done.returncode == 0 and "such as evil\ufffd]0;title\ufffd" in done.stdout
    other = run_opdgeo("compare", str(tmp_path / "base"), str(tmp_path / "other"), *out, "--overwrite")
    assert other.returncode == 0 and "evil\ufffd]0;title\ufffd" in other.stdout, "of another shape, and not measured"
    plan = run_opdgeo("compare", str(tmp_path / "base"), str(tmp_path / "other"), "--plan")
    assert plan.returncode == 0
    for shown in (done, other, plan):
        assert "\x1b" not in shown.stdout + shown.stderr

"""Code that comes with a model is not run, whoever answers the question; none is fetched; no stranger's cluster is joined."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from opdgeo.errors import ConfigError
from opdgeo.survey import engines
from opdgeo.training import models
from program import run_python

SOURCE = Path(models.__file__).parents[1]
SAYING_YES = """
import os, sys
end, start = os.pipe()
os.write(start, b"y\\n" * 5)
os.close(start)
os.dup2(end, 0)
from opdgeo.commands import main
main(sys.argv[1:])
"""
LOADING = ("from_pretrained", "from_config")


def test_every_call_that_loads_a_model_says_that_its_code_is_not_trusted() -> None:
    calls = [
        (file.name, call)
        for file in SOURCE.rglob("*.py")
        for call in ast.walk(ast.parse(file.read_text()))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in LOADING
    ]
    assert len(calls) >= 8
    for name, call in calls:
        trusted = [k.value for k in call.keywords if k.arg == "trust_remote_code"]
        assert [isinstance(v, ast.Constant) and v.value is False for v in trusted] == [True], f"{name}:{call.lineno}"


def test_code_beside_a_model_is_not_run_even_when_standard_input_says_yes(tmp_path: Path) -> None:
    mark, folder = tmp_path / "it-ran", tmp_path / "model"
    folder.mkdir()
    code = f"open({str(mark)!r}, 'w')\nfrom transformers import PretrainedConfig\nclass Own(PretrainedConfig):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(code)
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": auto}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "OwnTokenizer"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1", "answer": "1"}\n')
    done = run_python(
        "-c", SAYING_YES, "evaluate", folder, tmp_path / "problems.jsonl", "-o", tmp_path / "out",
        libraries="training", env={"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert not mark.exists()
    assert done.returncode == 2, done.stderr
    assert "never run" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "lines",
    [
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "paged|someone/kernel@main"},
        {"_attn_implementation_internal": "someone/kernel"},
        {"text_config": {"attn_implementation": {"": "someone/kernel"}}},
        {"experts_implementation": "someone/kernel"},
        {"use_kernels": True},
        {"kernel_config": {"RMSNorm": "someone/kernel:RMSNorm"}},
        {"layers": [{"attn_implementation": "someone/kernel"}]},
    ],
)
def test_no_kernel_of_the_hub_is_loaded(lines: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"} | lines))
    with pytest.raises(ConfigError, match="loads code from the hub"):
        models.load_model(tmp_path)


def test_usual_configurations_name_no_kernel(tmp_path: Path) -> None:
    usual = {"_name_or_path": "org/model", "attn_implementation": "sdpa", "use_kernels": False, "kernel_config": None}
    (tmp_path / "config.json").write_text(json.dumps(usual | {"rope_scaling": None, "layer_types": ["full_attention"]}))
    models.refuse_kernels(tmp_path)
    for broken in ("7", "null", "[", "[" * 100_000, '"text"'):
        (tmp_path / "config.json").write_text(broken)
        with pytest.raises(ConfigError, match="not a model's configuration"):
            models.refuse_kernels(tmp_path)


@pytest.mark.parametrize(("address", "joined"), [(None, "local"), ("", "local"), ("auto", "auto")])
def test_no_cluster_is_joined_that_was_not_asked_for(
    address: str | None, joined: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray takes no address for the one that was last started on this machine (/tmp/ray/ray_current_cluster)."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    asked: list[str | None] = []

    class Ray:
        is_initialized = staticmethod(lambda: False)
        init = staticmethod(lambda address, **_: asked.append(address))
        shutdown = staticmethod(lambda: None)

    with engines._cluster(Ray, address):
        pass
    assert asked == [joined]

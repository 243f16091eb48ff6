"""Names that were changed: what people still write must go on working, with a warning that says the new one."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest

from opdgeo.errors import ConfigError
from opdgeo.experiments.presets import train_config
from opdgeo.training.config import TrainConfig
from program import run_opdgeo


def test_verl_and_slime_find_their_functions_under_the_former_path() -> None:
    module = importlib.import_module("opdgeo.training.adapters")
    new = importlib.import_module("opdgeo.training.external_trainers")
    for name in ("verl_advantages", "slime_advantages", "ChannelAdamW", "VERL_REWARD"):
        with pytest.warns(FutureWarning, match=r"opdgeo\.training\.external_trainers"):
            assert getattr(module, name) is getattr(new, name)


def test_the_former_name_of_dynamic_sampling_is_read_with_a_warning() -> None:
    with pytest.warns(FutureWarning, match="drop_flat_groups is now called dynamic_sampling"):
        made = train_config("rlvr", "tiny", origin="tiny/base", drop_flat_groups=True)
    assert made.dynamic_sampling
    former = made.to_json().replace("dynamic_sampling", "drop_flat_groups")
    with pytest.warns(FutureWarning, match="dynamic_sampling"):
        assert TrainConfig.from_json(former) == made
    with pytest.raises(ConfigError, match="one setting"):
        train_config("rlvr", "tiny", origin="tiny/base", drop_flat_groups=True, dynamic_sampling=False)


def test_a_run_whose_config_has_the_former_name_is_resumed(tmp_path: Path) -> None:
    """From the command line too: --set by the former name, and a config.json that an older version wrote."""
    out = tmp_path / "run"
    small = {
        "sequences_per_step": 8, "generations": 4, "max_tokens": 4, "eval_prompts": 0, "eval_prompts_between": 0, "monitor": 0,
        "device": "cpu",
    }  # fmt: skip
    command = ["train", "rlvr", "--model", "tiny/base", "--steps", "2", "-o", str(out)]
    command += [text for name, value in small.items() for text in ("--set", f"{name}={json.dumps(value)}")]
    command += ["--set", "drop_flat_groups=true"]
    done = run_opdgeo(*command)
    assert done.returncode == 0 and "drop_flat_groups is now called dynamic_sampling" in done.stderr, done.stderr
    # Standard error is no terminal here: a line a step, and how long it will take.
    assert "opdgeo: rlvr step 1/2  loss" in done.stderr and "left" in done.stderr
    recorded = json.loads((out / "config.json").read_text())
    assert recorded.pop("dynamic_sampling") is True
    (out / "config.json").write_text(json.dumps(recorded | {"drop_flat_groups": True}))
    shutil.rmtree(out / "step-000002")
    again = run_opdgeo(*command, "--resume")
    assert again.returncode == 0 and (out / "step-000002").is_dir(), again.stderr
    assert json.loads((out / "config.json").read_text())["dynamic_sampling"] is True

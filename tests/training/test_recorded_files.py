"""Files that a run leaves and another reads: recorded completions and configurations that were damaged, or that a stranger wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.training.callbacks import read_log
from opdgeo.training.config import TrainConfig
from opdgeo.training.rollouts import Recorded, forget_after

ROW = {"step": 1, "prompt": "1+2=", "answer": "3", "prompt_ids": [4], "completion_ids": [6]}
CONFIG = TrainConfig(
    arm="sft",
    task="arithmetic",
    origin="base",
    steps=2,
    rollouts="demonstrations",
    sequences_per_step=4,
    learning_rate=1,
)


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe\n", b"7\n", b"{}\n", b'{"step": [1]}\n', b"[" * 100_000 + b"\n", b'"x"\n']
)
def test_what_follows_a_damaged_line_is_forgotten(damage: bytes, tmp_path: Path) -> None:
    file, whole = tmp_path / "rollouts.jsonl", json.dumps(ROW).encode() + b"\n"
    file.write_bytes(whole + damage + whole)
    with pytest.raises(ConfigError, match="line 2 of"):
        Recorded(file, 1, 32)
    forget_after(file, 1)
    assert file.read_bytes() == whole
    row = b'{"event": "step", "step": 1}\n'
    (tmp_path / "log.jsonl").write_bytes(row + damage + row)
    assert read_log(tmp_path) == [json.loads(row)]


@pytest.mark.parametrize(
    ("name", "value"),
    [("rollouts", 1.5), ("steps", 1.5), ("steps", True), ("task", None), ("task", 7), ("betas", [0.9, "x"]), ("betas", {}), ("channel", 3),
     ("task_options", []), ("credit", 1), ("chat", "yes"), ("alpha", "1"), ("alpha", None), ("seed", "0")],
)  # fmt: skip
def test_a_configuration_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"not a training configuration: {name} is"):
        TrainConfig.from_json(json.dumps(json.loads(CONFIG.to_json()) | {name: value}))


def test_a_configuration_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(CONFIG.to_json())
    assert TrainConfig.from_file(file) == CONFIG
    for content in (b"\xff", b"[" * 100_000, b"", b"[]"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="not a training configuration"):
            TrainConfig.from_file(file)
    with pytest.raises(CheckpointError, match="no regular file"):
        TrainConfig.from_file(tmp_path)

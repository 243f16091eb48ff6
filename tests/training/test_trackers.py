"""The monitor's numbers in TensorBoard, trackio and W&B: read from what each of them wrote."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

import monitor_worker
from program import run_python

Curve = dict[str, dict[int, float]]
"""Name → step → value."""


def run(origin: Path, out: Path, tracker: str) -> Curve:
    """Six steps of SFT, measured after every second one, in a process of its own. Returns what the trainer's own log has."""
    env = {
        "TRACKIO_DIR": str(out / "trackio"),
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(out),
        "WANDB_DATA_DIR": str(out),
        "WANDB_CACHE_DIR": str(out),
        "WANDB_CONFIG_DIR": str(out),
        "WANDB_SILENT": "true",
        "HF_HUB_OFFLINE": "1",
    }
    cold = tracker == "trackio"  # it is imported by TRL, and reads its folder then
    done = run_python(monitor_worker.__file__, origin, out, tracker, libraries="training", cwd=out, env=env, cold=cold)
    assert done.returncode == 0, done.stderr[-4000:]
    logged: Curve = {}
    for row in json.loads((out / "facts-0.json").read_text())["history"]:
        for name, value in row.items():
            if name.startswith("geometry/"):
                logged.setdefault(name, {})[row["step"]] = value
    assert logged["geometry/norm"].keys() == {2, 4, 6} and logged["geometry/similarity_first"].keys() == {4, 6}
    assert len(logged) >= 7
    return logged


def check(written: Curve, logged: Curve) -> None:
    """Every number under the name that trainers give it; TensorBoard keeps float32."""
    found = {name: curve for name, curve in written.items() if name.startswith("train/geometry/")}
    assert {name.removeprefix("train/") for name in found} == logged.keys()
    for name, curve in logged.items():
        assert found[f"train/{name}"] == pytest.approx(curve, rel=1e-6), name


@pytest.mark.needs("tensorboard")
def test_tensorboard(origin: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = run(origin, tmp_path, "tensorboard")
    (events,) = (tmp_path / "runs").rglob("events.out.tfevents.*")
    read = EventAccumulator(str(events)).Reload()
    check({tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}, logged)


@pytest.mark.needs("trackio")
def test_trackio(origin: Path, tmp_path: Path) -> None:
    logged = run(origin, tmp_path, "trackio")
    code = """if True:
        import json
        from trackio import Api
        from trackio.sqlite_storage import SQLiteStorage
        (of,) = Api().runs("huggingface")
        print(json.dumps(SQLiteStorage.get_logs(of.project, of.name, run_id=of.id)))
    """
    done = run_python("-c", code, env={"TRACKIO_DIR": str(tmp_path / "trackio")}, cold=True)
    assert done.returncode == 0, done.stderr
    written: Curve = {}
    for row in json.loads(done.stdout):
        for name, value in row.items():
            written.setdefault(name, {})[row["train/global_step"]] = value
    check(written, logged)


def records(path: Path) -> Iterator[bytes]:
    """The records of a run's .wandb file: after seven bytes LevelDB's log format, blocks of 32 KiB with CRC, length and kind."""
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, part = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is filled up
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield part
            part = b""


@pytest.mark.needs("wandb")
def test_wandb_offline(origin: Path, tmp_path: Path) -> None:
    from wandb.proto import wandb_internal_pb2

    logged = run(origin, tmp_path, "wandb")
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    written: Curve = {}
    for record in map(wandb_internal_pb2.Record.FromString, records(file)):
        row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            written.setdefault(name, {})[row.get("train/global_step", -1)] = value
    check(written, logged)

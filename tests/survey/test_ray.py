"""`--engine ray` on a cluster of two nodes on this machine: the bytes of the local engine, whatever dies on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.checkpoints.names import matrices
from opdgeo.diagnostics import Settings
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.survey import engines
from opdgeo.survey.measure import Job
from program import SOURCE, Program, kept_matrices, run_opdgeo, start_opdgeo

FILES = ("measurements.parquet", "curves.parquet", "summary.json")
NODE = {"num_cpus": 1, "memory": 2_000_000_000, "object_store_memory": 80_000_000}
# a node that is gone is noticed at once, where a cluster waits a minute
HEALTH = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 2}
HEAD = NODE | {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True, "_system_config": HEALTH}
OPTIONS = ("--no-report", "--no-cache", "--nulls", "1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SOURCE), prepend=os.pathsep)
        running = Cluster(initialize_head=True, head_node_args=HEAD)
        running.add_node(**NODE)
        yield running
        running.shutdown()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two checkpoints, and OUT of the local engine."""
    folder = tmp_path_factory.mktemp("ray")
    rng = np.random.default_rng(0)
    names = [planted.tensor_name(layer, module) for layer in range(4) for module in ("self_attn.q_proj", "mlp.up_proj")]
    weights = {name: planted.weights(rng, 320, 256) for name in names}
    planted.write_checkpoint(folder / "base", weights, "bfloat16")
    for step in (10, 20):
        weights = {name: w + 3e-4 * rng.standard_normal(w.shape) for name, w in weights.items()}
        planted.write_checkpoint(folder / "run" / f"step-{step:06d}", weights, "bfloat16")
    done = run_opdgeo("track", folder / "base", folder / "run", "-o", folder / "local", *OPTIONS)
    assert done.returncode == 0, done.stderr
    return folder


def start(folder: Path, out: Path, address: str) -> Program:
    """The program, in the run's folder: the workers must find what is named relative to it."""
    return start_opdgeo(
        "track", "base", "run", "-o", out, *OPTIONS, "--engine", "ray", "--ray-address", address, cwd=folder
    )


def check(folder: Path, out: Path, process: Program) -> None:
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    for file in FILES:
        assert (out / file).read_bytes() == (folder / "local" / file).read_bytes(), file


def finished(out: Path, count: int, process: Program) -> None:
    """Wait until `count` matrices are finished."""
    while kept_matrices(out) < count:
        assert process.poll() is None, process.communicate()[1][-3000:]
        time.sleep(0.02)


def measuring(node: Any) -> list[int]:
    """Worker processes of a node that measure a matrix right now."""
    raylet = node.all_processes["raylet"][0].process.pid
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(raylet)], capture_output=True, text=True)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "_on_a_worker" in line]


@pytest.mark.needs("ray")
def test_a_killed_worker_and_a_lost_node_lose_nothing(cluster: Any, run_folder: Path, tmp_path: Path) -> None:
    process = start(run_folder, tmp_path / "out", cluster.address)
    finished(tmp_path / "out", 1, process)
    while not (busy := measuring(cluster.head_node)):
        assert process.poll() is None, "the run ended before a worker was seen"
    os.kill(busy[0], signal.SIGKILL)
    second = next(iter(cluster.worker_nodes))
    while not measuring(second):
        assert process.poll() is None, "the run ended before the second node measured anything"
    cluster.remove_node(second, allow_graceful=False)
    check(run_folder, tmp_path / "out", process)
    cluster.add_node(**NODE)

    # The driver itself dies: the same command goes on, on either engine.
    process = start(run_folder, tmp_path / "driver", cluster.address)
    finished(tmp_path / "driver", 2, process)
    process.kill()
    process.communicate()
    arguments = ("track", run_folder / "base", run_folder / "run", "-o", tmp_path / "driver", *OPTIONS)
    done = run_opdgeo(*arguments)
    assert done.returncode == 0
    assert "taken over from an earlier run" in done.stdout
    for file in FILES:
        assert (tmp_path / "driver" / file).read_bytes() == (run_folder / "local" / file).read_bytes(), file


@pytest.mark.needs("ray")
def test_pairs_on_a_cluster_are_the_bytes_of_the_local_engine(cluster: Any, run_folder: Path, tmp_path: Path) -> None:
    arguments = ("relate", "base", "run/step-000010", "run/step-000020", *OPTIONS)
    for out, engine in (("here", ()), ("there", ("--engine", "ray", "--ray-address", cluster.address))):
        done = run_opdgeo(*arguments, "-o", tmp_path / out, *engine, cwd=run_folder)
        assert done.returncode == 0, done.stderr[-3000:]
    for file in FILES:
        assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file


@pytest.mark.needs("ray")
def test_an_error_on_a_worker_reaches_the_user(cluster: Any, tmp_path: Path) -> None:
    for name in ("base", "tuned"):
        (tmp_path / name).mkdir()
        weights = {planted.tensor_name(0, "mlp.up_proj"): torch.ones(8, 4, dtype=torch.int8)}
        save_file(weights, tmp_path / name / "model.safetensors")
    done = run_opdgeo(
        "compare",
        tmp_path / "base",
        tmp_path / "tuned",
        "--engine",
        "ray",
        "-o",
        tmp_path / "out",
        env={"RAY_ADDRESS": cluster.address},
    )
    assert done.returncode == 2, done.stderr
    assert "is stored as I8" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_a_worker_does_not_see_is_named(run_folder: Path) -> None:
    opened = [open_checkpoint(run_folder / "base"), open_checkpoint(run_folder / "run" / "step-000010")]
    job = Job(opened[0], opened[1:], Settings(nulls=0), trajectory=False)
    matrix = pair(*opened).matrices[0]
    files = engines._files(job)
    for broken, says in (([(run_folder / "gone", 1)], "is not there"), ([(files[0][0], 1)], "is another file")):
        with pytest.raises(CheckpointError, match=f"{says}.*shared file system"):
            engines._on_a_worker((job, "/", broken, engines._versions()), matrix, None)
    with pytest.raises(ConfigError, match="as on the driver"):
        engines._on_a_worker((job, "/", files, {"opdgeo": "0"}), matrix, None)


def test_what_no_node_holds_is_refused_at_once() -> None:
    (matrix,) = matrices(planted.tensor_name(0, "mlp.up_proj"), (8, 4)) or []
    nodes = [
        {"Alive": True, "Resources": {"CPU": 4.0, "memory": 1e9}},
        {"Alive": False, "Resources": {"CPU": 4.0, "memory": 9e9}},
    ]
    engines._refuse_what_no_node_holds(nodes, matrix, {"CPU": 1, "GPU": 0, "memory": 10**9})
    with pytest.raises(ConfigError, match=r"no node .* 2\.0 GB; the largest of 1 nodes offers 1.0 GB"):
        engines._refuse_what_no_node_holds(nodes, matrix, {"CPU": 1, "GPU": 0, "memory": 2 * 10**9})
    with pytest.raises(ConfigError, match="a GPU"):
        engines._refuse_what_no_node_holds(nodes, matrix, {"CPU": 1, "GPU": 1, "memory": 10**9})


@pytest.mark.needs("ray")
def test_without_ray_or_a_cluster_the_user_is_told_what_to_do(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = (run_folder / "base", run_folder / "run" / "step-000010")
    with pytest.raises(ConfigError, match="without --engine ray"):
        opdgeo.compare(*arguments, ray_address="head:6379")
    done = run_opdgeo(
        "compare", *arguments, "--engine", "ray", "--ray-address", "127.0.0.1:9", "-o", run_folder / "none"
    )
    assert done.returncode == 2
    assert "no Ray cluster answers at 127.0.0.1:9" in done.stderr
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'opdgeo\[ray\]'"):
        opdgeo.compare(*arguments, engine="ray")

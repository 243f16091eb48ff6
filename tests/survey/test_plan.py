"""The plan reads headers, writes nothing, and refuses what cannot fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import opdgeo
import planted
from agreement import BASE, TUNED, write_pair
from opdgeo.checkpoints import open_checkpoint, pair
from opdgeo.survey import memory, plan
from program import run_opdgeo, run_python


def test_a_plan_names_every_shape_and_what_is_left_out(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    out = tmp_path / "out"
    for command in (["compare", base, tuned], ["track", base, tuned]):
        done = run_opdgeo(*command, "--plan", "-o", out)
        assert done.returncode == 0, done.stderr
        shapes = {BASE[name].shape for name in planted.linear(BASE)}
        for rows, cols in shapes:
            assert f"{rows}×{cols}" in done.stdout
        assert f"{len(planted.linear(BASE))} matrices" in done.stdout
        assert "GB available" in done.stdout
        assert "norm" in done.stdout
    assert not out.exists()


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = write_pair(tmp_path, (BASE, TUNED))
    opened = [open_checkpoint(base), open_checkpoint(tuned)]
    work = pair(*opened).matrices
    sizes = {m: memory.working_set(m, opened, opdgeo.Settings()) for m in work}
    monkeypatch.setattr(plan, "available_memory", lambda: max(sizes.values()) - 1)
    fitting = {m.role for m in work if sizes[m] < max(sizes.values())}
    with pytest.raises(opdgeo.errors.ConfigError, match="GB are available") as refused:
        opdgeo.compare(base, tuned)
    assert all(role in str(refused.value) for role in fitting)
    monkeypatch.setattr(plan, "available_memory", lambda: 10)
    with pytest.raises(opdgeo.errors.ConfigError, match="more memory"):
        opdgeo.compare(base, tuned)
    assert run_opdgeo("compare", base, tuned, "--plan", "--rank", "0").returncode == 2


MEASURED = """
import sys
from opdgeo.commands import main
try: main(sys.argv[1:])
except SystemExit as end: assert end.code == 0
print(*(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
SMOLLM2 = {
    "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
}  # fmt: skip
MODELS: dict[str, tuple[dict[str, tuple[int, int]], int]] = {
    "tiny": ({"self_attn.q_proj": (128, 128), "mlp.up_proj": (384, 128)}, 512),
    "smollm2": (SMOLLM2, 512),
    "large": ({"self_attn.q_proj": (1536, 1536), "self_attn.o_proj": (1536, 1536)}, 128),
}


@pytest.mark.needs("proc")
@pytest.mark.parametrize("model", MODELS)
def test_a_run_takes_the_memory_that_was_planned(model: str, tmp_path: Path) -> None:
    shapes, rank = MODELS[model]
    rng = torch.Generator().manual_seed(0)
    weights = {planted.tensor_name(0, m): 0.02 * torch.randn(*s, generator=rng) for m, s in shapes.items()}
    for name, step in (("base", 0.0), ("tuned", 1e-5)):
        (tmp_path / name).mkdir()
        moved = {n: (w + step * torch.randn(w.shape, generator=rng)).half() for n, w in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors")
    arguments = [
        "compare",
        tmp_path / "base",
        tmp_path / "tuned",
        "--rank",
        rank,
        "-o",
        tmp_path / "out",
        "--workers",
        2,
        "--nulls",
        1,
        *(["--no-report"] if model != "tiny" else []),  # a page takes the same for any size
    ]
    # Its own start, as the plan counts what the process holds already.
    text = run_opdgeo(*arguments, "--plan", cold=model == "tiny").stdout
    planned = float(re.findall(r"at most ([\d.]+) GB", text)[0])
    done = run_python("-c", MEASURED, *arguments, env={"OPDGEO_CACHE": str(tmp_path / "cache")}, cold=True)
    assert done.returncode == 0, done.stderr
    measured = int(done.stdout.split()[-1]) * 1024 / 1e9
    assert measured / 1.5 < planned < 1.5 * measured, text
    assert json.loads((tmp_path / "out" / "run.json").read_text())["peak_memory_bytes"] / 1e9 < 1.5 * planned
    print(f"{model}: planned {planned:.2f} GB, measured {measured:.2f} GB")


def test_matrices_wait_until_there_is_room() -> None:
    room = memory.Memory(10)
    with room.room_for(100):  # one alone always may
        assert room.used == 100
    with room.room_for(4), room.room_for(6):
        assert room.used == 10
    assert room.used == 0

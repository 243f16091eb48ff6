"""What it brings that a training process keeps the memory it frees: python benchmarks/keep_memory.py [--preset smollm2] [--steps 6] [--rounds 2]

OPD steps of a preset on one core, each time in a process of its own, with `opdgeo.machine.keep_freed_memory` and without in
turn. The teacher is the released model, which costs what the preset's own does. Printed are the seconds of a step by the clock, the mean of
the second half of the steps, how much of a whole run the kernel took, and the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def measure(preset: str, steps: int, keep: bool) -> dict[str, float]:
    import torch

    from opdgeo.experiments.presets import train_config
    from opdgeo.machine import keep_freed_memory
    from opdgeo.training.callbacks import read_log
    from opdgeo.training.train import train

    torch.set_num_threads(1)
    if keep:
        keep_freed_memory()
    start = "tiny/base" if preset == "tiny" else preset
    few = {"steps": steps, "checkpoints": (1.0,), "eval_prompts": 0, "eval_prompts_between": 0, "monitor": 0}
    config = train_config("opd", preset, origin=start, teacher="tiny/teacher" if preset == "tiny" else start, **few)
    with tempfile.TemporaryDirectory() as folder:
        train(config, Path(folder) / "run", progress=False)
        seconds = [row["seconds"] for row in read_log(Path(folder) / "run") if row["event"] == "step"]
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds a step": statistics.mean(seconds[steps // 2 :]),
        "share of the kernel": used.ru_stime / (used.ru_stime + used.ru_utime),
        "peak GB": used.ru_maxrss / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--preset", default="smollm2", choices=("tiny", "smollm2"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--one", choices=("kept", "returned"), help="measure this in the present process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.preset, options.steps, options.one == "kept")))
        return
    found: dict[str, list[float]] = {"kept": [], "returned": []}
    for _ in range(options.rounds):
        for name, seconds in found.items():
            command = [
                sys.executable,
                __file__,
                "--preset",
                options.preset,
                "--steps",
                str(options.steps),
                "--one",
                name,
            ]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            seconds.append(row["seconds a step"])
            print(f"{name:9}" + "".join(f"  {key} {value:.3g}" for key, value in row.items()), flush=True)
    print(f"returned over kept: {min(found['returned']) / min(found['kept']):.2f}")


if __name__ == "__main__":
    main()

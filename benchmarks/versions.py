"""Two versions of opdgeo on the same inputs, in turn: what became faster, and whether anything became slower.

    python benchmarks/versions.py COMMIT .                   # a commit and this checkout: two hours on two cores
    python benchmarks/versions.py OLD NEW --only experts page --repeats 3

A version is a commit of this repository or the folder of a checkout. Each case is the whole program, from the start of Python to the
files on disk. The versions take turns, so that a slow moment of the machine meets both; the ratio is of the fastest runs.

    smollm2          SmolLM2-135M with all 210 matrices moved (`smollm2.py`), nulls and page off
    smollm2 nulls    the same as it comes, the page included
    large update     the same with an update of 1 % and its nulls, page off
    experts          6,144 experts of 96×64 (`experts.py`), nulls and page off
    page             the page of the packaged pair, from its finished results
    reproduce        the small study of the tiny preset, `make reproduce` without installation
    study            every arm of the full study for a few steps (`--rehearse`): what its processes cost beside training. Versions have
                     other arms, so it is a run as a whole that is compared.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import experts
import smollm2
from identity import THREADS, Version, checkout

PR_SET_CHILD_SUBREAPER = 36  # of Linux: what a child leaves behind is waited for here, and its seconds count
OFF = ("--nulls", "0", "--no-report", "--no-cache")
CASES = {
    "smollm2": OFF,
    "smollm2 nulls": ("--no-cache",),
    "large update": ("--no-report", "--no-cache"),
    "experts": OFF,
    "page": (),
    "reproduce": (),
    "study": ("--study", "full", "--rehearse"),
}
"""Case → options of its command."""


def prepare(case: str, folder: Path) -> list[str]:
    """Write what the case reads, once for both versions, and return the command's arguments."""
    if case in ("reproduce", "study"):
        return ["reproduce", "--preset", "tiny"]
    if case == "experts":
        experts.write(folder, 6144)
        return ["compare", str(folder / "base"), str(folder / "tuned")]
    if case == "page":
        from opdgeo.training.models import resolve

        return ["compare", str(resolve("tiny/base")), str(resolve("tiny/teacher")), "--no-report"]
    base = smollm2.smollm2()
    folder.mkdir(parents=True)
    smollm2.moved(base, folder / "tuned", 1e-2 if case == "large update" else 1e-3)
    return ["compare", str(base), str(folder / "tuned")]


def run(version: Version, arguments: list[str], out: Path) -> tuple[float, float]:
    """Processor and wall seconds of `opdgeo` with these arguments."""
    environment = {
        name: value for name, value in version.environment.items() if name not in THREADS
    }  # as a user starts it
    before, start = os.times(), os.times().elapsed
    done = subprocess.run(
        [sys.executable, "-m", "opdgeo", *arguments], env=environment, cwd=out.parent, capture_output=True, text=True
    )
    ended = os.times().elapsed
    with suppress(ChildProcessError):  # its servers of processes, which end after it
        while True:
            os.wait()
    after = os.times()
    if done.returncode:
        raise SystemExit(f"{version.name}: {' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return (
        after.children_user + after.children_system - before.children_user - before.children_system,
        ended - start,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    print("| case | processor s before | after | ratio | wall s before | after | ratio |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="opdgeo-versions-") as temporary,
        checkout(args.before, Path(temporary)) as old,
        checkout(args.after, Path(temporary)) as new,
    ):
        work = Path(temporary)
        versions = [Version("before", old, work / "before"), Version("after", new, work / "after")]
        for case in args.only:
            folder = work / case.replace(" ", "-")
            arguments = prepare(case, folder / "in")
            best: list[tuple[float, float]] = []
            for version in versions:
                version.results.mkdir(exist_ok=True)
                best.append((float("inf"), float("inf")))
                if case == "page":
                    out = folder / version.name / "out"
                    out.parent.mkdir(parents=True)
                    run(version, [*arguments, "--no-cache", "-o", str(out)], out)
            for _ in range(args.repeats):
                for i, version in enumerate(versions):
                    out = folder / version.name / "out"
                    if case == "page":
                        command = ["report", str(out)]
                    else:
                        shutil.rmtree(out.parent, ignore_errors=True)
                        out.parent.mkdir(parents=True)
                        command = [*arguments, *CASES[case], "-o", str(out)]
                    best[i] = tuple(map(min, best[i], run(version, command, out)))
            shutil.rmtree(folder, ignore_errors=True)
            (cpu, wall), (cpu_now, wall_now) = best
            print(
                f"| {case} | {cpu:.1f} | {cpu_now:.1f} | {cpu / cpu_now:.2f}× | {wall:.1f} | {wall_now:.1f} | {wall / wall_now:.2f}× |",
                flush=True,
            )


if __name__ == "__main__":
    main()

"""`python -m torture`: see `--help` and docs/reliability.md."""

from __future__ import annotations

import argparse
import gc
import json
import os
import pickle
import shutil
import sys
import tempfile
import time
from pathlib import Path

import one_thread  # noqa: F401 (before what it holds)
from torture import kills
from torture.families import FAMILIES, Family, prepare, warm
from torture.oracle import Outcome, interleaved, run

BATCH = 400
LIBRARIES = ("opdgeo.survey.follow", "opdgeo.report.page", "opdgeo.report.terminal", "opdgeo.diagnostics.gaussian_null", "opdgeo.training.channel",
             "opdgeo.training.served", "opdgeo.training.config", "opdgeo.training.rollouts", "opdgeo.tasks.arithmetic", "gguf", "matplotlib.pyplot", "pyarrow.parquet")  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(prog="torture", description=__doc__)
    options.add_argument(
        "--seed", type=int, default=int(time.time()), help="of all random choices (default: the time; it is printed)"
    )
    options.add_argument("--inputs", type=int, default=200_000, help="mutated inputs in all (default: 200000)")
    options.add_argument(
        "--minutes", type=float, default=55.0, help="end after so long; a family gets its share (default: 55)"
    )
    options.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: one a core)"
    )
    options.add_argument(
        "--only", default="", help="names of families, comma-separated; FAMILY:INDEX runs one input and keeps its files"
    )
    options.add_argument(
        "--no-kills", action="store_true", help="leave out the kills and broken disks (kills in --only: nothing else)"
    )
    options.add_argument("--json", type=Path, help="write the figures here too")
    args = options.parse_args()
    name, _, index = args.only.partition(":")
    chosen = [f for f in FAMILIES if not args.only or f.name in (name if index else args.only).split(",")]
    if args.only and not chosen and args.only != "kills":
        options.error(f"no family {args.only}; expected some of {', '.join(f.name for f in FAMILIES)}, kills")
    import importlib

    for library in LIBRARIES:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # a child's collector leaves the shared pages alone
    place = Path(tempfile.mkdtemp(prefix="opdgeo-torture-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        if index:
            return one(chosen[0], args.seed, int(index), place)
        print(f"seed {args.seed}, {args.inputs} inputs, {args.jobs} processes", flush=True)
        each, rest, until = (
            sum(f.share for f in chosen),
            sum(f.share for f in chosen),
            time.monotonic() + 60 * args.minutes,
        )
        found: dict[str, Outcome] = {}
        for f in chosen:  # what one family leaves of its time is there for the next
            seconds = (until - time.monotonic()) * min(1.0, 5 * f.share / rest)
            rest -= f.share
            found[f.name] = of_family(f, args.seed, round(args.inputs * f.share / each), seconds, args.jobs, place)
        reports = {}
        if not args.no_kills and (not args.only or "kills" in args.only.split(",")):
            reports = kills.everything(place)
        return report(found, reports, args.seed, args.json)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def of_family(family: Family, seed: int, inputs: int, seconds: float, jobs: int, place: Path) -> Outcome:
    """Run a family's inputs in `jobs` processes, and print its line."""
    until = time.monotonic() + seconds
    children = {}
    for worker in range(jobs):
        if pid := os.fork():
            children[pid] = place / f"{worker}.pickle"
            continue
        mine, out = place / str(worker), Outcome()
        (mine / "outside").mkdir(parents=True, exist_ok=True)
        (mine / "outside" / "secret.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
        os.environ |= {"OPDGEO_CACHE": str(mine / "cache"), "HF_HUB_OFFLINE": "1"}
        warm(mine)
        try:
            for batch in interleaved(inputs, BATCH, worker, jobs):
                if time.monotonic() > until:
                    break
                add(out, run(family.name, seed, batch, prepare(family, seed, mine), mine))
            (place / f"{worker}.pickle").write_bytes(pickle.dumps(out))
        finally:
            os._exit(0)
    total = Outcome()
    for pid, file in children.items():
        os.waitpid(pid, 0)
        add(total, pickle.loads(file.read_bytes()))
        file.unlink()
        shutil.rmtree(file.with_suffix(""), ignore_errors=True)
    print(line(family.name, total), flush=True)
    for finding in total.findings.values():
        print(
            f"  FINDING {finding.family}:{finding.index} ({finding.times}×) {finding.where}\n    {finding.what}",
            flush=True,
        )
    return total


def add(total: Outcome, more: Outcome) -> None:
    for name in ("inputs", "refused", "accepted", "seconds"):
        setattr(total, name, getattr(total, name) + getattr(more, name))
    for finding in more.findings.values():
        total.add(finding, finding.times)


def line(name: str, of: Outcome) -> str:
    each = 1000 * of.seconds / max(of.inputs, 1)
    return f"{name:18} {of.inputs:8} inputs {of.refused:8} refused {of.accepted:8} accepted {len(of.findings):4} findings {of.seconds:8.1f} s ({each:.1f} ms each)"


def report(found: dict[str, Outcome], reports: dict[str, kills.Report], seed: int, file: Path | None) -> int:
    total = Outcome()
    for one_ in found.values():
        add(total, one_)
    print(line("all", total))
    if file:
        families = {
            name: {"inputs": o.inputs, "refused": o.refused, "accepted": o.accepted, "findings": [vars(f) for f in o.findings.values()], "seconds": round(o.seconds, 1)}
            for name, o in {**found, "all": total}.items()
        }  # fmt: skip
        of_kills = {name: vars(one_) for name, one_ in reports.items()}
        file.write_text(json.dumps({"seed": seed, "families": families, "kills": of_kills}, indent=1) + "\n")
    return 1 if total.findings or any(r.wrong for r in reports.values()) else 0


def one(family: Family, seed: int, index: int, place: Path) -> int:
    """One input in this process, without limits, for a debugger; its files stay."""
    kept = Path(tempfile.mkdtemp(prefix="opdgeo-torture-input-"))
    os.environ |= {"OPDGEO_CACHE": str(kept / "cache"), "HF_HUB_OFFLINE": "1"}
    warm(kept)
    case = prepare(family, seed, kept)(index)
    print(f"{family.name}:{index} of seed {seed} in {kept / 'in'}", flush=True)
    print("accepted" if case() else "refused")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs that end early: every signal at every moment of every kind of run, and what is refused or full on the way.

Each case is a real process (`program.py`). The same command, given again, has to end with the bytes of a run that nothing disturbed, and
leave nothing beside them: not in OUT, nor in the cache, nor in the folder for temporary files.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import planted
import program
from program import run_python, start_python

SIGNALS = ("SIGINT", "SIGTERM", "SIGKILL")
MOMENTS = ("open", "first matrix", "cache save", "part save", "between the tables", "report", "clean-up")
KINDS = ("fresh", "resumed", "changed setting", "follow")
DATA = ("measurements.parquet", "curves.parquet", "summary.json")
OPTIONS = ("--nulls", "0", "--top-k", "4", "--mask-rank", "4")

# The program; at a moment a signal comes, or an error of the disk in place of a change of OUT or of the cache.
CODE = """
import errno, json, os, resource, signal, sys
how = json.loads(sys.argv[1])
out, cache, tuned = how["out"], how["cache"], how["tuned"]
from opdgeo.commands import main
from opdgeo.survey import engines
note = os.open(how["note"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
count = done = 0

def strike():
    global done
    if not done:
        done = 1
        os.pwrite(note, b"struck", 0)
        os.kill(os.getpid(), getattr(signal, how["signal"]))

def at(moment):
    if moment == how.get("moment"):
        strike()

def changes(event, args):  # whether OUT or the cache is changed
    if event == "open":
        return args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith((out, cache))
    return event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(args[0]).startswith((out, cache))

def fail():
    global count
    count += 1
    if count == how.get("fault"):
        os.pwrite(note, b"struck", 0)
        raise OSError(how["errno"], os.strerror(how["errno"]))

def watch(event, args):
    if "moment" in how:
        if event == "open" and str(args[0]).startswith(tuned):
            at("open")
        if event == "os.rename":
            to = str(args[1])
            at("cache save" if to.startswith(cache) and to.endswith(".safetensors") else "between the tables" if to.endswith("curves.parquet")
               else "report" if to.endswith("report.html") else "part save" if "/.parts/" in to else "")
        if event == "shutil.rmtree" and str(args[0]).endswith(".parts"):
            at("clean-up")
    elif changes(event, args):
        fail()

sys.addaudithook(watch)
write, sync, measure = os.write, os.fsync, engines.measure

def writing(file, content):  # of the journal: half of a line is there
    if how.get("moment") == "part save" and not done and bytes(content[:10]).startswith(b'\\n{"matrix"'):
        write(file, content[: len(content) // 2])
        strike()
        import time
        time.sleep(3)
    if "fault" in how:
        fail()
    return write(file, content)

def syncing(file):
    if "fault" in how:
        fail()
    return sync(file)

def measuring(*arguments):
    at("first matrix")
    return measure(*arguments)

os.write, os.fsync, engines.measure = writing, syncing, measuring
if how.get("reads"):
    read, reads = os.preadv, 0
    def reading(*arguments):
        global reads
        reads += 1
        if reads == how["reads"]:
            os.pwrite(note, b"struck", 0)
            raise OSError(how["errno"], os.strerror(how["errno"]))
        return read(*arguments)
    os.preadv = reading
if how.get("longest"):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (how["longest"], resource.RLIM_INFINITY))
try:
    main(sys.argv[2:])
finally:
    os.pwrite(note, b"%d" % count, 20)
"""


@dataclass
class Report:
    """How many cases there were, and those that went wrong."""

    cases: int = 0
    not_reached: int = 0  # moments that a run of this kind does not have
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, condition: object, what: str) -> None:
        if not condition:
            self.wrong.append(what)


class Place:
    """Checkpoints, a cache, a folder for temporary files, and runs of one kind of command."""

    def __init__(self, folder: Path, kind: str):
        self.folder, self.kind = folder, kind
        rng = np.random.default_rng(0)
        shapes = {"self_attn.q_proj": (256, 256), "mlp.up_proj": (48, 40), "mlp.down_proj": (40, 48)}
        names = {planted.tensor_name(0, module): shape for module, shape in shapes.items()}
        weights = {name: planted.weights(rng, *shape) for name, shape in names.items()}
        self.base = planted.write_checkpoint(folder / "base", weights, "float32")
        run = folder / "run"
        for step in (1, 2):
            weights = {n: w + 3e-4 * rng.standard_normal(w.shape) for n, w in weights.items()}
            planted.write_checkpoint(run / f"step-{step:06}", weights, "float32")
        (run / "config.json").write_text(json.dumps({"arm": "sft", "steps": 2}))
        self.tuned = run / "step-000001"
        self.page = False  # a second of the processor, or several
        self.then: tuple[Any, ...] = ("--rank", "6")  # the settings before, for a changed one
        self.out, self.cache, self.temporary = folder / "out", folder / "cache", folder / "tmp"

    def arguments(self, *more: object) -> list[str]:
        command = (
            ["track", self.base, self.folder / "run", "--follow"]
            if self.kind == "follow"
            else ["track", self.base, self.folder / "run"]
        )
        page = [] if self.page else ["--no-report"]
        return [*map(str, command), "-o", str(self.out), *OPTIONS, *page, *map(str, more or ("--rank", "8"))]

    def run(self, *more: object, **how: Any) -> tuple[subprocess.CompletedProcess[str], bool, int]:
        """The process, whether it was struck, and how many changes it counted."""
        note = self.folder / "note"
        about = json.dumps(
            how | {"out": str(self.out), "cache": str(self.cache), "tuned": str(self.tuned), "note": str(note)}
        )
        done = run_python("-c", CODE, about, *self.arguments(*more), env=self.environment(), timeout=300)
        said = note.read_bytes() if note.exists() else b""
        return done, said.startswith(b"struck"), int(said[20:].strip(b"\0") or 0)

    def environment(self) -> dict[str, str]:
        return {"OPDGEO_CACHE": str(self.cache), "TMPDIR": str(self.temporary)}

    def before(self, first: Path | None) -> None:
        """As it was before the run: OUT as an earlier one left it, or nothing."""
        for folder in (self.out, self.cache, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)
        self.temporary.mkdir()
        if first is not None:
            shutil.copytree(first, self.out)

    def left(self) -> set[str]:
        """What lies in OUT, the cache and the folder for temporary files that a finished run does not leave."""
        found = {f"out/{p.name}" for p in self.out.iterdir()} if self.out.is_dir() else set()
        found -= {f"out/{name}" for name in (*DATA, "run.json", "report.html")}
        found |= (
            {f"cache/{p.name}" for p in self.cache.iterdir() if p.suffix != ".safetensors" and p.name != "CACHEDIR.TAG"}
            if self.cache.is_dir()
            else set()
        )
        return found | {f"tmp/{p.name}" for p in self.temporary.iterdir()}

    def data(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in DATA if (self.out / name).exists()}

    def prepare(self) -> tuple[Path | None, dict[str, bytes]]:
        """The OUT that a run of this kind finds, and the data of one that nothing disturbs."""
        first: Path | None = None
        self.before(None)
        if self.kind == "resumed":
            calls = self.run(moment="between the tables", signal="SIGKILL")
            assert calls[1] and (self.out / ".parts").is_dir(), calls[0].stderr
            (journal,) = (self.out / ".parts").glob("*.jsonl")
            journal.write_bytes(b"\n".join(journal.read_bytes().split(b"\n")[:2]) + b"\n")  # one matrix
            for other in (p for p in self.out.iterdir() if p.name != ".parts"):
                other.unlink()
        elif self.kind == "changed setting":
            done, *_ = self.run(*self.then)
            assert done.returncode == 0, done.stderr
        if self.out.exists():
            first = self.folder / "first"
            shutil.copytree(self.out, first)
        self.before(None)
        done, *_ = self.run()
        assert done.returncode == 0, done.stderr
        whole = self.data()
        assert len(whole) == len(DATA) and not self.left(), self.left()
        return first, whole


def kill_matrix(folder: Path, cases: set[tuple[str, str, str]] | None = None) -> Report:
    """{signal} × {moment} × {kind}: struck there, then run again."""
    report = Report()
    for kind in KINDS:
        wanted = [(s, m) for s, m in product(SIGNALS, MOMENTS) if cases is None or (s, m, kind) in cases]
        if not wanted:
            continue
        place = Place(folder / kind, kind)
        first, whole = place.prepare()
        for name, moment in wanted:
            place.before(first)
            place.page = moment == "report"
            done, struck, _ = place.run(moment=moment, signal=name)
            place.page = False
            case = f"{name} at {moment}, {kind}"
            if not struck:
                report.not_reached += 1
                report.check(
                    done.returncode == 0, f"{case}: not reached, and status {done.returncode}: {done.stderr[-500:]}"
                )
                continue
            report.cases += 1
            if name == "SIGINT":  # a run that is followed may end with the checkpoints so far
                report.check(
                    done.returncode == 130 or (kind == "follow" and done.returncode == 0),
                    f"{case}: status {done.returncode}: {done.stderr[-800:]}",
                )
                partial = [p.name for where in (place.out, place.cache) for p in where.rglob("*.partial")]
                report.check(not partial, f"{case}: half-written files are left: {partial}")
            else:
                report.check(
                    done.returncode == -getattr(signal, name), f"{case}: status {done.returncode}: {done.stderr[-800:]}"
                )
            _again(place, whole, case, report)
        shutil.rmtree(place.folder)
    return report


def _again(place: Place, whole: dict[str, bytes], case: str, report: Report) -> None:
    done, *_ = place.run()
    report.check(done.returncode == 0, f"{case}: the rerun ends with {done.returncode}: {done.stderr[-800:]}")
    report.check(place.data() == whole, f"{case}: the rerun differs from a run that nothing disturbed")
    left = place.left()
    # A program that is killed cannot remove its temporary files.
    left = {name for name in left if not name.startswith("tmp/")} if "SIGKILL" in case or "SIGTERM" in case else left
    report.check(not left, f"{case}: left behind: {sorted(left)}")


# Disks ----------------------------------------------------------------------------------------------------------

ERRORS = (errno.ENOSPC, errno.EROFS, errno.EIO)


def faults(folder: Path, cases: list[dict[str, int]] | None = None) -> Report:
    """Each change of OUT and of the cache fails in turn, with each error; so do reads, and files beyond a length. Then without."""
    report = Report()
    place = Place(folder / "faults", "fresh")
    _, whole = place.prepare()
    place.before(None)
    _, _, changes = place.run(fault=0, errno=0)
    if everything := cases is None:
        cases = [dict(fault=n, errno=error) for error in ERRORS for n in range(1, changes + 1)]
        cases += [dict(reads=n, errno=errno.EIO) for n in range(1, 20)]
        cases += [dict(longest=n) for n in (200, 1000, 3000, 10_000, 30_000, 100_000)]
    for how in cases:
        place.before(None)
        done, *_ = place.run(**how)
        case = ", ".join(f"{k} {v}" for k, v in how.items())
        report.cases += 1
        report.check(done.returncode in (0, 2, 3), f"{case}: status {done.returncode}: {done.stderr[-1500:]}")
        report.check("Traceback" not in done.stderr, f"{case}: {done.stderr[-1500:]}")
        if done.returncode == 0:
            report.check(place.data() == whole, f"{case}: another result")
        _again(place, whole, case, report)
    if everything:
        _full_disks(place, whole, folder / "disk", report)
    shutil.rmtree(place.folder)
    return report


def _full_disks(place: Place, whole: dict[str, bytes], folder: Path, report: Report) -> None:
    with _small_disk(folder) as disk:
        for free in (20, 60, 100, 200) if disk else ():
            place.before(None)
            place.out = disk / "out"
            filler = disk / "filler"
            filler.write_bytes(bytes(1024 * (512 - free)))
            done, *_ = place.run()
            report.cases += 1
            case = f"a disk with {free} kB free"
            report.check(done.returncode in (0, 2), f"{case}: status {done.returncode}: {done.stderr[-1500:]}")
            filler.unlink()
            _again(place, whole, case, report)
            shutil.rmtree(place.out, ignore_errors=True)
            place.out = place.folder / "out"


@contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    """A disk of 512 kB in memory; None where it may not be mounted."""
    folder.mkdir()
    mounted = (
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(folder)], capture_output=True).returncode
        == 0
    )
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)
        folder.rmdir()


def two_at_once(folder: Path, times: int = 3) -> Report:
    """Two processes with one OUT and one cache: both end as promised, and what is there in the end is whole."""
    report = Report()
    place = Place(folder / "two", "fresh")
    _, whole = place.prepare()
    for turn in range(times):
        place.before(None)
        both = [start_python("-m", "opdgeo", *place.arguments(), env=place.environment()) for _ in range(2)]
        for one in both:
            _, said = one.communicate(300)
            report.check(one.returncode in (0, 2), f"two at once, turn {turn}: status {one.returncode}: {said[-1500:]}")
        report.cases += 1
        _again(place, whole, f"two at once, turn {turn}", report)
    shutil.rmtree(place.folder)
    return report


def everything(folder: Path) -> dict[str, Report]:
    """All of them, with a server of programs where there is none yet."""
    found = {}
    with program.server():
        for name, attack in (("kills", kill_matrix), ("faults", faults), ("two at once", two_at_once)):
            before = time.monotonic(), program.spent
            report = attack(folder / name.replace(" ", "-"))
            report.seconds = program.spent - before[1]
            found[name] = report
            print(
                f"{name:18} {report.cases:8} cases {report.not_reached:4} not reached {len(report.wrong):4} findings {report.seconds:8.1f} s",
                flush=True,
            )
            for wrong in report.wrong:
                print(f"  FINDING {wrong}", flush=True)
    return found

"""`python -m mutants`: see `--help` and docs/reliability.md."""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import one_thread  # noqa: F401 (before what it holds)
from mutants import process
from mutants.changes import Place, changes
from mutants.process import FOLDERS, ROOT

TESTS = [
    *(f"tests/{folder}/test_*.py" for folder in ("numerics", "diagnostics", "checkpoints")),
    *(f"tests/survey/test_{name}.py" for name in ("compare", "relate", "means")),
    "tests/experiments/test_gradient_signals.py",
    "tests/gpu/test_numerics.py",
    "tests/docs/test_docstring_examples.py",
]
KEPT = ROOT / "build" / "mutants.json"  # which test runs which line
CONTROLS = 3  # runs without a change, of the tests of some: none may fail


@dataclass(frozen=True)
class Mutant:
    """A change by its place in `changes`; `index` −1 is none, a control."""

    file: str
    index: int
    line: int
    what: str
    place: Place

    def __str__(self) -> str:
        return f"{self.file.removeprefix('src/opdgeo/')}:{self.line}  {self.what}"


class Lines:
    """Which tests run which lines, kept from one call to the next; files of tests that changed are run again."""

    def __init__(self, jobs: int):
        sources = [f for f in sorted((ROOT / "src").rglob("*.py")) + sorted((ROOT / "tests").glob("*.py"))]
        now = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()
        kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
        known = kept.get("files", {}) if kept.get("sources") == now else {}
        files = [f for place in TESTS for f in sorted(ROOT.glob(place))]
        wanted = {str(f.relative_to(ROOT)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        old = [f for f, digest in wanted.items() if known.get(f, {}).get("digest") != digest]
        if old:
            print(f"running {len(old)} files of tests, to know which run which lines", flush=True)
        for file, found in spread(lines_of, old, jobs):
            known[file] = {"digest": wanted[file], **found}
            print(f"  {len(found['tests']):4} tests of {file}", flush=True)
            KEPT.parent.mkdir(exist_ok=True)
            KEPT.write_text(json.dumps({"sources": now, "files": known}))
        for test in (t for file in wanted for t in known[file]["failed"]):
            print(f"  not used, it fails or is left out: {test}")
        self.seconds: dict[str, float] = {}
        self.of: dict[str, dict[int, set[str]]] = {}
        for file in wanted:
            for test, (seconds, files) in known[file]["tests"].items():
                self.seconds[test] = seconds
                for source, lines in files.items():
                    for line in lines:
                        self.of.setdefault(source, {}).setdefault(line, set()).add(test)
        self.text = {source: (ROOT / source).read_text().splitlines() for source in self.of}

    def tests(self, mutant: Mutant, most: float) -> dict[str, float]:
        """The tests that a change may concern, with their seconds, `most` together: the quick ones first; those of a file together
        where they are about as quick, since they share its fixtures."""
        place, here = mutant.place, self.of.get(mutant.file, {})
        found: set[str] = set()
        if place.runs:
            found = self._between(mutant.file, place.lines)
        elif place.users and isinstance(place.users[0], int):
            found = self._between(mutant.file, place.users)
        elif place.users:
            word = re.compile(rf"\b(?:{'|'.join(map(str, place.users))})\b")
            for source, text in self.text.items():
                for line in (n for n, content in enumerate(text, 1) if word.search(content)):
                    found |= self.of[source].get(line, set())
        if not found and not place.runs:
            found = set().union(*here.values())

        def order(test: str) -> tuple[int, str, float, str]:
            about = max(0, math.ceil(math.log(max(self.seconds[test], 1e-3) / 0.1, 4)))
            return about, test.partition("::")[0], self.seconds[test], test

        chosen, total = {}, 0.0
        for test in sorted(found, key=order):
            total += self.seconds[test]
            if total > most and chosen:
                break
            chosen[test] = self.seconds[test]
        return chosen

    def _between(self, source: str, lines: Any) -> set[str]:
        return set().union(*(self.of.get(source, {}).get(n, set()) for n in range(lines[0], lines[1] + 1)))


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A folder that a child may use; `TemporaryDirectory` would be removed by the child when it ends."""
    place = Path(tempfile.mkdtemp(prefix="opdgeo-mutants-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def spread(work: Callable[[Any], Any], tasks: Sequence[Any], jobs: int) -> Iterator[Any]:
    """The results of `work` as they come, from `jobs` processes. Tests may start processes there, which a `Pool` does not allow."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(work, task) for task in tasks]):
            yield done.result()


def lines_of(file: str) -> tuple[str, dict[str, Any]]:
    with folder() as place:

        def work(place: Path) -> int:
            lines = process.Lines(place)
            process.run([file], lines)
            (place / "found").write_text(json.dumps(lines.found()))
            return 0

        status, _ = process.forked(work, place, 1200, 3600)
        if status != 0:
            raise RuntimeError(f"{file}: {(place / 'output').read_text()[-2000:]}")
        return file, json.loads((place / "found").read_text())


def outcome(task: tuple[Mutant, dict[str, float]]) -> tuple[Mutant, str, str, float]:
    """What became of a mutant ("killed", "time", "survived", "not run"), the test that killed it, and processor seconds."""
    mutant, tests = task
    if not tests:
        return mutant, "not run", "", 0.0
    with folder() as place:

        def work(place: Path) -> int:
            if mutant.index >= 0:
                tree, path = ast.parse((ROOT / mutant.file).read_text()), ROOT / mutant.file
                for i, change in enumerate(changes(tree)):
                    if i == mutant.index:
                        change.make()
                        break
                process.put(path, compile(tree, str(path), "exec"))
            files = sorted({test.partition("::")[0] for test in tests})
            return process.run(files, process.Chosen(tests, place), "-x")

        planned = sum(tests.values())
        status, seconds = process.forked(work, place, 20 + 4 * planned, 120 + 20 * planned)
        failed = place / "failed"
        by = failed.read_text() if failed.exists() else "the import" if status == 2 else f"status {status}"
        if status == 5 and mutant.index >= 0:  # the change took the tests' own parameters away
            status = 0
        return mutant, {None: "time", 0: "survived"}.get(status, "killed"), by if status else "", seconds


def all_mutants(only: list[str]) -> list[Mutant]:
    found = []
    for path in (p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))):
        file = str(path.relative_to(ROOT))
        for i, c in enumerate(changes(ast.parse(path.read_text()))):
            short = file.removeprefix("src/opdgeo/")
            if not only or any(
                o in (f"{short}:{c.line}", f"{short}:{c.line}  {c.what}")
                or (short + "/").startswith(o.rstrip("/") + "/")
                for o in only
            ):
                found.append(Mutant(file, i, c.line, c.what, c.place))
    return found


def wilson(killed: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    z, p = 1.96, killed / of
    middle, half = p + z * z / (2 * of), z * math.sqrt(p * (1 - p) / of + z * z / (4 * of * of))
    return (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


def main() -> int:
    options = argparse.ArgumentParser(
        prog="mutants",
        description="Change the numerics, the diagnostics and the readers, and see whether a test notices.",
    )
    options.add_argument(
        "--seed", type=int, default=int(time.time()), help="of the sample (default: the time; it is printed)"
    )
    options.add_argument("--count", type=int, default=400, help="changes in the sample (default: 400)")
    options.add_argument("--all", action="store_true", help="every change")
    options.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PLACE",
        help="numerics, numerics/nulls.py, numerics/nulls.py:120, or a line of --list",
    )
    options.add_argument("--most", type=float, default=60.0, help="seconds of tests for a change (default: 60)")
    options.add_argument("--list", action="store_true", help="say what would be changed, and run nothing")
    options.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time (default: one a core)"
    )
    args = options.parse_args()
    found = all_mutants(args.only)
    sample = found if args.all else random.Random(args.seed).sample(found, min(args.count, len(found)))
    if not sample:
        options.error("nothing to change there; --list shows what is")
    if args.list:
        print(*sample, sep="\n")
        return 0
    process.load()
    gc.collect()
    gc.freeze()  # a child's collector leaves the shared pages alone
    lines = Lines(args.jobs)
    tasks = [(mutant, lines.tests(mutant, args.most)) for mutant in sample]
    quick = [(m, tests) for m, tests in tasks if 0 < sum(tests.values()) < 10][:CONTROLS]
    controls = [(Mutant(m.file, -1, m.line, "nothing", m.place), tests) for m, tests in quick]
    print(f"seed {args.seed}: {len(sample)} of {len(found)} changes, {args.jobs} processes", flush=True)
    counts: dict[str, list[Mutant]] = {"killed": [], "time": [], "survived": [], "not run": []}
    spent, wrong = 0.0, []
    for mutant, what, by, seconds in spread(outcome, tasks + controls, args.jobs):
        spent += seconds
        if mutant.index < 0:
            wrong += [] if what == "survived" else [f"{mutant}: {what} by {by}"]
            continue
        counts[what].append(mutant)
        print(f"{what:8} {seconds:6.1f} s  {mutant}  {by}", flush=True)
    killed = len(counts["killed"]) + len(counts["time"])
    survivors = sorted(map(str, counts["survived"] + counts["not run"]))
    low, high = wilson(killed, len(sample))
    print(*(f"survived: {s}" for s in survivors), sep="\n")
    print(
        f"seed {args.seed}: {killed} of {len(sample)} killed, {killed / len(sample):.1%} (95 % interval {low:.1%} to {high:.1%}); "
        f"{len(counts['time'])} of them by the time limit, {len(counts['not run'])} of the others run by no test; {spent:.0f} s of processor time"
    )
    if wrong:
        print("A test fails without a change, so the figures above say nothing:", *wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())

"""Whether an input ends well: within its limits, by success or an `OpdgeoError`, with nothing touched that is not its own.

Inputs run in children that are forked for a batch of them. Each has 10 s of a core, measured by the kernel's timer, which also ends
what hangs in C, and the batch has 2 GB of addresses beyond what the child starts with. A child that dies names the input by the
last one it reported; that input runs again alone before it counts, so that what earlier ones left behind is not held against it.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS, MEMORY = 10, 2 << 30
WAIT = 10  # seconds in which a child says nothing and takes nothing of a core: it waits for what never comes

Case = Callable[[], bool]  # runs one input; whether it was accepted


@dataclass
class Finding:
    family: str
    what: str
    where: str
    index: int
    seed: int
    times: int = 1


@dataclass
class Outcome:
    """What became of the inputs of a family."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    seconds: float = 0.0  # of processor time
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, finding: Finding, times: int = 1) -> None:
        known = self.findings.setdefault(f"{finding.family} {finding.what.partition(':')[0]} {finding.where}", finding)
        known.times += times if known is not finding else 0


def run(family: str, seed: int, indices: range, prepare: Callable[[int], Case], place: Path) -> Outcome:
    """Run the inputs `indices`, of which `prepare(index)` writes one below `place` and returns what reads it."""
    out = Outcome()
    todo = list(indices)
    before = _listing(place)
    while todo:
        reported, seconds, ended = _child(todo, prepare, place)
        out.seconds += seconds
        for index, kind, what, where in reported:
            out.inputs += 1
            out.refused += kind == "refused"
            out.accepted += kind == "accepted"
            if kind == "finding":
                out.add(Finding(family, what, where, index, seed))
        todo = todo[len(reported) :]
        if ended and todo:
            (index, *todo) = todo
            out.inputs += 1
            alone, seconds, again = _child([index], prepare, place)
            out.seconds += seconds
            if again:
                out.add(Finding(family, again, "", index, seed))
            else:
                ((_, kind, what, where),) = alone
                out.refused += kind == "refused"
                out.accepted += kind == "accepted"
                if kind == "finding":
                    out.add(Finding(family, what, where, index, seed))
    if (after := _listing(place)) != before:
        changed = sorted({p for p, _ in before ^ after})
        out.add(Finding(family, f"touched beside its own folder: {', '.join(changed[:3])}", "", indices.start, seed))
    return out


def _listing(place: Path) -> set[tuple[str, str]]:
    """What lies at `place`, outside of the inputs' own folders, and a hash of each file."""
    found = set()
    for path in sorted(place.rglob("*")):
        inside = path.relative_to(place)
        if inside.parts[0] in ("in", "out", "cache"):
            continue
        found.add((str(inside), hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"))
    return found


def _child(
    todo: list[int], prepare: Callable[[int], Case], place: Path
) -> tuple[list[tuple[int, str, str, str]], float, str]:
    """(what was reported of each input, processor seconds, how the child ended if not well)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        status = 1
        try:
            _work(todo, prepare, place, write)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    text, hung, used = b"", False, -1
    while True:
        if not select.select([read], [], [], WAIT)[0]:
            before, used = used, _ticks(pid)
            if used == before:
                os.kill(pid, signal.SIGKILL)
                hung = True
            continue
        got = os.read(read, 1 << 16)
        if not got:
            break
        text += got
    os.close(read)
    _, status, usage = os.wait4(pid, 0)
    reported = [tuple(json.loads(line)) for line in text.split(b"\n")[:-1]]
    ended = ""
    if hung:
        ended = "waits for what never comes"
    elif os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        ended = (
            f"more than {SECONDS} s of a core"
            if number == signal.SIGPROF
            else f"killed by {signal.Signals(number).name}"
        )
    elif status:
        ended = f"ended with status {os.WEXITSTATUS(status)}"
    return reported, usage.ru_utime + usage.ru_stime, ended  # type: ignore[return-value]


def _ticks(pid: int) -> int:
    """Processor time of a process, in the kernel's ticks."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return int(user) + int(system)


def _work(todo: list[int], prepare: Callable[[int], Case], place: Path, write: int) -> None:
    from opdgeo.errors import OpdgeoError

    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(quiet, stream)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    touched = _watch(place)
    for index in todo:
        kind, what, where = "accepted", "", ""
        try:
            case = prepare(index)
        except BaseException:
            os.write(
                write,
                json.dumps(
                    (index, "finding", "the torture program itself: " + traceback.format_exc()[-1500:], "")
                ).encode()
                + b"\n",
            )
            continue
        touched.clear()
        touched.append("on")
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            if not case():
                kind = "refused"
        except OpdgeoError as error:
            kind = "refused"
            try:
                str(error).encode()
            except UnicodeEncodeError:
                kind, what = "finding", "a message that cannot be written"
        except MemoryError as error:
            kind, what, where = "finding", "more than 2 GB", _where(error)
        except BaseException as error:
            kind, what, where = "finding", f"{type(error).__name__}: {str(error)[:300]}", _where(error)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if len(touched) > 1:
            kind, what, where = "finding", f"reached out: {touched[1]}", ""
        touched.clear()
        os.write(write, json.dumps((index, kind, what, where)).encode() + b"\n")


def _where(error: BaseException) -> str:
    """The last frame inside of the package, else the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    inside = [f for f in frames if "/opdgeo/" in f.filename] or list(frames[-1:])
    return f"{inside[-1].filename.rpartition('/src/')[2]}:{inside[-1].lineno} {inside[-1].name}" if inside else ""


def _watch(place: Path) -> list[str]:
    """Hears of every file that is opened, made, moved or removed, every program and every connection; notes what is not the input's own.

    The list is empty while nothing is judged.
    """
    touched: list[str] = []
    own = tuple(f"{place}/{name}" for name in ("in", "out", "cache"))
    root = str(place.parent)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if not touched:
            return
        if event == "open":
            path, _, flags = args
            if not isinstance(path, (str, bytes)):
                return
            path = os.path.normpath(Path.cwd() / os.fsdecode(path))
            foreign = not path.startswith(own) and not (path.startswith(f"{place}/bases") and not flags & writing)
            if foreign and (path.startswith(root) or (flags & writing and path != os.devnull)):
                touched.append(f"open {path}")
        elif event in (
            "os.remove",
            "os.rmdir",
            "os.rename",
            "os.mkdir",
            "os.truncate",
            "os.chmod",
            "os.link",
            "os.symlink",
            "shutil.rmtree",
        ):
            paths = [os.fsdecode(a) for a in args if isinstance(a, (str, bytes))]
            if any(p.startswith("/") and not os.path.normpath(p).startswith(own) for p in paths):
                touched.append(f"{event} {paths}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"):
            if str(args[0]) != "uname":  # asked by `platform` for run.json
                touched.append(f"{event} {str(args)[:100]}")
        elif event == "socket.connect":
            address = args[1]
            if not (isinstance(address, tuple) and address[0] in ("127.0.0.1", "localhost")):
                touched.append(f"{event} {address}")

    sys.addaudithook(hook)
    return touched


def interleaved(total: int, batch: int, worker: int, workers: int) -> Iterator[range]:
    """The batches of `range(total)` that fall to one of several workers."""
    for number, start in enumerate(range(0, total, batch)):
        if number % workers == worker:
            yield range(start, min(total, start + batch))

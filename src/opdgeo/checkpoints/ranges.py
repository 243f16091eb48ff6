"""Tensors of a repository on the hub that come one by one, each as the bytes of its own in its shard.

A folder of the cache stands for a commit. It holds the small files as they are, the header of every shard, `files.json` (what the hub
said of the shards), and a file a tensor, named by the shard and the bytes: it appears whole (`files.atomic_path`), and a line of
`ranges.jsonl` keeps its checksum. So a killed download goes on with the tensors that are missing, of which at most one a
connection was begun, and a file that was changed since is fetched again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.checkpoints import transport
from opdgeo.checkpoints.huggingface import is_plain
from opdgeo.checkpoints.stored import Raw
from opdgeo.errors import CheckpointError
from opdgeo.files import Journal, atomic_path, remove_orphans
from opdgeo.machine import volume

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

CONNECTIONS = 4  # at a time
RUN = 64 << 20  # bytes of tensors side by side that one request asks for
JOURNAL = "ranges.jsonl"
NOT_STATED = "not stated by the hub"

Advance = Callable[[int], None]


class _Stopped(Exception):
    """Another connection failed, or the program ends."""


@dataclass(frozen=True)
class Shard:
    """A file of a repository at a commit: where its tensors are kept, its size and its ETag, as the hub states them."""

    folder: Path
    repo: str
    commit: str
    name: str
    size: int
    etag: str

    @property
    def url(self) -> str:
        return transport.address(self.repo, self.commit, self.name)

    @property
    def facts(self) -> dict[str, str]:
        """What an answer about it has to say, where it says anything."""
        known = {"size": str(self.size), "commit": self.commit, "etag": self.etag}
        return {key: value for key, value in known.items() if value != NOT_STATED}


@dataclass(frozen=True, kw_only=True)
class Range(Raw):
    """A tensor that is the `length` bytes from `start` on of a shard: in `file` once it was fetched, and fetched when it is read."""

    shard: Shard
    start: int
    length: int

    def __getitem__(self, index: Index) -> Tensor:
        if self.length and not self.file.is_file():
            fetch([self])
        return super().__getitem__(index)


def name_of(shard: str, start: int, length: int) -> str:
    """The name of a tensor's file."""
    return f"{shard}.{start}-{start + length}"


def missing(ranges: Iterable[Range]) -> list[Range]:
    """Those that are not here, by shard and place. A file's size is looked at, not its content."""
    wanted = {r.file: r for r in ranges if r.length}
    kept: dict[Path, dict[str, str]] = {}
    found = []
    for file, one in wanted.items():
        if file.parent not in kept:
            kept[file.parent] = _checksums(file.parent)
        whole = False
        with suppress(OSError):
            whole = file.name in kept[file.parent] and file.stat().st_size == one.length
        if not whole:
            found.append(one)
    return sorted(found, key=lambda r: (r.file.parent, r.shard.name, r.start))


def fetch(ranges: Iterable[Range], advance: Advance = lambda _: None) -> None:
    """Bring tensors here: those that are not, and those whose content is no longer what came. `advance` is told of bytes as they come.

    Raises:
        CheckpointError: no connection, no room on the disk, or the hub gives something else than it said.
    """
    by_folder: dict[Path, list[Range]] = {}
    for one in ranges:
        by_folder.setdefault(one.file.parent, []).append(one)
    for folder, wanted in by_folder.items():
        try:
            _fetch(folder, wanted, advance)
        except OSError as error:
            raise CheckpointError(
                f"what is fetched cannot be kept in {folder} ({error.strerror or error}). Make room, or set HF_HOME to a folder on another disk."
            ) from error


def _fetch(folder: Path, wanted: Sequence[Range], advance: Advance) -> None:
    from filelock import FileLock

    if not missing(wanted) and not _changed(folder, wanted):  # also where the folder may not be written
        return
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # another program that fetches the same waits, and then finds it
        remove_orphans(folder)
        for file in _changed(folder, wanted):
            file.unlink(missing_ok=True)
        lacking = missing(wanted)
        if not lacking:
            return
        try:
            transport.reach()
        except OSError as error:
            raise CheckpointError(
                f"{len(lacking)} tensors of {lacking[0].shard.repo} ({volume(sum(r.length for r in lacking))}) are not here, and "
                f"{transport.endpoint()} cannot be reached ({error}). Give the command again where there is a network."
            ) from error
        free, needed = shutil.disk_usage(folder).free, sum(r.length for r in lacking)
        if free < needed:
            raise CheckpointError(
                f"{volume(needed)} are to be fetched and the disk of {folder} has {volume(free)} free. Measure less (--roles), "
                "make room, or set HF_HOME to a folder on another disk."
            )
        journal, lock, stop = Journal(folder / JOURNAL), threading.Lock(), threading.Event()

        def kept(file: Path, checksum: str) -> None:
            with lock:
                journal.add(json.dumps({"file": file.name, "sha256": checksum}).encode())

        def told(count: int) -> None:
            with lock:
                advance(count)

        pool = ThreadPoolExecutor(CONNECTIONS)
        try:
            runs = [pool.submit(_download, run, kept, told, stop) for run in _runs(lacking)]
            for run in wait(runs, return_when=FIRST_EXCEPTION).done:
                run.result()
        finally:
            stop.set()  # the first error, or Ctrl-C, ends the others at their next chunk
            pool.shutdown(cancel_futures=True)


def _runs(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    """Tensors that lie side by side in a shard, up to `RUN` bytes or one that is larger: one request each."""
    run: list[Range] = []
    for one in ranges:
        if run:
            beside = one.shard == run[0].shard and one.start == run[-1].start + run[-1].length
            if not beside or one.start + one.length - run[0].start > RUN:
                yield run
                run = []
        run.append(one)
    if run:
        yield run


def _download(run: Sequence[Range], kept: Callable[[Path, str], None], told: Advance, stop: threading.Event) -> None:
    shard, end = run[0].shard, run[-1].start + run[-1].length
    chunks = transport.part(shard.url, run[0].start, end, shard.facts)
    rest = b""
    for one in run:
        left, digest = one.length, hashlib.sha256()
        with atomic_path(one.file) as partial, partial.open("wb") as out:
            while left:
                if stop.is_set():
                    raise _Stopped
                chunk = rest or next(chunks)
                taken, rest = chunk[:left], chunk[left:]
                out.write(taken)
                digest.update(taken)
                left -= len(taken)
                told(len(taken))
        kept(one.file, digest.hexdigest())


def _changed(folder: Path, wanted: Sequence[Range]) -> list[Path]:
    """The files whose content is not what was fetched."""
    known = _checksums(folder)

    def same(file: Path) -> bool:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == known[file.name]

    here = sorted({r.file for r in wanted if r.file.name in known and r.file.is_file()})
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return [file for file, kept in zip(here, pool.map(same, here), strict=True) if not kept]


def _checksums(folder: Path) -> dict[str, str]:
    """The SHA-256 of every tensor that was fetched, by the name of its file."""
    found = {}
    with suppress(OSError):
        for line in (folder / JOURNAL).read_bytes().splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):  # cut short
                entry = json.loads(line)
                if is_plain(entry["file"]):
                    found[entry["file"]] = str(entry["sha256"])
    return found


def held(folder: Path) -> int:
    """The bytes of the tensors that a folder of the cache holds."""
    found = 0
    for name in _checksums(folder):
        with suppress(OSError):
            found += (folder / name).stat().st_size
    return found


def drop(folder: Path) -> int:
    """Remove the tensors of a folder of the cache; returns the bytes freed. The headers stay: they say which results are of it."""
    freed = 0
    for name in _checksums(folder):
        with suppress(OSError):
            size = (folder / name).stat().st_size
            (folder / name).unlink()
            freed += size
    (folder / JOURNAL).unlink(missing_ok=True)
    return freed

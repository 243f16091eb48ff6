"""Files that appear whole: written beside their place, brought to the disk, renamed.

A reader sees the old file or the whole new one, also after a kill or a power cut: the content is on the disk (fsync) before the
name points to it, and the folder that holds the name after. What a killed writer leaves is a hidden file that names its process
(`.NAME.PID-THREAD.partial`), so that it can be told from the file of a writer at work (`remove_orphans`).
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

_PARTIAL = re.compile(r"\..+\.([0-9a-f]{1,16})-(\d+)-(\d+)\.partial", re.DOTALL)
LONGEST = 1 << 26  # bytes of a line
SYNCED = 1.0  # seconds between two times that a journal is brought to the disk
ABANDONED = 24 * 3600  # seconds; an unfinished file of another machine that is older has no writer any more


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yields a path in the same folder to write a file to; moves it to `path` where the block ends well, else removes it.

    Raises:
        OSError: the disk is full, the folder is missing or cannot be written. `path` is then as it was.
    """
    partial = path.with_name(f".{path.name[:180]}.{_machine()}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync(path.parent)
    finally:
        with suppress(OSError):  # what went wrong before is the error to hear of
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write(partial)`` and move what it wrote to `path` (`atomic_path`)."""
    with atomic_path(path) as partial:
        write(partial)


class Journal:
    """A file of lines that is only ever added to: it may hold thousands, each there as soon as it was written.

    A killed writer leaves all its lines and at most one that is cut short, which a reader has to tell by its content. A power cut takes
    those of the last `SYNCED` seconds. The file stays open: what another process removes can still be read here.

    Raises:
        OSError: the disk is full, or the folder is missing or cannot be written.
    """

    def __init__(self, path: Path):
        self.file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.synced = time.monotonic()

    def add(self, line: bytes) -> tuple[int, int]:
        """Append a line; returns where it begins and its length."""
        rest = memoryview(b"\n" + line)  # the line before may have been cut short
        while rest:
            rest = rest[os.write(self.file, rest) :]
        end = os.lseek(self.file, 0, os.SEEK_CUR)
        if (now := time.monotonic()) - self.synced >= SYNCED:
            os.fsync(self.file)
            self.synced = now
        return end - len(line), len(line)

    def read(self, start: int, length: int) -> bytes:
        return os.pread(self.file, length, start)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Every line with where it begins."""
        with os.fdopen(os.dup(self.file), "rb") as stream:
            stream.seek(0)
            yield from lines(stream)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):  # it was not opened
            os.close(self.file)


def lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Every line with where it begins, of a file that may not be one of lines: of one longer than `LONGEST`, so many bytes."""
    while True:
        start = stream.tell()
        line = stream.readline(LONGEST)
        if not line:
            return
        yield start, line
        rest = line
        while len(rest) == LONGEST and not rest.endswith(b"\n"):
            rest = stream.readline(LONGEST)


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's names, to the disk. A file system that cannot is no error; a full disk is."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        if path.is_dir():
            with suppress(OSError):  # some network and FUSE file systems know no fsync of folders
                os.fsync(handle)
        else:
            os.fsync(handle)
    finally:
        os.close(handle)


def remove_orphans(folder: Path) -> int:
    """Remove the unfinished files in `folder` whose writers are dead; returns the bytes freed.

    Only names that `atomic_path` gives are looked at. The writer is asked for where it was this machine's; of another
    machine's, an unfinished file counts as abandoned after a day.
    """
    freed = 0
    for path in folder.glob(".*.partial"):
        named = _PARTIAL.fullmatch(path.name)
        if not named:
            continue
        with suppress(OSError):
            status = path.lstat()
            abandoned = time.time() - status.st_mtime > ABANDONED
            if not _alive(int(named[2])) if named[1] == _machine() else abandoned:
                path.unlink()
                freed += status.st_size
    return freed


def _machine() -> str:
    """A short name of this machine, in hexadecimal digits: processes are numbered by machine."""
    import zlib

    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # another user's
    return True

"""What is declared whole is on the disk; what is not leaves nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from opdgeo import files
from opdgeo.files import atomic_path, remove_orphans, write_atomically


def test_the_content_is_on_the_disk_before_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else f"{os.fstat(handle).st_size} bytes")
        sync(handle)

    def replaced(*paths: Path) -> None:
        done.append("renamed")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically(tmp_path / "result", lambda p: p.write_text("whole"))
    assert done == ["5 bytes", "renamed", "folder"]
    assert [f.name for f in tmp_path.iterdir()] == ["result"]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "result"
    path.write_text("old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error), atomic_path(path) as partial:
            partial.write_text("half")
            raise error
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, lambda p: p.write_text("new"))
    assert [f.name for f in tmp_path.iterdir()] == ["result"]
    assert path.read_text() == "old"


def test_a_name_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("n" * 250)
    write_atomically(path, lambda p: p.write_text("whole"))
    assert path.read_text() == "whole"


def test_nothing_is_an_orphan_but_what_we_left(tmp_path: Path) -> None:
    names = (
        ".partial",
        ".x.partial",
        ".a.b.partial",
        ".a.12-x-1.partial",
        "a.0-1-1.partial",
        ".a.zz-1-1.partial",
        ".a.1-1.partial",
    )
    for name in names:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / ".f.0-1-1.partial").mkdir()
    assert remove_orphans(tmp_path) == 0
    assert len(list(tmp_path.iterdir())) == len(names) + 1
    assert remove_orphans(tmp_path / "not there") == 0


def test_a_line_without_end_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 10)
    (tmp_path / "a").write_bytes(b"one\n" + b"x" * 9 + b"\n" + b"y" * 10 + b"\n" + b"z" * 35 + b"\nlast")
    with (tmp_path / "a").open("rb") as stream:
        found = list(files.lines(stream))
    assert found == [(0, b"one\n"), (4, b"x" * 9 + b"\n"), (14, b"y" * 10), (25, b"z" * 10), (61, b"last")]

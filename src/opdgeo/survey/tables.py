"""The rows of a survey, matrix by matrix, as the tables of its result: in memory, or in files where they will be many.

The tables are ordered by checkpoint, those of `relate` by pair, then as the matrices came. So rows are put aside by place, a `CHUNK`
at a time, and joined at the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from opdgeo.survey.results import GROUP, OnDisk, Result, frames, summarise, writing

CHUNK = 1 << 13  # rows
WRITTEN = (1 << 16, CHUNK)
"""Rows of a group in the files of measurements and of curves. Writer and reader hold a few groups; curves are lists, and longer."""

Place = tuple[int, int]


class Tables:
    """Takes the rows of one matrix after another.

    Args:
        checkpoints: their names, in order.
        folder: where tables of more than `GROUP` rows are written, a folder that is there; None: all stay in memory.
        matrices: how many will come. By their first rows it is known whether tables will be long, before they are.
        pairs: whether rows may be of two checkpoints, in the column `other`. Such tables stay in memory.
    """

    def __init__(self, checkpoints: list[str], folder: Path | None, matrices: int, *, pairs: bool = False):
        self.order = {name: place for place, name in enumerate(checkpoints)}
        self.pairs, self.folder = pairs, None if pairs else folder
        self.count, self.added, self.matrices = 0, 0, matrices
        self.waiting: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        self.frames: tuple[dict[Place, list[pl.DataFrame]], dict[Place, list[pl.DataFrame]]] = ({}, {})
        self.files: tuple[dict[Place, list[Path]], dict[Place, list[Path]]] = ({}, {})

    def add(self, rows: list[dict[str, Any]], curves: list[dict[str, Any]]) -> None:
        for waiting, new in zip(self.waiting, (rows, curves), strict=True):
            waiting += new
        self.count += len(rows)
        self.added += 1
        if len(self.waiting[0]) >= CHUNK:
            self._put_aside()

    def result(self, null: str, run: dict[str, Any]) -> Result:
        """The tables with their summary and with what `run.json` says. `null` is the kind of null model."""
        self._put_aside()
        if not (self.folder and self.files[0]):
            tables = []
            for of_table, empty in zip(self.frames, frames([], [], pairs=self.pairs), strict=True):
                parts = [frame for place in sorted(of_table) for frame in of_table[place]]
                tables.append(pl.concat(parts, rechunk=True) if parts else empty)
            return Result(tables[0], tables[1], summarise(tables[0], null), run)
        self._to_files()
        for name, files, group in zip(OnDisk.NAMES, self.files, WRITTEN, strict=True):
            scans = [pl.scan_parquet(file) for place in sorted(files) for file in files[place]]
            with writing(self.folder / name):
                pl.concat(scans).sink_parquet(self.folder / name, row_group_size=group)
            for file in (file for of_place in files.values() for file in of_place):
                file.unlink()
        return OnDisk(self.folder, summarise(pl.scan_parquet(self.folder / OnDisk.NAMES[0]), null), run)

    def _put_aside(self) -> None:
        """Turn the rows that wait into frames, by place; write these into files once there are many rows in all."""
        places: dict[Place, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
        for which, waiting in enumerate(self.waiting):
            for row in waiting:
                place = self.order[row["checkpoint"]], self.order.get(row.get("other", ""), -1)
                places.setdefault(place, ([], []))[which].append(row)
            waiting.clear()
        for place, (rows, curves) in places.items():
            for of_table, frame in zip(self.frames, frames(rows, curves, pairs=self.pairs), strict=True):
                of_table.setdefault(place, []).append(frame)
        if self.folder and self.added and self.count / self.added * self.matrices > GROUP:
            self._to_files()

    def _to_files(self) -> None:
        assert self.folder
        for name, of_table, files in zip(OnDisk.NAMES, self.frames, self.files, strict=True):
            for place, parts in of_table.items():
                known = files.setdefault(place, [])
                for frame in parts:
                    known.append(self.folder / f"{place[0]}-{len(known):06}-{name}")
                    with writing(known[-1]):
                        frame.write_parquet(known[-1], compression="lz4")
            of_table.clear()

"""The file in which a run records its completions, and from which a later run replays them.

`rollouts.jsonl`, one completion a line, the completions of a prompt side by side, in the order of the step's batch:

    {"step": 1, "prompt": "1+2=", "answer": "3", "prompt_ids": [4, 13, 5, 15], "completion_ids": [6, 1]}

Law: a run that replays the file of another run with the same settings ends with the same weights up to rounding, on any
number of processes. Two engines, or two versions of one, can so be compared on the same tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.files import lines

FILE = "rollouts.jsonl"


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add the completions of one step."""
    with path.open("a") as stream:
        stream.write("".join(json.dumps(row) + "\n" for row in rows))
        stream.flush()


def forget_after(path: Path, step: int) -> None:
    """Drop the completions of later steps, and what follows a line that is none, such as a last one cut by a kill."""
    if not path.is_file():
        return
    partial = path.with_name(f".{path.name}.partial")
    with path.open("rb") as recorded, partial.open("wb") as kept:
        for _, line in lines(recorded):
            try:
                if json.loads(line)["step"] <= step:
                    kept.write(line)
            except (ValueError, KeyError, TypeError, RecursionError):
                break
    partial.replace(path)


class Recorded:
    """A `rollouts.jsonl`. Only the completions of one step are in memory at a time.

    Args:
        vocabulary: number of tokens. Token ids are checked against it, because the file is untrusted.

    Raises:
        ConfigError: no such file, or a line is not of the form above; the message names the line.
    """

    def __init__(self, path: Path, generations: int, vocabulary: int) -> None:
        self.path, self.generations, self.vocabulary = path, generations, vocabulary
        self.offsets: dict[int, tuple[int, int]] = {}  # step -> where its first line starts, and that line's number
        if not path.is_file():
            raise ConfigError(
                f"there is no file of rollouts {path}; expected the {FILE} that a run with --record-rollouts left."
            )
        try:
            with path.open("rb") as stream:
                for number, (offset, line) in enumerate(lines(stream), start=1):
                    self.offsets.setdefault(self._row(line, number)["step"], (offset, number))
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be read: {error}; expected the {FILE} of a run. Copy it again."
            ) from error

    def step(self, step: int, count: int) -> list[dict[str, Any]]:
        """The `count` completions written before update `step`.

        Raises:
            ConfigError: the file holds another number of them.
        """
        rows: list[dict[str, Any]] = []
        if step in self.offsets:
            offset, first = self.offsets[step]
            with self.path.open("rb") as stream:
                stream.seek(offset)
                for number, (_, line) in enumerate(lines(stream), start=first):
                    row = self._row(line, number)
                    if row["step"] != step:
                        break
                    rows.append(row)
        groups = [rows[i : i + self.generations] for i in range(0, len(rows), self.generations)]
        if len(rows) != count or any(row["prompt"] != group[0]["prompt"] for group in groups for row in group):
            raise ConfigError(
                f"{self.path} holds {len(rows)} completions for step {step}; expected {count}, {self.generations} for each "
                "prompt. Replay with the preset, steps and batch sizes of the run that recorded it."
            )
        return rows

    def _row(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            row: dict[str, Any] = json.loads(line)
            ids = [*row["prompt_ids"], *row["completion_ids"]]
            known = all(type(i) is int and 0 <= i < self.vocabulary for i in ids)
            texts = isinstance(row["prompt"], str) and isinstance(row["answer"], str)
            if not (known and texts and row["prompt_ids"] and row["completion_ids"] and type(row["step"]) is int):
                raise ValueError("a token id outside the model's vocabulary, an empty list or a field of another type")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"line {number} of {self.path} is not a recorded completion ({error!r}); expected step, prompt, answer, "
                "prompt_ids and completion_ids of the same model."
            ) from None
        return row

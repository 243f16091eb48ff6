"""Problems, and demonstrations, from a local file or a dataset of the Hugging Face hub.

    {"prompt": "What is 2 + 2?", "answer": "4", "completion": "2 + 2 = 4, so \\\\boxed{4}"}

one a line (.jsonl) or a row (.parquet). Usual other names are known (`PROMPTS`, `ANSWERS`, `COMPLETIONS`; nested ones with
dots), so that DAPO-Math-17k and the AIME sets are read as they are; unusual ones are told by options. Conversations are understood: a list of messages as the prompt, or a `messages`
column as the whole demonstration (its first user turn and the reply to it). A prompt alone is enough for OPD. Prompts that occur twice are used once
(DAPO-Math-17k's mirrors hold 1.79 M rows of 17 thousand prompts). One prompt in 64 is held out, by a checksum, unless
`held_out` names another source (an AIME file, for instance); what stands there is never trained on.

Answers are compared by math-verify (extra `opdgeo[tasks]`): equal numbers and expressions are equal however they are
written, and of a long completion the last answer counts. It runs in a process of its own (`answers.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, answers, in_held_out

HELD_OUT_ONE_IN = 64
PROMPTS = ("prompt", "problem", "question")
ANSWERS = ("answer", "reward_model.ground_truth", "ground_truth")
COMPLETIONS = ("completion", "solution", "response")


@dataclass(frozen=True)
class Problems:
    """The task as trainers see it (`opdgeo.tasks.Task`).

    Raises:
        ConfigError: no such source, or its rows lack what the options name.
    """

    source: str = ""
    held_out: str = ""
    subset: str = ""
    split: str = "train"
    prompt: str = ""
    answer: str = ""
    completion: str = ""

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(
                "the task `problems` has no source; expected a .jsonl or .parquet file, or the id of a dataset on the hub: "
                '--set task_options={"source": "problems.jsonl"}.'
            )

    @property
    def verifiable(self) -> bool:
        return any(numbers and self._example(data[numbers[0]], 0, "").answer for data, numbers in self._splits.values())

    @property
    def prompted(self) -> bool:
        return True

    @cached_property
    def _splits(self) -> dict[bool, tuple[Sequence[dict[str, Any]], list[int]]]:
        """Held out or not → the rows of its source and the numbers of those that belong to it, each prompt once."""
        data, found = self._read(self.source, self.subset)
        if self.held_out:
            apart, kept = self._read(self.held_out)
            training = [number for prompt, number in found.items() if prompt not in kept]
            return {False: (data, training), True: (apart, list(kept.values()))}
        halves: dict[bool, list[int]] = {False: [], True: []}
        for prompt, number in found.items():
            halves[in_held_out(prompt, HELD_OUT_ONE_IN)].append(number)
        return {held: (data, numbers) for held, numbers in halves.items()}

    def _read(self, source: str, subset: str = "") -> tuple[Sequence[dict[str, Any]], dict[str, int]]:
        """The rows and, for each prompt, the number of the first one that has it. Examples stay where they are stored."""
        data = rows(source, self.split, subset)
        found: dict[str, int] = {}
        for number, row in enumerate(data):
            found.setdefault(self._example(row, number, source).prompt, number)
        if not found:
            raise ConfigError(f"{source} holds no problems; expected one a line.")
        return data, found

    def _example(self, row: dict[str, Any], number: int, source: str) -> Example:
        prompt = _text(_get(row, self.prompt, PROMPTS), "user")
        completion = _text(_get(row, self.completion, COMPLETIONS), "assistant")
        answer = _get(row, self.answer, ANSWERS)
        if prompt is None:
            prompt, completion = (_text(row.get("messages"), role) for role in ("user", "assistant"))
        if prompt is None:
            raise ConfigError(
                f"row {number + 1} of {source} has {', '.join(row)}; expected a prompt, or a conversation in 'messages'. Name the "
                "columns in task_options: prompt, answer, completion."
            )
        return Example(prompt, completion or "", "" if answer is None else str(answer))

    def examples(self, count: int, seed: int, *, held_out: bool) -> list[Example]:
        data, numbers = self._splits[held_out]
        numbers = list(numbers)
        random.Random(f"{seed}-{held_out}").shuffle(numbers)
        return [self._example(data[i], i, self.source) for i in numbers[:count]]

    def all(self) -> list[Example]:
        """Every problem of the source, in its order: for evaluation."""
        data, found = self._read(self.source, self.subset)
        return [self._example(data[i], i, self.source) for i in found.values()]

    def verify(self, completion: str, answer: str) -> float:
        return verify(completion, answer)


def verify(completion: str, answer: str) -> float:
    """1.0 when the last answer in `completion` equals `answer` as mathematics, else 0.0; errors as of `answers.same`."""
    return float(answers.same(completion, answer))


def rows(source: str, split: str = "train", subset: str = "") -> Sequence[dict[str, Any]]:
    """The rows of a .jsonl or .parquet file, or of a dataset (or a named subset of it) on the hub, which stays on disk.

    Raises:
        ConfigError: it is neither, or the hub cannot be reached.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return list(_file(path))
    if path.suffix or source.count("/") != 1:
        raise ConfigError(
            f"there is no file {source}; expected a .jsonl or .parquet file, or the id of a dataset such as owner/name."
        )
    import datasets

    try:
        return datasets.load_dataset(source, subset or None, split=split)
    except Exception as error:
        raise ConfigError(
            f"the dataset {source} is neither on this machine nor to be had from the hub ({type(error).__name__}); expected "
            "either. Download it, or name a local .jsonl or .parquet file as the source."
        ) from None


def _file(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".parquet":
        import polars as pl

        yield from pl.read_parquet(path).iter_rows(named=True)
        return
    with path.open() as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError("not an object")
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"line {number} of {path} is not a JSON object: {error}.") from None
                yield row


def _get(row: dict[str, Any], name: str, usual: Sequence[str]) -> Any:
    """The column `name`, or the first of the usual ones that the row has; None without it."""
    for column in [name] if name else usual:
        value: Any = row
        for part in column.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def _text(value: Any, role: str) -> str | None:
    """A text as it is, or the first message of `role` in a conversation."""
    if isinstance(value, list):
        return next((m["content"] for m in value if isinstance(m, dict) and m.get("role") == role), None)
    return value if isinstance(value, str) else None

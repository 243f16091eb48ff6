"""The published pairs that the paper measured (PAPER §4, its Table 1), and measuring them one by one within a budget of disk.

Bases, methods and unchanged shares are the paper's. It gives names and no addresses: the names on the hub are those of the models' own
cards and repositories, read in stored copies. None was asked for on the hub itself when this list was made.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import hub, ranges
from opdgeo.diagnostics import Settings
from opdgeo.errors import ConfigError, OpdgeoError
from opdgeo.files import write_atomically
from opdgeo.machine import volume
from opdgeo.report.published import TABLE
from opdgeo.survey import Result
from opdgeo.survey.request import Execution, Request
from opdgeo.survey.run import survey

IDS = "hub names from the models' cards and repositories in stored copies; not asked for on the hub itself"
_FETCHED = ".fetched.json"  # the folders of the hub's cache that this command filled, in OUT


@dataclass(frozen=True)
class Published:
    """A released model and what it was trained from.

    Attributes:
        name: the paper's; base, tuned: names on the hub.
        method, paradigm: the paper's word, and its arm.
        unchanged: the paper's share of entries that a bf16 reader sees unchanged.
        note: where the name on the hub is not simply the paper's.
    """

    name: str
    base: str
    tuned: str
    method: str
    paradigm: str
    data: str
    unchanged: float
    note: str = ""


PAIRS = (
    Published(
        "Klear-Reasoner-8B-SFT", "Qwen/Qwen3-8B-Base", "Kwai-Klear/Klear-Reasoner-8B-SFT", "SFT", "sft", "maths and code", 0.006
    ),
    Published(
        "Klear-Reasoner-8B", "Kwai-Klear/Klear-Reasoner-8B-SFT", "Kwai-Klear/Klear-Reasoner-8B", "GRPO", "rlvr", "maths and code", 0.699,
        "its authors call the method GPPO",
    ),
    Published(
        "GT-Qwen3-8B-Base", "Qwen/Qwen3-8B-Base", "TMLR-Group-HF/GT-Qwen3-8B-Base-MATH", "GRPO", "rlvr", "maths", 0.790,
        "its repository listed it as TMLR-Group-HF/GT-Qwen3-8B-Base before",
    ),
    Published("Polaris-4B-Preview", "Qwen/Qwen3-4B", "POLARIS-Project/Polaris-4B-Preview", "DAPO", "rlvr", "maths", 0.799),
    Published(
        "UniReason-14B-think-SFT", "Qwen/Qwen3-14B-Base", "ReasoningTransferability/UniReason-Qwen3-14B-think-SFT", "SFT", "sft", "mixed",
        0.188,
    ),
)  # fmt: skip
"""In the order of measuring: pairs that share weights follow each other."""


def chosen(names: Sequence[str]) -> list[Published]:
    """The pairs of these names, all without any, in the order of `PAIRS`.

    Raises:
        ConfigError: there is none of that name.
    """
    known = {pair.name.lower(): pair for pair in PAIRS}
    for name in names:
        if name.lower() not in known:
            near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
            hint = f"Did you mean {known[near[0]].name}?" if near else "`opdgeo published` lists them."
            raise ConfigError(
                f"there is no published pair {name!r}; expected some of {', '.join(p.name for p in PAIRS)}. {hint}"
            )
    wanted = {name.lower() for name in names}
    return [pair for pair in PAIRS if not wanted or pair.name.lower() in wanted]


def request_of(pair: Published, *, roles: str, settings: Settings) -> Request:
    return Request.of_update(pair.base, pair.tuned, roles=roles, settings=settings)


@dataclass
class Weights:
    """The weights that this command fetched: at most `limit` bytes of them lie on the disk at a time.

    What was there before it is not counted and never removed. The list of the others lies in `out`, for when it is killed.
    """

    out: Path
    limit: int

    def __post_init__(self) -> None:
        self.folders: set[str] = set()
        with suppress(OSError, ValueError, TypeError, RecursionError):
            listed = map(str, json.loads((self.out / _FETCHED).read_text()))
            # Whoever wrote the list: nothing is removed but what this library keeps for the hub.
            self.folders = {
                one for one in listed if Path(one).resolve().is_relative_to(hub.home("org/name").parent.resolve())
            }

    def make_room(self, needed: Sequence[ranges.Range]) -> None:
        """Before `needed` is fetched: remove what other pairs left, as far as the limit asks for it.

        Raises:
            ConfigError: it is more than the limit by itself.
        """
        homes = {r.file.parent for r in needed}
        fresh = {str(home) for home in homes if not ranges.held(home)}
        if not fresh <= self.folders:
            self.folders |= fresh
            self._write()
        size = sum(r.length for r in ranges.missing(needed))
        ours = {Path(folder) for folder in self.folders}
        here = sum(ranges.held(home) for home in ours & homes)
        if size + here > self.limit:
            raise ConfigError(
                f"its weights take {volume(size + here)} and --disk allows {volume(self.limit)}. Raise it, or measure less (--roles)."
            )
        for other in sorted(ours - homes):
            if size + sum(ranges.held(home) for home in ours) > self.limit:
                ranges.drop(other)

    def keep_only(self, repositories: Iterable[str]) -> int:
        """Remove all but those of some repositories; returns the bytes freed."""
        kept = {hub.home(name) for name in repositories}
        gone = {folder for folder in self.folders if Path(folder).parent not in kept}
        freed = sum(ranges.drop(Path(folder)) for folder in sorted(gone))
        self.folders -= gone
        self._write()
        return freed

    def _write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / _FETCHED, lambda p: p.write_text(json.dumps(sorted(self.folders))))


def measure(
    pairs: Sequence[Published],
    out: Path,
    execution: Execution,
    *,
    roles: str = "all",
    settings: Settings | None = None,
    disk: int,
    keep: bool = False,
    tell: Callable[[str], None] = lambda _: None,
    each: Callable[[Published, Path, Result], None] = lambda *_: None,
) -> list[dict[str, Any]]:
    """Measure pairs one by one into OUT/NAME, with the weights of one pair, or little more, on the disk at a time.

    A pair that was measured before with these settings is taken over and fetches nothing. One that cannot be measured is
    passed over with its reason. OUT/published.json lists all that OUT holds, and is whole after every pair.

    Args:
        disk: the bytes of weights that this may keep on the disk.
        keep: leave them there at the end.
        each: called with every result and the folder that it was written into.

    Returns:
        A row a pair: its facts, `status` (measured | failed) and `reason`.
    """
    weights = Weights(out, disk)
    rows = []
    for place, pair in enumerate(pairs):
        tell(f"{place + 1} of {len(pairs)}: {pair.name}, {pair.base} → {pair.tuned}")
        folder = out / pair.name
        row = asdict(pair) | {"ids": IDS, "status": "measured", "reason": None}
        try:
            asked = request_of(pair, roles=roles, settings=settings or Settings())
            result = survey(asked, replace(execution, out=folder, before_fetching=weights.make_room))
            result.save(folder)
            each(pair, folder, result)
        except OpdgeoError as error:
            tell(f"{pair.name} is passed over: {error}")
            row |= {"status": "failed", "reason": str(error)}
        rows.append(row)
        _list(out, row)
        if not keep:
            later = [name for other in pairs[place + 1 :] for name in (other.base, other.tuned)]
            if freed := weights.keep_only(later):
                tell(f"{volume(freed)} of weights removed")
    return rows


def _list(out: Path, row: dict[str, Any]) -> None:
    """Put a pair into the list of all that `out` holds; one that failed now and was measured before stays measured."""
    known: dict[str, Any] = {}
    with suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        known = {one["name"]: one for one in json.loads((out / TABLE).read_text())["pairs"]}
    if row["status"] == "measured" or not (out / row["name"] / "run.json").is_file():
        known[row["name"]] = row
    order = [pair.name for pair in PAIRS]
    rows = sorted(known.values(), key=lambda one: order.index(one["name"]) if one["name"] in order else len(order))
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / TABLE, lambda p: p.write_text(json.dumps({"format": 1, "pairs": rows}, indent=1)))

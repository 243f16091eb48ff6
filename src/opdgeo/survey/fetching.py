"""What of a survey's checkpoints lies on the hub and is not here yet: said before it is fetched, then fetched."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from opdgeo.checkpoints import Checkpoint, Matrix, hub, ranges, transport
from opdgeo.machine import volume
from opdgeo.survey.progress import Fetching


def account(checkpoints: Sequence[Checkpoint], work: Sequence[Matrix]) -> list[str]:
    """A line a checkpoint of the hub: how much of it has to be fetched for `work`, and from where."""
    lacking = dict(_lacking(checkpoints, work))
    lines = []
    for one in checkpoints:
        if isinstance(one, hub.Remote):
            found = lacking.get(id(one), [])
            lines.append(
                f"{volume(sum(r.length for r in found))} of {volume(one.size)} of {one.place} ({len(found)} tensors), from {transport.endpoint()}"
                if found
                else f"nothing of {one.place}: what is measured is here"
            )
    return lines


def fetch(
    checkpoints: Sequence[Checkpoint],
    work: Sequence[Matrix],
    *,
    progress: bool = False,
    before: Callable[[Sequence[ranges.Range]], None] | None = None,
) -> None:
    """Fetch what `work` needs. Standard error says how much that is, from where and into which folder.

    Args:
        before: called with all that is needed, before anything is fetched.

    Raises:
        CheckpointError: the hub cannot be reached, gives something else than it said, or the disk is full.
    """
    needed = list({r.file: r for c in checkpoints if isinstance(c, hub.Remote) for r in c.needed(work)}.values())
    if not needed:
        return
    if before is not None:
        before(needed)
    lacking = ranges.missing(needed)
    if lacking:
        for line in account(checkpoints, work):
            print(f"opdgeo: fetching {line}", file=sys.stderr)
        homes = dict.fromkeys(str(r.shard.folder.parents[1]) for r in lacking)
        print(f"opdgeo: into {', '.join(homes)}; what is there is not fetched again", file=sys.stderr, flush=True)
    with Fetching(progress and bool(lacking), sum(r.length for r in lacking)) as bar:
        ranges.fetch(needed, bar.advance)


def _lacking(checkpoints: Sequence[Checkpoint], work: Sequence[Matrix]) -> list[tuple[int, list[ranges.Range]]]:
    """Of two checkpoints that are the same files, the first."""
    seen: set[object] = set()
    found = []
    for checkpoint, lacking in hub.to_fetch(checkpoints, work):
        fresh = [r for r in lacking if r.file not in seen]
        seen.update(r.file for r in fresh)
        found.append((id(checkpoint), fresh))
    return found

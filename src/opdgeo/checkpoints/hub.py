"""Checkpoints by name: ``org/name`` or ``org/name@revision`` on the Hugging Face hub.

What lies at such a path here comes first, and so does a typing error below a folder that exists. What the hub's own cache holds whole
is read there. Else safetensors are read by ranges (`ranges`): opening fetches the headers of the shards, and a tensor comes when it is
measured. Files of other formats cannot be read in parts and come whole, into the hub's own cache.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from opdgeo.checkpoints import transport
from opdgeo.checkpoints.checkpoint import Checkpoint, understood
from opdgeo.checkpoints.huggingface import (
    INDEX,
    header_length,
    headers,
    in_shard,
    is_plain,
    parse_header,
    read_json,
    shards,
    stored_bytes,
)
from opdgeo.checkpoints.names import Matrix
from opdgeo.checkpoints.ranges import CONNECTIONS, NOT_STATED, Range, Shard, missing, name_of
from opdgeo.checkpoints.stored import Stored
from opdgeo.errors import CheckpointError, printable
from opdgeo.files import write_atomically
from opdgeo.machine import volume

_NAME = re.compile(r"(?P<repo>(?P<org>\w[\w.-]*)/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SAFETENSORS = ("model.safetensors", "model-*-of-*.safetensors", INDEX)
# The first group of which the repository has a file.
_WEIGHTS = (
    _SAFETENSORS,
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"),
    ("*.gguf",),
)
_CONFIG, _FILES, _REFS = "config.json", "files.json", "revisions.json"


def is_name(text: str) -> bool:
    """Whether a text that is no path here can be the name of a repository.

    >>> is_name("Qwen/Qwen3-8B-Base@main"), is_name("/data/model"), is_name("model")
    (True, False, False)
    """
    found = _NAME.fullmatch(text)
    return found is not None and not Path(found["org"]).exists()


@dataclass(frozen=True, kw_only=True)
class Remote(Checkpoint):
    """A checkpoint of the hub whose tensors come by ranges.

    Attributes:
        shards: the files of its weights, those that the hub's own cache holds whole (`whole`) left out.
        ranges: its tensors by the files that they are kept in.
    """

    shards: tuple[Shard, ...]
    whole: tuple[Path, ...]
    ranges: Mapping[Path, Range]

    @property
    def files(self) -> list[Path]:
        """What tells this checkpoint from another: what the hub said of its shards, and the whole files."""
        return [self.path / _FILES, *self.whole]

    @property
    def size(self) -> int:
        """Bytes of all its weights."""
        return sum(shard.size for shard in self.shards) + sum(file.stat().st_size for file in self.whole)

    def needed(self, work: Iterable[Matrix]) -> list[Range]:
        """The tensors that `work` is read from, each once."""
        read = (m.tensor for m in work if m.tensor in self.tensors and self.unreadable(m.tensor) is None)
        files = dict.fromkeys(file for tensor in dict.fromkeys(read) for file in self.tensors[tensor].files)
        return [self.ranges[file] for file in files if file in self.ranges]

    def manifest(self) -> dict[str, Any]:
        """As of any checkpoint; the SHA-256 of a shard that was not read whole is the hub's word for it."""
        parts = [{"name": s.name, "bytes": s.size, "sha256": s.etag} for s in self.shards]
        found = super().manifest()
        return found | {"files": [*parts, *(f for f in found["files"] if f["name"] != _FILES)]}


@dataclass(frozen=True)
class _Repository:
    """What the hub says of a repository at a revision: the sizes and ETags of its files, where it states them."""

    repo: str
    commit: str
    files: dict[str, tuple[int | None, str | None]]

    @property
    def name(self) -> str:
        return f"{self.repo}@{self.commit[:8]}"


def open_or_fetch(text: str) -> Checkpoint | Path:
    """A checkpoint that is read by ranges, or the folder of files that are here whole.

    Raises:
        CheckpointError: no such repository or revision, no weights in it, neither a connection nor a cached copy, or a hub that
            gives something else than it says.
    """
    found = _NAME.fullmatch(text)
    assert found is not None
    repo, revision = found["repo"], found["revision"]
    try:
        transport.reach()
        listing = _described(repo, revision)
    except transport.Refused as error:
        raise CheckpointError(
            f"{text} is no path here, and the Hugging Face hub ({transport.endpoint()}) gives no such model ({error.code}). Check the "
            "name and the revision; for a gated or private one log in with `hf auth login`, or set HF_TOKEN."
        ) from error
    except CheckpointError:
        raise
    except Exception as error:  # no network: the transport raises almost anything
        return _offline(text, repo, revision, error)
    _remember(repo, revision, listing.commit)
    weights = next((w for patterns in _WEIGHTS if (w := _matching(listing.files, patterns))), [])
    if not weights:
        raise CheckpointError(f"{text} on the Hugging Face hub holds no weights that opdgeo reads, at its top level.")
    if weights[0].endswith(".gguf") and len(weights) > 1:
        raise CheckpointError(
            f"{text} holds several GGUF files. Fetch one and give it as a file: hf download {repo} {weights[0]}."
        )
    cached = {name: _in_the_hubs_cache(repo, listing.commit, name) for name in weights}
    if None not in cached.values() or not _matching(weights, _SAFETENSORS):
        return _whole(listing, weights, [name for name, file in cached.items() if file is None])
    try:
        return _by_ranges(listing, weights, cached)
    except OSError as error:
        raise CheckpointError(
            f"{home(repo)} cannot be written ({error.strerror or error}). Make room, or set HF_HOME to another folder."
        ) from error


def _described(repo: str, revision: str | None) -> _Repository:
    url = transport.description(repo, revision)
    try:
        facts = json.loads(transport.small(url))
        commit = facts["sha"]
        files = {}
        for one in facts["siblings"]:
            name, size, large = one["rfilename"], one.get("size"), one.get("lfs") or {}
            etag = large.get("sha256") or one.get("blobId")
            if is_plain(name):  # what lies at the top
                files[name] = (size if type(size) is int else None, etag if isinstance(etag, str) else None)
        if not _COMMIT.fullmatch(commit):
            raise ValueError(f"the commit {commit[:80]!r}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{url} does not answer as the Hugging Face hub does ({type(error).__name__}: {printable(str(error))[:120]}). Check HF_ENDPOINT."
        ) from error
    return _Repository(repo, commit, files)


def _by_ranges(listing: _Repository, weights: Sequence[str], cached: Mapping[str, Path | None]) -> Checkpoint:
    """Fetch what is not here of the small files and the headers, and open what they describe."""
    folder = home(listing.repo) / listing.commit
    folder.mkdir(parents=True, exist_ok=True)
    small = [name for name in (_CONFIG, INDEX) if name in listing.files]
    for name in small:
        if not (folder / name).is_file():
            _bring(folder / name, listing)
    names = list(shards(folder / INDEX, ".safetensors")) if INDEX in small else [_SAFETENSORS[0]]
    if absent := [name for name in names if name not in listing.files]:
        raise CheckpointError(
            f"{listing.name} names the shard {absent[0]}, which it does not hold. It may be half uploaded: try another revision."
        )
    known = _stated(folder)
    wanted = [name for name in names if cached.get(name) is None]
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        described = list(pool.map(lambda name: _header(folder, listing, name, known.get(name)), wanted))
    stated = {name: {"size": size, "etag": etag} for name, (size, etag) in zip(wanted, described, strict=True)}
    if stated != known:  # its time says which results are of it
        write_atomically(folder / _FILES, lambda p: p.write_text(json.dumps({"files": stated}, indent=1)))
    return _open(folder, listing.repo, listing.commit, {name: file for name, file in cached.items() if file})


def _bring(file: Path, listing: _Repository) -> None:
    """Fetch a small JSON file. It comes whole, so its content is held against the hash that the hub states."""
    content = _get(lambda: transport.small(transport.address(listing.repo, listing.commit, file.name)))
    etag = listing.files[file.name][1]
    hashes = hashlib.sha256(content), hashlib.sha1(b"blob %d\0" % len(content) + content)  # as git names a file
    if etag is not None and etag not in [h.hexdigest() for h in hashes]:
        raise CheckpointError(
            f"what came as {file.name} of {listing.name} is not the file whose hash the hub states, {printable(etag)[:80]}. Give the command again."
        )

    def write(partial: Path) -> None:
        partial.write_bytes(content)
        read_json(partial)  # what is damaged is not kept

    write_atomically(file, write)


def _header(folder: Path, listing: _Repository, name: str, known: dict[str, Any] | None) -> tuple[int, str]:
    """Bring a shard's header here, where it is not; returns the file's size and ETag, which are those that were stated before."""
    size, etag = listing.files[name]
    expected = {"commit": listing.commit}
    expected |= {} if size is None else {"size": str(size)}
    expected |= {} if etag is None else {"etag": etag}
    file = _header_file(folder, name)
    if known and file.is_file():
        if (size or known["size"], etag or known["etag"]) != (known["size"], known["etag"]):
            raise CheckpointError(
                f"{name} of {listing.name} is another file than it was, which no commit allows: {known['size']} bytes, {known['etag']} before, "
                f"now {size}, {etag}. If the hub is right, remove {folder} and give the command again."
            )
        return known["size"], known["etag"]
    url = transport.address(listing.repo, listing.commit, name)

    def get(first: int, end: int) -> bytes:
        return _get(lambda: b"".join(transport.part(url, first, end, expected)))

    start = get(0, 8)
    try:
        length = header_length(start, int(expected["size"]))
    except ValueError as error:
        raise CheckpointError(
            f"{name} of {listing.name} is no readable safetensors file ({error}). Try another revision."
        ) from error
    text = get(8, 8 + length)
    parse_header(Path(f"{listing.name}/{name}"), text, int(expected["size"]))  # what is damaged is not kept
    write_atomically(file, lambda p: p.write_bytes(start + text))
    return int(expected["size"]), expected.get("etag", NOT_STATED)


def _get(fetch: Any) -> bytes:
    try:
        return bytes(fetch())
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the hub broke off ({type(error).__name__}: {printable(str(error))[:200]}). Give the command again to go on."
        ) from error


def _open(folder: Path, repo: str, commit: str, cached: Mapping[str, Path]) -> Remote:
    """Open a folder of the cache: its headers are there."""
    config = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    index = folder / INDEX
    listed = shards(index, ".safetensors") if index.is_file() else {_SAFETENSORS[0]: None}
    stated, ours = _stated(folder), list[Shard]()
    stored: dict[str, Stored] = {}
    ranges: dict[Path, Range] = {}
    for name, names in listed.items():
        found: Mapping[str, Stored]
        if name in cached:
            found = headers(cached[name])
        else:
            shard = Shard(folder, repo, commit, name, stated[name]["size"], stated[name]["etag"])
            ours.append(shard)
            found = dict(_tensors(shard))
            ranges |= {one.file: one for one in found.values() if isinstance(one, Range)}
        stored |= found if names is None else in_shard(index, name, names, found)
    tensors, notes = understood(stored, config, folder, folder)
    whole = tuple(cached[name] for name in listed if name in cached)
    return Remote(folder, tensors, config, notes, shards=tuple(ours), whole=whole, ranges=ranges)


def _tensors(shard: Shard) -> Iterator[tuple[str, Range]]:
    file = _header_file(shard.folder, shard.name)
    text = file.read_bytes()[8:]
    for name, raw in parse_header(Path(shard.folder / shard.name), text, shard.size)[0].items():
        length = stored_bytes(raw)
        place = shard.folder / name_of(shard.name, raw.offset, length)
        yield name, Range(place, 0, raw.shape, raw.stride, raw.dtype, shard=shard, start=raw.offset, length=length)


def _header_file(folder: Path, shard: str) -> Path:
    return folder / f"{shard}.header"


def _stated(folder: Path) -> dict[str, dict[str, Any]]:
    """What the hub said of the shards when their headers were fetched."""
    try:
        found = read_json(folder / _FILES)["files"]
        return {str(name): {"size": int(one["size"]), "etag": str(one["etag"])} for name, one in found.items()}
    except (CheckpointError, KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return {}


def home(repo: str) -> Path:
    """Where the ranges of a repository lie: beside the hub's own cache, which knows whole files only."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "opdgeo" / f"models--{repo.replace('/', '--')}"


def _remember(repo: str, revision: str | None, commit: str) -> None:
    """Which commit a revision is, for when there is no network."""
    path = home(repo) / _REFS
    known = _revisions(path)
    if known.get(revision or "main") != commit:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda p: p.write_text(json.dumps(known | {revision or "main": commit}, indent=1)))


def _revisions(path: Path) -> dict[str, str]:
    with suppress(CheckpointError):
        return {name: str(commit) for name, commit in read_json(path).items()}
    return {}


def _offline(text: str, repo: str, revision: str | None, error: Exception) -> Checkpoint | Path:
    """The whole copy in the hub's cache, else what was fetched by ranges."""
    from huggingface_hub import snapshot_download

    commit = _revisions(home(repo) / _REFS).get(revision or "main", revision or "")
    for patterns in _WEIGHTS:
        for at in dict.fromkeys((commit or None, revision)):
            with suppress(Exception):  # not cached
                wanted = [*patterns, _CONFIG]
                folder = Path(snapshot_download(repo, revision=at, allow_patterns=wanted, local_files_only=True))
                if _is_whole(folder, patterns):
                    return folder
    folder = home(repo) / commit
    if _COMMIT.fullmatch(commit) and (folder / _FILES).is_file():
        listed = list(shards(folder / INDEX, ".safetensors")) if (folder / INDEX).is_file() else [_SAFETENSORS[0]]
        cached = {name: file for name in listed if (file := _in_the_hubs_cache(repo, commit, name))}
        known = _stated(folder)
        if all(name in cached or (name in known and _header_file(folder, name).is_file()) for name in listed):
            return _open(folder, repo, commit, cached)
    raise CheckpointError(
        f"{text} is no path here, the Hugging Face cache has no whole copy, and the hub cannot be reached at {transport.endpoint()} "
        f"({type(error).__name__}: {printable(str(error))[:120]}). Check the path, or fetch it where there is a network: hf download {repo}."
    ) from error


def _is_whole(folder: Path, patterns: Sequence[str]) -> bool:
    """Whether a folder of the hub's cache holds all weights of a format, of an index all that it lists."""
    names = {p.name for p in folder.iterdir()}
    index = next((name for name in names if name.endswith(".index.json") and name in patterns), None)
    if index:
        return set(shards(folder / index, "." + index.split(".")[1])) <= names
    return bool(_matching(names, patterns))


def _in_the_hubs_cache(repo: str, commit: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo, name, revision=commit)
    return Path(found) if isinstance(found, str) else None


def _whole(listing: _Repository, weights: Sequence[str], absent: Sequence[str]) -> Path:
    """The folder of whole files in the hub's own cache, whose client fetches those that are absent and goes on after a break."""
    from huggingface_hub import snapshot_download

    if absent:
        size = sum(listing.files[name][0] or 0 for name in absent)
        print(
            f"opdgeo: fetching {volume(size)}: {len(absent)} files of {listing.name} from {transport.endpoint()}, whole, since their "
            "format is not read in parts",
            file=sys.stderr,
        )
    try:
        wanted = [*weights, _CONFIG]
        return Path(snapshot_download(listing.repo, revision=listing.commit, allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(
            f"downloading {listing.name} failed: {error}. Give the command again to go on."
        ) from error


def to_fetch(checkpoints: Iterable[Checkpoint], work: Sequence[Matrix]) -> list[tuple[Remote, list[Range]]]:
    """The tensors of each checkpoint that are needed for `work` and are not here."""
    found = [(c, missing(c.needed(work))) for c in checkpoints if isinstance(c, Remote)]
    return [(checkpoint, ranges) for checkpoint, ranges in found if ranges]


def _matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

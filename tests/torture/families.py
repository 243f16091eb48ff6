"""The kinds of untrusted input: how each is put on the disk, and what a user's command would do with it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from torture.corpus import corpus, write
from torture.mutations import in_bytes, mutate
from torture.oracle import Case

Use = Callable[[Path, Random], bool]  # reads the input in a folder; False: it was refused in a way of its own


@dataclass(frozen=True)
class Family:
    """`share` of the inputs; `use` may raise an `OpdgeoError` and nothing else."""

    name: str
    share: float
    use: Use
    sources: tuple[str, ...] = ()


def prepare(family: Family, seed: int, place: Path) -> Callable[[int], Case]:
    """What writes one input into `place`/in. The first of each source is left as it is: it has to be accepted."""
    sources = [files for source in family.sources or (family.name,) for files in corpus()[source].values()]

    def one(index: int) -> Case:
        draw = Random(f"{seed} {family.name} {index}")
        folder = place / "in"
        for name in ("in", "out", "cache"):
            shutil.rmtree(place / name, ignore_errors=True)
        if index < len(sources):
            write(folder, sources[index])
            return lambda: _sound(family, folder)
        changed = mutate(draw, draw.choice(sources), sources)
        folder.mkdir()
        for path, content in changed.items():
            try:
                write(folder, {path: content})
            except (OSError, ValueError):  # a name from the corpus's own list that no file can have
                continue
        if draw.random() < 0.02:
            _odd(draw, folder)
        return lambda: family.use(folder, draw)

    return one


class _Calm(Random):
    """Nothing happens that happens now and then."""

    def random(self) -> float:
        return 1.0


def _sound(family: Family, folder: Path) -> bool:
    from opdgeo.errors import OpdgeoError

    try:
        if family.use(folder, _Calm(0)):
            return True
        raise AssertionError("a sound input was refused")
    except OpdgeoError as error:
        raise AssertionError(f"a sound input was refused: {error}") from error


def _odd(draw: Random, folder: Path) -> None:
    """Something that is no plain file where one is expected, or a file of holes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    if not files:
        return
    file = draw.choice(files)
    kind = draw.randrange(6)
    if kind == 5:
        with file.open("r+b") as stream:
            stream.truncate(3 << 29)  # mapped, it fits into the limit; read and decoded, it does not
        return
    file.unlink()
    if kind == 0:
        os.mkfifo(file)
    elif kind == 1:
        file.mkdir()
    else:
        file.symlink_to(("/dev/zero", file.name, "/proc/self/mem")[kind - 2])


# Checkpoints ----------------------------------------------------------------------------------------------------


@cache
def _base(name: str) -> Any:
    """A sound checkpoint beside the inputs."""
    from opdgeo.checkpoints import open_checkpoint

    files = corpus()["bases"][name] if name != "tuned" else corpus()["safetensors"]["dense"]
    return open_checkpoint(write(Path(os.environ["OPDGEO_TORTURE"]) / "bases" / name, files))


def warm(place: Path) -> None:
    """Write what inputs are read beside, once for all children."""
    os.environ["OPDGEO_TORTURE"] = str(place)
    for name in ("dense", "moe", "tuned"):
        _base(name)
    _right_entry()


def checkpoint(folder: Path, draw: Random) -> bool:
    """Opened, paired with a base and with itself, every matrix read, its files hashed; now and then measured by the command."""
    return _checkpoint(folder, draw, None)


def _checkpoint(folder: Path, draw: Random, base: Any) -> bool:
    from opdgeo.checkpoints import open_checkpoint, pair
    from opdgeo.errors import OpdgeoError

    opened = open_checkpoint(folder, base)
    for other in (base or _base("dense"), opened):
        try:
            pairing = pair(other, opened)
        except OpdgeoError:
            continue
        json.dumps(pairing.to_json()).encode()
        for matrix in pairing.matrices[:40]:
            try:
                weights = opened.read(matrix)
                opened.factors(matrix)
            except OpdgeoError:
                continue
            if tuple(weights.shape) != (matrix.rows, matrix.cols):
                raise AssertionError(
                    f"{matrix.name} is {matrix.rows}×{matrix.cols} and was read as {tuple(weights.shape)}"
                )
        break
    json.dumps([opened.name, opened.step, [str(note) for note in opened.notes]]).encode()
    if draw.random() < 0.05:
        json.dumps(opened.manifest(), allow_nan=False).encode()
    if draw.random() < 0.003:
        folder.with_name("out").mkdir()
        _command(
            "compare",
            (base or _base("dense")).path,
            folder,
            "-o",
            folder.with_name("out"),
            "--nulls",
            "1",
            "--rank",
            "4",
            "--no-cache",
            "--no-report",
        )
    return True


def _command(*arguments: object) -> int:
    """The program itself: only the statuses that are promised."""
    from opdgeo.commands import main

    try:
        main([str(a) for a in arguments])
    except SystemExit as end:
        if end.code not in (0, 2, 3):
            raise AssertionError(f"exit status {end.code}") from end
        return int(end.code)
    raise AssertionError("no exit status")


def adapter(folder: Path, draw: Random) -> bool:
    config = folder / "adapter_config.json"
    known = config.is_file() and not config.is_symlink() and config.stat().st_size < 1 << 20
    stacked = known and b'"target_parameters": [' in config.read_bytes()
    return _checkpoint(folder, draw, _base("moe" if stacked and draw.random() > 0.1 else "dense"))


def sparse_delta(folder: Path, draw: Random) -> bool:
    """Every version of a run, the later through the earlier."""
    from opdgeo.checkpoints import open_checkpoint, pair
    from opdgeo.errors import OpdgeoError

    accepted = False
    for version in sorted(p for p in folder.iterdir() if p.is_dir()):
        try:
            opened = open_checkpoint(version, _base("dense"))
            for matrix in pair(_base("dense"), opened).matrices:
                opened.read(matrix)
            opened.manifest()
            accepted = True
        except OpdgeoError:
            continue
    return accepted


# Results, cache, states -----------------------------------------------------------------------------------------


def results(folder: Path, draw: Random) -> bool:
    """Loaded, shown, and gone on from: by Python and by the commands."""
    from opdgeo.errors import OpdgeoError
    from opdgeo.report import data
    from opdgeo.survey.output import check_earlier
    from opdgeo.survey.parts import Parts
    from opdgeo.survey.request import Request
    from opdgeo.survey.results import load_result, summarise

    base = _base("dense")
    tuned = _base("tuned")
    every = Request(base, [tuned]).every
    digest = Parts(None, every, trajectory=False, device="cpu").inputs
    _belongs(folder, digest)
    accepted = False

    def attempt(action: Callable[[], object]) -> None:
        nonlocal accepted
        try:
            action()
            accepted = True
        except OpdgeoError:
            pass

    attempt(
        lambda: summarise(load_result(folder).measurements, "gaussian") if draw.random() < 0.02 else load_result(folder)
    )
    attempt(lambda: data.load(folder))
    attempt(lambda: check_earlier(folder, base, [tuned], overwrite=False))
    parts = Parts(folder, every, trajectory=False, device="cpu")
    for matrix in Request(base, [tuned]).work:
        parts.load(matrix)
    what = draw.random()
    if what < 0.01:
        _command("report", folder)
    elif what < 0.03:
        _command("compare", base.path, tuned.path, "-o", folder, "--nulls", "1", "--rank", "4", "--top-k", "3", "--mask-rank", "3", "--no-cache",
                 "--no-report", "--roles", "q_proj,up_proj", *(["--overwrite"] if what < 0.02 else []))  # fmt: skip
    return accepted


def _belongs(folder: Path, digest: str) -> None:
    """Have the folder be one of a run of these very files, as far as it says so in a way that can be found."""
    run = folder / "run.json"
    if run.is_file() and not run.is_symlink() and run.stat().st_size < 1 << 22:
        text = run.read_bytes()
        at = text.find(b'"inputs": "')
        if at > 0:
            run.write_bytes(text[: at + 11] + digest.encode() + text[at + 75 :])
    parts = folder / ".parts"
    for file in parts.glob("*.jsonl") if parts.is_dir() else ():
        file.rename(parts / f"{digest[:32]}.jsonl")


def cache_entry(folder: Path, draw: Random) -> bool:
    """Believed only where it says what was written; never deleted unless it is an entry."""
    import torch

    from opdgeo.survey.cache import SpectrumCache

    name = _entry()
    kept = SpectrumCache(folder, limit=10**9)
    found = kept.load(folder / name)
    if found is not None:
        right = _right_entry()
        same = all(
            torch.equal(getattr(found[0], t), getattr(right[0], t)) for t in ("sigma", "errors", "left", "right")
        )
        if not (
            same and found[1] == right[1] and found[0].error == right[0].error and found[0].method == right[0].method
        ):
            raise AssertionError("an entry that was changed is believed")
    kept.entries()
    before = {p.name for p in folder.iterdir()}
    marked = {p.name for p, *_ in kept.entries()}
    kept.clear()
    if before - {p.name for p in folder.iterdir()} != marked:
        raise AssertionError("something else than the entries was removed")
    return found is not None


def _entry() -> str:
    return next(n for n in corpus()["cache"]["entry"] if n.endswith(".safetensors"))


@cache
def _right_entry() -> Any:
    from opdgeo.survey.cache import SpectrumCache

    folder = write(Path(os.environ["OPDGEO_TORTURE"]) / "bases" / "entry", corpus()["cache"]["entry"])
    return SpectrumCache(folder).load(folder / _entry())


def channel(folder: Path, draw: Random) -> bool:
    from opdgeo.training.channel import Channel

    Channel.load(next((p for p in sorted(folder.rglob("*")) if p.name.endswith(".safetensors")), folder))
    return True


def rollouts(folder: Path, draw: Random) -> bool:
    from opdgeo.errors import OpdgeoError
    from opdgeo.training import rollouts as of_runs

    file = folder / "rollouts.jsonl"
    try:
        recorded = of_runs.Recorded(file, 2, 32)
        recorded.step(1, 4)
        recorded.step(2, 4)
        accepted = True
    except OpdgeoError:
        accepted = False
    if not file.is_symlink():  # the run's own file, which it appended to
        of_runs.forget_after(file, 1)
    return accepted


def configuration(folder: Path, draw: Random) -> bool:
    from opdgeo.errors import ConfigError
    from opdgeo.training.config import TrainConfig

    try:
        if not (folder / "config.json").is_file():
            raise ConfigError("no file")
        with (folder / "config.json").open("rb") as stream:
            text = stream.read(1 << 20).decode()
    except (OSError, UnicodeDecodeError) as error:  # the commands that ask for it say which file is missing
        raise ConfigError(str(error)) from error
    TrainConfig.from_json(text).to_json()
    return True


def follow(folder: Path, draw: Random) -> bool:
    """What `--follow` looks at every two seconds."""
    from opdgeo.errors import OpdgeoError
    from opdgeo.survey.follow import Growing

    growing = Growing(folder, _base("dense"), folder.with_name("out"), "all")
    growing.look()
    try:
        growing.over()
    except OpdgeoError:
        return False
    return bool(growing.checkpoints)


# The served teacher ---------------------------------------------------------------------------------------------


class _Server:
    """Answers each connection with the next of some bytes, whatever is asked."""

    def __init__(self, answers: list[bytes]):
        self.answers = answers
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    asked = connection.recv(1 << 16)
                    length = asked.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                    if length and not asked.partition(b"\r\n\r\n")[2] and int(length):
                        connection.recv(1 << 16)
                    connection.sendall(self.answers.pop(0) if self.answers else b"")
                    connection.shutdown(socket.SHUT_WR)
                except OSError:
                    pass

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class _Tokenizer:
    """As much of a tokenizer as the check before a run asks for."""

    eos_token, eos_token_id = "<end>", 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3, 4, 5]}


def teacher(folder: Path, draw: Random) -> bool:
    """A server that answers anything: what it lists, how it reads a text, what it says of tokens."""
    import torch

    from opdgeo.training import served

    served.PAUSES = (0, 0)  # type: ignore[assignment]
    answers = []
    for name in ("models", "tokenize", "detokenize", "completions"):
        try:
            content = (folder / f"{name}.json").read_bytes()[:100_000] if (folder / f"{name}.json").is_file() else b""
        except OSError:
            content = b""
        answers += [_http(draw, content)] * (draw.choice((1, 3)) if draw.random() < 0.3 else 1)
    server = _Server(answers)
    try:
        asked = served.ServedTeacher(server.url)
        asked.require_same_tokens(_Tokenizer(), ["1+2="], 18)  # type: ignore[arg-type]
        found = asked.logprobs(torch.tensor([[3, 4, 5]]), torch.ones(1, 3), 2)
        if not bool((found.isfinite() & (found <= 0)).all()):
            raise AssertionError(f"{found.tolist()} taken as log-probabilities")
    finally:
        server.close()
    return True


def _http(draw: Random, content: bytes) -> bytes:
    code, length, more = b"200 OK", len(content), b""
    if draw.random() < 0.15:
        kind = draw.randrange(8)
        if kind == 0:
            code = draw.choice((b"500 No", b"503 Later", b"404 None", b"401 No", b"204 Empty", b"999 ?", b"abc"))
        elif kind == 1:
            code, more = b"302 Found", b"Location: http://127.0.0.2:9/\r\n"
        elif kind == 2:
            length = draw.choice((0, 1, length + 1, length * 2, 1 << 40))
        elif kind == 3:
            more = b"Content-Encoding: gzip\r\n"
        elif kind == 4:
            more = b"Transfer-Encoding: chunked\r\n"
        elif kind == 5:
            more = b"X: " + b"y" * draw.choice((10, 70_000)) + b"\r\n"
        elif kind == 6:
            more = b"X: y\r\n" * 200
        else:
            return in_bytes(draw, b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % length + content)
    return b"HTTP/1.1 " + code + b"\r\n" + more + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % length + content


FAMILIES = (
    Family("safetensors", 0.3, checkpoint),
    Family("low precision", 0.14, checkpoint, ("low_precision",)),
    Family("torch files", 0.1, checkpoint, ("torch",)),
    Family("distributed", 0.03, checkpoint, ("dcp",)),
    Family("fsdp", 0.02, checkpoint),
    Family("megatron", 0.025, checkpoint),
    Family("zero", 0.08, checkpoint),
    Family("gguf", 0.14, checkpoint),
    Family("adapters", 0.08, adapter, ("adapter",)),
    Family("weight deltas", 0.03, sparse_delta, ("delta",)),
    Family("results", 0.01, results),
    Family("cache", 0.03, cache_entry),
    Family("channels", 0.02, channel, ("channel",)),
    Family("rollouts", 0.02, rollouts),
    Family("configurations", 0.01, configuration, ("config",)),
    Family("runs that grow", 0.01, follow, ("follow",)),
    Family("teacher's answers", 0.015, teacher, ("teacher",)),
)

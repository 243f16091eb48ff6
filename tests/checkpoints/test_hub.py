"""Checkpoints of the hub: only the measured bytes come, once, checked against what the hub said; all on a server of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save

import opdgeo
from hub_server import Answer, Hub, files_of
from opdgeo.checkpoints import hub as hub_module
from opdgeo.checkpoints import open_checkpoint, ranges, transport
from opdgeo.errors import CheckpointError
from opdgeo.survey import fetching
from opdgeo.survey.kinship import remarks
from opdgeo.survey.request import Request
from program import run_opdgeo, start_opdgeo

TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"
FAST = ("--nulls", 0, "--rank", 8, "--no-cache", "--no-report")


@pytest.fixture
def hub() -> Iterator[Hub]:
    """org/base and org/tuned: the packaged models, the second in two shards, with an embedding and norms nobody measures."""
    tensors = load_file(TINY / "teacher" / "model.safetensors")
    with Hub({"org/base": files_of(TINY / "base") | {"optimizer.pt": b"-"}, "org/tuned": sharded(tensors)}) as server:
        yield server


def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    names = sorted(tensors)
    parts = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    index = {"metadata": {}, "weight_map": {name: file for file, held in parts.items() for name in held}}
    config = (TINY / "teacher" / "config.json").read_bytes()
    files = {file: save({n: tensors[n] for n in held}) for file, held in parts.items()}
    return files | {"config.json": config, "model.safetensors.index.json": json.dumps(index).encode()}


@pytest.fixture
def inside(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The same hub, for this process."""
    for name, value in hub.environment(tmp_path / "hf", "hf_secret").items():
        monkeypatch.setenv(name, value)
    for name, value in {"ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": False}.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(transport, "PAUSE", 0.0)
    return hub


def spans(content: bytes, *roles: str) -> list[tuple[int, int]]:
    """Where the tensors of some roles lie in a safetensors file, those side by side joined."""
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    found: list[tuple[int, int]] = []
    for name, entry in sorted(header.items(), key=lambda item: item[1].get("data_offsets", [0])):
        if any(f".{role}.weight" in name for role in roles):
            first, end = (8 + size + offset for offset in entry["data_offsets"])
            if found and found[-1][1] == first:
                first = found.pop()[0]
            found.append((first, end))
    return found


def test_only_the_measured_bytes_come_and_the_numbers_are_those_of_local_folders(hub: Hub, tmp_path: Path) -> None:
    env = hub.environment(tmp_path / "hf")
    roles = ("q_proj", "o_proj")
    there = ("compare", "org/base", TINY / "teacher", "--roles", ",".join(roles), *FAST)
    plan = run_opdgeo(*there, "--plan", cwd=tmp_path, env=env)
    assert plan.returncode == 0, plan.stderr
    assert hub.ranges("org/base") == []  # a plan reads headers
    assert (
        f"to fetch: 0.59 MB of 3.27 MB of org/base@{hub.commit('org/base')} (8 tensors), from {hub.url}" in plan.stdout
    )

    done = run_opdgeo(*there, "-o", "out", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert (
        f"fetching 0.59 MB of 3.27 MB of org/base@{hub.commit('org/base')} (8 tensors), from {hub.url}" in done.stderr
    )
    wanted = spans(hub.repositories["org/base"]["model.safetensors"], *roles)
    assert sorted(hub.ranges("org/base")) == wanted
    settings = opdgeo.Settings(nulls=0, rank=8)
    local = opdgeo.compare(TINY / "base", TINY / "teacher", roles=",".join(roles), settings=settings, cache=False)
    assert pl.read_parquet(tmp_path / "out/measurements.parquet").equals(local.measurements)
    run = json.loads((tmp_path / "out/run.json").read_text())
    assert run["base"]["path"] == f"org/base@{hub.commit('org/base')}"
    assert run["base"]["files"] == local.run["base"]["files"]  # the hub's hash of the shard is the file's


def test_nothing_comes_twice_and_without_a_network_what_is_here_is_used(
    inside: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fetch(roles: str) -> list[tuple[int, int]]:
        before = len(inside.ranges("org/base"))
        request = Request.of_update("org/base", TINY / "teacher", roles=roles)
        fetching.fetch(request.every, request.work)
        return sorted(inside.ranges("org/base")[before:])

    content = inside.repositories["org/base"]["model.safetensors"]
    assert fetch("q_proj,o_proj") == spans(content, "q_proj", "o_proj")
    assert "fetching" in capsys.readouterr().err
    asked = len(inside.asked)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert fetch("q_proj,o_proj") == []
    assert len(inside.asked) == asked  # of anything
    assert capsys.readouterr().err == ""
    with pytest.raises(
        CheckpointError, match=r"4 tensors of org/base .0.15 MB. are not here, and .* cannot be reached .HF_HUB_OFFLINE"
    ):
        fetch("q_proj,v_proj")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert fetch("q_proj,v_proj") == spans(content, "v_proj")


def test_a_killed_download_goes_on(hub: Hub, tmp_path: Path) -> None:
    """The storage hangs in the middle; the program is killed; the next one asks for what is missing alone."""
    env, content = hub.environment(tmp_path / "hf"), hub.repositories["org/base"]["model.safetensors"]
    wanted, stopped = spans(content, "q_proj"), threading.Event()

    def hang(answer: Answer) -> None:
        if f"bytes {wanted[2][0]}-" in answer.headers.get("Content-Range", ""):
            answer.headers["Content-Length"] = str(len(answer.body))
            answer.cut = 1000
            stopped.wait(60)

    hub.bend = hang
    command = ("compare", "org/base", TINY / "teacher", "--roles", "q_proj", *FAST, "-o", "out")
    running = start_opdgeo(*command, cwd=tmp_path, env=env)
    folder = tmp_path / "hf" / "opdgeo" / "models--org--base" / hub.commit("org/base")
    while len(ranges._checksums(folder)) < 3 and running.poll() is None:
        stopped.wait(0.05)
    running.kill()
    running.wait()
    stopped.set()
    assert len(ranges._checksums(folder)) == 3
    hub.bend = None
    before = len(hub.ranges("org/base"))
    done = run_opdgeo(*command, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert hub.ranges("org/base")[before:] == [wanted[2]]
    assert not list(folder.glob("*.partial"))


def test_a_broken_connection_is_made_again_where_it_broke(inside: Hub) -> None:
    content = inside.repositories["org/base"]["model.safetensors"]
    ((first, end), *_) = spans(content, "up_proj", "gate_proj")
    broken = []

    def cut(answer: Answer) -> None:
        if "Content-Range" in answer.headers and len(answer.body) > 300_000 and not broken:
            broken.append(answer.path)
            answer.cut = 250_000

    inside.bend = cut
    work = [m for m in Request.of_update("org/base", TINY / "teacher", roles="up_proj,gate_proj").work if m.layer == 0]
    request = Request.of_update("org/base", TINY / "teacher")
    fetching.fetch(request.every, work, progress=False)
    assert len(broken) == 1
    (whole, rest) = inside.ranges("org/base")
    assert whole == (first, end)
    assert first < rest[0] <= first + 250_000
    assert rest[1] == end
    mine, local = request.base, open_checkpoint(TINY / "base")
    assert all(torch.equal(mine.read(m), local.read(m)) for m in work)


def test_the_token_goes_to_the_hub_alone(inside: Hub) -> None:
    checkpoint = open_checkpoint("org/base")
    checkpoint.read(Request.of_update(TINY / "base", TINY / "teacher").work[0])
    # The hub's own client may also ask which programs it knows, without the token.
    assert {a.authorization for a in inside.asked if a.at == "hub" and "org/base" in a.path} == {"Bearer hf_secret"}
    at_storage = [a.authorization for a in inside.asked if a.at == "storage"]
    assert at_storage == [None] * 3  # the number before the header, the header, one tensor


def bent(**changes: Any) -> Any:
    """A server that lies about ranges of weights: `of`, the least bytes of an answer that is bent."""

    def bend(answer: Answer) -> None:
        if "Content-Range" in answer.headers and len(answer.body) >= changes["of"]:
            for key, value in changes.items():
                if key == "body":
                    answer.body = value(answer.body)
                elif key == "range":
                    answer.headers["Content-Range"] = value(answer.headers["Content-Range"])
                elif key == "status":
                    answer.status = value

    return bend


LONG = "bytes 0-7/999999999999999999999"
LIES = {
    "less than it promises": (bent(of=9000, body=lambda b: b[:-10]), "promises .* bytes; expected"),
    "more than was asked for": (bent(of=9000, body=lambda b: b + b"-"), "promises .* bytes; expected"),
    "other bytes": (bent(of=9000, range=lambda r: r.replace("bytes ", "bytes 1")), "expected the bytes"),
    "another size": (bent(of=9000, range=lambda r: r + "0"), "has changed, or what answers is not the hub: its size"),
    "a header of 2^62 bytes": (
        bent(of=8, body=lambda b: b"\0" * 7 + b"\x40"),
        "no readable safetensors file .a header of",
    ),
    "another header": (
        bent(of=1000, body=lambda b: b"[" + b[1:]),
        "is not a readable safetensors file .its header is no JSON",
    ),
    "an endless file": (bent(of=8, range=lambda _: LONG), "has changed, or what answers is not the hub: its size"),
    "a whole file": (bent(of=8, status=200), "gives whole files only"),
    "nothing": (bent(of=9000, status=404), "the hub does not give"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_server_that_lies_is_an_error_that_says_so(lie: str, inside: Hub) -> None:
    inside.bend, said = LIES[lie]
    matrix = Request.of_update(TINY / "base", TINY / "teacher").work[0]
    with pytest.raises(CheckpointError, match=said):
        open_checkpoint("org/base").read(matrix)
    inside.bend = None
    local = open_checkpoint(TINY / "base").read(matrix)
    assert torch.equal(open_checkpoint("org/base").read(matrix), local)  # and nothing of the lie was kept


def test_a_configuration_that_is_not_the_one_the_hub_names_is_not_kept(inside: Hub) -> None:
    def other(answer: Answer) -> None:
        if answer.path.endswith("config.json"):
            answer.body = b'{"model_type": "gpt2"}'

    inside.bend = other
    with pytest.raises(CheckpointError, match=r"what came as config.json of org/base.* is not the file whose hash"):
        open_checkpoint("org/base")
    inside.bend = None
    assert open_checkpoint("org/base").config["model_type"] == "qwen3"


def test_a_file_that_changes_in_between_is_an_error(inside: Hub) -> None:
    matrix = Request.of_update(TINY / "base", TINY / "teacher").work[0]
    checkpoint = open_checkpoint("org/base")
    content = dict(inside.repositories["org/base"])
    content["model.safetensors"] = content["model.safetensors"][:-1] + b"\xff"
    inside.repositories = {"org/base": content}
    with pytest.raises(CheckpointError, match="has changed, or what answers is not the hub: its etag"):
        checkpoint.read(matrix)
    with pytest.raises(CheckpointError, match="is another file than it was, which no commit allows"):
        open_checkpoint("org/base")


def test_what_was_changed_on_the_disk_is_fetched_again(inside: Hub) -> None:
    request = Request.of_update("org/base", TINY / "teacher", roles="k_proj")
    fetching.fetch(request.every, request.work, progress=False)
    assert isinstance(request.base, hub_module.Remote)
    file = request.base.needed(request.work)[0].file
    file.write_bytes(b"\1" * file.stat().st_size)
    before = len(inside.ranges("org/base"))
    fetching.fetch(request.every, request.work, progress=False)
    assert len(inside.ranges("org/base")) == before + 1
    local = open_checkpoint(TINY / "base")
    assert all(torch.equal(request.base.read(m), local.read(m)) for m in request.work)


def test_shards_are_read_by_their_index_and_what_the_hubs_own_cache_holds_is_not_fetched(
    inside: Hub, tmp_path: Path
) -> None:
    request = Request.of_update(TINY / "base", "org/tuned", roles="attention")
    fetching.fetch(request.every, request.work, progress=False)
    local = open_checkpoint(TINY / "teacher")
    assert all(torch.equal(request.checkpoints[0].read(m), local.read(m)) for m in request.work)
    assert [f["name"] for f in request.checkpoints[0].manifest()["files"]] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    # One shard whole in the hub's own cache, then both.
    commit = inside.commit("org/tuned")
    snapshot = tmp_path / "hf" / "hub" / "models--org--tuned" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    for known in range(2):
        name = f"model-0000{known + 1}-of-00002.safetensors"
        (snapshot / name).write_bytes(inside.repositories["org/tuned"][name])
        request = Request.of_update(TINY / "base", "org/tuned", roles="mlp")
        ours = {r.shard.name for _, found in hub_module.to_fetch(request.every, request.work) for r in found}
        assert ours == ({"model-00002-of-00002.safetensors"} if known == 0 else set())
        hashes = sorted(f["sha256"] for f in request.checkpoints[0].manifest()["files"])
        contents = (c for n, c in inside.repositories["org/tuned"].items() if n.endswith(".safetensors"))
        assert hashes == sorted(hashlib.sha256(content).hexdigest() for content in contents)
    for name in ("config.json", "model.safetensors.index.json"):
        (snapshot / name).write_bytes(inside.repositories["org/tuned"][name])
    request = Request.of_update(TINY / "base", "org/tuned", roles="mlp")
    assert request.checkpoints[0].path == snapshot
    assert all(torch.equal(request.checkpoints[0].read(m), local.read(m)) for m in request.work)


def test_names_revisions_and_what_is_not_there(inside: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside.revisions = ("step-20",)
    found = open_checkpoint("org/tuned@step-20")
    assert (found.name, found.step) == ("tuned@step-20", 20)
    assert found.place == f"org/tuned@{inside.commit('org/tuned')}"
    with pytest.raises(CheckpointError, match=r"gives no such model \(RevisionNotFound\)"):
        open_checkpoint("org/tuned@none")
    with pytest.raises(CheckpointError, match=r"gives no such model \(RepoNotFound\)"):
        open_checkpoint("org/other")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert open_checkpoint("org/tuned@step-20").place == found.place
    with pytest.raises(CheckpointError, match="the hub cannot be reached"):
        open_checkpoint("org/other")
    for damaged in ("{}", json.dumps({"files": {"model.safetensors": {"size": 1e400, "etag": "x"}}})):
        (found.path / "files.json").write_text(damaged)  # which shards these headers are of is not known any more
        with pytest.raises(CheckpointError, match="the hub cannot be reached"):
            open_checkpoint("org/tuned@step-20")
    (tmp_path / "org").mkdir()  # which makes it a path here, though the cache has such a model
    with pytest.raises(CheckpointError, match="does not exist"):
        open_checkpoint("org/tuned@step-20")


def test_track_and_relate_take_names_as_compare_does(inside: Hub) -> None:
    """What two checkpoints share is fetched once."""
    inside.repositories = {**inside.repositories, "org/other": inside.repositories["org/base"]}
    inside.revisions = ("step-20",)
    for request in (
        Request.of_run("org/base", ["org/tuned@step-20", "org/other"], roles="k_proj"),
        Request.of_pairs("org/base", ["org/tuned", "org/other"], roles="k_proj"),
    ):
        fetching.fetch(request.every, request.work)
        local = open_checkpoint(TINY / "teacher")
        assert all(torch.equal(request.checkpoints[0].read(m), local.read(m)) for m in request.work)
    assert [len(inside.ranges(repo)) for repo in ("org/base", "org/other")] == [4, 4]


def test_a_base_is_known_by_its_name_on_the_hub(inside: Hub) -> None:
    """Both configurations name the base, as transformers writes them: nothing is swapped, and the two are no siblings."""
    config = json.loads((TINY / "base" / "config.json").read_text()) | {"_name_or_path": "org/base"}
    named = {repo: {**files, "config.json": json.dumps(config).encode()} for repo, files in inside.repositories.items()}
    inside.repositories, inside.revisions = named, ("step-20",)
    base, tuned, later = map(open_checkpoint, ("org/base", "org/tuned", "org/base@step-20"))
    assert remarks(base, [tuned]) == remarks(base, [later]) == []
    assert remarks(tuned, [base]) == ["tuned was trained from base: BASE and TUNED look swapped."]


def test_other_formats_come_whole_and_it_is_said_before(hub: Hub, tmp_path: Path) -> None:
    """Through the hub's own client, which reads its environment when it is imported: in a program of its own."""
    torch.save(load_file(TINY / "teacher" / "model.safetensors"), tmp_path / "pytorch_model.bin")
    content, config = (tmp_path / "pytorch_model.bin").read_bytes(), (TINY / "teacher" / "config.json").read_bytes()
    hub.repositories = {"org/old": {"pytorch_model.bin": content, "config.json": config, "README.md": b"-"}}
    env = hub.environment(tmp_path / "hf")
    said = []
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run_opdgeo("compare", TINY / "base", "org/old", "--plan", cwd=tmp_path, env=env | more)
        assert done.returncode == 0, done.stderr
        said.append(done.stderr)
    assert f"fetching 3.28 MB: 1 files of org/old@{hub.commit('org/old')[:8]} from {hub.url}, whole" in said[0]
    assert "fetching" not in said[1]
    assert not any(a.path.endswith("README.md") for a in hub.asked)


def test_a_hub_that_does_not_answer_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that takes no connection: its queue is full, so a client would wait until its own limit."""
    monkeypatch.setattr(transport, "ANSWER", 0.2)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(address)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{address[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        with pytest.raises(OSError, match=r"timed out|no answer"):
            transport.reach()
        for client in waiting:
            client.close()

"""A server that speaks as much of the Hugging Face hub's protocol as its clients need, on this machine.

    with Hub({"org/model": {"config.json": b"…", "model.safetensors": b"…"}}) as hub:
        run_opdgeo("compare", "org/model", …, env=hub.environment(tmp_path))
        hub.ranges("org/model")            the bytes of its weights that were asked for

As the real one does, it sends large files on to another host (here another port), which knows no tokens and gives byte ranges. What it
answers can be bent: `hub.bend` is called with every answer before it is sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

LARGE = (".safetensors", ".bin", ".gguf")


@dataclass
class Answer:
    """What is about to be sent; `cut` closes the connection after so many bytes of the body."""

    path: str
    status: int
    headers: dict[str, str]
    body: bytes = b""
    cut: int | None = None


@dataclass(frozen=True)
class Asked:
    """A request: at the hub or at the storage behind it, with its Range and Authorization."""

    at: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class Hub:
    """`repositories` by name; all have one revision, `main`, and those in `revisions`."""

    repositories: Mapping[str, Mapping[str, bytes]]
    revisions: tuple[str, ...] = ()
    bend: Callable[[Answer], None] | None = None
    asked: list[Asked] = field(default_factory=list)

    def __enter__(self) -> Hub:
        self.servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, at)) for at in ("hub", "storage")]
        for server in self.servers:
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for server in self.servers:
            server.shutdown()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.servers[0].server_address[1]}"

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Of a program that uses it: the other settings of the hub's client are as by default."""
        proxies = dict.fromkeys(
            ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), ""
        )
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token or "", **proxies}

    def commit(self, repo: str) -> str:
        return hashlib.sha1(repo.encode()).hexdigest()

    def ranges(self, repo: str, file: str = "model.safetensors") -> list[tuple[int, int]]:
        """The bytes (first, end) of a file that were asked for, without the header and the number before it."""
        begin = 8 + int.from_bytes(self.repositories[repo][file][:8], "little")
        path = f"/{repo}/resolve/{self.commit(repo)}/{file}"
        found = (
            re.fullmatch(r"bytes=(\d+)-(\d+)", a.range or "") for a in self.asked if a.path == path and a.at == "hub"
        )
        spans = [(int(m[1]), int(m[2]) + 1) for m in found if m]
        return [(first, end) for first, end in spans if first >= begin]

    def answer(self, at: str, path: str, wanted: str | None) -> Answer:
        where = path.partition("?")[0]
        for repo, files in self.repositories.items():
            commit = self.commit(repo)
            known = ("main", commit, *self.revisions)
            if where in {f"/api/models/{repo}", *(f"/api/models/{repo}/revision/{r}" for r in known)}:
                return _json({"id": repo, "sha": commit, "siblings": [_sibling(n, c) for n, c in files.items()]})
            if where in {f"/api/models/{repo}/tree/{r}" for r in known}:
                return _json([{"type": "file", "path": n, "size": len(c), "oid": n} for n, c in files.items()])
            name = where.removeprefix(f"/{repo}/resolve/{commit}/")
            if name != where and name in files:
                return self._file(at, where, name, files[name], commit, wanted)
            if f"/{repo}/" in where:
                return Answer(where, 404, {"X-Error-Code": "RevisionNotFound"})
        return Answer(where, 401, {"X-Error-Code": "RepoNotFound"})

    def _file(self, at: str, path: str, name: str, content: bytes, commit: str, wanted: str | None) -> Answer:
        etag, size = etag_of(name, content), len(content)
        facts = {"X-Repo-Commit": commit}
        if at == "hub" and name.endswith(LARGE):
            storage = f"http://127.0.0.1:{self.servers[1].server_address[1]}{path}"
            facts |= {"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(size), "Location": storage}
            return Answer(path, 302, facts)
        facts |= {"ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or ""):
            first, end = int(found[1]), min(int(found[2] or size), size - 1) + 1
            return Answer(path, 206, facts | {"Content-Range": f"bytes {first}-{end - 1}/{size}"}, content[first:end])
        return Answer(path, 200, facts, content)


def _json(value: Any) -> Answer:
    return Answer("", 200, {"Content-Type": "application/json"}, json.dumps(value).encode())


def etag_of(name: str, content: bytes) -> str:
    """As the hub has it: the SHA-256 of a large file, git's own hash of a small one."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _sibling(name: str, content: bytes) -> dict[str, Any]:
    large = {"lfs": {"sha256": etag_of(name, content), "size": len(content)}} if name.endswith(LARGE) else {}
    return {"rfilename": name, "size": len(content), "blobId": etag_of("", content), **large}


def _handler(hub: Hub, at: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            hub.asked.append(Asked(at, self.path.partition("?")[0], wanted, self.headers.get("Authorization")))
            answer = hub.answer(at, self.path, wanted)
            if hub.bend is not None:
                hub.bend(answer)
            self.send_response(answer.status)
            for key, value in ({"Content-Length": str(len(answer.body))} | answer.headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(answer.body[: answer.cut])
            if answer.cut is not None:
                self.close_connection = True

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def files_of(folder: Path) -> dict[str, bytes]:
    """A model's folder as the files of a repository."""
    return {file.name: file.read_bytes() for file in folder.iterdir()}

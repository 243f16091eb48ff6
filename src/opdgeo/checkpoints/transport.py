"""What the Hugging Face hub answers to a GET: whole small files, and byte ranges of large ones.

The session is that of the hub's own client, with its proxies and certificates, and so are its settings (`HF_ENDPOINT`, `HF_TOKEN`).
Redirects are followed here, one by one: the hub sends large files on to other hosts, and a token goes to no host but its own.
What comes is held against what was asked for and against what the hub said of the file: its length, its commit, its ETag.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from opdgeo.errors import CheckpointError, printable

ANSWER = (
    3.0  # seconds in which the hub, or the proxy before it, takes a connection; its client would try for half a minute
)
SILENT = 20.0  # seconds without a byte, after which a connection counts as broken
HOPS = 8  # redirects
TRIES, PAUSE = 5, 0.5  # breaks in a row, and seconds before the first new try; twice as long before every further one
PROGRESS = 1 << 20  # bytes after which a break counts as the first
SMALL = 1 << 25  # bytes of a configuration, an index or a list of files
_AGAIN = (408, 429, 500, 502, 503, 504)  # statuses of a server that may answer later


class Refused(CheckpointError):
    """The hub does not give what was asked for; `code` is its word for why, such as RepoNotFound, or the HTTP status."""

    def __init__(self, message: str, code: str):
        super().__init__(message)
        self.code = code


def reach() -> None:
    """Raises:
    OSError: no connection to the hub within `ANSWER` seconds, the look-up of its name included.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    hub = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(hub.scheme)
    there = urlsplit(proxy) if proxy and not proxy_bypass(hub.hostname or "") else hub
    failed: list[OSError] = [TimeoutError(f"no answer from {there.hostname} in {ANSWER:g} s")]

    def connect() -> None:
        try:
            port = there.port or (443 if there.scheme == "https" else 80)
            socket.create_connection((there.hostname or "", port), timeout=ANSWER).close()
            failed.clear()
        except OSError as error:
            failed[:] = [error]
        except ValueError as error:  # no port, or no name of a machine
            failed[:] = [OSError(str(error))]

    attempt = threading.Thread(target=connect, daemon=True)  # a look-up of a name cannot be given a limit of its own
    attempt.start()
    attempt.join(ANSWER)
    if failed:
        raise failed[0]


def endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def description(repo: str, revision: str | None) -> str:
    """The address of what the hub says of a repository: its commit, its files with their sizes and hashes."""
    at = f"/revision/{quote(revision, safe='')}" if revision else ""
    return f"{endpoint()}/api/models/{repo}{at}?blobs=true"


def address(repo: str, commit: str, name: str) -> str:
    """The address of a file."""
    return f"{endpoint()}/{repo}/resolve/{commit}/{quote(name)}"


def small(url: str) -> bytes:
    """A whole file of at most `SMALL` bytes.

    Raises:
        Refused: the hub has no such file, or does not give it. CheckpointError: it is larger. OSError and others: no connection.
    """
    with _answer(url, {}) as (response, _):
        if response.status_code != 200:
            raise _refused(url, response)
        found = bytearray()
        for chunk in response.iter_bytes():
            found += chunk
            if len(found) > SMALL:
                raise CheckpointError(
                    f"{url} has more than {SMALL} bytes; expected a small file. Check the repository."
                )
        return bytes(found)


def part(url: str, first: int, end: int, expected: dict[str, str]) -> Iterator[bytes]:
    """The bytes `first` to `end` (exclusive) of a file, in chunks; a connection that breaks is made again, from where it broke.

    Args:
        expected: what the hub said of the file: its `size`, `commit` and `etag`, as far as they are known. What it says now and
            was not known is added.

    Raises:
        Refused: the hub does not give it. CheckpointError: it gives something else, or the connection broke too often.
    """
    at, broken, since = first, 0, first
    while at < end:
        try:
            with _answer(url, {"Range": f"bytes={at}-{end - 1}"}) as (response, said):
                _check(url, response, said, (at, end), expected)
                # As it comes: a chunk of a stated size would be lost with the connection.
                for chunk in response.iter_raw():
                    if len(chunk) > end - at:
                        raise CheckpointError(
                            f"{url} gave more than the bytes {first} to {end - 1} that were asked for. {_WRONG}"
                        )
                    at += len(chunk)
                    yield chunk
                if at < end:
                    raise ConnectionError(f"it ended {end - at} bytes early")
        except CheckpointError:
            raise
        except Exception as error:  # the transport raises almost anything
            broken, since = (1, at) if at - since >= PROGRESS else (broken + 1, since)
            if broken >= TRIES:
                raise CheckpointError(
                    f"the connection to {url} broke {TRIES} times in a row ({type(error).__name__}: {str(error)[:200]}). What came is kept: "
                    "give the command again to go on."
                ) from error
            time.sleep(PAUSE * 2 ** (broken - 1))


_WRONG = "Is it the hub, or something between? Give the command again, or fetch the repository with `hf download`."


@contextmanager
def _answer(url: str, headers: dict[str, str]) -> Iterator[tuple[Any, dict[str, str]]]:
    """The answer that a chain of redirects ends in, its body not read yet, and what the hub itself said of the file on the way."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    own = build_hf_headers(library_name="opdgeo") | {"accept-encoding": "identity"} | headers
    others = {name: value for name, value in own.items() if name.lower() != "authorization"}
    said: dict[str, str] = {}
    begun = url
    for _ in range(HOPS):
        ours = _origin(url) == _origin(endpoint())
        limits = (ANSWER, SILENT, SILENT, SILENT)
        with get_session().stream(
            "GET", url, headers=own if ours else others, follow_redirects=False, timeout=limits
        ) as response:
            if ours:
                names = {"commit": "x-repo-commit", "etag": "x-linked-etag"}
                said |= {key: response.headers[name] for key, name in names.items() if name in response.headers}
                if response.status_code in (200, 206) and "etag" in response.headers:
                    said.setdefault("etag", response.headers["etag"])
            if response.status_code not in (301, 302, 303, 307, 308):
                if response.status_code in _AGAIN or (response.status_code == 403 and not ours):  # or an old signature
                    raise ConnectionError(f"{_origin(url)[1]} answered {response.status_code}")
                yield response, said
                return
            there = urljoin(url, response.headers.get("location", ""))
        if urlsplit(there).scheme not in ("https", urlsplit(begun).scheme):
            raise CheckpointError(f"{begun} is redirected to {printable(there)[:200]}; expected https. {_WRONG}")
        url = there
    raise CheckpointError(f"{begun} is redirected more than {HOPS} times. {_WRONG}")


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"https": 443, "http": 80}.get(parts.scheme)


def _check(url: str, response: Any, said: dict[str, str], bytes_: tuple[int, int], expected: dict[str, str]) -> None:
    """Hold an answer against what was asked for and what the hub said of the file before."""
    first, end = bytes_
    if response.status_code == 200:
        raise CheckpointError(
            f"{_origin(url)[1]} gives whole files only and no byte ranges. Fetch the repository with `hf download`, and give the "
            "command again: what the hub's cache holds whole is read there."
        )
    if response.status_code != 206:
        raise _refused(url, response)
    given = response.headers.get("content-range", "")
    span, _, size = given.rpartition("/")
    if span != f"bytes {first}-{end - 1}" or not size.isascii() or not size.isdigit():
        raise CheckpointError(
            f"{url} answered with {printable(given)[:80] or 'no Content-Range'}; expected the bytes {first} to {end - 1}. {_WRONG}"
        )
    length = response.headers.get("content-length")
    if length is not None and length != str(end - first):
        raise CheckpointError(f"{url} promises {printable(length)[:40]} bytes; expected {end - first}. {_WRONG}")
    facts = {"size": size} | {key: value.removeprefix("W/").strip('"') for key, value in said.items()}
    for key, value in facts.items():
        before = expected.setdefault(key, value)
        if before != value:
            raise CheckpointError(
                f"{url} has changed, or what answers is not the hub: its {key} is {printable(value)[:80]}; expected {before}. {_WRONG}"
            )


def _refused(url: str, response: Any) -> Refused:
    code = response.headers.get("x-error-code") or str(response.status_code)
    return Refused(f"the hub does not give {url} ({printable(code)[:60]}).", printable(code)[:60])

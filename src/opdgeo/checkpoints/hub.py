"""Checkpoints by name: ``org/name`` or ``org/name@revision`` on the Hugging Face hub, kept in its own cache.

Only the files that are read are fetched: the weights in one format, their index, the configuration. What lies at such a path
here comes first, and so does a typing error below a folder that exists.
"""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from opdgeo.errors import CheckpointError

_NAME = re.compile(r"(?P<repo>(?P<org>\w[\w.-]*)/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
# The first group of which the repository has a file.
_WEIGHTS = (
    ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model.bin.index.json"),
    ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"),
    ("*.gguf",),
)
_CONFIG = "config.json"
_ANSWER = (
    3.0  # seconds in which the hub, or the proxy before it, takes a connection; its client would try for half a minute
)


def is_name(text: str) -> bool:
    """Whether a text that is no path here can be the name of a repository.

    >>> is_name("Qwen/Qwen3-8B-Base@main"), is_name("/data/model"), is_name("model")
    (True, False, False)
    """
    found = _NAME.fullmatch(text)
    return found is not None and not Path(found["org"]).exists()


def fetch(text: str) -> Path:
    """The folder of a repository's files at a revision, downloaded where the cache lacks them.

    Raises:
        CheckpointError: no such repository or revision, no weights in it, or neither a connection nor a cached copy.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    found = _NAME.fullmatch(text)
    assert found is not None
    repo, revision = found["repo"], found["revision"]
    try:
        _connect()
        files = HfApi().list_repo_files(repo, revision=revision)
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise CheckpointError(
            f"{text} is no path here, and the Hugging Face hub gives no such model ({type(error).__name__}). Check the name and "
            "the revision; for a gated or private one log in with `hf auth login`."
        ) from error
    except Exception as error:  # no network: the transport raises almost anything
        for patterns in _WEIGHTS:
            with suppress(Exception):  # not cached, or not all of it
                wanted = [*patterns, _CONFIG]
                folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, local_files_only=True))
                if any(_matching((p.name for p in folder.iterdir()), patterns)):
                    return folder
        raise CheckpointError(
            f"{text} is no path here, the Hugging Face cache has no whole copy, and the hub cannot be reached "
            f"({type(error).__name__}). Check the path, or fetch it where there is a network: hf download {repo}."
        ) from error
    weights = next((w for patterns in _WEIGHTS if (w := _matching(files, patterns))), [])
    if not weights:
        raise CheckpointError(f"{text} on the Hugging Face hub holds no weights that opdgeo reads, at its top level.")
    if weights[0].endswith(".gguf") and len(weights) > 1:
        raise CheckpointError(
            f"{text} holds several GGUF files. Fetch one and give it as a file: hf download {repo} {weights[0]}."
        )
    wanted = [*weights, _CONFIG]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except Exception as error:
        raise CheckpointError(f"downloading {text} failed: {error}. Give the command again to go on.") from error


def _connect() -> None:
    """Raises:
    OSError: no connection to the hub within `_ANSWER` seconds, the look-up of its name included.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise OSError("HF_HUB_OFFLINE is set")
    hub = urlsplit(constants.ENDPOINT)
    proxy = getproxies().get(hub.scheme)
    there = urlsplit(proxy) if proxy and not proxy_bypass(hub.hostname or "") else hub
    failed: list[OSError] = [TimeoutError(f"no answer from {there.hostname} in {_ANSWER:g} s")]

    def connect() -> None:
        try:
            port = there.port or (443 if there.scheme == "https" else 80)
            socket.create_connection((there.hostname or "", port), timeout=_ANSWER).close()
            failed.clear()
        except OSError as error:
            failed[:] = [error]

    attempt = threading.Thread(target=connect, daemon=True)  # a look-up of a name cannot be given a limit of its own
    attempt.start()
    attempt.join(_ANSWER)
    if failed:
        raise failed[0]


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

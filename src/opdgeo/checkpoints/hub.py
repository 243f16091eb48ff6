"""Checkpoints by name: ``org/name`` or ``org/name@revision`` on the Hugging Face hub, kept in its own cache.

Only the files that are read are fetched: the weights in one format, their index, the configuration. What lies at such a path
here comes first, and so does a typing error below a folder that exists.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path

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


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]

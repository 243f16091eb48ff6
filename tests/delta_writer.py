"""Versions of a run as weight deltas, written as slime's trainer writes them: by the zstandard, xxhash and safetensors libraries."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
import xxhash
import zstandard

INDEX = "model.safetensors.index.json"
Weights = dict[str, torch.Tensor]


def in_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).flatten().numpy()


def publish(folder: Path, version: int, old: Weights, new: Weights, encoding: str, checksum: str = "xxh3-128") -> Path:
    """One `weight_v` folder: changed tensors in two shards, and the index last."""
    place = folder / f"weight_v{version:06d}"
    place.mkdir(parents=True)
    digest = {
        "xxh3-128": lambda b: xxhash.xxh3_128(b).hexdigest(),
        "adler32": lambda b: f"{zlib.adler32(b):08x}",
    }[checksum]
    shards: list[tuple[dict[str, np.ndarray], dict[str, str]]] = [({}, {}), ({}, {})]
    placed = {}
    for name in new:
        before, after = in_bytes(old[name]), in_bytes(new[name])
        changed = before != after
        if not changed.any():
            continue
        where = np.flatnonzero(changed).astype("<u4")
        count = np.array([where.size], "<u4")
        frame = (
            before ^ after
            if encoding == "xor"
            else np.concatenate([count.view(np.uint8), where.view(np.uint8), after[changed]])
        )
        at = len(placed) % 2
        frames, sums = shards[at]
        frames[name] = np.frombuffer(zstandard.ZstdCompressor(level=1).compress(frame), np.uint8)
        sums[name] = digest(after)
        placed[name] = f"model-{at:05d}-of-00002.safetensors"
    for at, (frames, sums) in enumerate(shards):
        blob = safetensors.numpy.save(frames, metadata=sums)
        (place / f"model-{at:05d}-of-00002.safetensors").write_bytes(blob)
    facts = {
        "version": f"{version:06d}", "base_version": f"{version - 1:06d}", "delta_encoding": encoding,
        "compression_format": "zstd", "checksum_format": checksum,
    }  # fmt: skip
    (place / INDEX).write_text(json.dumps({"metadata": facts, "weight_map": placed}))
    return place

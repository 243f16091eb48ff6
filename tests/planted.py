"""Matrices and checkpoints whose answer is known before anything is measured.

The matrices are float64; `stored` rounds them to what a checkpoint of a given dtype holds. The safetensors files
are written byte by byte here (an 8-byte header length, a JSON header, the data), so that no library decides what
opdgeo is given to read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from reference import Matrix, bf16_bits, bf16_values

DTYPES = ("bfloat16", "float16", "float32")
_TAGS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


# Matrices -------------------------------------------------------------------------------------------------------


def orthonormal(rng: np.random.Generator, rows: int, cols: int) -> Matrix:
    """A (rows, cols) matrix with orthonormal columns, uniformly distributed; rows ≥ cols."""
    q, r = np.linalg.qr(rng.standard_normal((rows, cols)))
    return np.asarray(q * np.sign(np.diag(r)))


def with_spectrum(rng: np.random.Generator, rows: int, cols: int, spectrum: Sequence[float]) -> Matrix:
    """A (rows, cols) matrix with these singular values (missing ones are 0) and random singular vectors."""
    s = np.asarray(spectrum, dtype=np.float64)
    return np.asarray((orthonormal(rng, rows, len(s)) * s) @ orthonormal(rng, cols, len(s)).T)


def turned(basis: Matrix, k: int, degrees: Sequence[float]) -> Matrix:
    """The basis with column i turned by degrees[i] towards column k+i: the spans of the first k columns then lie
    at exactly these principal angles (and 0 for the columns not named). Needs k + len(degrees) ≤ columns."""
    out = basis.copy()
    for i, angle in enumerate(degrees):
        c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
        out[:, i], out[:, k + i] = c * basis[:, i] + s * basis[:, k + i], c * basis[:, k + i] - s * basis[:, i]
    return out


def rotated_pair(
    rng: np.random.Generator,
    rows: int,
    cols: int,
    spectrum: Sequence[float],
    k: int,
    left: Sequence[float],
    right: Sequence[float],
) -> tuple[Matrix, Matrix]:
    """Two matrices of the same spectrum whose top-k subspaces lie at the given principal angles, in degrees."""
    s = np.asarray(spectrum, dtype=np.float64)
    u, v = orthonormal(rng, rows, len(s)), orthonormal(rng, cols, len(s))
    return np.asarray((u * s) @ v.T), np.asarray((turned(u, k, left) * s) @ turned(v, k, right).T)


def weights(rng: np.random.Generator, rows: int, cols: int, scale: float = 0.02) -> Matrix:
    """Weights as a trained network has them: Gaussian, with singular values that fall like a power of their index."""
    n = min(rows, cols)
    noise: Matrix = rng.standard_normal((rows, cols))
    spectrum = [4 * math.sqrt(max(rows, cols)) / i**0.7 for i in range(1, n + 1)]
    return np.asarray(scale * (noise + with_spectrum(rng, rows, cols, spectrum)))


def low_rank_update(rng: np.random.Generator, base: Matrix, rank: int, relative: float) -> Matrix:
    """An update of this rank, singular values 1, 1/2, 1/3, …, scaled to `relative` of the base's Frobenius norm."""
    rows, cols = base.shape
    update = with_spectrum(rng, rows, cols, [1 / i for i in range(1, min(rank, rows, cols) + 1)])
    return np.asarray(update * (relative * np.linalg.norm(base) / np.linalg.norm(update)))


# Stored values --------------------------------------------------------------------------------------------------


def encode(values: Matrix, dtype: str) -> bytes:
    """Little-endian bytes of the values rounded to nearest in that dtype; NaN and infinity pass through."""
    if dtype == "bfloat16":
        finite = np.isfinite(values)
        bits = bf16_bits(np.where(finite, values, 0.0))
        special = np.where(np.isnan(values), 0x7FC0, np.where(values > 0, 0x7F80, 0xFF80)).astype(np.uint16)
        return np.where(finite, bits, special).astype("<u2").tobytes()
    return np.ascontiguousarray(values).astype("<f2" if dtype == "float16" else "<f4").tobytes()


def decode(raw: bytes, dtype: str, shape: tuple[int, ...]) -> Matrix:
    """The float64 values of these bytes."""
    if dtype == "bfloat16":
        return bf16_values(np.frombuffer(raw, dtype="<u2")).reshape(shape)
    return np.frombuffer(raw, dtype="<f2" if dtype == "float16" else "<f4").astype(np.float64).reshape(shape)


def stored(values: Matrix, dtype: str) -> Matrix:
    """What a checkpoint of that dtype holds of these values, as float64."""
    return decode(encode(values, dtype), dtype, values.shape)


# Checkpoints ----------------------------------------------------------------------------------------------------

Tensors = Mapping[str, NDArray[np.float64]]


def write_safetensors(path: Path, tensors: Tensors, dtype: str) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    blobs, at = [], 0
    for name, values in tensors.items():
        blob = encode(values, dtype)
        header[name] = {"dtype": _TAGS[dtype], "shape": list(values.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Matrix]:
    """The float64 values of the tensors whose names are wanted."""
    dtypes = {tag: dtype for dtype, tag in _TAGS.items()}
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        found = {}
        for name, entry in header.items():
            if name != "__metadata__" and wanted(name):
                start, end = entry["data_offsets"]
                file.seek(8 + length + start)
                found[name] = decode(file.read(end - start), dtypes[entry["dtype"]], tuple(entry["shape"]))
        return found


def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    dtype: str = "bfloat16",
    *,
    shards: int = 1,
    config: Mapping[str, object] | None = None,
) -> Path:
    """A Hugging Face folder: config.json and model.safetensors, or `shards` files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": dtype, **(config or {})}, indent=2))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return folder
    names = list(tensors)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        write_safetensors(folder / file, part, dtype)
        places |= dict.fromkeys(part, file)
    size = sum(len(encode(values, dtype)) for values in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": {name: places[name] for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


WIDTH, KV, FFN, LAYERS, VOCABULARY = 48, 16, 96, 2, 64
LLAMA: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": FFN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (FFN, WIDTH),
    "mlp.up_proj": (FFN, WIDTH),
    "mlp.down_proj": (WIDTH, FFN),
}


def tensor_name(layer: int, module: str) -> str:
    return f"model.layers.{layer}.{module}.weight"


def rest_of_model(rng: np.random.Generator, layers: int = LAYERS) -> dict[str, Matrix]:
    """What a Llama checkpoint holds beside its linear layers: embedding, head and norms."""
    rest: dict[str, Matrix] = {"model.embed_tokens.weight": 0.02 * rng.standard_normal((VOCABULARY, WIDTH))}
    for layer in range(layers):
        rest[f"model.layers.{layer}.input_layernorm.weight"] = np.ones(WIDTH)
        rest[f"model.layers.{layer}.post_attention_layernorm.weight"] = np.ones(WIDTH)
    rest["model.norm.weight"] = np.ones(WIDTH)
    rest["lm_head.weight"] = 0.02 * rng.standard_normal((VOCABULARY, WIDTH))
    return rest


def tiny_pair(seed: int = 0) -> tuple[dict[str, Matrix], dict[str, Matrix]]:
    """A two-layer Llama checkpoint and a tuned one: every kind of update that has well-determined answers.

    Layer 0: a dense update of 1 % (q), a planted rotation (k), an update of one entry in ten (v), rank 3 (o),
    a near-identical pair (gate), a spectrum that grows by a tenth (up), rank 20 (down). Layer 1: a low-rank part
    and noise, at seven sizes.
    """
    rng = np.random.default_rng(seed)
    base: dict[str, Matrix] = {}
    tuned: dict[str, Matrix] = {}

    def put(layer: int, module: str, before: Matrix, after: Matrix) -> None:
        base[tensor_name(layer, module)], tuned[tensor_name(layer, module)] = before, after

    w = weights(rng, WIDTH, WIDTH)
    put(0, "self_attn.q_proj", w, w + 2e-4 * rng.standard_normal(w.shape))
    fall = [0.5 * 0.8**i for i in range(KV)]
    put(0, "self_attn.k_proj", *rotated_pair(rng, KV, WIDTH, fall, 8, [20, 5, 1, 0.1], [40, 3, 0.5]))
    w = weights(rng, KV, WIDTH)
    put(0, "self_attn.v_proj", w, w * (1 + 0.02 * (rng.random(w.shape) < 0.1)))
    w = weights(rng, WIDTH, WIDTH)
    put(0, "self_attn.o_proj", w, w + low_rank_update(rng, w, 3, 0.05))
    w = weights(rng, FFN, WIDTH)
    put(0, "mlp.gate_proj", w, w + 3e-6 * rng.standard_normal(w.shape))
    w = weights(rng, FFN, WIDTH)
    put(0, "mlp.up_proj", w, 1.1 * w)
    w = weights(rng, WIDTH, FFN)
    put(0, "mlp.down_proj", w, w + low_rank_update(rng, w, 20, 0.01))
    for i, (module, (rows, cols)) in enumerate(SHAPES.items()):
        w, relative = weights(rng, rows, cols), 10 ** (-3 + 0.4 * i)
        noise = rng.standard_normal(w.shape)
        update = low_rank_update(rng, w, 6, relative) + noise * (relative * np.linalg.norm(w) / np.linalg.norm(noise))
        put(1, module, w, w + update)
    rest = rest_of_model(rng)
    moved_rest = {name: values + 1e-3 * rng.standard_normal(values.shape) for name, values in rest.items()}
    return {**base, **rest}, {**tuned, **moved_rest}


def linear(tensors: Tensors) -> list[str]:
    """The names that opdgeo measures by default: the 2-D linear weights of the layers."""
    return [name for name in tensors if any(f".{module}." in name for module in SHAPES)]

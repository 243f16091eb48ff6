"""GGUF files, as llama.cpp writes them: de-quantised a matrix at a time by the `gguf` library.

Names are mapped with the library's own table. llama.cpp stores Llama's query and key rows in another order (its rotary
embedding turns neighbours, Hugging Face's turns halves): it is undone as transformers does when it loads such a file
(`modeling_gguf_pytorch_utils.py`, `LlamaTensorProcessor`). Experts stand in one 3-D tensor a projection.

The header is read here, in either order of bytes, and never believed further than the file goes. Source: ggml, `docs/gguf.md`.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opdgeo.checkpoints.names import MOST_EXPERTS
from opdgeo.checkpoints.stored import Derived, Opened, Raw, Rows, Stored, Unreadable, contiguous, opened
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

# Architectures whose weights llama.cpp stores as Hugging Face does, but for Llama's order of rows.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
# Types of values in the header: what `struct` calls them; 8 is text, 9 an array.
_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
MOST = 1 << 21  # texts in a header
MOST_FACTS = 1 << 16
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
MOST_LAYERS = 1 << 10
MOST_TENSORS = 1 << 18  # with every expert of a stack as one
LONGEST = 1 << 12  # bytes of a text that is kept: a name, of the architecture too
_EXPERTS = re.compile(r"blk\.(?P<layer>[0-9]{1,9})\.ffn_(?P<role>gate|up|down)_exps\.weight")
_LAYER_NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate", "mlp.shared_expert_gate",
    "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


def find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(f for f in path.glob("*.gguf") if f.is_file())
    return path if len(files) > 1 else files[0] if files else None


def read(place: Path, _: dict[str, Any]) -> dict[str, Stored]:
    """The model's tensors under Hugging Face names; one that the table does not know keeps its own.

    Raises:
        CheckpointError: the `gguf` library is missing, an unknown architecture, several models in the folder, or damage.
    """
    if find_spec("gguf") is None:
        raise CheckpointError(f"{place} is a GGUF model, which needs the package gguf: pip install 'opdgeo[gguf]'.")
    files = _parts(place)
    found: dict[str, Stored] = {}
    fields: dict[str, Any] = {}
    for file in files:
        tensors, of_file = _open(file)
        fields |= of_file
        found |= tensors
    architecture = fields.get("general.architecture")
    if architecture not in ARCHITECTURES or (architecture == "llama" and fields.get("llama.expert_count")):
        raise CheckpointError(
            f"{place} is of the architecture {architecture!r}; opdgeo reads GGUF models of {', '.join(ARCHITECTURES)}, without "
            "Mixtral's experts. Convert it to safetensors with transformers' from_pretrained(…, gguf_file=…)."
        )
    return dict(_renamed(found, fields, str(architecture)))


@dataclass(frozen=True)
class Quantised:
    """A tensor in one of ggml's quantised types, rows of blocks: only the rows asked for are de-quantised."""

    blocks: Raw  # uint8, the tensor's shape with the bytes of a row last
    shape: tuple[int, ...]
    quantised: str
    dtype: str = "float32"

    @property
    def files(self) -> tuple[Path, ...]:
        return self.blocks.files

    def __getitem__(self, index: Index) -> Tensor:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        rows = self.blocks[(*index[:-1], slice(None))].numpy()
        try:
            values = torch.from_numpy(dequantize(rows, GGMLQuantizationType[self.quantised]))
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.blocks.file} has weights of the type {self.quantised}, which the gguf library cannot de-quantise."
            ) from error
        return values[..., index[-1]]


@dataclass(frozen=True)
class Halves(Derived):
    """A tensor whose rows stand as neighbours, in the order of halves, head by head: row 2i + j of a head becomes row j·size/2 + i."""

    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def __getitem__(self, index: Index) -> Tensor:
        rows = self.source[tuple(slice(0, n) for n in self.shape)]
        return rows.unflatten(0, (self.heads, -1, 2)).transpose(1, 2).reshape(self.shape)[index]


def _parts(place: Path) -> list[Path]:
    """The files of one model: one, or all of a split."""
    files = sorted(f for f in place.glob("*.gguf") if f.is_file()) if place.is_dir() else [place]
    split = _SPLIT.fullmatch(files[0].name)
    if split is None:
        if len(files) > 1:
            raise CheckpointError(
                f"{place} holds several GGUF models: {', '.join(f.name for f in files[:6])}. Give one of these files."
            )
        return files
    parts = int(split["parts"])
    named = [files[0].with_name(f"{split['stem']}-{i:05}-of-{parts:05}.gguf") for i in range(1, parts + 1)]
    if place.is_dir() and set(files) - set(named):
        raise CheckpointError(f"{place} holds several GGUF models. Give the first file of one of them.")
    if missing := [f.name for f in named if not f.is_file()]:
        raise CheckpointError(
            f"{place} is in {parts} parts, of which {', '.join(missing[:4])} is missing. Copy it too."
        )
    return named


class _Header:
    """A GGUF file's header, read from front to back."""

    def __init__(self, source: Opened):
        self.source, self.at, self.block, self.block_at, self.order = source, 0, b"", 0, "<"
        self.texts = 0

    def take(self, length: int) -> bytes:
        start = self.at - self.block_at
        if start < 0 or start + length > len(self.block):
            self.block = self.source.read(self.at, min(1 << 20, self.source.size - self.at))
            self.block_at, start = self.at, 0
            if length > len(self.block):
                raise ValueError("it ends early")
        self.at += length
        return self.block[start : start + length]

    def numbers(self, kinds: str) -> tuple[Any, ...]:
        return struct.unpack(self.order + kinds, self.take(struct.calcsize(self.order + kinds)))

    def text(self) -> bytes:
        """A text; of one longer than `LONGEST`, such as a chat template, its beginning."""
        self.texts += 1
        if self.texts > MOST:
            raise ValueError(f"more than {MOST} texts in its header")
        (length,) = self.numbers("Q")
        if length > self.source.size - self.at:
            raise ValueError("it ends early")
        found = self.take(min(length, LONGEST))
        self.at += length - len(found)
        return found

    def value(self) -> Any:
        """A number or a text; None for an array, which is passed by."""
        (kind,) = self.numbers("I")
        if kind == _TEXT:
            return self.text().decode(errors="replace")
        if kind != _ARRAY:
            return self.numbers(_VALUES[kind])[0]
        kind, count = self.numbers("IQ")
        if kind == _TEXT:
            for _ in range(min(count, MOST + 1)):
                self.text()
        else:
            length = count * struct.calcsize(_VALUES[kind])
            if length > self.source.size - self.at:
                raise ValueError("it ends early")
            self.at += length
        return None


def _open(file: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    """The tensors of a file by their own names, and the values of its header.

    Raises:
        CheckpointError: damaged, or of a version other than 2 and 3.
    """
    try:
        with opened(file) as source:
            return _read(_Header(source), file)
    except (ValueError, KeyError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{file} is not a readable GGUF file ({error}). Copy or download it again.") from error


def _read(header: _Header, file: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    magic = header.take(4)
    version = header.take(4)
    if magic != b"GGUF" or not any(version):
        raise ValueError("it does not begin as one")
    if not any(version[:2]):
        header.order = ">"
    (number,) = struct.unpack(f"{header.order}I", version)
    if number not in (2, 3):
        raise ValueError(f"version {number}; expected 2 or 3")
    tensors, values = header.numbers("QQ")
    if tensors > MOST_TENSORS or values > MOST_FACTS:
        raise ValueError(f"{max(tensors, values)} entries in its header; expected at most {MOST_TENSORS}")
    fields: dict[str, Any] = {}
    for _ in range(values):
        key = header.text().decode(errors="replace")
        fields[key] = header.value()
    listed: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(tensors):
        name = header.text().decode()
        (axes,) = header.numbers("I")
        if axes > 4 or name in listed:
            raise ValueError(f"a tensor of {axes} axes" if axes > 4 else "two tensors of one name")
        shape = tuple(reversed(header.numbers(f"{axes}Q")))
        listed[name] = (shape, *header.numbers("IQ"))
    align = fields.get("general.alignment") or 32
    if not isinstance(align, int) or not 0 < align <= 1 << 20:
        raise ValueError(f"an alignment of {align!r}")
    begin = -(-header.at // align) * align
    found = {
        name: _stored(file, name, shape, kind, begin + offset, header) for name, (shape, kind, offset) in listed.items()
    }
    return found, fields


def _stored(file: Path, name: str, shape: tuple[int, ...], number: int, start: int, header: _Header) -> Stored:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if any(n >= 1 << 63 for n in shape):
        raise ValueError(f"{name} has the shape {shape}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        return Unreadable(file, shape, f"ggml's type {number}, which the gguf library does not know")
    entries, size = GGML_QUANT_SIZES[kind]
    if shape and shape[-1] % entries:
        raise ValueError(f"{name} has rows of {shape[-1]} entries in blocks of {entries}")
    if start + prod(shape) // entries * size > header.source.size:
        raise ValueError(f"it ends before {name}")
    if kind.name in PLAIN and (header.order == "<" or kind.name != "BF16"):
        return Raw(file, start, shape, contiguous(shape), PLAIN[kind.name], swapped=header.order == ">")
    if (
        header.order == ">"
    ):  # gguf's writer leaves the bytes inside of blocks in the little order, its converter turns them
        return Unreadable(file, shape, f"big-endian {kind.name} blocks, whose writers disagree on the order of bytes")
    if kind.name.startswith("I") and kind.name[1:].isdecimal():
        return Unreadable(file, shape, kind.name)
    rows = (*shape[:-1], shape[-1] // entries * size) if shape else (size,)
    return Quantised(Raw(file, start, rows, contiguous(rows), "uint8"), shape, kind.name)


def _renamed(found: dict[str, Stored], fields: dict[str, Any], architecture: str) -> Iterator[tuple[str, Stored]]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = fields.get(f"{architecture}.block_count")
    # A header may promise any number, and the library's table has hundreds of names for each.
    layers = min(layers, len(found), MOST_LAYERS) if isinstance(layers, int) else 0
    heads = fields.get(f"{architecture}.attention.head_count")
    table = get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{layer}.{name}" for layer in range(layers) for name in _LAYER_NAMES]
    names = {own: module for module in modules if (own := table.get_name(module))}
    count = 0
    for name, stored in found.items():
        module, _, kind = name.rpartition(".")
        if (experts := _EXPERTS.fullmatch(name)) and len(stored.shape) == 3 and 0 not in stored.shape:
            if stored.shape[0] > MOST_EXPERTS:
                raise CheckpointError(f"{name} holds {stored.shape[0]} experts; expected at most {MOST_EXPERTS}.")
            count += stored.shape[0]
            if count > MOST_TENSORS:
                raise CheckpointError(f"the model holds {count} experts and more; expected at most {MOST_TENSORS}.")
            for expert in range(stored.shape[0]):
                where = f"model.layers.{experts['layer']}.mlp.experts.{expert}.{experts['role']}_proj.weight"
                yield where, Rows(stored, ((0, stored.shape[1]),), (expert,))
        elif architecture == "llama" and module.endswith((".attn_q", ".attn_k")) and stored.shape:
            of = heads if module.endswith("q") else fields.get("llama.attention.head_count_kv", heads)
            yield f"{names.get(module, module)}.{kind}", _halves(stored, of, name)
        else:
            yield (f"{names[module]}.{kind}" if module in names else name), stored


def _halves(stored: Stored, heads: Any, name: str) -> Halves:
    rows = stored.shape[0]
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{name} has {rows} rows, which {heads} attention heads do not divide.")
    return Halves(stored, heads)

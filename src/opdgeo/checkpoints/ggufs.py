"""GGUF files, as llama.cpp writes them: de-quantised a matrix at a time by the `gguf` library.

Names are mapped with the library's own table. llama.cpp stores Llama's query and key rows in another order (its rotary
embedding turns neighbours, Hugging Face's turns halves): it is undone as transformers does when it loads such a file
(`modeling_gguf_pytorch_utils.py`, `LlamaTensorProcessor`). Experts stand in one 3-D tensor a projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opdgeo.checkpoints.stored import Raw, Rows, Stored, contiguous
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

# Architectures whose weights llama.cpp stores as Hugging Face does, but for Llama's order of rows.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe")
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})\.gguf")
_EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?P<role>gate|up|down)_exps\.weight")
_LAYER_NAMES = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "self_attn.q_norm",
    "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.gate", "mlp.shared_expert_gate",
    "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
    "input_layernorm", "post_attention_layernorm",
)  # fmt: skip


def find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix == ".gguf" else None
    files = sorted(path.glob("*.gguf"))
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


def _parts(place: Path) -> list[Path]:
    """The files of one model: one, or all of a split."""
    files = sorted(place.glob("*.gguf")) if place.is_dir() else [place]
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


def _open(file: Path) -> tuple[dict[str, Stored], dict[str, Any]]:
    from gguf import GGUFReader
    from gguf.quants import quant_shape_to_byte_shape

    try:
        reader = GGUFReader(file)
        wanted = (key for key in reader.fields if key.startswith("general.arch") or ".attention.head_count" in key
                  or key.endswith((".block_count", ".expert_count")))  # fmt: skip
        fields = {key: reader.fields[key].contents() for key in wanted}
        tensors: dict[str, Stored] = {}
        for tensor in reader.tensors:
            shape, kind = tuple(int(n) for n in reversed(tensor.shape)), tensor.tensor_type.name
            if kind in PLAIN:
                tensors[tensor.name] = Raw(file, int(tensor.data_offset), shape, contiguous(shape), PLAIN[kind])
            else:
                bytes_ = tuple(int(n) for n in quant_shape_to_byte_shape(shape, tensor.tensor_type))
                blocks = Raw(file, int(tensor.data_offset), bytes_, contiguous(bytes_), "uint8")
                tensors[tensor.name] = Quantised(blocks, shape, kind)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{file} is not a readable GGUF file ({error}). Copy or download it again.") from error
    return tensors, fields


def _renamed(found: dict[str, Stored], fields: dict[str, Any], architecture: str) -> Iterator[tuple[str, Stored]]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    layers = fields.get(f"{architecture}.block_count")
    layers = min(layers, len(found)) if isinstance(layers, int) else 0  # a header may promise any number
    heads = fields.get(f"{architecture}.attention.head_count")
    table = get_tensor_name_map(next(a for a, name in MODEL_ARCH_NAMES.items() if name == architecture), layers)
    modules = ["model.embed_tokens", "model.norm", "lm_head"]
    modules += [f"model.layers.{layer}.{name}" for layer in range(layers) for name in _LAYER_NAMES]
    names = {own: module for module in modules if (own := table.get_name(module))}
    for name, stored in found.items():
        module, _, kind = name.rpartition(".")
        if experts := _EXPERTS.fullmatch(name):
            for expert in range(stored.shape[0]):
                where = f"model.layers.{experts['layer']}.mlp.experts.{expert}.{experts['role']}_proj.weight"
                yield where, Rows(stored, ((0, stored.shape[1]),), (expert,))
        elif architecture == "llama" and module.endswith((".attn_q", ".attn_k")):
            of = heads if module.endswith("q") else fields.get("llama.attention.head_count_kv", heads)
            yield f"{names.get(module, module)}.{kind}", Rows(stored, _halves(stored.shape[0], of, name))
        else:
            yield (f"{names[module]}.{kind}" if module in names else name), stored


def _halves(rows: int, heads: Any, name: str) -> tuple[tuple[int, int], ...]:
    """The rows of neighbours in the order of halves, head by head: row 2i + j of a head becomes row j·size/2 + i."""
    if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
        raise CheckpointError(f"{name} has {rows} rows, which {heads} attention heads do not divide.")
    size = rows // heads
    order = (h * size + 2 * i + j for h in range(heads) for j in range(2) for i in range(size // 2))
    return tuple((row, row + 1) for row in order)

"""Megatron's `torch_dist` checkpoints: a distributed checkpoint whose tensors bear Megatron-Core's names and layouts.

Layers are stacked along a first axis (``decoder.layers.mlp.linear_fc2.weight``, layers × rows × cols) or have a number of
their own in the name. Of `linear_qkv`, every group of query heads is followed by its key and its value head; `linear_fc1` has
the gate above the up projection; the vocabulary is padded. The optimizer's float32 master of a weight is preferred to the
model's own copy. Source: Megatron-Core 0.16, `transformer/attention.py`, `transformer/mlp.py`, `optimizer/distrib_optimizer.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import prod
from operator import mul
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints import dcp
from opdgeo.checkpoints.huggingface import read_json
from opdgeo.checkpoints.names import MOST_EXPERTS
from opdgeo.checkpoints.pickled import Record
from opdgeo.checkpoints.stored import Derived, Pieces, Rows, Stored
from opdgeo.checkpoints.torchfile import unpickle
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

MOST_LAYERS = MOST_GROUPS = MOST_CELLS = 1 << 12
MOST_TENSORS = 1 << 18  # with every layer and expert of a stack as one
_LAYER = re.compile(r"decoder\.layers\.(?:(?P<layer>[0-9]{1,9})\.)?(?P<part>.+)")
_MASTER = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(?P<of>.+)")
_WRAPPER = re.compile(r"^(?:module\.|model\.)+")
# Whole tensors of a layer, and of the model.
_PARTS = {
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "self_attention.linear_proj.bias": "self_attn.o_proj.bias",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "input_layernorm.weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
    "mlp.router.weight": "mlp.gate.weight",
    "mlp.router.expert_bias": "mlp.gate.e_score_correction_bias",
}
_WHOLE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "output_layer.weight": "lm_head.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
}
# linear_fc1 in one tensor or in two, and linear_fc2, of experts and of what every token passes.
_FC = re.compile(
    r"mlp\.(?:(?P<experts>experts\.experts)|shared_experts)?\.?(?P<fc>linear_fc1|linear_fc2)\.weight(?P<half>_w|_v)?"
)


@dataclass(frozen=True)
class Unflattened(Derived):
    """A tensor of `shape` cut into a grid of equal cells, each of them flat: (*grid, entries of a cell)."""

    shape: tuple[int, ...]

    @property
    def cell(self) -> tuple[int, ...]:
        return tuple(n // g for n, g in zip(self.shape, self.source.shape[:-1], strict=True))

    def __getitem__(self, index: Index) -> Tensor:
        cells = product(*map(range, self.source.shape[:-1]))
        pieces = ((tuple(map(mul, at, self.cell)), _Cell(self.source, at, self.cell)) for at in cells)
        return Pieces("an optimizer's master", self.shape, tuple(pieces))[index]


@dataclass(frozen=True)
class _Cell:
    source: Stored
    at: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str = "float32"
    files: tuple[Path, ...] = ()
    quantised: str | None = None

    def __getitem__(self, index: Index) -> Tensor:
        return self.source[(*self.at, slice(0, self.source.shape[-1]))].reshape(self.shape)[index]


def _master(tensor: Stored, shape: tuple[int, ...]) -> Stored | None:
    """A master as a tensor of the weight's shape; the distributed optimizers of older Megatron-Cores keep it flat."""
    if tensor.shape == shape:
        return tensor
    grid = tensor.shape[:-1]
    fits = len(grid) == len(shape) and all(g and n % g == 0 for n, g in zip(shape, grid, strict=True))
    if fits:
        _bounded(prod(grid), MOST_CELLS, "parts of an optimizer's master")
    return Unflattened(tensor, shape) if fits and prod(shape) == prod(tensor.shape) else None


@dataclass(frozen=True)
class _Shape:
    """Heads, groups of them that share a key and a value, entries of a head, and words where known."""

    heads: int
    groups: int
    size: int
    words: int | None


def find(folder: Path) -> Path | None:
    return folder if (folder / dcp.METADATA).is_file() and (folder / "metadata.json").is_file() else None


def read(folder: Path, config: dict[str, Any]) -> dict[str, Stored]:
    """The model's tensors under Hugging Face names; one that no rule knows keeps Megatron's.

    Raises:
        CheckpointError: another backend, no numbers of heads, or fused tensors that these do not divide.
    """
    backend = read_json(folder / "metadata.json").get("sharded_backend")
    if backend != "torch_dist":
        raise CheckpointError(f"{folder} is a Megatron checkpoint of the kind {backend!r}; opdgeo reads torch_dist.")
    stored = dcp.chunks(folder)
    weights: dict[str, Stored] = {}
    for name, tensor in stored.items():
        plain = _WRAPPER.sub("", name)
        if plain.startswith(("decoder.", "embedding.", "output_layer.")):
            weights[plain] = tensor
    for name, tensor in stored.items():
        if (found := _MASTER.fullmatch(name)) and tensor.dtype == "float32":
            plain = _WRAPPER.sub("", found["of"])
            if plain in weights and (master := _master(tensor, weights[plain].shape)):
                weights[plain] = master
    model_type = str(config.get("model_type", ""))
    shared = "shared_experts" if "deepseek" in model_type else "shared_expert"
    renamed: dict[str, Stored] = {}
    try:
        for name, tensor in _renamed(weights, _shape(folder, config), shared):
            renamed[name] = tensor
            _bounded(len(renamed), MOST_TENSORS, "layers and experts")
    except IndexError as error:
        raise CheckpointError(
            f"{folder} holds a tensor with fewer axes than Megatron gives it. Copy it again."
        ) from error
    return renamed


def _renamed(weights: Mapping[str, Stored], shape: _Shape, shared: str) -> Iterator[tuple[str, Stored]]:
    for name, tensor in weights.items():
        found = _LAYER.fullmatch(name)
        if found is None:
            rows = tensor.shape[0]
            if name in ("embedding.word_embeddings.weight", "output_layer.weight") and shape.words:
                rows = min(rows, shape.words)
            yield _WHOLE.get(name, name), Rows(tensor, ((0, rows),))
            continue
        if not found["layer"]:
            _bounded(tensor.shape[0], MOST_LAYERS, "layers")
        layers = [(int(found["layer"]), ())] if found["layer"] else [(i, (i,)) for i in range(tensor.shape[0])]
        for layer, within in layers:
            for part, one in _layer(found["part"], tensor, within, shape, shared):
                yield f"model.layers.{layer}.{part}", one


def _bounded(count: int, most: int, what: str) -> None:
    """A shape may promise any number where the tensor is empty or its file has holes."""
    if count > most:
        raise CheckpointError(f"A tensor of the model holds {count} {what}; expected at most {most}.")


def _layer(
    part: str, tensor: Stored, within: tuple[int, ...], shape: _Shape, shared: str
) -> Iterator[tuple[str, Stored]]:
    """The tensors that one layer's part is under Hugging Face names."""
    rows = tensor.shape[len(within)]
    if part in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        for role, ranges in _qkv(rows, shape):
            yield f"self_attn.{role}_proj.{part.rpartition('.')[2]}", Rows(tensor, ranges, within)
    elif found := _FC.fullmatch(part):
        if found["experts"]:
            _bounded(rows, MOST_EXPERTS, "experts")
            places = [(f"mlp.experts.{e}", (*within, e)) for e in range(rows)]
        else:
            places = [(f"mlp.{shared}" if "shared" in part else "mlp", within)]
        for where, at in places:
            for role, ranges in _halves(found["fc"], found["half"], tensor.shape[len(at)]):
                yield f"{where}.{role}_proj.weight", Rows(tensor, ranges, at)
    elif part == "mlp.shared_experts.gate_weight":
        yield f"mlp.{shared}_gate.weight", Rows(tensor, ((0, rows),), within)
    else:
        yield _PARTS.get(part, part), Rows(tensor, ((0, rows),), within)


@lru_cache(maxsize=8)
def _qkv(rows: int, shape: _Shape) -> tuple[tuple[str, tuple[tuple[int, int], ...]], ...]:
    """Rows of q, k and v: (queries of a group, its key, its value), group after group; the same for every layer."""
    _bounded(shape.groups, MOST_GROUPS, "groups of attention heads")
    queries = shape.heads // shape.groups
    group = (queries + 2) * shape.size
    if rows != shape.groups * group or shape.heads % shape.groups:
        raise CheckpointError(
            f"linear_qkv has {rows} rows; {shape.heads} heads of {shape.size} in {shape.groups} groups make "
            f"{shape.groups * group}. Is the config.json that of this model?"
        )
    bounds = (("q", 0, queries), ("k", queries, queries + 1), ("v", queries + 1, queries + 2))
    return tuple(
        (role, tuple((g * group + first * shape.size, g * group + end * shape.size) for g in range(shape.groups)))
        for role, first, end in bounds
    )


def _halves(fc: str, half: str | None, rows: int) -> list[tuple[str, tuple[tuple[int, int], ...]]]:
    if fc == "linear_fc2":
        return [("down", ((0, rows),))]
    if half:
        return [("gate" if half == "_w" else "up", ((0, rows),))]
    return [("gate", ((0, rows // 2),)), ("up", ((rows // 2, rows),))]


def _shape(folder: Path, config: dict[str, Any]) -> _Shape:
    """From the model's `config.json` where there is one, else from the arguments that Megatron keeps in `common.pt`."""
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    size, words, hidden = config.get("head_dim"), config.get("vocab_size"), config.get("hidden_size")
    if not config and (folder / "common.pt").is_file():
        args = _args(folder / "common.pt")
        heads, size, words, hidden = (
            args.get(n) for n in ("num_attention_heads", "kv_channels", "vocab_size", "hidden_size")
        )
        groups = args.get("num_query_groups") if args.get("group_query_attention", True) else None
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        size = size or hidden // heads
    groups = groups or heads
    if not all(isinstance(n, int) and n > 0 for n in (heads, groups, size)):
        raise CheckpointError(
            f"{folder} does not say how many attention heads the model has, which divide linear_qkv; put the Hugging "
            "Face config.json of the model into the folder."
        )
    return _Shape(heads, groups, size, words if isinstance(words, int) else None)  # type: ignore[arg-type]


def _args(file: Path) -> Record:
    try:
        common = unpickle(file, ("argparse.Namespace",))
    except CheckpointError as error:
        raise CheckpointError(f"{error} Or put the Hugging Face config.json of the model beside it.") from error
    found = common.get("args") if isinstance(common, dict) else None
    return found if isinstance(found, Record) else Record("argparse.Namespace", ())

"""Weights of eight and four bits with scales, as released models store them: de-quantised where they are read.

*FP8* (DeepSeek, Qwen, compressed-tensors): a tensor of e4m3 or e5m2 and beside it ``NAME_scale_inv`` or ``NAME_scale``, one scale for
the tensor, a row, or a block. *MXFP4* (GPT-OSS): ``NAME_blocks``, two e2m1 numbers a byte, and ``NAME_scales``, a power of two for 32
of them (OCP Microscaling Formats, 2023). Both give what transformers gives when it de-quantises them as it loads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.stored import Raw, Stored
from opdgeo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from opdgeo.checkpoints.stored import Index

FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"} | {n: n for n in ("float8_e4m3fn", "float8_e5m2")}
# Scales that are exponents: 2^(byte − 127).
_EXPONENTS = {"F8_E8M0": "uint8", "U8": "uint8", "float8_e8m0fnu": "uint8", "uint8": "uint8"}
_SCALES = ("float32", "bfloat16", "float16", "float64")
_BLOCK = 128  # of DeepSeek's and Qwen's, where the scales' shape leaves it open
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class Scaled:
    """FP8 weights (…, rows, cols) times a grid of scales (…, grid rows, grid cols), of `block` rows and columns each."""

    weight: Raw
    scale: Raw | None
    block: tuple[int, int]
    quantised: str
    dtype: str = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.weight.files, *(self.scale.files if self.scale else ()))))

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        values = self.weight[index].float()
        if self.scale is None:
            return values
        leading = index[:-2] if len(self.scale.shape) > 2 else ()  # of a stack the experts that are asked for
        grid = self.scale[(*leading, *(slice(None),) * (len(self.scale.shape) - len(leading)))]
        grid = torch.exp2(grid.float() - 127) if grid.dtype == torch.uint8 else grid.float()
        if grid.dim() < 2:
            return values * grid.reshape(-1)[0]
        for axis, (size, block) in enumerate(zip(self.shape[-2:], self.block, strict=True), start=-2):
            along = torch.arange(size) // block
            grid = grid.index_select(axis, along)
        return values * grid[(..., *index[-2:])]


@dataclass(frozen=True)
class Mxfp4:
    """Experts (experts, in, out), as GPT-OSS has them in bf16, from blocks (experts, out, groups, 16) and a scale a group."""

    blocks: Raw
    scales: Raw
    quantised: str = "MXFP4"
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, ...]:
        experts, rows, groups, size = self.blocks.shape
        return (experts, 2 * groups * size, rows)

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((*self.blocks.files, *self.scales.files)))

    def __getitem__(self, index: Index) -> Tensor:
        import torch

        expert, inputs, outputs = index
        one = slice(expert, expert + 1) if isinstance(expert, int) else expert
        rows = slice(outputs, outputs + 1) if isinstance(outputs, int) else outputs
        packed = self.blocks[(one, rows, slice(None), slice(None))]
        exponents = self.scales[(one, rows, slice(None))].int() - 127
        numbers = torch.tensor(_E2M1, dtype=torch.bfloat16)
        pairs = torch.stack([numbers[(packed & 15).long()], numbers[(packed >> 4).long()]], dim=-1)
        values = torch.ldexp(pairs.flatten(-2), exponents[..., None])
        found = values.flatten(-2).transpose(-1, -2)[:, inputs]
        kept = tuple(0 if isinstance(i, int) else slice(None) for i in (expert, outputs))
        return found[kept[0]][..., kept[1]] if isinstance(inputs, int) else found[kept[0], ..., kept[1]]


def dequantised(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Stored]:
    """The same tensors, with those of eight and four bits read as numbers, and their scales no longer listed.

    Args:
        config: the model's `config.json`, whose `quantization_config` may give the size of the blocks.

    Raises:
        CheckpointError: scales that do not fit their weights.
    """
    found = dict(tensors)
    for name, stored in tensors.items():
        if isinstance(stored, Raw) and stored.dtype in FP8:
            where = next((n for n in (f"{name}_scale_inv", f"{name}_scale") if n in tensors), None)
            scale = found.pop(where, None) if where else None
            found[name] = _scaled(name, stored, scale, config)
        elif name.endswith("_blocks") and (f"{(whole := name.removesuffix('_blocks'))}_scales") in tensors:
            found[whole] = _mxfp4(whole, found.pop(name), found.pop(f"{whole}_scales"))
    return found


def _scaled(name: str, weight: Raw, scale: Stored | None, config: Mapping[str, Any]) -> Scaled:
    kind = FP8[weight.dtype]
    weight, label = replace(weight, dtype=kind), f"FP8 {kind.removeprefix('float8_').removesuffix('fn')}"
    if scale is None:
        return Scaled(weight, None, (1, 1), label)
    if not isinstance(scale, Raw) or scale.dtype not in (*_SCALES, *_EXPONENTS):
        raise CheckpointError(
            f"the scale of {name} is {scale.dtype}; expected {', '.join(_SCALES)} or exponents of eight bits. Convert the checkpoint."
        )
    scale = replace(scale, dtype=_EXPONENTS.get(scale.dtype, scale.dtype))
    shape, grid = weight.shape, scale.shape
    if math.prod(grid) == 1:
        return Scaled(weight, replace(scale, shape=(), stride=()), (1, 1), label)
    if len(grid) == 1 and len(shape) == 2 and grid[0] == shape[0]:  # one a row
        scale = replace(scale, shape=(grid[0], 1), stride=(1, 1))
        grid = scale.shape
    blocks = _blocks(shape, grid, config) if len(grid) == len(shape) >= 2 and grid[:-2] == shape[:-2] else None
    if blocks is None:
        raise CheckpointError(
            f"{name} has shape {list(shape)} and scales of shape {list(grid)}; expected one for the tensor, a row or a block. "
            "Convert the checkpoint to bf16."
        )
    return Scaled(weight, scale, blocks, label)


def _blocks(shape: tuple[int, ...], grid: tuple[int, ...], config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block: the configuration's, else what divides evenly, else 128; None where nothing fits."""
    facts = config.get("quantization_config")
    stated = facts.get("weight_block_size") if isinstance(facts, dict) else None
    stated = stated if isinstance(stated, list) and len(stated) == 2 else (None, None)
    sizes = []
    for size, count, told in zip(shape[-2:], grid[-2:], stated, strict=True):
        even = size // count if count and size % count == 0 else None
        fits = [b for b in (told, even, _BLOCK) if type(b) is int and b > 0 and -(-size // b) == count]
        if not fits:
            return None
        sizes.append(min(fits[0], max(size, 1)))  # a configuration may state any number
    return sizes[0], sizes[1]


def _mxfp4(name: str, blocks: Stored, scales: Stored) -> Mxfp4:
    bytes_ = isinstance(blocks, Raw) and isinstance(scales, Raw) and {blocks.dtype, scales.dtype} <= set(_EXPONENTS)
    if not bytes_ or len(blocks.shape) != 4 or blocks.shape[-1] != 16 or scales.shape != blocks.shape[:3]:
        raise CheckpointError(
            f"{name} has blocks of {blocks.dtype} {list(blocks.shape)} and scales of {scales.dtype} {list(scales.shape)}; expected "
            "bytes, (experts, out, groups, 16) and (experts, out, groups), as GPT-OSS stores MXFP4. Convert the checkpoint to bf16."
        )
    assert isinstance(blocks, Raw) and isinstance(scales, Raw)
    return Mxfp4(replace(blocks, dtype="uint8"), replace(scales, dtype="uint8"))

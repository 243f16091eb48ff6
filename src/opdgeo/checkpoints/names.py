"""Which tensors are linear weights, and which role and layer each has: exact rules, never substrings.

A name is matched as a whole. What no rule matches is `unrecognised`: it is reported and not measured. That holds for layers and
experts of more than nine digits, which no table holds, and for stacks of more experts than any model has.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ROLES = ATTENTION + MLP
MOST_EXPERTS = 1 << 14  # in a layer

# Llama, Qwen2/3, Mistral, Gemma 1–3: nn.Linear, stored (out, in).
_LLAMA = re.compile(
    r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.(?:self_attn\.(?P<a>[qkvo]_proj)|mlp\.(?P<m>(?:gate|up|down)_proj))\.weight"
)
# Phi-3: q, k and v, and gate and up, one below the other.
_FUSED = re.compile(
    r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.(?P<part>self_attn\.qkv_proj|mlp\.gate_up_proj)\.weight"
)
# Qwen2/3-MoE, DeepSeek: one tensor an expert, and experts that every token passes.
_EXPERT = re.compile(
    r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.mlp\.(?:experts\.(?P<expert>[0-9]{1,9})|shared_experts?)\.(?P<m>(?:gate|up|down)_proj)\.weight"
)
_MIXTRAL = re.compile(
    r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.block_sparse_moe\.experts\.(?P<expert>[0-9]{1,9})\.(?P<w>w[123])\.weight"
)
_MIXTRAL_ROLES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
# All experts in one 3-D tensor: (experts, 2·intermediate, hidden), gate above up, and (experts, hidden, intermediate).
# Families stack them in different ways, so the model type decides.
_STACKED = re.compile(r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.mlp\.experts\.(?P<part>gate_up_proj|down_proj)")
_STACKED_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "olmoe")
# GPT-OSS: (experts, hidden, 2·intermediate), a column of gate and a column of up in turn, and (experts, intermediate, hidden).
_INTERLEAVED = "gpt_oss"
# GPT-2: Conv1D, stored (in, out), with q, k and v side by side in c_attn.
_GPT2 = re.compile(
    r"(?:transformer\.)?h\.(?P<layer>[0-9]{1,9})\.(?P<part>attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
)
_GPT2_ROLES = {"attn.c_proj": "o_proj", "mlp.c_fc": "up_proj", "mlp.c_proj": "down_proj"}

# Known tensors that are not linear weights of a layer.
_OTHER = {
    "embedding": re.compile(r"(?:model\.)?embed_tokens\.weight|(?:transformer\.)?w[tp]e\.weight"),
    "head": re.compile(r"lm_head\.weight"),
    "norm": re.compile(
        r"(?:model\.)?(?:layers\.\d+\.(?:input_layernorm|post_attention_layernorm|(?:pre|post)_feedforward_layernorm"
        r"|self_attn\.[qk]_norm)|norm)\.weight|(?:transformer\.)?(?:h\.\d+\.ln_[12]|ln_f)\.(?:weight|bias)"
    ),
    "bias": re.compile(
        r"(?:model\.)?layers\.\d+\.(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)\.bias"
        r"|(?:model\.)?layers\.\d+\.(?:self_attn\.sinks|mlp\.experts\.(?:gate_up|down)_proj_bias)"
        r"|(?:transformer\.)?h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.bias"
    ),
    "router": re.compile(
        r"(?:model\.)?layers\.\d+\.(?:mlp\.gate|mlp\.shared_expert_gate|block_sparse_moe\.gate)\.weight"
        r"|(?:model\.)?layers\.\d+\.mlp\.(?:gate\.e_score_correction_bias|router\.(?:weight|bias))"
    ),
    # What is multiplied with activations of eight bits; the weights' own scales are part of the weights.
    "scale": re.compile(
        r"(?:model\.)?layers\.\d+\.(?:self_attn|mlp)\.(?:[a-z_0-9]+\.)*(?:input|activation|output|k|v|q)_scale(?:_inv)?"
    ),
    # Towers beside the language model: their layers have numbers of their own.
    "vision": re.compile(
        r"(?:model\.)?(?:visual|vision_tower|vision_model|vision_encoder|audio_tower|multi_modal_projector|embed_vision)\..+"
    ),
    "buffer": re.compile(
        r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)|(?:model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    ),
}


@dataclass(frozen=True, slots=True)
class Matrix:
    """One linear weight W, read as (out, in): rows are outputs, cols are inputs.

    `tensor` is the stored name; `name` differs from it where a fused tensor is split (``…c_attn.weight[q]``).
    """

    name: str
    tensor: str
    layer: int
    role: str
    rows: int
    cols: int
    transposed: bool = False  # stored as (in, out)
    start: int = 0  # first output row inside a fused tensor
    expert: int | None = None
    stacked: bool = False  # one expert of a 3-D tensor
    step: int = 1  # from one of its output rows to the next inside a fused tensor

    def cut(self, stored: Any) -> Tensor:
        """This matrix, (rows, cols), out of its stored tensor: anything that slices like one, such as a part of a file."""
        end = self.start + (self.rows - 1) * self.step + 1
        if self.stacked and self.transposed:
            return cast("Tensor", stored[self.expert, :, self.start : end][:, :: self.step].T.contiguous())
        if self.stacked:
            return cast("Tensor", stored[self.expert, self.start : end, :].reshape(self.rows, self.cols).contiguous())
        part = stored[:, self.start : end].T if self.transposed else stored[self.start : end, :]
        return cast("Tensor", part.contiguous())


# Where a text model stands inside a multimodal one -> its own names.
_WRAPPED = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)


# Modules that FSDP, activation checkpointing and torch.compile put around others, wherever they stand in a name.
_AROUND = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
# What DDP, DeepSpeed and Megatron put before whole models, once or twice, and PEFT after them.
_BEFORE, _PEFT = "module", ("base_model", "model")


def unwrapped(name: str) -> str:
    """The name of a parameter without the modules that trainers and PEFT put around a model and its parts.

    A `module` inside the model is its own. So is PEFT's `base_layer`, whose weights are not the ones that the model uses.

    >>> unwrapped("_orig_mod.module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    >>> unwrapped("module.base_model.model.model.layers.0.module.weight")
    'model.layers.0.module.weight'
    """
    parts = [part for part in name.split(".") if part not in _AROUND]
    while len(parts) > 1 and parts[0] == _BEFORE:
        del parts[0]
    # interned: base and checkpoints have the same names, tens of thousands of them
    return sys.intern(".".join(parts[2:] if tuple(parts[:2]) == _PEFT and len(parts) > 2 else parts))


def plain(tensor: str) -> str:
    """The name of a language model's tensor without a multimodal wrapper, so that it pairs with a text-only checkpoint.

    >>> plain("model.language_model.layers.0.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return next((own + tensor.removeprefix(outer) for outer, own in _WRAPPED if tensor.startswith(outer)), tensor)


def matrices(tensor: str, shape: tuple[int, ...], config: dict[str, Any] | None = None) -> list[Matrix] | None:
    """The matrices that a stored tensor holds, or None when no rule knows the name as linear weights.

    Args:
        config: the model's `config.json`, which says how fused tensors are divided; without it they stay unrecognised.

    >>> matrices("model.layers.3.mlp.up_proj.weight", (8, 4))[0].role
    'up_proj'
    >>> [m.role for m in matrices("h.0.attn.c_attn.weight", (4, 12))]
    ['q_proj', 'k_proj', 'v_proj']
    >>> [(m.expert, m.role) for m in matrices("model.layers.0.mlp.experts.7.up_proj.weight", (8, 4))]
    [(7, 'up_proj')]
    >>> matrices("visual.blocks.0.attn.qkv.weight", (12, 4)) is None
    True
    """
    text = _language(config or {})
    if len(shape) == 3:
        return _stacked(tensor, shape, str(text.get("model_type", "")))
    if len(shape) != 2:
        return None
    if found := _LLAMA.fullmatch(tensor):
        role = found["a"] or found["m"]
        return [Matrix(tensor, tensor, int(found["layer"]), role, shape[0], shape[1])]
    if found := _EXPERT.fullmatch(tensor):
        expert = int(found["expert"]) if found["expert"] else None
        return [Matrix(tensor, tensor, int(found["layer"]), found["m"], shape[0], shape[1], expert=expert)]
    if found := _MIXTRAL.fullmatch(tensor):
        role = _MIXTRAL_ROLES[found["w"]]
        return [Matrix(tensor, tensor, int(found["layer"]), role, shape[0], shape[1], expert=int(found["expert"]))]
    if found := _FUSED.fullmatch(tensor):
        parts = _parts(found["part"], shape[0], text)
        starts = [sum(rows for _, rows in parts[:i]) for i in range(len(parts))]
        return [
            Matrix(
                f"{tensor}[{role.removesuffix('_proj')}]",
                tensor,
                int(found["layer"]),
                role,
                rows,
                shape[1],
                start=start,
            )
            for (role, rows), start in zip(parts, starts, strict=True)
        ] or None
    if found := _GPT2.fullmatch(tensor):
        layer, (cols, rows) = int(found["layer"]), shape
        if found["part"] != "attn.c_attn":
            return [Matrix(tensor, tensor, layer, _GPT2_ROLES[found["part"]], rows, cols, transposed=True)]
        third = rows // 3
        return [
            Matrix(f"{tensor}[{x}]", tensor, layer, f"{x}_proj", third, cols, transposed=True, start=i * third)
            for i, x in enumerate("qkv")
        ]
    return None


def _parts(part: str, rows: int, config: dict[str, Any]) -> list[tuple[str, int]]:
    """Roles and rows inside a fused tensor, top to bottom; nothing where the config does not divide it."""
    if part == "mlp.gate_up_proj":
        return [("gate_proj", rows // 2), ("up_proj", rows // 2)] if rows % 2 == 0 else []
    heads = config.get("num_attention_heads")
    shared = config.get("num_key_value_heads", heads)
    if (
        not isinstance(heads, int)
        or not isinstance(shared, int)
        or heads < 1
        or shared < 1
        or rows % (heads + 2 * shared)
    ):
        return []
    size = rows // (heads + 2 * shared)
    return [("q_proj", heads * size), ("k_proj", shared * size), ("v_proj", shared * size)]


def _stacked(tensor: str, shape: tuple[int, ...], model_type: str) -> list[Matrix] | None:
    found = _STACKED.fullmatch(tensor)
    if not found or _family(model_type) not in (*_STACKED_TYPES, _INTERLEAVED) or shape[0] > MOST_EXPERTS:
        return None
    if 0 in shape:
        return []
    experts, rows, cols = shape
    interleaved = _family(model_type) == _INTERLEAVED
    if interleaved:
        rows, cols = cols, rows
    roles = ("gate_proj", "up_proj") if found["part"] == "gate_up_proj" else ("down_proj",)
    if rows % len(roles):
        return None
    each, layer, where = rows // len(roles), int(found["layer"]), tensor.rpartition(".")[0]
    found_here = []
    for expert in range(experts):
        for i, role in enumerate(roles):
            matrix = Matrix(
                f"{where}.{expert}.{role}.weight", tensor, layer, role, each, cols, expert=expert, stacked=True
            )
            start, step = (i, len(roles)) if interleaved else (i * each, 1)
            found_here.append(replace(matrix, start=start, step=step, transposed=interleaved))
    return found_here


def stacks_experts(config: dict[str, Any]) -> bool:
    """Whether a model of this `config.json` keeps its experts in memory as `_STACKED` describes, however it stores them."""
    text = _language(config)
    return _family(str(text.get("model_type", ""))) in _STACKED_TYPES


def _language(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the language model, also where it stands inside a multimodal one's."""
    inner = config.get("text_config")
    return config | inner if isinstance(inner, dict) else config


def _family(model_type: str) -> str:
    return model_type.removesuffix("_text").replace("_vl_", "_")


def other_kind(tensor: str) -> str | None:
    """ "embedding", "head", "norm", "bias" or "buffer" for a known tensor that is not measured, else None."""
    return next((kind for kind, rule in _OTHER.items() if rule.fullmatch(tensor)), None)

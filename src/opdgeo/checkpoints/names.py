"""Which tensors are linear weights, and which role and layer each has: exact rules, never substrings.

A name is matched as a whole. What no rule matches is `unrecognised`: it is reported and not measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ROLES = ATTENTION + MLP

# Llama, Qwen2/3, Mistral, Gemma 1–3: nn.Linear, stored (out, in).
_LLAMA = re.compile(
    r"(?:model\.)?layers\.(?P<layer>\d+)\.(?:self_attn\.(?P<a>[qkvo]_proj)|mlp\.(?P<m>(?:gate|up|down)_proj))\.weight"
)
# GPT-2: Conv1D, stored (in, out), with q, k and v side by side in c_attn.
_GPT2 = re.compile(
    r"(?:transformer\.)?h\.(?P<layer>\d+)\.(?P<part>attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.weight"
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
        r"|(?:transformer\.)?h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)\.bias"
    ),
    "buffer": re.compile(
        r"(?:transformer\.)?h\.\d+\.attn\.(?:bias|masked_bias)|(?:model\.)?layers\.\d+\.self_attn\.rotary_emb\.inv_freq"
    ),
}


@dataclass(frozen=True)
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

    def cut(self, stored: Any) -> Tensor:
        """This matrix, (rows, cols), out of its stored tensor: anything that slices like one, such as a part of a file."""
        end = self.start + self.rows
        part = stored[:, self.start : end].T if self.transposed else stored[self.start : end, :]
        return cast("Tensor", part.contiguous())


def matrices(tensor: str, shape: tuple[int, ...]) -> list[Matrix] | None:
    """The matrices that a stored tensor holds, or None when no rule knows the name as a 2-D linear weight.

    >>> matrices("model.layers.3.mlp.up_proj.weight", (8, 4))[0].role
    'up_proj'
    >>> [m.role for m in matrices("h.0.attn.c_attn.weight", (4, 12))]
    ['q_proj', 'k_proj', 'v_proj']
    >>> matrices("visual.blocks.0.attn.qkv.weight", (12, 4)) is None
    True
    """
    if len(shape) != 2:
        return None
    if found := _LLAMA.fullmatch(tensor):
        role = found["a"] or found["m"]
        return [Matrix(tensor, tensor, int(found["layer"]), role, shape[0], shape[1])]
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


def other_kind(tensor: str) -> str | None:
    """ "embedding", "head", "norm", "bias" or "buffer" for a known tensor that is not measured, else None."""
    return next((kind for kind, rule in _OTHER.items() if rule.fullmatch(tensor)), None)

"""The exact gradient of every sampled token for chosen matrices, kept in factors.

For a linear map o_s = W x_s the gradient of a token's log-probability sums over the positions s that the token can see:

    φ_t = ∇_W log p(y_t | x, y_<t) = Σ_s δ_{t,s} x_sᵀ,    δ_{t,s} = ∂ log p(y_t) / ∂ o_s

Earlier positions count too, because attention carries them to the token. Hooks keep x and o in one forward pass, and one
backward pass for every token gives δ. No φ_t (rows × cols) is ever formed. An objective is a weighting of the φ_t, so all
objectives come from the same passes. Suffixes: B sequences, T completion tokens, L positions, n columns and m rows of W.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from opdgeo.checkpoints import Matrix
from opdgeo.errors import ConfigError
from opdgeo.training.evaluation import Completions


def module_of(model: PreTrainedModel, matrix: Matrix) -> nn.Module | None:
    """The module whose output is `matrix` times its input. None for an expert that shares its tensor with others."""
    path = matrix.tensor.removesuffix(".weight")
    for name in (path, f"{model.base_model_prefix}.{path}"):
        try:
            found = model.get_submodule(name)
        except AttributeError:
            continue
        if isinstance(getattr(found, "weight", None), Tensor):
            return found
    return None


def token_gradients(
    model: PreTrainedModel, matrices: list[Matrix], done: Completions
) -> dict[str, tuple[Tensor, Tensor]]:
    """x (B, L, n) and δ (B, T, L, m) of the completion tokens of `done`, by the name of the matrix. Padding has 0.

    Law: einsum("blm,bln->bmn", δ[:, t], x) is what autograd gives for token t of every sequence. The model is frozen.

    Raises:
        ConfigError: a matrix has no module of its own, or its module runs more than once in a pass.
    """
    model.requires_grad_(False)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(tensor: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if tensor in outputs:
                raise ConfigError(
                    f"{tensor} is used more than once in one pass; expected a matrix with one input a token. "
                    "Choose other matrices with --roles or --layers."
                )
            if not output.requires_grad:
                output.requires_grad_()  # the graph begins here: nothing below the first probe is differentiated
            inputs[tensor], outputs[tensor] = arguments[0].detach(), output

        return hook

    hooks: list[tuple[str, Any]] = []
    try:
        for matrix in matrices:
            module = module_of(model, matrix)
            if module is None:
                raise ConfigError(
                    f"{matrix.name} is not a module of the model; expected a plain linear layer. Choose with --roles."
                )
            if matrix.tensor not in {t for t, _ in hooks}:
                hooks.append((matrix.tensor, module.register_forward_hook(keep(matrix.tensor))))
        seen_BL = done.attention_BL[:, :-1]
        with torch.enable_grad():
            logits = model(input_ids=done.ids_BL[:, :-1], attention_mask=seen_BL, use_cache=False).logits
            logp_BTV = logits[:, done.start - 1 :].float().log_softmax(-1)
            logp_BT = logp_BTV.gather(-1, done.ids_BL[:, done.start :, None]).squeeze(-1)
    finally:
        for _, handle in hooks:
            handle.remove()

    real_BL1 = seen_BL[..., None].bool()
    x = {t: torch.where(real_BL1, v, 0.0) for t, v in inputs.items()}
    shape = done.mask_BT.shape
    delta = {t: v.new_zeros(*shape, *v.shape[1:]) for t, v in outputs.items()}
    for t in range(shape[1]):
        token = torch.where(done.mask_BT[:, t].bool(), logp_BT[:, t], 0.0).sum()
        for name, gradient in zip(
            outputs, torch.autograd.grad(token, list(outputs.values()), retain_graph=True), strict=True
        ):
            delta[name][:, t] = torch.where(real_BL1, gradient, 0.0)
    parts = {m.name: slice(m.start, m.start + m.rows) for m in matrices}
    return {m.name: (x[m.tensor], delta[m.tensor][..., parts[m.name]]) for m in matrices}

"""ZeRO checkpoints in DeepSpeed's layout, without DeepSpeed: any stage and any number of ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

UP = "model.layers.0.mlp.up_proj.weight"


def zero_folder(path: Path, state: dict[str, Tensor], stage: int, ranks: int, frozen: str | None = None) -> Path:
    """A ZeRO checkpoint as DeepSpeed 0.19 lays it out, by the description that its `zero_to_fp32.py` reads; two groups."""
    step = path / "global_step7"
    step.mkdir(parents=True)
    (path / "latest").write_text("global_step7")
    trained = {n: t for n, t in state.items() if n != frozen}
    groups = [{n: t for n, t in trained.items() if (t.ndim > 1) == matrices} for matrices in (False, True)]

    def share(flat: Tensor, rank: int) -> Tensor:
        each = -(-len(flat) // ranks)
        return torch.cat([flat, torch.full((each * ranks - len(flat),), 7.0)])[rank * each : (rank + 1) * each].clone()

    masters: list[list[Tensor]]
    if stage < 3:
        whole = [torch.cat([t.float().flatten() for t in g.values()]) for g in groups]
        whole = [torch.cat([w, torch.zeros(-len(w) % (2 * ranks))]) for w in whole]
        masters = [[w.chunk(ranks)[rank].clone() for w in whole] for rank in range(ranks)]
    else:  # every parameter in parts; the vectors break between two of them
        flat = [torch.cat([share(t.float().flatten(), r) for g in groups for t in g.values()]) for r in range(ranks)]
        at = sum(-(-t.numel() // ranks) for t in groups[0].values())
        masters = [[f[:at].clone(), f[at:].clone()] for f in flat]
    for rank in range(ranks):
        optimizer = {"zero_stage": stage, "partition_count": ranks if stage == 3 else [ranks, ranks]}
        key = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
        content = {"optimizer_state_dict": optimizer | {key: masters[rank]}, "ds_config": {}, "ds_version": "0.19.8"}
        torch.save(content, step / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
        fragments = None
        if frozen:
            kept = state[frozen].flatten()
            fragments = {frozen: share(kept, rank) if stage == 3 else state[frozen]}
        model = {
            "module": {n: t.bfloat16() for n, t in state.items()} if stage < 3 else {},
            "buffer_names": [], "param_shapes": [{n: t.shape for n, t in g.items()} for g in groups],
            "frozen_param_shapes": {frozen: state[frozen].shape} if frozen else None, "frozen_param_fragments": fragments,
            "shared_params": {"lm_head.weight": UP}, "ds_version": "0.19.8",
        }  # fmt: skip
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
        torch.save(model, step / name)
    return path

"""Write Qwen3s as Megatron-Core checkpoints: `python megatron_writer.py HF_FOLDER OUT kind [HF_FOLDER OUT kind …]`.

The real GPTModel and the real `dist_checkpointing.save`, on a CPU: its calls that wait for a GPU do nothing here. Of the kind "masters", the
model is bf16 and float32 masters stand beside it, under the keys that Megatron's optimizers give them; else "plain".
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file


def main(jobs: list[str]) -> None:
    from megatron.core import parallel_state

    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"
    torch.distributed.init_process_group("gloo", init_method=f"file://{jobs[1]}.rendezvous", rank=0, world_size=1)
    parallel_state.initialize_model_parallel(1, 1)
    for source, out, kind in zip(jobs[::3], jobs[1::3], jobs[2::3], strict=True):
        write(Path(source), Path(out), kind == "masters")
    torch.distributed.destroy_process_group()


def write(source: Path, out: Path, masters: bool) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    hf = json.loads((source / "config.json").read_text())
    experts = hf.get("num_experts") or hf.get("num_local_experts")
    moe = dict(num_moe_experts=experts, moe_ffn_hidden_size=hf.get("moe_intermediate_size")) if experts else {}
    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"], hidden_size=hf["hidden_size"], ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=hf["num_attention_heads"], num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf["head_dim"], use_cpu_initialization=True, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, normalization="RMSNorm", add_bias_linear=False, qk_layernorm=True,
        **moe,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(
        num_experts=experts, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm"
    )
    words = -(-hf["vocab_size"] // 64) * 64
    model = GPTModel(
        config, spec, vocab_size=words, max_sequence_length=32, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )  # fmt: skip
    own = load_file(source / "model.safetensors")
    values = {}
    for name, parameter in model.named_parameters():
        value = of(name, own, hf)
        values[name] = (
            torch.nn.functional.pad(value, (0, 0, 0, parameter.shape[0] - len(value))) if value.ndim > 1 else value
        )
        parameter.data.copy_(values[name])
    if masters:
        model = model.bfloat16()
    sharded = model.sharded_state_dict()
    state = {"iteration": 3, "model": sharded}
    if masters:
        state["optimizer"] = {
            n: make_sharded_optimizer_tensor(sharded[n], v, prefix="optimizer.state.fp32_param")
            for n, v in values.items()
        }
    state["args"] = argparse.Namespace(
        num_attention_heads=hf["num_attention_heads"], num_query_groups=hf["num_key_value_heads"],
        group_query_attention=True, kv_channels=hf["head_dim"], hidden_size=hf["hidden_size"], vocab_size=hf["vocab_size"],
        params_dtype=torch.bfloat16,
    )  # fmt: skip
    out.mkdir(parents=True)
    dist_checkpointing.save(state, str(out))


def of(name: str, own: dict, hf: dict) -> torch.Tensor:
    """The value of a parameter of Megatron's GPTModel."""
    whole = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
    }
    if name in whole:
        return own[whole[name]]
    _, _, layer, *rest = name.split(".")
    at, part = f"model.layers.{layer}.", ".".join(rest)
    if part == "self_attention.linear_qkv.weight":
        groups = hf["num_key_value_heads"]
        q, k, v = (own[f"{at}self_attn.{x}_proj.weight"].reshape(groups, -1, hf["hidden_size"]) for x in "qkv")
        return torch.cat([q, k, v], dim=1).reshape(-1, hf["hidden_size"])
    if rest[-2] == "linear_fc1":
        inner = f"mlp.experts.{rest[3]}" if "local_experts" in rest else "mlp"
        return torch.cat([own[f"{at}{inner}.{x}_proj.weight"] for x in ("gate", "up")])
    if rest[-2] == "linear_fc2":
        inner = f"mlp.experts.{rest[3]}" if "local_experts" in rest else "mlp"
        return own[f"{at}{inner}.down_proj.weight"]
    return own[
        at
        + {
            "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
            "input_layernorm.weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.router.weight": "mlp.gate.weight",
        }[part]
    ]


if __name__ == "__main__":
    main(sys.argv[1:])

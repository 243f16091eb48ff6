"""Write a Hugging Face Qwen3 as DeepSpeed ZeRO checkpoints: `python deepspeed_writer.py HF_FOLDER OUT STAGE [STAGE …]`.

The real engine in bf16 with float32 masters, on a CPU in one process; OUT/zero-STAGE/global_step7 and its `latest`. The masters
are the given weights, set through DeepSpeed's own function: no step is taken.
"""

import os
import sys

os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


def main(source: str, out: str, stages: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{out}/rendezvous", rank=0, world_size=1)
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param
    from transformers import AutoModelForCausalLM

    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    originals = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for stage in stages:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
            config={"train_batch_size": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": int(stage)}},
        )
        values = dict(originals.named_parameters())
        for name, parameter in engine.module.named_parameters():
            safe_set_full_fp32_param(parameter, values[name].detach())
        engine.save_checkpoint(f"{out}/zero-{stage}", tag="global_step7")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

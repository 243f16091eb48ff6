"""Hold training in a channel, in a plain torch loop.

    python examples/channel_in_a_torch_loop.py

The channel is spanned by the eight leading directions of a known update: from the packaged base to the packaged teacher. The base
is then trained on worked solutions, free and held, and each line says how much of its update lies outside the channel.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import opdgeo
from opdgeo import Channel
from opdgeo.tasks.arithmetic import Arithmetic
from opdgeo.training.constrain import Constraint, prepare

TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"


def run(channel: Channel, hold: bool, steps: int, sequences: int, seed: int = 0) -> float:
    """Train the base for some steps. Returns the share of ‖ΔW‖²_F outside the channel, over all its matrices."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).train()
    if hold:
        prepare(model, channel, "update")  # before a wrapper and before the optimizer
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, weight_decay=0.1)
    constraint = Constraint(model.named_parameters(), channel, "update")
    if hold:
        constraint.hold(optimizer)  # from here on every optimizer.step() stays in the channel
    texts = [e.prompt + e.completion for e in Arithmetic().examples(steps * sequences, seed, held_out=False)]
    for step in range(steps):
        batch = tokenizer(texts[step * sequences : (step + 1) * sequences], return_tensors="pt", padding=True)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        if hold:
            constraint.project_gradients()  # needed only because the next line clips: what counts is the norm inside
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    outside = constraint.outside() or 0.0
    print(f"{'held' if hold else 'free'}: loss {float(loss.detach()):.3f}, outside the channel {outside:.1e}")
    return outside


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--sequences", type=int, default=16)
    args = options.parse_args()
    channel = Channel.extract(TINY / "base", TINY / "teacher", k=8)
    for hold in (False, True):
        run(channel, hold, args.steps, args.sequences)


if __name__ == "__main__":
    main()

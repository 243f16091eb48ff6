"""Rebuild the `tiny` preset's base and teacher from a seed.

    python -m opdgeo.training.pretrain -o DIR [--seed 0] [--threads 1]

The base is a 4-layer Qwen3 of 1.6 M parameters, pretrained on `tasks.arithmetic.corpus`. The teacher is the base
trained further on worked demonstrations alone, until it nearly always answers right. Both are written in bf16, as
released base models are. A base that is in DIR already is kept. One run takes about half an hour on two cores; another
machine's rounding gives slightly different weights.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, get_cosine_schedule_with_warmup

from opdgeo.tasks import arithmetic, characters

ROW_TOKENS, ROWS = 128, 16
BASE_STEPS, BASE_LR = 5000, 2e-3
TEACHER_STEPS, TEACHER_LR = 2000, 1e-3


def architecture(tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """The tiny student: 4 layers of width 192, 6 query and 3 key/value heads of 32, tied embeddings."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )


def packed(texts: Iterator[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Batches (ROWS, ROW_TOKENS) of texts joined by the end token; every row starts with a whole text."""
    while True:
        rows = []
        for _ in range(ROWS):
            row: list[int] = []
            while len(row) < ROW_TOKENS:
                row += [*tokenizer.encode(next(texts)), tokenizer.eos_token_id]
            rows.append(row[:ROW_TOKENS])
        yield torch.tensor(rows)


def fit(model: Qwen3ForCausalLM, batches: Iterator[torch.Tensor], steps: int, lr: float, log: Path) -> None:
    """AdamW (0.9, 0.95, weight decay 0.1 on matrices) with a cosine schedule to zero; one line of `log` per 50 steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=lr, betas=(0.9, 0.95)
    )
    schedule = get_cosine_schedule_with_warmup(optimizer, steps // 20, steps)
    started = time.monotonic()
    model.train()
    for step, batch in enumerate(itertools.islice(batches, steps), start=1):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            row = {"step": step, "loss": round(loss.item(), 4), "seconds": round(time.monotonic() - started, 1)}
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a bf16 Hugging Face folder; generation settings carry the end and padding tokens."""
    import copy

    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for base/ and teacher/")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    tokenizer = characters.tokenizer()
    base = args.out / "base"
    if not base.is_dir():
        model = Qwen3ForCausalLM(architecture(tokenizer))
        text = arithmetic.corpus(random.Random(args.seed))
        fit(model, packed(text, tokenizer), BASE_STEPS, BASE_LR, args.out / "base.jsonl")
        save(model, tokenizer, base)

    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32, trust_remote_code=False)
    rng = random.Random(args.seed + 1)
    chains = (arithmetic.draw(rng, rng.randint(2, 4)) for _ in itertools.count())
    worked = (p.prompt + p.demonstration for p in chains if not p.held_out)
    fit(model, packed(worked, tokenizer), TEACHER_STEPS, TEACHER_LR, args.out / "teacher.jsonl")
    save(model, tokenizer, args.out / "teacher")


if __name__ == "__main__":
    main()

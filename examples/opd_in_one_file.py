"""On-policy distillation in one file: sample, score, credit, step, and watch where the weights go.

    python examples/opd_in_one_file.py --steps 20 --out opd-in-one-file
    opdgeo track tiny/base opd-in-one-file -o trajectory

The student writes completions. The teacher scores every token of them. A token's credit is the gap A = log p_teacher − log p_student,
and the student is moved along A · ∇ log p_student: the score-function gradient of −KL(student ‖ teacher) on the sampled tokens.
`opdgeo train opd` does the same on TRL, with resume, evaluation, several processes and vLLM; a test holds the two together.

Shapes, by suffix: B completions, L tokens of prompt and completion, T tokens of the completion.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import opdgeo
from opdgeo.tasks.arithmetic import Arithmetic

TINY = Path(opdgeo.__file__).parent / "assets" / "tiny"  # a student and a teacher that come with the package


def load(folder: str | Path) -> PreTrainedModel:
    """A model in fp32, so that no update is lost to rounding; training in bf16 alone is another experiment."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False).eval()


@torch.no_grad()
def sample(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Completions at temperature 1 without truncation, so that they come from the distribution which is scored.

    Returns ids (B, L), attention (B, L) and mask (B, L). Attention is 0 on padding: left of the prompt and after the end token.
    The mask is 1 on the completion's tokens, its end token included.
    """
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False)
    how = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id)
    ids_BL = student.generate(**batch, **how, max_new_tokens=tokens)
    end_BT = ids_BL[:, batch["input_ids"].shape[1] :] == tokenizer.eos_token_id
    kept_BT = (end_BT.cumsum(1) - end_BT.long() == 0).long()  # up to the first end token
    attention_BL = torch.cat([batch["attention_mask"], kept_BT], dim=1)
    return ids_BL, attention_BL, torch.cat([torch.zeros_like(batch["attention_mask"]), kept_BT], dim=1)


def log_probabilities(model: PreTrainedModel, ids_BL: Tensor, attention_BL: Tensor) -> Tensor:
    """log p of every token given those before it, (B, L − 1): the value at [b, l] belongs to ids_BL[b, l + 1]."""
    position_BL = (attention_BL.cumsum(1) - 1).clamp(min=0)
    found = model(input_ids=ids_BL, attention_mask=attention_BL, position_ids=position_BL, use_cache=False)
    return found.logits[:, :-1].log_softmax(-1).gather(-1, ids_BL[:, 1:, None]).squeeze(-1)


def distillation_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
) -> float:
    """One update on what `sample` returned; returns the mean gap log p_student − log p_teacher, an estimate of the KL in nats."""
    ids_BL, attention_BL, mask_BL = batch
    mask_BL = mask_BL[:, 1:].float()
    student_BL = log_probabilities(student, ids_BL, attention_BL)
    with torch.no_grad():
        credit_BL = (log_probabilities(teacher, ids_BL, attention_BL) - student_BL) * mask_BL
    # Mean over a completion's tokens, then over completions. The credit is a number: nothing is back-propagated through it.
    loss = -((credit_BL * student_BL * mask_BL).sum(1) / mask_BL.sum(1)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return -float(credit_BL.sum() / mask_BL.sum())


@torch.no_grad()
def geometry(
    student: PreTrainedModel, before: dict[str, Tensor], channels: dict[str, Tensor], k: int = 16
) -> tuple[float, float, float]:
    """‖ΔW‖_F over all matrices; mean stable rank; mean Sim_k of ΔW's top right singular vectors with those of the first call."""
    squares, ranks, similarities = 0.0, [], []
    for name, start in before.items():
        _, sigma, right_t = torch.linalg.svd((student.get_parameter(name) - start).double(), full_matrices=False)
        squares += float(sigma.square().sum())
        ranks.append(float(sigma.square().sum() / sigma[0] ** 2))
        channel = channels.setdefault(name, right_t[:k])
        similarities.append(float((channel @ right_t[:k].T).square().sum()) / k)
    return squares**0.5, sum(ranks) / len(ranks), sum(similarities) / len(similarities)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "--student", default=TINY / "base", help="checkpoint folder to start from (default: the packaged base)"
    )
    options.add_argument(
        "--teacher", default=TINY / "teacher", help="checkpoint folder that scores (default: the packaged teacher)"
    )
    options.add_argument("--out", type=Path, default=Path("opd-in-one-file"), help="folder for step-NNNNNN checkpoints")
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--sequences", type=int, default=64, help="completions of one step")
    options.add_argument("--tokens", type=int, default=32, help="longest completion")
    options.add_argument("--learning-rate", type=float, default=1e-4)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()

    torch.manual_seed(args.seed)
    student, teacher = load(args.student), load(args.teacher)
    tokenizer = AutoTokenizer.from_pretrained(args.student, trust_remote_code=False)
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    problems = Arithmetic().examples(args.steps * args.sequences, args.seed, held_out=False)
    prompts = [problem.prompt for problem in problems]
    before = {n: p.detach().clone() for n, p in student.named_parameters() if p.ndim == 2 and "layers" in n}
    channels: dict[str, Tensor] = {}
    for step in range(1, args.steps + 1):
        batch = prompts[(step - 1) * args.sequences : step * args.sequences]
        gap = distillation_step(student, teacher, optimizer, sample(student, tokenizer, batch, args.tokens))
        if step % 5 == 0 or step == args.steps:
            norm, rank, similarity = geometry(student, before, channels)
            print(
                f"step {step:4}  gap {gap:.3f} nats  ‖ΔW‖ {norm:.4f}  stable rank {rank:.1f}  Sim₁₆ to the first {similarity:.2f}"
            )
            student.save_pretrained(args.out / f"step-{step:06d}")


if __name__ == "__main__":
    main()

"""Accuracy, length, loss and distance to the teacher on held-out examples.

* accuracy: share of prompts whose completion the task's verifier accepts, once by greedy decoding and once sampled at
  temperature 1 without truncation of the distribution. A completion that has not ended after `max_tokens` counts as it is.
* completion_length: mean tokens of the sampled completions, the end token included.
* kl_teacher: the exact reverse KL(student ‖ teacher) over the whole vocabulary at every token of the sampled completions,
  averaged over tokens; kl_origin is the same with the weights that training started from. It is a mean over the states that the student visits and so follows the student as it changes.
  (The `kl_teacher` of a training step in log.jsonl is the one-sample estimate log p_student − log p_teacher instead.)
* loss: mean cross-entropy of the tokens of a plain text; None for a task with prompts.

The random state is seeded inside and put back, so evaluating more or less often does not change training. It is seeded anew for every
batch and sample: two models that complete the same prompts meet the same random numbers, token by token, so their outcomes are
paired. `right_greedy` and `right_sampled` say which prompts were solved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from opdgeo.errors import ConfigError
from opdgeo.tasks import Example, Task
from opdgeo.training.sft import tokenized

LOGITS_AT_ONCE = 2**25  # numbers; 128 MiB in fp32
SEED = 20_240_607


@dataclass(frozen=True)
class Evaluation:
    """One measurement; None where the task has no verifier or there is no teacher."""

    accuracy_greedy: float | None
    accuracy_sampled: float | None
    kl_teacher: float | None
    completion_length: float | None
    prompts: int
    loss: float | None
    kl_origin: float | None = None
    right_greedy: str | None = None
    """Outcomes of the prompts in their order, as hexadecimal bits; the last byte is filled up with 0."""
    right_sampled: str | None = None
    """The same, the samples of a prompt side by side."""


@dataclass(frozen=True)
class Completions:
    """Padded token ids, left of `start` the prompts (padded left), right of it the completions (padded right)."""

    ids_BL: Tensor
    attention_BL: Tensor
    start: int
    logits_BTV: Tensor | None = None
    """What the completions were sampled from, when it was asked for."""

    @property
    def mask_BT(self) -> Tensor:
        return self.attention_BL[:, self.start :]

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        ids_BT = self.ids_BL[:, self.start :].masked_fill(self.mask_BT == 0, int(tokenizer.pad_token_id))
        texts: list[str] = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
        return texts


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    max_tokens: int,
    *,
    sample: bool,
    keep_logits: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Completions:
    """Complete every prompt, greedily or by sampling; stops when all have ended. Uses the global random state."""
    tokenizer.padding_side = "left"
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    sampling = {"temperature": temperature, "top_k": 0, "top_p": top_p} if sample else {}
    settings = GenerationConfig(
        max_new_tokens=max_tokens,
        do_sample=sample,
        **sampling,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        disable_compile=True,
        return_dict_in_generate=True,
        output_logits=keep_logits,
    )
    output = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], generation_config=settings
    )
    start = inputs["input_ids"].shape[1]
    ended_BT = output.sequences[:, start:] == tokenizer.eos_token_id
    alive_BT = (ended_BT.cumsum(1) - ended_BT.long()) == 0  # the first end token still counts
    attention_BL = torch.cat([inputs["attention_mask"], alive_BT.long()], dim=1)
    return Completions(
        output.sequences, attention_BL, start, torch.stack(output.logits, dim=1) if keep_logits else None
    )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: list[Example],
    *,
    teacher: PreTrainedModel | None,
    max_tokens: int,
    batch: int,
    longest: int,
    accelerator: Any = None,
    origin: PreTrainedModel | None = None,
    samples: int = 1,
) -> Evaluation:
    """Measure `model` on `examples`, also against the weights `origin`; `model` is put in evaluation mode and back.

    With an `accelerator`, every process measures its share, `batch` at a time, and all get the whole result. Processes
    call the model equally often, as a sharded model needs; so the shares are filled up to one size with examples that
    do not count, and the rows of a forward pass follow from `longest`, the most tokens that a sequence may have.
    """
    training = model.training
    model.eval()
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            share, counted = _share(examples, accelerator)
            right: dict[str, list[list[bool]]] = {}
            if not task.verifiable:
                sums = _text_loss(model, tokenizer, share, counted, max_tokens, batch)
            else:
                sums, right = _accuracies(
                    model,
                    tokenizer,
                    task,
                    share,
                    counted,
                    teacher=teacher,
                    max_tokens=max_tokens,
                    batch=batch,
                    longest=longest,
                    origin=origin,
                    samples=samples,
                )
            total = torch.tensor(sums, dtype=torch.float64)
            if accelerator is not None:
                total = accelerator.reduce(total.to(accelerator.device), reduction="sum")
                right = {name: gather_object(rows) for name, rows in right.items()}
    finally:
        model.train(training)
    if not task.verifiable:
        loss, tokens = total.tolist()
        return Evaluation(None, None, None, None, len(examples), loss / tokens if tokens else None)
    divergence, drift, tokens = total.tolist()
    bits = {name: np.array(rows, dtype=bool) for name, rows in right.items()}  # (prompts, samples)
    return Evaluation(
        accuracy_greedy=float(bits["greedy"].mean()),
        accuracy_sampled=float(bits["sampled"].mean()),
        kl_teacher=divergence / tokens if teacher is not None else None,
        completion_length=tokens / len(examples),
        prompts=len(examples),
        loss=None,
        kl_origin=drift / tokens if origin is not None else None,
        right_greedy=np.packbits(bits["greedy"]).tobytes().hex(),
        right_sampled=np.packbits(bits["sampled"]).tobytes().hex(),
    )


def _share(examples: list[Example], accelerator: Any) -> tuple[list[Example], int]:
    """This process's examples, filled up to the size of every other's, and how many of them count."""
    if accelerator is None or accelerator.num_processes == 1:
        return examples, len(examples)
    each = -(-len(examples) // accelerator.num_processes)
    share = examples[accelerator.process_index * each :][:each]
    return share + examples[:1] * (each - len(share)), len(share)


def _accuracies(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: list[Example],
    counted: int,
    *,
    teacher: PreTrainedModel | None,
    max_tokens: int,
    batch: int,
    longest: int,
    origin: PreTrainedModel | None,
    samples: int,
) -> tuple[list[float], dict[str, list[list[bool]]]]:
    """Over the first `counted` examples: sums of the KL to the teacher and to the start and of tokens; which were right."""
    right: dict[str, list[list[bool]]] = {"greedy": [], "sampled": []}
    tokens, divergence, drift = 0, 0.0, 0.0
    # The student's distribution at every sampled token is computed by sampling already; it is kept where it fits.
    fits = min(batch, len(examples)) * max_tokens * model.config.vocab_size <= LOGITS_AT_ONCE
    for start, part in _batches(examples, batch):
        prompts = [example.prompt for example in part]
        real = max(0, counted - start)
        sampled: list[list[bool]] = []
        for sample in range(-1, samples):  # the greedy completion first
            torch.manual_seed(SEED + (sample + 1) * 1_000_003 + start)
            keep = fits and sample == 0 and not (teacher is None and origin is None)
            done = complete(model, tokenizer, prompts, max_tokens, sample=sample >= 0, keep_logits=keep)
            pairs = list(zip(done.texts(tokenizer), part, strict=True))[:real]
            verdicts = [bool(task.verify(text, example.answer)) for text, example in pairs]
            if sample < 0:
                right["greedy"] += [[verdict] for verdict in verdicts]
                continue
            sampled.append(verdicts)
            if sample > 0:
                continue
            tokens += int(done.mask_BT[:real].sum())
            if teacher is not None:
                divergence += float(reverse_kl(model, teacher, done, longest)[:real].sum())
            if origin is not None:
                drift += float(reverse_kl(model, origin, done, longest)[:real].sum())
        right["sampled"] += [list(each) for each in zip(*sampled, strict=True)]
    return [divergence, drift, tokens], right


@torch.no_grad()
def reverse_kl(student: PreTrainedModel, teacher: PreTrainedModel, done: Completions, longest: int) -> Tensor:
    """KL(student ‖ teacher) (B, T) at every completion token, over the whole vocabulary; 0 on padding."""
    parts = []
    rows = max(1, LOGITS_AT_ONCE // (longest * student.config.vocab_size))
    for start in range(0, len(done.ids_BL), rows):
        part = slice(start, start + rows)
        inputs: dict[str, Any] = {
            "input_ids": done.ids_BL[part],
            "attention_mask": done.attention_BL[part],
            "use_cache": False,
        }
        # logits at position i predict token i + 1
        teacher_BTV = teacher(**inputs).logits[:, done.start - 1 : -1].float().log_softmax(-1)
        if done.logits_BTV is None:
            logits_BTV = student(**inputs).logits[:, done.start - 1 : -1]
        else:
            logits_BTV = done.logits_BTV[part]
        student_BTV = logits_BTV.float().log_softmax(-1)
        parts.append((student_BTV.exp() * (student_BTV - teacher_BTV)).sum(-1) * done.mask_BT[part])
    return torch.cat(parts)


def _text_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: list[Example],
    counted: int,
    max_tokens: int,
    batch: int,
) -> list[float]:
    """Sums over the first `counted` examples: cross-entropy over tokens, tokens."""
    rows = [tokenized(example, tokenizer, max_tokens) for example in examples]
    batch = max(1, min(batch, LOGITS_AT_ONCE // (max_tokens * model.config.vocab_size)))
    total, count = 0.0, 0
    for start, part in _batches(rows, batch):
        width = max(len(row["input_ids"]) for row in part)
        ids_BL = torch.full((len(part), width), int(tokenizer.pad_token_id))
        labels_BL = torch.full((len(part), width), -100)
        for i, row in enumerate(part):
            ids_BL[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
            labels_BL[i, : len(row["labels"])] = torch.tensor(row["labels"])
        ids_BL, labels_BL = ids_BL.to(model.device), labels_BL.to(model.device)
        # Padding sits on the right, where causal attention keeps it away from every scored token.
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        labels_BL[max(0, counted - start) :] = -100
        total += float(F.cross_entropy(logits_BLV.flatten(0, 1), labels_BL[:, 1:].flatten(), reduction="sum"))
        count += int((labels_BL[:, 1:] != -100).sum())
    return [total, count]


def _batches(items: list[Any], size: int) -> Iterator[tuple[int, list[Any]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]


def require_short_prompts(examples: list[Example], tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Refuse prompts that would have to be cut.

    Raises:
        ConfigError: a prompt has more than `longest` tokens.
    """
    for example in examples:
        size = len(tokenizer(example.prompt)["input_ids"])
        if size > longest:
            raise ConfigError(
                f"the prompt {example.prompt[:60]!r} has {size} tokens; expected at most max_prompt_tokens = {longest}. "
                "Raise max_prompt_tokens, or make the task's prompts shorter."
            )


def average_at(
    k: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: list[Example],
    *,
    temperature: float,
    top_p: float,
    max_tokens: int,
    batch: int,
    seed: int = SEED,
    progress: Callable[[int], None] = lambda done: None,
) -> list[dict[str, Any]]:
    """`k` samples of every prompt, verified: one row a problem with its completions, rewards and their mean.

    The mean over problems is avg@k. Temperature 0 is greedy decoding, of which one sample is enough.

    Raises:
        ConfigError: greedy decoding with k above 1.
    """
    if temperature == 0 and k > 1:
        raise ConfigError(f"k is {k} at temperature 0; expected k = 1, because greedy samples are all alike.")
    model.eval()
    rows: list[dict[str, Any]] = [
        {"prompt": e.prompt, "answer": e.answer, "completions": [], "rewards": [], "tokens": []} for e in examples
    ]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start, part in _batches([i for i in range(len(examples)) for _ in range(k)], batch):
            done = complete(
                model,
                tokenizer,
                [examples[i].prompt for i in part],
                max_tokens,
                sample=temperature > 0,
                temperature=temperature,
                top_p=top_p,
            )
            for i, text, count in zip(part, done.texts(tokenizer), done.mask_BT.sum(1).tolist(), strict=True):
                rows[i]["completions"].append(text)
                rows[i]["tokens"].append(count)
                rows[i]["rewards"].append(task.verify(text, examples[i].answer))
            progress(start + len(part))
    return [row | {"mean": sum(row["rewards"]) / k} for row in rows]

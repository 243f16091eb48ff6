"""SFT on demonstrations with TRL's `SFTTrainer`: the paper's first paradigm, and the matched control.

Objective: cross-entropy of the completion's tokens (end token included), mean over all tokens of the step's batch.
For plain text (an empty prompt) every token counts. Sequences are padded, not packed.

Departures from the paper: the data are the task's demonstrations instead of Dolci-Think. They are seen once where the task can
draw enough, and not for five epochs. Departure from TRL: examples are tokenised here. The prompt and the completion are
tokenised apart from each other, because a rollout too starts after the tokens of the prompt alone.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from opdgeo.tasks import Example


def tokenized(example: Example, tokenizer: PreTrainedTokenizerBase, longest: int) -> dict[str, Any]:
    """`input_ids` and `labels` (−100 on the prompt) of prompt + completion + end token, cut after `longest` tokens."""
    prompt = tokenizer(example.prompt)["input_ids"] if example.prompt else []
    completion = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {
        "input_ids": (prompt + completion)[:longest],
        "labels": ([-100] * len(prompt) + completion)[:longest],
    }


def dataset(examples: list[Example], tokenizer: PreTrainedTokenizerBase, longest: int) -> Dataset:
    """The examples as a dataset. Each is tokenised when it is read, so that memory holds the text and not the numbers."""

    def tokens(rows: dict[str, list[str]]) -> dict[str, list[Any]]:
        pairs = zip(rows["prompt"], rows["completion"], strict=True)
        done = [tokenized(Example(prompt, completion, ""), tokenizer, longest) for prompt, completion in pairs]
        return {name: [row[name] for row in done] for name in ("input_ids", "labels")}

    texts = Dataset.from_dict({name: [getattr(e, name) for e in examples] for name in ("prompt", "completion")})
    return texts.with_transform(tokens)

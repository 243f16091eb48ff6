"""Models that the full study needs beyond the shipped ones, made once at study time in OUT/models/NAME.

* `weak-teacher`: the straight line from base to teacher, stopped at WEAK of the way. The teacher is the base trained further, so
  a point between them is a model of the same family that knows less; it costs nothing to make.
* `small-base`: the first and the last of the base's four layers, trained on for HEAL_STEPS of the base's own pretraining
  text. Depth pruning with a short repair is the affordable way to a second student: pretraining one from nothing takes
  twenty minutes, and its repair one or two. It is a weaker model of the same family, not one of a scaling series.
* `digits-teacher`: the base trained on the `digits` task, as the shipped teacher is the base trained on arithmetic.

Every model is a Hugging Face folder in bf16, as the shipped ones are, and appears under its name only when complete.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from opdgeo.training import models

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

WEAK = 0.6
SMALL_LAYERS = (0, 3)
HEAL_STEPS, HEAL_LR = 1200, 1e-3
DIGITS_STEPS, DIGITS_LR = 300, 1e-3


def build(name: str, folder: Path, *, scale: float = 1.0) -> Path:
    """Make the model `name` in `folder`, unless it is there; `scale` shortens its training (a rehearsal)."""
    import torch

    from opdgeo.training import pretrain

    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    base = models.load_model(models.resolve("tiny/base"))
    tokenizer = models.load_tokenizer(models.resolve("tiny/base"))
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    made = MAKERS[name](base, tokenizer, partial, scale)
    pretrain.save(made, tokenizer, partial)
    partial.rename(folder)
    return folder


def _weak_teacher(
    base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, scale: float
) -> Qwen3ForCausalLM:
    import torch

    teacher = models.load_model(models.resolve("tiny/teacher"))
    with torch.no_grad():
        for ours, theirs in zip(base.parameters(), teacher.parameters(), strict=True):
            ours.lerp_(theirs, WEAK)
    return base


def _small_base(
    base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, scale: float
) -> Qwen3ForCausalLM:
    import copy

    from transformers import Qwen3ForCausalLM as Model

    from opdgeo.tasks import arithmetic

    config = copy.deepcopy(base.config)
    config.num_hidden_layers = len(SMALL_LAYERS)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in SMALL_LAYERS]
    small = Model(config)
    kept = {f"model.layers.{old}.": f"model.layers.{new}." for new, old in enumerate(SMALL_LAYERS)}
    state = {}
    for name, value in base.state_dict().items():
        if name.startswith("model.layers."):
            prefix = ".".join(name.split(".")[:3]) + "."
            if prefix not in kept:
                continue
            name = kept[prefix] + name.removeprefix(prefix)
        state[name] = value
    small.load_state_dict(state)
    _train(small, arithmetic.corpus(random.Random(2)), tokenizer, round(HEAL_STEPS * scale), HEAL_LR, folder)
    return small


def _digits_teacher(
    base: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path, scale: float
) -> Qwen3ForCausalLM:
    _train(base, _digit_texts(), tokenizer, round(DIGITS_STEPS * scale), DIGITS_LR, folder)
    return base


def _digit_texts() -> Iterator[str]:
    """Worked problems of the training split; its own seeds, so not the students' examples in the students' order."""
    from opdgeo.tasks.digits import Digits

    for part in itertools.count():
        for example in Digits().examples(1000, 1_000_000 + part, held_out=False):
            yield example.prompt + example.completion


def _train(
    model: Qwen3ForCausalLM,
    texts: Iterator[str],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    lr: float,
    folder: Path,
) -> None:
    from opdgeo.training import pretrain

    pretrain.fit(model, pretrain.packed(texts, tokenizer), max(1, steps), lr, folder / "training.jsonl")


MAKERS: dict[str, Callable[..., Qwen3ForCausalLM]] = {
    "weak-teacher": _weak_teacher,
    "small-base": _small_base,
    "digits-teacher": _digits_teacher,
}

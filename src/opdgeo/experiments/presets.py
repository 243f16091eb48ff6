"""The settings of every arm, by preset. Importing this loads neither torch nor any model.

`tiny` is the controlled comparison on a 1.6 M parameter Qwen3 and worked arithmetic, minutes on two CPU cores. Its arms:

* `sft`: base → anchor on demonstrations, cosine schedule (the paper's SFT, at this size);
* `opd` and `rlvr`: from the anchor, on their own rollouts;
* `sft-matched`: from the anchor, on demonstrations, with OPD's learning rate, schedule, Adam, steps, checkpoints and
  sequences a step. Without it the paper's comparison cannot tell the paradigm from the budget.

`smollm2` fine-tunes the real SmolLM2-135M-Instruct on the prose of the standard library's docstrings.
"""

from __future__ import annotations

import difflib
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.training.config import TrainConfig

TINY_TASK: dict[str, Any] = {
    "task": "arithmetic",
    "task_options": {"operands": 3, "largest": 9999},
    "teacher": "tiny/teacher",
    "max_prompt_tokens": 32,
    "max_tokens": 48,
}

# The anchor is trained once; every other arm starts from it with the same budget.
TINY_AFTER_ANCHOR: dict[str, Any] = {
    **TINY_TASK,
    "steps": 100,
    "sequences_per_step": 64,
    "learning_rate": 1e-4,
    "schedule": "constant",
    "betas": (0.9, 0.98),
    "eval_kl_origin": True,
}

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "sft": {
            **TINY_TASK,
            "origin": "tiny/base",
            "rollouts": "demonstrations",
            "steps": 60,
            "sequences_per_step": 64,
            "learning_rate": 3e-4,
            "schedule": "cosine",
            "betas": (0.9, 0.95),
        },
        "sft-matched": {**TINY_AFTER_ANCHOR, "rollouts": "demonstrations"},
        "opd": {**TINY_AFTER_ANCHOR, "rollouts": "student", "alpha": 1.0, "generations": 8},
        "rlvr": {**TINY_AFTER_ANCHOR, "rollouts": "student", "alpha": 0.0, "generations": 8, "sequences_per_step": 128},
    },
    "smollm2": {
        "sft": {
            "task": "docstrings",
            "origin": "smollm2",
            "rollouts": "demonstrations",
            "steps": 100,
            "sequences_per_step": 8,
            "micro_batch": 4,
            "max_prompt_tokens": 1,
            "max_tokens": 128,
            "learning_rate": 1e-5,
            "schedule": "cosine",
            "betas": (0.9, 0.95),
            "checkpoints": (0.5, 1.0),
            "eval_prompts": 16,
            "eval_prompts_between": 16,
            "eval_batch": 4,
        },
    },
}


def train_config(paradigm: str, preset: str, *, origin: str | None = None, **overrides: Any) -> TrainConfig:
    """The configuration of one arm; `overrides` are fields of `TrainConfig`, None means the preset's value.

    An arm that starts from the SFT anchor needs `origin`, the folder of its checkpoint. Examples are drawn with a
    seed of their own for the anchor, so that the arms after it do not train on the anchor's prompts.

    Raises:
        ConfigError: unknown preset, arm or field, or no origin where the preset has none.
    """
    arms = _lookup("preset", preset, PRESETS)
    values = dict(_lookup("arm", paradigm, arms, f" in preset {preset!r}"))
    values.update({name: value for name, value in overrides.items() if value is not None})
    if origin is not None:
        values["origin"] = str(origin)
    if "origin" not in values:
        raise ConfigError(
            f"the arm {paradigm!r} of preset {preset!r} starts from an SFT anchor and none was given; expected the folder of "
            f"its last checkpoint. Run `opdgeo train sft --preset {preset}` first and pass its checkpoint as the origin."
        )
    values.setdefault("arm", paradigm)
    values.setdefault("data_seed", 2 * int(values.get("seed", 0)) + (paradigm != "sft"))
    unknown = [name for name in values if name not in TrainConfig.__dataclass_fields__]
    if unknown:
        _lookup("training setting", unknown[0], TrainConfig.__dataclass_fields__)
    return TrainConfig(**values)


def _lookup(what: str, name: str, known: Any, where: str = "") -> Any:
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these."
        raise ConfigError(f"there is no {what} {name!r}{where}; expected one of {', '.join(known)}: {hint}")
    return known[name]

"""The settings of every arm, by preset. Importing this loads neither torch nor any model.

`tiny` is the controlled comparison on a 1.6 M parameter Qwen3 and worked arithmetic, minutes on two CPU cores. Its arms:

* `sft`: base → anchor on demonstrations, cosine schedule (the paper's SFT, at this size);
* `opd` and `rlvr`: from the anchor, on their own rollouts;
* `sft-matched`: from the anchor, on demonstrations, with OPD's learning rate, schedule, Adam, steps, checkpoints and
  sequences a step. Without it the paper's comparison cannot tell the paradigm from the budget.

`smollm2`: the same arms on the real SmolLM2-135M-Instruct and short strings of digits, without a chat format: at most 9 tokens of prompt
and 7 of answer. Hours on two CPU cores, minutes on a GPU. The teacher is real too: the same model trained further on the task's
demonstrations (arm `teacher`), made once and kept in the cache. It has the student's vocabulary exactly and is better at the task for a
known reason; a larger model of the family would need a download and 13 times the compute. The anchor of a study is its arm `sft`.
Where an arm is trained alone and no anchor is given, it starts from the teacher's own run, at the step at which that run
has seen as much: the released model never writes the format.

`qwen3-8b`: the paper, its section on training, to the letter; what it does not give (lengths, batch in memory, clipping of gradients) is
marked. It says "300 prompts × 8" for OPD's rollouts with a batch of 64 and "1024 × 8" with 512 for RLVR. 300 and 1024 are read as numbers
of rollouts with one update each: the checkpoints (63, 127, …, 299 and 1023) are then the zero-based numbers of the last rollouts before
every save, as slime counts them. The other reading, 300 prompts shared by 37 updates (TRL takes whole batches) and 1024 by 16, is
rollout_prompts = 300 and 1024. The paper gives no max_grad_norm either; none is applied here, slime's default is 1.0. Variants are arms: `opd-teacher-14b`, `sft-student-4b` and `opd-student-4b`, `opd-code` (DeepCoder's largest subset;
the paper names the dataset only), …
"""

from __future__ import annotations

import difflib
from typing import Any

from opdgeo.errors import ConfigError
from opdgeo.training.config import TrainConfig, by_present_names
from opdgeo.training.models import SMOLLM2_ANCHOR, SMOLLM2_RUN, SMOLLM2_TEACHER

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

SMOLLM2_TASK: dict[str, Any] = {
    "task": "digits",
    "task_options": {"shortest": 4, "longest": 6},
    "origin": "smollm2",
    "sequences_per_step": 64,
    "micro_batch": 32,
    "max_prompt_tokens": 9,
    "max_tokens": 7,
    "eval_prompts": 1024,
    "eval_prompts_between": 256,
    "eval_batch": 64,
}
SMOLLM2_SFT: dict[str, Any] = {
    **SMOLLM2_TASK,
    "rollouts": "demonstrations",
    "learning_rate": 1e-4,
    "schedule": "cosine",
    "betas": (0.9, 0.95),
}
SMOLLM2_AFTER_ANCHOR: dict[str, Any] = {
    **SMOLLM2_TASK,
    "origin": SMOLLM2_ANCHOR,
    "teacher": SMOLLM2_TEACHER,
    "steps": 100,
    "learning_rate": 3e-5,
    "schedule": "constant",
    "betas": (0.9, 0.98),
    "eval_kl_origin": True,
}


def _dolci(examples: int) -> dict[str, Any]:
    """The demonstrations of the paper's SFT."""
    return {
        "task": "problems",
        "task_options": {"source": "allenai/Dolci-Think-SFT-7B"},
        "train_examples": examples,
        "max_tokens": 16384,  # not in the paper
    }


# One sequence in memory at a time, evaluation by `opdgeo evaluate`: both for one node of eight 80 GB GPUs, not from the paper.
QWEN3: dict[str, Any] = {
    "autocast": True,
    "chat": True,
    "end_token": "<|im_end|>",
    "micro_batch": 1,
    "gradient_checkpointing": True,
    "max_prompt_tokens": 2048,
    "weight_decay": 0.1,
    "eval_prompts": 0,
    "eval_prompts_between": 0,
}
QWEN3_SFT: dict[str, Any] = {
    **QWEN3,
    **_dolci(5375 * 256 // 5),  # five epochs
    "origin": "Qwen/Qwen3-8B-Base",
    "rollouts": "demonstrations",
    "steps": 5375,
    "sequences_per_step": 256,
    "learning_rate": 1e-5,
    "schedule": "cosine",
    "betas": (0.9, 0.95),
    "checkpoints": (*(256 * i / 5375 for i in range(1, 21)), 1.0),
}
QWEN3_AFTER_ANCHOR: dict[str, Any] = {
    **QWEN3,
    "task": "problems",
    "task_options": {"source": "BytedTsinghua-SIA/DAPO-Math-17k", "held_out": "HuggingFaceH4/aime_2024"},
    "rollouts": "student",
    "vllm": "colocate",
    "generations": 8,
    "learning_rate": 1e-6,
    "schedule": "constant",
    "betas": (0.9, 0.98),
    "max_tokens": 8192,  # not in the paper
}
QWEN3_OPD: dict[str, Any] = {
    **QWEN3_AFTER_ANCHOR,
    "teacher": "Qwen/Qwen3-32B",
    "alpha": 1.0,
    "steps": 299,
    "sequences_per_step": 64,
    "checkpoints": tuple(step / 299 for step in (63, 127, 191, 255, 299)),
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
        "sft": {**SMOLLM2_SFT, "teacher": SMOLLM2_TEACHER, "steps": SMOLLM2_RUN[SMOLLM2_ANCHOR]},
        "sft-matched": {**SMOLLM2_AFTER_ANCHOR, "rollouts": "demonstrations"},
        "opd": {**SMOLLM2_AFTER_ANCHOR, "rollouts": "student", "alpha": 1.0, "generations": 8},
        "rlvr": {**SMOLLM2_AFTER_ANCHOR, "rollouts": "student", "alpha": 0.0, "generations": 8},
        "teacher": {
            **SMOLLM2_SFT,
            "steps": SMOLLM2_RUN[SMOLLM2_TEACHER],
            "checkpoints": (SMOLLM2_RUN[SMOLLM2_ANCHOR] / SMOLLM2_RUN[SMOLLM2_TEACHER], 1.0),
            "eval_prompts": 0,
        },
    },
    "qwen3-8b": {
        "sft": QWEN3_SFT,
        "sft-matched": {**QWEN3_OPD, **_dolci(299 * 64), "rollouts": "demonstrations"},
        "opd": QWEN3_OPD,
        "rlvr": {
            **QWEN3_AFTER_ANCHOR,
            "alpha": 0.0,
            "steps": 1023,
            "sequences_per_step": 512,
            "adam_epsilon": 1e-15,
            "clip_low": 0.2,
            "clip_high": 0.28,
            "dynamic_sampling": True,
        },
        **{
            f"opd-teacher-{size.lower()}": {**QWEN3_OPD, "teacher": f"Qwen/Qwen3-{size}"}
            for size in ("8B", "14B", "30B-A3B")
        },
        **{f"sft-student-{size.lower()}": {**QWEN3_SFT, "origin": f"Qwen/Qwen3-{size}-Base"} for size in ("4B", "14B")},
        **{f"opd-student-{size.lower()}": QWEN3_OPD for size in ("4B", "14B")},
        "opd-code": {
            **QWEN3_OPD,
            "task_options": {"source": "agentica-org/DeepCoder-Preview-Dataset", "subset": "primeintellect"},
        },
    },
}


def make_teacher(config: TrainConfig, progress: bool = False) -> None:
    """Train the models that `config` names and a preset makes, if they are not there yet."""
    from opdgeo.training import models
    from opdgeo.training.train import train

    last = models.smollm2_run() / f"step-{SMOLLM2_RUN[SMOLLM2_TEACHER]:06d}"
    if {config.teacher, config.origin} & SMOLLM2_RUN.keys() and not last.is_dir():
        train(train_config("teacher", "smollm2"), models.smollm2_run(), resume=True, progress=progress)


def train_config(paradigm: str, preset: str, *, origin: str | None = None, **overrides: Any) -> TrainConfig:
    """The configuration of one arm; `overrides` are fields of `TrainConfig`, None means the preset's value.

    An arm that starts from the SFT anchor needs `origin`, the folder of its checkpoint. Examples are drawn with a
    seed of their own for the anchor, so that the arms after it do not train on the anchor's prompts.

    Raises:
        ConfigError: unknown preset, arm or field, or no origin where the preset has none.
    """
    arms = _lookup("preset", preset, PRESETS)
    values = dict(_lookup("arm", paradigm, arms, f" in preset {preset!r}"))
    values.update({name: value for name, value in by_present_names(overrides).items() if value is not None})
    if origin is not None:
        values["origin"] = str(origin)
    if "origin" not in values:
        raise ConfigError(
            f"the arm {paradigm!r} of preset {preset!r} starts from an SFT anchor and none was given; expected the folder of "
            f"its last checkpoint. Run `opdgeo train sft --preset {preset}` first and pass its checkpoint as the "
            "origin, on the command line by --model."
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

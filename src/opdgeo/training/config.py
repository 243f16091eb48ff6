"""What one training run is: a frozen value, saved beside its results as `config.json`.

An arm of the experiment is one choice on each of three axes: who writes the tokens (`rollouts`), what credit a token gets
(`alpha`, `token_share`, `token_choice`) and where the update may go (`channel`, `constrain`). Everything else is the task, the optimizer and the bookkeeping.
Presets (`opdgeo.experiments.presets`) own the values; this module owns their meaning and their limits.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from opdgeo.errors import ConfigError

LONGEST = 1 << 20  # bytes of a configuration

RENAMED = {"drop_flat_groups": "dynamic_sampling"}
"""Settings by their former names, which commands and the config.json of older runs may still have."""


def by_present_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` with every former name replaced, and a warning for each.

    Raises:
        ConfigError: a setting stands there under both of its names.
    """
    found: dict[str, Any] = {}
    for name, value in settings.items():
        present = RENAMED.get(name, name)
        if present != name:
            if present in settings:
                raise ConfigError(f"{name} and {present} are one setting; expected one of them. Leave {name} out.")
            warnings.warn(f"the setting {name} is now called {present}.", FutureWarning, stacklevel=3)
        found[present] = value
    return found


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run. Shares are fractions of 1; lengths are in tokens.

    Raises:
        ConfigError: a value is out of range, or two values contradict each other; the message names them.
    """

    arm: str
    """A label for people: sft, sft-matched, opd, rlvr, …"""
    task: str
    task_options: Mapping[str, Any] = field(default_factory=dict)
    origin: str
    """Where the weights start (`models.resolve`): a model's name or a checkpoint folder."""
    chat: bool = False
    """Put every prompt into the tokenizer's chat template, as the user's turn."""
    end_token: str | None = None
    """Ends a completion, in the student and the teacher; None = each tokenizer's own end token."""
    teacher: str | None = None
    """Gives the token credit when `alpha` > 0; otherwise only measured against."""
    teacher_server: str | None = None
    """Address of a vLLM server that holds the teacher (`served.py`); then `teacher` is not loaded here, and evaluations do not
    measure the KL to it."""

    # who writes the tokens, and what credit each gets
    rollouts: str
    """demonstrations, student, teacher, or the rollouts.jsonl of a run with `record_rollouts`, which is replayed."""
    alpha: float = 1.0
    """A = alpha·A_OPD + (1 − alpha)·A_RLVR. Not used with demonstrations, where every completion token counts 1."""
    token_share: float = 1.0
    """Share of each completion's tokens that keep their OPD credit."""
    token_choice: Literal["top", "random"] = "top"
    credit: Literal["sampled", "reverse_kl", "forward_kl", "correct", "coin", "random_sign"] = "sampled"
    """sampled: the mixture above, on the sampled token. reverse_kl, forward_kl (with alpha = 1): the exact KL(student ‖ teacher)
    or KL(teacher ‖ student) over the vocabulary at every token. correct (with alpha = 0): 1 on every token of a completion
    that the verifier accepts, 0 on the others: SFT on the student's own correct samples. Two noise controls: coin (with
    alpha = 0) rewards every completion by a fair coin; random_sign (with alpha = 1) gives every token's gap a random sign."""

    # where the update may go (`constrain.py` says what each choice means)
    channel: str | None = None
    """A channel's file or folder; the run keeps a copy in channel.safetensors."""
    constrain: Literal["gradient", "update", "adapter"] | None = None
    moments: Literal["reset", "project", "keep"] = "reset"
    """Adam's moments at the start. All but reset need an `origin` saved with `keep_moments`."""
    unconstrained: Literal["free", "frozen"] = "free"
    """Parameters that the channel does not hold: embeddings, norms, matrices of other roles."""

    # size of the run
    steps: int
    sequences_per_step: int
    train_examples: int = 0
    """Draw at most so many examples and go over them again; 0 = as many as the steps can use, or as the task has."""
    generations: int = 8
    """Completions of one prompt; sequences_per_step / generations prompts a step. Not used with demonstrations."""
    rollout_prompts: int = 0
    """Prompts completed before the updates that use them, one whole batch each; 0 = one update per rollout."""
    dynamic_sampling: bool = False
    """Replace the prompts whose completions all have the same reward by other prompts."""
    micro_batch: int = 0
    """Sequences that a process holds at once; 0 = all of its share of a step."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    max_prompt_tokens: int = 64
    """Evaluation and rollouts refuse longer prompts rather than cut them."""
    max_tokens: int = 64
    """Longest completion sampled; longest sequence with demonstrations (longer ones are cut)."""

    vllm: Literal["off", "colocate", "server"] = "off"
    """Who runs the student while it writes: the trainer, vLLM in the same processes, or a vLLM server at `vllm_server`."""
    vllm_server: str = "http://localhost:8000"
    vllm_memory: float = 0.3
    """Share of a GPU's memory that a colocated vLLM takes."""

    # optimizer
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd: without momentum; `betas` and `adam_epsilon` are not used."""
    weights: Literal["float32", "bfloat16"] = "float32"
    """What the optimizer updates: fp32 masters, or weights and moments in bf16, which lose small updates to rounding."""
    learning_rate: float
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: linear warm-up over the first 10 % of steps, then down to a tenth of the peak."""
    betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Of matrices; not of norms and biases."""
    max_grad_norm: float = 0.0
    """0 = no clipping. The norm is logged either way."""
    clip_low: float = 0.2
    clip_high: float = 0.28
    """Bounds of the probability ratio. With one update per rollout the ratio is 1 and neither binds."""

    # bookkeeping
    seed: int = 0
    data_seed: int = 0
    """Draws the training examples; the held-out prompts are the same for every run."""
    checkpoints: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8, 1.0)
    """Shares of training after which weights are saved and evaluated."""
    eval_prompts: int = 2048
    """Held-out examples measured before the first step and after the last; 0 = never measure."""
    eval_prompts_between: int = 512
    """The first so many of them, measured at the other checkpoints."""
    eval_start: bool = True
    """False: not before the first step, where nothing depends on it."""
    eval_samples: int = 1
    """Completions sampled of every held-out prompt; the accuracy is their mean, the KLs are of the first one."""
    eval_batch: int = 256
    eval_kl_origin: bool = False
    """Also measure KL(student ‖ start) on the sampled completions; holds the start's weights in memory."""
    resume_every: int = 0
    """Steps between trainer states to resume from; 0 = at the checkpoints. A rollout that several updates share is finished first."""
    keep_moments: bool = False
    """Adam's moments beside the weights of every checkpoint, twice their size, for a run that goes on from there."""
    record_rollouts: bool = False
    """Keep every completion in rollouts.jsonl."""
    monitor: int = 25
    """Steps between the measurements of the live monitor (`monitor.GeometryMonitor`), rows of log.jsonl; 0 = off."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    autocast: bool = False
    """On a GPU, forward and backward passes in bf16 and the teacher in bf16. Off, a GPU computes in fp32 as a CPU always does, and
    runs the same experiment."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        object.__setattr__(self, "task_options", dict(self.task_options))

        def need(condition: bool, name: str, expected: str) -> None:
            if not condition:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected {expected}.")

        need(
            self.rollouts in ("demonstrations", "student", "teacher") or self.replays is not None,
            "rollouts",
            "demonstrations, student, teacher or a recorded .jsonl file",
        )
        need(self.token_choice in ("top", "random"), "token_choice", "top or random")
        need(self.optimizer in ("adamw", "sgd"), "optimizer", "adamw or sgd")
        need(self.weights in ("float32", "bfloat16"), "weights", "float32 or bfloat16")
        need(
            self.credit in ("sampled", "reverse_kl", "forward_kl", "correct", "coin", "random_sign"),
            "credit",
            "sampled, reverse_kl, forward_kl, correct, coin or random_sign",
        )
        need(self.schedule in ("constant", "cosine"), "schedule", "constant or cosine")
        need(self.device in ("auto", "cpu", "cuda"), "device", "auto, cpu or cuda")
        need(self.vllm in ("off", "colocate", "server"), "vllm", "off, colocate or server")
        need(0.0 < self.vllm_memory < 1.0, "vllm_memory", "a share between 0 and 1")
        need(self.constrain in (None, "gradient", "update", "adapter"), "constrain", "gradient, update or adapter")
        need(self.moments in ("reset", "project", "keep"), "moments", "reset, project or keep")
        need(self.unconstrained in ("free", "frozen"), "unconstrained", "free or frozen")
        need(
            (self.channel is None) == (self.constrain is None),
            "channel",
            "a channel and a way to constrain, or neither",
        )
        need(
            self.moments != "keep" or self.constrain != "adapter",
            "moments",
            "reset or project, for an adapter has none",
        )
        need(self.moments != "project" or self.channel is not None, "moments", "a channel to project them on")
        need(
            self.optimizer == "adamw" or (self.moments == "reset" and not self.keep_moments),
            "optimizer",
            "adamw where moments are kept or carried on, for sgd has none",
        )
        need(0.0 <= self.alpha <= 1.0, "alpha", "a number from 0 (RLVR) to 1 (OPD)")
        need(0.0 < self.token_share <= 1.0, "token_share", "a share above 0 and at most 1")
        for name in ("steps", "sequences_per_step", "max_tokens", "max_prompt_tokens", "eval_batch", "eval_samples"):
            need(getattr(self, name) >= 1, name, "at least 1")
        for name in (
            "micro_batch",
            "eval_prompts",
            "eval_prompts_between",
            "rollout_prompts",
            "train_examples",
            "resume_every",
            "monitor",
            "weight_decay",
            "max_grad_norm",
        ):
            need(getattr(self, name) >= 0, name, "0 or more")
        need(self.learning_rate >= 0, "learning_rate", "0 or more")
        need(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas", "two numbers in [0, 1)")
        need(
            bool(self.checkpoints) and all(0 < c <= 1 for c in self.checkpoints) and max(self.checkpoints) == 1.0,
            "checkpoints",
            "shares of training in (0, 1], the last one 1",
        )
        if self.micro_batch:
            need(self.sequences_per_step % self.micro_batch == 0, "micro_batch", "a divisor of sequences_per_step")
        if self.rollouts != "demonstrations":
            need(self.generations >= 2, "generations", "at least 2, because advantages are relative to a group")
            need(self.sequences_per_step % self.generations == 0, "generations", "a divisor of sequences_per_step")
            if self.credit != "sampled" and (
                self.alpha != (0.0 if self.credit in ("correct", "coin") else 1.0)
                or self.token_share != 1.0
                or self.dynamic_sampling
            ):
                raise ConfigError(
                    f"credit is {self.credit!r} with alpha {self.alpha:g} and token_share {self.token_share:g}; expected alpha = 0 "
                    "with correct or coin, alpha = 1 with reverse_kl, forward_kl or random_sign, token_share = 1 and dynamic_sampling "
                    "false: only the sampled token's credit can be mixed or dropped."
                )
            if self.rollout_prompts:
                fits = self.rollout_prompts * self.generations >= self.sequences_per_step
                need(
                    fits, "rollout_prompts", f"0, or at least {self.sequences_per_step // self.generations}, one step's"
                )
            need(
                not (self.dynamic_sampling and self.alpha == 1.0),
                "dynamic_sampling",
                "false when alpha is 1, because the reward counts for nothing there",
            )
            if self.teacher_server and (self.credit in ("reverse_kl", "forward_kl") or self.rollouts == "teacher"):
                raise ConfigError(
                    f"teacher_server is set, credit is {self.credit!r} and rollouts is {self.rollouts!r}; expected sampled credit and "
                    "rollouts by the student: a server gives log-probabilities of sampled tokens. Load the teacher for the others."
                )
            if self.teacher is None and self.teacher_server is None and (self.alpha > 0 or self.rollouts == "teacher"):
                raise ConfigError(
                    f"alpha is {self.alpha:g} and rollouts is {self.rollouts!r} but no teacher is given; expected a teacher "
                    "model whenever alpha > 0 or the teacher writes the rollouts. Set `teacher`, or alpha = 0 for RLVR."
                )

    @property
    def replays(self) -> Path | None:
        """The file of recorded rollouts, if the run takes its tokens from one."""
        return Path(self.rollouts).expanduser() if self.rollouts.endswith(".jsonl") else None

    @property
    def uses_vllm(self) -> bool:
        """Whether vLLM writes: it does the student's completions and no others."""
        return self.vllm != "off" and self.rollouts == "student"

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps that share the completions of one rollout: as many whole batches as it fills."""
        return max(1, self.rollout_prompts * self.generations // self.sequences_per_step)

    @property
    def checkpoint_steps(self) -> tuple[int, ...]:
        """The steps after which weights are saved, increasing, without repeats; the last one is `steps`."""
        return tuple(sorted({max(1, round(share * self.steps)) for share in self.checkpoints}))

    def to_json(self) -> str:
        """Every field, by name. Law: from_json(c.to_json()) == c."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_file(cls, file: Path) -> TrainConfig:
        """Read a run's `config.json`.

        Raises:
            ConfigError: it is not JSON, or a field is unknown, missing or of another type.
            CheckpointError: it is no regular file, or cannot be read.
        """
        from opdgeo.checkpoints.stored import opened  # loads torch, which presets do without

        with opened(file) as source:
            return cls.from_json(source.read(0, min(source.size, LONGEST)))

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """Read `to_json`'s text, former names of settings included.

        Raises:
            ConfigError: it is not JSON, or a field is unknown, missing or of another type.
        """
        try:
            values = by_present_names(dict(json.loads(text)))
            for name, kind in get_type_hints(cls).items():
                if name in values and not _is(values[name], kind):
                    raise TypeError(f"{name} is {str(values[name])[:80]!r}")
            return cls(**values)
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"this is not a training configuration: {error}; expected the fields of TrainConfig as JSON. "
                "It may come from another version of opdgeo: start the run again in a new folder."
            ) from None

    def differences(self, other: TrainConfig) -> dict[str, tuple[Any, Any]]:
        """Field → (self's value, other's value) where they differ."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}


def _is(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is of an annotated type."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        return any(_is(value, one) for one in get_args(kind))
    if origin is tuple:
        return isinstance(value, list) and all(_is(one, float) for one in value)
    if origin is Literal:
        return isinstance(value, str)
    if origin is Mapping:
        return isinstance(value, dict)
    return type(value) in {float: (float, int), NoneType: (NoneType,)}.get(kind, (kind,))

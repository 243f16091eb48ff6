"""The arms of the study, as data. One arm is one choice on each of three axes, and one line in `ARMS`:

    who writes the tokens (demonstrations, student, teacher)  ×  what credit a token gets  ×  where the update may go

Everything else an arm changes stands in its last column, and is what makes it a control. An arm takes its other settings from
the arm of the preset that it is `like`. What the arms are for, and what they cost: docs/study.md.

Arms of S1 go on from 20 % of the arm they are like, to 60 % (weights only: every one of them, the free and the frozen too, starts
with fresh Adam moments and fresh prompts, so they differ in the constraint alone). K of a seed is the whole number just below
the mean stable rank of OPD's update there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from opdgeo.errors import ConfigError
from opdgeo.experiments.presets import train_config
from opdgeo.experiments.rules import ALPHAS, MATCHED, OPD, PARADIGMS, RLVR, S1_MODES, SFT, s1
from opdgeo.training.config import TrainConfig

DEMOS, STUDENT, TEACHER = "demonstrations", "student", "teacher"

ONE: dict[str, Any] = {}  # every token of a demonstration counts 1
GAP: dict[str, Any] = {"alpha": 1.0}
REWARD: dict[str, Any] = {"alpha": 0.0}
REVERSE_KL: dict[str, Any] = {"alpha": 1.0, "credit": "reverse_kl"}
FORWARD_KL: dict[str, Any] = {"alpha": 1.0, "credit": "forward_kl"}
CORRECT: dict[str, Any] = {"alpha": 0.0, "credit": "correct"}
COIN: dict[str, Any] = {"alpha": 0.0, "credit": "coin"}
RANDOM_SIGN: dict[str, Any] = {"alpha": 1.0, "credit": "random_sign"}


def kept(choice: str, share: float) -> dict[str, Any]:
    return {**GAP, "token_choice": choice, "token_share": share}


def mixed(alpha: float) -> dict[str, Any]:
    return {"alpha": alpha}


@dataclass(frozen=True)
class Held:
    """A channel: `size` × K directions (0 freezes the matrices) `of` the arm's own early update, a random subspace, or the other
    paradigm's early update (OPD's; for OPD the matched SFT's)."""

    mode: Literal["gradient", "update", "adapter"] = "update"
    of: Literal["own", "random", "other"] = "own"
    size: float = 1.0


FREE = None
FROZEN = Held(size=0.0)


@dataclass(frozen=True)
class Arm:
    name: str
    like: str
    """The preset's arm that has all other settings: sft, sft-matched, opd or rlvr."""
    tokens: str
    credit: Mapping[str, Any]
    where: Held | None = FREE
    start: str = SFT
    """An arm whose checkpoint it starts from, or a model: a preset's name or one of `derived.MAKERS`."""
    start_at: float = 1.0
    """The share of that arm's training after which the checkpoint was saved."""
    part: float = 1.0
    """Share of the preset's steps that it trains for; its checkpoints are the preset's up to there. Below 1 it is evaluated on
    fewer prompts, `FEWER`."""
    seeds: int = 3
    """Repetitions at most."""
    tracked: bool = True
    """False: only its log counts, and its updates are not measured."""
    changes: Mapping[str, Any] = field(default_factory=dict)


PART = 0.4  # of the steps: enough to compare trajectories with OPD's at the same steps
FEWER = {"eval_prompts": 1024, "eval_prompts_between": 256}  # half: evaluation is most of what the shorter arms cost
# SGD's learning rates give each paradigm, at its own gradient norm (about 2.5, 0.25 and 0.2 at the anchor), steps of the size of
# Adam's at 1e-4; the decay lr · weight_decay is Adam's.
SGD = {
    OPD: {"optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 5e-4},
    RLVR: {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 5e-5},
    MATCHED: {"optimizer": "sgd", "learning_rate": 0.2, "weight_decay": 5e-5},
}
BF16 = {key: {"weights": "bfloat16"} for key in SGD}
CLIP = {key: {"max_grad_norm": 1.0} for key in SGD}
SMALL: dict[str, Any] = {}
DIGITS = {
    "task": "digits",
    "task_options": {},
    "teacher": "digits-teacher",
    "max_prompt_tokens": 16,
    "max_tokens": 12,
}
AXES = {SFT: (DEMOS, ONE), MATCHED: (DEMOS, ONE), OPD: (STUDENT, GAP), RLVR: (STUDENT, REWARD)}


def _family(suffix: str, base: str, changes: dict[str, Any]) -> list[Arm]:
    """The four arms once more, from another base or on another task, with an anchor of their own."""
    return [
        Arm(f"{like}-{suffix}", like, *AXES[like], seeds=1, changes=changes,
            start=base if like == SFT else f"{SFT}-{suffix}")
        for like in PARADIGMS
    ]  # fmt: skip


def _control(suffix: str, by_arm: Mapping[str, dict[str, Any]]) -> list[Arm]:
    return [Arm(f"{like}-{suffix}", like, *AXES[like], part=PART, seeds=1, changes=by_arm[like]) for like in by_arm]


def _s1(like: str) -> list[Arm]:
    def arm(what: str, where: Held | None, seeds: int = 3) -> Arm:
        # An adapter's B takes Adam steps entry by entry, and has few entries: ten times the rate, as LoRA is usually trained.
        faster = {"learning_rate": 3e-3 if like == SFT else 1e-3} if what == "adapter" else {}
        return Arm(s1(like, what), like, *AXES[like], where, start=like, start_at=0.2, part=0.4, seeds=seeds,
                   tracked=where is FREE, changes={"eval_kl_origin": False, **faster})  # fmt: skip

    return [
        arm("free", FREE),
        arm("frozen", FROZEN),
        *(arm(mode, Held(mode)) for mode in S1_MODES),  # type: ignore[arg-type]
        arm("random", Held(of="random")),
        arm("other", Held(of="other")),
        arm("half", Held(size=0.5), seeds=1),
        arm("double", Held(size=2.0), seeds=1),
    ]


#   name                like     tokens   credit               and
ARMS: tuple[Arm, ...] = (
    # the four paradigms
    Arm(SFT,                SFT,     DEMOS,   ONE,                 start="tiny/base"),
    Arm(MATCHED,            MATCHED, DEMOS,   ONE),
    Arm(OPD,                OPD,     STUDENT, GAP),
    Arm(RLVR,               RLVR,    STUDENT, REWARD),
    # noise controls: as long and as many sequences as RLVR and OPD, and nothing to learn
    Arm("coin",             RLVR,    STUDENT, COIN),
    Arm("opd-random-sign",  OPD,     STUDENT, RANDOM_SIGN),
    # C1, C2, C3: what credit, and who writes the tokens
    Arm("opd-top-25",       OPD,     STUDENT, kept("top", 0.25),   part=PART),
    Arm("opd-random-25",    OPD,     STUDENT, kept("random", 0.25), part=PART),
    Arm("opd-teacher-tokens", OPD,   TEACHER, GAP,                 part=PART),
    *(Arm(f"opd-alpha-{a:g}", OPD,   STUDENT, mixed(a),            part=PART) for a in ALPHAS),
    # R2: another teacher, another student, other data
    Arm("opd-weak-teacher", OPD,     STUDENT, GAP,                 changes={"teacher": "weak-teacher"}),
    *_family("small", "small-base", SMALL),
    *_family("digits", "tiny/base", DIGITS),
    # controls: optimizer, precision, clipping, objective
    *_control("sgd", SGD),
    *_control("bf16", BF16),
    *_control("clip", CLIP),
    Arm("opd-reverse-kl",   OPD,     STUDENT, REVERSE_KL,          part=PART, seeds=1),
    Arm("opd-forward-kl",   OPD,     STUDENT, FORWARD_KL,          part=PART, seeds=1),
    Arm("sft-own-samples",  OPD,     STUDENT, CORRECT,             part=PART, seeds=1),
    # S1: where the update may go
    *_s1(OPD), *_s1(MATCHED), *_s1(SFT),
)  # fmt: skip

STUDIES = {"small": PARADIGMS, "full": tuple(arm.name for arm in ARMS)}
OWN_NOISE = {"smollm2": ("coin",)}
"""Noise arms that the small study of a preset trains itself. The tiny one shows rows that the package carries (`noise.py`)."""


def chosen(study: str, preset: str) -> list[Arm]:
    """The arms of `study`.

    Raises:
        ConfigError: there is no such study, or the full one is asked for with another preset than `tiny`.
    """
    if study not in STUDIES:
        raise ConfigError(f"there is no study {study!r}; expected one of {', '.join(STUDIES)}.")
    if study != "small" and preset != "tiny":
        raise ConfigError(
            f"the study {study!r} was asked for with preset {preset!r}; expected the preset tiny, whose other teachers and students "
            "it makes. Use --study small."
        )
    return [arm for arm in ARMS if arm.name in (*STUDIES[study], *OWN_NOISE.get(preset, ()))]


def folder(arm: str, seed: int) -> str:
    """The name of a run below arms/."""
    return arm if seed == 0 else f"{arm}-seed{seed}"


def configure(arm: Arm, seed: int, preset: str, out: Path, *, rehearse: bool = False) -> TrainConfig:
    """The training of one arm and seed in the study's folder `out`."""
    values = dict(arm.changes)
    if values.get("teacher", "/").count("/") == 0:
        values["teacher"] = str((out / "models" / values["teacher"]).resolve())
    plain = train_config(arm.like, preset, origin="-", **(REHEARSAL if rehearse else {}))
    if arm.part != 1.0:
        values["steps"] = round(arm.part * plain.steps)
        shares = [c / arm.part for c in plain.checkpoints if c <= arm.part + 1e-9]
        values["checkpoints"] = (*shares[:-1], 1.0) if arm.start_at == 1.0 else (0.5, 1.0)
    if arm.start_at != 1.0:
        values["data_seed"] = 1000 + seed  # not the prompts that the first 20 % saw
    if arm.where is not None:
        values |= {"channel": str(channel_path(out, arm, seed)), "constrain": arm.where.mode}
    return train_config(
        arm.like,
        preset,
        seed=seed,
        origin=str(origin(arm, seed, preset, out, rehearse=rehearse)),
        arm=arm.name,
        **{
            **(FEWER if arm.part != 1.0 else {}),
            **(REHEARSAL if rehearse else {}),
            "rollouts": arm.tokens,
            **arm.credit,
            **values,
        },
    )


def origin(arm: Arm, seed: int, preset: str, out: Path, *, rehearse: bool = False) -> str | Path:
    """Where `arm` starts: a model, or a checkpoint of an arm before it."""
    if arm.start in BY_NAME:
        before = configure(BY_NAME[arm.start], seed, preset, out, rehearse=rehearse)
        step = max(1, round(arm.start_at * before.steps))
        return (out / "arms" / folder(arm.start, seed) / f"step-{step:06d}").resolve()
    if "/" in arm.start:
        return str(train_config(SFT, preset).origin) if arm.name == SFT else arm.start
    return (out / "models" / arm.start).resolve()


def needs(arm: Arm) -> set[str]:
    """Arms of the same seed, and models, that have to be there before `arm` can start."""
    wanted = {arm.start} | ({OPD, _other(arm)} if arm.where else set())
    teacher = arm.changes.get("teacher")
    return {name for name in wanted | ({teacher} if teacher else set()) if "/" not in name}


def _other(arm: Arm) -> str:
    return MATCHED if arm.like == OPD else OPD


def channel_path(out: Path, arm: Arm, seed: int) -> Path:
    return out.resolve() / "channels" / f"{folder(arm.name, seed)}.safetensors"


def make_channel(arm: Arm, seed: int, preset: str, out: Path, *, rehearse: bool = False) -> Path:
    """Write the channel that `arm` is held in, unless it is there."""
    import polars as pl

    from opdgeo.experiments.claims import Data, early_rank
    from opdgeo.experiments.reduced import reduced
    from opdgeo.training import models
    from opdgeo.training.channel import Channel

    path, held = channel_path(out, arm, seed), arm.where
    if path.is_file() or held is None:
        return path
    source = BY_NAME[_other(arm) if held.of == "other" else arm.like]
    start = configure(source, seed, preset, out, rehearse=rehearse)
    early = origin(replace(arm, start=source.name), seed, preset, out, rehearse=rehearse)
    geometry = pl.read_parquet(out / "arms" / folder(OPD, seed) / "geometry" / "measurements.parquet")
    named = geometry.with_columns((pl.lit(f"{OPD}/") + pl.col("checkpoint")).alias("checkpoint"))
    k = early_rank(Data(reduced(named)), 0)
    channel = Channel.extract(models.resolve(start.origin), early, max(1, round(k * held.size)))
    if held.size == 0:
        channel = channel.cut(0)
    if held.of == "random":
        channel = Channel.random(channel, seed)
    channel.save(path)
    return path


BY_NAME = {arm.name: arm for arm in ARMS}
# Every arm for a few steps: whether the whole study runs, not what it finds.
REHEARSAL: dict[str, Any] = {
    "steps": 5,
    "sequences_per_step": 8,
    "micro_batch": 0,
    "eval_prompts": 8,
    "eval_prompts_between": 0,
    "checkpoints": (0.2, 0.6, 1.0),
    "max_tokens": 3,
    "resume_every": 1000,
    "monitor": 0,
}

"""Train one arm. The request is checked, the TRL trainer is built and run, and a run folder is left.

OUT/config.json          the TrainConfig
OUT/log.jsonl            one row a step and one an evaluation (rows: `callbacks.Recorder`, `evaluation.Evaluation`)
OUT/rollouts.jsonl       every completion, if the run records them (`rollouts`)
OUT/channel.safetensors  the channel of a constrained run
OUT/step-NNNNNN/         Hugging Face folders at the configured shares of training; beside the weights the factors of an adapter
OUT/resume/              the trainer's state, until the run is finished
"""

from __future__ import annotations

import contextlib
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo import tasks
from opdgeo.errors import ConfigError, OpdgeoError
from opdgeo.training import distributed
from opdgeo.training.config import TrainConfig

if TYPE_CHECKING:
    from opdgeo.training import evaluation
    from opdgeo.training.callbacks import Recorder
    from opdgeo.training.channel import Channel
    from opdgeo.training.served import ServedTeacher


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, progress: bool = True) -> Path:
    """Run `config` into the folder `out` and return the last checkpoint's folder.

    With `resume`, a killed run goes on from its last trainer state. It ends with the weights it would have had, to the bit on
    the same machine with the same number of threads. A finished run returns at once, and an empty folder starts a new run.

    Raises:
        ConfigError: `out` is in use, the settings differ from the recorded ones, or the teacher does not fit.
        CheckpointError: a model's folder is missing or incomplete.
        NumericsError: the loss or the gradient stopped being finite.
    """
    out = Path(out)
    folder = out / f"step-{config.steps:06d}"
    if distributed.is_main() and not resume and _occupied(out):
        raise ConfigError(
            f"{out} is not empty; expected a new folder for the run. Choose another, or go on with a killed run "
            "with --resume."
        )

    from opdgeo.training import callbacks, models, monitor, trl_hooks

    if finished(config, out):
        shutil.rmtree(out / callbacks.RESUME, ignore_errors=True)
        return folder

    origin = models.resolve(config.origin)
    teacher = models.resolve(config.teacher) if config.teacher and not config.teacher_server else None
    if teacher is not None:
        models.require_same_vocabulary(origin, teacher, config.end_token)
    task = tasks.load(config.task, config.task_options)
    if config.rollouts != "demonstrations" and not task.prompted:
        raise ConfigError(
            f"the task {config.task!r} is plain text without prompts; expected a task with prompts for rollouts. "
            "Use SFT with it, or the task `arithmetic`."
        )
    if config.rollouts != "demonstrations" and config.alpha < 1 and not task.verifiable:
        raise ConfigError(
            f"the task {config.task!r} has no answers and alpha is {config.alpha:g}; expected answers that a verifier can check. "
            "Use alpha = 1 (OPD) or SFT with it."
        )

    distributed.require_devices(config)
    server = _server(config, origin, task)
    channel = _channel(config, out)
    states = trl_hooks.states(out / callbacks.RESUME)
    state = states[-1] if states else None
    if distributed.is_main():
        out.mkdir(parents=True, exist_ok=True)
        callbacks.write_whole(out / "config.json", config.to_json())
        if channel is not None:
            channel.save(out)
        callbacks.forget_after(out, trl_hooks.state_step(state) if state else -1)

    with quiet():
        trainer, recorder = _build(config, out, origin, task, teacher=teacher, server=server, progress=progress)
        _constrain(trainer, config, channel, origin)
        if config.monitor:
            trainer.add_callback(monitor.GeometryMonitor(config.monitor, base=origin))
        try:
            trainer.train(resume_from_checkpoint=str(state) if state else None)
        finally:
            recorder.close()
    trainer.accelerator.wait_for_everyone()
    if distributed.is_main():
        shutil.rmtree(out / callbacks.RESUME, ignore_errors=True)
    return folder


def finished(config: TrainConfig, out: Path) -> bool:
    """True when the folder `out` holds all of the run.

    Raises:
        ConfigError: it holds a run with other settings.
    """
    from opdgeo.training.callbacks import read_log

    if distributed.is_main() and _occupied(out):
        _check_recorded(config, out)
    if not (out / f"step-{config.steps:06d}").is_dir():
        return False
    return not config.eval_prompts or any(r["event"] == "eval" and r["step"] == config.steps for r in read_log(out))


def _server(config: TrainConfig, origin: Path, task: tasks.Task) -> ServedTeacher | None:
    """The teacher's server. It has answered, and its token ids mean what the student's mean."""
    if config.teacher_server is None or config.rollouts == "demonstrations" or config.alpha == 0:
        return None
    from opdgeo.training.models import load_tokenizer
    from opdgeo.training.served import ServedTeacher

    server = ServedTeacher(config.teacher_server)
    texts = [example.prompt + example.completion for example in task.examples(8, config.data_seed, held_out=False)]
    longest = config.max_prompt_tokens + config.max_tokens
    server.require_same_tokens(load_tokenizer(origin, config.end_token), texts, longest)
    return server


def _occupied(out: Path) -> bool:
    """True when `out` holds files of a run. Hidden files do not count: a start that was killed early leaves them."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; expected a folder for the run. Choose another name.")
    return out.is_dir() and any(not entry.name.startswith(".") for entry in out.iterdir())


def _channel(config: TrainConfig, out: Path) -> Channel | None:
    """The channel of the run. It is read from the run's own copy where there is one."""
    from opdgeo.training.channel import FILE, Channel

    if config.channel is None:
        return None
    return Channel.load(out if (out / FILE).is_file() else config.channel)


def _constrain(trainer: Any, config: TrainConfig, channel: Channel | None, origin: Path) -> None:
    from opdgeo.training import constrain

    carried = None if config.moments == "reset" else origin
    if channel is not None and config.constrain is not None:
        constrain.constrain(
            trainer,
            channel,
            config.constrain,
            moments=config.moments,
            unconstrained=config.unconstrained,
            moments_from=carried,
        )
    elif carried is not None:
        trainer.add_callback(constrain.Carried(carried))


def _check_recorded(config: TrainConfig, out: Path) -> None:
    recorded = out / "config.json"
    if not recorded.is_file():
        raise ConfigError(
            f"{out} holds no config.json; expected the folder of a run to resume. Check the path, or choose a new folder."
        )
    differing = TrainConfig.from_file(recorded).differences(config)
    if differing:
        listed = "; ".join(f"{name}: recorded {old!r}, asked for {new!r}" for name, (old, new) in differing.items())
        raise ConfigError(
            f"cannot resume {out}: {listed}; expected the recorded settings. "
            "Resume with the same settings, or start a new folder."
        )


def _build(
    config: TrainConfig,
    out: Path,
    origin: Path,
    task: tasks.Task,
    *,
    teacher: Path | None,
    server: ServedTeacher | None,
    progress: bool,
) -> tuple[Any, Recorder]:
    """The trainer of a run and what writes its folder; `teacher` is a model's folder, `server` a served one."""
    import torch
    from datasets import Dataset

    from opdgeo.training import callbacks, evaluation, models, policy, rollouts, sft, trl_hooks

    cuda = config.device != "cpu" and torch.cuda.is_available()
    tokenizer = models.load_tokenizer(origin, config.end_token)
    model = models.load_model(origin, config.weights)
    if config.weights == "bfloat16" and not cuda:
        models.multiply_in_float32(model)
    start = models.load_model(origin).eval() if config.eval_kl_origin and config.eval_prompts else None
    judge = (
        models.load_model(teacher, "bfloat16" if cuda and config.autocast else "float32").eval() if teacher else None
    )

    held_out = task.examples(config.eval_prompts, 0, held_out=True) if config.eval_prompts else []
    demonstrations = config.rollouts == "demonstrations"
    per_step = config.sequences_per_step // (1 if demonstrations else config.generations)
    updates = config.updates_per_rollout
    count = per_step * updates * -(-config.steps // updates)
    spare = config.dynamic_sampling and config.replays is None
    wanted = min(config.train_examples or count, count)
    examples = task.examples(wanted * (1 + spare), config.data_seed, held_out=False)
    if len(examples) < per_step * updates:
        raise ConfigError(
            f"the task {config.task!r} has {len(examples)} training examples; expected at least {per_step * updates} for one "
            "step. Lower sequences_per_step or rollout_prompts."
        )
    imitated = [*(examples if demonstrations else []), *([] if task.verifiable else held_out)]
    if not all(e.completion for e in imitated):
        raise ConfigError(
            f"the task {config.task!r} has examples without a completion; expected a demonstration in each of them, to train on and "
            "to measure the loss on. Name their column with task_options: completion; for OPD on prompts alone, set eval_prompts = 0."
        )
    if config.eval_prompts and not held_out:
        raise ConfigError(
            f"the task {config.task!r} has no held-out examples and eval_prompts is {config.eval_prompts}; expected some to measure on. "
            "Give it more examples or held-out ones of their own, or set eval_prompts = 0."
        )
    if config.chat:
        examples, held_out = models.as_chat(examples, tokenizer), models.as_chat(held_out, tokenizer)
    examples, reserve = examples[:wanted], examples[wanted:] or examples  # a task without more lends its own again
    if task.prompted:
        evaluation.require_short_prompts([*examples, *held_out], tokenizer, config.max_prompt_tokens)

    known = _known_evaluation(config, origin)

    def measure(model: Any, step: int) -> evaluation.Evaluation | None:
        if step == 0 and not config.eval_start:
            return None
        if step == 0 and known is not None:
            return known
        count = config.eval_prompts if step in (0, config.steps) else config.eval_prompts_between
        if not held_out[:count]:
            return None
        return evaluation.evaluate(
            trainer.accelerator.unwrap_model(model),
            tokenizer,
            task,
            held_out[:count],
            batch=config.eval_batch,
            teacher=judge,
            max_tokens=config.max_tokens,
            origin=start,
            samples=config.eval_samples,
            longest=config.max_prompt_tokens + config.max_tokens,
            accelerator=trainer.accelerator,
        )

    recorder = callbacks.Recorder(config, out, tokenizer, measure, lambda: trl_hooks.whole_weights(trainer), progress)
    arguments = trl_hooks.trl_arguments(config, out / callbacks.RESUME, cuda)
    trl_hooks.shard_without_gpu()
    if demonstrations:
        data = sft.dataset(examples, tokenizer, config.max_prompt_tokens + config.max_tokens)
        trainer = trl_hooks.demonstration_trainer(model, tokenizer, args=arguments, data=data, callbacks=[recorder])
        judge = judge and trl_hooks.place_frozen(trainer, judge)
    else:
        credit = policy.TokenCredit(
            config,
            task,
            teacher=judge or server,
            reserve=_prompts(reserve),
            vocabulary=model.config.vocab_size,
            record=out / rollouts.FILE if config.record_rollouts else None,
        )
        data = Dataset.from_list(_prompts(examples))
        trainer = trl_hooks.policy_trainer(credit, model, tokenizer, args=arguments, data=data, callbacks=[recorder])
        judge = judge and credit.teacher
    start = start and trl_hooks.place_frozen(trainer, start)
    return trainer, recorder


def _prompts(examples: list[tasks.Example]) -> list[dict[str, str]]:
    return [{"prompt": example.prompt, "answer": example.answer} for example in examples]


def _known_evaluation(config: TrainConfig, origin: Path) -> evaluation.Evaluation | None:
    """What the run that wrote `origin` measured of it in the same way, or None. Arms with one start share its evaluation."""
    from opdgeo.training import callbacks, evaluation

    recorded = origin.parent / "config.json"
    step = origin.name.removeprefix("step-")
    if not (recorded.is_file() and step.isdigit()):
        return None
    try:
        differing = TrainConfig.from_file(recorded).differences(config)
    except OpdgeoError:
        return None  # not the folder of a run
    if differing.keys() & {
        "task",
        "task_options",
        "chat",
        "end_token",
        "teacher",
        "teacher_server",
        "max_tokens",
        "eval_batch",
        "eval_samples",
        "device",
        "autocast",
        "weights",
    }:
        return None
    if not config.eval_prompts:
        return None
    enough = config.eval_prompts_between or config.eval_prompts  # the origin may be a checkpoint on the way
    for row in callbacks.read_log(origin.parent):
        count = row.get("prompts")
        if row["event"] == "eval" and row["step"] == int(step) and isinstance(count, int) and count >= enough:
            known: dict[str, Any] = {name: row.get(name) for name in evaluation.Evaluation.__dataclass_fields__}
            return evaluation.Evaluation(**known | {"kl_origin": 0.0 if config.eval_kl_origin else None})
    return None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers, datasets, TRL and accelerate: their progress bars, warnings and information. Undone at the end."""
    import datasets
    import transformers

    names = ("transformers", "trl", "datasets", "accelerate")
    levels = {name: logging.getLogger(name).level for name in names}
    bars = transformers.utils.logging.is_progress_bar_enabled()
    data_bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers.utils.logging.disable_progress_bar()
        datasets.utils.logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if data_bars:
            datasets.utils.logging.enable_progress_bar()

"""What a run leaves behind: log rows, checkpoints, trainer states; and how far it is, as a bar or as lines.

Everything is written beside its final name and then renamed. A run that is killed at any moment leaves nothing that looks
complete and is not. `step-NNNNNN/` holds weights (fp32), configuration and tokenizer. The states of the optimizer and of the
random numbers are in `resume/` until the run ends.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opdgeo.errors import NumericsError
from opdgeo.machine import duration
from opdgeo.training import constrain, distributed, models, rollouts
from opdgeo.training.channel import Channel
from opdgeo.training.config import TrainConfig
from opdgeo.training.monitor import PREFIX
from opdgeo.training.trl_hooks import torch_optimizer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from opdgeo.training.evaluation import Evaluation

LOG, RESUME = "log.jsonl", "resume"


def step_folder(out: Path, step: int) -> Path:
    return out / f"step-{step:06d}"


def write_whole(path: Path, text: str) -> None:
    """Replace the content of `path` by `text`. A reader sees the old file or the new one, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def save_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, Any] | None = None,
    beside: Callable[[Path], Any] = lambda folder: None,
) -> None:
    """Write a Hugging Face folder and replace one of that name.

    Args:
        weights: default, the weights in memory.
        beside: writes more files into the folder before it gets its name.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, state_dict=weights)
    tokenizer.save_pretrained(partial)
    beside(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


def read_log(out: Path) -> list[dict[str, Any]]:
    """The rows of log.jsonl, up to the first that is none, such as a last line that was cut when the run was killed."""
    path = out / LOG
    rows: list[dict[str, Any]] = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not isinstance(row.get("event"), str) or type(row.get("step")) is not int:
            break
        rows.append(row)
    return rows


def forget_after(out: Path, step: int) -> None:
    """Drop what a killed run left from after `step`, from where it is resumed: rows, rollouts, checkpoints, partial folders."""
    rollouts.forget_after(out / rollouts.FILE, step)
    rows = [row for row in read_log(out) if row["step"] <= step]
    write_whole(out / LOG, "".join(json.dumps(row) + "\n" for row in rows))
    for folder in (*out.glob("step-*"), *out.glob(".step-*.partial")):
        if folder.name.startswith(".") or int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


class Recorder(TrainerCallback):
    """Writes log.jsonl and step-NNNNNN/, evaluates, asks for trainer states, and says how far the run is.

    Progress is a bar on a terminal. Where standard error goes to a file it is a line a step.

    At a checkpoint step it writes the step's row, the weights, the evaluation's row and then the trainer state. A run that is
    killed in between is resumed from the state before, and writes these again. Of several processes only the first one
    writes. All of them call `gather` (`trl_hooks.whole_weights`) and `evaluate`.
    """

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        tokenizer: PreTrainedTokenizerBase,
        evaluate: Callable[[PreTrainedModel, int], Evaluation | None],
        gather: Callable[[], dict[str, Any] | None],
        progress: bool,
    ) -> None:
        self.config, self.out, self.tokenizer, self.evaluate, self.gather = config, out, tokenizer, evaluate, gather
        self.saved_at = set(config.checkpoint_steps)
        shown = progress and distributed.is_main()
        self.bar: Progress | None = _bar() if shown and sys.stderr.isatty() else None
        self.lines = shown and self.bar is None
        self.begun = self.from_step = 0.0
        self.bar_task: TaskID | None = None
        self.started = self.seconds = 0.0
        self.tokens_before = 0.0

    def _row(self, row: dict[str, Any]) -> None:
        if not distributed.is_main():
            return
        with (self.out / LOG).open("a") as stream:
            stream.write(json.dumps(row) + "\n")
            stream.flush()
            os.fsync(stream.fileno())

    def _say(self, text: str) -> None:
        if self.lines:
            print(f"opdgeo: {self.config.arm} {text}", file=sys.stderr, flush=True)

    def _measure(self, model: PreTrainedModel, step: int) -> None:
        if self.config.eval_prompts:
            self._say(f"step {step}: evaluating")
        measured = self.evaluate(model, step)
        if measured is not None:
            self._row({"event": "eval", "step": step, **asdict(measured)})

    def _save(self, model: PreTrainedModel, optimizer: Any, step: int) -> None:
        """Write the weights, beside them an adapter's factors in adapter/, and the moments where the run keeps them."""
        weights = self.gather()
        moments = constrain.moments_of(model.named_parameters(), optimizer) if self.config.keep_moments else None
        if not distributed.is_main():
            return
        factors: dict[str, Any] = {}
        if self.config.constrain == "adapter":
            weights, factors = constrain.without_factors(weights or model.state_dict())

        def beside(folder: Path) -> None:
            if factors:
                Channel.load(self.out).to_adapter(models.resolve(self.config.origin), folder / "adapter", factors)
            if moments:
                constrain.save_moments(moments, folder)

        save_weights(model, self.tokenizer, step_folder(self.out, step), weights, beside)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.tokens_before = float(state.num_input_tokens_seen)
        self.begun, self.from_step = time.monotonic(), state.global_step
        if state.global_step:
            self._say(f"goes on from step {state.global_step} of {self.config.steps}")
        if self.bar is not None:
            self.bar.start()
            self.bar_task = self.bar.add_task(
                self.config.arm, total=self.config.steps, completed=state.global_step, note=""
            )
        if state.global_step == 0:
            self._measure(kwargs["model"], 0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds = time.monotonic() - self.started
        # Only where a rollout ends. No state holds its completions, so a run resumed in between would write other ones.
        shared, every = self.config.updates_per_rollout, self.config.resume_every
        since = range(state.global_step - shared + 1, state.global_step + 1) if state.global_step % shared == 0 else ()
        due = any(step % every == 0 if every else step in self.saved_at for step in since)
        control.should_save = due and state.global_step < self.config.steps
        if state.global_step == 1:
            self._row({"event": "precision", "step": 1, **precision(kwargs["model"], kwargs["optimizer"], args)})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "grad_norm" not in logs:  # the summary at the end
            return
        step = state.global_step
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs[name]):
                raise NumericsError(
                    f"{name} is {logs[name]} at step {step} of {self.out}; expected a finite number. "
                    "Try a lower learning rate, or max_grad_norm = 1."
                )
        tokens = float(logs.get("num_tokens", self.tokens_before))
        self._row(
            {
                "event": "step",
                "step": step,
                "loss": logs["loss"],
                "reward": logs.get("reward"),
                "completion_length": logs.get("completions/mean_length"),
                "kl_teacher": logs.get("kl_teacher"),
                **({"dropped_groups": logs["dropped_groups"]} if "dropped_groups" in logs else {}),
                "grad_norm": logs["grad_norm"],
                "learning_rate": logs["learning_rate"],
                "tokens": int(tokens - self.tokens_before),
                "seconds": round(self.seconds, 4),
                **({"channel/outside": logs.get("channel/outside")} if self.config.constrain else {}),
            }
        )
        geometry = {n.removeprefix(PREFIX): v for n, v in logs.items() if n.startswith(PREFIX)}
        if geometry:
            self._row({"event": "geometry", "step": step, **geometry})
        self.tokens_before = tokens
        note = f"loss {logs['loss']:.3f}"
        if logs.get("reward") is not None:
            note += f"  reward {logs['reward']:.2f}"
        if self.bar is not None and self.bar_task is not None:
            self.bar.update(self.bar_task, completed=step, note=note)
        left = (time.monotonic() - self.begun) / (step - self.from_step) * (self.config.steps - step)
        self._say(f"step {step}/{self.config.steps}  {note}  {self.seconds:.1f} s  {duration(left)} left")
        if step in self.saved_at:
            model = kwargs["model"]
            self._save(model, kwargs["optimizer"], step)
            self._measure(model, step)

    def close(self) -> None:
        """Take the progress bar off the terminal."""
        if self.bar is not None:
            self.bar.stop()


def precision(model: Any, optimizer: Any, args: TrainingArguments) -> dict[str, Any]:
    """How many parameters and how many of the optimizer's moments have which dtype; the autocast dtype; the clipping."""
    parameters: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        parameters[name] = parameters.get(name, 0) + parameter.numel()
    moments: dict[str, int] = {}
    for slots in getattr(torch_optimizer(optimizer), "state", {}).values():  # DeepSpeed's has none
        for key in {"exp_avg", "exp_avg_sq"} & slots.keys():
            name = str(slots[key].dtype).removeprefix("torch.")
            moments[name] = moments.get(name, 0) + slots[key].numel()
    return {
        "parameters": parameters,
        "optimizer": moments,
        "autocast": "bfloat16" if args.bf16 else None,
        "max_grad_norm": args.max_grad_norm,
    }


@contextlib.contextmanager
def bar(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar for one loop. Yields a function that is told how much is done."""
    if not show:
        yield lambda done: None
        return
    with _bar() as progress:
        task = progress.add_task(label, total=total, note="")
        yield lambda done: progress.update(task, completed=done)


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )

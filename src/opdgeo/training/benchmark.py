"""avg@k of one checkpoint on a set of problems, and a record of everything that it depends on.

OUT/evaluation.json      average, its interval, generation settings, model, problems, versions
OUT/completions.jsonl    one row a problem: prompt, answer, its k completions, rewards and lengths
"""

from __future__ import annotations

import json
import platform
import random
from pathlib import Path
from typing import Any

from opdgeo import tasks
from opdgeo.errors import ConfigError
from opdgeo.training.config import TrainConfig

TASK_PROBLEMS = 512  # of a run's task, where no limit is given
DRAWS = 2000  # of the bootstrap over problems


def evaluate(
    model_name: str,
    problems: str,
    out: Path,
    *,
    k: int = 8,
    limit: int | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_tokens: int = 8192,
    batch: int = 16,
    seed: int = 0,
    plain: bool = False,
    device: str = "auto",
    trust_run: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Sample, verify, write the two files and return the content of evaluation.json.

    `problems` is a source of `tasks.problems`, or "task": the held-out problems of the run that the checkpoint belongs to.
    `trust_run` takes them from the run's config.json whatever task it names.

    Raises:
        ConfigError: no problems, no answers, a setting out of range, or a run without `trust_run` whose task is not known to be harmless.
        CheckpointError: the model's folder is missing or incomplete.
    """
    if k < 1 or batch < 1 or max_tokens < 1 or temperature < 0 or not 0 < top_p <= 1:
        raise ConfigError(
            f"k is {k}, batch {batch}, max_tokens {max_tokens}, temperature {temperature:g} and top_p {top_p:g}; expected at least 1, 1, 1, "
            "0, and a share above 0."
        )
    import torch
    import transformers

    from opdgeo.training import callbacks, evaluation, models
    from opdgeo.training.train import quiet

    folder = models.resolve(model_name)
    task, chat = _task(problems, folder, plain, trust_run)
    examples = task.examples(limit or TASK_PROBLEMS, 0, held_out=True) if problems == "task" else _all(task)[:limit]
    if not examples or not task.verifiable:
        raise ConfigError(f"{problems} has {len(examples)} problems with answers; expected at least one.")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda' but torch sees no CUDA GPU; expected one. Use --device cpu.")
    with quiet():
        tokenizer = models.load_tokenizer(folder)
        model = models.load_model(folder)
        if device != "cpu" and torch.cuda.is_available():
            model = model.to("cuda", torch.bfloat16)
        chat = chat and bool(tokenizer.chat_template)
        asked = models.as_chat(examples, tokenizer) if chat else examples
        with callbacks.bar(f"avg@{k}", k * len(examples), progress) as advance:
            rows = evaluation.average_at(
                k,
                model,
                tokenizer,
                task,
                asked,
                temperature=temperature,
                top_p=top_p,
                max_tokens=max_tokens,
                batch=batch,
                seed=seed,
                progress=advance,
            )
    means = [row["mean"] for row in rows]
    tokens = [count for row in rows for count in row["tokens"]]
    result = {
        "average": sum(means) / len(means),
        "interval": interval(means, seed),
        "k": k,
        "problems": len(rows),
        "mean_tokens": sum(tokens) / len(tokens),
        "cut": sum(count == max_tokens for count in tokens) / len(tokens),
        "model": str(folder),
        "source": problems,
        "limit": limit,
        "generation": {
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
            "max_tokens": max_tokens,
            "seed": seed,
            "batch": batch,
            "chat_template": chat,
            "end_token": tokenizer.eos_token,
            "engine": "transformers",
        },
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    callbacks.write_whole(out / "completions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    callbacks.write_whole(out / "evaluation.json", json.dumps(result, indent=2) + "\n")
    return result


def _task(problems: str, folder: Path, plain: bool, trust_run: bool) -> tuple[tasks.Task, bool]:
    """The problems and whether their prompts go into the chat template."""
    if problems != "task":
        return tasks.load("problems", {"source": problems}), not plain
    recorded = folder.parent / "config.json"
    if not recorded.is_file():
        raise ConfigError(
            f"{folder} belongs to no run; expected one (its folder holds config.json) for the problems `task`. "
            "Name a file of problems instead."
        )
    config = TrainConfig.from_file(recorded)
    if not trust_run:
        advice = "Pass --trust-run if the run is yours, or name a file of problems instead of `task`."
        tasks.require_harmless(config.task, config.task_options, recorded, advice)
    return tasks.load(config.task, config.task_options), config.chat and not plain


def _all(task: tasks.Task) -> list[tasks.Example]:
    """Every problem of a source, in its order."""
    found: list[tasks.Example] = task.all()  # type: ignore[attr-defined]
    return found


def interval(means: list[float], seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over problems; samples of one problem are not independent of each other."""
    rng = random.Random(seed)
    drawn = sorted(sum(rng.choices(means, k=len(means))) / len(means) for _ in range(DRAWS))
    return drawn[round(0.025 * DRAWS)], drawn[round(0.975 * DRAWS) - 1]

"""Gradient second moments under every objective, at given checkpoints (PAPER: "On the Geometry of On-Policy Distillation", §3).

The paper argues that the objectives' gradient covariances decide where an update goes, and measures none of them. Here
every update is g = Σ_t a_t φ_t with φ_t = ∇ log p(y_t | x, y_<t), as in §3; the credit a_t comes from `training/advantages.py`,
the φ_t from `training/gradients.py`, and one pass over the tokens serves all objectives:

* `sft`: a_t = 1 on demonstrations, over the mean length (TRL's mean over a batch's tokens);
* `opd`, `rlvr`, `mixture.α`: the student's own samples, over each sample's length, as in training;
* `top.ρ`, `random.ρ`: OPD on a share of the tokens, rescaled;
* `random_credit`: what OPD's tokens would give with credit of random sign, Σ_t φ_tᵀφ_t: the Fisher information. It knows the
  model and the samples but no objective, so it is what the objectives are read against.

Σ is the second moment of a sequence's gradient (unit `sequence`: right E[GᵀG], left E[GGᵀ]) or what is left of it without
the terms between different tokens (unit `token`). Blocks of prompts are the sampling unit: every estimate is free of the
bias of few samples (`numerics/moments.py`), every interval is a bootstrap over blocks.

Departures from the paper: Σ is taken for one matrix at a time, by its two marginals, since all of E[g gᵀ] has (mn)² entries;
it is not centred (§3 does not say whether); prompts are held-out ones, which no arm was trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opdgeo import tasks
from opdgeo.assets import PACKAGED
from opdgeo.checkpoints import Checkpoint, Matrix, open_checkpoint, pair, run_checkpoints
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.experiments.gradient_statistics import (
    ALPHAS,
    BLOCKS,
    BOOTSTRAP,
    MASKS,
    SPLITS,
    Sample,
    Sums,
    credit_rows,
    number_row,
    statistics,
)
from opdgeo.experiments.presets import train_config
from opdgeo.files import write_atomically
from opdgeo.machine import version
from opdgeo.numerics import moments
from opdgeo.survey.engines import cpu_cores
from opdgeo.survey.request import Execution
from opdgeo.survey.results import PARTS, write_json
from opdgeo.survey.run import provenance
from opdgeo.training import advantages, evaluation, gradients, models
from opdgeo.training.config import TrainConfig
from opdgeo.training.evaluation import Completions
from opdgeo.training.sft import tokenized
from opdgeo.training.train import quiet

AT_ONCE = 2**27  # bytes of δ in memory
KEPT = 6 * 2**27  # bytes of block sums in memory: matrices that need more than this together get a pass of their own

SIGNALS: dict[str, Any] = {
    "checkpoint": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "layer": pl.Int32,
    "role": pl.String,
    "objective": pl.String,
    "other": pl.String,
    "quantity": pl.String,
    "unit": pl.String,
    "side": pl.String,
    "value": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "chance": pl.Float64,
    "reliability": pl.Float64,
    "reason": pl.String,
}
SPECTRA: dict[str, Any] = {
    "checkpoint": pl.String,
    "step": pl.Int64,
    "matrix": pl.String,
    "objective": pl.String,
    "unit": pl.String,
    "side": pl.String,
    "values": pl.List(pl.Float64),
}
Advance = Callable[[float], None]
KEYS = ("checkpoint", "step", "objective", "other", "quantity", "unit", "side")


@dataclass(frozen=True)
class Signals:
    """The tables of `signals`: one row a number, eigenvalues by matrix, means over matrices."""

    signals: pl.DataFrame
    spectra: pl.DataFrame
    summary: list[dict[str, Any]]
    run: dict[str, Any]

    def save(self, out: Path) -> None:
        """Write signals.parquet, signals_spectra.parquet, signals.json and, last, run.json; each in one atomic step."""
        out.mkdir(parents=True, exist_ok=True)
        for stale in ("run.json", "report.html"):
            (out / stale).unlink(missing_ok=True)
        write_atomically(out / "signals.parquet", lambda p: self.signals.write_parquet(p))
        write_atomically(out / "signals_spectra.parquet", lambda p: self.spectra.write_parquet(p))
        write_json(out / "signals.json", {"summary": self.summary})
        write_json(out / "run.json", self.run)
        shutil.rmtree(out / PARTS, ignore_errors=True)


def signals(
    checkpoints: str | Path | Sequence[str | Path],
    teacher: str | None = None,
    *,
    preset: str = "tiny",
    task: str | None = None,
    prompts: int = 64,
    generations: int = 8,
    roles: str = "all",
    layers: str | None = None,
    top_k: int = 16,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    progress: bool = False,
) -> Signals:
    """Measure the gradients of every objective at each checkpoint.

    Args:
        checkpoints: Hugging Face folders, run folders (every step-* inside) or names such as "tiny/base".
        teacher: gives OPD its credit; default the one that the checkpoint's run recorded, else the preset's.
        preset: task, lengths and teacher where no config.json stands beside the checkpoint.
        task: another task than recorded.
        prompts: held-out prompts; SFT takes as many demonstrations as there are samples.
        generations: samples of one prompt.
        roles, layers: which matrices; layers as "0,3" or "all", default the middle and the last.
        top_k: leading directions compared in `subspace_overlap` and `weight_alignment`.
        device: of the models, the samples and their gradients: "cpu", "cuda" or one such as "cuda:1". A GPU draws other samples.
        out: where finished layers are kept until `save`, so that a killed run goes on from them.

    Raises:
        CheckpointError, ConfigError: the request cannot be met.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    if prompts < 4:
        raise ConfigError(f"prompts is {prompts}; expected at least 4, because halves of the prompts are compared.")
    if generations < 2:
        raise ConfigError(f"generations is {generations}; expected at least 2: RLVR's credit is relative to a group.")
    if top_k < 1:
        raise ConfigError(f"top_k is {top_k}; expected at least 1.")
    Execution(device=device).check()
    if out is not None and (out / "measurements.parquet").exists():
        raise ConfigError(f"{out} holds the results of another command; expected a folder for signals. Choose another.")
    asked = [checkpoints] if isinstance(checkpoints, str | Path) else list(checkpoints)
    opened = _opened(asked)
    settings = _settings(opened[0][1].path, preset, teacher, task)
    if settings.teacher is None:
        raise ConfigError("no teacher is known for OPD's credit; expected one. Pass --teacher, or choose a preset.")
    chosen = [(name, c, _matrices(c, roles, layers)) for name, c in opened]
    folder = models.resolve(settings.teacher)
    options = {
        "preset": preset,
        "teacher": settings.teacher,
        "task": settings.task,
        "task_options": dict(settings.task_options),
        "chat": settings.chat,
        "end_token": settings.end_token,
        "max_tokens": settings.max_tokens,
        "prompts": prompts,
        "generations": generations,
        "top_k": top_k,
        "seed": seed,
        "roles": roles,
        "layers": layers,
        "device": device,
        "bootstrap": BOOTSTRAP,
        "splits": SPLITS,
    }

    rows: list[pl.DataFrame] = []
    spectra: list[pl.DataFrame] = []
    with quiet(), Progress(console=Console(stderr=True), disable=not progress) as bar:
        line = bar.add_task("measuring", total=2 * sum(len(_groups(m, prompts)) for _, _, m in chosen))
        judge = models.load_model(folder).to(device).eval()
        for name, checkpoint, matrices in chosen:
            models.require_same_vocabulary(checkpoint.path, folder, settings.end_token)
            part = _parts(out, checkpoint, folder, options)
            measured = _checkpoint(
                name,
                checkpoint,
                matrices,
                judge,
                settings=settings,
                options=options,
                part=part,
                advance=lambda share: bar.advance(line, share),
            )
            rows += [r for r, _ in measured]
            spectra += [s for _, s in measured]
    table = pl.concat(rows)
    run = provenance(started, time.perf_counter() - clock, device, cpu_cores()) | {
        "settings": options,
        "checkpoints": [c.manifest() | {"checkpoint": name, "step": c.step} for name, c in opened],
        "teacher": open_checkpoint(folder).manifest(),
    }
    return Signals(table.drop("draws"), pl.concat(spectra), _summary(table), run)


def _opened(asked: list[str | Path]) -> list[tuple[str, Checkpoint]]:
    """Checkpoints by a name of their own: RUN/step-000100 inside a run folder, else the folder's."""
    found: list[tuple[str, Checkpoint]] = []
    for path in asked:
        folder = Path(path)
        inside = (
            folder.is_dir() and not (folder / "model.safetensors").exists() and not list(folder.glob("*.safetensors"))
        )
        for checkpoint in run_checkpoints([folder]) if inside else [open_checkpoint(models.resolve(str(path)))]:
            own = checkpoint.path.resolve()
            in_run = checkpoint.step is not None or (own.parent / "config.json").is_file()
            named = str(path) if str(path) in PACKAGED else f"{own.parent.name}/{own.name}" if in_run else own.name
            found.append((named, checkpoint))
    names = [n for n, _ in found]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise CheckpointError(
            f"two checkpoints are both named {twice[0]}; expected each once. Rename one of the folders."
        )
    return found


def _settings(checkpoint: Path, preset: str, teacher: str | None, task: str | None) -> TrainConfig:
    """Task, lengths and teacher: as the run that wrote the checkpoint recorded them, else the preset's."""
    recorded = checkpoint.resolve().parent / "config.json"
    config = None
    if recorded.is_file():
        with suppress(ConfigError):  # a model's own configuration, not a run's
            config = TrainConfig.from_json(recorded.read_text())
    if config and not task:
        advice = f"Pass --task {config.task} if the run is yours, or another task."
        tasks.require_harmless(config.task, config.task_options, recorded, advice)
    config = config or train_config("opd", preset, origin=str(checkpoint))
    changes: dict[str, Any] = {"teacher": teacher} if teacher else {}
    if task and task != config.task:
        changes |= {"task": task, "task_options": {}}
    return dataclasses.replace(config, **changes)


def _matrices(checkpoint: Checkpoint, roles: str, layers: str | None) -> list[Matrix]:
    found = [m for m in pair(checkpoint, checkpoint, roles).matrices if not m.stacked]
    there = sorted({m.layer for m in found})
    if not there:
        raise ConfigError(f"{checkpoint.path} has no plain linear layer of the roles {roles!r}; expected some.")
    if layers is None:
        wanted = {there[len(there) // 2], there[-1]}
    elif layers == "all":
        wanted = set(there)
    else:
        try:
            wanted = {int(n) for n in layers.split(",")}
        except ValueError:
            raise ConfigError(f"layers is {layers!r}; expected numbers such as 0,3, or all.") from None
    if missing := wanted - set(there):
        raise ConfigError(f"{checkpoint.path} has no layer {min(missing)}; expected some of {there[0]}–{there[-1]}.")
    return [m for m in found if m.layer in wanted]


def _groups(matrices: list[Matrix], prompts: int) -> list[list[Matrix]]:
    """Matrices that share a pass: of one layer, with block sums that fit in memory together."""
    groups: list[list[Matrix]] = []
    size = 0
    for m in matrices:
        need = min(BLOCKS, prompts) * 4 * (17 * m.cols**2 + 11 * m.rows**2 + 10 * m.rows * m.cols)
        if not groups or groups[-1][0].layer != m.layer or size + need > KEPT:
            groups.append([])
            size = 0
        groups[-1].append(m)
        size += need
    return groups


def _parts(out: Path | None, checkpoint: Checkpoint, teacher: Path, options: dict[str, Any]) -> Any:
    """Where a finished group of matrices is kept: named by everything that its numbers depend on."""
    files = [
        (str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns)
        for c in (checkpoint, open_checkpoint(teacher))
        for f in c.files
    ]
    rest = {k: v for k, v in options.items() if k not in ("roles", "layers")}
    run = [version("opdgeo"), version("torch"), rest, files]

    def path(group: list[Matrix], kind: str) -> Path | None:
        if out is None:
            return None
        key = hashlib.sha256(json.dumps([run, [m.name for m in group]]).encode()).hexdigest()
        return out / PARTS / f"{key[:32]}.{kind}.parquet"

    return path


def _checkpoint(
    name: str,
    checkpoint: Checkpoint,
    matrices: list[Matrix],
    teacher: PreTrainedModel,
    *,
    settings: TrainConfig,
    options: dict[str, Any],
    part: Any,
    advance: Advance,
) -> list[tuple[pl.DataFrame, pl.DataFrame]]:
    """Rows and spectra of every group of matrices of one checkpoint, and of its credit."""
    model = models.load_model(checkpoint.path).to(options["device"]).eval()
    tokenizer = models.load_tokenizer(checkpoint.path, settings.end_token)
    prompts, generations, seed = (options[k] for k in ("prompts", "generations", "seed"))
    rollouts, demonstrations = samples(
        model, teacher, tokenizer, settings, prompts=prompts, generations=generations, seed=seed
    )
    label = {"checkpoint": name, "step": checkpoint.step}
    blank = pl.DataFrame(schema=SPECTRA)
    finished = [(_table([r | label for r in credit_rows(rollouts, seed)]), blank)]
    for group in _groups(matrices, prompts):
        kept = [part(group, kind) for kind in ("spectra", "rows")]
        if all(p is not None and p.exists() for p in kept):
            advance(2)
            finished.append((pl.read_parquet(kept[1]), pl.read_parquet(kept[0])))
            continue
        sums = block_sums(model, group, rollouts, demonstrations, advance)
        measured, spectra = [], []
        for matrix in group:
            about = label | {"matrix": matrix.name, "layer": matrix.layer, "role": matrix.role}
            weights = checkpoint.read(matrix).double()
            found, values = statistics(*sums.pop(matrix.name), weights, options["top_k"], seed)
            measured += [r | about for r in found]
            spectra += [s | label | {"matrix": matrix.name} for s in values]
        pieces = _table(measured), pl.DataFrame(spectra, schema=SPECTRA, orient="row")
        for path, piece in zip(kept, reversed(pieces), strict=True):  # the rows last: they mark a finished group
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(path, piece.write_parquet)
        finished.append(pieces)
    return finished


def _table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SIGNALS | {"draws": pl.List(pl.Float64)}, orient="row")


def samples(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainConfig,
    *,
    prompts: int,
    generations: int,
    seed: int,
) -> tuple[Sample, Sample]:
    """The student's samples of held-out prompts with every objective's credit, and as many demonstrations with SFT's.

    Raises:
        ConfigError: the task has no verifier, too few examples, or prompts that would have to be cut.
    """
    task = tasks.load(settings.task, settings.task_options)
    if not task.verifiable:
        raise ConfigError(
            f"the task {settings.task!r} has no verifier; expected one: RLVR needs rewards. Try arithmetic."
        )
    examples = task.examples(prompts * generations, seed, held_out=True)
    if len(examples) < prompts * generations:
        raise ConfigError(f"the task {settings.task!r} has {len(examples)} held-out examples; lower --prompts.")
    if settings.chat:
        examples = models.as_chat(examples, tokenizer)
    evaluation.require_short_prompts(examples, tokenizer, settings.max_prompt_tokens)
    bounds = np.linspace(0, prompts, min(BLOCKS, prompts) + 1).round().astype(int) * generations
    blocks = [slice(int(a), int(b)) for a, b in pairwise(bounds)]

    repeated = [e for e in examples[:prompts] for _ in range(generations)]
    with torch.no_grad(), torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        done = evaluation.complete(model, tokenizer, [e.prompt for e in repeated], settings.max_tokens, sample=True)
        done = _on(done, "cpu")  # a sample is small; what is computed from it in numbers is not
        noise_BT = torch.rand(done.mask_BT.shape)
        student_BT, teacher_BT = (_log_probs(m, done) for m in (model, teacher))
    rewards = torch.tensor([task.verify(t, e.answer) for t, e in zip(done.texts(tokenizer), repeated, strict=True)])
    adv_G, mask_BT = advantages.group_advantages(rewards, generations), done.mask_BT

    def distilled(share: float, choice: Any) -> Tensor:
        keep_BT = advantages.keep_tokens(student_BT - teacher_BT, mask_BT, share, choice, noise_BT)
        return advantages.distillation_advantages(student_BT, teacher_BT, mask_BT, keep_BT)

    full_BT = distilled(1.0, "top")
    credit = {"opd": 1.0, "rlvr": 0.0} | {f"mixture.{a:g}": a for a in ALPHAS}
    credits_BT = {k: advantages.token_advantages(full_BT, adv_G, mask_BT, alpha) for k, alpha in credit.items()}
    credits_BT |= {
        f"{choice}.{s:g}": advantages.token_advantages(distilled(s, choice), adv_G, mask_BT, 1.0) for choice, s in MASKS
    }
    credits_BT["random_credit"] = mask_BT.float()
    length_B1 = mask_BT.sum(1, keepdim=True)
    rollouts = Sample(done, {k: a / length_B1 for k, a in credits_BT.items()}, blocks, rewards)

    pairs = [tokenized(e, tokenizer, settings.max_prompt_tokens + settings.max_tokens) for e in examples]
    shown = _padded(pairs, int(tokenizer.pad_token_id or 0))
    ones_BT = shown.mask_BT.float()
    return rollouts, Sample(shown, {"sft": ones_BT * len(ones_BT) / ones_BT.sum()}, blocks)


def _padded(rows: list[dict[str, Any]], pad: int) -> Completions:
    """Tokenised demonstrations as prompts (padded left) and completions (padded right)."""
    splits = [sum(label == -100 for label in row["labels"]) for row in rows]
    before, after = max(splits), max(len(r["labels"]) - n for r, n in zip(rows, splits, strict=True))
    ids_BL = torch.full((len(rows), before + after), pad)
    attention_BL = torch.zeros_like(ids_BL)
    for i, (row, n) in enumerate(zip(rows, splits, strict=True)):
        place = slice(before - n, before - n + len(row["input_ids"]))
        ids_BL[i, place] = torch.tensor(row["input_ids"])
        attention_BL[i, place] = 1
    return Completions(ids_BL, attention_BL, before)


def _on(done: Completions, device: str | torch.device) -> Completions:
    return Completions(done.ids_BL.to(device), done.attention_BL.to(device), done.start)


def _log_probs(model: PreTrainedModel, done: Completions) -> Tensor:
    """log p of the completion tokens (B, T), on the host."""
    done = _on(done, model.device)
    rows = max(1, evaluation.LOGITS_AT_ONCE // (done.ids_BL.shape[1] * model.config.vocab_size))
    parts = []
    for ids_BL, seen_BL in zip(done.ids_BL.split(rows), done.attention_BL.split(rows), strict=True):
        logits = model(input_ids=ids_BL, attention_mask=seen_BL, use_cache=False).logits[:, done.start - 1 : -1]
        parts.append(logits.float().log_softmax(-1).gather(-1, ids_BL[:, done.start :, None]).squeeze(-1))
    return torch.cat(parts).cpu()


def block_sums(
    model: PreTrainedModel,
    matrices: list[Matrix],
    rollouts: Sample,
    demonstrations: Sample,
    advance: Advance = lambda share: None,
) -> dict[str, tuple[Sums, Sums]]:
    """Second moments by block of prompts: those of the student's samples and those of the demonstrations."""
    own, shown = (_sample_sums(model, matrices, s, advance) for s in (rollouts, demonstrations))
    return {m.name: (own[m.name], shown[m.name]) for m in matrices}


def _sample_sums(model: PreTrainedModel, matrices: list[Matrix], sample: Sample, advance: Advance) -> dict[str, Sums]:
    credits = {k: v for k, v in sample.credit.items() if k != "random_credit"}
    objectives = list(credits)
    crosses = [(objectives.index("opd"), objectives.index("rlvr"))] if "opd" in credits else []
    tokens = [k for k in ("opd", "rlvr", "random_credit", "sft") if k in sample.credit]
    masks = [(k, float(k.partition(".")[2])) for k in objectives if k.startswith("random.")]
    rights = [
        *objectives,
        *["cross"] * len(crosses),
        *(f"token.{k}" for k in tokens),
        *(f"expected.{k}" for k, _ in masks),
    ]
    lefts = rights[: len(objectives) + len(crosses)]
    length_B = sample.done.mask_BT.sum(1)
    blends = [(objectives.index("opd"), tokens.index("opd"), *mask_weights(length_B, share)) for _, share in masks]

    sums: dict[str, Sums] = {}
    device = model.device
    count = len(sample.blocks)
    for m in matrices:
        sizes = np.array([b.stop - b.start for b in sample.blocks], float)
        sums[m.name] = Sums(
            {k: torch.zeros(count, m.cols, m.cols, device=device) for k in rights},
            {k: torch.zeros(count, m.rows, m.rows, device=device) for k in lefts},
            {k: torch.zeros(count, m.rows, m.cols, device=device) for k in objectives},
            sizes,
        )
    each = sample.done.mask_BT.shape[1] * sample.done.ids_BL.shape[1] * sum(m.rows for m in matrices) * 4
    rows = max(1, AT_ONCE // each)
    for j, block in enumerate(sample.blocks):
        for start in range(block.start, block.stop, rows):
            part = slice(start, min(start + rows, block.stop))
            done, width = _trimmed(sample.done, part)
            done = _on(done, device)
            credit = torch.stack([credits[k][part, :width] for k in objectives]).to(device)
            weights = torch.stack([sample.credit[k][part, :width] for k in tokens]).to(device)
            mixed = [(i, u, p[part].to(device), q[part].to(device)) for i, u, p, q in blends]
            for name, (x, delta) in gradients.token_gradients(model, matrices, done).items():
                found = moments.accumulate(x, delta, credit, crosses, weights, mixed)
                for place, keys, values in (
                    (sums[name].right, rights, found.right_Rnn),
                    (sums[name].left, lefts, found.left_Omm),
                    (sums[name].mean, objectives, found.mean_Omn),
                ):
                    for key, value in zip(keys, values, strict=True):
                        place[key][j] += value
            advance((part.stop - part.start) / len(sample.done.ids_BL))
    for name, s in sums.items():
        right, left, mean = ({k: v.cpu() for k, v in of.items()} for of in (s.right, s.left, s.mean))
        sums[name] = Sums(right, left, mean, s.sizes)
    return sums


def mask_weights(length_B: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """p and q of E over random masks of GᵀG = p · (GᵀG of all tokens) + q · (its terms of a token with itself), a sequence each.

    Of n tokens exactly k are kept and rescaled by n/k: a token survives with k/n, two different ones with k(k − 1) / n(n − 1).
    """
    kept_B = torch.tensor([math.ceil(round(share * n, 9)) for n in length_B.tolist()], dtype=torch.float32)
    pair_B = torch.where(length_B > 1, length_B * (kept_B - 1) / (kept_B * (length_B - 1).clamp(min=1)), 0.0)
    return pair_B, length_B / kept_B - pair_B


def _trimmed(done: Completions, part: slice) -> tuple[Completions, int]:
    """Some sequences without the columns in which all of them are padded, and how many completion tokens are left."""
    seen = done.attention_BL[part]
    width = int(done.mask_BT[part].sum(1).max())
    first = int(seen[:, : done.start].any(0).int().argmax()) if done.start else 0
    keep = slice(first, done.start + width)
    return Completions(done.ids_BL[part, keep], seen[:, keep], done.start - first), width


def _summary(table: pl.DataFrame) -> list[dict[str, Any]]:
    """Means over matrices with the interval of the mean: the draws of one checkpoint are the same prompts for every matrix."""
    rows = []
    for key, group in table.group_by(*KEYS, maintain_order=True):
        known = group.filter(pl.col("value").is_not_null())
        average = np.array(known["draws"].to_list(), float).mean(0) if len(known) else np.array([np.nan])
        named = dict(zip(KEYS, key, strict=True))
        row: dict[str, Any] = number_row(**{k: named[k] for k in KEYS[2:]}, draws=average)
        del row["draws"]
        for column in ("chance", "reliability"):
            row[column] = known[column].mean()
        rows.append(named | row | {"computed": len(known), "total": len(group)})
    return rows

"""The live monitor: the geometry of the update while it trains, for any transformers or TRL trainer.

    from opdgeo import GeometryMonitor
    trainer.add_callback(GeometryMonitor())

Every `every` steps, and at the last one, a few matrices are measured against where training started, with the formulas of
`opdgeo track`. The means over them join the trainer's next log row, and so reach W&B, TensorBoard, trackio and the console.
`docs/monitor.md` lists them. `rows` keeps every number, matrix by matrix. Beside a number stands its null, from a closed form, or from
draws of singular values that serve all matrices of a shape for the whole run. What does not change while training goes on is computed
once: W₀'s norm, spectrum and magnitudes, and the nulls' tables of a shape.

The monitor reads the parameters as the optimizer leaves them. They are fp32 under autocast, under DDP and under FSDP2, whose
mixed precision keeps fp32 shards. Parameters that are held in bf16 are measured as they are, and a warning says so. Under FSDP2
every process keeps and reads its own rows, and only narrow blocks are exchanged (`numerics.sharded`). ZeRO-3 leaves nothing to
read here: the monitor warns once and measures nothing.

The row that a trainer logs is a dictionary, which its callbacks see one after another. The monitor is a `FirstCallback`: it comes
before the reporters, so that they see its numbers.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import TrainerControl, TrainerState, TrainingArguments

from opdgeo.checkpoints import ROLES, Checkpoint, Matrix, open_checkpoint
from opdgeo.checkpoints.names import matrices
from opdgeo.diagnostics import (
    DIAGNOSTICS,
    Base,
    Diagnostic,
    Settings,
    Update,
    Value,
    diagnostics,
    of_trajectories,
)
from opdgeo.diagnostics.diagnostic import Live
from opdgeo.diagnostics.gaussian_null import gaussian_null
from opdgeo.diagnostics.trajectory import walk_angle
from opdgeo.diagnostics.update import cached
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.numerics import lapack, precision, subspaces
from opdgeo.numerics.devices import upload
from opdgeo.numerics.sharded import Rows, ShardedDifference
from opdgeo.numerics.spectra import Difference, Spectrum, truncated_svd
from opdgeo.training.constrain import parameter_name
from opdgeo.training.trl_hooks import FirstCallback

if TYPE_CHECKING:
    from opdgeo.training.channel import Channel

Rule = str | Callable[[Mapping[str, float]], bool]
PREFIX, NULL = "geometry/", "_null"
FILE = "geometry-monitor.safetensors"  # the channels so far, in every trainer state, so that a resumed run goes on from them
HISTORY = 16  # earlier channels that are kept; beyond it every second one goes
log = logging.getLogger(__name__)


class GeometryMonitor(FirstCallback):
    """Measures the update of a few matrices while a model trains.

    Args:
        every: steps between two measurements.
        watch: how many matrices, spread over layers and roles; or their names, as in the `matrix` column of `track`.
        base: the checkpoint that updates are measured from. Default: the weights as training starts, copied to the CPU; for a
            run that is resumed, the model's `name_or_path`.
        channel: also the share of the update's energy outside this one, `geometry/outside`.
        stop: ends training once it holds of a log row: "geometry/outside > 0.2", or a function of the row.
        alert: warns when it begins to hold.
        lock: the similarity from which the channel counts as locked.

    Attributes:
        rows: step, matrix, diagnostic, variant, value and null_mean of everything measured; of a value None the reason.

    Raises:
        ConfigError: a rule that cannot be read or can never be decided, a name that is not in the model, a base that does not fit.
    """

    def __init__(
        self,
        every: int = 25,
        *,
        watch: int | Sequence[str] = 8,
        base: str | Path | None = None,
        channel: Channel | None = None,
        stop: Rule | None = None,
        alert: Rule | None = None,
        lock: float = 0.8,
    ):
        if every < 1:
            raise ConfigError(f"every is {every}; expected a number of steps of at least 1.")
        if not 0 < lock <= 1:
            raise ConfigError(f"lock is {lock}; expected a similarity in (0, 1].")
        self.every, self.watch, self.base, self.channel, self.lock = every, watch, base, channel, lock
        self.stop, self.alert = (_rule(rule, channel is not None) for rule in (stop, alert))
        self.rows: list[dict[str, Any]] = []
        self._subjects: list[_Subject] = []
        self._history: list[tuple[int, dict[str, _Seen]]] = []
        self._pending: dict[str, float] = {}
        self._alerted = self._told = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        self._subjects = _subjects(model, self.watch, self._origin(model, state))
        if state.global_step:
            self._history = _load_history(Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE)
            for subject in self._subjects:
                subject.go_on(self._history, state.global_step)
        self._check_rules()
        if not self._subjects:
            log.warning("the geometry monitor found no matrix that it can read, and stays silent.")
        elif half := {s.dtype for s in self._subjects} - {torch.float32, torch.float64}:
            log.warning("the monitored parameters are held in %s: what rounds away there is not seen.", half.pop())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        step = state.global_step
        if self._subjects and (step % self.every == 0 or step == state.max_steps):
            self._pending = self.measure(step)
            control.should_log = True
        return control

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> TrainerControl:
        if logs is None:
            return control
        if self._pending:
            logs.update(self._pending)
            if state.log_history:
                state.log_history[-1].update(self._pending)
            self._pending = {}
        self._say_what_is_never_logged(state.global_step, logs)
        if self.alert:
            holds = self.alert(logs)
            if holds and not self._alerted:
                log.warning("step %d: %s holds.", state.global_step, self.alert)
            self._alerted = self._alerted if holds is None else holds
        if self.stop and self.stop(logs):
            log.warning("step %d: %s holds, so training stops.", state.global_step, self.stop)
            control.should_training_stop = True
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self._history and state.is_world_process_zero and folder.is_dir():
            _save_history(self._history, folder / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for rule in (self.stop, self.alert):
            if rule and not rule.asked:
                log.warning("%s was never decided: no log row had its name.", rule)

    @torch.no_grad()
    def measure(self, step: int) -> dict[str, float]:
        """Measure now and return the means over the matrices by their names in the log."""
        # SciPy's own threads, one a core, wait for each other by turning where other work has the cores.
        with lapack.threads(torch.get_num_threads()):
            return self._measure(step)

    def _measure(self, step: int) -> dict[str, float]:
        now: dict[str, _Seen] = {}
        values: dict[Name, list[float]] = {}
        chances: dict[Name, list[float | None]] = {}
        compared = {t.name: [Pairs() for _ in self._history] for t in of_trajectories().values() if t.live and t.pair}
        rows: list[dict[str, Any]] = []
        for subject in self._subjects:
            update = subject.update()
            found, nulls = subject.measure(update)
            length = subject.walk(update)
            if update.moved:
                here = now[subject.name] = _Seen(_kept(update.delta_spectrum), length)
                wide = replace(here, spectrum=_wide(here.spectrum))
                for name, each in compared.items():
                    for (_, earlier), pairs in zip(self._history, each, strict=True):
                        if subject.name in earlier:
                            pairs[subject.name] = _pair(DIAGNOSTICS[name], subject.shape, earlier[subject.name], wide)
                    for other, pairs in (("previous", each[-1]), ("first", each[0])) if each else ():
                        if subject.name in pairs:
                            key = name, f"{other}.{SETTINGS.top_k}"
                            found[key], nulls[key] = pairs[subject.name]
                if self.channel and subject.name in self.channel.subspaces:
                    found[OUTSIDE] = Value(_outside(self.channel, update, subject.name))
                    basis = self.channel[subject.name].basis
                    nulls[OUTSIDE] = 1 - basis.shape[1] / basis.shape[0]
            for key, value in found.items():
                row = {"step": step, "matrix": subject.name, "diagnostic": key[0], "variant": key[1]}
                rows.append(row | {"value": value.value, "null_mean": nulls.get(key), "reason": value.reason})
                if value.value is not None:
                    values.setdefault(key, []).append(value.value)
                    chances.setdefault(key, []).append(nulls.get(key))
            subject.near = now[subject.name].spectrum.right if subject.name in now else subject.near
        self.rows += rows
        self._say_what_is_undefined(step, rows)
        logs = self._logged({key: (_mean(of), _mean(chances[key])) for key, of in values.items()}, compared)
        self._remember(step, now)
        return logs

    def _logged(self, means: dict[Name, Beside], compared: dict[str, list[Pairs]]) -> dict[str, float]:
        """The means that the diagnostics name for the log, and beside each its null."""
        logs: dict[str, float] = {}
        for name, known, live in _names():
            if known is None or live is None:
                beside = means.get(OUTSIDE, NOTHING)
            elif known.scope == "run":
                beside = self._since(known, compared)
            else:
                variants = (m for (n, v), m in means.items() if n == known.name and v.startswith(live.variant))
                beside = next(variants, NOTHING)
            for of, x in zip((name, name + NULL), beside, strict=True):
                if x is not None:
                    logs[of] = 1 - x if live and live.complement else x
        return logs

    def _check_rules(self) -> None:
        """Raises:
        ConfigError: a rule asks for what the monitor will not measure in this run.
        """
        here = self.channel is not None and any(s.name in self.channel.subspaces for s in self._subjects)
        for rule in (self.stop, self.alert):
            if rule and rule.name.startswith(PREFIX):
                if not self._subjects:
                    raise ConfigError(
                        f"the rule {rule} can never hold: the monitor finds no matrix that it can read here."
                    )
                if rule.name.startswith(PREFIX + "outside") and not here:
                    raise ConfigError(
                        f"the rule {rule} can never hold: no watched matrix is in the channel; expected some of its "
                        f"{len(self.channel or ())}. Give watch= their names."
                    )

    def _say_what_is_never_logged(self, step: int, logs: Mapping[str, float]) -> None:
        """Warn once where a rule's name is none of the monitor's and none of the trainer's first row either."""
        for rule in (self.stop, self.alert) if "loss" in logs else ():
            if rule and not rule.seen:
                rule.seen = True
                if rule.name and not rule.name.startswith((PREFIX, "eval_")) and rule.name not in logs:
                    names = sorted({*logs, *(name for name, *_ in _names())})
                    log.warning("step %d: %s asks for what this log row lacks.%s", step, rule, _near(rule.name, names))

    def _say_what_is_undefined(self, step: int, measured: list[dict[str, Any]]) -> None:
        """Warn once where no matrix has a value of a diagnostic that compares checkpoints, with the reason of the first."""
        for name, d in of_trajectories().items():
            rows = [r for r in measured if r["diagnostic"] == name]
            if rows and not self._told and all(r["value"] is None for r in rows):
                log.warning("step %d: no %s is logged: %s.", step, d.title.lower(), rows[0]["reason"])
                self._told = True

    def _since(self, known: Diagnostic, compared: dict[str, list[Pairs]]) -> Beside:
        """The step from which on the channel has been what it is now, and the same of a walk. `track` would give both if training
        ended here.
        """
        if known.of not in compared or known.since is None:
            return NOTHING
        curve, chances = [], []
        for pairs in compared[known.of]:
            kept = [(value.value, chance) for value, chance in pairs.values() if value.value is not None]
            curve.append(_mean([value for value, _ in kept]))
            chances.append(_mean([chance for _, chance in kept]))
        steps = [step for step, _ in self._history]
        return known.since(steps, curve, self.lock), known.since(steps, chances, self.lock)

    def _remember(self, step: int, now: dict[str, _Seen]) -> None:
        if not now:
            return
        self._history.append((step, now))
        if len(self._history) > HISTORY:
            first, *middle, last = self._history
            self._history = [first, *middle[1::2], last]

    def _origin(self, model: Any, state: TrainerState) -> Checkpoint | None:
        """The checkpoint that holds W₀. None where the weights in memory are W₀."""
        if self.base is None and not state.global_step:
            return None
        where = self.base or getattr(model, "name_or_path", "") or ""
        try:
            return open_checkpoint(where)
        except CheckpointError as error:
            raise ConfigError(
                f"the run is at step {state.global_step} and the weights where it started are not at {where!r} ({error}); expected "
                "their checkpoint. Give GeometryMonitor(base=…)."
            ) from error


SETTINGS = Settings(rank=1)
OUTSIDE = ("channel", "outside")
Name = tuple[str, str]
"""Diagnostic and variant."""
Beside = tuple[float | None, float | None]
"""A number and its null."""
NOTHING: Beside = (None, None)
Pairs = dict[str, tuple[Value, float | None]]
"""By matrix, a number of the present measurement and an earlier one, and its null."""


@dataclass(frozen=True)
class _Seen:
    """A matrix at one measurement: ΔW's leading right vectors, and the squared length of the walk up to there; None: unknown."""

    spectrum: Spectrum
    length: float | None


def _names() -> list[tuple[str, Diagnostic | None, Live | None]]:
    """The names in the log that are not those of nulls, with the diagnostic and what it logs."""
    found = [(PREFIX + live.name, d, live) for d in DIAGNOSTICS.values() for live in d.live]
    return [*found, (PREFIX + OUTSIDE[1], None, None)]


def _mean(of: Sequence[float | None]) -> float | None:
    """None where one is unknown, or there are none: a null is that of the same matrices as its number."""
    known = [x for x in of if x is not None]
    return sum(known) / len(known) if known and len(known) == len(of) else None


def _pair(of: Diagnostic, shape: tuple[int, int], earlier: _Seen, now: _Seen) -> tuple[Value, float | None]:
    """`of` for two measurements of a matrix, the present one in float64, and its null."""
    k = now.spectrum.right.shape[1]
    chance = None
    if of.pair_null and earlier.length is not None and now.length is not None:
        chance = of.pair_null(shape, walk_angle(earlier.length, now.length), k)
    assert of.pair is not None
    return of.pair(now.spectrum, _wide(earlier.spectrum), k), chance


@dataclass(frozen=True)
class _Known:
    """What stays as it is while training goes on: W₀'s norm, the top of its spectrum and `Base.counted`."""

    norm: float
    spectrum: Spectrum
    counted: tuple[Tensor, Tensor] | None


class _MonitoredBase(Base):
    """The rows of W₀ that this process holds, and what is known of it."""

    def __init__(self, weights: Tensor, rows: Rows | None, known: _Known | None):
        super().__init__(weights, SETTINGS)
        self.rows, self.known = rows, known

    @property
    def shape(self) -> tuple[int, int]:
        return (self.rows.total if self.rows else self.weights.shape[0]), self.weights.shape[1]

    @cached
    def norm(self) -> float:
        return self.known.norm if self.known else _norm(torch.zeros_like(self.weights), self.weights, self.rows)

    @cached
    def spectrum(self) -> Spectrum:
        if self.known:
            return self.known.spectrum
        nothing = self.weights.new_zeros(1, 1).expand(self.weights.shape)
        whole = _difference(nothing, self.weights, self.norm, self.rows)
        return truncated_svd(whole, self.cut(self.settings.mask_rank)[0])

    @cached
    def counted(self) -> tuple[Tensor, Tensor] | None:
        return self.known.counted if self.known else super().counted


class _MonitoredUpdate(Update):
    """ΔW. This process may hold only some of its rows."""

    base: _MonitoredBase

    @cached
    def moved(self) -> bool:
        return self.norm > 0

    @cached
    def norm(self) -> float:
        return _norm(self.base.weights, self.weights, self.base.rows)

    @property
    def delta(self) -> Difference:
        return _difference(self.base.weights, self.weights, self.norm, self.base.rows)

    @property
    def rounding(self) -> float:
        of_rows, of_cols = precision.squares(self.weights)
        if rows := self.base.rows:
            of_rows, of_cols = rows.all_gather(of_rows[:, None])[:, 0], rows.all_reduce(of_cols)
        return precision.rounding(of_rows, of_cols, self.weights.dtype)


def _norm(before: Tensor, after: Tensor, rows: Rows | None) -> float:
    square = float(Update(Base(before, SETTINGS), after).norm) ** 2
    return (rows.total_of(square)[0] if rows else square) ** 0.5


def _difference(before: Tensor, after: Tensor, norm: float, rows: Rows | None) -> Difference:
    return ShardedDifference(before, after, norm, rows) if rows else Difference(before, after, norm)


@dataclass
class _Subject:
    """One monitored matrix: how to read it now, and the rows of W₀ and of the last measurement that this process keeps on the CPU.

    Attributes:
        last: W at the last measurement; None: W₀.
        length: the squared length of the walk from W₀ to `last`, the sum of the squared steps between measurements.
    """

    matrix: Matrix
    current: Callable[[], Tensor]
    before: Tensor
    dtype: torch.dtype
    rows: Rows | None = None
    near: Tensor | None = None
    known: _Known | None = None
    last: Tensor | None = None
    length: float | None = 0.0

    @property
    def name(self) -> str:
        return self.matrix.name

    @property
    def shape(self) -> tuple[int, int]:
        return self.matrix.rows, self.matrix.cols

    def measure(self, update: Update) -> tuple[dict[Name, Value], dict[Name, float | None]]:
        """What the log names of one update, and the nulls. The norms, and an update that did not move, are their own."""
        live = [d for d in diagnostics().values() if d.live]
        wanted = [d for d in live if not d.size] if update.moved else []
        chances = gaussian_null(update, wanted, self.name)[0]
        found: dict[Name, Value] = {}
        nulls: dict[Name, float | None] = {}
        for d in live:
            values = d.measure(update)
            beside = {v: Value(chances[d.name, v][0]) for v in values if (d.name, v) in chances}
            if d.weighting == "entries":
                values, beside = self.over_rows(values), beside and self.over_rows(beside)
            found |= {(d.name, v): value for v, value in values.items()}
            if d in wanted:
                nulls |= {(d.name, v): null.value for v, null in beside.items() if not math.isnan(null.value or 0.0)}
            elif not update.moved and not d.size:
                nulls |= {(d.name, v): value.value for v, value in values.items()}
        return found, nulls

    def walk(self, update: Update) -> float | None:
        """Go on to the weights as they are now; the squared length of the walk up to them."""
        if self.length is not None:
            last = self.last
            step = (
                update.norm if last is None else _norm(upload(last, update.weights.device), update.weights, self.rows)
            )
            self.length += step**2
            self.last = update.weights.detach().to("cpu", copy=True)
        return self.length

    def go_on(self, history: list[tuple[int, dict[str, _Seen]]], step: int) -> None:
        """Take the walk up again in a run that is resumed: known where it was measured at the step that it is resumed from."""
        if any(self.name in seen for _, seen in history):
            at, seen = history[-1]
            self.length = seen[self.name].length if at == step and self.name in seen else None
            self.last = None if self.length is None else self.current().detach().to("cpu", copy=True)

    def update(self) -> Update:
        weights = self.current()
        base = _MonitoredBase(upload(self.before, weights.device), self.rows, self.known)
        near = None if self.near is None else self.near.to(weights.device, torch.float64)
        update = _MonitoredUpdate(base, weights, directions=SETTINGS.top_k, start=near)
        self.known = self.known or _Known(base.norm, base.spectrum, base.counted)
        return update

    def over_rows(self, shares: dict[str, Value]) -> dict[str, Value]:
        """Shares of all entries, from those of the entries that this process holds."""
        if self.rows is None:
            return shares
        mine = self.before.shape[0] / self.rows.total
        sums = self.rows.total_of(*(0.0 if mine == 0 else (v.value or 0.0) * mine for v in shares.values()))
        return {name: replace(v, value=s) for (name, v), s in zip(shares.items(), sums, strict=True)}


def _subjects(model: torch.nn.Module, watch: int | Sequence[str], origin: Checkpoint | None) -> list[_Subject]:
    """The monitored matrices of a model, each with its W₀."""
    config: dict[str, Any] = model.config.to_dict() if hasattr(model, "config") else {}  # type: ignore[union-attr, operator]
    found: dict[str, tuple[Matrix, str]] = {}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        plain = parameter_name(name).replace(".base_layer.", ".")  # a LoRA layer is measured with its factors added
        if not hasattr(parameter, "ds_id"):
            found |= {m.name: (m, name) for m in matrices(plain, tuple(parameter.shape), config) or []}
    if isinstance(watch, int):
        usable = [m for m, name in found.values() if _readable(model, parameters, m, name)]
        chosen = _spread(usable, watch)
    else:
        if missing := [name for name in watch if name not in found]:
            raise ConfigError(
                f"the model has no matrix {missing[0]!r}; expected some of its {len(found)}, such as {next(iter(found), None)!r}."
            )
        chosen = [found[name][0] for name in watch]
    subjects = []
    for matrix in chosen:
        current, rows, dtype = _reader(model, parameters, matrix, found[matrix.name][1])
        if origin is None:
            before = current().detach().to("cpu", copy=True)
        else:
            before = _stored(origin, matrix)
            before = before[rows.start : rows.start + len(current())].clone() if rows else before
        subjects.append(_Subject(matrix, current, before, dtype, rows))
    return subjects


def _spread(usable: list[Matrix], count: int) -> list[Matrix]:
    """`count` matrices over all layers, the roles in turn."""
    roles = [r for r in ROLES if any(m.role == r for m in usable)]
    layers = sorted({m.layer for m in usable})
    chosen: dict[str, Matrix] = {}
    for i in range(count if usable else 0):
        layer = layers[round(i * (len(layers) - 1) / max(1, count - 1))]
        of = [m for m in usable if m.layer == layer and m.name not in chosen]
        if of:
            best = min(of, key=lambda m: (roles.index(m.role) - i) % len(roles))
            chosen[best.name] = best
    return list(chosen.values())


def _readable(model: Any, parameters: dict[str, Any], matrix: Matrix, name: str) -> bool:
    """Whether this process can read its rows without gathering others. It cannot for a part of a sharded tensor or a sharded LoRA layer."""
    parameter = parameters[name]
    if not isinstance(parameter, DTensor):
        return True
    ranks = parameter.device_mesh.size()
    if (ranks - 1) * -(-parameter.shape[0] // ranks) >= parameter.shape[0]:  # a process without rows
        return False
    return matrix.name == matrix.tensor and not matrix.transposed and ".base_layer." not in name


def _reader(
    model: Any, parameters: dict[str, Any], matrix: Matrix, name: str
) -> tuple[Callable[[], Tensor], Rows | None, torch.dtype]:
    """How to read a matrix as it is now: the rows of this process where it is sharded by rows, else all of it."""
    parameter = parameters[name]
    if not isinstance(parameter, DTensor):
        if ".base_layer." in name:
            layer = model.get_submodule(name.partition(".base_layer.")[0])
            return lambda: matrix.cut(_merged(layer)), None, parameter.dtype
        return lambda: matrix.cut(_live(model, name).detach()), None, parameter.dtype
    sharded = [i for i, p in enumerate(parameter.placements) if not p.is_replicate()]
    plain = len(sharded) == 1 and parameter.placements[sharded[0]] == Shard(0)
    if not plain or not _readable(model, parameters, matrix, name):
        return lambda: matrix.cut(_live(model, name).detach().full_tensor()), None, parameter.dtype
    mesh = parameter.device_mesh
    _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, parameter.placements)
    rows = Rows(parameter.shape[0], offset[0], mesh.get_group(sharded[0]))
    return lambda: _live(model, name).detach().to_local(), rows, parameter.dtype


def _live(model: Any, name: str) -> Any:
    """The parameter of that name now. FSDP2 replaces the objects, so none is kept."""
    module, _, attribute = name.rpartition(".")
    return getattr(model.get_submodule(module), attribute)


def _merged(layer: Any) -> Tensor:
    """The weight of a LoRA layer with its active adapters added."""
    weight = layer.base_layer.weight.detach().double()
    for adapter in () if layer.merged else layer.active_adapters:
        weight = weight + layer.get_delta_weight(adapter).detach().double()
    return weight


def _stored(origin: Checkpoint, matrix: Matrix) -> Tensor:
    known = origin.tensors.get(matrix.tensor)
    if known is None:
        raise ConfigError(f"{origin.path} has no {matrix.tensor}; expected the checkpoint that training started from.")
    return origin.read(matrix)


def _outside(channel: Channel, update: Update, name: str) -> float:
    """The share of ΔW's energy outside the channel."""
    basis = subspaces.orthonormal(channel[name].basis.to(update.weights.device))
    delta = update.delta
    inside = delta @ basis if channel.side == "right" else delta.T @ basis
    return max(0.0, 1 - float(torch.linalg.vector_norm(inside / update.norm)) ** 2)


def _kept(of: Spectrum) -> Spectrum:
    """The right vectors in little memory, for later steps to compare with."""
    return replace(of, left=of.left[:0], right=of.right.float().cpu(), sigma=of.sigma.cpu(), errors=of.errors.cpu())


def _wide(of: Spectrum) -> Spectrum:
    return replace(of, right=of.right.double())


def _save_history(history: list[tuple[int, dict[str, _Seen]]], path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    facts = []
    for i, (step, seen) in enumerate(history):
        for name, one in seen.items():
            of, k = one.spectrum, one.spectrum.right.shape[1]
            tensors |= {f"{i} {name} right": of.right.contiguous(), f"{i} {name} sigma": of.sigma[: k + 1].contiguous()}
            numbers = {n: getattr(of, n) for n in ("error", "method", "residual", "gram", "tail_bound", "floor")}
            facts.append({"place": i, "step": step, "matrix": name, "length": one.length, **numbers})
    partial = path.with_name(f".{path.name}.partial")
    save_file(tensors, partial, metadata={"history": json.dumps(facts)})
    partial.replace(path)


def _load_history(path: Path) -> list[tuple[int, dict[str, _Seen]]]:
    """What `_save_history` wrote. Empty where the file is missing or not readable."""
    history: dict[int, tuple[int, dict[str, _Seen]]] = {}
    damaged = (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError)
    with suppress(*damaged), safe_open(path, framework="pt") as file:
        for fact in json.loads(file.metadata()["history"]):
            i, step, name = (fact.pop(n) for n in ("place", "step", "matrix"))
            length = fact.pop("length", None)  # a state of an earlier version has none
            right, sigma = (file.get_tensor(f"{i} {name} {part}") for part in ("right", "sigma"))
            of = Spectrum(sigma, right[:0], right, errors=sigma.new_zeros(len(sigma)), **fact)
            history.setdefault(i, (step, {}))[1][name] = _Seen(of, length)
        return list(history.values())
    return []


class _Decision:
    """A rule, its words and the name that it asks for. It gives None for a row that lacks that number.

    `asked`: a row had it. `seen`: the first row of training has been looked at.
    """

    def __init__(self, words: str, decide: Callable[[Mapping[str, float]], bool | None], name: str = ""):
        self.words, self.decide, self.name = words, decide, name
        self.asked = self.seen = False

    def __call__(self, logs: Mapping[str, float]) -> bool | None:
        found = self.decide(logs)
        self.asked |= found is not None
        return found

    def __str__(self) -> str:
        return self.words


_SIGNS: dict[str, Callable[[float, float], bool]] = {
    ">": lambda a, b: a > b,
    "<": lambda a, b: a < b,
    ">=": lambda a, b: a >= b,
    "<=": lambda a, b: a <= b,
}


def _rule(rule: Rule | None, channel: bool) -> _Decision | None:
    if rule is None or callable(rule):
        return rule and _Decision(getattr(rule, "__name__", "the rule"), rule)
    parts = re.fullmatch(r"\s*(\S+)\s*(>=|<=|>|<)\s*(\S+)\s*", rule)
    try:
        name, sign, limit = parts[1], _SIGNS[parts[2]], float(parts[3])  # type: ignore[index]
    except (TypeError, ValueError):
        raise ConfigError(
            f"the rule {rule!r} cannot be read; expected a name of the log, a sign and a number, such as 'geometry/outside > 0.2', "
            "or a function of the log row."
        ) from None
    known = [logged for logged, *_ in _names()]
    known += [logged + NULL for logged, d, _ in _names() if d is None or not d.size]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.8)
    if name not in known and (name.startswith(PREFIX) or near):
        raise ConfigError(
            f"the rule {rule!r} asks for {name!r}, which no log row will have; expected one of {', '.join(known)}, or a name of "
            f"the trainer's own.{_near(name, known)}"
        )
    if name.startswith(PREFIX + OUTSIDE[1]) and not channel:
        raise ConfigError(
            f"the rule {rule!r} asks for {name!r}, which is logged only with channel=; expected a channel."
        )
    return _Decision(rule, lambda logs: sign(logs[name], limit) if name in logs else None, name)


def _near(name: str, known: Sequence[str]) -> str:
    tails = [k for k in known if k.rpartition("/")[2] == name.rpartition("/")[2]]
    near = [*tails, *difflib.get_close_matches(name, known, n=1)]
    return f" Did you mean {near[0]}?" if near else ""

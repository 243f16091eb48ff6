"""Holding training in a channel (PAPER §4, projected training, and two exact versions of it).

For any transformers or TRL trainer, between its construction and `train()`:

    constrain(trainer, Channel.load("channel.safetensors"), "update")

With V the channel of a matrix and A its weights at the switch-on (for a left channel, the same from the left):

    gradient   g ← g V Vᵀ before clipping and the optimizer. This is the paper's. The *update* leaves the channel all the same,
               because Adam divides entry by entry and decoupled decay adds −lr·wd·W.
    update     also W ← A + (W − A) V Vᵀ after every step, decay included. In exact arithmetic this equals
               W_prev + (W − W_prev) V Vᵀ. It needs no copy of the weights for each step, and rounding does not add up: only the
               rounding of the stored W lies outside. Decay pulls towards the part of −W inside the channel.
    adapter    W = A + B Vᵀ. Only B (rows × K) has a gradient and moments. A PEFT LoRA whose A is frozen to Vᵀ trains alike. Here
               the layer multiplies by W itself, so a step and a rollout take no more work than without a constraint, and the
               weights in memory are those of the checkpoint. Decay pulls B to 0, so W back to A. Adam divides entry by entry
               of B. That is another optimizer than with `update`, with steps about √(n/K) shorter, in the same channel.

A matrix with K = 0 is frozen in every mode. Parameters outside the channel (embeddings, norms, matrices of other roles) are
`free` or `frozen`. What becomes of Adam's moments when the constraint is switched on is a choice too (`moments`):

    reset      the optimizer starts afresh.
    project    first moments become m V Vᵀ, second moments stay. For an adapter, B's are m V and v (V∘V): what v would be if the
               gradient's entries were independent.
    keep       they stay as they are, so the first steps of `gradient` still leave the channel. An adapter has none to keep.

`Constraint` serves any training loop with named parameters and a torch optimizer. Under DDP every process projects its copy.
Under FSDP2 it projects its rows, on which V acts without communication; for a left channel the processes sum K × cols numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from opdgeo.checkpoints.names import Matrix, plain, unwrapped
from opdgeo.errors import CheckpointError, ConfigError
from opdgeo.numerics.devices import float32_products
from opdgeo.numerics.sharded import all_reduce
from opdgeo.training.channel import Channel, Subspace
from opdgeo.training.trl_hooks import before_clipping, before_logging, torch_optimizer

Mode = Literal["gradient", "update", "adapter"]
Moments = Literal["reset", "project", "keep"]
Unconstrained = Literal["free", "frozen"]

ANCHOR = "channel-anchor"
FACTOR = ".channel_B"


def parameter_name(name: str) -> str:
    """A parameter's name as checkpoints have it: without what torch, PEFT and multimodal models put around it.

    >>> parameter_name("module.model.layers.0._checkpoint_wrapped_module.mlp.up_proj.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return plain(unwrapped(name))


def constrain(
    trainer: Any,
    channel: Channel,
    mode: Mode = "update",
    *,
    moments: Moments = "reset",
    unconstrained: Unconstrained = "free",
    moments_from: str | Path | None = None,
) -> None:
    """Hold the model of a transformers or TRL trainer in `channel`; call it before `trainer.train()`.

    The constraint is switched on when `train()` starts, also where that resumes the state of an unconstrained run. The weights
    at that moment, the anchor, are kept in `output_dir`, and a run that is resumed later goes on from the same anchor. Every row
    that the trainer logs gets `channel/outside`: the share of the update's energy since the anchor that lies outside the
    channel, over all its matrices.

    Args:
        trainer: not trained yet; one process, DDP or FSDP2.
        moments: see above.
        moments_from: a checkpoint folder with `moments.safetensors` (`keep_moments` of a run), for a trainer that starts from weights.

    Raises:
        ConfigError: the channel does not fit the model, or the choices contradict each other; the message names them.
    """
    check_choices(mode, moments, unconstrained)
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed keeps gradients and weights where a constraint cannot reach them; expected one process, DDP or FSDP2. "
            "With DeepSpeed, train the adapter of Channel.to_adapter as any LoRA, with freeze_directions."
        )
    if trainer.optimizer is not None:
        raise ConfigError(
            "the trainer has its optimizer already; expected a trainer that makes its own when it trains."
        )
    if mode == "adapter" and getattr(trainer, "use_vllm", False):
        raise ConfigError(
            "vLLM is sent every parameter of the model and does not know an adapter's factors; expected `update`, or the adapter of "
            "Channel.to_adapter as a PEFT model, with freeze_directions."
        )
    prepare(trainer.model, channel, mode, unconstrained)
    held = _Held(channel, mode, moments, Path(moments_from) if moments_from else None)
    trainer.add_callback(held)

    def project() -> None:
        if held.constraint is not None:
            held.constraint.project_gradients()

    def add_outside(logs: dict[str, float]) -> None:
        if "grad_norm" in logs and held.constraint and (outside := held.constraint.outside()) is not None:
            logs["channel/outside"] = outside

    before_clipping(trainer, project)
    before_logging(trainer, add_outside)


def check_choices(mode: str, moments: str, unconstrained: str) -> None:
    """Raises:
    ConfigError: an unknown choice, or moments for an adapter to keep.
    """
    for name, value, known in (
        ("constrain", mode, ("gradient", "update", "adapter")),
        ("moments", moments, ("reset", "project", "keep")),
        ("unconstrained", unconstrained, ("free", "frozen")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; expected {', '.join(known[:-1])} or {known[-1]}.")
    if mode == "adapter" and moments == "keep":
        raise ConfigError("moments is 'keep' but an adapter's B has none to keep; expected 'project' or 'reset'.")


def prepare(model: torch.nn.Module, channel: Channel, mode: Mode, unconstrained: Unconstrained = "free") -> None:
    """Freeze what may not move. For `adapter`, put `ChannelLinear` layers into `model` too.

    Call it before the model is wrapped and has an optimizer.

    Raises:
        ConfigError: the channel does not fit the model.
    """
    named = {parameter_name(n): p for n, p in model.named_parameters()}
    of: dict[str, list[Matrix]] = {}
    for s in channel.subspaces.values():
        of.setdefault(s.matrix.tensor, []).append(s.matrix)
    for tensor, matrices in of.items():
        if tensor not in named:
            raise ConfigError(
                f"the channel's {tensor} is not a parameter of the model, which has {len(named)} such as {next(iter(named))}; "
                "expected a channel of this model."
            )
        shape = tuple(named[tensor].shape)
        if sum(m.rows * m.cols for m in matrices) != named[tensor].numel() or not _fits(matrices[0], shape):
            raise ConfigError(
                f"{tensor} has shape {shape} in the model and the channel holds {matrices[0].rows}×{matrices[0].cols} "
                f"({len(matrices)} of its matrices); expected a channel of this model, and all or none of a fused tensor."
            )
    trainable = {name for name, p in named.items() if p.requires_grad}
    moving = {s.matrix.tensor for s in channel.open()} if mode != "adapter" else set()
    for name, parameter in named.items():
        inside = name in moving if name in of else unconstrained == "free"
        parameter.requires_grad_(inside and name in trainable)
    if mode == "adapter":
        channel.adapter_config("")  # only what PEFT could hold too
        names = {parameter_name(n): n for n, _ in model.named_parameters()}
        for s in channel.open():
            parent, _, own = names[s.matrix.tensor].removesuffix(".weight").rpartition(".")
            holder = model.get_submodule(parent)
            layer = getattr(holder, own)
            if type(layer) is not torch.nn.Linear:
                raise ConfigError(
                    f"{s.matrix.tensor} belongs to a {type(layer).__name__}; expected a plain Linear layer."
                )
            setattr(holder, own, ChannelLinear(layer, s.basis))


class ChannelLinear(torch.nn.Linear):
    """A linear layer with W = A + B Vᵀ of which only B is trained.

    `weight` holds W itself: whoever steps B calls `Constraint.project_weights` after it. The gradient of W is never formed.
    """

    def __init__(self, layer: torch.nn.Linear, basis: Tensor):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.channel_B = torch.nn.Parameter(torch.zeros(layer.out_features, basis.shape[1], device=layer.weight.device))
        self.register_buffer("channel_V", basis.to(layer.weight.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        out = _Through.apply(x, self.weight, self.channel_V, self.channel_B)
        return out if self.bias is None else out + self.bias


class _Through(torch.autograd.Function):
    """x Wᵀ, with the gradients of x and of B in W = A + B Vᵀ: g W and gᵀ (x V)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, basis: Tensor, factor: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, basis = x.to(dtype), weight.to(dtype), basis.to(dtype)
        else:
            basis = basis.to(x.dtype)
        inside = x @ basis if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(inside, weight)
        ctx.dtype = factor.dtype
        return torch.nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        inside, weight = ctx.saved_tensors
        to_x = gradient @ weight if ctx.needs_input_grad[0] else None
        to_factor = None
        if inside is not None:
            to_factor = (gradient.flatten(0, -2).T @ inside.flatten(0, -2)).to(ctx.dtype)
        return to_x, None, None, to_factor


def freeze_directions(model: torch.nn.Module) -> None:
    """Freeze every LoRA A of a PEFT model. Its update then stays in the channel that A spans, with plain TRL and PEFT."""
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            parameter.requires_grad_(False)


def without_factors(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights as a checkpoint has them, and apart from them every factor B of `adapter` by the name of its tensor."""
    own = {name: weight for name, weight in weights.items() if not name.endswith(FACTOR)}
    factors = {_source(parameter_name(name)): w for name, w in weights.items() if name.endswith(FACTOR)}
    return own, factors


class Constraint:
    """Gradients and weights of named parameters, held in a channel, for any training loop.

        constraint = Constraint(model.named_parameters(), channel, "update")
        constraint.hold(optimizer)      # from here on every optimizer.step() is constrained
        constraint.outside()            # share of the update's energy outside, from here on

    `hold` projects gradients right before the step. A loop that clips them calls `project_gradients()` before it clips.
    Parameters with K = 0 must have `requires_grad=False`, and for `adapter` the layers must be `ChannelLinear`. `prepare` sees
    to both.

    Raises:
        ConfigError: a matrix of the channel has no parameter, is sharded otherwise than by rows, or for `adapter` has no
            `ChannelLinear`.
    """

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], channel: Channel, mode: Mode = "update"):
        named = {parameter_name(n): p for n, p in parameters}
        self.mode, self.group, self.device = mode, None, torch.device("cpu")
        self.parts: list[_Part] = []
        for s in channel.subspaces.values():
            parameter = named.get(s.matrix.tensor)
            if parameter is None:
                raise ConfigError(f"the model has no parameter {s.matrix.tensor}; expected a channel of this model.")
            factor = named.get(s.matrix.tensor.removesuffix(".weight") + FACTOR) if mode == "adapter" else None
            if mode == "adapter" and s.k and factor is None:
                raise ConfigError(
                    f"the layer of {s.matrix.tensor} is no ChannelLinear, so 'adapter' would train all of its weights; expected "
                    "prepare(model, channel, 'adapter') before the optimizer is made."
                )
            if not parameter.requires_grad and factor is None:
                continue
            self.device = parameter.device
            start, local = 0, parameter.detach()
            if isinstance(parameter, DTensor):
                start, self.group, local = _sharding(s.matrix.tensor, parameter)
            part = _part(s, channel.side, parameter, local=local, start=start, group=self.group)
            if part is not None:
                part.factor = factor
                self.parts.append(part)
        self.take_anchor()

    @torch.no_grad()
    def take_anchor(self) -> None:
        """Take the weights as they are now for the anchor, from which the update is measured and held."""
        for part in self.parts:
            part.anchor = part.view(part.parameter).clone()

    def hold(self, optimizer: torch.optim.Optimizer, *, gradients: bool = True) -> None:
        """Project the gradients before every step of `optimizer`, if `gradients`, and the weights after it, in `update` and `adapter`."""
        if gradients:
            optimizer.register_step_pre_hook(lambda *_: self.project_gradients())
        if self.mode != "gradient":
            optimizer.register_step_post_hook(lambda *_: self.project_weights())

    @torch.no_grad()
    def project_gradients(self) -> None:
        """g ← g V Vᵀ. Law: projecting twice equals projecting once, so it may be called at every micro-batch."""
        for part in self.parts:
            if part.parameter.grad is not None:
                gradient = part.view(part.parameter.grad)
                gradient.copy_(part.project(gradient))

    @torch.no_grad()
    def project_weights(self) -> None:
        """W ← A + (W − A) V Vᵀ, or A + B Vᵀ."""
        for part in self.parts:
            if part.factor is None:
                part.view(part.parameter).copy_(part.project(part.delta()).add_(part.anchor))
            else:
                factor = part.view(part.factor)
                with float32_products(self.device):
                    whole = torch.addmm(part.anchor.to(factor), factor, part.basis.T.to(factor))
                part.view(part.parameter).copy_(whole)

    @torch.no_grad()
    def outside(self) -> float | None:
        """Σ‖ΔW − projection‖²_F / Σ‖ΔW‖²_F over all matrices, ΔW from the anchor; None before anything moved.

        It is computed in the precision of the weights, and for an adapter from its factors. Every process of a sharded model
        must call it.
        """
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in self.parts:
            if part.factor is None:
                delta = part.delta()
                beyond = delta - part.project(delta)
            else:  # from the factors: B times what V Vᵀ leaves of Vᵀ
                basis, factor = part.basis.double(), part.view(part.factor).double()
                delta, beyond = factor @ basis.T, factor @ (basis - basis @ (basis.T @ basis)).T
            sums += torch.stack([torch.linalg.vector_norm(x).double() ** 2 for x in (beyond, delta)])
        out, whole = (sums if self.group is None else _summed(sums, self.group)).tolist()
        return out / whole if whole > 0 else None

    @torch.no_grad()
    def project_moments(self, optimizer: torch.optim.Optimizer) -> None:
        """First moments become m V Vᵀ; second moments stay."""
        for part in self.parts:
            if "exp_avg" in (slots := optimizer.state.get(part.parameter, {})):
                moment = part.view(slots["exp_avg"])
                moment.copy_(part.project(moment))

    def save_anchor(self, folder: Path, step: int) -> None:
        """Keep the anchor for a run that is resumed, in one file, or in one for each process of a sharded model."""
        path = _anchor_path(folder, self)
        if self.group is not None or _rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.partial")
            save_file({p.name: p.anchor.contiguous() for p in self.parts}, partial, metadata={"step": str(step)})
            partial.replace(path)

    def load_anchor(self, folder: Path) -> None:
        """Read the anchor that `save_anchor` kept."""
        path = _anchor_path(folder, self)
        try:
            with safe_open(path, framework="pt") as file:
                for part in self.parts:
                    kept = file.get_tensor(part.name)
                    if kept.shape != part.anchor.shape:
                        raise ValueError(f"{part.name} has shape {tuple(kept.shape)}, not {tuple(part.anchor.shape)}")
                    part.anchor = kept.to(part.anchor)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read the constraint's anchor {path}: {error}; expected the one of this run. Start the run again."
            ) from error


class _Held(TrainerCallback):
    """Switches the constraint of one trainer on when training begins, or takes it up again in a run that is resumed."""

    def __init__(self, channel: Channel, mode: Mode, moments: Moments, moments_from: Path | None):
        self.channel, self.mode, self.moments, self.moments_from = channel, mode, moments, moments_from
        self.constraint: Constraint | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], torch_optimizer(kwargs["optimizer"])
        folder = Path(args.output_dir)
        constraint = Constraint(model.named_parameters(), self.channel, self.mode)
        path = _anchor_path(folder, constraint)
        if path.is_file() and _anchor_step(path) < state.global_step:
            constraint.load_anchor(folder)
        else:
            self._switch_moments(model, optimizer, constraint)
            constraint.save_anchor(folder, state.global_step)
        constraint.hold(optimizer, gradients=False)
        self.constraint = constraint

    def _switch_moments(self, model: Any, optimizer: torch.optim.Optimizer, constraint: Constraint) -> None:
        if self.moments == "reset":
            optimizer.state.clear()
            return
        if self.moments_from is not None:
            load_moments(model.named_parameters(), optimizer, self.moments_from, self.channel)
        if not optimizer.state:
            raise ConfigError(
                f"moments is {self.moments!r} but there are none at the switch-on; expected the state of an unconstrained run, or "
                "moments_from, a checkpoint saved with its moments. Choose moments = 'reset' otherwise."
            )
        if self.moments == "project" and self.mode != "adapter":
            constraint.project_moments(optimizer)


class Carried(TrainerCallback):
    """An unconstrained run that starts from a checkpoint's weights and goes on from its moments too."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            optimizer = torch_optimizer(kwargs["optimizer"])
            load_moments(kwargs["model"].named_parameters(), optimizer, self.folder, None)


MOMENTS = "moments.safetensors"
_SLOTS = ("exp_avg", "exp_avg_sq")


@torch.no_grad()
def moments_of(parameters: Iterable[tuple[str, Tensor]], optimizer: Any) -> tuple[dict[str, Tensor], int]:
    """Adam's moments by parameter name, whole and on the CPU, and its step. Every process of a sharded model must call it."""
    optimizer = torch_optimizer(optimizer)
    found, step = {}, 0
    for name, parameter in parameters:
        for slot in _SLOTS if (slots := optimizer.state.get(parameter)) else ():
            whole = slots[slot].full_tensor() if isinstance(slots[slot], DTensor) else slots[slot]
            found[f"{parameter_name(name)}.{slot}"] = whole.cpu().contiguous()
            step = int(slots["step"])
    return found, step


def save_moments(moments: tuple[dict[str, Tensor], int], folder: Path) -> None:
    """Write what `moments_of` found into a checkpoint's folder."""
    partial = folder / f".{MOMENTS}.partial"
    save_file(moments[0], partial, metadata={"step": str(moments[1])})
    partial.replace(folder / MOMENTS)


@torch.no_grad()
def load_moments(
    parameters: Iterable[tuple[str, Tensor]], optimizer: torch.optim.Optimizer, folder: Path, channel: Channel | None
) -> None:
    """Give the parameters of `optimizer` the moments of `save_moments`. Those of an adapter's B are made from those of its matrix.

    Raises:
        CheckpointError: the folder has no moments, or they are not of this model.
    """
    path = folder / MOMENTS
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {MOMENTS}; expected a checkpoint saved with Adam's moments. Train it with --set keep_moments=true, or "
            "use --moments reset."
        )
    # A fused or captured step counts on the device of its parameter, any other on the host.
    places = {
        id(p): p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
        for group in optimizer.param_groups
        for p in group["params"]
    }
    bases = {s.matrix.tensor: s.basis for s in channel.open()} if channel else {}
    try:
        with safe_open(path, framework="pt") as file:
            step = float((file.metadata() or {})["step"])
            for name, parameter in parameters:
                if id(parameter) not in places or not parameter.requires_grad:
                    continue
                source = _source(parameter_name(name))
                basis = bases[source].to(parameter.device) if name.endswith(FACTOR) else None
                state: dict[str, Tensor] = {"step": torch.tensor(step, device=places[id(parameter)])}
                start, local = 0, parameter
                if isinstance(parameter, DTensor):
                    start, _, local = _sharding(name, parameter)
                for slot in _SLOTS:
                    rows = file.get_slice(f"{source}.{slot}")[start : start + local.shape[0]].to(local.device)
                    if basis is not None:
                        with float32_products(rows.device):
                            rows = rows @ (basis if slot == "exp_avg" else basis.square())
                    if rows.shape != local.shape:
                        raise ValueError(f"{source} has shape {tuple(rows.shape)}, not {tuple(local.shape)}")
                    rows = rows.to(local.dtype).contiguous()
                    if isinstance(parameter, DTensor):
                        rows = DTensor.from_local(
                            rows,
                            parameter.device_mesh,
                            parameter.placements,
                            shape=parameter.shape,
                            stride=parameter.stride(),
                        )
                    state[slot] = rows
                optimizer.state[parameter] = state
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} does not hold this model's moments: {error}.") from error


@dataclass(kw_only=True)
class _Part:
    """One matrix of the channel inside this process's part of a parameter.

    Attributes:
        index: where it lies in the local tensor; `local[index]` is 2-D, in stored orientation.
        basis: acts on that view's columns (n, K), or on its rows, of which this process has some.
        group: the processes among which the view's rows are spread; None where this one has them all.
        factor: the B of an adapter, its rows spread like the parameter's.
    """

    name: str
    parameter: Tensor
    index: tuple[Any, ...]
    basis: Tensor
    on_columns: bool
    group: Any
    anchor: Tensor
    factor: Tensor | None = None

    def view(self, of: Tensor) -> Tensor:
        of = of.detach()
        return (of.to_local() if isinstance(of, DTensor) else of)[self.index]

    def delta(self) -> Tensor:
        """W − A, in float32 or wider."""
        wide = torch.promote_types(self.anchor.dtype, torch.float32)
        return self.view(self.parameter).to(wide) - self.anchor.to(wide)

    def project(self, x: Tensor) -> Tensor:
        basis = self.basis.to(x.dtype)
        with float32_products(x.device):  # TF32 would leave a thousandth of x outside
            if self.on_columns:
                return (x @ basis) @ basis.T
            inside = basis.T @ x
            if self.group is not None:
                inside = _summed(inside, self.group)
            return basis @ inside


def _part(subspace: Subspace, side: str, parameter: Tensor, *, local: Tensor, start: int, group: Any) -> _Part | None:
    """The part of a matrix in `local`, the rows of `parameter` from `start` on. None where another process holds its expert."""
    matrix = subspace.matrix
    if not _fits(matrix, tuple(parameter.shape)):
        raise ConfigError(
            f"{matrix.tensor} has shape {tuple(parameter.shape)} and the channel's matrix {matrix.rows}×{matrix.cols}; expected a "
            "channel of this model, and FSDP2 rather than FSDP1."
        )
    on_columns, basis = (side == "right") != matrix.transposed, subspace.basis.to(local.device)
    index: tuple[Any, ...]
    rows = slice(matrix.start, matrix.start + matrix.rows)
    if matrix.stacked:
        expert = (matrix.expert or 0) - start
        if not 0 <= expert < local.shape[0]:
            return None
        index, held, group = (expert, rows), slice(None), None
    elif matrix.transposed:
        index, held = (slice(None), rows), slice(start, start + local.shape[0])
    else:
        end = start + local.shape[0]
        low = min(max(matrix.start, start), end)
        high = max(low, min(rows.stop, end))
        index, held = (slice(low - start, high - start),), slice(low - matrix.start, high - matrix.start)
    return _Part(
        name=matrix.name,
        parameter=parameter,
        index=index,
        basis=basis if on_columns else basis[held],
        on_columns=on_columns,
        group=group,
        anchor=local,
    )


def _source(name: str) -> str:
    """The tensor that a parameter belongs to: an adapter's B to the weight of its layer."""
    return name.removesuffix(FACTOR) + ".weight" if name.endswith(FACTOR) else name


def _fits(matrix: Matrix, shape: tuple[int, ...]) -> bool:
    if matrix.stacked:
        return (
            not matrix.transposed
            and len(shape) == 3
            and matrix.start + matrix.rows <= shape[1]
            and matrix.cols == shape[2]
        )
    stored = shape[::-1] if matrix.transposed else shape
    return len(shape) == 2 and matrix.start + matrix.rows <= stored[0] and matrix.cols == stored[1]


def _sharding(name: str, tensor: DTensor) -> tuple[int, Any, Tensor]:
    """The first row that this process holds, the group that shares the rows, and the local rows."""
    sharded = [i for i, placement in enumerate(tensor.placements) if placement == Shard(0)]
    if len(sharded) != 1 or any(p != Shard(0) and not isinstance(p, Replicate) for p in tensor.placements):
        raise ConfigError(f"{name} is placed as {tensor.placements}; expected rows sharded once, as FSDP2 does.")
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return offset[0], tensor.device_mesh.get_group(sharded[0]), tensor.to_local().detach()


def _summed(tensor: Tensor, group: Any) -> Tensor:
    return all_reduce(tensor.contiguous(), group)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _anchor_path(folder: Path, constraint: Constraint) -> Path:
    own = "" if constraint.group is None else f"-{_rank()}-of-{dist.get_world_size()}"
    return folder / f"{ANCHOR}{own}.safetensors"


def _anchor_step(path: Path) -> int:
    try:
        with safe_open(path, framework="pt") as file:
            return int((file.metadata() or {})["step"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is not the anchor of a constraint: {error}. Start the run again.") from error

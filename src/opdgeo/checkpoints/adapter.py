"""PEFT adapters on a base checkpoint: LoRA, rsLoRA and DoRA, as `save_pretrained` of the peft library writes them.

A module's ΔW is s·B·A with s = α/r (rsLoRA: α/√r), and stays in those factors (`Adapter.factors`). DoRA scales the rows of
the sum, W₊ = m ∘ (W₀ + sBA)/‖W₀ + sBA‖ by rows: its ΔW has full rank, and it is read like any other checkpoint.
W₊ is the sum in float64, whatever the base is stored in. peft adds in the base's own dtype instead: what a bf16 reader sees
is then the same for a bf16 base (one rounding of the sum), and the merged file is this W₊ up to that rounding.

Weights are (out, in) here as everywhere, so `fan_in_fan_out` says nothing new; which modules an adapter has is read from its
tensors, so neither do `target_modules`, `exclude_modules` and `layers_to_transform`. Scales follow `rank_pattern` and
`alpha_pattern`. A module trained whole (`modules_to_save`) is a tensor of its own. `target_parameters` on stacked experts
gives every expert its factors, whether the base stores its experts stacked or one by one, and the other way round.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdgeo.checkpoints.checkpoint import Checkpoint
from opdgeo.checkpoints.huggingface import bin_headers, headers, read_json
from opdgeo.checkpoints.names import Matrix, matrices, plain, stacks_experts
from opdgeo.checkpoints.patterns import Patterns
from opdgeo.checkpoints.stored import SIZES, Stored
from opdgeo.errors import CheckpointError, PairingError, printable

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, FILES = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|magnitude_vector(?:\.weight)?)")
_EXPERTS = re.compile(r"(?:model\.)?layers\.(?P<layer>[0-9]{1,9})\.mlp\.experts")
_UNMEASURED = re.compile(r".+\.(?:lora_embedding_[AB]|token_adapter\.trainable_tokens_delta)")
# What makes W₊ something else than W₀ + sBA with the base as it is stored.
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "monteclora_config", "use_bdlora",
    "use_qalora",
)  # fmt: skip
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


MOST = 1_000_000  # matrices of a model
Places = dict[str, list[tuple[Matrix, int]]]  # module -> the matrices inside, each with its first row there


@dataclass(frozen=True)
class Lora:
    """The factors of one module or stacked parameter: `down` is A, (experts·r, in), `up` is B, (out, r·experts)."""

    down: Stored
    up: Stored
    scale: float
    magnitude: Stored | None = None  # DoRA's m, (out,)
    experts: int = 1


@dataclass(frozen=True)
class Change:
    """How an adapter changes one matrix: rows `start` onwards of a module, or of one expert of a stacked parameter."""

    lora: Lora
    start: int
    expert: int | None = None


@dataclass(frozen=True, kw_only=True)
class Adapter(Checkpoint):
    """An adapter on its base: reads as the merged checkpoint would, and gives ΔW in factors.

    Attributes:
        base: what the adapter is added to.
        own: the adapter's tensors, as they are called in its file.
        changes: by the names of the matrices.
        changed: the tensors that hold those.
    """

    base: Checkpoint
    own: dict[str, Stored]
    changes: dict[str, Change] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    @property
    def files(self) -> list[Path]:
        return sorted({self.path / CONFIG, *(file for stored in self.own.values() for file in stored.files)})

    def factors(self, matrix: Matrix) -> tuple[Tensor, Tensor] | None:
        """(rows, r) and (cols, r) in float64, whose product L Rᵀ is ΔW; None where ΔW is not a product of such."""
        change = self.changes.get(matrix.name)
        return None if change is None or change.lora.magnitude else _factors(change, matrix)

    def read(self, matrix: Matrix) -> Tensor:
        """W₊ as (out, in): float64 where the adapter adds to it, else as stored."""
        change = self.changes.get(matrix.name)
        if change is None:
            stored = self.tensors[matrix.tensor]
            return self.base.read(matrix) if stored is self.base.tensors[matrix.tensor] else matrix.cut(_known(stored))
        left, right = _factors(change, matrix)
        merged = self.base.read(matrix).double().addmm(left, right.T)
        if change.lora.magnitude:
            import torch

            length = _tensor(change.lora.magnitude).flatten()[change.start : change.start + matrix.rows].double()
            merged.mul_((length / torch.linalg.vector_norm(merged, dim=1))[:, None])
        return merged

    def itemsize(self, tensor: str) -> int:
        """Bytes of an entry in memory: a sum with the adapter is float64."""
        return 8 if tensor in self.changed else super().itemsize(tensor)

    def manifest(self) -> dict[str, Any]:
        """The adapter's own files and dtypes; the base has a manifest of its own."""
        dtypes = Counter(stored.dtype for stored in self.own.values())
        return super().manifest() | {"format": "peft", "dtypes": dict(dtypes)}


def open_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Open an adapter on its base, reading headers only.

    Raises:
        CheckpointError: damaged, or of a kind whose merged weights are not W₀ + sBA or DoRA's.
        PairingError: it changes modules that the base does not have, or has in another shape.
    """
    config = read_json(path / CONFIG)
    _refuse_what_is_not_lora(config, path)
    own = _open_file(path)
    parts: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for key, stored in own.items():
        name = key.removeprefix(_PREFIX)
        if found := _PART.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"].removesuffix(".weight")] = stored
        elif ".lora_" in name and not _UNMEASURED.fullmatch(name):
            raise CheckpointError(
                f"{path} holds {key}, which is no part of a LoRA or DoRA adapter: expected lora_A, lora_B and "
                "lora_magnitude_vector. Merge the adapter into its base and compare that."
            )
        elif not _UNMEASURED.fullmatch(name):
            whole[_in_base(name.replace(".base_layer.", "."), base) or plain(name)] = stored
    known: list[Matrix] = []
    for name, stored in base.tensors.items():
        known += matrices(name, stored.shape, base.config) or []
        if len(known) > MOST:
            raise CheckpointError(f"{base.path} holds more than {MOST} matrices; expected a language model's.")
    places: Places = {}
    by_layer: dict[int, list[Matrix]] = {}
    for m in known:
        if m.expert is not None:
            by_layer.setdefault(m.layer, []).append(m)
        places.setdefault(m.tensor, []).append((m, m.start))
        if m.stacked:  # the adapter may know the expert as a module of its own
            places[m.name] = [(m, 0)]
    changes: dict[str, Change] = {}
    patterns = _patterns(config, "rank_pattern", path), _patterns(config, "alpha_pattern", path)
    for module, found_parts in parts.items():
        changes |= _changes(
            module, found_parts, config, patterns, base=base, places=places, by_layer=by_layer, path=path
        )
    changed = frozenset(m.tensor for m in known if m.name in changes)
    for name in changed & whole.keys():
        if whole[name].shape != base.tensors[name].shape:
            raise CheckpointError(
                f"{path} holds factors for {name}, which is {'×'.join(map(str, base.tensors[name].shape))}, and the tensor itself as "
                f"{'×'.join(map(str, whole[name].shape))}. Save it again."
            )
    return Adapter(
        path, base.tensors | whole, base.config, _notes(config, base, changes), base=base, own=own, changes=changes, changed=changed
    )  # fmt: skip


def _refuse_what_is_not_lora(config: dict[str, Any], path: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{path} is a PEFT adapter of type {kind}; opdgeo reads LORA (with rsLoRA and DoRA). Merge it into its base "
            "with merge_and_unload() and compare the merged checkpoint."
        )
    if used := [name for name in _REFUSED if config.get(name)]:
        raise CheckpointError(
            f"{path} is a LoRA with {', '.join(used)}, whose merged weights are not W₀ + sBA; opdgeo reads LoRA, rsLoRA "
            "and DoRA. Merge it with merge_and_unload(), if peft can, and compare the merged checkpoint."
        )
    start = str(config.get("init_lora_weights", True)).lower()
    if start.startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{path} was initialised by {start}, which changes the base's weights before training, and the adapter alone "
            "does not say to what. Save it again with save_pretrained(…, path_initial_model_for_weight_conversion=…), or "
            "compare the merged checkpoint."
        )


def _changes(
    module: str,
    parts: dict[str, Stored],
    config: dict[str, Any],
    patterns: tuple[Patterns, Patterns],
    *,
    base: Checkpoint,
    places: Places,
    by_layer: Mapping[int, list[Matrix]],
    path: Path,
) -> dict[str, Change]:
    """The matrices that one LoRA changes; none where the base knows the module and opdgeo does not measure it."""
    if lacking := [part for part in ("A", "B") if part not in parts]:
        raise CheckpointError(f"{path} has no lora_{lacking[0]} for {module}; expected both factors. Save it again.")
    down, up = parts["A"], parts["B"]
    if len(down.shape) != 2 or len(up.shape) != 2:
        raise CheckpointError(
            f"{path} has factors of {module} with the shapes {down.shape} and {up.shape}; expected two matrices. Was it "
            "saved from one rank of a sharded model? Gather it and save it again."
        )
    inside = module.replace(".base_layer", "")  # wrappers of several parameters of one module stand inside each other
    targets = _targets(inside, (up.shape[0], down.shape[1]), base, places, by_layer)
    if not targets:
        if _in_base(f"{inside}.weight", base):
            return {}  # a head, a router, a tower
        raise PairingError(
            f"{path} changes {module}, (out, in) = ({up.shape[0]}, {down.shape[1]}), and {base.path} has no such "
            f"weights. Was it trained on this base? Its config names {config.get('base_model_name_or_path')!r}."
        )
    stacked = _EXPERTS.fullmatch(plain(inside)) is not None
    numbers = {m.expert for m, _ in targets}
    if stacked and numbers != set(range(len(numbers))):
        raise CheckpointError(
            f"{path} changes the stacked experts of {module}, of which {base.path} lacks some; expected all, numbered from 0."
        )
    experts = len(numbers) if stacked else 1
    key = f"{inside}.{'down_proj' if targets[0][0].role == 'down_proj' else 'gate_up_proj'}" if stacked else inside
    rank = _by_pattern(config, patterns[0], "r", key, path)
    alpha = _by_pattern(config, patterns[1], "lora_alpha", key, path)
    if rank <= 0 or down.shape[0] != rank * experts or up.shape[1] != rank * experts:
        raise CheckpointError(
            f"{path}: {module} has factors of rank {down.shape[0] // experts} and {up.shape[1] // experts}, and "
            f"{CONFIG} says {rank:g}. Do the two files belong together?"
        )
    dora = bool(config.get("use_dora"))
    if dora and (magnitude := parts.get("magnitude_vector")) is None:
        raise CheckpointError(f"{path} uses DoRA and has no lora_magnitude_vector for {module}. Save it again.")
    for part in (down, up, *([magnitude] if dora and magnitude else [])):
        _known(part)
    if dora and magnitude and math.prod(magnitude.shape) != up.shape[0]:
        raise CheckpointError(
            f"{path}: {module} has {magnitude.shape} magnitudes; expected one for each of {up.shape[0]} rows. Save it again."
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    lora = Lora(down, up, scale, magnitude if dora else None, experts)
    return {m.name: Change(lora, start, m.expert if stacked else None) for m, start in targets}


def _targets(
    module: str, shape: tuple[int, int], base: Checkpoint, places: Places, by_layer: Mapping[int, list[Matrix]]
) -> list[tuple[Matrix, int]]:
    """The matrices inside a module or a stacked parameter whose factors are for (out, in) = `shape`.

    Raises:
        PairingError: their shape is not that of the factors.
        CheckpointError: stacked experts of a family whose layout is not known.
    """
    if experts := _EXPERTS.fullmatch(plain(module)):
        if not stacks_experts(base.config):
            raise CheckpointError(
                f"the adapter changes stacked experts ({module}), and opdgeo does not know how a "
                f"{base.config.get('model_type')!r} model stacks them. Merge it into its base and compare that."
            )
        inside = sorted(by_layer.get(int(experts["layer"]), []), key=lambda m: m.name)
        # Gate above up, or down: the shape says which parameter of the module this is.
        parameters = (
            [(m, m.rows if m.role == "up_proj" else 0) for m in inside if m.role != "down_proj"],
            [(m, 0) for m in inside if m.role == "down_proj"],
        )
        return next((found for found in parameters if _shape(found) == shape), [])
    found = next((places[alias] for alias in _aliases(f"{module}.weight") if alias in places), [])
    if found and _shape(found) != shape:
        raise PairingError(
            f"the adapter changes {module} with factors for (out, in) = {shape}, which is {_shape(found)} in {base.path}. "
            "Was it trained on this base?"
        )
    return found


def _shape(inside: list[tuple[Matrix, int]]) -> tuple[int, int]:
    """(out, in) of the module that holds these matrices."""
    return max((start + m.rows for m, start in inside), default=0), inside[0][0].cols if inside else 0


def _factors(change: Change, matrix: Matrix) -> tuple[Tensor, Tensor]:
    lora, rows = change.lora, slice(change.start, change.start + matrix.rows)
    down, up = _tensor(lora.down), _tensor(lora.up)
    if change.expert is not None:  # A is stacked by expert and rank, B by rank and expert
        down = down.reshape(lora.experts, -1, down.shape[1])[change.expert]
        up = up.reshape(up.shape[0], -1, lora.experts)[:, :, change.expert]
    return up[rows].double() * lora.scale, down.double().T.contiguous()


def _patterns(config: dict[str, Any], name: str, path: Path) -> Patterns:
    values = config.get(name) or {}
    try:
        return Patterns(values if isinstance(values, dict) else dict(values))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / CONFIG} has no usable {name}: {error}. Write the modules' names out."
        ) from error


def _by_pattern(config: dict[str, Any], patterns: Patterns, default: str, key: str, path: Path) -> float:
    """The first entry of a pattern whose regular expression ends the module's name, else the general value."""
    try:
        found = patterns.find(key)
        value = float(config[default] if found is None else found)
        if not math.isfinite(value):
            raise ValueError(f"it is {value}")
        return value
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path / CONFIG} has no usable {default} or pattern of it for {key}: {error}."
        ) from error


def _aliases(name: str) -> Iterable[str]:
    """A tensor's name as a model or its language model without a head would store it."""
    yield (own := plain(name))
    for outer in ("model.", "transformer."):
        if own.startswith(outer):
            yield own.removeprefix(outer)
        else:
            yield outer + own


def _in_base(name: str, base: Checkpoint) -> str | None:
    return next((alias for alias in _aliases(name) if alias in base.tensors), None)


def _notes(config: dict[str, Any], base: Checkpoint, changes: dict[str, Change]) -> tuple[str, ...]:
    return (*_named_base(config, base), *_rank(changes))


def _rank(changes: dict[str, Change]) -> tuple[str, ...]:
    """What its rank alone says; nothing where it limits nothing: of DoRA, whose updates are of full rank, or a rank of all directions."""
    rank = 0
    for lora in (change.lora for change in changes.values()):
        rank = max(rank, lora.down.shape[0] // lora.experts)
        if lora.magnitude or rank >= min(lora.up.shape[0], lora.down.shape[1]):
            return ()
    if not rank:
        return ()
    return (
        f"an adapter of rank {rank}: its updates have no more than {rank} directions by construction, so compare their stable and "
        f"effective rank with {rank}, not with chance",
    )


def _named_base(config: dict[str, Any], base: Checkpoint) -> tuple[str, ...]:
    named = config.get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return ()
    last = named.rstrip("/").rpartition("/")[2]
    if {last, f"models--{named.replace('/', '--')}"} & set(base.path.resolve().parts):  # a folder, or the hub's cache
        return ()
    return (printable(f"the adapter names {named} as its base; it is measured on {base.path}"),)


def _open_file(path: Path) -> dict[str, Stored]:
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{path} has {CONFIG} and no weights: expected {' or '.join(FILES)}.")
    return headers(file) if file.suffix == ".safetensors" else bin_headers(file)


def _tensor(stored: Stored) -> Tensor:
    return _known(stored)[(slice(None),) * len(stored.shape)]


def _known(stored: Stored) -> Stored:
    if stored.dtype not in SIZES:
        raise CheckpointError(f"a tensor in {stored.files[0]} is {stored.dtype}; expected {', '.join(SIZES)}.")
    return stored

"""Pairing the matrices of two checkpoints by exact name; what does not pair is reported, never guessed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from opdgeo.checkpoints.checkpoint import Checkpoint
from opdgeo.checkpoints.names import ATTENTION, MLP, ROLES, Matrix, matrices, other_kind
from opdgeo.errors import CheckpointError, ConfigError, PairingError

MOST = 1_000_000  # matrices of a model


@dataclass(frozen=True)
class Pairing:
    """The matrices to measure and an account of every other tensor."""

    matrices: list[Matrix]
    base_only: list[str] = field(default_factory=list)
    tuned_only: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)  # stored on one side, tied to the embedding on the other
    not_selected: dict[str, int] = field(default_factory=dict)  # kind or role -> tensors
    unrecognised: list[str] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)  # of `matrices`, those that will be skipped -> the reason

    def to_json(self) -> dict[str, Any]:
        return {
            "measured": len(self.matrices),
            "base_only": self.base_only,
            "tuned_only": self.tuned_only,
            "tied": self.tied,
            "not_selected": self.not_selected,
            "unrecognised": self.unrecognised,
            "unreadable": self.unreadable,
        }


def select_roles(text: str) -> set[str]:
    """The roles named by ``--roles``: "all", "attention", "mlp" and role names, comma-separated.

    Raises:
        ConfigError: an unknown name.
    """
    groups = {"all": ROLES, "attention": ATTENTION, "mlp": MLP, **{r: (r,) for r in ROLES}}
    chosen: set[str] = set()
    for name in text.split(","):
        if name.strip() not in groups:
            raise ConfigError(f"--roles names {name.strip()!r}; expected some of {', '.join(groups)}.")
        chosen.update(groups[name.strip()])
    return chosen


def pair(base: Checkpoint, tuned: Checkpoint, roles: str = "all") -> Pairing:
    """Pair two checkpoints.

    A tensor that is not measured may differ in shape, as a vocabulary does that has grown: it is counted as such.

    Raises:
        PairingError: different architectures, a matrix whose shape differs (both sides are named), or nothing to measure.
        CheckpointError: no matrix of those to measure is stored as plain numbers.
        ConfigError: an unknown role.
    """
    chosen = select_roles(roles)
    kinds = [c.config.get("model_type") for c in (base, tuned)]
    # A multimodal model and its text-only sibling have two types and the same language model: shapes decide.
    siblings = ("text_config" in base.config) != ("text_config" in tuned.config)
    if kinds[0] and kinds[1] and kinds[0] != kinds[1] and not siblings:
        raise PairingError(
            f"two architectures: {base.path} is {kinds[0]!r}, {tuned.path} is {kinds[1]!r}; expected the same model "
            "before and after training."
        )
    only = {name: base for name in base.tensors.keys() - tuned.tensors.keys()}
    only |= {name: tuned for name in tuned.tensors.keys() - base.tensors.keys()}
    tied = [
        n
        for n, c in only.items()
        if other_kind(n) == "head" and (tuned if c is base else base).config.get("tie_word_embeddings")
    ]

    measured: list[Matrix] = []
    not_selected: Counter[str] = Counter()
    unrecognised: list[str] = []
    for name in base.tensors.keys() & tuned.tensors.keys():
        ours, theirs = base.tensors[name].shape, tuned.tensors[name].shape
        found = matrices(name, ours, base.config)
        if ours != theirs:
            both = [*(found or []), *(matrices(name, theirs, base.config) or [])]
            if any(matrix.role in chosen for matrix in both):
                raise PairingError(
                    f"{name} is {_shape(ours)} in {base.path} and {_shape(theirs)} in {tuned.path}; expected equal shapes. "
                    "Are these two checkpoints of the same model?"
                )
            kind = other_kind(name) or (both[0].role if both else None)
            if kind:
                not_selected[f"{kind} of another shape"] += 1
            else:
                unrecognised.append(name)
            continue
        if found is None:
            kind = other_kind(name)
            if kind:
                not_selected[kind] += 1
            else:
                unrecognised.append(name)
        elif not found:
            not_selected["empty"] += 1
        if len(measured) > MOST:
            raise PairingError(f"{base.path} holds more than {MOST} matrices; expected a language model's.")
        for matrix in found or []:
            if matrix.role not in chosen:
                not_selected[matrix.role] += 1
            elif matrix.rows and matrix.cols:
                measured.append(matrix)
            else:
                not_selected["empty"] += 1
    if not measured:
        raise PairingError(
            f"no linear weight of the roles {', '.join(r for r in ROLES if r in chosen)} stands in both {base.path} and {tuned.path}; "
            f"the first has {_some(base)}, the second {_some(tuned)}. Are these two checkpoints of the same model?"
        )
    unreadable = {
        m.name: reason for m in measured if (reason := base.unreadable(m.tensor) or tuned.unreadable(m.tensor))
    }
    if len(unreadable) == len(measured):
        raise CheckpointError(f"none of {len(measured)} matrices can be read: {next(iter(unreadable.values()))}")
    measured.sort(key=lambda m: (m.layer, ROLES.index(m.role), -1 if m.expert is None else m.expert, m.name))
    return Pairing(
        measured,
        base_only=sorted(n for n, c in only.items() if c is base and n not in tied),
        tuned_only=sorted(n for n, c in only.items() if c is tuned and n not in tied),
        tied=sorted(tied),
        not_selected=dict(sorted(not_selected.items())),
        unrecognised=sorted(unrecognised),
        unreadable=unreadable,
    )


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "a scalar"


def _some(checkpoint: Checkpoint) -> str:
    names = sorted(checkpoint.tensors)
    return f"{len(names)} tensors such as {', '.join(names[:2])}"

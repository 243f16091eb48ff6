"""The channel of an update. For every matrix it is the subspace of the leading singular directions of ΔW.

    channel = Channel.extract("base", "run/step-000020", k=16)     # V_K of every matrix, from two checkpoints
    channel.save("channel.safetensors")
    channel.energy_inside("base", "run/step-000100")               # does the later update stay there?
    channel.to_adapter("base", "adapter")                          # a PEFT LoRA whose A is Vᵀ

PAPER: "On the Geometry of On-Policy Distillation", §4, projected training. A *right* channel V (cols, K) acts as ΔW V Vᵀ, a
*left* one U (rows, K) as U Uᵀ ΔW. With K = 0 nothing may move. `constrain.py` holds training in a channel.
"""

from __future__ import annotations

import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opdgeo.checkpoints import Checkpoint, Matrix, open_checkpoint, pair
from opdgeo.diagnostics import Base, Settings, Update
from opdgeo.diagnostics.update import LowRankUpdate
from opdgeo.errors import CheckpointError, ConfigError, NumericsError, PairingError, printable
from opdgeo.numerics import subspaces
from opdgeo.numerics.spectra import LowRankMatrix, Spectrum, principal_angles, truncated_svd
from opdgeo.numerics.subspaces import Side

log = logging.getLogger(__name__)
FILE = "channel.safetensors"
FORMAT = "opdgeo channel 1"
Choice = int | float | Literal["stable_rank"]
"""K of a matrix: a whole number; a share in (0, 1), the fewest directions that hold so much of ‖ΔW‖²_F; or "stable_rank",
the largest whole number up to ‖ΔW‖²_F/σ₁², at least 1."""


@dataclass(frozen=True)
class Subspace:
    """The channel of one matrix.

    Attributes:
        matrix: which one, and where it stands in its stored tensor.
        basis: (cols, K) for a right channel, (rows, K) for a left one; orthonormal columns, float32, K ≥ 0.
        inside: share of ‖ΔW‖²_F inside, of the update that it was extracted from. None for a random channel, and for a matrix
            that did not move.
        gap: (σ_K − σ_K+1)/σ_K of that update. Where it is small, rounding decides the subspace. None where `inside` is None
            or K = 0.
        error: bound on sin Θ between `basis` and the exact subspace.
    """

    matrix: Matrix
    basis: Tensor
    inside: float | None = None
    gap: float | None = None
    error: float | None = None

    @property
    def k(self) -> int:
        return self.basis.shape[1]


@dataclass(frozen=True)
class Channel:
    """Subspaces by matrix name, all of one side.

    Attributes:
        side: "right" or "left".
        subspaces: matrix name (as in the `matrix` column of measurements) → its subspace.
        source: what it was made from: paths, choice of K, seed; JSON values.
    """

    side: Side
    subspaces: dict[str, Subspace]
    source: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.subspaces)

    def __repr__(self) -> str:
        ks = sorted({s.k for s in self.subspaces.values()})
        directions = f"K={ks[0]}" if len(ks) == 1 else f"K={ks[0]}–{ks[-1]}" if ks else "empty"
        ends = [self.source.get(end) for end in ("base", "tuned")]
        origin = f"from {ends[0]} → {ends[1]}" if all(ends) else ", ".join(f"{k}={v!r}" for k, v in self.source.items())
        return f"Channel({self.side}, {len(self)} matrices, {directions}, {origin})"

    def __getitem__(self, name: str) -> Subspace:
        try:
            return self.subspaces[name]
        except KeyError:
            raise ConfigError(
                f"the channel has no matrix {name!r}; expected one of its {len(self)}, such as {next(iter(self.subspaces), None)!r}."
            ) from None

    @classmethod
    def extract(
        cls,
        base: str | Path | Checkpoint,
        tuned: str | Path | Checkpoint,
        k: Choice = 16,
        side: Side = "right",
        roles: str = "all",
        progress: Callable[[list[Matrix]], Iterable[Matrix]] | None = None,
    ) -> Channel:
        """The top-K singular subspace of ΔW for every matrix of the chosen roles.

        K is cut to the rank of ΔW as stored, up to float64 rounding; a matrix that did not move gets K = 0. A warning says where the
        channel holds every direction, and so nothing back.

        Args:
            k: see `Choice`.
            side: "right" (directions of the inputs) or "left" (of the outputs).
            roles: as for `--roles`.
            progress: wraps the list of matrices, such as `rich.progress.track`.

        Raises:
            PairingError: two checkpoints of different models.
            NumericsError: a matrix with entries that are not finite.
            ConfigError: a `k`, side or role that does not exist.
        """
        _check_choice(k)
        _check_side(side)
        opened = _open(base)
        tuned = _open(tuned, opened)
        found: dict[str, Subspace] = {}
        matrices = pair(opened, tuned, roles).matrices
        for matrix in progress(matrices) if progress else matrices:
            found[matrix.name] = _subspace(matrix, _update(opened, tuned, matrix), k, side)
        if whole := [s for s in found.values() if s.k == s.basis.shape[0]]:
            first = whole[0]
            log.warning(
                "k is %s: all %d directions of %s are in the channel, and so of %d of %d matrices. There it holds nothing back; give a "
                "smaller k.",
                *(k, first.k, printable(first.matrix.name), len(whole), len(found)),
            )
        return cls(side, found, {"base": str(opened.path), "tuned": str(tuned.path), "k": k})

    @classmethod
    def random(cls, like: Channel, seed: int) -> Channel:
        """A uniformly distributed channel with the matrices, the side and every K of `like`: the control for a found one.

        The directions of a matrix depend on the seed and on its name, and on nothing else.
        """
        found = {}
        for name, of in like.subspaces.items():
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            basis = torch.linalg.qr(torch.randn(of.basis.shape, generator=rng, dtype=torch.float64)).Q
            found[name] = Subspace(of.matrix, basis.float(), error=0.0)
        return cls(like.side, found, {"random": seed, "like": like.source})

    def cut(self, k: int) -> Channel:
        """The leading min(k, K) directions of every matrix; `cut(0)` freezes them all."""
        _check_choice(k)
        kept = {
            n: s if k >= s.k else Subspace(s.matrix, s.basis[:, :k].contiguous()) for n, s in self.subspaces.items()
        }
        return replace(self, subspaces=kept, source={"cut": k, "of": self.source})

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file in one atomic step. A path without that suffix is a folder for it."""
        path = _file(Path(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            name: {**asdict(s.matrix), "inside": s.inside, "gap": s.gap, "error": s.error}
            for name, s in self.subspaces.items()
        }
        about = {"format": FORMAT, "side": self.side, "source": json.dumps(self.source), "matrices": json.dumps(facts)}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            save_file({name: s.basis.contiguous() for name, s in self.subspaces.items()}, partial, metadata=about)
            partial.replace(path)
        except SafetensorError as error:
            raise ConfigError(f"{path} cannot be written ({error}); expected room for it on its disk.") from error
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Channel:
        """Read what `save` wrote. Law: it equals what was saved.

        Raises:
            CheckpointError: no such file, not a channel, or bases that are not finite and orthonormal.
        """
        path = _file(Path(path))
        if not path.is_file():
            raise CheckpointError(
                f"there is no channel {path}; expected a file that `opdgeo channel BASE CKPT -o DIR` writes. Check the path."
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ValueError(f"its format is {about.get('format')!r} and not {FORMAT!r}")
                side, source = about["side"], json.loads(about["source"])
                _check_side(side)
                found = {}
                for name, facts in json.loads(about["matrices"]).items():
                    matrix = Matrix(**{f.name: facts[f.name] for f in fields(Matrix)})
                    of = Subspace(matrix, file.get_tensor(name), facts["inside"], facts["gap"], facts["error"])
                    _check_basis(of, side)
                    found[name] = of
        except (
            SafetensorError,
            OSError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
            ConfigError,
        ) as error:
            raise CheckpointError(f"{path} is not a readable channel: {error}. Extract it again.") from error
        return cls(side, found, source)

    def project(self, name: str, matrix: Tensor) -> Tensor:
        """The part of a (rows, cols) matrix inside the channel: M V Vᵀ or U Uᵀ M, in its own dtype.

        Law: projecting twice equals once; the share of a projected matrix inside is 1.
        """
        of = self[name]
        if tuple(matrix.shape) != (of.matrix.rows, of.matrix.cols):
            raise PairingError(
                f"{name} is {of.matrix.rows}×{of.matrix.cols} in the channel and {'×'.join(map(str, matrix.shape))} here; "
                "expected equal shapes. Was the channel made from the same model?"
            )
        return subspaces.project(matrix, of.basis.to(matrix), self.side)

    def energy_outside(self, base: str | Path | Checkpoint, tuned: str | Path | Checkpoint) -> dict[str, float | None]:
        """‖ΔW(I − VVᵀ)‖²_F / ‖ΔW‖²_F of every matrix of the channel, in float64 from the stored weights.

        None where a matrix did not move; 1 where it moved and K = 0. Raises as `extract`.
        """
        opened = _open(base)
        tuned = _open(tuned, opened)
        there = {m.name: m for m in pair(opened, tuned).matrices}
        shares: dict[str, float | None] = {}
        for name, of in self.subspaces.items():
            matrix = there.get(name)
            if matrix is None or (matrix.rows, matrix.cols) != (of.matrix.rows, of.matrix.cols):
                raise PairingError(
                    f"the channel's {name} ({of.matrix.rows}×{of.matrix.cols}) is not in {opened.path} and {tuned.path}; expected "
                    "checkpoints of the model that the channel was made from."
                )
            update = _update(opened, tuned, matrix)
            shares[name] = (
                subspaces.share_outside(update.delta, subspaces.orthonormal(of.basis), self.side)
                if update.moved
                else None
            )
        return shares

    def energy_inside(self, base: str | Path | Checkpoint, tuned: str | Path | Checkpoint) -> dict[str, float | None]:
        """1 − `energy_outside`: the share of the update's energy inside. Chance is K/cols (right) or K/rows (left)."""
        outside = self.energy_outside(base, tuned)
        return {name: None if share is None else 1 - share for name, share in outside.items()}

    def compare(self, other: Channel) -> dict[str, Tensor]:
        """Principal angles in degrees, ascending, min(K, K') of them, for every matrix that both channels have.

        Raises:
            PairingError: channels of two sides, or of matrices with different shapes, or with no matrix in common.
        """
        if self.side != other.side:
            raise PairingError(f"a {self.side} and a {other.side} channel have no angles; expected the same side.")
        angles = {}
        for name in (n for n in self.subspaces if n in other.subspaces):
            larger, smaller = sorted((self[name].basis, other[name].basis), key=lambda b: -b.shape[1])
            if larger.shape[0] != smaller.shape[0]:
                raise PairingError(
                    f"{name} has {larger.shape[0]} and {smaller.shape[0]} dimensions; expected the same."
                )
            found = larger.new_empty(0, dtype=torch.float64)
            if smaller.shape[1]:
                found = principal_angles(subspaces.orthonormal(larger), subspaces.orthonormal(smaller))
            angles[name] = torch.rad2deg(found)
        if not angles:
            raise PairingError("the two channels have no matrix in common; expected channels of the same model.")
        return angles

    def to_adapter(self, base: str | Path, folder: str | Path, factors: Mapping[str, Tensor] | None = None) -> Path:
        """Write the channel as a PEFT LoRA adapter of `base`: A = Vᵀ, scale 1, and B = 0, so that it changes nothing yet.

        `factors` gives other B (rows, K) by tensor name.

        Where A is frozen in training (`constrain.freeze_directions`), ΔW = B Vᵀ stays in the channel exactly. Matrices with
        K = 0 are left out, which freezes them. Only right channels of plain linear layers have an adapter.

        Raises:
            ConfigError: a left channel, fused or stacked matrices, or K = 0 everywhere.
        """
        config, folder = self.adapter_config(base), Path(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        (partial / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors, factors = {}, factors or {}
        for s in self.open():
            module = f"base_model.model.{s.matrix.tensor.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = s.basis.T.contiguous()
            given = factors.get(s.matrix.tensor)
            tensors[f"{module}.lora_B.weight"] = (
                torch.zeros(s.matrix.rows, s.k) if given is None else given.contiguous()
            )
        save_file(tensors, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        folder.mkdir(exist_ok=True)
        for written in partial.iterdir():
            written.replace(folder / written.name)
        partial.rmdir()
        return folder

    def adapter_config(self, base: str | Path) -> dict[str, Any]:
        """PEFT's adapter_config.json: LoRA of rank K and scale 1 for every matrix with K > 0, by its full module name.

        Raises:
            ConfigError: as `to_adapter`.
        """
        if self.side != "right":
            raise ConfigError(
                "a left channel has no adapter with a frozen A; expected a right one. Extract it with --side right."
            )
        if fused := [s.matrix.name for s in self.open() if s.matrix.name != s.matrix.tensor or s.matrix.stacked]:
            raise ConfigError(
                f"{fused[0]} is a part of a larger tensor, for which one adapter cannot hold several channels; expected linear "
                "layers of their own. Constrain this model with `gradient` or `update`."
            )
        ranks = {s.matrix.tensor.removesuffix(".weight"): s.k for s in self.open()}
        if not ranks:
            raise ConfigError("every K of the channel is 0, so an adapter would be empty; expected K ≥ 1 somewhere.")
        usual = max(set(ranks.values()), key=list(ranks.values()).count)
        others = {name: k for name, k in ranks.items() if k != usual}
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "inference_mode": True,
            "r": usual,
            "lora_alpha": usual,
            "rank_pattern": others,
            "alpha_pattern": others,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "target_modules": sorted(ranks),
            "fan_in_fan_out": any(s.matrix.transposed for s in self.open()),
        }

    def open(self) -> list[Subspace]:
        """The subspaces with K > 0: the matrices that may move."""
        return [s for s in self.subspaces.values() if s.k]

    def table(self) -> list[dict[str, Any]]:
        """One row for each role and one for all: number of matrices, smallest and largest K, mean share inside, chance, smallest gap."""
        rows = []
        roles = list(dict.fromkeys(s.matrix.role for s in self.subspaces.values()))
        for role in (*roles, "all"):
            of = [s for s in self.subspaces.values() if role in (s.matrix.role, "all")]
            inside = [s.inside for s in of if s.inside is not None]
            gaps = [s.gap for s in of if s.gap is not None]
            rows.append(
                {
                    "role": role,
                    "matrices": len(of),
                    "k": (min(s.k for s in of), max(s.k for s in of)),
                    "inside": sum(inside) / len(inside) if inside else None,
                    "chance": sum(s.k / s.basis.shape[0] for s in of) / len(of),
                    "gap": min(gaps) if gaps else None,
                }
            )
        return rows


def _update(base: Checkpoint, tuned: Checkpoint, matrix: Matrix) -> Update:
    before, factors = base.read(matrix), tuned.factors(matrix)
    origin = Base(before, Settings())
    update = LowRankUpdate(origin, LowRankMatrix(*factors)) if factors else Update(origin, tuned.read(matrix))
    if not bool(torch.isfinite(before).all() and torch.isfinite(update.weights).all()):
        raise NumericsError(f"{matrix.name} has entries that are not finite in {base.path} or {tuned.path}.")
    return update


def _subspace(matrix: Matrix, update: Update, k: Choice, side: Side) -> Subspace:
    size = matrix.cols if side == "right" else matrix.rows
    if k == 0 or not update.moved:
        return Subspace(matrix, torch.zeros(size, 0), 0.0 if update.moved else None, None, 0.0)
    smaller = min(matrix.rows, matrix.cols)
    asked = min(k, smaller) if isinstance(k, int) else min(16, smaller)
    while True:
        spectrum = truncated_svd(update.delta, asked, angle=1e-5)
        energy = (spectrum.sigma[:asked] / update.norm).square().cumsum(0)
        if not isinstance(k, float) or float(energy[-1]) >= k or asked == smaller:
            break
        asked = min(2 * asked, smaller)
    if isinstance(k, int):
        chosen = asked
    elif isinstance(k, float):
        chosen = min(asked, int((energy < k).sum()) + 1)
    else:
        chosen = max(1, int((update.norm / float(spectrum.sigma[0])) ** 2 * (1 + 1e-9)))
        if chosen > asked:
            spectrum = truncated_svd(update.delta, chosen, angle=1e-5)
    chosen = min(chosen, int((spectrum.sigma > spectrum.errors[: len(spectrum.sigma)]).sum()))
    basis = (spectrum.right if side == "right" else spectrum.left)[:, :chosen]
    return Subspace(
        matrix,
        basis.float().contiguous(),
        min(1.0, float((spectrum.sigma[:chosen] / update.norm).square().sum())),
        _gap(spectrum, chosen),
        spectrum.subspace_error(chosen, side),
    )


def _gap(spectrum: Spectrum, k: int) -> float | None:
    if k == 0:
        return None
    above = float(spectrum.sigma[k - 1])
    return max(0.0, above - spectrum.below(k)) / above


def _open(checkpoint: str | Path | Checkpoint, base: Checkpoint | None = None) -> Checkpoint:
    return checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint, base)


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE


def _check_choice(k: Any) -> None:
    whole = isinstance(k, int) and not isinstance(k, bool) and k >= 0
    if not (whole or (isinstance(k, float) and 0 < k < 1) or k == "stable_rank"):
        raise ConfigError(
            f"k is {k!r}; expected a whole number of at least 0, a share of the energy between 0 and 1, or 'stable_rank'."
        )


def _check_side(side: Any) -> None:
    if side not in ("right", "left"):
        raise ConfigError(f"side is {side!r}; expected 'right' or 'left'.")


def _check_basis(of: Subspace, side: Side) -> None:
    size = of.matrix.cols if side == "right" else of.matrix.rows
    if of.basis.dtype != torch.float32 or of.basis.dim() != 2 or of.basis.shape[0] != size or of.k > size:
        raise ValueError(f"{of.matrix.name} has a basis of shape {tuple(of.basis.shape)} in {of.basis.dtype}")
    gram = of.basis.double().T @ of.basis.double()
    if of.k and not float((gram - torch.eye(of.k, dtype=torch.float64)).abs().max()) <= 1e-5:
        raise ValueError(f"the basis of {of.matrix.name} is not orthonormal")


def parse_choice(text: str) -> Choice:
    """`-k` of the command line: 16, 0.9 or stable_rank.

    Raises:
        ConfigError: anything else.
    """
    for kind in (int, float):
        try:
            k: Any = kind(text)
        except ValueError:
            continue
        break
    else:
        k = text.replace("-", "_")
    _check_choice(k)
    return k

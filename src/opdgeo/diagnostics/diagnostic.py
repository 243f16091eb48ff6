"""What a diagnostic is: one frozen object that says how it is computed, read and shown.

Everything else in the package asks these objects and names none of them: the loop over matrices, the summary, the report,
the claims and the live monitor. A new diagnostic is one file with one such object, and its name in `diagnostics.NAMES`.

This file and the diagnostics' own files import no torch at the top. Titles and formulas are there at once for the terminal
and the page; the functions that compute import what they need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from opdgeo.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np

    from opdgeo.numerics.spectra import Spectrum

PAPER = "arXiv 2606.07082"
UNMOVED = "the matrix did not move"
ONE_UNMOVED = "one of the two updates did not move"
NO_VISIBLE = "no entry moved visibly in bf16"

Null = dict[str, tuple[float, float]]
"""Variant → mean and standard deviation of a null model. A variant that is not in it has no closed form here."""

NONE = (math.nan, math.nan)
"""The null of a variant that has no value under the null model."""


@dataclass(frozen=True)
class Settings:
    """What the diagnostics are asked for. It is saved beside the results.

    Raises:
        ConfigError: a value outside its range.
    """

    rank: int = 512  # principal angles, PAPER §2
    top_k: int = 16  # singular triplets of ΔW: Hill exponent, subspace similarity
    mask_rank: int = 64  # rank of W₀'s reconstruction behind the principal mask; principal energy
    mask_share: tuple[float, ...] = (0.5, 0.3)
    eta: float = 1e-3
    nulls: int = 4  # draws per matrix
    null: str = "gaussian"  # or "shuffled"

    def __post_init__(self) -> None:
        for name in ("rank", "top_k", "mask_rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a whole number of at least 1.")
        if self.nulls < 0:
            raise ConfigError(f"nulls is {self.nulls}; expected 0 (none) or more draws.")
        if self.null not in ("gaussian", "shuffled"):
            raise ConfigError(f"null is {self.null!r}; expected 'gaussian' or 'shuffled'.")
        if not 0 <= self.eta < 1:
            raise ConfigError(f"eta is {self.eta}; expected a relative tolerance in [0, 1), such as 1e-3.")
        if not self.mask_share or not all(0 < share < 1 for share in self.mask_share):
            raise ConfigError(f"mask_share is {self.mask_share}; expected shares between 0 and 1, such as 0.5,0.3.")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Value:
    """A number that knows what it is. `error` bounds |value − exact|; `reason` says why a row is not plain."""

    value: float | None
    error: float | None = None
    method: str = ""
    status: str = "computed"
    reason: str | None = None


def undefined(reason: str) -> Value:
    """A quantity that has no value for this matrix."""
    return Value(None, status="undefined", reason=reason)


def skipped(reason: str) -> Value:
    """A quantity that could not be computed for this matrix."""
    return Value(None, status="skipped", reason=reason)


def undetermined(k: int) -> str:
    return f"the gap between singular values {k} and {k + 1} vanishes, so the subspace is not determined"


def unresolved(of: Spectrum, k: int, side: str) -> str | None:
    """Why the top-k subspace of an update is not determined; None where it is."""
    if k >= (of.left if side == "left" else of.right).shape[0]:  # the whole space
        return None
    if of.floor > 0 and float(of.sigma[k - 1]) <= of.floor:
        rank = int((of.sigma > of.floor).sum())
        return (
            f"singular value {k} of the update is within the rounding of the stored weights: the update is determined to rank "
            f"{rank} only"
        )
    return undetermined(k) if of.subspace_error(k, side) >= 1 else None


def cut(rank: int, shape: tuple[int, int]) -> tuple[int, str | None]:
    """The rank that a matrix of this shape allows, and what its row says where that is less than the rank asked for.

    >>> cut(16, (20, 100))
    (10, 'rank 16 cut to 10: half the smaller side')
    """
    from opdgeo.numerics.subspaces import largest_rank

    allowed = largest_rank(*shape)
    return (rank, None) if rank <= allowed else (allowed, f"rank {rank} cut to {allowed}: half the smaller side")


def mean_std(values: Iterable[Any]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 of a single value)."""
    known = [float(v) for v in values]
    largest = max(map(abs, known))
    # Divided by a power of two, which changes no digit: squares overflow nowhere.
    power = math.frexp(largest)[1] if math.isfinite(largest) else 0
    known = [math.ldexp(v, -power) for v in known]
    mean = math.fsum(known) / len(known)
    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / max(1, len(known) - 1))
    return 2 * math.ldexp(mean, power - 1), 2 * math.ldexp(spread, power - 1)


def _one(settings: Settings) -> list[str]:
    return [""]


def _sampled(against: Any) -> Null:
    return {}


def _as_it_is(variant: str) -> str:
    return variant


def _every(variant: str) -> bool:
    return True


def _none_else(variant: str, measured: Iterable[str]) -> list[str]:
    return []


def _nothing(mean: float) -> str | None:
    return None


Part = str | tuple[float | None, str]
"""A part of a sentence: words, or a number with its unit."""


@dataclass(frozen=True)
class Headline:
    """How a diagnostic appears in the first lines of a report.

    Attributes:
        variant: the variant that is meant.
        column: the head of its column in the table of arms.
        clause: a part of a sentence with one `{}` for the value, and of a pair `{variant}` for the words of its variant; empty: it is not in the sentence.
        beside: a part of a sentence with one `{}` for the value of the null; empty: the null is not in the sentence.
    """

    variant: str
    column: str
    clause: str = ""
    beside: str = ""


@dataclass(frozen=True)
class Live:
    """A number that the live monitor logs: the mean over matrices of a variant, which `variant` is the beginning of.

    `complement` logs 1 − mean.
    """

    name: str
    variant: str = ""
    complement: bool = False


@dataclass(frozen=True)
class Published:
    """What the paper reports of Qwen3-8B after training.

    Attributes:
        variant, paradigm, value: of which variant, under which objective, and what.
        norm: ‖ΔW‖_F of a matrix.
        null: what an isotropic update of that norm has in Gaussian weights of standard deviation 0.02 and 0.03 (docs/paper.md, §5).
    """

    variant: str
    paradigm: str
    value: float
    norm: float
    null: tuple[float, float] | None = None

    @property
    def relative_norm(self) -> tuple[float, float]:
        """‖ΔW‖_F / ‖W₀‖_F of a 4096 × 4096 matrix of standard deviation 0.03, and of one of 0.02."""
        return self.norm / (0.03 * 4096), self.norm / (0.02 * 4096)


def published(
    variant: str, values: tuple[float, ...], nulls: tuple[tuple[float, float], ...] | None = None
) -> tuple[Published, ...]:
    """Of SFT, OPD and RLVR, with the norms that the paper reports."""
    of = zip(("sft", "opd", "rlvr"), values, (4.701, 0.452, 0.168), nulls or (None,) * 3, strict=True)
    return tuple(Published(variant, paradigm, value, norm, null) for paradigm, value, norm, null in of)


@dataclass(frozen=True)
class Panel:
    """A chart of one run with one line for every rank K. `rank` gives the K of a variant, None for one that is not in it."""

    name: str
    title: str
    rank: Callable[[str], int | None]


@dataclass(frozen=True)
class Matrices:
    """Arrays over the matrices of a pair, (n,) each; 0 in all of them but `value` where a matrix was skipped.

    Attributes:
        value: the diagnostic's; 0 where it has none.
        known: 1 where it has one, else 0.
        norm, other: ‖ΔW‖_F of the first update and of the second, each in a unit of its own.
        visible, visible_other, both: how many entries each moved visibly, and both; or are expected to under the null.
        entries: of the matrix.
    """

    value: np.ndarray
    known: np.ndarray
    norm: np.ndarray
    other: np.ndarray
    visible: np.ndarray
    visible_other: np.ndarray
    both: np.ndarray
    entries: np.ndarray


def share_of(part: np.ndarray, whole: float) -> np.ndarray:
    """`part` over `whole`; zeros where that is 0."""
    return part / whole if whole > 0 else part * 0


Subject = TypeVar("Subject")
Found = TypeVar("Found")
Against = TypeVar("Against")


@dataclass(frozen=True, kw_only=True)
class Diagnostic(Generic[Subject, Found, Against]):
    """One diagnostic.

    What it is:
        name: in the tables and files.
        scope: what it is measured of. "update": one ΔW. "trajectory": one matrix at all checkpoints of a run. "pair": two updates
            of one matrix. "run": the table of all matrices and checkpoints; it adds no rows and stands under its name in
            `summary.json`.
        unit: "share" (shown in per cent), "degrees" or "number".
        counts: what a number is a number of, such as "directions"; empty where it has no unit.
        weighting: how its mean over matrices is taken: every matrix counts once, or as often as it has entries.
        reads: the settings that its values depend on. Whatever asks for W₀'s or W₊'s spectrum reads `rank` and `mask_rank`;
            whatever asks for ΔW's reads `top_k`.
        variants: the names of its rows under some settings.
        measure: a value for every variant; for a run, the rows of its list.
        null: mean and standard deviation of each variant under the null model, in closed form or from draws that need no
            large matrix. What it leaves out is sampled: drawn as a matrix and measured like a real update. The null of an
            update is an isotropic Gaussian ΔW of the same Frobenius norm; that of a trajectory is a walk of independent
            increments; that of a pair, always in closed form, two independent isotropic ones.

    What a reader is told, in plain text (`_x` and `_{xy}` are subscripts, `^x` and `^{xy}` superscripts):
        title, formula, meaning, caveat, source. example: a case small enough for mental arithmetic.

    How it is shown:
        log: on a logarithmic axis.
        size: it is the size of the update itself, which the null has by construction.
        around_zero: its values lie on both sides of 0, where its null lies.
        label: a variant in words.
        listed: whether tables show a variant. The data files hold all.
        instead: the measured variants that tables show in place of a listed one that most matrices leave undefined, the best first.
        charted: the variants, by their beginnings, that have a map over layers and a chart over steps.
        leads: its chart over the size of the update stands first.
        published: the paper's own values.
        itself: the beginning of the variants that compare the last checkpoint with itself there.
        headline, live, panels: see these classes.
        doubt: an update's: why a mean over all matrices, those that did not move among them, makes it doubtful that the checkpoints
            belong together; None where it does not.

    What else it offers:
        curves: names in `curves.parquet` and how each is computed; None where this update has none.
        directions: how many leading directions of ΔW a trajectory keeps for it.
        at_the_end: a trajectory's: it compares with the last checkpoint, and is measured when all are known. Otherwise it
            is measured checkpoint by checkpoint, while ΔW is in memory.
        pair: its value for two updates, from the leading k directions of each; for the live monitor.
        pair_null: the mean of that for two points of a walk of independent increments, from the shape, the angle between the
            points (`trajectory.walk_angle`) and k.
        of: a run's: the diagnostic that it is computed from.
        answer: a run's: a sentence that answers what it asks, from the run's checkpoints in `summary.json` and its own rows there;
            None where it has nothing to say.
        directed: a pair's that tells the two updates apart, and is measured both ways: which is held against which, in words with a
            `{}` for the name of each; empty where both ways are the same.
        weights: a pair's: what each matrix counts, so that the weighted sum of its values is the value of all matrices together;
            None where there is no such value.
        since: a run's: the step from which a curve of `of` stays at or above a threshold; for the live monitor.
    """

    name: str
    scope: Literal["update", "trajectory", "pair", "run"]
    unit: Literal["share", "degrees", "number"] = "number"
    counts: str = ""
    weighting: Literal["matrices", "entries"] = "matrices"
    reads: tuple[str, ...] = ()
    variants: Callable[[Settings], list[str]] = _one
    measure: Callable[[Subject], Found]
    null: Callable[[Against], Null] = _sampled

    title: str
    formula: str
    meaning: str
    caveat: str
    source: str
    example: str = ""

    log: bool = False
    size: bool = False
    around_zero: bool = False
    label: Callable[[str], str] = _as_it_is
    listed: Callable[[str], bool] = _every
    instead: Callable[[str, Iterable[str]], list[str]] = _none_else
    charted: tuple[str, ...] = ()
    leads: bool = False
    published: tuple[Published, ...] = ()
    itself: str | None = None
    headline: Headline | None = None
    live: tuple[Live, ...] = ()
    panels: tuple[Panel, ...] = ()
    doubt: Callable[[float], str | None] = _nothing

    curves: Mapping[str, Callable[[Subject], Sequence[float | None] | None]] = field(default_factory=dict)
    directions: Callable[[Settings], int] | None = None
    at_the_end: bool = False
    pair: Callable[[Spectrum | None, Spectrum | None, int], Value] | None = None
    pair_null: Callable[[tuple[int, int], float, int], float] | None = None
    of: str | None = None
    answer: Callable[[list[dict[str, Any]], list[dict[str, Any]]], list[Part] | None] | None = None
    since: Callable[[list[int], list[float | None], float], int | None] | None = None
    directed: str = ""
    weights: Callable[[Matrices], np.ndarray] | None = None

    @property
    def ratio(self) -> bool:
        """Whether two of its values are compared by their ratio. Shares, and what lies around 0, are compared by their difference."""
        return self.size or (self.unit != "share" and not self.around_zero)

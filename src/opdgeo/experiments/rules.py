"""The claims of the paper, each with the rule that judges it. Written before any run whose results it judges.

A rule is a list of comparisons. A comparison gives one effect a seed (or one a checkpoint and seed), signed so that the claim is
positive, and asks for more than a margin, for less than the margin in size (*sameness*), or for more than it in either direction.
What may be said of the effects of several seeds is in `statistics.py`: a claim holds, is reversed, shows no difference, depends on the
regime, or is open. The kinds of comparisons (`KINDS`) are all there are, so a rule is data, and `regime.rules_hash` is its fingerprint.

A claim is judged again under controls (`CONTROLS`): with other arms in the place of the paper's, with a noise arm in the place of
each learning arm in turn, on the excess over an isotropic update of the same size, and with the arms' trajectories read where they agree
in ‖ΔW‖_F, in accuracy, or in KL from the start. The second verdict, `after_matching`, takes the controls named by
`Claim.after`: *still holds* when the claim and all of them hold, *does not* when one of these is reversed or shows no
difference, *inconclusive* otherwise.

How values are read: `claims.py`. No number is in here that a confirmatory run could have suggested; a rule that turns out to be wrong is
changed in a commit of its own that says why, with a new `VERSION`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

VERSION = 1
"""Of the protocol (docs/protocol.md)."""
FROZEN = "2026-11-27"
"""The day on which this version was fixed."""

SFT, MATCHED, OPD, RLVR = "sft", "sft-matched", "opd", "rlvr"
PARADIGMS = (SFT, MATCHED, OPD, RLVR)
COIN, RANDOM_SIGN = "coin", "opd-random-sign"
NOISE = (COIN, RANDOM_SIGN)
BAND = 1.25  # two stable ranks are "about the same", and a trajectory is "narrow", within this factor
ALPHAS = (0.75, 0.01)  # the ends of the paper's range, which C3 is about
SPARSE = ("opd-top-25", "opd-random-25")  # keeping half of the tokens lies between these and keeping all
TEACHER_TOKENS = "opd-teacher-tokens"
S1_MODES = ("gradient", "update", "adapter")


EXPLORATORY = {
    0: "the finished study (docs/results/earlier-study.md)",
    1: "the finished study",
    2: "the finished study",
    900: "the noise control beside the arms (noise.py), and the pilots of the protocol's costs",
}
"""Seeds that were looked at before the rules were fixed, and what for. No confirmatory verdict ever counts them."""


class Sample(Protocol):
    """The means over matrices of one seed, by arm."""

    chance: float
    """Expected overlap of a random mask, 0.5; 0 where values are excesses over the null."""

    def __call__(self, arm: str, when: str = "last") -> float:
        """Mean over matrices at the last or the first checkpoint."""

    def series(self, arm: str) -> np.ndarray:
        """That mean at every checkpoint."""

    def norm(self, arm: str) -> float:
        """‖ΔW‖_F at the last checkpoint."""

    def accuracy(self, arm: str) -> float:
        """Accuracy sampled at T = 1, after the last step."""


@dataclass(frozen=True)
class Quantity:
    """A number per matrix and checkpoint: the mean of some rows of `measurements.parquet` (or a column of log.jsonl)."""

    diagnostic: str
    variants: tuple[str, ...]
    unit: str
    ratio: bool  # compared as a ratio (a positive quantity without a natural upper end) or as a difference (a share)

    @property
    def name(self) -> str:
        """How reduced data call it."""
        return ".".join((self.diagnostic, "+".join(self.variants))).rstrip(".")


@dataclass(frozen=True)
class Kind:
    """What a comparison computes of one seed and what it asks for."""

    says: str
    """The comparison in words; {0}, {1} … are its arms, {margin} the margin."""
    effects: Callable[..., float | np.ndarray]
    """(sample, *arms) → the effect in the claim's direction; an array has one a checkpoint."""
    asks: Literal["more", "same", "other"] = "more"
    """more: effect above the margin. same: within ± the margin. other: beyond it in either direction."""
    log: bool = False
    """The effect is the log of a ratio, and the margin is given as a factor."""


def _contrast(m: Sample, held: str, free: str, frozen: str) -> float:
    return m.accuracy(held) - 0.8 * m.accuracy(free) - 0.2 * m.accuracy(frozen)


def _log(x: float | np.ndarray) -> Any:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log(x)


def _apart(m: Sample, arm: str, other: str) -> Any:
    """Log ratios at the shared checkpoints; not defined where there are none, as in a rehearsal."""
    ours, theirs = m.series(arm), m.series(other)
    return _log(ours / theirs) if len(ours) == len(theirs) else np.array([np.nan])


KINDS: dict[str, Kind] = {
    "difference": Kind("{1} minus {0} above {margin}", lambda m, low, high: m(high) - m(low)),
    "ratio": Kind("{1} over {0} above {margin}", lambda m, low, high: _log(m(high) / m(low)), log=True),
    "below chance": Kind("chance (0.5) minus {0} above {margin}", lambda m, arm: m.chance - m(arm)),
    "above chance": Kind("{0} minus chance (0.5) above {margin}", lambda m, arm: m(arm) - m.chance),
    "growth": Kind("{0} last over first checkpoint above {margin}", lambda m, arm: _log(m(arm) / m(arm, "first")), log=True),
    "decline": Kind("{0} first over last checkpoint above {margin}", lambda m, arm: _log(m(arm, "first") / m(arm)), log=True),
    "band": Kind("{0} at every checkpoint within a factor {margin} of the first",
                 lambda m, arm: _log(m.series(arm)[1:] / m.series(arm)[0]), "same", log=True),
    "preserved": Kind("{0} within a factor {margin} of {1} at every shared checkpoint",
                      _apart, "same", log=True),
    "changed": Kind("{0} beyond a factor {margin} of {1} at the last shared checkpoint",
                    lambda m, arm, other: _log(m(arm) / m(other)), "other", log=True),
    "alike": Kind("{0} and {1} within a factor {margin}", lambda m, arm, other: _log(m(arm) / m(other)), "same", log=True),
    "norms": Kind("{1}'s norm over {0}'s above {margin}", lambda m, low, high: _log(m.norm(high) / m.norm(low)), log=True),
    "at first": Kind("at the first checkpoint {1} minus {0} above {margin}",
                     lambda m, low, high: m(high, "first") - m(low, "first")),
    "accuracy kept": Kind("accuracy of {0} and of {1} within {margin}",
                          lambda m, held, free: m.accuracy(held) - m.accuracy(free), "same"),
    "accuracy": Kind("accuracy of {1} minus that of {0} above {margin}",
                     lambda m, low, high: m.accuracy(high) - m.accuracy(low)),
    "contrast": Kind("accuracy of {0} minus .8 of {1} minus .2 of {2} above {margin}", _contrast),
    "contrasts": Kind("the contrast of {0} (with {1}, {2}) minus that of {3} (with {4}, {5}) above {margin}",
                      lambda m, *arms: _contrast(m, *arms[:3]) - _contrast(m, *arms[3:])),
}  # fmt: skip
"""Every kind of comparison. The contrast is above 0 where four fifths of what training the matrices brings is kept."""


@dataclass(frozen=True)
class Comparison:
    kind: str
    arms: tuple[str, ...]
    margin: float
    """The smallest effect that matters; a factor where the kind is a ratio."""

    @property
    def of(self) -> Kind:
        return KINDS[self.kind]

    @property
    def text(self) -> str:
        return self.of.says.format(*map(_label, self.arms), margin=f"{self.margin:g}")

    @property
    def least(self) -> float:
        """The margin on the effect's own scale."""
        return math.log(self.margin) if self.of.log else self.margin

    def effects(self, sample: Sample) -> np.ndarray:
        """The effects of one seed (components,): one, or one a checkpoint."""
        return np.atleast_1d(np.asarray(self.of.effects(sample, *self.arms), dtype=float))


@dataclass(frozen=True)
class OwnControl:
    """Other comparisons for one claim."""

    name: str
    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True)
class Claim:
    id: str
    claim: str
    paper: str
    quantity: Quantity
    comparisons: tuple[Comparison, ...]
    at: str = "last checkpoint"
    after: tuple[str, ...] = ("equal norm", "equal norm, beyond size")
    """The controls behind `after_matching`."""
    matched: tuple[Comparison, ...] = ()
    """The comparisons under "equal norm", where they differ (L2 is itself about norms)."""
    own_controls: tuple[OwnControl, ...] = ()
    """Controls of this claim alone. A claim that has them gets no others."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Arms whose trajectories are read at common values under "equal …"; default: all arms of the claim together."""

    @property
    def rule(self) -> str:
        """The whole rule in words."""
        tests = "; ".join(c.text for c in self.comparisons)
        return (
            f"Holds when each of these is shown at 5 % over seeds; reversed, or no difference, when the opposite of one, or less than "
            f"its margin, is (Holm's correction over them); open otherwise: {tests}."
        )

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that the claim is about."""
        return tuple(dict.fromkeys(arm for c in self.comparisons for arm in c.arms))


def _label(arm: str) -> str:
    return arm.upper() if arm in PARADIGMS else arm


def difference(low: str, high: str, margin: float) -> Comparison:
    return Comparison("difference", (low, high), margin)


def ratio(low: str, high: str, margin: float) -> Comparison:
    return Comparison("ratio", (low, high), margin)


def band(arm: str, width: float) -> Comparison:
    return Comparison("band", (arm,), width)


def preserved(arm: str, other: str = OPD) -> Comparison:
    return Comparison("preserved", (arm, other), BAND)


def s1(paradigm: str, what: str) -> str:
    """The arm of experiment S1 that goes on early from `paradigm`: free, frozen, random, other, coin, half, double or a mode."""
    return f"s1-{paradigm}-{what}"


def _kept(paradigm: str, what: str) -> Comparison:
    return Comparison("accuracy kept", (s1(paradigm, what), s1(paradigm, "free")), 0.03)


def _lost(paradigm: str, what: str) -> Comparison:
    return Comparison("accuracy", (s1(paradigm, what), s1(paradigm, "free")), 0.03)


def _recovered(paradigm: str, what: str = "update") -> tuple[str, str, str]:
    return s1(paradigm, what), s1(paradigm, "free"), s1(paradigm, "frozen")


def _own_over(paradigm: str, what: str) -> Comparison:
    return Comparison("accuracy", (s1(paradigm, what), s1(paradigm, "update")), 0.01)


SPARSITY = Quantity("update_sparsity", ("bf16_eta",), "share", ratio=False)
ANGLES = Quantity("principal_angles", ("left.mean", "right.mean"), "degrees", ratio=True)
SHIFT = Quantity("spectral_shift", ("",), "number", ratio=True)
PRINCIPAL = Quantity("mask_overlap", ("principal.0.5",), "share", ratio=False)
LOW = Quantity("mask_overlap", ("low_magnitude.0.5",), "share", ratio=False)
STABLE_RANK = Quantity("stable_rank", ("",), "number", ratio=True)
HILL = Quantity("hill_exponent", ("16",), "number", ratio=True)
SIMILARITY = Quantity("subspace_similarity", ("final.16",), "share", ratio=False)
PREVIOUS = Quantity("subspace_similarity", ("previous.16",), "share", ratio=False)
NORM = Quantity("frobenius_norm", ("",), "number", ratio=True)
PERSISTENCE = Quantity("persistence", (), "number", ratio=True)
COHERENCE = Quantity("coherence", (), "number", ratio=False)
ACCURACY = Quantity("accuracy_sampled", (), "share", ratio=False)

CLAIMS = (
    Claim(
        "R1", "OPD updates fewer weights than SFT, more than RLVR (bf16-visible)",
        "unchanged: SFT 8.1 %, OPD 51.6 %, RLVR 77.2 %", SPARSITY,
        (difference(SFT, OPD, 0.02), difference(OPD, RLVR, 0.02)),
    ),
    Claim(
        "R2", "R1 holds for another teacher, another student and other data",
        "OPD variants 48.6–57.1 % unchanged, between SFT and RLVR", SPARSITY,
        (
            difference(SFT, "opd-weak-teacher", 0.02), difference("opd-weak-teacher", RLVR, 0.02),
            difference("sft-small", "opd-small", 0.02), difference("opd-small", "rlvr-small", 0.02),
            difference("sft-digits", "opd-digits", 0.02), difference("opd-digits", "rlvr-digits", 0.02),
        ),
        groups=((SFT, "opd-weak-teacher", RLVR), ("sft-small", "opd-small", "rlvr-small"),
                ("sft-digits", "opd-digits", "rlvr-digits")),
    ),
    Claim(
        "R3", "Principal subspaces rotate most under SFT, least under RLVR",
        "representative layer: SFT > 10°, OPD ≈ 1°, RLVR < 0.5°", ANGLES,
        (ratio(OPD, SFT, 1.2), ratio(RLVR, OPD, 1.2)),
    ),
    Claim(
        "R4", "Singular values drift most under SFT, least under RLVR",
        "NSS about 1e-3, 1e-4, 1e-5", SHIFT, (ratio(OPD, SFT, 1.2), ratio(RLVR, OPD, 1.2)),
    ),
    Claim(
        "R5a", "Visible updates of OPD and RLVR avoid principal weights",
        "below the random baseline", PRINCIPAL,
        (Comparison("below chance", (OPD,), 0.02), Comparison("below chance", (RLVR,), 0.02)),
    ),
    Claim(
        "R5b", "Visible updates gather on low-magnitude weights, least under SFT, most under RLVR",
        "low-magnitude overlap: SFT 31.88 %, OPD 53.59 %, RLVR 73.48 % (random 30 %)", LOW,
        (
            Comparison("above chance", (OPD,), 0.02),
            difference(SFT, OPD, 0.02), difference(OPD, RLVR, 0.02),
        ),
    ),
    Claim(
        "L1", "OPD's update stays in a narrow stable-rank band; SFT's expands; RLVR's contracts",
        "stable rank against step", STABLE_RANK,
        (band(OPD, BAND), Comparison("growth", (SFT,), 1.1), Comparison("decline", (RLVR,), 1.1)),
    ),
    Claim(
        "L2", "The narrow band is not because the update is small: OPD's norm exceeds RLVR's at about the same stable rank",
        "final Frobenius norm: SFT 4.701, OPD 0.452, RLVR 0.168", STABLE_RANK,
        (Comparison("norms", (RLVR, OPD), 1.5), Comparison("alike", (OPD, RLVR), BAND)),
        matched=(Comparison("alike", (OPD, RLVR), BAND), band(OPD, BAND)),
    ),
    Claim(
        "L3", "The spectrum's shape changes mildly under OPD, rises sharply under SFT, falls under RLVR",
        "Hill exponent under OPD 2.34 → 2.93", HILL,
        (band(OPD, 1.5), Comparison("growth", (SFT,), 1.5), Comparison("decline", (RLVR,), 1.05)),
    ),
    Claim(
        "L4", "Under OPD the final update subspace is there from the first checkpoint; SFT and RLVR reach it gradually",
        "Sim_16(t, end)", SIMILARITY,
        (Comparison("at first", (SFT, OPD), 0.05), Comparison("at first", (RLVR, OPD), 0.05)),
        at="first checkpoint",
    ),
    Claim(
        "S1", "Held early in the subspace found there, OPD keeps its accuracy and SFT loses some",
        "AIME24 avg@8: OPD 64.2 against 63.3 free; SFT 45.6 against 55.5 free", ACCURACY,
        (_kept(OPD, "update"), _lost(MATCHED, "update")),
        at="after the last step",
        after=("recovery", "own channel over a random one"),
        own_controls=(
            OwnControl("as the paper holds it", "SFT from the base, gradients projected: with Adam some of the update leaks out",
                       (_kept(OPD, "gradient"), _lost(SFT, "gradient"))),
            OwnControl("recovery", "held − .8 free − .2 frozen above 0: OPD's, and OPD's above the matched SFT's",
                       (Comparison("contrast", _recovered(OPD), 0.01),
                        Comparison("contrasts", (*_recovered(OPD), *_recovered(MATCHED)), 0.01))),
            OwnControl("own channel over a random one", "a random channel of the same K is what any K directions would recover",
                       (_own_over(OPD, "random"),)),
            OwnControl("own channel over the other's", "the matched SFT's channel, same K: is it this update's channel, or any update's?",
                       (_own_over(OPD, "other"),)),
            OwnControl("own channel over the coin's", "the channel of an update that learned nothing, same K", (_own_over(OPD, "coin"),)),
            OwnControl("matched SFT's own channel over a random one", "the same for the matched SFT", (_own_over(MATCHED, "random"),)),
            OwnControl("K over its half", "whether K, from the stable rank, is needed", (_own_over(OPD, "half"),)),
        ),
    ),
    Claim(
        "C1", "Keeping only 25 % of the tokens (top-gap or random) preserves the stable-rank trajectory",
        "stable rank against step", STABLE_RANK, tuple(preserved(arm) for arm in SPARSE),
        at="last shared checkpoint",
    ),
    Claim(
        "C2", "Teacher-generated rollouts preserve the stable-rank trajectory",
        "stable rank against step; the norm is a little larger", STABLE_RANK, (preserved(TEACHER_TOKENS),),
        at="last shared checkpoint",
    ),
    Claim(
        "C3", "Mixing in RLVR changes the stable-rank trajectory once the OPD share is small",
        "alpha 0.75, 0.5, 0.25, 0.05, 0.01", STABLE_RANK,
        (preserved("opd-alpha-0.75"), Comparison("changed", ("opd-alpha-0.01", OPD), BAND)),
        at="last shared checkpoint",
    ),
)  # fmt: skip

R5 = "Updates avoid principal weights (R5a) and gather on low-magnitude ones (R5b)"
"""Reported beside its two parts: holds when both do; reversed, or no difference, when one is; else open."""


@dataclass(frozen=True)
class Control:
    """The same rule on other content. `arms` puts arms in the place of others ("sft" also inside sft-small and the like).

    `read`: "last" as the claim does; otherwise every arm's trajectory is read on five equidistant values of a key that all
    arms reach: "norm" (‖ΔW‖_F), "accuracy" (sampled), "kl" (from the start).
    """

    name: str
    text: str
    arms: dict[str, str] = field(default_factory=dict)
    excess: bool = False
    read: str = "last"
    claims: str = r"R|L|C"
    """Which claims it applies to: a pattern for the beginning of the id."""

    def arm(self, name: str) -> str:
        """The arm that stands in for `name`: the longest key at its beginning, whole words only."""
        for key in sorted(self.arms, key=len, reverse=True):
            if re.match(rf"{re.escape(key)}(?!-matched)(-|$)", name) and (name == key or key == SFT):
                return self.arms[key] + name[len(key) :]
        return name


_MATCHED = {SFT: MATCHED}
_FOUR = r"R1|R3|R4|R5|L"


def _instead(suffix: str) -> dict[str, str]:
    return {SFT: MATCHED + suffix, OPD: OPD + suffix, RLVR: RLVR + suffix}


CONTROLS = (
    Control("matched SFT", "OPD's start, learning rate, steps and sequences", _MATCHED),
    Control("beyond size", "the excess over the null in place of the value", excess=True),
    Control("equal norm", "matched SFT, and trajectories read where ‖ΔW‖_F agrees", _MATCHED, read="norm"),
    Control("equal norm, beyond size", "the same, with the excess over the null in place of the value", _MATCHED, True, "norm"),
    Control("equal accuracy", "matched SFT, and trajectories read where the sampled accuracy agrees", _MATCHED, read="accuracy"),
    Control("equal KL from the start", "matched SFT, and trajectories read where KL(student ‖ start) agrees", _MATCHED, read="kl"),
    Control("SGD", "plain SGD in place of Adam, matched SFT", _instead("-sgd"), claims=_FOUR),
    Control("bf16 weights", "weights and moments in bf16 in place of fp32 masters, matched SFT", _instead("-bf16"), claims=_FOUR),
    Control("clipped gradients", "gradient norms clipped at 1, matched SFT", _instead("-clip"), claims=_FOUR),
    Control("full reverse KL", "OPD by KL(student ‖ teacher) over the vocabulary, matched SFT",
            {SFT: MATCHED, OPD: "opd-reverse-kl"}, claims=_FOUR),
    Control("forward KL", "OPD by KL(teacher ‖ student) over the vocabulary, matched SFT",
            {SFT: MATCHED, OPD: "opd-forward-kl"}, claims=_FOUR),
    Control("SFT on own samples", "the student's own correct samples, SFT loss, in SFT's place", {SFT: "sft-own-samples"}, claims=_FOUR),
    *(Control(f"noise in {_label(arm)}'s place", f"matched SFT, and {noise} in the place of {_label(arm)}", {SFT: MATCHED} | {arm: noise},
              claims=_FOUR + "|C")
      for arm, noise in ((OPD, RANDOM_SIGN), (RLVR, COIN), (SFT, RANDOM_SIGN))),
)  # fmt: skip
QUANTITIES = (SPARSITY, ANGLES, SHIFT, PRINCIPAL, LOW, STABLE_RANK, HILL, SIMILARITY, PREVIOUS, NORM)

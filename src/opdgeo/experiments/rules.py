"""The claims of the paper (PAPER §1), each with the rule that judges it. Written before any run whose results it judges.

A rule is a list of comparisons. A comparison has a statistic (a difference, a ratio or a width of means over seeds and
matrices, or a difference of accuracies), a 95 % bootstrap interval, and a required size. It is met when the whole interval
is beyond the required size, missed when the whole interval falls short of it, open otherwise. A claim holds when every
comparison is met, fails when one is missed, and is inconclusive otherwise.

A claim is then judged again under controls (`CONTROLS`): with other arms in the place of the paper's, on the excess over an
isotropic update of the same size, and with the arms' trajectories read where they agree in ‖ΔW‖_F, in accuracy, or in KL from
the start. The second verdict, `after_matching`, takes the controls named by `Claim.after`: *still holds* when the claim
and all of them hold, *does not* when one of these fails, *inconclusive* otherwise.

How the statistics are computed: `claims.py`. No number is in here that a run could have suggested; a rule that turns out to be
wrong is changed in a commit of its own that says why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

SFT, MATCHED, OPD, RLVR = "sft", "sft-matched", "opd", "rlvr"
PARADIGMS = (SFT, MATCHED, OPD, RLVR)
BAND = 1.25  # two stable ranks are "about the same", and a trajectory is "narrow", within this factor
ALPHAS = (0.75, 0.5, 0.25, 0.05, 0.01)
SPARSE = tuple(f"opd-{choice}-{share}" for choice in ("top", "random") for share in (50, 25))
TEACHER_TOKENS = "opd-teacher-tokens"
S1_MODES = ("gradient", "update", "adapter")


EXPLORATORY = {
    900: "the noise control beside the arms, before the protocol (noise.py)",
}
"""Seeds that were looked at before rules were written, and what for. No verdict ever counts them."""


class Sample(Protocol):
    """The means of one bootstrap resample (the first is the data itself), by arm."""

    chance: float
    """Expected overlap of a random mask, 0.5; 0 where values are excesses over the null."""

    def __call__(self, arm: str, when: str = "last") -> float:
        """Mean over seeds and matrices at the last or the first checkpoint."""

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


@dataclass(frozen=True)
class Comparison:
    """Met where `value` of a sample is above `required` (below it, with `below`)."""

    text: str
    arms: tuple[str, ...]
    value: Callable[[Sample], float]
    required: float
    below: bool = False


@dataclass(frozen=True)
class OwnControl:
    """Other comparisons for one claim. `stop`: the matched SFT is read where its ‖ΔW‖_F equals OPD's at the end."""

    name: str
    text: str
    comparisons: tuple[Comparison, ...]
    stop: bool = False


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
        return f"Holds if all of these are met by their whole 95 % interval, fails if one is missed by its whole interval: {tests}."

    @property
    def arms(self) -> tuple[str, ...]:
        """Every arm that the claim is about."""
        return tuple(dict.fromkeys(arm for c in self.comparisons for arm in c.arms))


def _label(arm: str) -> str:
    return arm.upper() if arm in PARADIGMS else arm


def difference(low: str, high: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(high)} minus {_label(low)} above {required:g}", (low, high), lambda m: m(high) - m(low), required
    )


def ratio(low: str, high: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(high)} over {_label(low)} above {required:g}", (low, high), lambda m: m(high) / m(low), required
    )


def growth(arm: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(arm)} last over first checkpoint above {required:g}",
        (arm,),
        lambda m: m(arm) / m(arm, "first"),
        required,
    )


def decline(arm: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(arm)} first over last checkpoint above {required:g}",
        (arm,),
        lambda m: m(arm, "first") / m(arm),
        required,
    )


def band(arm: str, width: float) -> Comparison:
    return Comparison(
        f"{_label(arm)} largest over smallest checkpoint mean below {width:g}",
        (arm,),
        lambda m: float(m.series(arm).max() / m.series(arm).min()),
        width,
        below=True,
    )


def _apart(m: Sample, arm: str, other: str) -> float:
    """The largest factor between two trajectories, over the checkpoints that both have."""
    return float(np.exp(np.abs(np.log(m.series(arm) / m.series(other))).max()))


def preserved(arm: str, other: str = OPD) -> Comparison:
    return Comparison(
        f"{arm} within a factor {BAND:g} of {_label(other)} at every shared checkpoint",
        (arm, other),
        lambda m: _apart(m, arm, other),
        BAND,
        below=True,
    )


def changed(arm: str, other: str = OPD) -> Comparison:
    return Comparison(
        f"{arm} beyond a factor {BAND:g} of {_label(other)} at some shared checkpoint",
        (arm, other),
        lambda m: _apart(m, arm, other),
        BAND,
    )


def about_the_same(arm: str, other: str) -> Comparison:
    return Comparison(
        f"stable ranks of {_label(arm)} and {_label(other)} within a factor {BAND:g}",
        (arm, other),
        lambda m: math.exp(abs(math.log(m(arm) / m(other)))),
        BAND,
        below=True,
    )


def s1(paradigm: str, what: str) -> str:
    """The arm of experiment S1 that goes on from 20 % of `paradigm`: free, frozen, random, other, half, double or a mode."""
    return f"s1-{paradigm}-{what}"


def recovery(m: Sample, paradigm: str, what: str) -> float:
    """(constrained − frozen) / (free − frozen), of accuracies; undefined where training the matrices brings nothing."""
    frozen = m.accuracy(s1(paradigm, "frozen"))
    gained = m.accuracy(s1(paradigm, "free")) - frozen
    return (m.accuracy(s1(paradigm, what)) - frozen) / gained if gained > 0 else math.nan


def _s1_arms(what: str, *paradigms: str) -> tuple[str, ...]:
    return tuple(s1(p, w) for p in paradigms for w in (what, "free", "frozen"))


def recovers(what: str, paradigm: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(paradigm)}'s recovery ({what}) above {required:g}",
        _s1_arms(what, paradigm),
        lambda m: recovery(m, paradigm, what),
        required,
    )


def recovers_more(what: str, high: str, low: str, required: float) -> Comparison:
    return Comparison(
        f"recovery ({what}) of {_label(high)} minus that of {_label(low)} above {required:g}",
        _s1_arms(what, high, low),
        lambda m: recovery(m, high, what) - recovery(m, low, what),
        required,
    )


def own_over(other: str, paradigm: str, required: float) -> Comparison:
    return Comparison(
        f"{_label(paradigm)}'s recovery in its own channel minus that in {'a random one' if other == 'random' else other} "
        f"above {required:g}",
        (*_s1_arms("update", paradigm), s1(paradigm, other)),
        lambda m: recovery(m, paradigm, "update") - recovery(m, paradigm, other),
        required,
    )


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
        (
            Comparison("chance (0.5) minus OPD above 0.02", (OPD,), lambda m: m.chance - m(OPD), 0.02),
            Comparison("chance (0.5) minus RLVR above 0.02", (RLVR,), lambda m: m.chance - m(RLVR), 0.02),
        ),
    ),
    Claim(
        "R5b", "Visible updates gather on low-magnitude weights, least under SFT, most under RLVR",
        "low-magnitude overlap: SFT 31.88 %, OPD 53.59 %, RLVR 73.48 % (random 30 %)", LOW,
        (
            Comparison("OPD minus chance (0.5) above 0.02", (OPD,), lambda m: m(OPD) - m.chance, 0.02),
            difference(SFT, OPD, 0.02), difference(OPD, RLVR, 0.02),
        ),
    ),
    Claim(
        "L1", "OPD's update stays in a narrow stable-rank band; SFT's expands; RLVR's contracts",
        "stable rank against step", STABLE_RANK,
        (band(OPD, BAND), growth(SFT, 1.1), decline(RLVR, 1.1)),
    ),
    Claim(
        "L2", "The narrow band is not because the update is small: OPD's norm exceeds RLVR's at about the same stable rank",
        "final Frobenius norm: SFT 4.701, OPD 0.452, RLVR 0.168", STABLE_RANK,
        (
            Comparison("OPD's norm over RLVR's above 1.5", (OPD, RLVR), lambda m: m.norm(OPD) / m.norm(RLVR), 1.5),
            about_the_same(OPD, RLVR),
        ),
        matched=(about_the_same(OPD, RLVR), band(OPD, BAND)),
    ),
    Claim(
        "L3", "The spectrum's shape changes mildly under OPD, rises sharply under SFT, falls under RLVR",
        "Hill exponent under OPD 2.34 → 2.93", HILL,
        (band(OPD, 1.5), growth(SFT, 1.5), decline(RLVR, 1.05)),
    ),
    Claim(
        "L4", "Under OPD the final update subspace is there from the first checkpoint; SFT and RLVR reach it gradually",
        "Sim_16(t, end)", SIMILARITY,
        (
            Comparison("at the first checkpoint OPD minus SFT above 0.05", (OPD, SFT),
                       lambda m: m(OPD, "first") - m(SFT, "first"), 0.05),
            Comparison("at the first checkpoint OPD minus RLVR above 0.05", (OPD, RLVR),
                       lambda m: m(OPD, "first") - m(RLVR, "first"), 0.05),
        ),
        at="first checkpoint",
    ),
    Claim(
        "S1", "Held from 20 % of training in the subspace found there, OPD keeps its accuracy and SFT loses some",
        "AIME24 avg@8: OPD 64.2 against 63.3 free; SFT 45.6 against 55.5 free", ACCURACY,
        (
            Comparison("OPD: projected (gradient) minus free above -0.03", (s1(OPD, "gradient"), s1(OPD, "free")),
                       lambda m: m.accuracy(s1(OPD, "gradient")) - m.accuracy(s1(OPD, "free")), -0.03),
            Comparison("SFT: free minus projected (gradient) above 0.03", (s1(SFT, "gradient"), s1(SFT, "free")),
                       lambda m: m.accuracy(s1(SFT, "free")) - m.accuracy(s1(SFT, "gradient")), 0.03),
        ),
        at="after the last step",
        after=("matched SFT at equal norm", "own channel over a random one"),
        own_controls=(
            OwnControl(
                "matched SFT", "the paper's comparison with OPD's start, learning rate, steps and sequences in SFT's place",
                (
                    Comparison("OPD: projected (gradient) minus free above -0.03", (s1(OPD, "gradient"), s1(OPD, "free")),
                               lambda m: m.accuracy(s1(OPD, "gradient")) - m.accuracy(s1(OPD, "free")), -0.03),
                    Comparison("matched SFT: free minus projected (gradient) above 0.03",
                               (s1(MATCHED, "gradient"), s1(MATCHED, "free")),
                               lambda m: m.accuracy(s1(MATCHED, "free")) - m.accuracy(s1(MATCHED, "gradient")), 0.03),
                ),
            ),
            OwnControl(
                "recovery, exactly held", "(constrained − frozen) / (free − frozen), mode update: nothing leaks out of the channel",
                (recovers("update", OPD, 0.8), recovers_more("update", OPD, SFT, 0.1)),
            ),
            OwnControl(
                "matched SFT at equal norm", "the same with the matched SFT, read where its ‖ΔW‖_F equals OPD's at the end",
                (recovers("update", OPD, 0.8), recovers_more("update", OPD, MATCHED, 0.1)), stop=True,
            ),
            OwnControl(
                "own channel over a random one", "a random channel of the same K is what any K directions would recover",
                (own_over("random", OPD, 0.1),),
            ),
            OwnControl(
                "own channel over the other's", "the matched SFT's channel, same K: is it this update's channel, or any update's?",
                (own_over("other", OPD, 0.1),),
            ),
        ),
    ),
    Claim(
        "C1", "Keeping only 25 % or 50 % of the tokens (top-gap or random) preserves the stable-rank trajectory",
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
        (preserved("opd-alpha-0.75"), changed("opd-alpha-0.01")),
        at="last shared checkpoint",
    ),
)  # fmt: skip

R5 = "Updates avoid principal weights (R5a) and gather on low-magnitude ones (R5b)"
"""Reported beside its two parts: holds when both do, fails when one does, else inconclusive."""


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
)  # fmt: skip

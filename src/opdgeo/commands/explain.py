"""`opdgeo explain`: what a diagnostic is, what it means and what it does not."""

from __future__ import annotations

import argparse
import difflib
import re
import textwrap
from typing import TYPE_CHECKING

from opdgeo.commands.common import DONE
from opdgeo.errors import ConfigError

if TYPE_CHECKING:
    from opdgeo.diagnostics import Diagnostic

SCOPES = {
    "update": "of one update, matrix by matrix",
    "trajectory": "of one matrix at all checkpoints of a run",
    "pair": "of two updates of one base, matrix by matrix",
    "run": "of a whole run",
}
NULLS = {
    "update": "an isotropic Gaussian ΔW of the same Frobenius norm, added to the same W₀",
    "trajectory": "a walk of independent isotropic increments with the observed norms",
    "pair": "two independent isotropic updates of the same sizes, on the same W₀",
    "run": "the same of the curve of a walk of independent isotropic increments with the observed norms",
}

WORDS = {
    "mean": "What was measured, as a mean over all matrices that moved. The short table calls it “measured”.",
    "null": "What an update of the same size has by pure chance: independent Gaussian entries of the same Frobenius norm, added to the "
    "same W₀. For the similarities of a run it is a random walk with steps of the same lengths. The short table calls it “by chance”.",
    "excess": "Mean minus null, over the same matrices. Its 95 % interval is a bootstrap over matrices.",
    "interval": "The 95 % interval of the excess, a bootstrap over matrices: from “low” to “high” in summary.json.",
    "margin": "What counts as a difference from the null: 0.02 for a share, a tenth of the null’s mean for other numbers. The reading "
    "compares it with the interval of the excess.",
    "reading": "Whether size alone explains the number. It compares the interval of the excess with a margin: 0.02 for a share, a tenth "
    "of the null for other numbers. It is one of size, geometry, unclear and by construction.",
    "of": "How many of the matrices have this number. Mean, null and excess are over these.",
    "size": "A reading. The interval of the excess lies within ± the margin: an isotropic update of this size has the same number.",
    "geometry": "A reading. The interval of the excess lies outside the margin: size does not explain the number. ↑ is above chance, ↓ "
    "below. It does not say that the objective did this, for the noise of an optimizer is not isotropic either.",
    "unclear": "A reading. The interval of the excess crosses the margin: too few matrices, or an effect near the margin.",
    "by_construction": "A reading. The null has the same value by definition, as the norm has.",
    "beyond_chance": "A reading of two updates (`relate`): the interval of the excess lies outside the margin, so that the two are more "
    "alike (↑) or less alike (↓) than independent isotropic updates of the same sizes.",
    "chance": "As the head of a column: the null. As a reading of two updates (`relate`): the interval of the excess lies within ± the "
    "margin, so that the two are as alike as independent isotropic updates of the same sizes.",
    "no_null": "Nulls are off (--nulls 0), or this number has none.",
    "undefined": "No matrix has a value. The column “reason” of measurements.parquet says why. As a status: this matrix has no value.",
    "computed": "As a status: the row has a value. In summary.json: how many matrices have one.",
    "skipped": "A status. The number could not be measured for this matrix; the column “reason” says why.",
    "status": "Whether a row of measurements.parquet has a value: computed, skipped (could not be measured) or undefined (has no value "
    "for this matrix).",
    "reason": "Why a row is skipped or undefined, or what was changed, such as a rank that was cut.",
    "notes": "What rows with a value say of it, such as a rank that was cut, and of how many matrices.",
    "checkpoint": "The name of the tuned checkpoint’s folder; arm/step in a study.",
    "other": "In the files of `relate`: the update that “checkpoint” is compared with.",
    "step": "Optimizer steps at this checkpoint, read from the folder’s name or the trainer’s state.",
    "run": "The name of a run where several were tracked; empty for a single one.",
    "steps": "The steps of a run’s checkpoints, without the last one, which equals itself.",
    "thresholds": "The shares, 0.5 to 0.95, for each of which the locking step is told.",
    "null_step": "The locking step of the mean of the walk nulls.",
    "median_step": "The step by which half of the matrices have locked.",
    "matrix": "The name of a tensor in Hugging Face terms. Experts and the parts of fused tensors have names of their own.",
    "layer": "The decoder layer that a matrix belongs to, from 0.",
    "role": "Which matrix of its layer it is: q_proj, down_proj and so on.",
    "rows": "The outputs of a matrix.",
    "cols": "The inputs of a matrix.",
    "diagnostic": "What is measured, such as stable_rank. `opdgeo explain` lists all.",
    "variant": "Which version of the diagnostic, such as both.64 of principal_energy; empty where there is only one.",
    "value": "The number of one matrix, in the diagnostic’s unit.",
    "error": "A bound on |value − exact value|, in the unit of the value. It covers rounding and iterations that stop early. It does not "
    "cover sampling.",
    "method": "How the value was computed: count, sum, svd, gram, krylov, factors and so on; then “null from” and how, where the null is "
    "neither a closed form nor perturbation theory.",
    "null_mean": "The mean of the same number over null updates of the same Frobenius norm, for one matrix.",
    "null_std": "The standard deviation of the same number over null updates, for one matrix. It is not the table’s interval, which is "
    "over matrices.",
    "kind": "The null model of a number: gaussian, shuffled, walk or independent.",
    "gaussian": "The usual null: an isotropic Gaussian ΔW of the same Frobenius norm, added to the same W₀.",
    "shuffled": "The null of --null shuffled: the entries of ΔW in random order.",
    "walk_null": "The null of a run’s trajectory: a walk of independent isotropic increments with the observed norms.",
    "independent": "The null of two updates (`relate`): two independent isotropic updates of the same sizes, on the same W₀.",
    "median": "The median over the compared matrices.",
    "middle_80": "From the 10th to the 90th percentile over the compared matrices: p10 and p90 in summary.json.",
    "weighting": "How the mean over matrices is taken. entries: a matrix counts by its entries. matrices: each counts once.",
    "matrices": "The matrices that are compared: the denominator of the mean, of the null and of the excess.",
    "mean_computed": "The mean over all matrices with a value, those that did not move among them.",
    "total": "How many matrices were asked for.",
    "unmoved": "How many matrices are the same in both checkpoints. They are left out of mean, null and excess; of two updates "
    "(`relate`), those of which one or both did not move.",
    "roles": "In summary.json: the same statistics for each role. As the option --roles: which matrices are measured.",
    "all": "In a table of `relate`: the number of all matrices together, as one long vector of entries. As the option --all: every number "
    "and more columns are printed. As --roles all: every role.",
    "pairs": "In summary.json, of `relate`: one entry for each pair of updates.",
    "curve": "Which list of numbers a row of curves.parquet holds: sigma_base, sigma_tuned, sigma_update, angle_left or angle_right; of "
    "`relate`, similarity_right or similarity_left, and with _null what independent updates have.",
    "values": "The numbers of a curve; of a large ΔW the leading ones only.",
    "unit": "What a number is counted in: % of a whole for a share, pp for a difference of shares, ° for angles, else what `opdgeo explain "
    "NAME` says. The data files hold a share as a number from 0 to 1.",
    "share": "A part of a whole, shown in %. The data files hold it as a number from 0 to 1.",
    "pp": "Percentage points, the unit of a difference of two shares: 92 % is 2 pp more than 90 %.",
    "degrees": "The unit of angles, shown as °.",
    "rank": "How many leading singular directions of W₀ and W₊ the principal angles compare (--rank, 512 unless given; cut to half the "
    "smaller side). Other ranks are diagnostics: stable_rank and effective_rank.",
    "top_k": "How many leading singular triplets of ΔW the Hill exponent and the subspaces take (--top-k, 16 unless given).",
    "mask_rank": "The rank of W₀’s reconstruction behind the principal mask, and of the principal energy (--mask-rank, 64 unless given).",
    "mask_share": "α, the share of the entries that a mask of mask_overlap takes (--mask-share, 0.5 and 0.3 unless given).",
    "eta": "η, the relative tolerance within which an entry counts as unchanged after the bf16 cast (--eta, 0.001 unless given). The η "
    "rule is in update_sparsity.",
    "nulls": "How many null updates are drawn for a matrix where there is no closed form (--nulls, 4 unless given; 0: no nulls).",
}
"""The words of the tables, of the columns of the data files and of the settings that are no diagnostics, as docs/reading.md and
docs/data.md have them."""
ALIASES = {
    "measured": "mean",
    **dict.fromkeys(("by_chance", "its_null"), "null"),
    **dict.fromkeys(("95_interval", "excess_95", "low", "high"), "interval"),
    **dict.fromkeys(("p10", "p90"), "middle_80"),
    "together": "all",
    "std": "null_std",
    "walk": "walk_null",
    **dict.fromkeys(("points", "percentage_points"), "pp"),
    **dict.fromkeys(("sigma_base", "sigma_tuned", "sigma_update", "angle_left", "angle_right"), "curve"),
    **dict.fromkeys(("similarity_right", "similarity_left", "similarity_right_null", "similarity_left_null"), "curve"),
    "not_computed": "undefined",
    "α": "mask_share",
    "η": "eta",
    "%": "share",
    "°": "degrees",
}


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "explain",
        help="what a diagnostic is, and what it does not mean",
        description="Formula, meaning, caveat, null, source and an example of a diagnostic, or the meaning of a word of the tables; "
        "without a name, the list of all.",
        epilog="example: opdgeo explain stable_rank",
    )
    command.add_argument(
        "diagnostic",
        metavar="DIAGNOSTIC",
        nargs="?",
        help="a name of the list, such as stable_rank or excess, or a row as printed",
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.diagnostics import DIAGNOSTICS

    if args.diagnostic is None:
        for name, each in DIAGNOSTICS.items():
            print(f"{name:20} {each.title}, {SCOPES[each.scope]}")
        print("\n" + textwrap.fill(f"Words of the tables and of the data files: {_words()}.", 78))
        print("opdgeo explain NAME says more, also of a row as a table prints it.")
        return DONE
    name = args.diagnostic.strip()
    name = ALIASES.get(name, _plain(name))
    name = ALIASES.get(name, name)
    if name in WORDS:
        print(textwrap.fill(f"{name.replace('_', ' ')}: {WORDS[name]}".replace(" %", "\u00a0%"), 78))
        return DONE
    found = [DIAGNOSTICS[name]] if name in DIAGNOSTICS else _of_row(args.diagnostic)
    if not found:
        near = difflib.get_close_matches(name, [*DIAGNOSTICS, *WORDS], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"there is no diagnostic {args.diagnostic!r}; expected one of {', '.join(DIAGNOSTICS)}, or a word of the tables or of the "
            f"data files, which `opdgeo explain` lists.{hint}"
        )
    for i, each in enumerate(found):
        print("\n" * (i > 0), end="")
        _print(each)
    return DONE


def _plain(text: str) -> str:
    """`Update–mask overlap (principal α = 0.5)` → `update_mask_overlap_principal_α_0_5`."""
    return re.sub(r"[\W_]+", "_", text.lower()).strip("_")


def _of_row(text: str) -> list[Diagnostic]:
    """The diagnostic that a row is of, by its title and variant or by its head in a table; those that a variant is of, by its name
    or label with any numbers."""
    from opdgeo.diagnostics import DIAGNOSTICS, Settings

    def numberless(text: str) -> str:
        return _plain(re.sub(r"\d+(\.\d+)?", "N", text))

    row, every = _plain(text) + "_", DIAGNOSTICS.values()
    for each in every:
        heads = (each.name, each.title, *([each.headline.column] if each.headline else []))
        if any(row.startswith(_plain(head) + "_") for head in heads):
            return [each]

    def of(each: Diagnostic) -> set[str]:
        names = (name for variant in each.variants(Settings()) for name in (variant, each.label(variant)))
        return {numberless(name) for name in names} - {"", "n"}

    return [each for each in every if numberless(text) in of(each)]


def _print(found: Diagnostic) -> None:
    from opdgeo.diagnostics import Settings

    variants = [variant for variant in found.variants(Settings()) if variant]
    parts = {
        "formula": found.formula,
        "measured": SCOPES[found.scope],
        "unit": found.counts or found.unit,
        "mean": "weighted by entries" if found.weighting == "entries" else "every matrix counts once",
        "variants": ", ".join(variants),
        "meaning": found.meaning,
        "caveat": found.caveat,
        "null": NULLS[found.scope] + (", which has the same value by construction." if found.size else "."),
        "example": found.example,
        "source": found.source,
    }
    print(f"{found.title} ({found.name})\n")
    for title, text in parts.items():
        if text:
            text = text.replace(" %", "\u00a0%")  # a number and its unit stay on one line
            print(textwrap.fill(text, 78, initial_indent=f"  {title:9} ", subsequent_indent=" " * 12))


def _words() -> str:
    return ", ".join(word.replace("_", " ") for word in WORDS)

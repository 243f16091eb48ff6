"""`opdgeo explain`: what a diagnostic is, what it means and what it does not."""

from __future__ import annotations

import argparse
import difflib
import textwrap

from opdgeo.commands.common import DONE
from opdgeo.errors import ConfigError

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
    "reading": "Whether size alone explains the number. It compares the interval of the excess with a margin: 0.02 for a share, a tenth "
    "of the null for other numbers. It is one of size, geometry, unclear and by construction.",
    "of": "How many of the matrices have this number. Mean, null and excess are over these.",
    "size": "A reading. The interval of the excess lies within ± the margin: an isotropic update of this size has the same number.",
    "geometry": "A reading. The interval of the excess lies outside the margin: size does not explain the number. ↑ is above chance, ↓ "
    "below. It does not say that the objective did this, for the noise of an optimizer is not isotropic either.",
    "unclear": "A reading. The interval of the excess crosses the margin: too few matrices, or an effect near the margin.",
    "by_construction": "A reading. The null has the same value by definition, as the norm has.",
    "no_null": "Nulls are off (--nulls 0), or this number has none.",
    "undefined": "No matrix has a value. The column “reason” of measurements.parquet says why.",
    "error": "A bound on |value − exact value|, in the unit of the value. It covers rounding and iterations that stop early. It does not "
    "cover sampling.",
}
"""The words of the tables that are no diagnostics, as docs/reading.md has them."""
ALIASES = {"measured": "mean", "by_chance": "null", "chance": "null"}


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "explain",
        help="what a diagnostic is, and what it does not mean",
        description="Formula, meaning, caveat, null, source and an example of a diagnostic, or the meaning of a word of the tables; "
        "without a name, the list of all.",
        epilog="example: opdgeo explain stable_rank",
    )
    command.add_argument(
        "diagnostic", metavar="DIAGNOSTIC", nargs="?", help="a name of the list, such as stable_rank or excess"
    )
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.diagnostics import DIAGNOSTICS, Settings

    if args.diagnostic is None:
        for name, each in DIAGNOSTICS.items():
            print(f"{name:20} {each.title}, {SCOPES[each.scope]}")
        print(f"\nWords of the tables: {_words()}.\nopdgeo explain NAME says more.")
        return DONE
    name = args.diagnostic.lower().strip(" ↑↓").replace("-", "_").replace(" ", "_")
    name = ALIASES.get(name, name)
    if name in WORDS:
        print(textwrap.fill(f"{name.replace('_', ' ')}: {WORDS[name]}".replace(" %", "\u00a0%"), 78))
        return DONE
    if name not in DIAGNOSTICS:
        near = difflib.get_close_matches(name, [*DIAGNOSTICS, *WORDS], n=1, cutoff=0.4)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"there is no diagnostic {args.diagnostic!r}; expected one of {', '.join(DIAGNOSTICS)}, or a word of the tables: "
            f"{_words()}.{hint}"
        )
    found = DIAGNOSTICS[name]
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
    print(f"{found.title} ({name})\n")
    for title, text in parts.items():
        if text:
            text = text.replace(" %", "\u00a0%")  # a number and its unit stay on one line
            print(textwrap.fill(text, 78, initial_indent=f"  {title:9} ", subsequent_indent=" " * 12))
    return DONE


def _words() -> str:
    return ", ".join(word.replace("_", " ") for word in WORDS)

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


def add(commands: argparse._SubParsersAction) -> None:
    command = commands.add_parser(
        "explain",
        help="what a diagnostic is, and what it does not mean",
        description="Formula, meaning, caveat, null, source and an example of a diagnostic; without a name, the list of all.",
        epilog="example: opdgeo explain stable_rank",
    )
    command.add_argument("diagnostic", metavar="DIAGNOSTIC", nargs="?", help="a name of the list, such as stable_rank")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from opdgeo.diagnostics import DIAGNOSTICS, Settings

    if args.diagnostic is None:
        for name, each in DIAGNOSTICS.items():
            print(f"{name:20} {each.title}, {SCOPES[each.scope]}")
        print("\nopdgeo explain NAME says more.")
        return DONE
    name = args.diagnostic.lower().replace("-", "_").replace(" ", "_")
    if name not in DIAGNOSTICS:
        near = difflib.get_close_matches(name, DIAGNOSTICS, n=1, cutoff=0.4)
        hint = (
            f"Did you mean {near[0]}?"
            if near
            else "Other words of the tables, such as null or excess: docs/reading.md."
        )
        raise ConfigError(
            f"there is no diagnostic {args.diagnostic!r}; expected one of {', '.join(DIAGNOSTICS)}. {hint}"
        )
    found = DIAGNOSTICS[name]
    variants = [variant for variant in found.variants(Settings()) if variant]
    parts = {
        "formula": found.formula,
        "measured": SCOPES[found.scope],
        "unit": found.unit,
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

"""Write the sources of the site: these pages, a page a diagnostic, the Python reference, and the files that the pages link to.

    generate.py FOLDER      FOLDER/mkdocs.yml and FOLDER/docs, for `mkdocs build` (`make docs`)

A diagnostic's page is written from its `Diagnostic`, the object that `opdgeo explain` prints, so the two cannot disagree. Its picture and its
example are measured here: planted updates of the packaged model, four matrices, a few seconds.
"""

from __future__ import annotations

import inspect
import posixpath
import re
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors.torch import load_file, save_file

import opdgeo
from opdgeo.assets import packaged
from opdgeo.commands.explain import SCOPES
from opdgeo.diagnostics import DIAGNOSTICS, Diagnostic, Settings
from opdgeo.report import charts
from opdgeo.report.glossary import is_listed, is_primary, number, variant_label
from opdgeo.report.view import formula

DOCS = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".cff": "yaml", ".md": "markdown"}
ROLE = "o_proj"
SIZES = (0.001, 0.01, 0.03, 0.1, 1.0)
STEPS = 5
SHARED = (0.0, 0.3, 0.6, 0.9, 1.0)

SHOWN = {
    "update": "The update of the packaged model (the output projection of its four layers), made smaller and larger: from a thousandth of its size to all of "
    "it. Blue is the mean over the matrices. Grey is an isotropic update of the same size, with two standard deviations.",
    "trajectory": "A planted run of five checkpoints. The update of the packaged model grows, and noise of the first step fades. Grey is a walk "
    "of independent steps of the same sizes.",
    "pair": "The update of the packaged model against planted ones of the same size, which share more and more of it: from nothing (left) to all "
    "(right). Grey is two independent isotropic updates of the same sizes.",
    "run": "A planted run of five checkpoints. The update of the packaged model grows, and noise of the first step fades. Grey is a walk of "
    "independent steps of the same sizes.",
}
NULL = {
    "update": "An isotropic Gaussian update of the same Frobenius norm, added to the same W₀. [The nulls](../nulls.md) says how it is computed.",
    "trajectory": "A walk: independent isotropic steps of the same sizes as those of the run.",
    "pair": "Two independent isotropic updates of the same sizes. The mean and the spread are in closed form ([more](../relate.md)).",
    "run": "The same number of a walk: independent isotropic steps of the same sizes as those of the run.",
}


def generate(folder: Path) -> None:
    """Write everything. `folder` is replaced."""
    shutil.rmtree(folder, ignore_errors=True)
    pages: dict[str, str] = {}
    files = {"site.css": DOCS / "site" / "site.css"}

    for page in sorted(DOCS.rglob("*.md")):
        here = page.parent.relative_to(DOCS)

        def link(match: re.Match[str], page: Path = page, here: Path = here) -> str:
            """A file of the repository that is no page of these gets a page that shows it."""
            to = (page.parent / match[1]).resolve()
            if to.is_relative_to(DOCS):
                if to.suffix != ".md":
                    files[str(to.relative_to(DOCS))] = to
                return match[0]
            shown = f"files/{to.relative_to(DOCS.parent)}.md"
            pages[shown] = f"# {to.name}\n\n````{LANGUAGES.get(to.suffix, 'text')}\n{to.read_text()}\n````\n"
            return f"]({posixpath.relpath(shown, here.as_posix())}{match[2] or ''})"

        pages[str(page.relative_to(DOCS))] = LINK.sub(link, page.read_text())
    pages["api.md"] = api_page()
    pages["diagnostics/README.md"] = index_page()
    pages |= {f"diagnostics/{name}.md": page_of(d) for name, d in DIAGNOSTICS.items()}
    for name, text in pages.items():
        page = folder / "docs" / name
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text)
    for name, file in files.items():
        (folder / "docs" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / "docs" / name)
    listed = "".join(f"\n      - diagnostics/{name}.md" for name in ("README", *DIAGNOSTICS))
    settings = (DOCS / "site" / "mkdocs.yml").read_text()
    settings = settings.replace("SOURCES", str(DOCS.parent / "src")).replace(
        "- Diagnostics: []", f"- Diagnostics:{listed}"
    )
    (folder / "mkdocs.yml").write_text(settings)


def api_page() -> str:
    """Everything in `opdgeo.__all__`, by the name of the module that defines it."""
    parts = ["# Python", "", "Everything that `import opdgeo` offers. Importing it loads no torch.", ""]
    for name in opdgeo.__all__:
        found: Any = inspect.unwrap(getattr(opdgeo, name))
        if name != found.__name__:
            parts += [f"`opdgeo.{name}` is:", ""]
        parts += [f"::: {found.__module__}.{found.__qualname__}", ""]
    return "\n".join(parts)


def index_page() -> str:
    lines = ["# The diagnostics", "", "`opdgeo explain NAME` prints the same in the terminal.", ""]
    for scope, words in SCOPES.items():
        lines += [f"## {words[0].upper()}{words[1:]}", "", "| diagnostic | formula |", "|---|---|"]
        lines += [
            f"| [{d.title}]({name}.md) | {cell(formula(d.formula))} |"
            for name, d in DIAGNOSTICS.items()
            if d.scope == scope
        ]
        lines += [""]
    return "\n".join(lines)


def page_of(d: Diagnostic) -> str:
    average = "a matrix counts by its entries" if d.weighting == "entries" else "every matrix counts once"
    null = "The same value by construction: the null has the size of the update." if d.size else NULL[d.scope]
    figure, shown = charts.inline_svg(picture(d)), variant_label(d.name, shown_variant(d))
    unit = {"share": ", in per cent", "degrees": ", in degrees"}.get(d.unit, f", in {d.counts}" if d.counts else "")
    caption = (
        f"{d.title}{unit}. " + SHOWN[d.scope] + (f" Of several variants it shows this one: {shown}." if shown else "")
    )
    lines = [
        f"# {d.title}",
        "",
        f"<p class='formula'>{formula(d.formula)}</p>",
        "",
        f"`{d.name}` is measured {SCOPES[d.scope]}. " + (f"In a mean, {average}." if d.scope != "run" else ""),
        *("", "## What it means", "", d.meaning),
        *("", f"<figure>{figure}<figcaption>{caption}</figcaption></figure>"),
        *("", "## Example", "", d.example),
        *("", "## Traps", "", d.caveat),
        *("", "## Null", "", null),
        *("", "## Error", "", error_of(d)),
        *("", "## Cost", "", cost_of(d)),
        *("", "## Source", "", d.source, ""),
    ]
    return "\n".join(lines)


def cost_of(d: Diagnostic) -> str:
    """What it asks for follows from the settings that it reads (`Diagnostic.reads`)."""
    if d.scope == "run":
        return f"None of its own. It is computed from the table of {DIAGNOSTICS[d.of or ''].title.lower()}."
    asks = []
    if "rank" in d.reads:
        asks.append(
            "the singular values and leading vectors of W₀, and of W₊ or of what is built from them: most of a measurement"
        )
    if "top_k" in d.reads or d.directions:
        one = "the leading singular triplets of ΔW: a small part of a measurement"
        asks.append("the leading singular triplets of both updates: most of a `relate`" if d.scope == "pair" else one)
    if "eta" in d.reads or not asks:
        asks.append("one pass over the entries: the cheapest part")
    settings = ", ".join(f"`--{name.replace('_', '-')}`" for name in d.reads)
    of = f" A change of {settings} measures it again; other diagnostics keep their values." if settings else ""
    return f"It asks for {'; and for '.join(asks)}.{of} Times are in [benchmarks](../benchmarks.md)."


def error_of(d: Diagnostic) -> str:
    if d.scope == "run":
        return "A step of a checkpoint has no error of its own. The similarity that it is read from has one."
    rows = example(d)
    which = {"update": "largest update", "trajectory": "last checkpoint but one", "pair": "third pair"}[d.scope]
    lines = [
        "Every row of `measurements.parquet` has a bound on |value − exact value|. It covers rounding and early stopping. This is the picture's "
        f"{which}:",
        "",
        "| variant | value, mean | error, at most | null, mean | computed by |",
        "|---|---|---|---|---|",
    ]
    for variant, value, error, null, methods in rows.iter_rows():
        name = variant_label(d.name, variant) or "–"
        shown = (number(value, d.unit), number(error, d.unit), number(null, d.unit), ", ".join(methods))
        lines.append(f"| {cell(name)} | {' | '.join(map(cell, shown))} |")
    return "\n".join(lines)


def cell(text: str) -> str:
    return str(text).replace("|", "\\|")


def example(d: Diagnostic) -> pl.DataFrame:
    """Variant, mean, largest error, mean null and methods, over the matrices of one checkpoint or pair."""
    result = measured(d.scope)
    rows = result.measurements.filter(diagnostic=d.name, status="computed")
    if d.scope == "pair":
        rows = rows.filter(checkpoint="step-000000", other="step-000003")
    else:
        rows = rows.filter(step=sorted(rows["step"].unique())[-1 if d.scope == "update" else -2])
    return rows.group_by("variant", maintain_order=True).agg(
        pl.col("value").mean(),
        pl.col("error").max(),
        pl.col("null_mean").mean(),
        pl.col("method").unique(maintain_order=True),
    )


def picture(d: Diagnostic) -> charts.Chart:
    result, scale = measured("trajectory" if d.scope == "run" else d.scope), charts.Scale(d.unit, d.log)
    if d.scope == "run":
        row = next(r for r in result.summary[d.name] if (r["side"], r["rank"]) == ("right", 16))
        lines = [("mean", row["step"], False), ("null: walk", row["null_step"], True)]
        return charts.thresholds(d.name, d.title, row["thresholds"], lines)
    variant = shown_variant(d)
    if d.scope == "pair":
        points = [
            (share, row)
            for share, pair in zip(SHARED, pairs_of_first(result), strict=True)
            if (row := row_of(pair, d.name, variant)) is not None
        ]
    else:
        points = [
            (float(c["step"]), row)
            for c in result.summary["checkpoints"]
            if (row := row_of(c, d.name, variant)) is not None
        ]
    x, y = [at for at, _ in points], [row["mean"] for _, row in points]
    null = [(row["null"] or {}).get("mean") for _, row in points]
    std = [(row["null"] or {}).get("std") for _, row in points]
    if d.scope != "update":
        one = charts.Series("measured", x, y, null=null, null_std=std)
        return charts.trajectory(
            d.name, d.title, scale, [one], "share of the update that both have" if d.scope == "pair" else "step"
        )
    sizes = [row_of(c, "relative_norm", "")["mean"] for c in result.summary["checkpoints"]]  # type: ignore[index]
    tips = [""] * len(sizes)
    band = None
    if not d.size and all(n is not None for n in null):
        wide = [2 * s for s in std]
        low, high = ([n + sign * w for n, w in zip(null, wide, strict=True)] for sign in (-1, 1))
        band = charts.Band(sizes, null, low, high)
    marks = charts.Points(d.title, "s", sizes, y, tips, path=True)
    return charts.over_size(d.name, d.title, scale, [marks], band, size="relative norm of the update")


def shown_variant(d: Diagnostic) -> str:
    """The variant of its picture: that of the first lines of a report, else the first that has charts there."""
    if d.headline:
        return d.headline.variant
    variants = d.variants(Settings())
    return next((v for v in variants if is_primary(d.name, v)), next(v for v in variants if is_listed(d.name, v)))


def row_of(entry: dict[str, Any], diagnostic: str, variant: str) -> dict[str, Any] | None:
    rows = (r for r in entry["diagnostics"] if (r["diagnostic"], r["variant"]) == (diagnostic, variant))
    return next((r for r in rows if r["mean"] is not None), None)


def pairs_of_first(result: opdgeo.Result) -> list[dict[str, Any]]:
    """The pairs of the update itself with each of the others."""
    return [pair for pair in result.summary["pairs"] if pair["checkpoint"] == "step-000000"]


@cache
def measured(scope: str) -> opdgeo.Result:
    base, tuned = (load_file(packaged(f"tiny/{name}") / "model.safetensors") for name in ("base", "teacher"))
    names = [name for name in base if f".{ROLE}." in name]
    start = {name: base[name].float() for name in names}
    update = {name: tuned[name].float() - start[name] for name in names}
    draw = torch.Generator().manual_seed(0)
    noise = {}
    for name, one in update.items():
        other = torch.randn(one.shape, generator=draw)
        noise[name] = other * (one.norm() / other.norm())
    if scope == "update":
        weights = [(scale, 0.0) for scale in SIZES]
    elif scope == "pair":
        weights = [(1.0, 0.0), *((share, (1 - share**2) ** 0.5) for share in SHARED)]
    else:
        weights = [(t / STEPS, 0.5 * (1 - t / STEPS) ** 0.5) for t in range(1, STEPS + 1)]
    first = 0 if scope == "pair" else 1
    with tempfile.TemporaryDirectory() as folder:
        config = (packaged("tiny/base") / "config.json").read_text()
        for step, (a, b) in enumerate(weights, first):
            where = Path(folder, "run", f"step-{step:06d}")
            where.mkdir(parents=True)
            Path(where, "config.json").write_text(config)
            save_file(
                {n: (start[n] + a * update[n] + b * noise[n]).contiguous() for n in names}, where / "model.safetensors"
            )
        Path(folder, "base").mkdir()
        Path(folder, "base", "config.json").write_text(config)
        save_file({n: w.contiguous() for n, w in start.items()}, Path(folder, "base", "model.safetensors"))
        how: dict[str, Any] = {"settings": Settings(), "workers": 1, "cache": False}
        steps = sorted(Path(folder, "run").iterdir())
        if scope == "pair":
            return opdgeo.relate(Path(folder, "base"), *steps, **how)
        return opdgeo.track(Path(folder, "base"), Path(folder, "run"), **how)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    generate(Path(sys.argv[1]))

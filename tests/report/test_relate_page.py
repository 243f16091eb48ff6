"""The page and the terminal of `relate`: from the data files alone, in the order of a clustering, safe with any name."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from rich.console import Console

import opdgeo
import planted
from opdgeo.errors import ConfigError
from opdgeo.report import write_report
from opdgeo.report.glossary import number
from opdgeo.report.pairs import Pairs, print_pairs
from opdgeo.report.verdict import findings
from opdgeo.report.view import policy, resource
from program import run_opdgeo

NAMES = [planted.tensor_name(layer, m) for layer in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
HOSTILE = (
    "<img src=x onerror=alert(1)>&'",
    '"><svg onload=alert(2)>$x_{1}$[red]',
    "\u202egnp.sdrawkcab \U0001f600 " + "n" * 150,
)


class Page(HTMLParser):
    """Tags with their attributes, the exact numbers, and the rows of the first matrix of pairs."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.numbers: list[float] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))
        if tag == "data":
            self.numbers.append(float(dict(attrs)["value"] or "nan"))

    def handle_data(self, data: str) -> None:
        self.text += data


def updates(folder: Path, names: tuple[str, ...], parts: tuple[tuple[float, float], ...]) -> list[Path]:
    """A base, and updates that are made of two directions and some noise."""
    rng = np.random.default_rng(0)
    weights = {n: planted.weights(rng, 48, 40) for n in NAMES}
    first, second = ({n: planted.with_spectrum(rng, 48, 40, [0.05, 0.04]) for n in NAMES} for _ in range(2))
    made = [planted.write_checkpoint(folder / "base", weights, "bfloat16")]
    for name, (a, b) in zip(names, parts, strict=True):
        up = {n: w + a * first[n] + b * second[n] + 3e-4 * rng.standard_normal(w.shape) for n, w in weights.items()}
        made.append(planted.write_checkpoint(folder / name, up, "bfloat16"))
    return made


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four updates in two families, given in turns, with their page."""
    folder = tmp_path_factory.mktemp("related")
    names = ("opd-0", "rlvr-0", "opd-1", "rlvr-1")
    opdgeo.relate(*updates(folder, names, ((1, 0), (0, 1), (1, 0.1), (0, -1))), cache=False).report(folder / "out")
    return folder / "out"


def numbers_in(folder: Path) -> set[float]:
    found: set[float] = set()

    def gather(content: Any) -> None:
        if isinstance(content, dict):
            gather(list(content.values()))
        elif isinstance(content, list):
            for item in content:
                gather(item)
        elif isinstance(content, int | float):
            found.add(float(content))

    for name in ("summary.json", "run.json"):
        gather(json.loads((folder / name).read_text()))
    return found


def test_every_number_is_in_the_data_files(out: Path) -> None:
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert len(page.numbers) > 200
    assert set(page.numbers) <= numbers_in(out)


def test_updates_that_are_alike_stand_together(out: Path) -> None:
    pairs = Pairs(json.loads((out / "summary.json").read_text())["pairs"])
    ordered = pairs.ordered()
    assert {ordered.index("opd-0"), ordered.index("opd-1")} in ({0, 1}, {1, 2}, {2, 3})
    page = (out / "report.html").read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row">\d&ensp;([^<]+)</th>', page)
    assert rows[:4] == ordered
    assert pairs.by_likeness()[0] == ("opd-0", "opd-1") and pairs.by_likeness()[-1] == ("rlvr-0", "rlvr-1")
    assert "Most alike: opd-0 and opd-1: the cosine of the two updates is" in Page(page).text
    assert "Least alike: rlvr-0 and rlvr-1" in Page(page).text


def test_the_matrix_is_the_table(out: Path) -> None:
    """The first matrix, cell by cell, against the cosines that the rows of the table give for all matrices together."""
    page = (out / "report.html").read_text(encoding="utf-8")
    first = page.split('<table class="matrix">')[1].split("</table>")[0]
    names = re.findall(r"&ensp;([^<]+)</th>", first)
    shown = [float(v) for v in re.findall(r'title="[^"]*">(?:<strong>)?<data value="([^"]+)"', first)]
    table = pl.read_parquet(out / "measurements.parquet")
    cosines = table.filter(diagnostic="update_cosine")
    norms = table.filter(diagnostic="frobenius_norm")

    def of(name: str) -> np.ndarray:
        found = dict(norms.filter(checkpoint=name).select("matrix", "value").rows())
        return np.array([found[m] for m in NAMES])

    expected = []
    for a in names:
        for b in names:
            if a != b:
                part = cosines.filter(pl.col("checkpoint").is_in([a, b]) & pl.col("other").is_in([a, b]))
                c = np.array([dict(part.select("matrix", "value").rows())[m] for m in NAMES])
                expected.append(float((c * of(a) * of(b)).sum() / np.linalg.norm(of(a)) / np.linalg.norm(of(b))))
    assert shown == pytest.approx(expected, rel=1e-12)


def test_a_notebook_shows_a_line_a_pair(out: Path) -> None:
    result = opdgeo.load(out)
    html = result._repr_html_()
    page = Page(html)
    assert html.count('<th scope="row">') == 6 and html.index("opd-0 and opd-1") < html.index("rlvr-0 and rlvr-1")
    assert set(page.numbers) <= numbers_in(out) and len(page.numbers) > 20
    shown = (out / "report.html").read_text(encoding="utf-8")
    curves = [c._repr_html_().partition("<svg")[2] for name, c in result.charts.items() if name.startswith("curve")]
    assert len(curves) == 6 and all(svg.partition("</svg>")[0] in shown for svg in curves)


def test_names_stay_text(tmp_path: Path) -> None:
    given = updates(tmp_path, HOSTILE, ((1, 0), (0, 1), (1, 1)))
    done = run_opdgeo("relate", *given, "-o", tmp_path / "out", "--no-cache")
    assert done.returncode == 0, done.stderr
    assert "\u202e" not in done.stdout and "\x1b" not in done.stdout
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    page, result = Page(text), opdgeo.load(tmp_path / "out")
    in_a_notebook = Page(result._repr_html_() + "".join(c._repr_html_() for c in result.charts.values()))
    assert "\u202e" not in text + in_a_notebook.text and HOSTILE[0] in in_a_notebook.text
    assert [tag for tag, _ in page.tags + in_a_notebook.tags].count("script") == 1
    assert f"<script>{resource('sort.js')}</script>" in text
    for tag, attributes in page.tags + in_a_notebook.tags:
        assert tag not in ("img", "image", "iframe", "link", "object", "base", "form"), tag
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("href", "src", "xlink:href"):
            assert attributes.get(name, "#").startswith("#"), attributes
    assert "<img src=x onerror=alert(1)>&'" in page.text and '"><svg onload=alert(2)>' in page.text
    meta = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert meta == [policy(resource("sort.js"))]
    assert len(text) < 1_000_000


def test_two_updates_have_one_table_and_no_matrix(out: Path, tmp_path: Path) -> None:
    folder = out.parent
    result = opdgeo.relate(
        folder / "base", folder / "opd-0", folder / "opd-1", cache=False, settings=opdgeo.Settings(nulls=0)
    )
    text = result.report(tmp_path / "two").read_text(encoding="utf-8")
    assert '<table class="matrix">' not in text and "<details open>" in text
    console = Console(file=io.StringIO(), width=80)
    print_pairs(result.summary, console)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    assert "opd-0 and opd-1" in shown and "no null" in shown and "4/4" in shown


def test_the_terminal_says_why_a_number_is_missing(tmp_path: Path) -> None:
    """The channel of two updates of two directions has no top 16."""
    rng = np.random.default_rng(0)
    name = NAMES[0]
    base = planted.weights(rng, 48, 40)
    made = [planted.write_checkpoint(tmp_path / "base", {name: base}, "float32")]
    for which in ("a", "b"):
        up = {name: base + planted.with_spectrum(rng, 48, 40, [0.05, 0.04])}
        made.append(planted.write_checkpoint(tmp_path / which, up, "float32"))
    result = opdgeo.relate(*made, cache=False, settings=opdgeo.Settings(nulls=0))
    console = Console(file=io.StringIO(), width=80)
    print_pairs(result.summary, console)
    said = " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    assert "–: singular value 16 of the update is within the rounding of the stored weights" in said, said
    assert "(Energy in the other's channel)." in said, said
    for words in ("a as a multiple of b", "b as a multiple of a"):
        assert words in _printed(result.summary), said


def test_low_rank_updates_show_the_largest_k_that_they_determine(tmp_path: Path) -> None:
    """Of two directions, and one in a second matrix: K = 2 has half of the matrices."""
    rng = np.random.default_rng(0)
    base = {n: planted.weights(rng, 48, 40) for n in NAMES[:2]}
    made = [planted.write_checkpoint(tmp_path / "base", base, "float32")]
    for which in ("a", "b", "full"):
        spectra = [np.linspace(0.09, 0.05, 18)] * 2 if which == "full" else ([0.05, 0.04], [0.05])
        up = {n: base[n] + planted.with_spectrum(rng, 48, 40, list(s)) for n, s in zip(base, spectra, strict=True)}
        made.append(planted.write_checkpoint(tmp_path / which, up, "float32"))
    two = opdgeo.relate(*made[:3], cache=False)
    held = {d["variant"]: d for d in two.summary["pairs"][0]["diagnostics"] if d["diagnostic"] == "shared_subspace"}
    assert held["right.16"]["mean"] is None and held["right.2"]["matrices"] == 1, "the data files stay as they are"
    shown = [f for f in findings(two.summary["pairs"][0]) if f.diagnostic == "shared_subspace"]
    assert [(f.detail, f.row["mean"]) for f in shown] == [
        (f"{side}, K = 2", held[f"{side}.2"]["mean"]) for side in ("right", "left")
    ]
    value = number(held["right.2"]["mean"], "share")
    assert f"their top directions (right, K = 2) are {value} alike" in _printed(two.summary)
    page = Page(two.report(tmp_path / "two").read_text(encoding="utf-8"))
    assert "right, K = 2" in page.text and "right, K = 16" not in page.text and "a in the channel of b" in page.text

    three = opdgeo.relate(*made, cache=False)
    text = three.report(tmp_path / "three").read_text(encoding="utf-8")
    first = text.split("Similarity of the top subspaces (right, K = 16)</h3>")[1].split("</table>")[0]
    assert first.count("<small>right, K = 2</small>") == 6 and "right, K = 2" in three._repr_html_()
    assert _printed(three.summary).count("right, K = 2") >= 3

    full = copy.deepcopy(two.summary)
    for d in full["pairs"][0]["diagnostics"]:
        if d["diagnostic"] == "shared_subspace":
            d |= {"mean": None, "matrices": 0, "null": None, "reason": "the gap vanishes"}
    assert (
        "–: the gap vanishes (Similarity of the top subspaces). No smaller K in the table is determined either; "
        "curves.parquet holds every K."
    ) in _printed(full)


def _printed(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_pairs(summary, console)
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_terminal_says_a_line_a_pair(out: Path) -> None:
    console = Console(file=io.StringIO(), width=80)
    summary = json.loads((out / "summary.json").read_text())
    print_pairs(summary, console)
    beyond = [p for p in summary["pairs"] for d in p["diagnostics"] if (d["null"] or {}).get("reading") == "geometry"]
    assert beyond and re.search(r"\d(?: %)? [↑↓]", console.file.getvalue()), "seen without colours too"  # type: ignore[attr-defined]
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, shown.splitlines())) <= 80
    for pair in ("opd-0 and opd-1", "rlvr-0 and rlvr-1"):
        assert sum(line.startswith(pair) for line in shown.splitlines()) == 1, shown
    with pytest.raises(ConfigError, match="without other; expected other"):
        print_pairs({"pairs": [{"checkpoint": "a", "diagnostics": []}]})


def test_nothing_moved_and_the_page_says_why(tmp_path: Path) -> None:
    base, *_ = updates(tmp_path, ("a",), ((1, 0),))
    still = [shutil.copytree(base, tmp_path / name) for name in ("one", "two")]
    text = opdgeo.relate(base, *still, cache=False).report(tmp_path / "out").read_text(encoding="utf-8")
    assert "nothing can be compared: one of the two updates did not move" in Page(text).text


def test_the_page_is_rebuilt_from_the_data_files_with_figures(out: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "copy")
    before = (copy / "report.html").read_bytes()
    (copy / "report.html").unlink()
    write_report(copy, figures=True)
    assert (copy / "report.html").read_bytes() == before
    assert {p.suffix for p in (copy / "figures").iterdir()} == {".svg", ".pdf"}

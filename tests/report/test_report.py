"""The report: made from the data files alone, safe with any name, whole or not at all."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import random
import re
import shutil
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

import opdgeo
from browser import Browser
from opdgeo.errors import ConfigError
from opdgeo.report import charts, data, write_report
from opdgeo.report.data import load, load_claims
from opdgeo.report.glossary import arm_label, arm_of, clean, expert_of, interval_decimals, number, variant_label
from opdgeo.report.limits import ARMS as NOISE
from opdgeo.report.markdown import write_markdown
from opdgeo.report.sections import alike
from opdgeo.report.sections.section import View
from opdgeo.report.terminal import print_claims, print_summary
from opdgeo.report.view import environment, resource
from program import run_python
from report_data import FEW, HOSTILE, build, keep, write

KINDS = ("compare", "track", "reproduce", "still", "single", "large", "bare", "hostile")
VOID = {"meta", "link", "img", "br", "hr", "input", "base", "source", "area", "col", "embed", "wbr"}

DRAWING = {"svg", "g", "path", "text", "title", "use", "defs", "clippath", "rect", "tspan"}  # tags of a chart


class Page(HTMLParser):
    """Elements with their attributes, <data> numbers, table cells, tooltips, and the text outside numbers and charts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.numbers: list[tuple[str, str]] = []
        self.cells: list[str] = []
        self.tips: list[str] = []
        self.marks = 0
        self.styles = ""
        self.scripts: list[str] = []
        self.verdict = ""
        self.stack: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        got = {k: v or "" for k, v in attrs}
        self.tags.append((tag, got))
        if tag not in VOID:
            self.stack.append((tag, got))
        if tag == "script":
            self.scripts.append("")
        if tag == "data":
            self.numbers.append((got["value"], ""))
        elif tag == "td":
            self.cells.append("")
            if "title" in got:
                self.tips.append(got["title"])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1][0] == tag, f"</{tag}> closes {self.stack[-1:]}"
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        inside = [t for t, _ in self.stack]
        if "style" in inside:
            self.styles += data
        elif "script" in inside:
            self.scripts[-1] += data
        elif "data" in inside:
            value, text = self.numbers[-1]
            self.numbers[-1] = (value, text + data)
        elif "svg" in inside:
            if "title" in inside:
                self.tips.append(data)
                self.marks += "use" in inside
        else:
            if "td" in inside:
                self.cells[-1] += data
            if any(a.get("id") == "verdict" for _, a in self.stack):
                self.verdict += data


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Page]]:
    """Every shape of input, built once."""
    made = {}
    for kind in KINDS:
        out = build(kind, tmp_path_factory.mktemp("report") / kind)
        path = write_report(out)
        assert path == out / "report.html"
        made[kind] = (out, Page(path.read_text(encoding="utf-8")))
    return made


def numbers_in(out: Path) -> set[float]:
    """Every number of the data files in `out`."""
    found: set[float] = set()

    def walk(data: Any) -> None:
        if isinstance(data, dict):
            for value in data.values():
                walk(value)
        elif isinstance(data, list):
            for value in data:
                walk(value)
        elif isinstance(data, (int, float)) and not isinstance(data, bool):
            found.add(float(data))

    for path in out.glob("*.json"):
        walk(json.loads(path.read_text()))
    table = pl.read_parquet(out / "measurements.parquet")
    for column in ("value", "null_mean", "null_std"):
        found |= {float(v) for v in table[column].drop_nulls()}
    return found


def is_rounding(text: str, value: float) -> bool:
    """Whether `text` is `value` rounded to the digits it shows, in the unit it shows."""
    match = re.fullmatch(r"([+−-]?[\d.]+(?:e[+-]?\d+)?)\s*(%|pp|°|s|B|KiB|MiB|GiB)?", text.strip())
    if not match:
        return False
    shown = match[1].replace("−", "-")
    scales = {"KiB": (2**-10,), "MiB": (2**-20,), "GiB": (2**-30,), "%": (100,), "pp": (100,), None: (1, 100)}
    mantissa, _, exponent = shown.partition("e")
    half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return any(abs(float(shown) - value * scale) <= half * 1.0001 for scale in scales.get(match[2], (1,)))


def check_inert(page: Page, scripts: list[str]) -> None:
    """Whole markup that fetches nothing and runs nothing but `scripts`."""
    assert not page.stack
    assert page.scripts == scripts
    for tag, attrs in page.tags:
        assert tag != "script" or attrs == {}
        assert tag not in (
            "link",
            "iframe",
            "object",
            "embed",
            "base",
            "img",
            "image",
            "form",
            "audio",
            "video",
        )
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("href", "src", "xlink:href", "action", "data", "srcset", "poster"):
                assert value.startswith("#"), (tag, name, value)
            assert not re.search(r"url\((?!#)", value), (tag, value)
    assert not re.search(r"@import|url\(|expression\(|//", page.styles)


@pytest.mark.parametrize("kind", KINDS)
def test_page_makes_no_external_request(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    _, page = reports[kind]
    check_inert(page, [resource("sort.js")])
    policy = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    known = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    assert policy == [
        f"default-src 'none'; script-src 'sha256-{known}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    ]
    ids = [a["id"] for _, a in page.tags if "id" in a and not a["id"].startswith(("m", "p"))]
    assert len(ids) == len(set(ids))
    known = {a["id"] for _, a in page.tags if "id" in a}
    for _, attrs in page.tags:
        target = attrs.get("href") or (
            "#" + m[1] if (m := re.match(r"url\(#(.*)\)", attrs.get("clip-path", ""))) else "#verdict"
        )
        assert target[1:] in known, target


@pytest.mark.parametrize("kind", KINDS)
def test_every_number_is_in_the_data_files(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    out, page = reports[kind]
    known = numbers_in(out)
    assert len(page.numbers) > 20
    for exact, text in page.numbers:
        assert float(exact) in known, (exact, text)
        assert is_rounding(text, float(exact)), (exact, text)
    values = pl.read_parquet(out / "measurements.parquet")
    rows: dict[str, set[float]] = {}
    for matrix, value, null in values.select("matrix", "value", "null_mean").rows():
        rows.setdefault(clean(matrix), set()).update(v for v in (value, null) if v is not None)
    for one in json.loads((out / "summary.json").read_text())["checkpoints"]:
        means = [v for d in one["diagnostics"] for v in (d["mean"], (d["null"] or {}).get("mean")) if v is not None]
        rows.setdefault(clean(one["checkpoint"]), set()).update(means)
    for row in load(out).claims["related"] if kind == "reproduce" else []:
        names = [NOISE.get(row[key], arm_label(row[key])) for key in ("arm", "other")]
        for name in (" and ".join(names), " and ".join(reversed(names))):
            rows.setdefault(name, set()).update(row[key] for key in ("value", "null", "null_std"))
    assert kind in ("still", "single") or page.tips
    for tip in page.tips:
        name, _, shown = tip.rpartition(": ")
        for text in re.split(r", null |, chance (?:± )?", shown):
            assert any(is_rounding(text, v) for v in rows[name]), tip
    written = " ".join(clean(p.read_text()) for p in out.glob("*.json"))
    pairs = values.select("diagnostic", "variant").unique().rows()
    written += " ".join(variant_label(d, v) for d, v in pairs) + " ".join(
        values["reason"].drop_nulls().unique().to_list()
    )
    for cell in page.cells:  # a digit outside a <data> element belongs to a name, a version, a hash, a setting
        for token in re.findall(r"[\w.]*\d[\w.]*", cell):
            assert token in written or token in clean(written), (token, cell)
    prose = re.sub(r"bf16|L1|R\d", "", page.verdict)
    for token in re.findall(r"\d[\d.]*", prose):
        assert token in written, token


def test_the_number_check_notices_a_number_that_is_not_there(reports: dict[str, tuple[Path, Page]]) -> None:
    assert is_rounding("51.9 %", 0.51908) and not is_rounding("52.0 %", 0.51908)
    assert (
        is_rounding("+1.4 pp", 0.0138) and is_rounding("1.30e-04", 1.3049e-4) and not is_rounding("1.30e-04", 1.31e-4)
    )
    assert 0.123456 not in numbers_in(reports["compare"][0])


def test_names_reach_the_page_as_text_only(reports: dict[str, tuple[Path, Page]]) -> None:
    out, _ = reports["hostile"]
    text = (out / "report.html").read_text(encoding="utf-8")
    assert text.count("<script") == 1 and "<img" not in text and "\x1b" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    scale = charts.Scale()
    for name in (
        HOSTILE,
        'font: 9px x id="',
        'a" onload="alert(1)',
        '<!-- --> ]]> &amp; d="M 1.23456 2" #0072b2',
        "$\\frac{1}{0}$",
    ):
        cells = {(0, name): 1.0}
        for chart in (
            charts.heatmap("h", name, scale, cells, roles=[name], layers=[0]),
            charts.distribution("d", name, scale, [charts.Group(name, [1.0, 2.0], [1.5, 1.5], [0.1, 0.1])]),
            charts.over_size(
                "o", name, scale, [charts.Points(name, "g0", [0.1, 0.2], [1.0, 2.0], [name, name])], size=name, alt=name
            ),
            charts.trajectory(
                "t", name, scale, [charts.Series(name, [0, 1], [1.0, 2.0]), charts.Series("b", [0, 1], [1.0, 2.0])]
            ),
        ):
            svg = Page(charts.inline_svg(chart))
            assert not svg.stack
            assert {t for t, _ in svg.tags} <= DRAWING
            assert not any(a.startswith("on") for _, attrs in svg.tags for a in attrs)


@pytest.mark.needs("chromium")
def test_a_table_of_matrices_keeps_any_name_as_text_and_fits_a_phone(tmp_path: Path, browser: Browser) -> None:
    prefixes = [HOSTILE, "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \U0001f600", "n" * 300]
    out = write(
        tmp_path / "out",
        [("tuned", None)],
        layers=1,
        roles=("q_proj", HOSTILE, "o_proj"),
        diagnostics=("relative_norm", "stable_rank"),
    )
    table = pl.read_parquet(out / "measurements.parquet")
    given = dict(zip(sorted(table["matrix"].unique()), prefixes, strict=True))
    table.with_columns(pl.col("matrix").replace(given)).write_parquet(out / "measurements.parquet")
    page = write_report(out)
    check_inert(Page(page.read_text(encoding="utf-8")), [resource("sort.js")])
    browser.open(page, width=390)
    assert browser.requested == [page.as_uri()] and browser.said == []
    browser.click(*browser.middle(".every summary"))
    for _ in range(2):
        browser.click(*browser.middle(".every thead button"))
        rows = browser.value(
            "[...document.querySelectorAll('.every tbody th')].map(e => [e.textContent, e.childElementCount])"
        )
        assert sorted(rows) == sorted([clean(name), 0] for name in prefixes)
    assert browser.value("document.documentElement.scrollWidth") == 390


def points_of(svg: str, series: str) -> list[tuple[float, float, str]]:
    """Place and tooltip of every point of a series, in the order of the markup; SVG's y grows downwards."""
    group = svg[svg.index(f'<g class="{series}"') :]
    found = re.findall(r"<use ([^>]*)><title>([^<]*)</title></use>", group[: group.index("</g>")])
    return [
        (float(re.search(r' x="([^"]*)"', at)[1]), float(re.search(r' y="([^"]*)"', at)[1]), tip)  # type: ignore[index]
        for at, tip in (("  " + at, tip) for at, tip in found)
    ]


def test_points_over_size_stand_where_their_values_are_and_say_what_they_are() -> None:
    sizes, values, names = [0.1, 0.001, 0.01], [4.0, 1.0, 2.0], ["c", "a", "b"]
    points = charts.Points("role", "g0", sizes, values, names, classes=["late", "early", "middle"])
    band = charts.Band(sizes, [1.0] * 3, [0.9] * 3, [1.1] * 3)
    for log in (False, True):
        svg = charts.inline_svg(charts.over_size("o", "title", charts.Scale(log=log), [points], band, size="size"))
        found = points_of(svg, "g0")
        assert [tip for _, _, tip in found] == names
        (c, a, b) = found
        assert b[0] - a[0] == pytest.approx(c[0] - b[0], rel=1e-3), "sizes are on a logarithmic axis"
        steps = (a[1] - b[1], b[1] - c[1])
        assert steps[1] == pytest.approx(steps[0] if log else 2 * steps[0], rel=1e-2)
        assert re.findall(r'class="(\w+)"><title>', svg) == ["late", "early", "middle"]


def test_a_study_shows_every_checkpoint_over_its_size(reports: dict[str, tuple[Path, Page]]) -> None:
    out, _ = reports["reproduce"]
    text = (out / "report.html").read_text(encoding="utf-8")
    section = text[text.index('<section id="sizes">') : text.index('<section id="verdict">')]
    titles = re.findall(r"<figcaption>([^<]*)</figcaption>", section)
    assert [t.split(" (")[0].split(",")[0] for t in titles[:3]] == [
        "Update sparsity",
        "Stable rank",
        "Principal angles",
    ]
    checkpoints = {c["checkpoint"] for c in json.loads((out / "summary.json").read_text())["checkpoints"]}
    first = section[section.index("<svg") : section.index("</svg>")]
    tips = re.findall(r"<title>([^<:]*): ", first)
    assert sorted(tips) == sorted(checkpoints)
    assert len(re.findall(r'type="checkbox"[^>]* checked', section)) == 4, "every arm can be hidden"
    assert (
        "Hollow: the paper" in section
        and "Hollow: the paper" not in (reports["compare"][0] / "report.html").read_text()
    )


def test_a_study_says_how_far_every_arm_is_from_the_null_of_its_size(
    reports: dict[str, tuple[Path, Page]], tmp_path: Path
) -> None:
    out, _ = reports["reproduce"]
    found = json.loads((out / "claims.json").read_text())["from_null"]
    table = (out / "report.html").read_text(encoding="utf-8").split('id="from-null"')[1].split("</table>")[0]
    heads = re.findall(r'<th class="n">([^<]+)</th>', table)
    assert [h.replace("\u00a0", " ") for h in heads[1:]] == [
        "Stable rank, value / null",
        "Principal angles (left mean, right mean), value / null",
        "Update–mask overlap (low magnitude α = 0.5), value − null",
    ]
    names = ["stable_rank", "principal_angles.left.mean+right.mean", "mask_overlap.low_magnitude.0.5"]
    rows = re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', table)
    for (shown, cells), arm in zip(rows, ("sft", "sft-matched", "opd", "rlvr"), strict=True):
        own = {row["name"]: row for row in found if row["arm"] == arm}
        numbers = [own[name][key] for name in names for key in ("excess", "low", "high") if own[name][key] is not None]
        assert shown == arm_label(arm) and len(numbers) == (3 if arm == "sft" else 9), "one seed has no interval"
        assert [float(x) for x in re.findall(r'<data value="([^"]+)"', cells)] == [own[names[0]]["seeds"], *numbers]
    text = write_markdown(out, tmp_path / "results.md").read_text()
    assert "| SFT | 1 | 2.00 | 2.00 | +20.0 pp |" in text
    assert "| OPD | 3 | 4.00 [3.60, 4.40] | 4.00 [3.60, 4.40] | +60.0 pp [+54.0, +66.0] |" in text


def test_thousands_of_experts_are_shown_as_distributions(tmp_path: Path) -> None:
    from mixture import write_mixture

    write_mixture(tmp_path / "out", 3000)
    path = write_report(tmp_path / "out")
    page = Page(path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 2_000_000
    gathered = [re.fullmatch(r"(\w+): (\d+) matri(?:x|ces)", tip) for tip in page.tips]
    counts = [int(m[2]) for m in gathered if m]
    charted = sum(t == "svg" and "against the relative norm" in a["aria-label"] for t, a in page.tags)
    assert charted > 8 and sum(counts) == 3000 * charted, "every matrix is in a dot"
    assert len(counts) < 1000 * charted and max(counts) > 10
    listed = [c for c in page.cells if c in ("gate_proj", "up_proj", "down_proj")]
    assert 0 < len(listed) <= 20


def test_the_page_of_a_trajectory_says_when_the_channel_locks(reports: dict[str, tuple[Path, Page]]) -> None:
    out, _ = reports["track"]
    text = (out / "report.html").read_text()
    table = text[text.index('id="locking"') :].partition("</table>")[0]
    rows = re.findall(r'<th scope="row">([^<]+)</th>(.*?)</tr>', table)
    assert [name for name, _ in rows] == ["K = 16, right", "K = 16, left", "K = 4, right"]
    row = json.loads((out / "summary.json").read_text())["locking"][0]
    shown = [re.findall(r'<data value="(\d+)">|(<span class="nil">)', cell) for cell in rows[0][1].split("</td>")[:-1]]
    pairs = [[int(number) if number else None for number, _ in cell] for cell in shown]
    assert pairs == [list(pair) for pair in zip(row["step"], row["null_step"], strict=True)]
    assert 'id="locking"' not in (reports["compare"][0] / "report.html").read_text()


def test_verdict_separates_size_from_geometry(reports: dict[str, tuple[Path, Page]]) -> None:
    said = " ".join(reports["compare"][1].verdict.split())
    assert "Its size does not explain" in said and "Same as an isotropic update of this size" in said
    assert said.index("Stable rank") < said.index("Same as an isotropic") < said.index("Update sparsity η rule")
    assert "matrices have a value for most diagnostics" in said and "skipped" in said
    assert "did not move" in reports["still"][1].verdict
    assert "No null models were run" in reports["bare"][1].verdict
    for kind in KINDS:
        assert not re.search(r"(OPD|SFT|RLVR)-like", reports[kind][1].verdict)
    many = " ".join(reports["reproduce"][1].verdict.split())
    assert "Beyond size in every arm" in many and "Beyond size in no arm" in many


@pytest.mark.parametrize("kind", KINDS)
def test_page_is_small_and_labels_are_plain(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    assert "mathdefault" not in (reports[kind][0] / "report.html").read_text(encoding="utf-8")
    assert (reports[kind][0] / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize("kind", ["compare", "large"])
def test_a_page_is_the_same_where_its_sections_read_the_file(
    kind: str, reports: dict[str, tuple[Path, Page]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = reports[kind]
    whole = (out / "report.html").read_text(encoding="utf-8")
    monkeypatch.setattr(data, "AT_ONCE", 0)
    write_report(out)
    assert (out / "report.html").read_text(encoding="utf-8") == whole


def test_a_damaged_table_is_told_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build("single", tmp_path / "out")
    file = out / "measurements.parquet"
    content = bytearray(file.read_bytes())
    content[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    file.write_bytes(content)
    for at_once in (data.AT_ONCE, 0):
        monkeypatch.setattr(data, "AT_ONCE", at_once)
        with pytest.raises(ConfigError, match=r"measurements\.parquet: unreadable"):
            write_report(out)


def test_a_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = build("still", tmp_path / "out")
    (out / "report.html").write_text("old")

    def broken(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="no space"):
        write_report(out)
    assert (out / "report.html").read_text() == "old"
    assert sorted(p.name for p in out.iterdir()) == [
        "curves.parquet",
        "measurements.parquet",
        "report.html",
        "run.json",
        "summary.json",
    ]


def test_figures_on_request(tmp_path: Path) -> None:
    out = build("single", tmp_path / "out")
    keep(out, ("relative_norm", "stable_rank", "update_sparsity"))
    write_report(out, figures=True)
    names = {p.stem for p in (out / "figures").glob("*.svg")}
    assert names == {p.stem for p in (out / "figures").glob("*.pdf")} and "distribution-stable-rank" in names
    assert all(p.read_bytes().startswith(b"%PDF") for p in (out / "figures").glob("*.pdf"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("measurements.parquet", None, "is missing; expected the data files of a finished run"),
        ("measurements.parquet", b"PAR1junk", "expected a parquet table"),
        ("curves.parquet", b"", "expected a parquet table"),
        ("summary.json", b'{"checkpoints": [', "expected JSON"),
        ("summary.json", b'{"checkpoints": []}', "no list of checkpoints"),
        (
            "summary.json",
            b'{"checkpoints": [{"checkpoint": "a", "diagnostics": [{}]}]}',
            "without diagnostic; expected",
        ),
        ("run.json", b"[]", "is a list; expected an object"),
        ("run.json", b'{"base": {"files": [{"name": "a"}]}}', "base.files[0] without bytes"),
        ("summary.json", b"[" * 100_000, "expected JSON"),
        ("claims.json", b"{}", "no list of claims"),
        (
            "claims.json",
            b'{"claims": [{"id": "R1", "claim": "", "verdict": "open", "rule": "", "measured": {"opd": {"low": {}}}}]}',
            "claims[0].measured.opd.low is a dict; expected a number",
        ),
    ],
)
def test_damaged_data_files_are_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    out = build("single", tmp_path / "out")
    if content is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(content)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        write_report(out)
    assert name in str(caught.value) and not (out / "report.html").exists()


def test_changed_values_are_refused_or_read(tmp_path: Path) -> None:
    """Of any type, at any place of summary.json and run.json."""
    steps = [(f"step-{s:06d}", s) for s in (20, 60, 100)]
    out, rng = write(tmp_path / "out", steps, layers=1, roles=("q_proj", "o_proj")), random.Random(0)
    values = [None, True, -1, 1e308, math.nan, "x", "\ud800", [], {}, [1], {"a": 1}, 10**30]

    def places(found: Any) -> list[tuple[Any, Any]]:
        inside = found.items() if isinstance(found, dict) else enumerate(found) if isinstance(found, list) else ()
        return [place for key, value in inside for place in [(found, key), *places(value)]]

    refused = 0
    for name in ("summary.json", "run.json"):
        sound = (out / name).read_text()
        for _ in range(60):
            data = json.loads(sound)
            holder, key = rng.choice(places(data))
            holder[key] = rng.choice(values)
            (out / name).write_text(json.dumps(data))
            try:
                load(out)
            except ConfigError as error:
                refused += name in str(error)
        (out / name).write_text(sound)
    assert 40 < refused < 120


def test_missing_folder_and_missing_column(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        write_report(tmp_path / "nowhere")
    out = build("single", tmp_path / "out")
    pl.read_parquet(out / "measurements.parquet").drop("null_std").write_parquet(out / "measurements.parquet")
    with pytest.raises(ConfigError, match="no column null_std"):
        write_report(out)


@pytest.mark.parametrize("kind", KINDS)
def test_terminal_tables(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    out, _ = reports[kind]
    for width, everything in ((30, True), (44, False), (80, True), (80, False), (140, True)):
        console = Console(file=io.StringIO(), width=width, force_terminal=False)
        print_summary(out, console, everything=everything)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert re.search(r"Stable\s+rank", text) and "\x1b" not in text
        assert not re.search(r"(?:meas|by c|geo|exc)\w*…", text), "a word of the head or a reading was cut"
        assert not re.search(r"\d…", text), "a number was cut"
        if kind == "compare" and width >= 80 and everything:
            assert "59.8" in text and "26/28" in text and "geometry ↓" in text and "size" in text
    if kind == "reproduce":
        console = Console(file=io.StringIO(), width=80)
        print_claims(out, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert "(39.0)" in text and not re.search(r"\d…", text)
        console = Console(file=io.StringIO(), width=120)
        print_claims(out, console)
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(
            word in text
            for word in (
                "holds",
                "inconclusive",
                "fails",
                "SFT matched",
                "not tested: R2",
                "after matching",
                "does not",
            )
        )
        first = claims_of(out)[0]
        judged = [first["verdict"], first["after_matching"]]
        assert re.search(r"^R1 .*" + r"\s+".join(judged) + r"\s*$", text, re.MULTILINE), "one column a verdict"


def test_a_study_as_text_says_what_the_data_say(reports: dict[str, tuple[Path, Page]], tmp_path: Path) -> None:
    out, _ = reports["reproduce"]
    text = write_markdown(out, tmp_path / "docs" / "results.md").read_text()
    for claim in claims_of(out):
        assert f"| {claim['id']} | {claim['claim']} | {claim['verdict']} | {claim['after_matching']} |" in text
        assert claim["rule"] in text
        assert all(f"| {c['control']} | {c['verdict']} |" in text for c in claim["controls"])
    assert "not after matching (size, start, learning rate or steps): R1." in text and "* Fails: L1." in text
    assert "opdgeo track assets/base run" in text and "2⁻⁸" in text and "R2 (one teacher only)" in text
    with pytest.raises(ConfigError, match=r"no claims\.json"):
        write_markdown(reports["compare"][0], tmp_path / "x.md")


def test_a_study_says_how_alike_its_arms_are_beside_chance_and_a_noise_arm(
    reports: dict[str, tuple[Path, Page]], tmp_path: Path
) -> None:
    out = shutil.copytree(reports["reproduce"][0], tmp_path / "out")
    claims = json.loads((out / "claims.json").read_text())
    html = (out / "report.html").read_text(encoding="utf-8")
    section = html[html.index('<section id="alike">') :].partition("</section>")[0]
    rows = claims["related"]
    cosines = {(r["arm"], r["other"]): r["value"] for r in rows if r["diagnostic"] == "update_cosine"}
    first, *_ = section.split('<table class="matrix">')[1:]
    shown = [
        float(v) for v in re.findall(r'title="[^"]*">(?:<strong>)?<data value="([^"]+)"', first.split("</table>")[0])
    ]
    across = cosines.pop(("sft", "sft-seed1"))
    assert sorted(shown) == sorted([*cosines.values()] * 2), "each pair twice, and SFT's seeds not among them"
    assert section.count('class="matrix"') == 4 and "without a verdict" in section
    sentences = [" ".join(unescape(re.sub("<[^>]*>", "", s)).split()) for s in re.findall(r"<li>(.*?)</li>", section)]
    by_text = write_markdown(out, tmp_path / "r.md").read_text()
    names = [("SFT matched", "OPD"), ("SFT matched", "RLVR"), ("OPD", "RLVR"), ("SFT", "sft-seed1")]
    values = [*(cosines[p] for p in (("sft-matched", "opd"), ("sft-matched", "rlvr"), ("opd", "rlvr"))), across]
    for (a, b), value in zip(names, values, strict=True):
        said = f"{a} and {b}: the cosine of the two updates is {value:.3f} (independent ones of these sizes have 0 ± 8.00e-04)"
        assert any(said in sentence for sentence in sentences), sentences
        assert said in by_text
    noisy = section.index("The pairs with a noise arm")
    assert section.index("OPD and RLVR: ") < noisy < section.index("OPD and coin flips (noise): ")
    table = section[section.index("Every pair, with its interval") :]
    low = next(r["low"] for r in rows if (r["arm"], r["other"]) == ("opd", "rlvr"))
    assert f'<data value="{low!r}">' in table
    # Without a noise arm it says so; a number that is none is refused.
    claims["related"] = [r for r in rows if "coin" not in (r["arm"], r["other"])]
    (out / "claims.json").write_text(json.dumps(claims))
    view = View(load(out))
    template = environment().get_template("sections/alike.html.j2")
    assert "no noise arm to read these numbers beside" in template.render(data=alike.find(view), view=view)
    claims["related"][0]["value"] = "0.7"
    with pytest.raises(ConfigError, match=r"related\[0\]\.value is a str; expected a number"):
        load_claims(claims)


def claims_of(out: Path) -> list[dict[str, Any]]:
    claims: list[dict[str, Any]] = json.loads((out / "claims.json").read_text())["claims"]
    return claims


def test_terminal_needs_neither_matplotlib_nor_torch() -> None:
    code = "import sys, opdgeo.report.terminal; print({'matplotlib', 'torch'} & set(sys.modules))"
    assert run_python("-c", code, cold=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (None, "share", "–"), (float("nan"), "number", "–"), (0.0, "share", "0 %"), (1.0, "share", "100 %"), (0.99999, "share", "99.999 %"),
        (0.516, "share", "51.6 %"), (0.0123, "share", "1.23 %"), (59.81, "number", "59.8"), (1.3e-4, "number", "1.30e-04"),
        (-0.5, "degrees", "−0.500°"), (7123456, "bytes", "6.8 MiB"), (12, "integer", "12"), (float("inf"), "number", "∞"),
    ],
)  # fmt: skip
def test_number(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_numbers_and_names_that_only_a_foreign_summary_has() -> None:
    """Each made an error of Python's own."""
    assert interval_decimals(-1e307, 1e307, "share") is None
    assert arm_of(f"opd-seed{'9' * 5000}/step-000001") == (f"opd-seed{'9' * 5000}", 0)
    assert expert_of(f"model.layers.0.mlp.experts.{'9' * 5000}.up_proj.weight") is None
    row = {"diagnostic": "x", "variant": "", "mean": 1.0, "computed": 1, "total": 1}
    null = {"mean": 1.0, "excess": 0.0, "reading": "by construction"}
    for rows, said in (([], "No matrix could be measured"), ([row | {"null": null}], "x")):
        summary = {"checkpoints": [{"checkpoint": "a", "unmoved": 1, "diagnostics": rows}]}
        for everything in (True, False):
            console = Console(file=io.StringIO(), width=80)
            print_summary(summary, console, everything=everything)
            assert said in console.file.getvalue()
    with pytest.raises(ConfigError, match="a whole number of 1329 bits"):
        print_summary({"checkpoints": [{"checkpoint": "a", "diagnostics": [row | {"mean": 10**400, "null": None}]}]})


@pytest.mark.needs("chromium")
def test_chromium_renders_without_requests(
    reports: dict[str, tuple[Path, Page]], tmp_path: Path, browser: Browser
) -> None:
    page = reports["hostile"][0] / "report.html"
    browser.open(page, width=1440)
    assert browser.requested == [page.as_uri()] and browser.said == []
    rendered = browser.value("document.documentElement.outerHTML")
    assert "Where the weights moved" in rendered
    assert "alert(2)>" not in re.sub(r"&\w+;", "", rendered).replace("alert(2)&gt;", "")

    # The same look at a page that does ask sees it.
    leak = tmp_path / "leak.html"
    asked = ["https://fonts.googleapis.com/css", "https://www.google.com/x.png"]
    leak.write_text(f'<link rel="stylesheet" href="{asked[0]}"><img src="{asked[1]}"><script>console.log(1)</script>')
    browser.open(leak, width=1440)
    assert set(browser.requested) == {leak.as_uri(), *asked} and browser.said


@pytest.mark.needs("chromium")
@pytest.mark.parametrize("kind", ["compare", "reproduce"])
def test_every_series_can_be_hidden_and_the_axis_made_linear(
    reports: dict[str, tuple[Path, Page]], browser: Browser, kind: str
) -> None:
    """Without a script of the page's. One is run in it here that uses every box and says what is seen then."""
    browser.open(reports[kind][0] / "report.html", width=1440)
    found = browser.value("""(() => {
      const seen = c => [...document.querySelectorAll("figure ." + c)].filter(e => getComputedStyle(e).display != "none").length;
      const boxes = [...document.querySelectorAll("fieldset.keys input")], names = boxes.map(b => b.id.replace("show-", "")).concat("log");
      const all = () => Object.fromEntries(names.map(n => [n, seen(n)]));
      const found = {before: all()};
      for (const b of boxes) { b.click(); found[b.id] = all(); b.click(); }
      return found; })()""")
    before = found.pop("before")
    assert before.pop("linear") == 0 < before["log"]
    assert all(count > 0 for count in before.values()) and len(found) > 4
    linear = found.pop("show-linear")
    assert linear["log"] == 0 and linear["linear"] == before["log"]
    for box, after in found.items():
        name = box.removeprefix("show-")
        after.pop("linear")
        assert after == before | {name: 0}, box


@pytest.mark.parametrize("kind", KINDS)
def test_a_notebook_shows_the_means_beside_their_nulls(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    out, _ = reports[kind]
    html = opdgeo.load(out)._repr_html_()
    page, known = Page(html), numbers_in(out)
    check_inert(page, [])
    assert len(html) < 20_000 and len(page.numbers) >= 12
    for exact, text in page.numbers:
        assert float(exact) in known and is_rounding(text, float(exact)), (exact, text)
    names = {m for block in re.findall(r"\.opdgeo \{([^}]*)\}", page.styles) for m in re.findall(r"(--\w+):", block)}
    assert set(re.findall(r"var\((--[\w-]+)", page.styles)) <= names, "every colour has a value outside the page too"
    if kind == "compare":
        row = next(
            d
            for d in json.loads((out / "summary.json").read_text())["checkpoints"][-1]["diagnostics"]
            if d["diagnostic"] == "stable_rank"
        )
        shown = [repr(row["mean"]), repr(row["null"]["mean"]), repr(row["null"]["excess"])]
        assert [exact for exact, _ in page.numbers if exact in shown] == shown
    if kind == "hostile":
        assert clean(HOSTILE) + "2" in unescape(re.findall(r"<strong>(.*?)</strong>", html)[0])


@pytest.mark.parametrize("kind", ["compare", "hostile"])
def test_a_notebook_shows_the_charts_of_the_page(reports: dict[str, tuple[Path, Page]], kind: str) -> None:
    out, _ = reports[kind]
    found = opdgeo.load(out).charts
    svgs = set(re.findall(r"<svg.*?</svg>", (out / "report.html").read_text(encoding="utf-8"), re.S))
    drawn = 0
    for name in list(found)[::8]:
        html = found[name]._repr_html_()
        shown = Page(html)
        check_inert(shown, [])
        assert {t for t, _ in shown.tags} - DRAWING == {"div", "style", "figure", "figcaption"}
        drawn += re.findall(r"<svg.*?</svg>", html, re.S)[0] in svgs
    assert drawn >= 2, "the same drawing as on the page; maps are tables there"
    for chart in [c for c in found.values() if c.name.startswith(("heatmap-stable", "spectra-matrix"))]:
        picture = io.BytesIO()
        chart.figure().savefig(picture, format="png", dpi=40)  # names with dollar signs are no formulas
        assert picture.getvalue().startswith(b"\x89PNG")


def test_a_study_opens_with_what_it_can_and_cannot_decide(
    reports: dict[str, tuple[Path, Page]], tmp_path: Path
) -> None:
    out, _ = reports["reproduce"]
    text = write_markdown(out, tmp_path / "results.md").read_text()
    page = (out / "report.html").read_text(encoding="utf-8")
    for where, table in ((text, "| | claim |"), (page, 'class="overview')):
        start = where.index("What this can and cannot decide")
        assert start < where.index("coin flips (noise)") < where.index(table), (
            "above the verdicts, with the noise control"
        )
        assert "exploratory" in where[start:] and "three of four studies" in where[start : where.index(table)]
    row = next(line for line in text.splitlines() if line.startswith("| coin flips (noise), exploratory |"))
    assert "| 0.0001 | 64 | 0.0246 | 80.0 % (80.8 %) | 4.90 (4.95) |" in row
    assert re.search(r'<th scope="row">OPD</th>\s*<td class="n"><data value="0.0001">', page)
    # Without a noise control it says so, and claims nothing.
    other = shutil.copytree(out, tmp_path / "other")
    claims = json.loads((other / "claims.json").read_text())
    del claims["noise"], claims["related"]
    (other / "claims.json").write_text(json.dumps(claims))
    keep(other, FEW)
    for where in (
        write_markdown(other, tmp_path / "o.md").read_text(),
        write_report(other).read_text(encoding="utf-8"),
    ):
        assert "trained no noise control" in where and "coin flips (noise)" not in where

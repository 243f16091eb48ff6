"""The demo's page and a page of `relate` in Chromium: on a desk and on a phone, light and dark, under a real mouse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

import opdgeo
import planted
from browser import Browser
from opdgeo.report.view import environment, resource
from program import run_opdgeo

pytestmark = pytest.mark.needs("chromium")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's page, of two roles."""
    out = tmp_path_factory.mktemp("demo")
    done = run_opdgeo("demo", "--roles", "q_proj,down_proj", "--nulls", 2, "--no-cache", "-o", out)
    assert done.returncode == 0, done.stderr
    return out / "report.html"


@pytest.fixture(scope="module")
def related(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three updates of one base."""
    folder, rng = tmp_path_factory.mktemp("relate"), np.random.default_rng(0)
    names = [planted.tensor_name(layer, m) for layer in range(2) for m in ("self_attn.q_proj", "mlp.up_proj")]
    base = {n: planted.weights(rng, 48, 40) for n in names}
    updates = [base] + [{n: w + 3e-3 * rng.standard_normal(w.shape) for n, w in base.items()} for _ in range(3)]
    made = [planted.write_checkpoint(folder / f"a-run-with-a-name-{i}", u, "bfloat16") for i, u in enumerate(updates)]
    settings = opdgeo.Settings(nulls=2)
    return opdgeo.relate(*made, cache=False, settings=settings).report(folder / "out")


def contrast(browser: Browser, selector: str) -> float:
    """Of the text of an element on the page's ground, as WCAG defines it."""
    text, ground = (
        browser.value(f"getComputedStyle({of}).{what}.match(/[\\d.]+/g).slice(0, 3).map(Number)")
        for of, what in ((f"document.querySelector('{selector}')", "color"), ("document.body", "backgroundColor"))
    )
    linear = [
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in rgb)]
        for rgb in (text, ground)
    ]
    dark, light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", ["demo", "related"])
def test_pages_fit_ask_for_nothing_and_say_nothing(name: str, browser: Browser, request: pytest.FixtureRequest) -> None:
    page: Path = request.getfixturevalue(name)
    grounds = set()
    for width in (1440, 390):
        for dark in (False, True):
            browser.open(page, width=width, dark=dark)
            assert browser.requested == [page.as_uri()] and browser.said == []
            assert browser.value("document.documentElement.scrollWidth") == width, (
                "only what scrolls in itself is wider"
            )
            charts = browser.value(
                "[...document.querySelectorAll('main svg')].map(e => e.getBoundingClientRect().width)"
            )
            drawn = [w for w in charts if w > 0]  # the others are linear doubles, which are not shown yet
            assert len(drawn) >= 3 and all(250 < w <= width for w in drawn)
            heads = browser.value(
                "[...document.querySelectorAll('.map thead th')].map(e => e.scrollWidth - e.clientWidth)"
            )
            assert heads and max(heads) <= 0, "no head of a map is cut"
            assert contrast(browser, "h1") > 7 and contrast(browser, ".small") > 4.5
            grounds.add((dark, browser.value("getComputedStyle(document.body).backgroundColor")))
    assert len(grounds) == 2 and len({ground for _, ground in grounds}) == 2


def test_a_mouse_over_a_mark_and_a_cell_says_which_matrix_it_is(demo: Path, related: Path, browser: Browser) -> None:
    hovered = """(e => [e.tagName, e.querySelector('title')?.textContent ?? e.closest('[title]')?.title,
        getComputedStyle(e).outlineStyle, getComputedStyle(e).strokeWidth])([...document.querySelectorAll(':hover')].pop())"""
    browser.open(demo, width=1440)
    browser.move(*browser.middle("#sizes .charts g.g0 use"))
    tag, tip, _, stroke = browser.value(hovered)
    assert tag == "use" and tip.startswith("model.layers.") and ", null " in tip and stroke == "1.5px"
    for page in (demo, related):
        browser.open(page, width=1440)
        browser.move(*browser.middle(".map td"))
        tag, tip, outline, _ = browser.value(hovered)
        assert tag == "TD" and tip.startswith("model.layers.") and outline == "solid"
    browser.move(*browser.middle(".matrix td[title]"))
    assert "a-run-with-a-name-" in browser.value(hovered)[1]


def test_clicks_hide_a_role_and_a_third_and_make_the_axis_linear(demo: Path, browser: Browser) -> None:
    seen = "s => [...document.querySelectorAll(s)].filter(e => e.getClientRects().length).length"
    browser.open(demo, width=390)

    def shown(selector: str) -> int:
        return browser.value(f"({seen})({selector!r})")

    for box, marks in (("g0", "svg .g0"), ("g1", "svg .g1"), ("early", "svg .early")):
        before = shown(marks)
        assert before > 0
        browser.click(*browser.middle(f"label:has(#show-{box})"))
        assert shown(marks) == 0
        browser.click(*browser.middle(f"label:has(#show-{box})"))
        assert shown(marks) == before
    before = shown(".log svg")
    assert before > 0 and shown(".linear svg") == 0
    browser.click(*browser.middle("label:has(#show-linear)"))
    assert shown(".log svg") == 0 and shown(".linear svg") == before


NAMES = "(s => [...document.querySelectorAll(s + ' tbody tr')].filter(e => e.checkVisibility()).map(e => e.cells[0].textContent))"
TURNS = "(s => [...document.querySelectorAll(s + ' thead th')].map(e => e.getAttribute('aria-sort')))"
TABLE = """{% extends "frame.html.j2" %}{% block title %}rows{% endblock %}{% block main %}
<table class="sortable"><thead><tr><th>name</th><th class="n">value</th><th></th><th>same</th></tr></thead><tbody>
{% for name, value, beside in rows %}<tr><th scope="row">{{ name }}</th>
<td>{{ value | num }}{% if beside %} <span>({{ beside | num }})</span>{% endif %}</td><td>{{ loop.index }}</td><td>one</td></tr>{% endfor %}
<tr><th scope="row">short</th><td colspan="3">was not measured</td></tr></tbody></table>{% endblock %}"""
ROWS = [
    ("layers.10.q", 0.52304, 7.0),
    ("layers.9.q", 0.52301, 1.0),  # both are shown as 0.523
    ("<b>layers.2.q</b>", None, 99.0),
    ("Layers.1.q", 1.2e5, None),  # 1.20e+05
    ("a", -3.0, None),
    ("b", float("inf"), None),
    ("tie", -3.0, None),
    ("tiny", 4e-9, None),
]


def test_a_table_sorts_by_exact_numbers_and_by_words(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "rows.html"
    page.write_text(environment().from_string(TABLE).render(rows=ROWS), encoding="utf-8")
    browser.open(page, width=1440)
    assert browser.said == [] and browser.value("document.querySelectorAll('thead button').length") == 2

    def after_a_press(column: int) -> tuple[list[str], list[str | None]]:
        browser.click(*browser.middle("thead button", column))
        return browser.value(f"{NAMES}('table')"), browser.value(f"{TURNS}('table')")

    given = [name for name, *_ in ROWS] + ["short"]
    undefined = ["<b>layers.2.q</b>", "short"]
    numbers = [(name, value) for name, value, _ in ROWS if value is not None]
    down = [name for name, _ in sorted(numbers, key=lambda row: -row[1])] + undefined
    up = [name for name, _ in sorted(numbers, key=lambda row: row[1])] + undefined
    assert up.index("a") < up.index("tie") and down.index("a") < down.index("tie"), "equal rows keep their order"
    assert after_a_press(1) == (down, [None, "descending", None, None])
    assert after_a_press(1) == (up, [None, "ascending", None, None])
    assert after_a_press(1) == (given, [None] * 4)
    words = ["<b>layers.2.q</b>", "a", "b", "Layers.1.q", "layers.9.q", "layers.10.q", "short", "tie", "tiny"]
    assert after_a_press(0) == (words, ["ascending", None, None, None])
    assert after_a_press(1)[1] == [None, "descending", None, None], "one column at a time"


def test_keys_sort_the_matrices_and_the_boxes_hide_rows(demo: Path, browser: Browser) -> None:
    browser.open(demo, width=390)
    assert browser.value(f"{NAMES}('.every')") == [], "closed at first"
    browser.click(*browser.middle(".every summary"))
    given = browser.value(f"{NAMES}('.every')")
    table = pl.read_parquet(demo.parent / "measurements.parquet").filter(diagnostic="relative_norm")
    exact = dict(table.select("matrix", "value").iter_rows())
    assert len(given) == len(exact) > 4
    browser.value("document.querySelector('.every summary').focus()")
    for _ in range(4):  # the table that scrolls, then the heads: matrix, role, relative norm
        browser.press("Tab")
    assert "Relative norm" in browser.value("document.activeElement.textContent")
    browser.press("Enter")
    ranked = sorted(given, key=lambda name: -exact[name])
    assert browser.value(f"{NAMES}('.every')") == ranked != given
    assert browser.value("document.activeElement.closest('th').ariaSort") == "descending"
    assert browser.value("getComputedStyle(document.activeElement).outlineStyle") != "none", "the focus is seen"
    browser.click(*browser.middle("label:has(#show-g0)"))
    assert browser.value(f"{NAMES}('.every')") == [name for name in ranked if "q_proj" not in name]
    browser.click(*browser.middle("label:has(#show-late)"))
    left = browser.value(f"{NAMES}('.every')")
    assert left and set(left) < {name for name in ranked if "q_proj" not in name}


def test_a_page_says_all_without_its_script(related: Path, browser: Browser) -> None:
    content = "document.querySelector('main').innerText"
    browser.open(related, width=1440)
    heads, said = browser.value("document.querySelectorAll('thead button').length"), browser.value(content)
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(related, width=1440)
        assert heads > 5 and browser.value("document.querySelectorAll('button').length") == 0
        assert browser.value(content) == said
    finally:
        browser.ask("Emulation.setScriptExecutionDisabled", value=False)


ATTACK = """<script>window.ran = 1</script><img src="data:," onerror="window.ran = 1"><svg onload="window.ran = 1"></svg>
<iframe srcdoc="<script>parent.ran = 1</script>"></iframe><details open ontoggle="window.ran = 1"></details>
<script src="data:text/javascript,window.ran=1"></script><script type="module">window.ran = 1</script><base href="https://example.org/">
<script>{}</script><a id="attack" href="javascript:void(window.ran = 1)">here</a>"""


def test_no_other_script_runs(related: Path, tmp_path: Path, browser: Browser) -> None:
    text = related.read_text(encoding="utf-8")
    slipped_in = ATTACK.replace("{}", resource("sort.js") + "window.ran = 1")
    attacked = text.replace("<main>", "<main>" + slipped_in)
    allowed = attacked.replace('http-equiv="Content-Security-Policy"', "")
    ran = []
    for name, content in (("attacked", attacked), ("allowed", allowed)):
        page = tmp_path / f"{name}.html"
        page.write_text(content, encoding="utf-8")
        browser.open(page, width=1440)
        browser.click(*browser.middle("#attack"))
        ran.append(browser.value("window.ran ?? 0"))
        if name == "attacked":
            assert browser.said and browser.value("document.baseURI") == page.as_uri()
            assert browser.value("document.querySelectorAll('thead button').length") > 5, "the page's own still does"
    assert ran == [0, 1], "the policy alone stops it"

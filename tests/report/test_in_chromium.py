"""The demo's page and a page of `relate` in Chromium: on a desk and on a phone, light and dark, under a real mouse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import opdgeo
import planted
from browser import Browser
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
